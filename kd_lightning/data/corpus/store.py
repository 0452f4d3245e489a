"""Documents as token ids: encoded once, kept on disk, read by memory map, whatever their size."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.text.tokens import tokenizer_fingerprint
from kd_lightning.runtime.assets import discard_folder, new_folder
from kd_lightning.runtime.errors import DataError, KDError
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

VERSION = 1
"""Goes up when the files of a store, or what they mean, change."""

CHUNK = 2**19
"""Characters that are encoded in one call: bounds the memory, long before it costs any time."""

FILES = ("tokens.bin", "widths.bin", "offsets.npy", "hashes.npy")
COUNTED = "counted.bin"
"""The file that a store has besides where only some tokens count."""


class Source(NamedTuple):
    """Documents that are read when they are needed, one after the other.

    Attributes:
        key: Names their content: another text has another key.
        documents: Yields the texts, the same ones at every call.
    """

    key: str
    documents: Callable[[], Iterator[str]]


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
        ids: `(L,)`.
        widths: How many bytes of its text each token stands for, `(L,)`.
        counted: Which of them a model learns to predict, `(L,)` bool; None: all.
    """

    ids: NDArray[np.int64]
    widths: NDArray[np.int64]
    counted: NDArray[np.bool_] | None = None


class Encoder(Protocol):
    """Turns documents into tokens.

    Attributes:
        tokenizer: The tokenizer.
        masks: Whether only some of the tokens count.
        key: What decides the tokens beside the texts, as JSON values.
        note: What there is to say about the documents encoded so far; empty for nothing.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...  # noqa: D102

    @property
    def masks(self) -> bool: ...  # noqa: D102

    @property
    def key(self) -> list[Any]: ...  # noqa: D102

    @property
    def note(self) -> str: ...  # noqa: D102

    def __call__(self, documents: Sequence[str]) -> list[Encoded]:
        """Return each document's tokens."""


@dataclass(frozen=True)
class TextEncoder:
    """Encodes plain text.

    Attributes:
        tokenizer: The tokenizer.
        end: The token that ends a document, put there if it does not stand there; None for none.
        bare: Whether the special tokens are left out that it puts around a text.
    """

    tokenizer: PreTrainedTokenizerFast
    end: int | None
    bare: bool = False
    masks = False
    note = ""

    @property
    def key(self) -> list[Any]:
        """The tokenizer, the end, and whether that is all."""
        return [tokenizer_fingerprint(self.tokenizer), self.end, *["bare"] * self.bare]

    def __call__(self, documents: Sequence[str]) -> list[Encoded]:
        """Return each document's tokens."""
        return encode_documents(self.tokenizer, documents, self.end, self.bare)


