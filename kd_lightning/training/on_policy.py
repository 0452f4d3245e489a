"""On-policy distillation: the student continues prompts, the teacher predicts for its words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.data.corpus.blocks import PADDING
from kd_lightning.models.adapt import unwrap
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.continuation import continuations
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch


class OnPolicy:
    """Replaces texts of a batch by prompts that the student has continued.

    Generalised knowledge distillation (Agarwal et al. 2023, arXiv 2306.13649): what a student writes is unlike what it
    was trained on, and there the teacher corrects it. The rows of logits that predict a token of a continuation, its
    end included, count for the terms that compare logits; none has a label. The prompt does not count.

    Where a batch says which of its tokens count (conversations), a prompt is all of a conversation before a turn that
    counts, drawn from those in the row. Otherwise it is the beginning of the row's longest document.

    The draws are functions of the seed and the batch, so that a resumed training repeats an uninterrupted one.

    Args:
        share: Which part of a batch's texts is replaced, lambda in [0, 1]; on average, where it is no whole number.
        prompt_tokens: Tokens of a prompt of running text.
        new_tokens: The most tokens of a continuation.
        most_tokens: The most tokens of both.
        ends: The tokens that end a text or a turn.
        temperature: Of the draw; 0 takes the likeliest tokens.

    Raises:
        ConfigError: A value out of its range, or prompts that leave no room.
    """

    def __init__(
        self, share: float, prompt_tokens: int, new_tokens: int, most_tokens: int, ends: Sequence[int] = (),
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        if not 0 <= share <= 1:
            raise ConfigError(f"on_policy.share={share:g}: expected a part, from 0 to 1")
        if not 1 <= prompt_tokens < most_tokens or new_tokens < 1:
            raise ConfigError(
                f"on_policy.prompt_tokens={prompt_tokens} and on_policy.new_tokens={new_tokens}: expected 1 or more "
                f"each, and room for a continuation within data.block_size={most_tokens}"
            )
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"on_policy.temperature={temperature:g}: expected a number of 0 or more")
        self.share, self.ends, self.temperature = share, tuple(ends), temperature
        self.prompt_tokens, self.new_tokens, self.most_tokens = prompt_tokens, new_tokens, most_tokens

    def __call__(self, batch: Batch, keep: Tensor, student: nn.Module, seed: int) -> Batch:
        """Return a batch with continuations.

        Args:
            batch: Texts `(B, L)`, with `labels` and `attention_mask`.
            keep: `(B, L)`, which of its rows of logits count.
            student: A `CausalLM`, possibly compiled or wrapped.
            seed: Of the draws.

        Raises:
            ConfigError: Another student.
        """
        model = unwrap(student)
        if not isinstance(model, CausalLM):
            raise ConfigError(
                f"on_policy.share={self.share:g}: {type(model).__name__} generates no text; only language models of "
                "transformers do (causal_lm, causal_lm_small, causal_lm_from_teacher)"
            )
        generator = torch.Generator().manual_seed(seed)
        count = int(self.share * len(keep) + float(torch.rand((), generator=generator)))
        rows = torch.randperm(len(keep), generator=generator)[:count].tolist()
        spans = {row: span for row in rows if (span := self._prompt(batch, row, generator)) is not None}
        batch = {**batch, "keep": keep}
        if not spans:
            return batch
        prompts = [batch["input_ids"][row, begin:end] for row, (begin, end) in spans.items()]
        new = continuations(model, prompts, self.new_tokens, self.ends, self.temperature, seed)
        room = [self.most_tokens - len(prompt) for prompt in prompts]
        texts = {
            row: (len(prompt), torch.cat([prompt, own[:most]]))
            for row, prompt, own, most in zip(spans, prompts, new, room, strict=True)
        }
        return _replaced(batch, texts)

    def _prompt(self, batch: Batch, row: int, generator: torch.Generator) -> tuple[int, int] | None:
        """Return where a row's prompt begins and ends; None where it has none that leaves room."""
        documents, length = batch.get("document_ids"), int(batch["attention_mask"][row].sum())
        if "keep" in batch:
            counted = batch["labels"][row] != IGNORE
            begins = (counted & ~F.pad(counted, (1, 0))[:-1]).nonzero()[:, 0]
            if not len(begins):
                return None
            end = int(begins[torch.randint(len(begins), (), generator=generator)])
            begin = 0 if documents is None else int((documents[row] == documents[row, end]).nonzero()[0])
        else:
            begin, stop = 0, length
            if documents is not None:
                _, sizes = torch.unique_consecutive(documents[row, :length], return_counts=True)
                begin = int(sizes[: (longest := int(sizes.argmax()))].sum())
                stop = begin + int(sizes[longest])
            end = min(begin + self.prompt_tokens, stop - 1)
        return (begin, end) if 0 < end - begin < self.most_tokens else None


def _replaced(batch: Batch, texts: dict[int, tuple[int, Tensor]]) -> Batch:
    """Return a batch with other texts in some rows, each the length of its prompt and all its tokens."""
    shape = batch["input_ids"].shape
    more = max(0, max(len(ids) for _, ids in texts.values()) - shape[1])
    found = dict(batch)
    for name, value in batch.items():
        if value.shape == shape:
            found[name] = F.pad(value, (0, more), value=PADDING.get(name, 0))
            found[name][list(texts)] = PADDING.get(name, 0)
    for row, (prompt, ids) in texts.items():
        size = len(ids)
        found["input_ids"][row, :size], found["attention_mask"][row, :size] = ids, 1
        found["keep"][row, prompt - 1 : size - 1] = True
        if "document_ids" in found:
            found["document_ids"][row, :size], found["position_ids"][row, :size] = 0, torch.arange(size)
    return found


class Continued:
    """The batches of a loader, each changed when it is fetched: right before its step.

    Args:
        loader: Batches.
        change: Returns a changed one.
    """

    def __init__(self, loader: Iterable[Batch], change: Callable[[Batch], Batch]) -> None:
        self.loader, self.change = loader, change
        self.sampler = getattr(loader, "sampler", None)  # Lightning sets its epoch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.change, iter(self.loader))
