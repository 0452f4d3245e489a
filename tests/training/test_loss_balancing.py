"""Which term drives the student: shares and gradients against NumPy, and the policies on quadratics and in training."""

from __future__ import annotations

import copy
import csv
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import DictConfig
from torch import Tensor, nn

from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.loss_balancing import (
    POLICIES,
    GradNorm,
    Uncertainty,
    UnitInitial,
    gradient_report,
    gradnorm_step,
    loss_shares,
    make_balance,
    shared_gradients,
)
from kd_lightning.training.objective import Objective
from kd_lightning.training.schedules import Linear, OneMinus
from tests.conftest import tiny_overrides
from tests.training.test_distillation import FEATURES, Hint, batches, loader, make

RNG = np.random.default_rng(3)
W, X, A, B = (RNG.normal(size=shape) for shape in ((3, 4), (4,), (3,), (3,)))
POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


def quadratics(weight: Tensor) -> dict[str, Tensor]:
    """a: 1/2 |W x - A|^2, whose gradient is (W x - A) x^T; b: twice that with B."""
    y = weight @ torch.from_numpy(X)
    return {"a": (y - torch.from_numpy(A)).square().sum() / 2, "b": (y - torch.from_numpy(B)).square().sum()}


def gradients_by_hand() -> tuple[np.ndarray, np.ndarray]:
    return np.outer(W @ X - A, X), 2 * np.outer(W @ X - B, X)


def parameter(value: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


# -- shares and gradients ---------------------------------------------------------------------------------------------


def test_loss_shares() -> None:
    parts = {"ce": torch.tensor(0.5), "kd": torch.tensor(3.0), "off": torch.tensor(7.0)}
    shares = loss_shares(parts, {"ce": 0.4, "kd": 0.6, "off": 0.0})
    assert {name: float(share) for name, share in shares.items()} == pytest.approx(
        {"ce": 0.2 / 2.0, "kd": 1.8 / 2.0, "off": 0.0}
    )
    assert loss_shares({"ce": torch.tensor(1.0), "kd": torch.tensor(torch.nan)}, {"ce": 1.0, "kd": 1.0})["kd"].isnan()
    nothing = loss_shares({"ce": torch.tensor(0.0)}, {"ce": 1.0})
    assert float(nothing["ce"]) == 0.0


def test_gradients_are_numpys() -> None:
    weight = parameter(W)
    parts = quadratics(weight)
    report = gradient_report(parts, {"a": 0.3, "b": 0.1})
    g_a, g_b = gradients_by_hand()
    a, b = np.linalg.norm(g_a), np.linalg.norm(g_b)
    assert report == pytest.approx(
        {
            "norm/a": a,
            "norm/b": b,
            "share/a": 0.3 * a / (0.3 * a + 0.1 * b),
            "share/b": 0.1 * b / (0.3 * a + 0.1 * b),
            "cosine/a-b": (g_a * g_b).sum() / (a * b),
        },
        rel=1e-10,
    )
    assert weight.grad is None, "nothing is accumulated"
    sum(parts.values()).backward()  # the graph is still there
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), g_a + g_b, rtol=1e-12)


def test_terms_without_weight_or_without_the_student_are_left_out() -> None:
    parts = quadratics(parameter(W)) | {"constant": torch.tensor(3.0)}
    assert gradient_report(parts, {"a": 1.0, "b": 0.0, "constant": 1.0}) == {}
    assert set(gradient_report(parts, {"a": 1.0, "b": 0.5, "constant": 1.0})) == {
        "norm/a", "norm/b", "share/a", "share/b", "cosine/a-b",
    }  # fmt: skip


def test_a_term_without_a_gradient_on_this_batch_has_share_zero() -> None:
    weight = parameter(W)
    report = gradient_report(quadratics(weight) | {"masked": weight.sum() * 0.0}, {"a": 1.0, "b": 1.0, "masked": 1.0})
    assert report["norm/masked"] == report["share/masked"] == report["cosine/a-masked"] == 0.0
    assert report["share/a"] + report["share/b"] == pytest.approx(1.0)


def test_terms_that_share_nothing_are_told_apart() -> None:
    parts = {"a": parameter(A).square().sum(), "b": parameter(B).square().sum()}
    with pytest.raises(RuntimeError, match="the terms a, b reach no parameter in common"):
        shared_gradients(parts)


