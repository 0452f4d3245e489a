"""Substitutes for words in views: of the same class, or near in the teacher's embeddings."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.text.augment import words
from kd_lightning.data.text.tokens import is_learned, load_tokenizer
from kd_lightning.runtime.assets import PRETRAINED, fetch
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.seals import read_sealed
from kd_lightning.types import MOST_PADDING_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEAREST = 10
"""Number of neighbours of a word. TinyBERT (Jiao et al. 2019, arXiv 1909.10351) draws from 15."""

WEIGHTS = "model.safetensors"

_TRIES = 10
_KEY = "data.replace_by=neighbours: {!r}, the teacher's tokenizer,"
_CORE = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)


class NoEmbeddings(ConfigError):
    """Raised where a checkpoint has no word embeddings for its tokenizer."""


@dataclass(frozen=True)
class ClassWords:
    """Substitutes from other sentences of the same class, drawn by their frequency.

    Attributes:
        sentences: The training sentences.
        labels: Their classes.
    """

    sentences: Sequence[tuple[str, ...]]
    labels: Sequence[int]

    @cached_property
    def _of_class(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            found.setdefault(label, []).append(index)
        return found

    def of(self, word: str, index: int, rng: random.Random) -> str:
        """Return a word of another sentence, or the same one after a few failed draws."""
        for _ in range(_TRIES):
            other = rng.choice(self._of_class[self.labels[index]])
            found = rng.choice(words(" ".join(self.sentences[other])))[1]
            if other != index and found != word:
                return found
        return word


@dataclass(frozen=True)
class Neighbours:
    """Substitutes that are a word's nearest neighbours in the teacher's embeddings; see `nearest_words`.

    Punctuation around a word stays, and so does a capital letter before neighbours that have none.

    Attributes:
        table: The neighbours of each word that has any.
    """

    table: Mapping[str, Sequence[str]]

    @cached_property
    def digest(self) -> str:
        """Of the table."""
        return hashlib.sha256(json.dumps(self.table, sort_keys=True).encode()).hexdigest()

    def of(self, word: str, index: int, rng: random.Random) -> str:
        """Return a random neighbour, or the word itself if it has none."""
        match = _CORE.fullmatch(word)
        if match is None or not match[2]:
            return word
        before, core, after = match.groups()
        near = self.table.get(core) or self.table.get(core.lower())
        if not near:
            return word
        found = rng.choice(near)
        return before + (found[0].upper() + found[1:] if core[0].isupper() else found) + after


def nearest_words(texts: Iterable[str], checkpoint: str) -> Neighbours:
    """Return the neighbours of the words of texts in a checkpoint's word embeddings.

    Whole words are those with a single token. The nearest have the largest cosine after subtracting the table's mean
    row, a large common offset. Cosines are rounded, and equal ones are in alphabetical order, so that the neighbours
    are the same on all processors.

    Args:
        texts: The texts with the words.
        checkpoint: Whose tokenizer the teacher reads with: `"minilm"`, a folder, a Hugging Face name, or the folder
            `tokenizer` of a training of ours; there the table is that of the checkpoint which it started from, if any,
            so that a teacher and those fine-tuned from it have the same views.

    Raises:
        NoEmbeddings: The checkpoint has no weights, or no table that fits the tokenizer.
        ConfigError: It cannot be read.
    """
    place = _weights(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    rows = embeddings(place, len(tokenizer), checkpoint)
    tokens = _whole_words(tokenizer)
    wanted = {core for text in texts for _, word in words(text) if (core := _core(word))}
    known = sorted(word for word in {*wanted, *(word.lower() for word in wanted)} if word in tokens)
    candidates = sorted(tokens)
    mean = rows.mean(0, dtype=np.float64)

    def directions(some: Sequence[str]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = rows[[tokens[word] for word in some]] - mean
        found /= np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)
        return found

    others, later = directions(candidates).T, np.arange(len(candidates)) * 1e-12
    table: dict[str, list[str]] = {}
    for start in range(0, len(known), 1024):
        chunk = known[start : start + 1024]
        cosines = torch.from_numpy((directions(chunk) @ others).round(6) - later)
        best = cosines.topk(min(NEAREST + 1, len(candidates))).indices.tolist()
        for word, places in zip(chunk, best, strict=True):
            near = [candidates[i] for i in places if candidates[i].lower() != word.lower()][:NEAREST]
            if near:
                table[word] = near
    return Neighbours(table)


def _core(word: str) -> str:
    match = _CORE.fullmatch(word)
    return match[2] if match else ""


def _whole_words(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the words that are one token each, after a space, and their numbers."""
    texts = {tokenizer.convert_tokens_to_string([token]).strip() for token in tokenizer.get_vocab()}
    found = sorted(text for text in texts if text.isalpha())
    encoded = tokenizer([f" {text}" for text in found], add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    return {text: ids[0] for text, ids in zip(found, encoded, strict=True) if len(ids) == 1 and ids[0] != unknown}


def _weights(checkpoint: str) -> Path:
    """Return the file with a checkpoint's weights.

    Raises:
        NoEmbeddings: It has none, such as a tokenizer that is learned from the data.
        ConfigError: It cannot be reached.
    """
    from transformers.utils.hub import cached_file

    key, place = _KEY.format(checkpoint), _origin(checkpoint)
    remedy = "; set data.teacher_tokenizer to a pretrained checkpoint, or data.replace_by=class"
    lacking = NoEmbeddings(f"{key} has no model.safetensors beside it to read word embeddings from{remedy}")
    if is_learned(place):
        raise lacking
    folder = str(fetch(place)) if place in PRETRAINED else place
    if Path(folder).is_dir():
        if not (found := Path(folder) / WEIGHTS).is_file():
            raise lacking
        return found
    try:
        cached = cached_file(folder, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key} could not be read for its word embeddings ({str(error).splitlines()[0]}){remedy}"
        ) from error
    if cached is None:
        raise lacking
    return Path(cached)


def _origin(checkpoint: str) -> str:
    """Return what a training of ours started from, or its own folder; any other name as it is."""
    folder = Path(checkpoint).parent
    if Path(checkpoint).name != "tokenizer" or not (folder / WEIGHTS).is_file():
        return checkpoint
    settings = folder / "settings.json"
    network = read_sealed(settings, f"train {folder} again")["settings"]["network"] if settings.is_file() else {}
    name = str(network.get("name"))
    return name if name in PRETRAINED or (Path(name) / WEIGHTS).is_file() else str(folder)


def embeddings(weights: Path, vocabulary: int, checkpoint: str) -> NDArray[np.float32]:
    """Return the table of word embeddings `(V, H)` in a file of weights; messages name `checkpoint`."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        for name in sorted(file.keys()):
            if "emb" not in name and "wte" not in name:
                continue
            shape = file.get_slice(name).get_shape()
            if len(shape) == 2 and 0 <= shape[0] - vocabulary <= MOST_PADDING_ROWS:
                table: NDArray[np.float32] = file.get_tensor(name).float().numpy()
                return table
    raise NoEmbeddings(
        f"{_KEY.format(checkpoint)} has no word embeddings of its {vocabulary} tokens in {weights}; use "
        "data.replace_by=class"
    )
