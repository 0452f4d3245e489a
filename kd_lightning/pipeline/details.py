"""What a report shows of models beside scores: confusions, calibration, distance from the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd_lightning.data import MultiTaskData
from kd_lightning.data.shown import shown
from kd_lightning.pipeline.speeds import TEACHER

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run
    from kd_lightning.tasks.details import Details


def described(run: Run, watched: Mapping[str, Mapping[str, Details]]) -> dict[str, Any] | None:
    """Return the details of a run's first seed for its report; None where its task has none.

    Args:
        run: The run.
        watched: By model, by part of the task, after the test split has been added; of these `distilled`, or
            else another student, is set beside the teacher.
    """
    parts = run.task.details()
    if not parts or not watched:
        return None
    student = max(watched, key=lambda name: (name == "distilled", name != TEACHER))
    examples = {part: watched[student][part].examples() for part in parts}
    texts = shown(run.data, {one["index"] for found in examples.values() for one in found})
    return {
        "seed": run.seeds[0],
        "student": student,
        "parts": [
            {
                "name": part,
                "class_names": _class_names(run, part),
                "models": {model: of_parts[part].compute() for model, of_parts in watched.items()},
                "apart": [{**one, **texts.get(one["index"], {})} for one in examples[part]],
            }
            for part in parts
        ],
    }


def _class_names(run: Run, part: str) -> list[str]:
    """Return the names of a part's classes, in the order of its logits."""
    return run.data.tasks[part].class_names if isinstance(run.data, MultiTaskData) else run.data.class_names