class Tower(nn.Module):
    """Three layers, the last one registered first and the first one's matrix used again in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tied = nn.Linear(4, 4), nn.Embedding(5, 4)
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.projector = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        embedded = self.tied(ids).mean(1)
        hidden = self.norm(self.first(embedded).tanh())
        head = self.head(hidden)
        return {
            "embedded": embedded.square().sum(),
            "hint": self.projector(hidden).square().sum(),
            "ce": head.logsumexp(1).sum(),
            "kd": head.square().sum(),
            "tied": (head @ self.tied.weight.T).logsumexp(1).sum(),
        }


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        (("ce", "kd"), "head"),  # the last in the forward pass, though registered first
        (("ce", "hint"), "first"),  # neither head nor projector nor the norm's vectors
        (("hint", "tied"), "first"),  # the tied matrix is used last by one term, but first by the other
        (("tied", "embedded"), "tied"),
        (("ce", "kd", "hint", "embedded"), "tied"),
    ],
)
def test_the_shared_layer_is_the_last_that_all_terms_reach(names: tuple[str, ...], layer: str) -> None:
    torch.manual_seed(0)
    tower = Tower()
    ids = torch.tensor([[0, 1, 2], [2, 3, 4]])
    found = shared_gradients({name: value for name, value in tower(ids).items() if name in names})
    for name, gradient in found.items():
        tower.zero_grad()
        tower(ids)[name].backward()
        expected = tower.get_submodule(layer).weight.grad
        torch.testing.assert_close(gradient, expected.flatten())


class Bundled(torch.autograd.Function):
    """Two layers as one node, as a compiled network is: the graph says that `hidden` reaches both matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, first, second)
        return x @ first, x @ first @ second

    @staticmethod
    def backward(ctx: Any, of_hidden: Tensor, of_output: Tensor) -> tuple[None, Tensor, Tensor]:
        x, first, second = ctx.saved_tensors
        return None, x.T @ (of_hidden + of_output @ second.T), (x @ first).T @ of_output


def test_one_node_for_the_whole_network_does_not_hide_the_shared_layer() -> None:
    first, second = parameter(W), parameter(np.arange(8.0).reshape(4, 2))
    hidden, output = Bundled.apply(torch.ones(1, 3, dtype=torch.float64), first, second)
    parts = {"ce": output.square().sum(), "kd": output.exp().sum()}
    torch.testing.assert_close(shared_gradients(parts)["ce"], torch.autograd.grad(
        parts["ce"], second, retain_graph=True)[0].flatten())  # fmt: skip
    parts = {"ce": output.square().sum(), "hint": hidden.square().sum(), "masked": output.sum() * 0.0}
    found = shared_gradients(parts)
    for name, part in parts.items():
        torch.testing.assert_close(found[name], torch.autograd.grad(part, first, retain_graph=True)[0].flatten())


def test_sparse_gradients_have_norms() -> None:
    table = nn.Embedding(5, 4, sparse=True)
    rows = table(torch.tensor([1, 1, 3]))
    report = gradient_report({"a": rows.sum(), "b": rows[0].sum()}, {"a": 1.0, "b": 1.0})
    assert report["norm/a"] == pytest.approx(math.sqrt(4 * (2**2 + 1)))
    assert report["cosine/a-b"] == pytest.approx(2 / math.sqrt(5))


