"""The manifest of a cache: what it holds, from which teacher, in which files."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kd_lightning.runtime.borders import json_text
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.runtime.files import write_file
from kd_lightning.runtime.fingerprints import differences, digest
from kd_lightning.teachers.cache.outputs import Spec, Storage, plain

FORMAT = 4
"""Raised when the file format changes, so that older files are refused."""

MANIFEST = "manifest.json"
REFRESH = "refresh.json"
"""The manifest of a cache that is being rebuilt; it replaces `MANIFEST` when complete."""
CONTENTS = "contents.bin"
"""A digest of what the teacher reads of each example."""


SHARD_NAME = re.compile(r"shard-([0-9]{5,12})\.safetensors")
"""Names of a cache's files. The manifest may name no others, since those files are read and deleted."""

_OURS = re.compile(
    rf"(manifest|refresh)\.json|contents\.bin|{SHARD_NAME.pattern}"
    r"|\.(manifest|refresh|contents|shard-[0-9]+)\.\w+\.[\w-]+"
)


@dataclass(frozen=True)
class ShardRecord:
    """A shard as it was written.

    Attributes:
        file: Its name in the cache's folder.
        examples: How many examples it holds.
        bytes: Of the file.
        sha256: Of the file.
        seconds: How long the teacher predicted for them.
        run: The run that had it predict; empty outside of runs.

    Raises:
        ValueError: The file could not be a shard of this cache.
    """

    file: str
    examples: int
    bytes: int
    sha256: str
    seconds: float = 0.0
    run: str = ""

    def __post_init__(self) -> None:
        if not SHARD_NAME.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not the name of a shard")


@dataclass
class Manifest:
    """Describes a cache: everything but the outputs themselves.

    Attributes:
        key: Everything that determines the outputs, as nested plain values.
        num_examples: N, the number of examples in the data.
        storage: The encoding of the outputs.
        specs: The stored outputs; empty until the first are added.
        shards: The files, in order of writing.
        teacher: Its name, for people.
        data: Its name, for people.
        created: When the cache was created, ISO 8601, UTC.
        contents: The sha256 of `CONTENTS`; empty without that file.
    """

    key: dict[str, Any]
    num_examples: int
    storage: Storage
    specs: list[Spec] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    teacher: str = ""
    data: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    contents: str = ""

    def __post_init__(self) -> None:
        self.key = json.loads(json.dumps(self.key, default=str))  # as `read` returns it

    @property
    def fingerprint(self) -> str:
        """Of the key."""
        return digest(self.key)

    @property
    def known(self) -> int:
        """How many examples are stored."""
        return sum(record.examples for record in self.shards)

    def of_same_teacher(self, other: Manifest) -> bool:
        """Return whether outputs for the same inputs are the same in both, and stored alike."""
        one, two = ({name: part for name, part in made.key.items() if name != "data"} for made in (self, other))
        return one == two and self.storage == other.storage

    def seconds(self, run: str | None = None) -> float:
        """Return how long the teacher has predicted for what is stored, or only on behalf of one run."""
        return sum(record.seconds for record in self.shards if run in (None, record.run))

    def write(self, path: Path) -> None:
        """Write the manifest in one step, with a checksum of itself.

        Raises:
            CacheError: The disk is full or cannot be written.
        """
        try:
            write_file(path, self._text())
        except OSError as error:
            raise cannot_write(path, error) from error

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            CacheError: There is none, or it differs from what was written.
        """
        folder = path.parent
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise CacheError(f"{folder} holds no teacher outputs: there is no {path.name}") from error
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {remedy(folder)}") from error
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise CacheError(
                    f"{path} has format {content['format']!r}, this version reads {FORMAT}; {remedy(folder)}"
                )
            for name in ("format", "checksum", "fingerprint"):
                del content[name]
            content["storage"] = Storage(**content["storage"])
            content["specs"] = [Spec.from_json(spec) for spec in content["specs"]]
            content["shards"] = [ShardRecord(**record) for record in content["shards"]]
            found = cls(**content)
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise CacheError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy(folder)}") from error
        if found._text() != text:
            raise CacheError(f"{path} is damaged: its checksum does not match; {remedy(folder)}")
        return found

    def check(self, folder: Path, key: dict[str, Any] | None, num_examples: int | None) -> None:
        """Refuse a cache with another key or number of examples.

        Raises:
            CacheError: Names the differences.
        """
        if key is not None and (changed := sorted(differences(self.key, json.loads(json.dumps(key, default=str))))):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise CacheError(
                f"{folder} holds the outputs of another teacher or data set: {'; '.join(changed[:3])}{more}; "
                "give another path, or set teacher.cache=refresh to run the teacher again"
            )
        if num_examples is not None and num_examples != self.num_examples:
            raise CacheError(
                f"{folder} is for {self.num_examples} examples, the data has {num_examples}; give another path, "
                "or set teacher.cache=refresh to run the teacher again"
            )

    def check_same(self, folder: Path, fingerprint: str) -> None:
        """Refuse a manifest of another cache than the one in use.

        Raises:
            CacheError: The fingerprints differ.
        """
        if self.fingerprint != fingerprint:
            raise CacheError(f"{folder} was replaced by another cache while it was in use; run again")

    def _text(self) -> str:
        content = asdict(self) | {"storage": plain(self.storage), "specs": [spec.to_json() for spec in self.specs]}
        content = {"format": FORMAT, "fingerprint": self.fingerprint, **content}
        content["checksum"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json_text(content)


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache, complete or not; other programs also write a manifest.json."""
    manifests = [folder / name for name in (MANIFEST, REFRESH) if (folder / name).is_file()]
    if not manifests:
        return False
    return not foreign_files(folder) or any(b'"num_examples"' in path.read_bytes() for path in manifests)


def own_files(folder: Path) -> list[Path]:
    """Return the cache's own files in its folder, the manifest first."""
    return sorted(path for path in folder.iterdir() if _OURS.fullmatch(path.name) and not path.is_dir())


def foreign_files(folder: Path) -> list[Path]:
    """Return the files in a cache's folder that are not the cache's."""
    return sorted(set(folder.iterdir()) - set(own_files(folder)))


def remedy(folder: Path) -> str:
    """Return what to do about a damaged cache, for error messages."""
    return f"`kd-cache verify {folder}` checks all of it, teacher.cache=refresh runs the teacher again"


def cannot_write(path: Path, error: Exception) -> CacheError:
    """Return the error for a disk that is full or cannot be written."""
    return CacheError(
        f"{path} could not be written ({error}); what was stored before is kept. If there is not "
        f"room enough: {LESS_ROOM}"
    )


LESS_ROOM = (
    "teacher.cache_dtype=float16 halves the outputs, teacher.cache_top_k=K keeps K logits of each, "
    "KD_LIGHTNING_HOME=FOLDER puts them on another disk, teacher.cache=off stores nothing"
)
