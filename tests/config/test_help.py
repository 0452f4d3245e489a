"""`kd-train --help` and the comments of conf/config.yaml tell what a key is for in the schema's words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from string import Template

import pytest
from omegaconf import DictConfig

from comment_config import commented
from kd_lightning.config import parsing
from kd_lightning.config.help import keys_help
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.config.schema import (
    FinetuneConfig,
    GeneratedConfig,
    OnPolicyConfig,
    RunConfig,
    TaskConfig,
    TeacherConfig,
)

Composed = Callable[..., DictConfig]


def test_every_key_is_there_with_its_value_type_and_doc(composed: Composed) -> None:
    cfg = composed("seed=0", "teacher.cache_top_k=3", "stages=[distill]", "peers=[{_target_: my.Network, width: 2}]")
    text = Template(keys_help(cfg)).substitute()
    lines, words = text.splitlines(), " ".join(text.split())
    kinds = {
        "": RunConfig, "teacher.": TeacherConfig, "on_policy.": OnPolicyConfig, "generated.": GeneratedConfig,
        "finetune.": FinetuneConfig,
    }  # fmt: skip
    for prefix, kind in kinds.items():
        for one in fields(kind):
            if one.name in ("teacher", "on_policy", "generated", "finetune", "tasks"):
                continue
            assert any(re.match(rf"  {prefix}{one.name}(=|$)", line) for line in lines), one.name
            assert " ".join(parsing.docs(kind)[one.name].split()) in words
    assert "  seed=0  (a whole number)" in lines
    assert "  teacher.cache_top_k=3  (a whole number or null, at least 1)" in lines
    assert "  stages=[distill]  (a list of teacher, baseline, distill, finetune)" in lines
    assert "  run_dir=runs/${name}  (a text)" in lines
    assert "      data.views=auto" in lines
    assert "      data.tokenizer=${tokenizer_of:student}" in lines
    assert [f"  tasks.NAME.{one.name}" in text for one in fields(TaskConfig)] == [True] * 3
    assert max(map(len, lines)) <= 120


def test_the_comments_of_the_configuration_are_the_docs() -> None:
    """scripts/comment_config.py writes them."""
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    assert commented(text) == text
    assert commented(text.replace("# How much work", "# So much work")) == text


def test_another_doc_is_another_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parsing.docs(RunConfig), "compile", "Another doc.")
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    assert commented(text).count("# Another doc.\ncompile: false\n") == 1
    assert "# Whether to torch.compile the students." not in commented(text)
