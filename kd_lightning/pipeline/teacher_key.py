"""What decides a teacher's outputs: the key under which they are stored."""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.config.schema import CACHED
from kd_lightning.models.onnx import OnnxNetwork
from kd_lightning.models.rebuild import describe, versions
from kd_lightning.runtime.assets import outputs_home
from kd_lightning.runtime.errors import CacheError
from kd_lightning.runtime.fingerprints import differences, digest, read_json
from kd_lightning.teachers import frozen, sampled
from kd_lightning.teachers.cache.manifest import FORMAT, MANIFEST, Manifest

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.pipeline.serving import Serving
    from kd_lightning.pipeline.teacher_loading import LoadedTeacher


def outputs_key(member: LoadedTeacher, data: IndexedData, serving: Serving, features: Sequence[str]) -> dict[str, Any]:
    """Return everything that decides a teacher's outputs, as readable values.

    Args:
        member: The finished teacher; cross-fitted ones count as one.
        data: As it reads them.
        serving: How its outputs are computed and kept.
        features: What it outputs besides logits.
    """
    if member.members:
        members = [outputs_key(one, data, serving, features)["teacher"] for one in member.members]
        folds = digest(data.folds(serving.folds).tolist())
        return {"teacher": {"members": members, "folds": folds, "combine": serving.combine}, "data": data.teacher_key}
    network, source = describe(member.network), None
    if network is None and not isinstance(member.network, OnnxNetwork):
        # a user's own: its file decides what it computes, whatever its comments
        network = read_json(member.folder / "model.json") if member.folder is not None else None
        source = digest(ast.dump(ast.parse(inspect.getsource(sys.modules[type(member.network).__module__]))))
    settings = {**{name: getattr(serving, name) for name in CACHED}, "features": list(features)}
    if settings["cache_samples"] is None:
        del settings["cache_samples"]  # as before there was any, so that caches stay valid
    else:
        settings["drawn"] = sampled.VERSION
    return {
        "teacher": {
            "weights": member.fingerprint, "network": network, "source": source, **settings,
            "versions": {"pass": frozen.VERSION, "cache": FORMAT, **versions(member.network)},
        },
        "data": data.teacher_key,
    }  # fmt: skip


def nearest(key: dict[str, Any]) -> str:
    """Say in what the stored outputs that come nearest differ from those that are needed."""
    found = []
    for path in sorted(outputs_home().glob(f"*/{MANIFEST}")):
        with contextlib.suppress(CacheError):  # a damaged one is none that could be used
            found.append((differences(Manifest.read(path).key, key), path.parent))
    if not found:
        return f": nothing is in {outputs_home()}; kd-cache build makes it"
    changed, folder = min(found, key=lambda pair: len(pair[0]))
    return f": nearest is {folder}, where {'; '.join(sorted(changed)[:3])}"
