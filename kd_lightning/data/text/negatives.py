"""Hard negatives: what a sentence encoder finds for a query beside its own documents.

They are found before any training, so that a teacher's scores of them are stored like all others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.data.labels import folded
from kd_lightning.data.text.lists import RankedList
from kd_lightning.data.text.tokens import encode_batch, load_tokenizer, tokenizer_fingerprint
from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.models.fits import most_positions
from kd_lightning.models.rebuild import describe, versions
from kd_lightning.models.sentence_encoder import sentence_encoder
from kd_lightning.runtime.assets import discard_folder, home, new_folder
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import network_digest
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, write_sealed
from kd_lightning.tasks.retrieval import search

log = logging.getLogger(__name__)

VERSION = 2
"""Raised when the same encoder finds other documents."""
BATCH = 64
"""Texts that are embedded together."""
FOUND, META = "found.npy", "meta.json"


class Encoder:
    """A sentence encoder that looks for documents; what it finds is kept under `$KD_LIGHTNING_HOME`.

    Args:
        name: `minilm`, a folder of `transformers` or `sentence-transformers`, or a name on the Hugging Face hub.
        max_length: Longer texts are cut to this many tokens, or to as many as the encoder takes.

    Raises:
        ConfigError: There is no such encoder, or it has no tokenizer.
    """

    def __init__(self, name: str, max_length: int) -> None:
        try:
            self.name, self.network, self.tokenizer = name, sentence_encoder(name), load_tokenizer(name)
        except ConfigError as error:  # the loaders name keys of their own
            reason = str(error).removeprefix("data.tokenizer=").removeprefix("name=").removeprefix(repr(name))
            raise ConfigError(f"data.negatives_by={name}: {reason.lstrip(': ')}") from error
        self.max_length = min(max_length, most_positions(self.network) or max_length)

    def nearest(self, queries: Sequence[str], documents: Sequence[str], count: int) -> NDArray[np.int64]:
        """Return the documents nearest to each query by cosine, the nearest first, `(Q, count)`."""
        deciding = [
            VERSION, network_digest(self.network), describe(self.network), versions(self.network),
            tokenizer_fingerprint(self.tokenizer), self.tokenizer.truncation_side, self.max_length, count,
            list(queries), list(documents),
        ]  # fmt: skip
        content = json.dumps(deciding, ensure_ascii=False).encode("utf-8", "surrogatepass")
        folder = home() / "negatives" / hashlib.sha256(content).hexdigest()
        try:
            return _read(folder)
        except (KDError, OSError, ValueError) as error:
            if folder.exists():
                log.warning("%s; looking for documents again", error)
                discard_folder(folder)
        log.info("%s looks for %d of %d documents for %d queries", self.name, count, len(documents), len(queries))
        sides = [F.normalize(self.embed(texts), dim=1) for texts in (queries, documents)]
        found = search(sides[0], sides[1], count).numpy()
        with new_folder(folder) as temporary:
            np.save(temporary / FOUND, found)
            write_sealed(temporary / META, {"files": seal(temporary, [FOUND])})
        return found

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, `(N, D)` float32 on the CPU."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        with evaluating(self.network):
            for start in range(0, len(order), BATCH):
                chosen = [(texts[i],) for i in order[start : start + BATCH]]
                parts.append(run_network(self.network, encode_batch(self.tokenizer, chosen, self.max_length)).logits)
        embedded = torch.cat(parts)
        found = torch.empty_like(embedded)
        found[torch.tensor(order)] = embedded
        return found


def _read(folder: Path) -> NDArray[np.int64]:
    meta: Any = read_sealed(folder / META, "it is written again")
    if not isinstance(files := meta.get("files"), dict):
        raise KDError(f"{folder / META} names no files: it is written again")
    check_seal(folder, files, [FOUND], "it is written again")
    found: NDArray[np.int64] = np.load(folder / FOUND)
    return found


def with_negatives(lists: Sequence[RankedList], count: int, encoder: Encoder) -> list[RankedList]:
    """Return queries with documents of other queries behind their own, of grade 0.

    The corpus is all documents of these queries. A query's own documents are never found for it, nor those of an equal
    query.

    Args:
        lists: The queries.
        count: How many each gets, as far as there are any.
        encoder: Finds them.
    """
    known: dict[str, int] = {}
    of_query: dict[str, set[int]] = {}
    texts: list[str] = []
    for one in lists:
        for document in one.documents:
            key = folded(document)
            if known.setdefault(key, len(texts)) == len(texts):
                texts.append(document)
            of_query.setdefault(folded(one.query), set()).add(known[key])
    most = max(map(len, of_query.values()), default=0)
    found = encoder.nearest([one.query for one in lists], texts, min(count + most, len(texts)))
    added = []
    for one, near in zip(lists, found.tolist(), strict=True):
        own = of_query[folded(one.query)]
        chosen = [texts[number] for number in near if number not in own][:count]
        added.append(replace(one, documents=(*one.documents, *chosen), grades=(*one.grades, *[0.0] * len(chosen))))
    return added
