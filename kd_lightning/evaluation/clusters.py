"""Standard errors of means over values that come in clusters, such as the tokens of documents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kd_lightning.tasks.scores import UnitSums


def residuals(sums: UnitSums) -> NDArray[np.float64]:
    r"""Return each unit's part of a mean's error, (T_u - R W_u) over the sum of W, `(U,)`."""
    weight = sums.weights.sum()
    parts: NDArray[np.float64] = (sums.totals - sums.totals.sum() / weight * sums.weights) / weight
    return parts


def clustered_error(parts: NDArray[np.float64]) -> float:
    r"""Return the standard error of a mean over values drawn unit by unit, such as a document's.

    $$ \sqrt{\frac{U}{U - 1} \sum_u r_u^2} $$ for residuals r of U units, of one mean or of the difference of two: the
    linearised ratio estimator (Cochran 1977, Sampling Techniques, chapter 6). nan for a single unit.

    >>> from kd_lightning.tasks.scores import UnitSums
    >>> right = UnitSums(np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4))
    >>> round(clustered_error(residuals(right)), 3)  # 0.5 / sqrt(4), as of four independent examples
    0.25
    """
    count = len(parts)
    return math.sqrt(count / (count - 1) * float(parts @ parts)) if count > 1 else math.nan
