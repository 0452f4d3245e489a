"""The student's own texts: what is continued, what counts, and that a resumed training draws the same."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn

from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.losses.reverse_kl import ReverseKLLoss
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import CausalLanguageModeling
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.objective import Objective
from kd_lightning.training.on_policy import OnPolicy
from kd_lightning.types import IGNORE, Batch
from tests.data.corpus.texts import data, made
from tests.pair import in_two

V, MOST = 40, 16
TASK = CausalLanguageModeling(V)


def model(seed: int = 0, dropout: float = 0.0, vocabulary: int = V) -> CausalLM:
    torch.manual_seed(seed)
    found = causal_lm_small(vocabulary, 32, hidden_size=16, num_layers=2, num_heads=2)
    found.network.config.attention_dropout = dropout
    for layer in found.network.model.layers:  # type: ignore[union-attr]
        layer.self_attn.attention_dropout = dropout  # type: ignore[union-attr]
    found.network.lm_head.weight.data.mul_(20.0)  # type: ignore[operator, union-attr]
    return found.train()


def texts() -> Batch:
    """Two packed rows: of documents of 4 and 8 tokens, and of 10 tokens and padding."""
    ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[5] * 4 + [6] * 8, [7] * 10 + [-1] * 2])
    positions = torch.tensor([[*range(4), *range(8)], [*range(10), 0, 0]])
    labels = ids.masked_fill(positions == 0, IGNORE)
    return {
        "input_ids": ids, "attention_mask": (documents >= 0).long(), "labels": labels, "document_ids": documents,
        "position_ids": positions, "token_bytes": torch.ones_like(ids), "index": torch.tensor([3, 4]),
    }  # fmt: skip


def continued(batch: Batch, student: nn.Module, seed: int = 0, **options: Any) -> Batch:
    given: dict[str, Any] = {"share": 1.0, "prompt_tokens": 3, "new_tokens": 5, "most_tokens": MOST, "temperature": 0.0}
    return OnPolicy(**{**given, **options})(batch, TASK.compared(batch)["keep"], student, seed)


def likeliest(network: CausalLM, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, network.eval()(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


def test_a_text_goes_on_from_the_beginning_of_its_longest_document() -> None:
    """As the model would without its cache of keys and values, and alone in its row."""
    student, batch = model(), texts()
    before = {name: value.clone() for name, value in batch.items()}
    found = continued(batch, student)
    assert student.training
    assert all(torch.equal(batch[name], value) for name, value in before.items()), "the loader's batch stays"
    for row, prompt in ((0, batch["input_ids"][0, 4:7]), (1, batch["input_ids"][1, :3])):
        assert torch.equal(found["input_ids"][row, :8], likeliest(student, prompt, 5))
        assert found["attention_mask"][row].tolist() == [1] * 8 + [0] * 4
        assert found["position_ids"][row].tolist() == [*range(8), 0, 0, 0, 0]
        assert found["document_ids"][row].tolist() == [0] * 8 + [-1] * 4


def test_only_the_continuation_counts_and_only_for_the_teacher() -> None:
    found = TASK.compared(continued(texts(), model()))
    assert found["keep"].int().tolist() == [[0, 0] + [1] * 5 + [0] * 5] * 2
    assert bool((found["labels"] == IGNORE).all()), "nobody learns to repeat itself from labels"
    assert torch.equal(Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0}).counts(found), torch.tensor([0.0]))


def test_the_token_that_ends_a_text_counts_though_it_pads() -> None:
    student, batch = model(), texts()
    free = continued(batch, student)["input_ids"][0]
    found = continued(batch, student, ends=[int(free[5])])
    first = free[3:].tolist().index(int(free[5]))
    assert int(found["attention_mask"][0].sum()) == 3 + first + 1
    assert int(found["keep"][0].sum()) == first + 1
    assert not found["input_ids"][0, 3 + first + 1 :].any()


@pytest.mark.parametrize(("share", "counts"), [(0.0, {0}), (0.5, {1}), (0.75, {1, 2}), (1.0, {2})])
def test_a_share_of_the_texts_is_replaced(share: float, counts: set[int]) -> None:
    student, batch, replaced = model(), texts(), []
    for seed in range(12):
        found = continued(batch, student, seed, share=share)
        same = (found["labels"] == batch["labels"]).all(1)
        replaced.append(int((~same).sum()))
        kept = TASK.compared(batch)["keep"][same]
        assert torch.equal(TASK.compared(found)["keep"][same], kept), "what the others count stays"
    assert set(replaced) == counts


def test_a_conversation_goes_on_at_an_assistants_turn() -> None:
    student, batch = model(), texts()
    counted = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1], [0] * 12], dtype=torch.bool)
    batch["labels"] = batch["input_ids"].masked_fill(~counted, IGNORE)
    batch["keep"] = nn.functional.pad(counted[:, 1:], (0, 1))
    seen = set()
    for seed in range(20):
        found = continued(batch, student, seed, new_tokens=4)
        assert torch.equal(found["input_ids"][1], batch["input_ids"][1]), "no turn counts there"
        prompt = int(found["keep"][0].int().argmax()) + 1
        begin = {2: 0, 3: 4, 6: 4}[prompt]  # before the turns at 2, 7 and 10, from where their conversations begin
        assert torch.equal(found["input_ids"][0, :prompt], batch["input_ids"][0, begin : begin + prompt])
        assert int(found["keep"][0].sum()) == 4
        seen.add(prompt)
    assert seen == {2, 3, 6}


def test_nothing_is_longer_than_a_block_and_rows_without_tokens_are_never_drawn() -> None:
    wide = causal_lm_small(V + 24, 32, hidden_size=16, num_layers=1, num_heads=2)
    student = CausalLM(wide.network, V)
    found = continued(texts(), student, prompt_tokens=6, new_tokens=20, temperature=5.0)
    assert found["input_ids"].shape == (2, MOST)
    assert int(found["input_ids"].max()) < V
    assert found["attention_mask"].sum(1).tolist() == [MOST, MOST]


def test_draws_follow_the_seed_and_nothing_else() -> None:
    student = model(dropout=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = continued(texts(), student, 7, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    other = continued(texts(), student, 7, temperature=1.0)
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert not torch.equal(one["input_ids"], continued(texts(), student, 8, temperature=1.0)["input_ids"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 1.5}, r"on_policy\.share=1\.5: expected a part, from 0 to 1"),
        ({"prompt_tokens": 16}, r"on_policy\.prompt_tokens=16 .* room for a continuation within data\.block_size=16"),
        ({"temperature": -1.0}, r"on_policy\.temperature=-1: expected a number of 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        continued(texts(), model(), **options)


def test_a_network_that_generates_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear generates no text; only language models of transformers do"):
        continued(texts(), nn.Linear(2, 2))


# -- in a training ----------------------------------------------------------------------------------------------------


def module(tmp_path: Path, student: CausalLM, teacher: nn.Module, term: Any = SoftTargetLoss, **options: Any) -> Any:
    given: dict[str, Any] = {
        "share": 1.0, "prompt_tokens": 4, "new_tokens": 6, "most_tokens": 16, "temperature": 1.0, **options,
    }  # fmt: skip
    return DistillationModule(
        student, FrozenTeacher(teacher), Objective({"kd": term()}, {"kd": 1.0}), partial(torch.optim.SGD, lr=0.1),
        task=CausalLanguageModeling(student.vocab_size), on_policy=OnPolicy(**given),
    )  # fmt: skip


def fit(
    tmp_path: Path, taught: DistillationModule, steps: int, resume: str | None = None,
    corpus: L.LightningDataModule | None = None, **options: Any,
) -> None:  # fmt: skip
    off = ("logger", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", limit_val_batches=0, use_distributed_sampler=False,
        **{**dict.fromkeys(off, False), "enable_checkpointing": False, **options},  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(taught, datamodule=corpus or data(tmp_path, made(30), batch_size=4), ckpt_path=resume)


def vocabulary(tmp_path: Path) -> int:
    return data(tmp_path, made(30)).model_arguments("student")["vocab_size"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_draws_what_an_uninterrupted_one_does(tmp_path: Path, accumulate: int) -> None:
    size, options = vocabulary(tmp_path), {"share": 0.5}
    whole, first, second = (module(tmp_path, model(1, 0.3, size), model(2, 0.0, size), **options) for _ in range(3))
    fit(tmp_path, whole, 5, accumulate_grad_batches=accumulate)
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    more = {"enable_checkpointing": True, "callbacks": [saved], "accumulate_grad_batches": accumulate}
    fit(tmp_path, first, 3, **more)
    path = str(tmp_path / "saved" / "step=2.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(name.startswith("student.") for name in state), "no teacher in it"
    fit(tmp_path, second, 5, path, accumulate_grad_batches=accumulate)
    for one, other in zip(whole.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(one, other)


class Pieces(L.LightningDataModule):
    """Of four texts those of each batch."""

    def __init__(self, *batches: list[int]) -> None:
        super().__init__()
        self.batches, self.around = batches, None

    def train_dataloader(self) -> Any:
        rows = {name: torch.cat([value, value.roll(1, -1)]) for name, value in texts().items()}
        rows["index"] = torch.arange(4)
        assert self.around is not None
        return self.around([{name: value[chosen] for name, value in rows.items()} for chosen in self.batches])


ALL = [0, 1, 2, 3]
ENDED: dict[str, Any] = {"temperature": 0.0, "ends": range(0, V, 3)}
"""The likeliest tokens, of continuations of other lengths."""


def flat(taught: DistillationModule) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in taught.student.parameters()])


def test_an_accumulated_step_is_the_mean_over_all_its_tokens(tmp_path: Path) -> None:
    """The likeliest continuations do not depend on their batch: two batches of two texts are one of four."""
    found = []
    for batches in ([ALL], [[0, 1], [2, 3]], [[0], [2], [1], [3]]):
        taught = module(tmp_path, model(1), model(2), **ENDED)
        fit(tmp_path, taught, 1, corpus=Pieces(*batches), accumulate_grad_batches=len(batches))
        found.append(flat(taught))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", [SoftTargetLoss, ReverseKLLoss])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_own_texts(tmp_path: Path, term: Any) -> None:
    size = vocabulary(tmp_path)
    taught = module(tmp_path, model(1, 0.0, size), model(1, 0.0, size), term)
    before = [weight.clone() for weight in taught.student.parameters()]
    fit(tmp_path, taught, 2)
    for old, new in zip(before, taught.student.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-6)


def test_other_loaders_are_refused(tmp_path: Path) -> None:
    taught = module(tmp_path, model(), model(2))
    loader = torch.utils.data.DataLoader([{"input_ids": torch.zeros(4, dtype=torch.long)}])  # type: ignore[arg-type, var-annotated]
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"data modules of ours: give trainer\.fit\(datamodule="):
        trainer.fit(taught, loader)


# -- in two processes -------------------------------------------------------------------------------------------------


class Drawn(L.Callback):
    """Notes what each step of a process trains on."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        self.batches.append({name: batch[name] for name in ("index", "input_ids", "keep")})


