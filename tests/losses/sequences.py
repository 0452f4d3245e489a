"""Hand-made attentions and states for the tests of transformer losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Term
from kd_lightning.types import ModelOutput
from tests.losses.conformance import randn

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
"""Four examples of at most three positions."""


def attention(examples: int, heads: int, length: int, seed: int = 0) -> Tensor:
    """Probabilities `(B, H, L, L)`."""
    return randn(examples, heads, length, length, seed=seed).softmax(-1)


def without_padding_keys(probabilities: Tensor, mask: Tensor) -> Tensor:
    """What a network gives for a padded batch: no probability on padding."""
    kept = probabilities.masked_fill(~mask[:, None, None, :], 0.0)
    return kept / kept.sum(-1, keepdim=True)


def by_query(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of attentions `(B, L, H, L)`: the mask's axes are then the first two, as `Conformance` wants."""

    def of_queries_first(student: Tensor, teacher: Tensor, *others: Tensor, **options: Any) -> Tensor:
        return function(student.transpose(1, 2), teacher.transpose(1, 2), *others, **options)

    return of_queries_first


def said(features: Mapping[str, Tensor]) -> ModelOutput:
    """A network's output with these features."""
    return ModelOutput(torch.zeros(len(next(iter(features.values()))), 2), dict(features))


def depths(hidden: int) -> Callable[[str], int]:
    """A network of so many layers of each kind."""
    return lambda kind: hidden


def lengthened(features: Mapping[str, Tensor], more: int = 2) -> dict[str, Tensor]:
    """The same with more padding positions at the end, which hold numbers that should not matter."""
    return {
        name: F.pad(x, (0, more, 0, more)).index_fill(2, torch.arange(x.shape[2], x.shape[2] + more), 0.3)
        .masked_fill(torch.arange(x.shape[3] + more) >= x.shape[3], 0.0)
        if name.startswith("attention")
        else torch.cat([x, 9.0 + randn(len(x), more, *x.shape[2:], seed=99).to(x)], dim=1)
        for name, x in features.items()
    }  # fmt: skip


def assert_padding_changes_nothing(term: Term, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """The term's value and its gradient are the same when the batch is padded longer."""
    mask = MASK.long()
    padded_mask = F.pad(mask, (0, 2))
    for x in student.values():
        x.requires_grad_()
    value = term(said(student), said(teacher), {"attention_mask": mask})
    padded = term(said(lengthened(student)), said(lengthened(teacher)), {"attention_mask": padded_mask})
    torch.testing.assert_close(padded, value)
    assert value.item() > 0
    assert_padding_may_be_no_number(term, student, teacher, value)
    gradients = torch.autograd.grad(value, list(student.values()))
    for x, gradient, again in zip(
        student.values(), gradients, torch.autograd.grad(padded, list(student.values())), strict=True
    ):
        torch.testing.assert_close(again, gradient)
        counts = (
            MASK.view(4, 1, 3, 1) if x.ndim == 4 and x.shape[2:] == (3, 3) else MASK.view(4, 3, *[1] * (x.ndim - 2))
        )
        assert (gradient.masked_select(~counts) == 0).all()


def assert_padding_may_be_no_number(
    term: Term, student: dict[str, Tensor], teacher: dict[str, Tensor], value: Tensor
) -> None:
    """NaN at padding reaches neither the value nor a gradient, of the student or of what the term learns."""

    def holed(x: Tensor) -> Tensor:
        square = x.ndim == 4 and x.shape[2:] == (3, 3)
        counts = MASK[:, None, :, None] & MASK[:, None, None, :] if square else MASK.view(4, 3, *[1] * (x.ndim - 2))
        return torch.where(counts, x.detach(), torch.nan)

    given = {name: holed(x).requires_grad_() for name, x in student.items()}
    again = term(said(given), said({name: holed(x) for name, x in teacher.items()}), {"attention_mask": MASK.long()})
    torch.testing.assert_close(again, value)
    for gradient in torch.autograd.grad(again, [*given.values(), *term.parameters()]):
        assert torch.isfinite(gradient).all()