def test_small_float16_gradients_do_not_vanish() -> None:
    """As a GradScaler would: the loss is not scaled yet, and 1e-8 is zero in float16."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    value = (weight.float() @ torch.eye(2)).half().float().sum()
    report = gradient_report({"a": value * 1e-8, "b": value}, {"a": 1.0, "b": 1.0})
    assert report["norm/a"] == pytest.approx(2e-8, rel=0.01)
    assert report["norm/b"] == 2.0


# -- the policies -----------------------------------------------------------------------------------------------------


def test_fixed_is_the_weighted_sum() -> None:
    parts = {"a": torch.tensor(2.0), "b": torch.tensor(5.0)}
    assert float(make_balance("fixed", ["a", "b"])(parts, {"a": 0.1, "b": 0.9})) == pytest.approx(4.7)


def test_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="balance='gradnrm': unknown policy; did you mean 'gradnorm'"):
        Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0}, balance="gradnrm")


def test_unit_initial_starts_every_term_at_its_weight() -> None:
    policy, weights = UnitInitial(["a", "b"]), {"a": 0.3, "b": 0.7}
    assert float(policy({"a": torch.tensor(8.0)}, weights | {"b": 0.0})) == pytest.approx(0.3)  # b has no weight yet
    values = [(8.0, 0.0), (4.0, 0.002), (2.0, 0.001)]  # b is masked in its first batch
    losses = [float(policy({"a": torch.tensor(a), "b": torch.tensor(b)}, weights)) for a, b in values]
    assert losses == pytest.approx([0.3, 0.3 / 2 + 0.7, 0.3 / 4 + 0.7 / 2])
    assert {name: float(f) for name, f in policy.factors().items()} == pytest.approx({"a": 1 / 8, "b": 500})
    again = UnitInitial(["a", "b"])
    again.load_state_dict(policy.state_dict())
    assert float(again({"a": torch.tensor(4.0), "b": torch.tensor(0.004)}, weights)) == pytest.approx(0.15 + 1.4)


def test_unit_initial_learns_nothing_outside_of_training_and_never_raises_a_term_without_bound() -> None:
    policy = UnitInitial(["a"]).eval()
    assert float(policy({"a": torch.tensor(5.0)}, {"a": 1.0})) == 5.0
    policy.train()
    policy({"a": torch.tensor(1e-30)}, {"a": 1.0})  # a student that begins as its teacher
    assert float(policy.factors()["a"]) == pytest.approx(1e4)


def test_gradnorm_takes_the_gradient_of_its_loss() -> None:
    """The closed form against finite differences of L_grad, in NumPy."""
    v, norm, progress = np.array([0.5, 1.7, 0.8]), np.array([2.0, 0.3, 1.1]), np.array([0.9, 0.4, 0.7])
    alpha, rate = 1.5, 1e-3
    mean = (v * norm).mean()
    target = mean * (progress / progress.mean()) ** alpha  # constant

    def loss(log_v: np.ndarray) -> float:
        return float(np.abs(np.exp(log_v) * norm - target).sum())

    step = 1e-6 * np.eye(3)
    gradient = np.array([(loss(np.log(v) + h) - loss(np.log(v) - h)) / 2e-6 for h in step])
    moved = np.exp(np.log(v) - rate * gradient / mean)
    expected = moved * v.sum() / moved.sum()
    found = gradnorm_step(*(torch.tensor(x) for x in (v, norm, progress)), alpha, rate)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)
    assert np.abs(found.numpy() - v).max() > 1e-4


def test_gradnorm_brings_unequal_gradients_together_and_keeps_the_weights() -> None:
    """a = c_a |w|^2 / 2 and b = c_b |w|^2 / 2: both train at one rate, so the norms v c |w| must become equal."""
    policy, weight = GradNorm(["a", "b"]), parameter(W)
    scale = {"a": 200.0, "b": 1.0}
    for _ in range(1500):
        parts = {name: c * weight.square().sum() / 2 for name, c in scale.items()}
        loss = policy(parts, {"a": 0.2, "b": 0.8})
    factors = {name: float(factor) for name, factor in policy.factors().items()}
    assert sum(factors.values()) == pytest.approx(2.0)
    assert factors["a"] / factors["b"] == pytest.approx(1 / 200, rel=0.11)  # the sign's step is 5%, to either side
    report = gradient_report(parts, {name: w * factors[name] for name, w in {"a": 0.2, "b": 0.8}.items()})
    assert report["share/b"] == pytest.approx(0.8, abs=0.02)  # the gradients are as the configured weights are
    assert loss.item() == pytest.approx(sum(w * factors[n] * parts[n].item() for n, w in (("a", 0.2), ("b", 0.8))))


def test_gradnorm_restores_the_term_that_lags() -> None:
    norm = torch.ones(2)
    v = gradnorm_step(torch.ones(2), norm, torch.tensor([0.9, 0.1]), 1.5, 0.05)  # a has hardly got anywhere
    assert v[0] > 1 > v[1]
    even = gradnorm_step(torch.ones(2), norm, torch.tensor([0.9, 0.1]), 0.0, 0.05)
    assert even.tolist() == [1.0, 1.0]


def test_gradnorm_measures_every_tenth_batch_and_goes_on_counting() -> None:
    def parts() -> dict[str, Tensor]:
        weight = parameter(W)
        return {"a": 5 * weight.square().sum(), "b": weight.square().sum()}

    policy, seen = GradNorm(["a", "b"]), []
    for _ in range(14):
        policy(parts(), {"a": 1.0, "b": 1.0})
        seen.append(float(policy.weight[0]))
    changes = [i for i, (last, now) in enumerate(zip([1.0, *seen], seen, strict=False)) if last != now]
    assert changes == [0, 10]
    again = GradNorm(["a", "b"])
    again.load_state_dict(copy.deepcopy(policy.state_dict()))
    for _ in range(6):
        again(parts(), {"a": 1.0, "b": 1.0})
    assert float(again.weight[0]) == seen[-1]
    again(parts(), {"a": 1.0, "b": 1.0})
    assert float(again.weight[0]) < seen[-1]


def test_gradnorm_leaves_out_terms_that_do_not_pull() -> None:
    policy = GradNorm(["a", "off", "masked", "b"])
    weights = {"a": 1.0, "off": 0.0, "masked": 1.0, "b": 1.0}
    for rounds in range(31):
        w = parameter(W)
        parts = {"a": 5 * w.square().sum(), "off": w.sum().abs(), "masked": w.sum() * 0.0, "b": w.square().sum()}
        if rounds % 2:
            del parts["off"]  # the objective does not even compute it
        policy(parts, weights)
    a, off, masked, b = policy.weight.tolist()
    assert off == masked == 1.0
    assert a < 1 < b
    assert a + b == pytest.approx(2.0)
    with torch.no_grad():
        policy(parts, weights)  # nothing to measure, and nothing breaks


def test_gradnorm_says_what_it_cannot_do() -> None:
    parts = {"a": parameter(A).square().sum(), "b": parameter(B).square().sum()}
    with pytest.raises(ConfigError, match="balance=gradnorm: the terms a, b reach no parameter in common; use fixed"):
        GradNorm(["a", "b"])(parts, {"a": 1.0, "b": 1.0})


def test_ranks_agree_on_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks; the other one has half this one's losses, and 3 and 1 times its gradients."""
    scales = [torch.tensor([0.5, 0.5]), torch.tensor([[3.0, 1.0], [0.5, 0.5]])]  # L(0); then norms and losses
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(1 + scales.pop(0)))
    policy, weight = GradNorm(["a", "b"]), parameter(W)
    parts = quadratics(weight)
    policy(parts, {"a": 1.0, "b": 1.0})
    assert not scales
    assert policy.initial.tolist() == pytest.approx([0.75 * part.item() for part in parts.values()])
    norms = torch.tensor([2 * np.linalg.norm(gradients_by_hand()[0]), np.linalg.norm(gradients_by_hand()[1])])
    expected = gradnorm_step(torch.ones(2), norms.float(), torch.ones(2), 1.5, 0.05)
    torch.testing.assert_close(policy.weight, expected)