def one_of_two(rank: int, folder: Path) -> dict[str, Any]:
    """Train some students as one of two processes; return their weights and what they were trained on."""
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {**numbers, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    size = vocabulary(folder)

    def trained(taught: DistillationModule, steps: int, *more: L.Callback, **options: Any) -> dict[str, Any]:
        drawn = Drawn()
        own = {"strategy": "ddp", "devices": 2, "plugins": [TorchElasticEnvironment()], "callbacks": [drawn, *more]}
        given = {"corpus": data(folder, made(30), batch_size=2), **options}
        fit(folder, taught, steps, **own, **given, enable_checkpointing=bool(more))
        return {"weights": flat(taught), "batches": drawn.batches}

    def fresh() -> DistillationModule:
        taught: DistillationModule = module(folder, model(1, 0.3, size), model(2, 0.0, size), share=0.75)
        return taught

    found = {}
    for name, batches in (("whole", [[rank, rank + 2]]), ("accumulated", [[rank], [rank + 2]])):
        taught = module(folder, model(1), model(2), **ENDED)
        found[name] = trained(taught, 1, corpus=Pieces(*batches), accumulate_grad_batches=len(batches))
    found["same texts"] = trained(module(folder, model(1), model(2)), 1, corpus=Pieces(ALL))
    found["uninterrupted"] = trained(fresh(), 5)
    saved = ModelCheckpoint(folder / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trained(fresh(), 3, saved)
    found["resumed"] = trained(fresh(), 5, resume=str(folder / "saved" / "step=2.ckpt"))
    return found


@pytest.mark.slow
def test_two_processes_draw_for_their_own_texts_and_step_as_one(tmp_path: Path) -> None:
    first, second = in_two(one_of_two, tmp_path, tmp_path)
    taught = module(tmp_path, model(1), model(2), **ENDED)
    fit(tmp_path, taught, 1, corpus=Pieces(ALL))
    for name in ("whole", "accumulated"):
        counts = [sum(int(batch["keep"].sum()) for batch in one[name]["batches"]) for one in (first, second)]
        assert counts[0] != counts[1], "else any mean would be that over all tokens"
        torch.testing.assert_close(first[name]["weights"], flat(taught), rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name]["weights"], second[name]["weights"])

    drawn = [one["same texts"]["batches"][0] for one in (first, second)]
    assert torch.equal(drawn[0]["index"], drawn[1]["index"])
    assert not torch.equal(drawn[0]["input_ids"], drawn[1]["input_ids"]), "each process has random numbers of its own"

    written = {}
    for batch in data(tmp_path, made(30)).all_dataloader():
        written |= dict(zip(batch["index"].tolist(), batch["input_ids"].tolist(), strict=True))
    continued, batches = 0, [one["uninterrupted"]["batches"] for one in (first, second)]
    for mine, theirs in zip(*batches, strict=True):
        assert not set(mine["index"].tolist()) & set(theirs["index"].tolist())
    for batch in (batch for own in batches for batch in own):
        for index, ids, keep in zip(*(batch[name].tolist() for name in ("index", "input_ids", "keep")), strict=True):
            if ids[: len(written[index])] != written[index]:
                prompt = ids[: keep.index(True) + 1]
                begins = range(len(written[index]) - len(prompt) + 1)
                assert any(written[index][begin : begin + len(prompt)] == prompt for begin in begins)
                continued += 1
    assert continued > len(batches[0]), "of 2 texts a step and process, three quarters"
    for one in (first, second):
        assert torch.equal(one["resumed"]["weights"], one["uninterrupted"]["weights"])
        assert torch.equal(one["resumed"]["weights"], first["resumed"]["weights"])
