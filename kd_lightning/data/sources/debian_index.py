"""Debian's package index, fetched with apt into a folder of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from kd_lightning.runtime.assets import home, new_folder
from kd_lightning.runtime.downloads import apt_reason, run_tool
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.runtime.files import temporary_folder
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, sha256, write_sealed

NAME = "debian_sections"
INDEX = "index.tsv"
RECORD = "index.json"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SOURCE = f"deb [arch=amd64 lang=en target=Packages,Translations signed-by={KEYRING}] {{url}} bookworm main\n"
URL = "http://deb.debian.org/debian"
"""apt checks the signature of what comes from here."""

SETTINGS = """
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "{folder}/lists";
Dir::Cache "{folder}/cache";
Acquire::GzipIndexes "false";
APT::Update::Error-Mode "any";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
"""Nothing of the machine's own package lists is read or changed, and none of its hooks runs."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class Package(NamedTuple):
    """A binary package.

    Attributes:
        name: Unique.
        source: The source package that it is built from, with others of like descriptions.
        section: Where the archive files it.
        text: Its short description, and the first sentence of its long one.
    """

    name: str
    source: str
    section: str
    text: str


class Described(NamedTuple):
    """A binary package and all that its description says.

    Attributes:
        name: Unique.
        source: The source package that it is built from.
        summary: Its short description.
        text: Its long one, in one line.
    """

    name: str
    source: str
    summary: str
    text: str


Row = TypeVar("Row", bound=Package | Described)


def fetch_index() -> Path:
    """Return the folder with the index, `index.tsv`, reading Debian's when there is none yet.

    `index.json` there records the index's sha256 and its release.

    Raises:
        KDError: apt could not deliver it, or the kept one is damaged.
    """
    return _fetched("index", Package, _packages)


def fetch_descriptions() -> Path:
    """Return the folder with whole descriptions, likewise `index.tsv` and `index.json`.

    Raises:
        KDError: As of `fetch_index`.
    """
    return _fetched("descriptions", Described, _described)


def _fetched(name: str, kind: type[Row], made: Callable[[Path], Iterator[Row]]) -> Path:
    """Return the folder with the packages of Debian's lists, which are read when there is none yet."""
    target = home() / "assets" / f"debian-bookworm-{name}"
    if not target.is_dir():
        with new_folder(target) as folder, temporary_folder(target.parent, "download") as downloads:
            lists = _update(downloads, target / INDEX)
            rows: list[tuple[str, ...]] = [kind._fields, *sorted(set(made(lists)))]
            (folder / INDEX).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
            write_sealed(folder / RECORD, {"release": _release(lists), "files": seal(folder, [INDEX])})
    remedy = "remove the folder, and the index is fetched anew"
    check_seal(target, read_sealed(target / RECORD, remedy)["files"], [INDEX], remedy)
    return target


def kept_index(path: Path, wanted: str | None) -> Path:
    """Return the path of an index, after checking its sha256 where one is wanted.

    Raises:
        ConfigError: It has another.
    """
    if wanted is not None and wanted != (found := sha256(path)):
        raise ConfigError(
            f"data.sha256={wanted}, but {path} has {found}: set data.index_file to the index that is meant, or "
            "data.sha256=null"
        )
    return path


def read_index(path: Path, kind: type[Row]) -> list[Row]:
    """Read a kept index of packages or of whole descriptions.

    Raises:
        DataError: It is none.
    """
    try:
        header, *rows = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as a package index: {error}") from error
    columns = list(kind._fields)
    if header.split("\t") != columns:
        raise DataError(f"{path}: line 1: expected the columns {', '.join(columns)}, as in a kept {INDEX}")
    cells = [row.split("\t") for row in rows]
    if wrong := next((number for number, row in enumerate(cells, 2) if len(row) != len(columns)), None):
        raise DataError(f"{path}: line {wrong}: expected {len(columns)} cells, separated by tabs")
    return [kind(*row) for row in cells]


def _update(folder: Path, kept: Path) -> Path:
    """Let apt download today's index below an empty folder; return the folder with the lists."""
    own = f"copy {kept.name} from another machine ({kept} there) and set data.index_file to it"
    if not shutil.which("apt-get"):
        raise KDError(f"{NAME!r} is Debian's package index, which needs apt-get: {own}")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text(SOURCE.format(url=URL), encoding="utf-8")
    (folder / "apt.conf").write_text(SETTINGS.format(folder=folder), encoding="utf-8")
    done = run_tool(NAME, ["apt-get", "-c", str(folder / "apt.conf"), "update"])
    if done.returncode != 0:
        reason = f"{apt_reason(done.stderr)} (is there a network?)"
        raise KDError(f"could not fetch {NAME!r} with `apt-get update`: {reason}; or {own}")
    if not all(next((folder / "lists").glob(name), None) for name in ("*_Packages", "*_Translation-en")):
        raise KDError(f"could not fetch {NAME!r}: `apt-get update` left no Packages and Translation-en; or {own}")
    return folder / "lists"


def _release(lists: Path) -> str:
    """Return what the archive calls this index, such as `Debian 12.15 Released 11 July 2026`."""
    found = (line for path in lists.glob("*_InRelease") for line in path.read_text("utf-8", "replace").splitlines())
    return next((line.partition(":")[2].strip() for line in found if line.startswith("Description:")), "unknown")


def _packages(lists: Path) -> Iterator[Package]:
    """Yield all packages that have a section and a description."""
    for entry, short, body in _with_descriptions(lists):
        section = entry.get("Section", "").rpartition("/")[2]  # contrib/games
        if section:
            yield Package(entry["Package"], _source(entry), section, description(short, body))


def _described(lists: Path) -> Iterator[Described]:
    """Yield all packages that have a short and a long description."""
    for entry, short, body in _with_descriptions(lists):
        if text := " ".join(line for line in body.split() if line != "."):  # a dot alone is an empty line
            yield Described(entry["Package"], _source(entry), " ".join(short.split()), text)


def _source(entry: dict[str, str]) -> str:
    return entry.get("Source", entry["Package"]).partition(" ")[0]


def _with_descriptions(lists: Path) -> Iterator[tuple[dict[str, str], str, str]]:
    """Yield the entries of all packages that have a short description, with it and the long one."""
    long = {
        (entry.get("Package"), entry.get("Description-md5")): entry.get("Description-en", "")
        for path in lists.glob("*_Translation-en")
        for entry in _entries(path)
    }
    for path in lists.glob("*_Packages"):
        for entry in _entries(path):
            short = entry.get("Description", "").partition("\n")[0].strip()
            if entry.get("Package") and short:
                yield entry, short, long.get((entry["Package"], entry.get("Description-md5")), "").partition("\n")[2]


def description(short: str, body: str) -> str:
    r"""Return a package's short description and the first sentence of its long one.

    >>> description("list files", "This lists files. It is fast.\n.\nThis package has the manual.")
    'list files. This lists files.'
    """
    paragraph = re.split(r"\n\s*\.\s*(?:\n|$)", body)[0]
    return " ".join(f"{short}. {_SENTENCE_END.split(' '.join(paragraph.split()))[0]}".split())


def _entries(path: Path) -> Iterator[dict[str, str]]:
    """Yield the entries of a file of Debian's: `Key: value` lines, continued by indented ones."""
    entry: dict[str, str] = {}
    key = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                yield entry
                entry = {}
            elif line[0].isspace():
                entry[key] = f"{entry.get(key, '')}\n{line.strip()}"
            else:
                key, _, value = line.partition(":")
                entry[key] = value.strip()
    yield entry
