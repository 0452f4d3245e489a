"""A causal language model that an inference server runs, by its likeliest next tokens.

Three dialects, each of which takes token ids and returns ids with log probabilities at temperature 1:

| dialect | request | what is read |
|---|---|---|
| `vllm` | `POST /v1/completions` with `prompt_logprobs` (20 at most, unless `--max-logprobs`) | `prompt_logprobs` |
| `sglang` | `POST /generate` with `top_logprobs_num` | `meta_info.input_top_logprobs` |
| `llama.cpp` | `POST /completion` with `n_probs`, for each beginning of the text | `completion_probabilities` |

llama.cpp returns log probabilities of what it writes and not of the prompt (its issue 27174), so that each token costs
a request's work of its own; its prompt cache computes only the last token of each.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.types import ModelOutput, SparseLogits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Dialect = Literal["vllm", "sglang", "llama.cpp"]
Likeliest = Sequence[tuple[int, float, str]]
"""Some tokens: id, log probability, text."""

KEY = "KD_TEACHER_API_KEY"
"""The environment variable with the server's key, which is written nowhere."""
AT_ONCE = 64
"""Beginnings of a text in a request to llama.cpp."""
ROUNDING = 1e-3
"""By how much probabilities may sum to more than 1."""
OTHERS = 0.1
"""The share of tokens with another text from which a server has another tokenizer; some texts are written otherwise."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a model is served, and how it is read.

    Attributes:
        url: `http://HOST:PORT`, with or without `/v1`.
        model: Its name there.
        dialect: The server's.
        timeout: Seconds for a request.
        retries: How often one is repeated that fails for a reason that may pass, later each time.
        parallel: Requests at the same time.

    Raises:
        ConfigError: The URL is none, or has a password.
    """

    url: str
    model: str
    dialect: Dialect = "vllm"
    timeout: float = 120.0
    retries: int = 5
    parallel: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"teacher.url={self.url}: expected http://HOST:PORT, or https")
        if parts.username or parts.password:
            raise ConfigError(f"teacher.url holds a password, which would be written to files: set {KEY} instead")

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """Send a request and return the reply.

        Raises:
            ConfigError: The server refuses it.
            KDError: It cannot be reached, or fails, after all retries.
        """
        place = self.url.rstrip("/").removesuffix("/v1") + path
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(place, json.dumps(content).encode(), headers)
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.25 * 2**attempt, 30.0))
            try:
                with _OPENER.open(request, timeout=self.timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_message(error)}"
                if error.code != 429 and error.code < 500:
                    raise ConfigError(f"teacher.url={self.url}: {place} is refused ({reason})") from error
            except ValueError as error:
                raise ConfigError(f"teacher.url={self.url}: {place} replies with what is no JSON ({error})") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise KDError(
            f"teacher.url={self.url} cannot be reached, or fails ({reason}), after {self.retries + 1} attempts: start "
            "the server, or raise teacher.timeout or teacher.retries"
        )


