"""The manifest of a cache: what it answers, with what, and which files hold it."""

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
from kd_lightning.teachers.cache.outputs import Spec, Storage

FORMAT = 2
"""Goes up when the files change, so that older ones are refused by name."""

MANIFEST = "manifest.json"
REFRESH = "refresh.json"
"""The manifest of a cache that is being built anew; it takes the other's name when it is complete."""


SHARD_NAME = re.compile(r"shard-([0-9]{5,12})\.safetensors")
"""Files of a cache have names of this form and lie in its folder: what a manifest names is read and deleted."""

_OURS = re.compile(rf"(manifest|refresh)\.json|{SHARD_NAME.pattern}|\.(manifest|refresh|shard-[0-9]+)\.\w+\.[\w-]+")


@dataclass(frozen=True)
class ShardRecord:
    """A shard as it was written.

    Attributes:
        file: Its name in the cache's folder.
        examples: How many examples it answers.
        bytes: Of the file.
        sha256: Of the file.

    Raises:
        ValueError: The file could not be a shard of this cache.
    """

    file: str
    examples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not SHARD_NAME.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is no name of a shard")


@dataclass
class Manifest:
    """All that is known of a cache beside the answers themselves.

    Attributes:
        key: Everything that decides the answers, as nested plain values.
        num_examples: N, how many examples the data has.
        storage: How answers are kept.
        specs: The stored outputs; empty before the first answer.
        shards: The files, in order of arrival.
        teacher: Its name, for people.
        data: Its name, for people.
        created: When the cache was begun, ISO 8601, UTC.
        seconds: How long the teacher took for the answers so far.
    """

    key: dict[str, Any]
    num_examples: int
    storage: Storage
    specs: list[Spec] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    teacher: str = ""
    data: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.key = json.loads(json.dumps(self.key, default=str))  # as it will be read back

    @property
    def fingerprint(self) -> str:
        """Of the key."""
        return digest(self.key)

    @property
    def known(self) -> int:
        """How many examples are answered."""
        return sum(record.examples for record in self.shards)

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
        """Read a manifest back.

        Raises:
            CacheError: There is none, or it is not, to the byte, what was written.
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
            raise CacheError(f"{path} is damaged: its checksum does not fit; {remedy(folder)}")
        return found

    def check(self, folder: Path, key: dict[str, Any] | None, num_examples: int | None) -> None:
        """Refuse a cache that answers for something else.

        Raises:
            CacheError: Says what was another when the cache was written.
        """
        if key is not None and (changed := sorted(differences(self.key, json.loads(json.dumps(key, default=str))))):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise CacheError(
                f"{folder} holds answers to something else: {'; '.join(changed[:3])}{more}; "
                "give another path, or set teacher.cache=refresh to have the teacher answer anew"
            )
        if num_examples is not None and num_examples != self.num_examples:
            raise CacheError(
                f"{folder} is for {self.num_examples} examples, the data has {num_examples}; give another path, "
                "or set teacher.cache=refresh to have the teacher answer anew"
            )

    def check_same(self, folder: Path, fingerprint: str) -> None:
        """Refuse a manifest that is another cache's than the one in use.

        Raises:
            CacheError: It is.
        """
        if self.fingerprint != fingerprint:
            raise CacheError(f"{folder} was replaced by a cache of something else while it was in use; begin again")

    def _text(self) -> str:
        content = asdict(self) | {"specs": [spec.to_json() for spec in self.specs]}
        content = {"format": FORMAT, "fingerprint": self.fingerprint, **content}
        content["checksum"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json_text(content)


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache, whole or not: other programs' files are called manifest.json, too."""
    manifests = [folder / name for name in (MANIFEST, REFRESH) if (folder / name).is_file()]
    if not manifests:
        return False
    return not foreign_files(folder) or any(b'"num_examples"' in path.read_bytes() for path in manifests)


def own_files(folder: Path) -> list[Path]:
    """Return what in a cache's folder is the cache's, the manifest first."""
    return sorted(path for path in folder.iterdir() if _OURS.fullmatch(path.name) and not path.is_dir())


def foreign_files(folder: Path) -> list[Path]:
    """Return what in a cache's folder is somebody else's."""
    return sorted(set(folder.iterdir()) - set(own_files(folder)))


def remedy(folder: Path) -> str:
    """Say what can be done about a damaged cache."""
    return f"`kd-cache verify {folder}` checks it all, teacher.cache=refresh has the teacher answer anew"


def cannot_write(path: Path, error: Exception) -> CacheError:
    """Return the error for a full disk, or one that does not take what is written for another reason."""
    return CacheError(
        f"{path} could not be written ({error}); what was stored before stays and is gone on from. If there is not "
        f"room enough: {LESS_ROOM}"
    )


LESS_ROOM = (
    "teacher.cache_dtype=float16 halves the answers, teacher.cache_top_k=K keeps K logits of each, "
    "KD_LIGHTNING_HOME=FOLDER puts them on another disk, teacher.cache=off stores nothing"
)
