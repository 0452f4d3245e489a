"""Build the documentation site: docs/, the README as its front page, a tutorial, and a reference of the public names.

python scripts/build_docs.py           writes build/site; a warning, such as of a dead link, is an error
python scripts/build_docs.py --stage   writes build/docs alone, of which the site is built

Nothing is fetched. The README and docs/ are written for readers of the repository: links between them are turned into
those of the site, and a link to a file that the site does not have becomes the file's name.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docs_markup import with_formulas
from trainings import ROOT

DOCS, STAGED = ROOT / "docs", ROOT / "build" / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
MADE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""The pages of the site by files of the repository's top folder."""
LIMIT = 600
"""Seconds for the site to be built."""


def on_site(text: str, folder: str) -> str:
    """Return a page with the links of the site.

    Args:
        text: Markdown of the repository.
        folder: The page's folder there, from which its links lead.
    """
    return LINK.sub(lambda link: _link(link[1], link[2], link[3], folder), text)


def _link(mark: str, text: str, target: str, folder: str) -> str:
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return f"{mark}[{text}]({target})"
    place = Path(posixpath.normpath(Path(folder, path)))
    if made := MADE.get(place.as_posix()):
        return f"{mark}[{text}]({made}{hash_}{anchor})"
    if place.parts[0] == "docs" and (ROOT / place).is_file():
        return f"{mark}[{text}]({place.relative_to('docs').as_posix()}{hash_}{anchor})"
    if place.parts[0] == "results" and place.suffix == ".png":
        return f"{mark}[{text}]({place.as_posix()})"
    return text if text.startswith("`") else f"`{text}`"


def tutorial(script: str) -> str:
    """Return a script with cells (`# %%`, and `# %% [markdown]` of comments) as a page."""
    page = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            page.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            page.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(page) + "\n"


def reference() -> str:
    """Return the page of the public names: the package's classes and functions, and those of its modules."""
    package = importlib.import_module("kd_lightning")
    public = {name: getattr(package, name) for name in package.__all__}
    modules = {name: thing for name, thing in public.items() if isinstance(thing, ModuleType)}
    page = [
        "# Python", "`import kd_lightning as kd` gives the names of this page. Configurations name them by the same "
        "paths, as in `_target_: kd_lightning.schedules.Linear`. Each method has its file in `kd_lightning.losses`.",
        "## kd_lightning", *_entries(public),
    ]  # fmt: skip
    for name, module in modules.items():
        own = [other for other, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        listed = getattr(module, "__all__", sorted(other for other in own if not other.startswith("_")))
        page += [f"## kd_lightning.{name}", _summary(module), *_entries({one: getattr(module, one) for one in listed})]
    return "\n\n".join(page) + "\n"


def _entries(things: dict[str, Any]) -> list[str]:
    """Return what stands on the page for classes and functions; types that are put together have no entry."""
    return [
        f"::: {thing.__module__}.{name}"
        for name, thing in things.items()
        if inspect.isclass(thing) or inspect.isfunction(thing)
    ]


def _summary(module: ModuleType) -> str:
    return (inspect.getdoc(module) or "").partition("\n")[0]


def methods() -> str:
    """Return the page of the loss terms and their functions, a file each."""
    losses = importlib.import_module("kd_lightning.losses")
    page = ["# Losses", "A `Term` is what a strategy names; its function takes tensors."]
    for info in pkgutil.iter_modules(losses.__path__, "kd_lightning.losses."):
        module = importlib.import_module(info.name)
        own = {name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", "") == info.name}
        if entries := _entries({name: thing for name, thing in own.items() if not name.startswith("_")}):
            page += [f"## {info.name}", _summary(module), *entries]
    return "\n\n".join(page) + "\n"


def stage() -> None:
    """Write what the site is built of."""
    shutil.rmtree(STAGED, ignore_errors=True)
    STAGED.mkdir(parents=True)
    for page in DOCS.glob("*.md"):
        text = with_formulas(on_site(page.read_text(encoding="utf-8"), "docs"))
        (STAGED / page.name).write_text(text, encoding="utf-8")
    for file in (*DOCS.glob("*.svg"), *DOCS.glob("*.css")):
        shutil.copy(file, STAGED)
    for picture in (ROOT / "results").rglob("*.png"):
        place = STAGED / picture.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    made = {
        **{page: on_site((ROOT / file).read_text(encoding="utf-8"), "") for file, page in MADE.items()},
        "tutorial.md": tutorial((DOCS / "tutorial.py").read_text(encoding="utf-8")),
        "reference.md": reference(),
        "losses.md": methods(),
    }
    for name, text in made.items():
        (STAGED / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="store_true", help="write the pages, and no site")
    given = parser.parse_args()
    stage()
    if not given.stage:
        command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean"]
        sys.exit(subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode)


if __name__ == "__main__":
    main()