class ServedLM(nn.Module):
    """A causal language model without weights here; each forward pass sends its texts to a server.

    Each document of a block is a text of its own, as each attends to itself alone. After the last token of a document,
    where nothing is predicted, all tokens are as likely.

    Args:
        server: Where it is.
        tokenizer: The data's, which must be the server's.
        count: K, how many of the likeliest tokens are read.

    Raises:
        ConfigError: At a forward pass: the server reads other tokens, gives fewer than K, or no log probabilities.
        KDError: It cannot be reached.
    """

    def __init__(self, server: Server, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
        super().__init__()
        self.server, self.tokenizer, self.count = server, tokenizer, count
        self._known = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Return logits `(B, L, 0)`, and K tokens with the tail in `sparse`; arguments as for `CausalLM`."""
        size, k = len(self.tokenizer), self.count
        real = np.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
        documents = np.zeros(input_ids.shape, np.int64) if document_ids is None else document_ids.cpu().numpy()
        ids, spans = input_ids.cpu().numpy(), list(_texts(real, documents))
        values = np.full((*ids.shape, k), -math.log(size))
        likeliest = np.broadcast_to(np.arange(k), values.shape).copy()
        with ThreadPoolExecutor(self.server.parallel) as pool:
            replies = pool.map(self._read, [ids[row, places].tolist() for row, places in spans])
            for (row, places), (log_p, found) in zip(spans, replies, strict=True):
                values[row, places[:-1]], likeliest[row, places[:-1]] = log_p, found
        tail = np.log(np.maximum(1 - np.exp(values).sum(-1), 1e-9))
        with torch.inference_mode(False):
            sparse = SparseLogits(
                torch.from_numpy(values).float(), torch.from_numpy(likeliest), torch.from_numpy(tail).float(), size
            ).to(input_ids.device)
            return ModelOutput(sparse.values[..., :0], sparse=sparse)

    def _read(self, ids: list[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return log probabilities and ids `(n - 1, K)` of what follows each token of a text but the last."""
        rows = []
        try:
            replies = _DIALECTS[self.server.dialect](self.server, ids, self.count)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._wrong(f"its reply is not that of a {self.server.dialect} server ({error!r:.80})") from error
        if len(replies) != len(ids) - 1:
            raise self._wrong(f"it has log probabilities of {len(replies) + 1} tokens, and {len(ids)} were sent")
        for reply in replies:
            row = sorted(reply, key=lambda one: -one[1])[: self.count]
            if len(row) < self.count or not all(math.isfinite(log_p) for _, log_p, _ in reply):
                found = sum(math.isfinite(log_p) for _, log_p, _ in reply)
                raise self._wrong(
                    f"it has {found} finite log probabilities of a token, and teacher.cache_top_k={self.count}: lower "
                    "that, or start the server with more (vllm: --max-logprobs)"
                )
            if (total := sum(math.exp(log_p) for _, log_p, _ in row)) > 1 + ROUNDING:
                raise self._wrong(f"the probabilities of {self.count} tokens sum to {total:.3f}, more than 1")
            rows.append(row)
        self._check_tokens([one for row in rows for one in row])
        shape = (len(rows), self.count)
        values = np.array([log_p for row in rows for _, log_p, _ in row], np.float64)
        return values.reshape(shape), np.array([one for row in rows for one, _, _ in row], np.int64).reshape(shape)

    def _check_tokens(self, tokens: Likeliest) -> None:
        """Refuse another vocabulary, by ids that there are not and by the tokens' texts."""
        size = len(self.tokenizer)
        if outside := [one for one, _, _ in tokens if not 0 <= one < size]:
            raise self._wrong(f"it has a token {outside[0]}, and data.tokenizer {size} tokens: give the server's own")
        if self._known:
            return
        texts = {one: (text, str(self.tokenizer.decode([one]))) for one, _, text in tokens}
        texts = {one: pair for one, pair in texts.items() if all(map(_is_whole, pair))}
        others = {one: pair for one, pair in texts.items() if len({_bare(text) for text in pair}) > 1}
        if len(others) > OTHERS * len(texts):
            number, (there, here) = next(iter(others.items()))
            raise self._wrong(
                f"its token {number} is {there!r}, and data.tokenizer's is {here!r} (so are {len(others)} of "
                f"{len(texts)}): give the server's own tokenizer"
            )
        self._known = len(texts) > 0

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"teacher.url={self.server.url}, {self.server.model}: {why}")


def _texts(real: NDArray[np.bool_], documents: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the row and the places of each text of two tokens or more."""
    for row in range(len(real)):
        places = np.flatnonzero(real[row])
        borders = np.flatnonzero(np.diff(documents[row, places])) + 1
        yield from ((row, text) for text in np.split(places, borders) if len(text) > 1)


def _is_whole(text: str) -> bool:
    return bool(text.strip()) and "\ufffd" not in text


def _bare(text: str) -> str:
    return text.replace("\u0120", " ").replace("\u2581", " ").strip()


# -- dialects: from the ids of a text to the likeliest tokens after each but the last ----------------------------------


def _vllm(server: Server, ids: list[int], count: int) -> list[Likeliest]:
    content = {"model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": count}
    rows = server.post("/v1/completions", content)["choices"][0]["prompt_logprobs"][1:]
    return [
        [(int(one), float(given["logprob"]), str(given.get("decoded_token") or "")) for one, given in row.items()]
        for row in rows
    ]


def _sglang(server: Server, ids: list[int], count: int) -> list[Likeliest]:
    content = {
        "input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}, "return_logprob": True,
        "logprob_start_len": 0, "top_logprobs_num": count, "return_text_in_logprobs": True,
    }  # fmt: skip
    rows = server.post("/generate", content)["meta_info"]["input_top_logprobs"][1:]
    return [[(int(one), float(log_p), str(text or "")) for log_p, one, text in row] for row in rows]


def _llama_cpp(server: Server, ids: list[int], count: int) -> list[Likeliest]:
    found: list[Likeliest] = []
    for at in range(1, len(ids), AT_ONCE):
        prompts = [ids[:end] for end in range(at, min(at + AT_ONCE, len(ids)))]
        content = {"prompt": prompts, "n_predict": 1, "n_probs": count, "cache_prompt": True}
        reply = server.post("/completion", content)
        for one in reply if isinstance(reply, list) else [reply]:
            rows = one["completion_probabilities"][0]["top_logprobs"]
            found.append([(int(row["id"]), float(row["logprob"]), str(row.get("token") or "")) for row in rows])
    return found


_DIALECTS: dict[str, Callable[[Server, list[int], int], list[Likeliest]]] = {
    "vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp,
}  # fmt: skip


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key is for the host that was named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


def _message(error: urllib.error.HTTPError) -> str:
    """Return what a server gives as its reason, in one short line."""
    text = error.read(2000).decode("utf-8", "replace")
    with suppress(ValueError, AttributeError):  # no JSON, or no object
        content = json.loads(text)
        content = content.get("error", content)
        text = str(content.get("message", content) if isinstance(content, dict) else content)
    return " ".join(text.split())[:300] or str(error.reason)
