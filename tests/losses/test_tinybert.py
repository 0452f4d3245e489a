"""The two stages of conf/distillation/tinybert.yaml, and the layer map of bert_emd.yaml."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from kd_lightning.config.instantiate import build
from kd_lightning.losses.layers import LayerwiseTerm
from kd_lightning.training.objective import Objective


def test_intermediate_layers_are_in_the_first_stage_and_the_prediction_in_both(
    composed: Callable[..., DictConfig],
) -> None:
    objective: Objective = build(composed("distillation=tinybert").distillation)
    stages = [
        {name: objective.settings(at)[f"weight/{name}"] for name in objective.terms} for at in (0.0, 0.49, 0.5, 1)
    ]
    assert stages[0] == stages[1] == {"embedding": 1.0, "hidden": 0.01, "attention": 10.0, "prediction": 1.0}
    assert stages[2] == stages[3] == {"embedding": 0.0, "hidden": 0.0, "attention": 0.0, "prediction": 1.0}


def test_bert_emd_pairs_every_layer_with_every_one(composed: Callable[..., DictConfig]) -> None:
    objective: Objective = build(composed("distillation=bert_emd").distillation)
    for name in ("hidden", "attention"):
        term = objective.terms[name]
        assert isinstance(term, LayerwiseTerm)
        term.plan(lambda kind: 2, lambda kind: 6)
        assert len(term.pairs) == 12
