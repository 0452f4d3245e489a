"""The spans that a model of question answering finds in contexts of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kd_lightning.data.text.question_windows import encode_questions
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.spans import decided, trimmed
from kd_lightning.training.run_folder import model_of
from kd_lightning.types import IGNORE

if TYPE_CHECKING:
    from kd_lightning.training.run_folder import TrainedModel

BATCH = 64
"""Windows that are predicted together."""


def found_spans(model: TrainedModel, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the span that a model finds for each question, and the characters where it stands.

    A long context is read in the windows of the training's data; of these the best span counts.

    Raises:
        ConfigError: The model reads something else.
    """
    if model.tokenizer is None or model.max_length is None or model.windows is None:
        raise ConfigError(f"the model in {model.folder} does not read questions with contexts")
    tokenizer: Any = model.tokenizer
    windows = encode_questions(tokenizer, pairs, model.max_length, **model.windows)
    unknown = np.full(len(windows.tokens), IGNORE, np.int64)
    data = windows.dataset(unknown, range(len(windows)), int(tokenizer.pad_token_id))
    network = model_of(model)
    of_window: dict[int, dict[str, Any]] = {}
    order = np.argsort(windows.lengths, kind="stable")
    for start in range(0, len(order), BATCH):
        batch = data[order[start : start + BATCH]]
        records = model.task.read(network(batch).logits.float(), batch, model.class_names)
        of_window |= dict(zip(batch["index"].tolist(), records, strict=True))
    score, none = (torch.tensor([of_window[i][name] for i in range(len(windows))]) for name in ("score", "none"))
    questions = torch.from_numpy(windows.questions)
    decisions = decided(questions, score, none, True)
    found = []
    for (_, context), row, there in zip(pairs, decisions[1].tolist(), decisions[2].tolist(), strict=True):
        if there:
            best, tokens = of_window[row], windows.chars[windows.offsets[row] : windows.offsets[row + 1]]
            first, last = trimmed(context, int(tokens[best["start"], 0]), int(tokens[best["end"], 1]))
            text = context[first:last]
            found.append({"answer": text, "start": first, "end": last, "score": round(best["chance"], 4)})
        else:
            own = np.flatnonzero(windows.questions == windows.questions[row]).tolist()
            least = min((of_window[i] for i in own), key=lambda one: float(one["none"]))
            found.append({"answer": None, "start": None, "end": None, "score": round(least["none_chance"], 4)})
    return found
