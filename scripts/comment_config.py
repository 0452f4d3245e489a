"""Write what conf/config.yaml says of each key anew, from the docs in kd_lightning/config/schema.py.

python scripts/comment_config.py
"""

from __future__ import annotations

import re
import textwrap

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.config.parsing import docs
from kd_lightning.config.schema import FinetuneConfig, GeneratedConfig, OnPolicyConfig, RunConfig, TeacherConfig

KINDS = {
    "": RunConfig, "teacher.": TeacherConfig, "on_policy.": OnPolicyConfig, "generated.": GeneratedConfig,
    "finetune.": FinetuneConfig,
}  # fmt: skip
WIDTH = 120


def commented(text: str) -> str:
    """Return a configuration with its keys' docs above them, in place of the comments there."""
    texts = {f"{prefix}{key}": doc for prefix, kind in KINDS.items() for key, doc in docs(kind).items()}
    body, hydra, rest = text.partition("\nhydra:")
    lines: list[str] = []
    group = ""
    for line in body.split("\n"):
        found = re.match(r"( {0,2})(\w+):", line)
        if found:
            indent, key = found.groups()
            group = group if indent else key
            doc = texts.get(f"{group}.{key}" if indent else key)
            if doc is not None:
                while lines[-1].lstrip().startswith("#"):
                    lines.pop()
                prefix = f"{indent}# "
                lines += textwrap.wrap(
                    doc, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
                )
        lines.append(line)
    return "\n".join(lines) + hydra + rest


if __name__ == "__main__":
    path = conf_dir() / "config.yaml"
    path.write_text(commented(path.read_text(encoding="utf-8")), encoding="utf-8")
