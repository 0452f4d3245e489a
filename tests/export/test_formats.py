"""Each format predicts as the student did, in this process and in one that has nothing but the format's runtime."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.cli.export import main as kd_export
from kd_lightning.cli.predict import main as kd_predict
from kd_lightning.export.exported import read_exported
from kd_lightning.export.formats import FORMATS, format_named, pt2
from kd_lightning.export.graph import whole_lstms
from kd_lightning.export.load import load_export
from kd_lightning.models.adapt import run_network
from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.runtime.errors import KDError
from kd_lightning.training.run_folder import load_run
from tests.export.conftest import Exports
from tests.export.fresh import OURS, ROOT, example, predictions
from tests.export.runs import Bag, bilstm_run, cnn_run, own_run, pooled_run, text_cnn_run, transformer_run
from tests.whole_split import image_logits, text_logits

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

OF_TRANSFORMERS = ("huggingface", "gguf", "peft", "sentence_transformers")
SENTENCES = ["we saw the soup today, very good bread", "an atom", "球赛 goal team"]


def export(run: Path, out: Path, format: str, quantize: str = "none") -> Path:
    kd_export([str(run), "--format", format, "--quantize", quantize, "--out", str(out), "--trust"])
    return out


def expected(run: Path) -> list[tuple[str, float]]:
    model = load_run(run)
    probabilities = text_logits(model, [(text,) for text in SENTENCES]).softmax(1)
    return [(model.class_names[int(row.argmax())], float(row.max())) for row in probabilities]


@pytest.mark.parametrize(
    ("format", "quantize"),
    [
        pytest.param(format, quantize, marks=[pytest.mark.slow] if format == "executorch" else [])
        for format in FORMATS
        for quantize in format_named(format).QUANTIZE
        if format not in OF_TRANSFORMERS and (format, quantize) != ("openvino", "int8-static")
    ],
)
def test_a_bilstm_predicts_alike(
    bilstm: Path, exports: Exports, capsys: pytest.CaptureFixture[str], format: str, quantize: str
) -> None:
    out = exports(bilstm, format, quantize)
    exported = read_exported(out)
    parity = exported.parity
    assert parity["examples"] == 24
    assert parity["largest_difference"] <= parity["tolerance"]["largest"] * parity["scale"]
    if quantize == "none":
        assert parity["agreement"] == 1.0
    else:
        assert parity["largest_difference"] > 0, "nothing was quantised"
    own = {"safetensors": {"model.json"}, "openvino": {"model.bin"}}.get(format, set())
    weights = {exported.model} | (own if format == "openvino" else set())
    assert exported.bytes == sum((out / name).stat().st_size for name in weights)
    files = {exported.model, "export.json", "README.md", "tokenizer.json", "tokenizer_config.json"} | own
    assert {path.name for path in out.iterdir()} == files
    assert [path.name for path in out.parent.iterdir()] == ["out"], "something was left beside it"
    capsys.readouterr()
    kd_predict([str(out), *SENTENCES, "--json", "--trust"])
    said = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert said == [label for label, _ in expected(bilstm)]


@pytest.mark.parametrize(
    ("write", "format", "quantize"),
    [
        (text_cnn_run, "onnx", "int8-dynamic"),
        (text_cnn_run, "pt2", "none"),
        (pooled_run, "onnx", "none"),
    ],
)
def test_our_other_networks_predict_alike(
    home: Path, tmp_path: Path, write: Callable[[Path], Path], format: str, quantize: str
) -> None:
    run = write(tmp_path / "run" / "own")
    out = export(run, tmp_path / "out", format, quantize)
    found, said = (
        text_logits(model, [(text,) for text in SENTENCES]) for model in (load_export(out, trust=True), load_run(run))
    )
    assert torch.equal(found.argmax(1), said.argmax(1))
    if quantize == "none":
        torch.testing.assert_close(found, said, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("word", "without", "students"),
    [
        (
            "onnxruntime",
            (*OURS, "torch", "transformers", "onnx"),
            [
                ("bilstm", "onnx", "none"), ("bilstm", "onnx", "int8-dynamic"), ("bilstm", "onnx", "int8-static"),
                ("bilstm", "onnx", "fp16"), ("bert", "onnx", "none"), ("bert", "onnx", "int8-static"),
                ("rating", "onnx", "none"),
            ],
        ),
        (
            "torch",
            (*OURS, "transformers", "onnxruntime"),
            [(student, "pt2", "none") for student in ("bilstm", "bert", "rating")],
        ),
        pytest.param(
            "executorch",
            (*OURS, "transformers", "onnxruntime"),
            [("bilstm", "executorch", "none"), ("bert", "executorch", "none"), ("bert", "executorch", "int8-dynamic")],
            marks=pytest.mark.slow,
        ),
        (
            "openvino",
            (*OURS, "torch", "transformers", "onnx", "onnxruntime", "nncf"),
            [("bilstm", "openvino", "none"), ("bert", "openvino", "none"), ("bert", "openvino", "int8-static")],
        ),
        (
            "transformers",
            OURS,
            [*(("bert", "huggingface", kind) for kind in ("none", "fp16", "bf16")), ("rating", "huggingface", "none")],
        ),
    ],
    ids=["onnx", "pt2", "executorch", "openvino", "huggingface"],
)  # fmt: skip
def test_a_format_needs_its_own_runtime_alone(
    request: pytest.FixtureRequest, exports: Exports, tmp_path: Path, word: str, without: tuple[str, ...],
    students: list[tuple[str, str, str]],
) -> None:  # fmt: skip
    runs = [request.getfixturevalue(student) for student, _, _ in students]
    folders = [exports(run, format, quantize) for run, (_, format, quantize) in zip(runs, students, strict=True)]
    found = predictions(example(word), folders, SENTENCES, without, tmp_path)
    for run, (student, format, quantize), lines in zip(runs, students, found, strict=True):
        if student == "rating":  # of a score: a pipeline would put a sigmoid before it, if it took it for a class's
            scores = text_logits(load_run(run), [(text,) for text in SENTENCES]).reshape(-1).tolist()
            assert [one["p" if format == "huggingface" else "score"] for one in lines] == pytest.approx(
                scores, abs=2e-4
            )
            continue
        assert [one["label"] for one in lines] == [label for label, _ in expected(run)], (student, quantize)
        if quantize == "none":
            np.testing.assert_allclose([one["p"] for one in lines], [p for _, p in expected(run)], atol=2e-4)


def test_a_hugging_face_folder_names_the_classes(bert: Path, exports: Exports) -> None:
    for quantize in ("none", "fp16", "bf16"):
        config = json.loads((exports(bert, "huggingface", quantize) / "config.json").read_text(encoding="utf-8"))
        assert list(config["id2label"].values()) == load_run(bert).class_names
        assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize("word", ["onnxruntime", "PIL"])
def test_the_onnx_examples_are_short(word: str) -> None:
    assert len(example(word).strip().splitlines()) <= 30


def test_images_need_onnxruntime_and_pillow_alone(pictures: Path, exports: Exports, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    runs = [pictures, cnn_run(tmp_path / "run", channels=1, mean=[0.3], std=[0.4])]
    files = []
    for number, size in enumerate([(16, 16), (40, 23), (9, 31)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        files.append(tmp_path / f"{number}.png")
        image.fromarray(noise).save(files[-1])
    turned = image.Exif()
    turned[0x0112] = 6  # a camera held upright
    files.append(tmp_path / "turned.png")
    image.fromarray(noise).save(files[-1], exif=turned)
    without = (*OURS, "torch", "transformers", "tokenizers", "onnx")
    folders = [exports(run, "onnx") for run in runs]
    for run, found in zip(
        runs, predictions(example("PIL"), folders, list(map(str, files)), without, tmp_path), strict=True
    ):
        model = load_run(run)
        probabilities = image_logits(model, files).softmax(1)
        assert [one["label"] for one in found] == [model.class_names[int(row.argmax())] for row in probabilities]
        np.testing.assert_allclose([one["p"] for one in found], probabilities.max(1).values, atol=2e-4)
        assert len({one["p"] for one in found}) == 4, "all images are one to it"


def test_an_lstm_stays_one_and_takes_any_length_and_padding_on_either_side(bilstm: Path, exports: Exports) -> None:
    out = exports(bilstm, "onnx")
    graph = onnx.load(str(out / "model.onnx"))
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)]
    assert Counter(node.op_type for node in graph.graph.node)["LSTM"] == 4
    axes = [[axis.dim_param for axis in entry.type.tensor_type.shape.dim] for entry in graph.graph.input]
    assert axes == [["batch", "length"]] * 2
    for path in (ROOT, Path(sys.prefix)):
        assert str(path).encode() not in (out / "model.onnx").read_bytes(), "files of this machine are named"
    student, exported = load_run(bilstm).network, load_export(out).network
    for rows, length in ((1, 1), (1, 5), (3, 32), (40, 7)):
        ids = torch.randint(5, 50, (rows, length))
        mask = torch.ones_like(ids)
        mask[::2, : length // 3] = 0
        mask[1::2, length - length // 3 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        with torch.inference_mode():
            torch.testing.assert_close(
                run_network(exported, batch).logits, run_network(student, batch).logits, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_every_pooling(home: Path, tmp_path: Path, pooling: str) -> None:
    run = bilstm_run(tmp_path / "run", pooling=pooling)
    parity = read_exported(export(run, tmp_path / "out", "onnx")).parity
    assert parity["largest_difference"] < 1e-4


def test_eight_bits_hold_the_table_and_the_lstm_too(bilstm: Path, exports: Exports) -> None:
    plain = exports(bilstm, "onnx")
    for quantize in ("int8-dynamic", "int8-static"):
        small = exports(bilstm, "onnx", quantize)
        graph = onnx.load(str(small / "model.onnx")).graph
        assert Counter(node.op_type for node in graph.node)["DynamicQuantizeLSTM"] == 4
        floats = [entry for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT]
        assert max(np.prod(entry.dims) for entry in floats) <= 8 * 64, "a weight is left in 32 bits"
        ratio = os.path.getsize(plain / "model.onnx") / os.path.getsize(small / "model.onnx")
        assert ratio > 3, quantize


def test_a_pair_of_texts_keeps_its_segments_where_they_are_read(home: Path, tmp_path: Path) -> None:
    run = transformer_run(tmp_path / "run", pairs=True)
    out = export(run, tmp_path / "out", "onnx")
    assert read_exported(out).inputs == ["input_ids", "attention_mask", "token_type_ids"]
    pair = [("soup, bread", "an atom")]
    said, told = text_logits(load_run(run), pair), text_logits(load_export(out), pair)
    torch.testing.assert_close(told, said, atol=1e-4, rtol=1e-4)


def test_a_graph_that_does_not_run_is_one_line_and_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: pt2.Pt2Network, **entries: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a guard of the graph failed")

    monkeypatch.setattr(pt2.Pt2Network, "forward", broken)
    run = own_run(tmp_path / "run", Bag)
    with pytest.raises(SystemExit, match=r"cannot run Bag.*need no graph: safetensors, huggingface"):
        kd_export([str(run), "--format", "pt2", "--out", str(tmp_path / "out"), "--trust"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_a_users_own_network_is_asked_for_what_it_reads(home: Path, tmp_path: Path, format: str) -> None:
    run = own_run(tmp_path / "run", Bag)
    out = export(run, tmp_path / "out", format)
    if format != "safetensors":
        assert read_exported(out).inputs == ["input_ids"]


@pytest.mark.parametrize(("format", "quantize"), [("onnx", "int8-static"), ("pt2", "bf16")])
def test_images(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, quantize: str) -> None:
    out = export(pictures, tmp_path / "out", format, quantize)
    assert "label agreement" in capsys.readouterr().out
    image = str(pictures.parent / "images" / "train" / "red" / "00.png")
    kd_predict([str(pictures), image, "--json"])
    kd_predict([str(out), image, "--json", "--trust"])
    before, after = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert before["label"] == after["label"]


def test_a_factorised_table_becomes_the_full_one_that_it_stands_for() -> None:
    from kd_lightning.export.formats.huggingface import multiplied

    factorised = FactorizedEmbedding(11, 3, 8, padding_idx=1)
    full = multiplied(factorised)
    tokens = torch.arange(11)
    torch.testing.assert_close(full(tokens), factorised(tokens))
    assert full.padding_idx == 1


def test_whole_lstms_gives_back_what_it_changed() -> None:
    from torch._decomp import global_decomposition_table

    op = torch.ops.aten.lstm.input
    before = dict(op.py_kernels), global_decomposition_table["post_autograd"][op]
    with pytest.raises(KDError), whole_lstms():
        raise KDError("inside")
    assert (dict(op.py_kernels), global_decomposition_table["post_autograd"][op]) == before
