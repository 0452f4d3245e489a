"""Nothing waits without end: every wait of the package, the scripts and the tests has a limit, or is listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests import ROOT

ENDLESS = {"run", "call", "check_call", "check_output"}
"""Of `subprocess`: they wait until a process ends, unless they are given a `timeout`."""
BARE = {"join", "wait", "communicate", "recv", "get", "acquire", "result"}
"""Of processes, threads, events, queues, locks and futures: they wait without end where they are given nothing."""
ALLOWED = {
    "kd_lightning/runtime/files.py: held.acquire()": "a live training's lock, released when its process dies",
    "kd_lightning/config/trust.py: _all.get()": "a context variable",
    "tests/runtime/test_limits.py: SET.get()": "a context variable",
    "kd_lightning/export/formats/executorch.py: Runtime.get()": "the runtime, of which a process has one",
    "scripts/faults/process.py: os.waitpid(child, 0)": "of a fork that was killed, or is at its `os._exit`",
    "scripts/benchmarks/common.py: ours.recv()": "after a `poll` with a limit",
    "scripts/trainings.py: future.result()": "of a future that `as_completed` gave, which hears of dead processes",
}


def waits(tree: ast.AST) -> Iterator[ast.AST]:
    """The waits without a limit."""
    for node in ast.walk(tree):
        if isinstance(node, ast.While):
            names = {getattr(one, "attr", getattr(one, "id", "")) for one in ast.walk(node)}
            if "sleep" in names and "monotonic" not in names:
                yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of, name = ast.unparse(node.func.value), node.func.attr
            if of == "subprocess":
                endless = name in ENDLESS and not {"timeout", None} & {one.arg for one in node.keywords}
            elif name == "flock":
                endless = "LOCK_NB" not in ast.unparse(node) and "LOCK_UN" not in ast.unparse(node)
            elif of == "os" and name in ("waitpid", "wait"):
                endless = "WNOHANG" not in ast.unparse(node)
            else:  # `HydraConfig.get()` reads
                endless = name in BARE and not node.args and not node.keywords and of != "HydraConfig"
            if endless:
                yield node


def test_every_wait_has_a_limit() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {ast.unparse(node).splitlines()[0]}": f"{file.relative_to(ROOT)}:{node.lineno}"
        for top in ("kd_lightning", "scripts", "tests")
        for file in sorted((ROOT / top).rglob("*.py"))
        for node in waits(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert {what: where for what, where in found.items() if what not in ALLOWED} == {}
    assert [what for what in ALLOWED if what not in found] == [], "these wait no more"


@pytest.mark.parametrize(
    ("code", "endless"),
    [
        ("subprocess.run(['x'])", True),
        ("subprocess.run(['x'], timeout=3)", False),
        ("subprocess.run(['x'], **options)", False),
        ("process.join()", True),
        ("process.join(3)", False),
        ("', '.join(words)", False),
        ("pipe.recv()", True),
        ("event.wait(timeout=3)", False),
        ("os.waitpid(child, 0)", True),
        ("while not file.exists(): time.sleep(1)", True),
        ("while not file.exists() and time.monotonic() < end: time.sleep(1)", False),
    ],
)
def test_what_waits_is_seen(code: str, endless: bool) -> None:
    assert bool(list(waits(ast.parse(code)))) == endless
