"""What cannot be exported is refused in one line, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from kd_lightning.cli.evaluate import main as kd_eval
from kd_lightning.cli.export import main as kd_export
from kd_lightning.cli.predict import main as kd_predict
from kd_lightning.export import parity
from kd_lightning.export.exported import read_exported
from kd_lightning.export.load import load_export
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.seals import write_sealed
from tests.end_to_end.test_environment import disk_of
from tests.export.conftest import Exports
from tests.export.runs import Exotic, Undecided, own_run, pooled_run

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


def refusal(folder: Path, run: Path, *options: str, out: str = "out/deep") -> str:
    """Return the one line that kd-export ends with, having left no file."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        kd_export([str(run), "--out", str(folder / out), *options])
    assert sorted(folder.rglob("*")) == before
    message = str(ended.value)
    assert message.startswith("kd-export: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "onxx"], "--format onxx is unknown; did you mean 'onnx'?"),
        (["--format", "onnx", "--quantize", "int4"], "--quantize int4 is unknown"),
        (
            ["--format", "onnx", "--quantize", "bf16"],
            "onnx has no bf16; it can be: none, int8-weights, int8-dynamic, int8-static, fp16",
        ),
        (
            ["--format", "pt2", "--quantize", "int8-dynamic"],
            "pt2 has no int8-dynamic; it can be: none, int8-weights, fp16, bf16",
        ),
        (["--format", "gguf"], "BiLSTM is no causal language model"),
        (["--format", "peft"], "this BiLSTM has no adapters; train one with model@student=causal_lm_lora"),
        (["--format", "huggingface"], "BiLSTM is not a classifier of transformers"),
        (["--format", "onnx", "--seed", "7"], "no finished student of seed 7"),
        (["--format", "onnx", "--push-to-hub", "student"], "--push-to-hub student: expected USER/NAME"),
        (["--format", "onnx", "--push-to-hub", "me/my student"], "--push-to-hub me/my student: Repo id must use"),
    ],
)
def test_what_a_format_is_not(bilstm: Path, tmp_path: Path, options: list[str], says: str) -> None:
    assert says in refusal(tmp_path, bilstm, *options)


@pytest.mark.parametrize("format", ["safetensors", "onnx", "pt2"])
def test_a_full_disk_is_one_line_with_what_to_do(bilstm: Path, tmp_path: Path, format: str) -> None:
    with disk_of(10_000):
        says = refusal(tmp_path, bilstm, "--format", format)
    assert f"--format {format} to {tmp_path / 'out/deep'} failed: " in says
    assert "; allow larger files" in says or "; make room there" in says


