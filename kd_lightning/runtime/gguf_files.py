"""The user's GGUF files, as folders that `transformers` reads."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from importlib.metadata import version
from pathlib import Path

from kd_lightning.runtime.assets import discard_folder, home, new_folder
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.gguf import VERSION, dequantise
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, sha256, write_sealed

log = logging.getLogger(__name__)

SEAL = "files.json"
"""The file with the others' checksums."""
NEEDS = ("gguf", "accelerate")


def is_gguf(name: str) -> bool:
    """Say whether a name is that of a GGUF file that is there."""
    return name.lower().endswith(".gguf") and Path(name).expanduser().is_file()


def folder_of(name: str) -> Path:
    """Return the folder with a GGUF file's network and tokenizer, in bfloat16, written once for all runs.

    It is below `$KD_LIGHTNING_HOME/gguf`, named after all that decides its content: the file's, and the versions of
    what reads it. A damaged folder is written anew.

    Args:
        name: The file.

    Raises:
        ConfigError: It is no causal language model that `transformers` reads, or a package that reads it is missing.
        KDError: There is nowhere to put it.
    """
    file = Path(name).expanduser()
    stat = file.stat()
    content = _digest(file, stat.st_size, stat.st_mtime_ns)
    target = home() / "gguf" / digest([VERSION, version("transformers"), content])
    if target.exists():
        try:
            sealed = read_sealed(target / SEAL, "it is written anew")["files"]
            check_seal(target, sealed, sealed, "it is written anew")
            return target
        except (KDError, KeyError) as error:
            log.warning("%s", error)
            discard_folder(target)
    if missing := [one for one in NEEDS if importlib.util.find_spec(one) is None]:
        raise ConfigError(f"{name} is a GGUF file: {', '.join(missing)} missing, pip install 'kd-lightning[lm]'")
    with new_folder(target) as folder:
        try:
            dequantise(file, folder)
        except OSError as error:
            raise ConfigError(f"{name}: {str(error).splitlines()[0][:200]}") from error
        write_sealed(folder / SEAL, {"files": seal(folder, [path.name for path in folder.iterdir()])})
    return target


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Return the sha256 of a file, once for as long as size and time of change stay."""
    return sha256(file)
