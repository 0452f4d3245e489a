"""The check of an installation: what it finds, what it calls a problem, and how long it waits."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from kd_lightning.cli.doctor import main
from kd_lightning.config.resolvers import fast_precision
from kd_lightning.pipeline import doctor
from kd_lightning.pipeline.doctor import Finding, examine
from tests import ROOT


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> Path:
    monkeypatch.setattr(doctor, "_registries", lambda: {"pip": None})
    return own_home


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in found}


def test_everything_is_looked_at(offline: Path) -> None:
    (offline / "teacher_outputs" / "a").mkdir(parents=True)
    (offline / "teacher_outputs" / "a" / "shard").write_bytes(bytes(2500))
    found = examine(self_test=False)
    assert list(dict.fromkeys(one.about for one in found)) == [
        "versions", "machine", "devices", "caches", "extras", "registries",
    ]  # fmt: skip
    named = by_name(found)
    assert named["python"].says == sys.version.split()[0]
    assert named["torch"].verdict == "ok"
    assert named["teacher_outputs"].says == "2.5 kB"
    assert str(offline) in named["KD_LIGHTNING_HOME"].says
    assert named["teacher trains in"].says == fast_precision()
    assert not [one for one in found if one.verdict == "problem"]


def test_the_student_comes_nearer_to_its_teacher() -> None:
    before, after, seconds = doctor._distilled()
    assert after < before / 2
    assert seconds < 60  # of a machine that others use too


def test_a_student_that_learns_nothing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_distilled", lambda: (1.0, 0.9, 1.0))
    assert doctor._trial().verdict == "problem"

    def broken() -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "_distilled", broken)
    assert "RuntimeError: no kernel image" in doctor._trial().says


def test_what_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["rich>=13", "rich>9999", "nowhere-to-be-found", "rich; extra == 'a'", "nowhere-to-be-found; extra == 'b'"]
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(line) for line in lines])
    rich, old, missing = [one for one in doctor._versions() if one.name not in ("python", doctor.PACKAGE)]
    assert rich.verdict == "ok"
    assert old.verdict == missing.verdict == "problem"
    assert "needed: rich>9999" in old.says
    assert missing.says.startswith("missing; ")
    assert [(one.name, one.verdict, one.says) for one in doctor._extras()] == [
        ("a", "ok", "installed"),
        ("b", "note", "lacks nowhere-to-be-found: pip install 'kd-lightning[b]'"),
    ]


def test_a_home_that_cannot_be_written_is_a_problem(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor, "tempfile", SimpleNamespace(TemporaryFile=full))
    [found] = doctor._home()
    assert found.verdict == "problem"
    assert "No space left on device" in found.says


class Replies(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_registry_that_replies_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Replies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        plain = f"http://127.0.0.1:{server.server_port}"
        assert doctor._registry("a", f"{plain}/200").verdict == "ok"
        assert doctor._registry("a", f"{plain}/404").verdict == "ok"
        assert doctor._registry("a", f"{plain}/503").verdict == "note"
        for account in ("user:secret", "user@corp:secret", "secret", "user:%73ecret%40"):
            found = doctor._registry("a", f"http://{account}@127.0.0.1:{server.server_port}/404?token=secret#secret")
            assert (found.verdict, found.says) == ("ok", f"{plain}/404: reached")
        server.shutdown()
    gone = doctor._registry("a", f"{plain}/200")
    assert (gone.verdict, "not reached" in gone.says) == ("note", True)
    assert doctor._registry("a", None).verdict == "note"


@pytest.mark.parametrize(
    "url",
    ["http://user:sec/ret@host", "https://user:12#sec@host/", "user:secret@host/simple", "http://user:secret@[host",
     "ftp://user:secret@host", "http://"],
)  # fmt: skip
def test_what_may_be_a_password_is_not_printed(url: str) -> None:
    found = doctor._registry("a", url)
    assert found.verdict == "note"
    assert "none of http(s)://HOST/PATH" in found.says
    assert "sec" not in found.says
    assert "host" not in found.says


def test_what_is_no_http_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0\r\n")

        threading.Thread(target=reply, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert "not reached" in doctor._registry("a", url).says
    assert "not reached" in doctor._registry("a", "http://127.0.0.1:12a/").says


def test_a_broken_torch_is_a_problem_of_each_section_that_needs_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: no such file\\nmore')\n")
    code = (
        "from kd_lightning.pipeline import doctor; doctor._registries = dict\n"
        "from kd_lightning.cli.doctor import main; main(['--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "KD_LIGHTNING_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    for name in ("machine", "devices", "distillation"):
        assert found[name]["verdict"] == "problem"
        assert "OSError: libcudart.so: no such file" in found[name]["says"]
    assert found["python"]["verdict"] == found["KD_LIGHTNING_HOME"]["verdict"] == "ok"


def test_a_home_that_is_no_folder_or_cannot_be_read_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        monkeypatch.setenv("KD_LIGHTNING_HOME", str(place))
        [found] = doctor._home()
        assert (found.verdict, "(Not a directory): set KD_LIGHTNING_HOME" in found.says) == ("problem", True)

    def closed(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "iterdir", closed)
    [found] = doctor._home()
    assert (found.verdict, "cannot be read (Permission denied)" in found.says) == ("problem", True)


def test_what_the_package_imports_is_declared() -> None:
    declared = {
        re.split(r"[\[<>=]", line)[0]
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    assert "packaging" in declared


def test_a_registry_that_is_silent_is_not_waited_for(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_registries", lambda: {"pip": "https://user:secret@host"})
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    monkeypatch.setattr(doctor, "_registry", lambda name, url: time.sleep(30))
    begun = time.monotonic()
    assert by_name(examine(self_test=False))["pip"].says == "not reached in time"
    assert time.monotonic() - begun < 25


def test_the_exit_code_and_the_json(
    offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("versions", "torch", "\x1b[2J"), Finding("extras", "b", "lacks", "note")]
    monkeypatch.setattr(doctor, "examine", lambda self_test: found)
    main([])
    assert capsys.readouterr().out.splitlines() == [
        "versions", "  torch  \\x1b[2J", "extras", "- b      lacks", "0 problems (!), 1 notes (-)",
    ]  # fmt: skip
    main(["--json"])
    assert json.loads(capsys.readouterr().out)["ok"] is True
    found.append(Finding("self-test", "distillation", "failed", "problem"))
    with pytest.raises(SystemExit) as ended:
        main(["--json"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_help_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kd_lightning.cli", "doctor", "--help"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "numpy", "hydra"}
