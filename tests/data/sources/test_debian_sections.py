from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from kd_lightning.data import Corpus, DebianSections
from kd_lightning.data.sources.debian_index import Package, fetch_index, read_index
from kd_lightning.data.sources.debian_sections import SECTIONS
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.runtime.seals import sha256

APT = """#!/bin/sh
[ "$1" = -c ] && [ "$3" = update ] || exit 9
lists=$(sed -n 's/^Dir::State::Lists "\\(.*\\)";/\\1/p' "$2")
[ -d "$lists/partial" ] || exit 8
cp "{folder}"/*_* "$lists"
"""


def entries(count: int = 20) -> tuple[str, str]:
    """Debian's two files for sources with a program and its manual in each section, in prefixed sections too."""
    packages, long = [], []
    for section in [*SECTIONS, "misc", "vcs"]:
        for number in range(count):
            for role in ("tool", "manual"):
                name, md5 = f"{section}-{role}{number}", f"{number:032x}"
                source = f"Source: {section}{number} (1.2)\n"
                packages.append(
                    f"Package: {name}\nVersion: 1\n{source}Description: {role} {number} of {section}\n"
                    f"Tag: a::b,\n c::d\nSection: {'contrib/' if number % 2 else ''}{section}\nDescription-md5: {md5}\n"
                )
                long.append(
                    f"Package: {name}\nDescription-md5: {md5}\nDescription-en: {role} {number} of {section}\n"
                    f" It does\n {section} v1.2 well. And more.\n .\n This is the {role}.\n"
                )
    return "\n".join(packages), "\n".join(long)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an archive's files, and an apt-get on the path that delivers them."""
    folder, programs = tmp_path / "archive", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name, text in zip(("main_Packages", "main_Translation-en"), entries(), strict=True):
        (folder / name).write_text(text)
    (folder / "main_InRelease").write_text("Origin: Debian\nDescription: Debian 12.99 Released some day\n")
    (programs / "apt-get").write_text(APT.format(folder=folder))
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return folder


def texts(corpus: Corpus) -> dict[str, list[str]]:
    return {part: [text for (text,) in getattr(corpus, part).texts] for part in ("train", "validation", "test")}


def test_what_a_package_is_and_where_it_stands(archive: Path) -> None:
    corpus = DebianSections(validation_fraction=0.1, test_fraction=0.2).read()
    assert corpus.class_names == SECTIONS
    parts = texts(corpus)
    assert {part: len(found) for part, found in parts.items()} == {"train": 672, "validation": 96, "test": 192}
    every = [
        (text, label) for part in parts for (text,), label in zip(*vars(getattr(corpus, part)).values(), strict=True)
    ]
    assert len({text for text, _ in every}) == len(every) == 2 * 20 * 24
    assert ("tool 7 of games. It does games v1.2 well.", SECTIONS.index("games")) in every
    assert all(text.split()[3].rstrip(".") == SECTIONS[label] for text, label in every)


def test_packages_of_a_source_are_in_one_split_and_splits_have_all_classes(archive: Path) -> None:
    corpus = DebianSections(validation_fraction=0.1, test_fraction=0.2).read()
    sources = {part: {text.partition(" ")[2] for text in found} for part, found in texts(corpus).items()}
    assert not sources["train"] & sources["validation"]
    assert not (sources["train"] | sources["validation"]) & sources["test"]
    for part, count in (("train", 28), ("validation", 4), ("test", 8)):
        assert set(Counter(getattr(corpus, part).labels).values()) == {count}
    assert DebianSections(split_seed=1).read() != DebianSections().read() == DebianSections(seed=1).read()


def test_duplicates_of_other_sources_are_dropped(archive: Path) -> None:
    clone = "Package: zzz\nDescription: TOOL 1 of  games\nSection: admin\nDescription-md5: 0\n"
    (archive / "main_Packages").write_text(f"{clone}\n{entries()[0]}")
    (archive / "main_Translation-en").write_text(
        f"Package: zzz\nDescription-md5: 0\nDescription-en: x\n It does games v1.2 well.\n\n{entries()[1]}"
    )
    assert sum(map(len, texts(DebianSections().read()).values())) == 2 * 20 * 24