def test_uncertainty_is_kendalls_loss_and_learns_its_optimum() -> None:
    """For constant losses d/ds (exp(-s) L + s / 2) = 0 at s = log 2 L, whatever the weight."""
    policy, weights, values = Uncertainty(["a", "b"]), {"a": 0.25, "b": 4.0}, {"a": 3.0, "b": 0.05}
    parts = {name: torch.tensor(value) for name, value in values.items()}
    with torch.no_grad():
        policy.log_variance.copy_(torch.tensor([0.7, -1.2]))
    expected = 0.25 * (math.exp(-0.7) * 3 + 0.35) + 4 * (math.exp(1.2) * 0.05 - 0.6)
    loss = policy(parts, weights)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    by_hand = [0.25 * (0.5 - math.exp(-0.7) * 3), 4 * (0.5 - math.exp(1.2) * 0.05)]
    assert policy.log_variance.grad.tolist() == pytest.approx(by_hand)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        policy(parts, weights).backward()
        optimizer.step()
    assert policy.log_variance.tolist() == pytest.approx([math.log(6), math.log(0.1)], abs=1e-3)
    assert {name: float(f) for name, f in policy.factors().items()} == pytest.approx({"a": 1 / 6, "b": 10}, rel=1e-2)


# -- in training ------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Draws a dropout mask in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.head = nn.Linear(FEATURES, 16), nn.Dropout(0.3), nn.Linear(16, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.first(pixel_values).tanh()))
        return logits


