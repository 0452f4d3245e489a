"""Networks are refused that cannot read what the data give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BertConfig, BertModel

from kd_lightning.data import RankingFiles, TextFiles
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.pipeline.networks import build_network, check_reads
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import EnsembleNetwork
from tests.toy_lists import write_lists
from tests.toy_pairs import pairs

AS_BERT = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize(
    ("template", "entries", "types"),
    [
        (AS_BERT, ["token_type_ids"], None),
        (AS_BERT, [], "none"),
        ("[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0", ["token_type_ids"], r"\[0, 0, 0, 0, 0\]"),
        ("$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2", ["token_type_ids"], r"\[0, 0, 1, 1, 2\]"),
        ("[CLS]:1 $A:1 [SEP]:1 $B:0 [SEP]:0", ["token_type_ids"], r"\[1, 1, 1, 0, 0\]"),
    ],
)
def test_a_bi_encoder_needs_token_types_that_part_a_pair(
    tmp_path: Path, template: str, entries: list[str], types: str | None
) -> None:
    tokenizer = load_tokenizer("wordpiece:120", [text for pair in pairs() for text in pair])
    backend: Any = tokenizer.backend_tokenizer
    special = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    backend.post_processor = TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", template, special)
    tokenizer.model_input_names = ["input_ids", "attention_mask", *entries]
    write_tokenizer(tokenizer, tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    path = str(write_lists(tmp_path / "queries.jsonl"))
    data = RankingFiles(train_file=path, document_column="documents", grade_column="grades", tokenizer=str(tmp_path))
    data.prepare()
    settings = {"_target_": "kd_lightning.models.bi_encoder_from_checkpoint.bi_encoder", "name": str(tmp_path)}
    if types is None:
        network, _ = build_network(settings, data, "student")
        assert isinstance(network, BiEncoder)
        check_reads(network, data, "teacher")
        return
    with pytest.raises(ConfigError, match=rf"^student: a bi-encoder takes .* gives a pair {types}: use one of BERT's"):
        build_network(settings, data, "student")


@pytest.mark.usefixtures("own_home")
def test_a_bi_encoder_reads_no_single_texts(toy_csv: Path) -> None:
    data = TextFiles(train_file=str(toy_csv), tokenizer="wordpiece:120")
    data.prepare()
    for network in (BiEncoder(nn.Identity()), EnsembleNetwork([BiEncoder(nn.Identity())] * 2)):
        with pytest.raises(
            ConfigError, match=r"^teacher: a bi-encoder scores pairs of texts, which TextFiles does not"
        ):
            check_reads(network, data, "teacher")
