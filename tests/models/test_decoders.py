"""Classifiers that read a text's last token, as GPT-2's and Llama's do: they must know what pads a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kd_lightning.models.adapt import run_network
from kd_lightning.models.hf import finished, pretrained
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.run_folder import load_run
from tests.conftest import FILLER, MARKERS, tiny_overrides
from tests.models.tiny import tiny

KINDS = ("gpt2", "llama")
END = "<|endoftext|>"
CLASSES = sorted(MARKERS)


def decoder(kind: str, vocabulary: int = 30, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"num_labels": 3, "id2label": dict(enumerate(CLASSES)), "vocab_size": vocabulary, **settings}
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, **settings))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **settings))


def check_alone(network: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Check that each example has the logits in a batch that it has alone."""
    network.eval()
    with torch.no_grad():
        together = run_network(network, {"input_ids": ids, "attention_mask": mask}).logits
        for row, length in enumerate(mask.sum(1)):
            one = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
            alone = run_network(network, one).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [None, 0, 7])
@pytest.mark.parametrize("pooling", ["checkpoint", "mean"])
def test_a_batch_of_unequal_lengths_changes_no_prediction(
    kind: str, known: int | None, pooling: str, tmp_path: Path
) -> None:
    decoder(kind, pad_token_id=known).save_pretrained(tmp_path)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    ids = torch.randint(0, 28, (3, 6)).where(mask.bool(), torch.tensor(29))
    network = pretrained(str(tmp_path), 3, pooling=pooling, pad_token_id=29)  # type: ignore[arg-type]
    check_alone(network, ids, mask)
    description = describe(network)
    assert description is not None
    rebuilt = from_description(description)
    rebuilt.load_state_dict(network.state_dict())
    check_alone(rebuilt, ids, mask)
    if pooling == "checkpoint":
        check_alone(finished(str(tmp_path), 3, 29), ids, mask)


def test_an_encoder_keeps_its_own_padding(tmp_path: Path) -> None:
    tiny("roberta", num_classes=3).save_pretrained(tmp_path)  # its positions begin after it
    assert pretrained(str(tmp_path), 3, pad_token_id=5).config.pad_token_id == 1


def test_a_padding_without_an_embedding_is_refused(tmp_path: Path) -> None:
    decoder("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"embeddings for 30 tokens, and the data pad with token 30.*data.tokenizer="):
        pretrained(str(tmp_path), 3, pad_token_id=30)


def write_tokenizer(folder: Path) -> int:
    """Write one as GPT-2's: an end of texts, and nothing to pad with."""
    learner = ByteLevelBPETokenizer()
    words = [*FILLER, *(word for marked in MARKERS.values() for word in marked)]
    learner.train_from_iterator([" ".join(words)] * 3, vocab_size=400, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, eos_token=END, bos_token=END)
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)


def written(kind: str, folder: Path) -> Path:
    decoder(kind, write_tokenizer(folder)).save_pretrained(folder)
    return folder


def batches_of(pipeline: Run) -> Iterator[dict[str, torch.Tensor]]:
    for role in ("teacher", "student"):
        batch = next(iter(pipeline.data.select(tokens=role).test_dataloader()))
        assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
        yield batch


@pytest.mark.parametrize(("kind", "trained"), [("gpt2", True), ("llama", False)])
def test_a_decoder_teaches_and_learns(
    kind: str, trained: bool, composed: Callable[..., DictConfig], toy_csv: Path, own_home: Path, tmp_path: Path
) -> None:
    folder = written(kind, tmp_path / kind)
    kept = [o for o in tiny_overrides(toy_csv, tmp_path / "run") if "student" not in o and "teacher.network" not in o]
    given = ["model@student=hf", f"student.name={folder}", f"data.tokenizer={folder}", "stages=[teacher,distill]"]
    if trained:
        given += ["model@teacher.network=hf", f"teacher.network.name={folder}", "teacher.trainer.max_epochs=1"]
    else:
        given += [f"teacher.checkpoint={folder}", "stages=[distill]"]
    pipeline = Run(composed(*kept, *given))
    assert pipeline.data.tokenizer_of("student").pad_token == END  # type: ignore[union-attr]
    train_all(pipeline)
    for_teacher, for_student = batches_of(pipeline)
    loaded = load_run(tmp_path / "run")
    for network, batch in ((pipeline.teacher.network, for_teacher), (loaded.network, for_student)):
        check_alone(network, batch["input_ids"], batch["attention_mask"])
    assert loaded.network.config.pad_token_id == loaded.tokenizer.pad_token_id
