"""A served language model gives what the model itself does, in each dialect, or one line that tells why not."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.models.served import KEY, Dialect, ServedLM, Server
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.types import Batch, SparseLogits
from tests.data.corpus.texts import WORDS
from tests.inference_server import Serving, running

K = 8
TOKENIZER = load_tokenizer("bpe:280", [" ".join(WORDS)])


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    torch.manual_seed(0)
    network = causal_lm_small(len(TOKENIZER), 32, hidden_size=16, num_layers=1, num_heads=2).eval()
    network.network.lm_head.weight.data.mul_(30.0)  # type: ignore[operator, union-attr]
    with running(Serving(network, TOKENIZER)) as found:
        yield found


def served(serving: Serving, dialect: Dialect = "vllm", **more: Any) -> ServedLM:
    options: dict[str, Any] = {"model": "tiny", "retries": 2, "timeout": 20.0, **more}
    return ServedLM(Server(url=serving.url, dialect=dialect, **options), TOKENIZER, K)


def batch() -> Batch:
    """Packed documents, one of a single token, with padding."""
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, -1, -1, -1]])
    ids = torch.randint(0, len(TOKENIZER), documents.shape, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 0, 0]])
    mask = (documents >= 0).long()
    return {"input_ids": ids, "attention_mask": mask, "document_ids": documents, "position_ids": positions}


@pytest.mark.parametrize("dialect", get_args(Dialect))
@pytest.mark.parametrize("packed", [True, False])
def test_it_gives_the_likeliest_tokens_of_the_model(serving: Serving, dialect: Dialect, packed: bool) -> None:
    given = batch()
    if not packed:
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
    output = FrozenTeacher(served(serving, dialect))(given)
    expected = SparseLogits.of(serving.network(**given).logits.log_softmax(-1), K)
    assert output.logits.shape == (2, 8, 0)
    assert output.sparse is not None
    same = torch.zeros(2, 8, dtype=torch.bool)
    documents = given.get("document_ids", given["attention_mask"])
    same[:, :-1] = (documents[:, 1:] == documents[:, :-1]) & given["attention_mask"][:, 1:].bool()
    assert same.sum() == (9 if packed else 11)
    for one, other in zip(output.sparse.at(same)[:3], expected.at(same)[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    rest = output.sparse.at(~same)
    total = rest.values.exp().sum(-1) + rest.rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert output.sparse.classes == len(TOKENIZER)
    assert not output.sparse.values.is_inference()


def test_it_is_patient_and_sends_its_key_from_the_environment(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret-key")
    serving.failures = 2
    network = served(serving)
    network(**batch())
    assert {headers["Authorization"] for _, headers in serving.seen} == {"Bearer secret-key"}
    assert len(serving.seen) == 3 + 2  # three texts of two tokens or more
    assert b"secret-key" not in pickle.dumps(network)


def message(serving: Serving, network: ServedLM, kind: type[KDError] = ConfigError) -> str:
    with pytest.raises(kind) as refused:
        network(**batch())
    found = str(refused.value)
    assert "\n" not in found
    assert found.startswith(f"teacher.url={serving.url}")
    return found


def test_what_fails_is_one_line(serving: Serving) -> None:
    serving.failures = 99
    assert "fails (HTTP 503: the model is being loaded), after 3 attempts" in message(serving, served(serving), KDError)
    serving.failures, serving.status = 1, 307
    assert "is refused (HTTP 307" in message(serving, served(serving))  # follows nobody with its key
    serving.failures = 0
    assert "(HTTP 404: The model 'other' does not exist.)" in message(serving, served(serving, model="other"))
    serving.most = 5
    assert "HTTP 400: Requested prompt logprobs of 8, greater than 5" in message(serving, served(serving))
    for dialect in ("sglang", "llama.cpp"):
        said = message(serving, served(serving, dialect))
        assert "it has 5 finite log probabilities of a token, and teacher.cache_top_k=8: lower that" in said


def test_what_is_no_distribution_is_refused(serving: Serving) -> None:
    serving.spoil = lambda one, p, text: (one, math.nan, text)
    assert "it has 0 finite log probabilities" in message(serving, served(serving))
    serving.spoil = lambda one, p, text: (one, -0.5, text)
    assert "the probabilities of 8 tokens sum to 4.852, more than 1" in message(serving, served(serving, "sglang"))
    serving.spoil = lambda one, p, text: (one, None, text)
    assert "its reply is not that of a vllm server (TypeError" in message(serving, served(serving))


def test_another_vocabulary_is_refused(serving: Serving) -> None:
    serving.spoil = lambda one, p, text: (one + 200, p, text)
    assert f"and data.tokenizer {len(TOKENIZER)} tokens: give the server's own" in message(serving, served(serving))
    other = len(TOKENIZER) - 1
    serving.spoil = lambda one, p, text: (other - one, p, text)  # the same ids of other texts
    for dialect in get_args(Dialect):
        assert "and data.tokenizer's is" in message(serving, served(serving, dialect))
    serving.spoil = lambda one, p, text: (one, p, text.replace(" ", "\u0120"))
    served(serving)(**batch())


def test_nobody_there_is_one_line(serving: Serving) -> None:
    with running(Serving(serving.network, TOKENIZER)) as gone:
        pass
    said = message(gone, served(gone), KDError)
    assert "cannot be reached, or fails (" in said
    assert "after 3 attempts: start the server, or raise teacher.timeout" in said
    wrong = served(serving)
    wrong.server = Server(url=serving.url + "/other", model="tiny")
    with pytest.raises(ConfigError, match="HTTP 404"):
        wrong(**batch())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a/?key=1", "file:///etc/passwd"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected http://HOST:PORT"):
        Server(url=url, model="tiny")


def test_a_password_in_a_url_is_not_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        Server(url="http://me:hidden@host:8000", model="tiny")
    assert "hidden" not in str(refused.value)
    assert KEY in str(refused.value)