def test_the_index_is_kept_and_recorded(archive: Path, tmp_path: Path) -> None:
    data = DebianSections(tokenizer="wordpiece:200")
    data.prepare()
    folder = tmp_path / "home" / "assets" / "debian-bookworm-index"
    found = sha256(folder / "index.tsv")
    record = json.loads((folder / "index.json").read_text())
    assert (record["release"], record["files"]) == ("Debian 12.99 Released some day", {"index.tsv": found})
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing else stays"
    (archive / "main_Packages").unlink()
    again = DebianSections(tokenizer="wordpiece:200", sha256=found)
    again.prepare()
    assert again.fingerprint == data.fingerprint
    (tmp_path / "copy.tsv").write_bytes((folder / "index.tsv").read_bytes())
    other = DebianSections(str(tmp_path / "copy.tsv"), tokenizer="wordpiece:200")
    other.prepare()
    assert other.fingerprint == data.fingerprint
    with pytest.raises(ConfigError, match=rf"data\.sha256=0a, but .*index\.tsv has {found}: set data\.index_file to"):
        DebianSections(sha256="0a").read()
    (folder / "index.tsv").write_text("altered")
    with pytest.raises(KDError, match=r"index\.tsv is damaged: .*: remove the folder, and the index is fetched anew"):
        DebianSections().read()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'W: odd' >&2; echo 'E: no such host' >&2; exit 100", r"`apt-get update`: no such host \(is there a net"),
        ("exit 100", r"`apt-get update`: apt gave no reason \(is there a network\?\); or copy index\.tsv from another"),
        ("exit 0", r"`apt-get update` left no Packages and Translation-en; or copy index\.tsv .* set data\.index_file"),
        (None, r"'debian_sections' is Debian's package index, which needs apt-get: copy index\.tsv from another"),
    ],
)
def test_an_archive_that_cannot_be_read_is_told_in_one_line(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: str
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (tmp_path / "bin" / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(KDError, match=expected) as caught:
        DebianSections().read()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home" / "assets").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: ["a\tb", *lines[1:]], r"line 1: expected the columns name, source, section, text"),
        (lambda lines: [*lines, "a\tb"], r"line 1042: expected 4 cells, separated by tabs"),
        (lambda lines: [line for line in lines if "\tfonts\t" not in line], r"there are no packages of fonts: this is"),
        (None, r"cannot be read as a package index: .*No such file"),
    ],
)
def test_another_file_is_refused(
    archive: Path, tmp_path: Path, change: Callable[[list[str]], list[str]] | None, expected: str
) -> None:
    lines = (fetch_index() / "index.tsv").read_text().splitlines()
    if change is not None:
        (tmp_path / "other.tsv").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(DataError, match=expected):
        DebianSections(str(tmp_path / "other.tsv")).read()


@pytest.mark.parametrize("options", [{"validation_fraction": 0.0}, {"test_fraction": 0.95}])
def test_impossible_fractions_are_refused(archive: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot hold out the fractions .* of debian_sections: each must lie"):
        DebianSections(**options).read()


@pytest.fixture(scope="module")
def real() -> Path:
    """The machine's own copy: fetched at most once, while all else that a test writes stays in its own home."""
    try:
        return fetch_index() / "index.tsv"
    except (KDError, subprocess.SubprocessError) as error:
        pytest.skip(f"Debian's archive cannot be reached: {error}")


def test_debian_itself(real: Path) -> None:
    corpus = DebianSections(str(real)).read()
    parts = texts(corpus)
    sizes = {part: len(found) for part, found in parts.items()}
    assert sizes["train"] > 40_000
    assert sizes["validation"] > 2_000
    assert sizes["test"] > 7_000
    assert min(Counter(corpus.train.labels).values()) > 350
    assert 18 < median(len(text.split()) for text in parts["train"]) < 26
    chosen = [package for package in read_index(real, Package) if package.section in SECTIONS]
    source_of = {package.text: package.source for package in reversed(chosen)}  # the first of duplicates stays
    train, validation, test = ({source_of[text] for text in parts[part]} for part in parts)
    assert not train & validation
    assert not (train | validation) & test
