"""The server of docs/export.md, as it stands: texts in, classes out, and a refusal for anything else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.export.conftest import Exports
from tests.export.fresh import EXAMPLES
from tests.export.test_formats import SENTENCES, expected
from tests.waiting import end_of, wait_for


@pytest.fixture
def address(bilstm: Path, exports: Exports, tmp_path: Path) -> Iterator[str]:
    """Where the server listens."""
    folder = exports(bilstm, "onnx")
    [script] = [text for text in EXAMPLES if "BaseHTTPRequestHandler" in text]
    (tmp_path / "serve.py").write_text(script, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "serve.py", str(folder), str(port)], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def listens() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        wait_for(listens, "the server to listen", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        end_of(server)


def post(address: str, body: bytes) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=30) as found:
        return json.load(found)


def test_the_server_classifies_texts_and_refuses_anything_else(bilstm: Path, address: str) -> None:
    found = post(address, json.dumps(SENTENCES).encode())
    assert [one["label"] for one in found] == [label for label, _ in expected(bilstm)]
    assert [one["p"] for one in found] == pytest.approx([p for _, p in expected(bilstm)], abs=2e-4)
    for body in (b"no json", b"[]", b"7", b"[1, 2]"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, body)
        assert refused.value.code == 400, body
        assert "expected a JSON list of texts" in json.load(refused.value)["error"]
    assert len(post(address, b'["still there"]')) == 1