@dataclass(frozen=True)
class CorpusStore:
    """Encoded documents, one after the other in one flat array.

    Attributes:
        folder: Where they are stored.
        tokens: Token ids of all documents, `(T,)` uint16, or int32 for a vocabulary of more than 65,536.
        widths: How many bytes of the UTF-8 text each token stands for, `(T,)` uint16; their sum over a document is its
            size. A token that is no text (the end of a document) has 0, and of a character in several tokens the first
            has all bytes.
        offsets: Where each document begins and the last one ends, `(N + 1,)` int64.
        hashes: Of each document's text, `(N,)` uint64.
        counts: How many documents each source has, by its name, in their order.
        counted: Which tokens a model learns to predict, `(T,)` bool; None: all.
        note: What its encoder had to say.
    """

    folder: Path
    tokens: NDArray[Any]
    widths: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    counts: dict[str, int]
    counted: NDArray[np.bool_] | None
    note: str

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.folder, False)  # processes share the files, not copies of the arrays

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, `(N,)`."""
        return np.diff(self.offsets)

    def used(self, documents: NDArray[np.int64], vocabulary: int, limit: int | None = None) -> list[int]:
        """Return which tokens some documents have, ascending.

        Args:
            documents: Their numbers.
            vocabulary: How many tokens there are.
            limit: Only so many tokens count, from the first document on.
        """
        found = np.zeros(vocabulary, bool)
        left = int(self.offsets[-1]) if limit is None else limit
        for begin, end in zip(self.offsets[documents], self.offsets[documents + 1], strict=True):
            found[self.tokens[begin : min(end, begin + left)]] = True
            left = max(left - int(end - begin), 0)
        return [int(number) for number in np.flatnonzero(found)]


def open_corpus(folder: Path, checked: bool = True) -> CorpusStore:
    """Open stored documents.

    Args:
        folder: Where they are stored.
        checked: Whether to hold the files against their checksums.

    Raises:
        KDError: A file is missing or damaged, or of another corpus.
    """
    meta = read_sealed(folder / "meta.json", "it is written anew")
    if checked:
        check_seal(folder, meta["files"], meta["files"], "it is written anew")
    if meta["fingerprint"] != folder.name:
        raise KDError(f"{folder} holds the corpus {meta['fingerprint']}: it is written anew")

    def mapped(name: str, dtype: str | type[np.generic]) -> NDArray[Any]:
        return np.asarray(np.memmap(folder / name, np.dtype(dtype), "r"))  # as plain arrays they are indexed faster

    tokens, widths = mapped("tokens.bin", meta["dtype"]), mapped("widths.bin", np.uint16)
    counted = mapped(COUNTED, np.bool_) if COUNTED in meta["files"] else None
    offsets, hashes = np.load(folder / "offsets.npy"), np.load(folder / "hashes.npy")
    return CorpusStore(folder, tokens, widths, offsets, hashes, meta["counts"], counted, meta["note"])


def encode_corpus(encoder: Encoder, sources: Mapping[str, Source], cache: Path) -> CorpusStore:
    """Return documents encoded: from the cache, or encoded now and put there.

    The cache folder is named after everything that decides its content, so that another text or tokenizer never finds
    it. A damaged folder is written anew, and a killed process leaves none. Memory does not grow with the corpus, but by
    16 bytes a document.

    Args:
        encoder: What encodes them.
        sources: The documents, by a name of the source; in this order they stand in the store.
        cache: The folder of all stored corpora.

    Raises:
        DataError: A source without a document.
    """
    deciding = [VERSION, {name: source.key for name, source in sources.items()}, *encoder.key]
    folder = cache / hashlib.sha256(json.dumps(deciding).encode()).hexdigest()
    try:
        return open_corpus(folder)
    except (KDError, OSError, ValueError, KeyError) as error:
        if folder.exists():
            log.warning("%s; tokenising again", error)
            discard_folder(folder)
    with new_folder(folder) as temporary:
        _write(encoder, sources, temporary, folder.name)
    return open_corpus(folder)


def _write(encoder: Encoder, sources: Mapping[str, Source], folder: Path, fingerprint: str) -> None:
    dtype = np.dtype(np.uint16 if len(encoder.tokenizer) <= 2**16 else np.int32)
    lengths, hashes = [np.zeros(1, np.int64)], []
    counts = dict.fromkeys(sources, 0)
    names = (*FILES, COUNTED) if encoder.masks else FILES
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names if name.endswith(".bin")}
        for name, source in sources.items():
            for texts in _chunks(source.documents()):
                encoded = encoder(texts)
                for ids, sizes, counted in encoded:
                    files["tokens.bin"].write(ids.astype(dtype).tobytes())
                    files["widths.bin"].write(np.minimum(sizes, 2**16 - 1).astype(np.uint16).tobytes())
                    if counted is not None:
                        files[COUNTED].write(counted.tobytes())
                lengths.append(np.array([len(one.ids) for one in encoded]))
                hashes.append(np.array([text_hash(text) for text in texts], np.uint64))
                counts[name] += len(texts)
            if not counts[name]:
                raise DataError(f"data.{name}_file: there are no documents in it")
    offsets = np.cumsum(np.concatenate(lengths))
    if not offsets[-1]:
        raise DataError(
            f"data.train_file: no document has a token; {encoder.note or 'data.tokenizer knows none of it'}"
        )
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "hashes.npy", np.concatenate(hashes))
    meta = {"fingerprint": fingerprint, "dtype": dtype.str, "counts": counts, "note": encoder.note}
    write_sealed(folder / "meta.json", {**meta, "files": seal(folder, names)})


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield documents together, about `CHUNK` characters at a time."""
    chunk: list[str] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], end: int | None, bare: bool = False
) -> list[Encoded]:
    """Return each document's token ids, and how many bytes of its text each of them stands for."""
    encoded = tokenizer(
        list(texts), add_special_tokens=not bare, return_offsets_mapping=True, return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of documents that are longer than a model's input: they are cut into blocks
    )  # fmt: skip
    found = []
    for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = np.array([stop for _, stop in spans], np.int64)
        if end is not None and (not ids or ids[-1] != end):
            ids, ends = [*ids, end], np.append(ends, 0)
        if ids:
            found.append(Encoded(np.array(ids, np.int64), widths_of(text, ends)))
        else:  # a text of which the tokenizer knows nothing, and no token to end it
            found.append(Encoded(np.zeros(0, np.int64), np.zeros(0, np.int64)))
    return found


def widths_of(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes between the ends of successive tokens; the rest belongs to the last one."""
    reached = np.maximum.accumulate(ends)
    total = len(text) if text.isascii() else len(text.encode())
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        reached = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])[reached]
    reached = reached.copy()
    last = int(np.flatnonzero(ends)[-1]) if ends.any() else len(ends) - 1
    reached[last:] = total
    return np.diff(reached, prepend=0)


def text_hash(text: str) -> int:
    """Return the first 64 bits of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
