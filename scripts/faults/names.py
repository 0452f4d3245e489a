"""Hostile names, links and files: nothing is executed or rendered, and nothing outside a run's folder is touched."""

from __future__ import annotations

import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from faults.kills import prepared
from faults.process import Outcome, command
from faults.toy import SETTINGS, Place, new_place, write_sentences

NAMES = (
    "a[/b]", "[bold]loud", "[link=http://evil.example]here[/link]", "[", "[/]", "\x1b]0;owned\x07", "\x1b[31mred",
    "\x1b[2J", "\x9b31m", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b", "`id`", "**bold**",
    "../../x", "/etc/passwd", "a\u202eb", "a\u2066b", "$\\frac{1}{$", "$x$ and $", "{{ 7 * 7 }}", "{% raw", "%s%n",
    "---", "- item", "key: value", "!!python/object:os.system", "'; x", '"quoted"', "a\tb", "a\rb", "# heading",
    "=cmd()", "\u200b", "&lt;b&gt;", "${oc.env:HOME}", "\\", "é\u0301", "a" * 300, "![x](http://evil.example/x.png)",
    "NaN", "null", "true", "-1.5e3", ":boom:", "\U0001f600", "]]>", "<!-- hidden", "a--b", "\x08\x08\x08\x08hid",
)  # fmt: skip
"""Names of classes and words of sentences: markup of terminals, HTML, Markdown, YAML, templates, formulas, paths."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal takes for orders: control characters but for tabs and ends of lines, and turns of direction."""
LIVE = re.compile(r"<(script|img|iframe|svg|a)\b[^>]*(alert|onerror|evil)|(?<!\\)\]\(http://evil", re.IGNORECASE)
"""A name that a Markdown viewer would act upon."""