def test_an_evaluation_that_cannot_keep_its_tokens_is_one_line(
    bilstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", "/proc/x"):
        monkeypatch.setenv("KD_LIGHTNING_HOME", str(home))
        with pytest.raises(SystemExit, match=rf"^kd-eval: cannot write to {home}/\w+ \([^\n]*set KD_LIGHTNING_HOME"):
            kd_eval([str(bilstm)])


def test_a_pooling_that_transformers_does_not_have(home: Path, tmp_path: Path) -> None:
    says = refusal(tmp_path, pooled_run(tmp_path / "run" / "own"), "--format", "huggingface")
    assert "no class of transformers has this student's pooling=mean; train one with student.pooling=bert" in says


def test_runs_without_a_finished_student(bilstm: Path, tmp_path: Path) -> None:
    onnx = ("--format", "onnx")
    assert "no such folder" in refusal(tmp_path, tmp_path / "nowhere", *onnx)
    assert "is a teacher, and only students are exported" in refusal(tmp_path, bilstm / "teacher", *onnx)
    run = tmp_path / "run"
    shutil.copytree(bilstm, run)
    (run / "seed_0" / "distill" / "stage.json").unlink()
    assert "is unfinished (seed_0/distill has begun)" in refusal(tmp_path, run, *onnx)
    assert "is unfinished" in refusal(tmp_path, run / "seed_0" / "distill", *onnx)
    shutil.rmtree(run / "seed_0")
    assert "holds a teacher and no student" in refusal(tmp_path, run, *onnx)
    shutil.rmtree(run / "teacher")
    assert "holds no finished student" in refusal(tmp_path, run, *onnx)


def test_a_student_without_its_runs_configuration(bilstm: Path, tmp_path: Path) -> None:
    shutil.copytree(bilstm / "seed_0", tmp_path / "seed_0")
    says = refusal(tmp_path, tmp_path / "seed_0" / "distill", "--format", "onnx")
    assert "config.yaml" in says


def test_folders_that_cannot_be_had(bilstm: Path, tmp_path: Path) -> None:
    onnx = ("--format", "onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in refusal(tmp_path, bilstm, *onnx, out="full")
    assert "is a file" in refusal(tmp_path, bilstm, *onnx, out="full/mine.txt")
    assert "a part of that path is a file" in refusal(tmp_path, bilstm, *onnx, out="full/mine.txt/out")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_names_of_folders_are_judged_before_any_work(
    bilstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_lightning.export.write.open_source", lambda stage: pytest.fail("it was read"))
    onnx = ("--format", "onnx")
    assert "cannot be written (File name too long)" in refusal(tmp_path, bilstm, *onnx, out="a" * 300)
    monkeypatch.chdir(tmp_path)
    assert "is the current folder" in refusal(tmp_path, bilstm, *onnx, out=".")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "is a file" in refusal(tmp_path, bilstm, *onnx, out="dangling")


def test_links_to_empty_folders_and_long_names_are_filled(bilstm: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    for out in ("link", "a" * 255):
        kd_export([str(bilstm), "--format", "safetensors", "--out", str(tmp_path / out)])
        assert read_exported(tmp_path / out).stage == "seed_0/distill"
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real", "a" * 255}


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("onnxruntime.quantization.quantize_dynamic", ValueError("no shape\nof this")),
        ("onnx.save", OSError(28, "No space left on device")),
        ("kd_lightning.export.write.save_tokenizer", OSError(28, "No space left on device")),
    ],
)
def test_whatever_fails_is_one_line(
    bilstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(what, fail)
    quantize = "int8-dynamic" if "quantize" in what else "none"
    says = refusal(tmp_path, bilstm, "--format", "onnx", "--quantize", quantize)
    reason = "No space left on device; make room" if isinstance(error, OSError) else f"{error}".splitlines()[0]
    assert reason in says.partition("failed: ")[2]
    assert says.endswith("; nothing was written")


@pytest.mark.parametrize("format", ["onnx", "pt2", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_model_is_one_line(bilstm: Path, exports: Exports, tmp_path: Path, format: str, damage: str) -> None:
    shutil.copytree(exports(bilstm, format), tmp_path / "out")
    model = tmp_path / "out" / f"model.{format}"
    model.write_bytes(model.read_bytes()[:1000]) if damage == "truncated" else model.unlink()
    with pytest.raises(SystemExit, match=r"^kd-predict: .*(damaged|missing).*: export it again$"):
        kd_predict([str(tmp_path / "out"), "soup", "--trust"])


def test_an_export_has_no_seeds(bilstm: Path, exports: Exports) -> None:
    with pytest.raises(SystemExit, match=r"--seed 3: .* is an export, which holds one student: omit --seed"):
        kd_predict([str(exports(bilstm, "safetensors")), "soup", "--seed", "3"])


def test_operations_that_a_format_does_not_have(home: Path, tmp_path: Path) -> None:
    run = own_run(tmp_path / "run", Undecided)
    assert "torch.export cannot trace Undecided" in refusal(tmp_path, run, "--format", "pt2", "--trust")
    run = own_run(tmp_path / "exotic", Exotic)
    says = refusal(tmp_path, run, "--format", "onnx", "--trust")
    assert "ONNX lacks an operation of Exotic" in says
    assert "bessel_j0" in says


@pytest.mark.parametrize("limit", ["largest", "mean", "agreement"])
def test_beyond_the_tolerance_there_is_no_export(
    bilstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    value = 1.1 if limit == "agreement" else 1e-9
    tighter = dataclasses.replace(parity.TOLERANCES["fp16"], **{limit: value})
    monkeypatch.setitem(parity.TOLERANCES, "fp16", tighter)
    says = refusal(tmp_path, bilstm, "--format", "safetensors", "--quantize", "fp16")
    assert "differs from the student" in says
    assert {"largest": "largest difference", "mean": "mean difference", "agreement": "agreement"}[limit] in says


def test_an_empty_folder_is_filled_and_a_damaged_export_named(bilstm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    kd_export([str(bilstm), "--format", "safetensors", "--out", str(out)])
    assert read_exported(out).stage == "seed_0/distill"
    content = json.loads((out / "export.json").read_text(encoding="utf-8"))
    write_sealed(out / "export.json", {**content, "version": 99})
    with pytest.raises(Exception, match="has version 99, and this kd_lightning reads 1"):
        load_export(out)
    del content["inputs"]
    write_sealed(out / "export.json", content)
    with pytest.raises(Exception, match="lacks inputs"):
        load_export(out)


def test_a_flipped_byte_in_any_file_of_an_export_is_noticed(bilstm: Path, exports: Exports, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exports(bilstm, "safetensors"), tmp_path / "out"))
    for path in [path for path in out.iterdir() if path.name != "README.md"]:
        whole = path.read_bytes()
        for place in (len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
            with pytest.raises(KDError, match=rf"{path.name}.*export it again"):
                load_export(out)
        path.unlink()
        if path.name != "export.json":
            with pytest.raises(KDError, match=rf"{path.name} is missing"):
                load_export(out)
        path.write_bytes(whole)
    load_export(out)
