"""Pages of HTML without other files: escaped, readable in light and dark and on a telephone."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lightning.runtime.borders import visible

Picture = tuple[str, bytes]
"""Its caption and its PNG."""


def render(template: str, pictures: Sequence[Picture], **values: Any) -> str:
    """Return the page of a template in this folder, with every value escaped.

    Args:
        template: Its file.
        pictures: The template's `figures`.
        values: What else it shows.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value, keep="\n"),
    )
    figures = [{"caption": caption, "data": base64.b64encode(data).decode()} for caption, data in pictures]
    return environment.get_template(template).render(figures=figures, **values)


def footer(environment: dict[str, Any]) -> str:
    """Return the machine and the versions on which results were made; empty where they are unknown."""
    if not environment:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    machine = f"{environment.get('cpu', 'unknown processor')}, {environment.get('cores', '?')} cores"
    devices = "".join(f", {device}" for device in environment.get("cuda_devices", []))
    return f"{machine}{devices}; Python {environment.get('python')}, {versions}; {environment.get('date', '')[:10]}"
