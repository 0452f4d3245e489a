"""The task that the benchmarks of language models share: State of the Union addresses, read by SmolLM2's tokenizer.

Networks have random weights: what they predict is of no matter here, what it costs is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from benchmarks.task import ALPHA
from kd_lightning.data import Sotu
from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.objective import Objective
from kd_lightning.types import SparseLogits

TOKENS, BLOCK, TOP_K = 150_000, 128, 32
FULL, TRIMMED = "smollm2", "trimmed:smollm2"
SMOLLM2 = {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
"""The sizes of SmolLM2-135M."""
STUDENT = {"hidden_size": 288, "num_layers": 6, "num_heads": 9, "num_key_value_heads": 3, "intermediate_size": 768}
"""Those of `experiment=lm_sotu`'s student."""


@cache
def addresses(tokenizer: str = TRIMMED, batch_size: int = 16) -> Sotu:
    """Return blocks of 128 tokens of 150,000 training tokens."""
    data = Sotu(tokenizer=tokenizer, train_tokens=TOKENS, block_size=BLOCK, batch_size=batch_size)
    data.prepare()
    return data


def network(sizes: dict[str, int], data: Sotu, *, logits_in_training: bool = False) -> CausalLM:
    """Return a network for the data's vocabulary, with the weights of seed 0."""
    torch.manual_seed(0)
    return causal_lm_small(len(data.tokenizer_of("student")), BLOCK, **sizes, logits_in_training=logits_in_training)


def smollm2_shaped(vocabulary: int) -> CausalLM:
    """Return a network of SmolLM2-135M's sizes for a vocabulary."""
    torch.manual_seed(0)
    return causal_lm_small(vocabulary, 2048, **SMOLLM2).eval()


def sparse_objective() -> Objective:
    """Return `(1 - alpha) CE + alpha KL` from K classes and their tail, as in conf/."""
    return Objective({"ce": CrossEntropyLoss(), "kd": SparseKDLoss()}, {"ce": 1 - ALPHA, "kd": ALPHA})


def stored_training_blocks(data: Sotu, folder: Path) -> CachedTeacher:
    """Return stored outputs for the training blocks, of any small teacher: what looking them up costs is measured."""
    teacher = FrozenTeacher(network({"hidden_size": 32, "num_layers": 1}, data, logits_in_training=True))
    cache = TeacherCache.create(
        folder / "cache", {"teacher": "benchmark"}, data.num_examples, Storage("float16", TOP_K)
    )
    fill(cache, teacher, data.select(tokens="teacher", pool=False).train_dataloader(), alone=False)
    return CachedTeacher(cache)


def random_sparse(*rows: int, vocabulary: int) -> SparseLogits:
    """Return K log probabilities of random classes, none twice in a row, and their tail."""
    ids = (torch.randint(vocabulary, (*rows, 1)) + 7 * torch.arange(TOP_K)) % vocabulary
    values = torch.randn(*rows, TOP_K).log_softmax(-1) - 0.1
    return SparseLogits(values, ids, torch.log1p(-values.exp().sum(-1)), vocabulary)