def trials(folder: Path, seed: int, count: int, quick: bool = False) -> list[Callable[[], dict[str, Any]]]:
    """Return so many trials, two thirds with names in the data and one third with paths, links and descriptions."""
    draw = random.Random(f"{seed} names")
    found: list[Callable[[], dict[str, Any]]] = []
    waiting: list[str] = []
    for number in range(count - count // 3):
        while len(set(waiting[:3])) < 3 or any(not name.strip() for name in waiting[:3]):
            waiting += draw.sample(NAMES, len(NAMES))
            waiting = [name for name in dict.fromkeys(waiting) if name.strip("\u200b").strip()]
        names, waiting = waiting[:3], waiting[3:]
        found.append(partial(labelled, folder / f"names-{number}", names, draw.sample(NAMES, 6)))
    attacks = list(ATTACKS)
    for number in range(count // 3):
        found.append(partial(attacked, folder / f"attack-{number}", attacks[number % len(attacks)]))
    return found


# -- names in the data -------------------------------------------------------------------------------------------------


def labelled(root: Path, names: list[str], words: list[str]) -> dict[str, Any]:
    """Train on classes and sentences of hostile names, and put them through every command that shows them."""
    place = new_place(root)
    data = write_sentences(root / "toy.csv", rows=90, names=names, extra=words)
    said = {"group": "names", "what": "names in the data", "how": repr((names, words)), "command": "kd-train, ..."}
    lines: list[tuple[str, ...]] = [
        ("kd-train", *SETTINGS, f"data.train_file={data}", "run_dir=runs/run"),
        ("kd-predict", "runs/run", *[word for word in words if word.strip() and not word.startswith("-")]),
        ("kd-predict", "runs/run", "the goal", "--json"),
        ("kd-eval", "runs/run"),
        ("kd-export", "runs/run", "--format", "safetensors", "--out", "out"),
        ("kd-predict", "out", "the goal", "--json"),
    ]
    before = _outside(place)
    told = []
    for line in lines:
        ended = command(line, place.work, place.home, prepare=prepared)
        said["first"] = {"code": ended.code, "err": ended.err[-2000:]}
        if wrong := _shown(ended, line):
            return said | {"outcome": wrong, "detail": f"{' '.join(line)[:200]}: {ended.last}"}
        if ended.code != 0:  # one line before any training is an answer to such names, too
            refused = line[0] == "kd-train" and not list(root.rglob("settings.json"))
            return said | {"outcome": "refused in a line" if refused else "late", "detail": ended.last}
        told.append(ended.out)
    if live := [str(file) for file in place.work.rglob("*.*") if file.suffix in (".md", ".html") and _live(file)]:
        return said | {"outcome": "rendered", "detail": str(live)}
    classes = set(json.loads(told[2])["probabilities"])
    if classes != set(json.loads(told[5])["probabilities"]) or len(classes) != 3:
        return said | {"outcome": "other names", "detail": told[2]}
    return said | {"outcome": "escaped" if _outside(place) == before else "outside touched"}


def _shown(ended: Outcome, line: tuple[str, ...]) -> str | None:
    """Say what is wrong with what a command printed."""
    if ended.code is None:
        return "hung"
    if ended.crashed or ended.code < 0:
        return "traceback"
    if CONTROL.search(ended.out) or CONTROL.search(ended.err):
        return "terminal"
    return None if ended.code == 0 or ended.in_one_line else "at length"


class _Acting(HTMLParser):
    """What a browser would do with a page besides showing it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note elements and attributes that run or load, but for pictures that the page itself holds."""
        if tag in ("script", "iframe", "svg", "a", "object", "embed", "link", "form"):
            self.found.append(tag)
        for name, value in attributes:
            loads = name in ("src", "href", "srcset", "data") and not (value or "").startswith("data:image/png;base64,")
            if loads or name.startswith("on"):
                self.found.append(f"{tag} {name}={value}")


def _live(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    return bool(_Acting(text).found if file.suffix == ".html" else LIVE.search(text))


def _outside(place: Place) -> dict[str, int]:
    """Return what lies beside a run's folder, with its size."""
    inside = (place.work / "runs" / "run", place.work / "out", place.home)
    files = [file for file in place.root.rglob("*") if not any(file.is_relative_to(folder) for folder in inside)]
    return {
        str(file.relative_to(place.root)): file.stat().st_size for file in files if file.is_file() and _counts(file)
    }


def _counts(file: Path) -> bool:
    return file.name not in (".out", ".err", ".in")


# -- paths, links and descriptions -------------------------------------------------------------------------------------


def _name_upwards(place: Place, data: Path) -> tuple[str, ...]:
    return ("kd-train", *SETTINGS, f"data.train_file={data}", "name=../../elsewhere/run")


def _name_absolute(place: Place, data: Path) -> tuple[str, ...]:
    return ("kd-train", *SETTINGS, f"data.train_file={data}", f"name={place.root}/elsewhere/run")


def _begun(place: Place, data: Path) -> tuple[str, ...]:
    return ("kd-train", *SETTINGS, f"data.train_file={data}", "run_dir=runs/run")


def _linked(place: Place, data: Path, inside: str) -> tuple[str, ...]:
    link = place.work / "runs" / "run" / inside
    link.parent.mkdir(parents=True)
    link.symlink_to(place.root / "elsewhere", target_is_directory=True)
    return _begun(place, data)


def _finished(place: Place, data: Path) -> Path:
    line = _begun(place, data)
    assert command(line, place.work, place.home, prepare=prepared).code == 0
    return place.work / "runs" / "run"


def _described(place: Place, data: Path, target: dict[str, Any], reader: tuple[str, ...]) -> tuple[str, ...]:
    """Have a run's description name something that leaves a mark when it is called."""
    run = _finished(place, data)
    (run / "seed_0/distill/model.json").write_text(json.dumps(target), encoding="utf-8")
    return reader


def _configured(place: Place, data: Path) -> tuple[str, ...]:
    run = _finished(place, data)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    evil = text.replace("_target_: kd_lightning.data.TextFiles", "_target_: evil.touch")
    (run / "config.yaml").write_text(evil, encoding="utf-8")
    (place.work / "evil.py").write_text(EVIL.format(victim=place.root / "elsewhere"), encoding="utf-8")
    return ("kd-eval", "runs/run")


def _cache_names(place: Place, data: Path, name: str, reader: tuple[str, ...] | None) -> tuple[str, ...]:
    """Have a cache's manifest, checksum and all, name a file that is not its own."""
    _finished(place, data)
    [manifest] = (place.home / "teacher_outputs").glob("*/manifest.json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["shards"][0]["file"] = name.format(root=place.root)
    del content["checksum"]
    import hashlib

    content["checksum"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    manifest.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new = ("run_dir=runs/new", "teacher.checkpoint=runs/run", "stages=[distill]")
    return reader or ("kd-train", *SETTINGS, f"data.train_file={data}", *new)


def _pt2(place: Place, data: Path, expression: bool) -> tuple[str, ...]:
    """Put a pickle, or an expression, that leaves a mark into an exported program."""
    _finished(place, data)
    line = ("kd-export", "runs/run", "--format", "pt2", "--out", "out")
    assert command(line, place.work, place.home, prepare=prepared).code == 0
    file, mark = place.work / "out/model.pt2", place.root / "elsewhere" / "mark"
    with zipfile.ZipFile(file) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    evil = json.dumps(f"__import__('pathlib').Path({str(mark)!r}).touch() or Symbol('s0')")
    for name in entries:
        if expression and name.endswith("models/model.json"):
            text = entries[name].decode()
            entries[name] = re.sub(r'"expr_str": *"[^"]*"', lambda _: f'"expr_str": {evil}', text).encode()
        elif not expression and "sample_inputs" in name:
            entries[name] = f"cposix\nsystem\n(Vtouch {mark}\ntR.".encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as whole:
        for name, content in entries.items():
            whole.writestr(name, content)
    return ("kd-predict", "out", "the goal")


def _remote_code(place: Place, data: Path) -> tuple[str, ...]:
    folder = place.work / "teacher"
    folder.mkdir()
    auto = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}), encoding="utf-8")
    (folder / "evil.py").write_text(EVIL.format(victim=place.root / "elsewhere"), encoding="utf-8")
    return ("kd-train", *SETTINGS, f"data.train_file={data}", "run_dir=runs/run", "teacher.checkpoint=teacher")


EVIL = """from pathlib import Path
Path({victim!r}, "mark").touch()
def touch(*_, **__):
    Path({victim!r}, "mark").touch()
""".replace("{victim!r}", "'{victim}'")
TOUCH = {"_target_": "os.system", "command": "touch ../elsewhere/mark"}
PICKLE = {"_target_": "pandas.read_pickle", "filepath_or_buffer": "../elsewhere/kept.txt"}
NEARBY = {"_target_": "evil.touch"}
PREDICT, EXPORT = (
    ("kd-predict", "runs/run", "the goal"),
    ("kd-export", "runs/run", "--format", "safetensors", "--out", "o"),
)
PRUNE = ("kd-cache", "prune", "--damaged")
ATTACKS: dict[str, Callable[[Place, Path], tuple[str, ...]]] = {
    "name=../../elsewhere/run": _name_upwards,
    "name=/elsewhere/run": _name_absolute,
    "checkpoints/ is a link": partial(_linked, inside="seed_0/distill/checkpoints"),
    "a stage's folder is a link": partial(_linked, inside="seed_0/distill"),
    "the teacher's checkpoints/ is a link": partial(_linked, inside="teacher/checkpoints"),
    "model.json calls os.system": partial(_described, target=TOUCH, reader=PREDICT),
    "model.json calls a pickle": partial(_described, target=PICKLE, reader=EXPORT),
    "model.json calls a file nearby": partial(_described, target=NEARBY, reader=PREDICT),
    "config.yaml calls a file nearby": _configured,
    "a shard called ../../../elsewhere/kept.txt": partial(
        _cache_names, name="../../../elsewhere/kept.txt", reader=None
    ),
    "a shard with an absolute path": partial(_cache_names, name="{root}/elsewhere/kept.txt", reader=None),
    "prune, a shard called ../../../elsewhere/kept.txt": partial(
        _cache_names, name="../../../elsewhere/kept.txt", reader=PRUNE
    ),
    "a pickle in a pt2 export": partial(_pt2, expression=False),
    "an expression in a pt2 export": partial(_pt2, expression=True),
    "a teacher with auto_map": _remote_code,
}


def attacked(root: Path, name: str) -> dict[str, Any]:
    """Set a trap, run the command that walks into it, and look whether it closed."""
    place = new_place(root)
    data = write_sentences(root / "toy.csv", rows=90)
    victim = root / "elsewhere"
    victim.mkdir()
    for file in ("kept.txt", "best.ckpt", "resume.ckpt", "metrics.csv", "stage.json.bak"):
        (victim / file).write_text("the user's own\n", encoding="utf-8")
    before = _listing(victim)
    line = ATTACKS[name](place, data)
    (place.work / "evil.py").write_text(EVIL.format(victim=victim), encoding="utf-8")
    ended = command(line, place.work, place.home, prepare=prepared)
    said = {
        "group": "names", "what": "paths, links and descriptions", "how": name, "command": " ".join(line),
        "first": {"code": ended.code, "err": ended.err[-2000:]},
    }  # fmt: skip
    after = _listing(victim)
    if after != before:
        more = sorted(after.keys() ^ before.keys()) or "contents"
        return said | {"outcome": "executed" if "mark" in more else "outside touched", "detail": str(more)}
    if wrong := _shown(ended, line):
        return said | {"outcome": wrong, "detail": ended.last}
    return said | {"outcome": "harmless" if ended.code == 0 else "refused in a line", "detail": ended.last}


def _listing(folder: Path) -> dict[str, bytes]:
    return {os.path.relpath(file, folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