def three_terms(policy: str = "fixed") -> Objective:
    torch.manual_seed(4)
    alpha = Linear(start=0.2, end=0.9)
    terms = {"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(2.0), "hint": Hint()}
    return Objective(terms, {"ce": OneMinus(alpha), "kd": alpha, "hint": 0.1}, policy)


def fit(policy: str = "fixed", logger: Any = False, module: DistillationModule | None = None, **options: Any) -> Any:
    ckpt = options.pop("ckpt_path", None)
    module = module or make(three_terms(policy), student=Deep())
    settings = {"max_epochs": 8, "num_sanity_val_steps": 0, "log_every_n_steps": 10, "accelerator": "cpu", **options}
    trainer = L.Trainer(
        logger=logger, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, **settings
    )
    trainer.fit(module, loader(batches([8] * 15, unlabelled=True)), ckpt_path=ckpt, weights_only=True)
    return module


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """What was logged, by step."""
    found: dict[int, dict[str, float]] = {}
    for row in csv.DictReader((folder / "metrics.csv").open(encoding="utf-8")):
        values = {key: float(value) for key, value in row.items() if value and key != "step"}
        found.setdefault(int(row["step"]), {}).update(values)
    return found


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name=None, version="")


def test_no_name_of_a_term_is_a_formula_to_a_spreadsheet(tmp_path: Path) -> None:
    names = ("=1+1", "-x", "@x", "a,b\n=2")
    objective = Objective({name: CrossEntropyLoss() for name in names}, dict.fromkeys(names, 0.25))
    fit(logger=csv_logger(tmp_path), module=make(objective, student=Deep()), max_epochs=2)
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        heading, *rows = csv.reader(file)
    assert any("=1+1" in name for name in heading)
    assert all(name in ("epoch", "step") or name.startswith(("train/", "val/", "lr-")) for name in heading)
    assert all(math.isfinite(float(cell)) for row in rows for cell in row if cell)


