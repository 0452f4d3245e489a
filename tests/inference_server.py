"""A small inference server, which speaks as vLLM, SGLang and llama.cpp do of a tiny model's log probabilities."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn


@dataclass
class Serving:
    """A model that is served, and how it fails.

    Attributes:
        network: Of logits `(1, L, V)`.
        tokenizer: Whose texts it names.
        most: The most log probabilities that may be requested.
        failures: So many requests are refused with `status` first.
        status: With which HTTP status.
        spoil: Changes a row of `(id, log probability, text)` before it is sent.
        seen: The requests' paths and headers.
        url: Where it is.
    """

    network: nn.Module
    tokenizer: Any
    most: int = 20
    failures: int = 0
    status: int = 503
    spoil: Any = None
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def rows(self, ids: list[int], count: int, own: bool = False) -> list[list[tuple[int, float, str]]]:
        """Return the likeliest tokens after each of `ids`, with the next one itself where `own`."""
        with torch.no_grad():
            log_p = self.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = []
        for at, row in enumerate(log_p):
            chosen = row.topk(count).indices.tolist()
            if own and at + 1 < len(ids) and ids[at + 1] not in chosen:
                chosen.append(ids[at + 1])
            given = [(one, row[one].item(), self.tokenizer.decode([one])) for one in chosen]
            found.append(given if self.spoil is None else [self.spoil(*one) for one in given])
        return found

    def reply(self, path: str, content: dict[str, Any]) -> tuple[int, Any]:
        """Return a status and a reply."""
        if self.failures:
            self.failures -= 1
            return self.status, {"error": {"message": "the model is being loaded"}}
        if path == "/v1/completions":
            count, ids = content["prompt_logprobs"], content["prompt"]
            if count > self.most:
                return 400, {"error": {"message": f"Requested prompt logprobs of {count}, greater than {self.most}"}}
            if content["model"] != "tiny":
                return 404, {"object": "error", "message": f"The model {content['model']!r} does not exist."}
            rows = [
                {str(one): {"logprob": p, "rank": 1, "decoded_token": text} for one, p, text in row}
                for row in self.rows(ids, count, own=True)[:-1]
            ]
            return 200, {"choices": [{"text": "x", "prompt_logprobs": [None, *rows]}]}
        if path == "/generate":
            rows = self.rows(content["input_ids"], min(content["top_logprobs_num"], self.most))[:-1]
            top = [None, *([[p, one, text] for one, p, text in row] for row in rows)]
            return 200, {"text": "x", "meta_info": {"input_top_logprobs": top}}
        if path == "/completion":
            found = []
            for ids in content["prompt"]:
                row = self.rows(ids, min(content["n_probs"], self.most))[-1]
                top = [{"id": one, "token": text, "bytes": [], "logprob": p} for one, p, text in row]
                found.append({"completion_probabilities": [{**top[0], "top_logprobs": top}]})
            return 200, found
        return 404, "not found"


@contextmanager
def running(serving: Serving) -> Iterator[Serving]:
    """Run the server, on a port of its own, for a block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            serving.seen.append((self.path, dict(self.headers)))
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = serving.reply(self.path, content)
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    serving.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield serving
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
        assert not thread.is_alive(), "the server goes on serving"