def same_weights(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]) if isinstance(value, Tensor) else value == b.state_dict()[name]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fixed", {"precision": "bf16-mixed"}),
        ("unit_initial", {"accumulate_grad_batches": 2}),
        ("gradnorm", {}),
        ("gradnorm", {"precision": "bf16-mixed"}),
        ("uncertainty", {"accumulate_grad_batches": 2}),
    ],
)
def test_looking_at_gradients_changes_no_weight(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    watched = fit(policy, csv_logger(tmp_path), **options)
    same_weights(watched, fit(policy, **options))
    compared = [step for step, values in logged(tmp_path).items() if "train/gradient/share/kd" in values]
    assert compared == ([0, 50] if options.get("accumulate_grad_batches") else [0, 50, 100])


def test_what_is_logged(tmp_path: Path) -> None:
    fit("gradnorm", csv_logger(tmp_path))
    values = logged(tmp_path)
    first, ninth = values[0], values[9]
    names = {f"{kind}/{name}" for kind in ("norm", "share") for name in ("ce", "kd", "hint")}
    names |= {"cosine/ce-kd", "cosine/ce-hint", "cosine/kd-hint"}
    assert set(first) - {"epoch"} == {f"train/gradient/{name}" for name in names}
    assert sum(first[f"train/gradient/share/{name}"] for name in ("ce", "kd", "hint")) == pytest.approx(1)
    weighted = {n: ninth[f"train/weight/{n}"] * ninth[f"train/balance/{n}"] * ninth[f"train/{n}"]
                for n in ("ce", "kd", "hint")}  # fmt: skip
    assert ninth["train/loss"] == pytest.approx(sum(weighted.values()), rel=1e-5)
    for name, value in weighted.items():
        assert ninth[f"train/share/{name}"] == pytest.approx(value / ninth["train/loss"], rel=1e-5)
    assert not any(key.startswith("train/gradient/") for key in ninth)  # old values are not written again


def test_the_logged_gradients_are_those_of_the_first_step(tmp_path: Path) -> None:
    """Against autograd on the head's weight, term by term, in a forward pass of its own."""
    module = make(three_terms(), student=Deep())
    fresh = copy.deepcopy(module)
    fit(logger=csv_logger(tmp_path), module=module)
    first, batch = logged(tmp_path)[0], batches([8] * 15, unlabelled=True)[0]
    gradients = {}
    for name in ("ce", "kd", "hint"):
        torch.manual_seed(0)
        fresh.zero_grad()
        fresh.student.dropout.p = 0.0
        _, parts = fresh.objective(fresh._tap(batch), fresh.teacher(batch), batch, 0.0)
        parts[name].backward()
        gradients[name] = fresh.student.head.weight.grad.flatten()
    without_dropout = make(three_terms(), student=Deep())
    without_dropout.student.dropout.p = 0.0
    fit(logger=csv_logger(tmp_path / "plain"), module=without_dropout)
    plain = logged(tmp_path / "plain")[0]
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    total = 0.8 * norms["ce"] + 0.2 * norms["kd"] + 0.1 * norms["hint"]
    for name, weight in (("ce", 0.8), ("kd", 0.2), ("hint", 0.1)):
        assert plain[f"train/gradient/norm/{name}"] == pytest.approx(norms[name], rel=1e-5)
        assert plain[f"train/gradient/share/{name}"] == pytest.approx(weight * norms[name] / total, rel=1e-5)
        assert first[f"train/gradient/norm/{name}"] != plain[f"train/gradient/norm/{name}"]
    cosine = float(gradients["ce"] @ gradients["kd"] / norms["ce"] / norms["kd"])
    assert plain["train/gradient/cosine/ce-kd"] == pytest.approx(cosine, rel=1e-4)


def test_the_grad_scaler_scales_no_norm(tmp_path: Path) -> None:
    def norms(folder: Path, **options: Any) -> list[float]:
        fit(logger=csv_logger(folder), max_epochs=1, **options)
        return [value for key, value in sorted(logged(folder)[0].items()) if "/norm/" in key]

    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    assert norms(tmp_path / "half", plugins=[scaled]) == pytest.approx(norms(tmp_path / "full"), rel=0.02)


@POLICY
def test_a_resumed_training_equals_an_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    step = 15  # the end of an epoch, amid ten batches of GradNorm

    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    whole = fit(policy, callbacks=[Save()])
    resumed = fit(policy, ckpt_path=tmp_path / "x.ckpt")
    same_weights(whole, resumed)
    if policy != "fixed":
        assert any(name.startswith("objective.balance.") for name in torch.load(tmp_path / "x.ckpt")["state_dict"])


def test_learned_variances_train_without_decay_and_stay_out_of_the_student() -> None:
    module = make(three_terms("uncertainty"), student=Deep(), optimizer=partial(torch.optim.AdamW, lr=0.05))
    fit(module=module, max_epochs=1)
    assert float(module.objective.balance.log_variance.abs().min()) > 0.05
    groups = module.trainer.optimizers[0].param_groups
    assert [
        g["weight_decay"] for g in groups if any(p is module.objective.balance.log_variance for p in g["params"])
    ] == [0.0]
    assert not any("variance" in name for name in module.student.state_dict())


def test_a_network_whose_backward_runs_once_trains_on_unwatched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if torch._C._autograd._get_current_graph_task_keep_graph():
                raise RuntimeError("compiled with non-empty donated buffers")
            return gradient

    class Student(Deep):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return Once.apply(super().forward(pixel_values))

    with caplog.at_level(logging.WARNING):
        watched = fit(logger=csv_logger(tmp_path), module=make(three_terms(), student=Student()))
    assert caplog.text.count("gradients are not compared: compiled with non-empty donated buffers") == 1
    same_weights(watched, fit())
    assert not any("train/gradient/share/kd" in values for values in logged(tmp_path).values())
    with pytest.raises(ConfigError, match="balance=gradnorm: compiled with non-empty"):
        fit(module=make(three_terms("gradnorm"), student=Student()))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fixed", "gradnorm"])
def test_a_compiled_student(policy: str, tmp_path: Path) -> None:
    def network() -> DistillationModule:
        module = make(three_terms(policy), student=Deep())
        if policy == "gradnorm":
            module.student.dropout.p = 0.0  # compiled dropout draws other masks
        return module

    def compiled(logger: Any) -> DistillationModule:
        torch._dynamo.reset()
        module = network()
        module.student.compile(dynamic=True)
        return fit(policy, logger, module)

    with torch._functorch.config.patch(donated_buffer=False):  # as `compile: true` sets it
        watched = compiled(csv_logger(tmp_path))
        same_weights(watched, compiled(False))
    fit(logger=csv_logger(tmp_path / "eager"), module=network())
    first, eager = logged(tmp_path)[0], logged(tmp_path / "eager")[0]
    assert first.keys() == eager.keys()
    if policy == "gradnorm":
        assert first == pytest.approx(eager, rel=1e-4)
    else:  # compiled with torch's defaults
        same_weights(compiled(csv_logger(tmp_path / "donated")), watched)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Each rank weighs alike, and looking at gradients moves nothing."""
    found = [
        fit("gradnorm", logger, devices=2, strategy="ddp_spawn", max_epochs=3, use_distributed_sampler=False,
            callbacks=[SaveEachRank(tmp_path / str(bool(logger)))])
        for logger in (False, csv_logger(tmp_path / "csv"))
    ]  # fmt: skip
    same_weights(*found)
    for watched in ("True", "False"):
        ranks = [torch.load(tmp_path / watched / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0] if "_extra" not in name)


class SaveEachRank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch["pixel_values"] = batch["pixel_values"] + trainer.global_rank  # each rank its own data

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_with_a_policy(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    from kd_lightning.pipeline.compare import compare
    from kd_lightning.pipeline.context import Run
    from kd_lightning.pipeline.run import train_all

    overrides = [*tiny_overrides(toy_csv, tmp_path / "run"), "teacher.trainer.max_steps=2", "trainer.max_steps=20"]
    pipeline = Run(composed(*overrides, "balance=unit_initial"))
    train_all(pipeline)
    report = compare(pipeline, "kd-train ...")
    assert report["settings"]["balance"] == "unit_initial"
    curve = report["models"]["distilled"]["curves"][0]
    assert set(curve["gradient_share"]) == set(curve["loss_share"]) == {"ce", "kd"}
    assert curve["gradient_share"]["kd"]["steps"] == [0]
    assert (tmp_path / "run" / "shares.png").is_file()
    assert not report["models"]["baseline"]["curves"][0]["gradient_share"]
    with pytest.raises(ConfigError, match="balance was unit_initial, now fixed"):
        Run(composed(*overrides))
    (tmp_path / "run" / "config.yaml").unlink()
    other = Run(composed(*overrides))
    with pytest.raises(ConfigError, match="balance was unit_initial, now fixed"):
        train_all(other)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["balance=gradnrm"], "balance='gradnrm' is not one of fixed, .*; did you mean 'gradnorm'"),
        (["balance=null"], "balance needs a value"),
        (["balance=gradnorm", "trainer=fsdp2"], "balance=gradnorm compares whole gradients"),
    ],
)
def test_mistakes_are_refused(composed: Callable[..., DictConfig], overrides: list[str], says: str) -> None:
    from kd_lightning.pipeline.validation import validate

    with pytest.raises(ConfigError, match=says):
        validate(composed(*overrides))


def test_shares_of_terms_that_cancel_are_shares() -> None:
    shares = loss_shares({"a": torch.tensor(1.0), "b": torch.tensor(-1.0)}, {"a": 1.0, "b": 1.0})
    assert [float(share) for share in shares.values()] == [0.5, 0.5]
    nothing = loss_shares({"a": torch.tensor(0.0), "b": torch.tensor(0.0)}, {"a": 1.0, "b": 1.0})
    assert [float(share) for share in nothing.values()] == [0.0, 0.0]


def test_uncertainty_of_a_negative_term_stops_at_its_bound() -> None:
    policy = make_balance("uncertainty", ["vid", "ce"])
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        policy({"vid": torch.tensor(-1.0), "ce": torch.tensor(0.5)}, {"vid": 1.0, "ce": 1.0}).backward()
        optimizer.step()
    factors = policy.factors()
    assert factors["vid"].item() == pytest.approx(1e4)
    assert factors["ce"].item() == pytest.approx(1.0, rel=1e-2)  # 1 / (2 L)
