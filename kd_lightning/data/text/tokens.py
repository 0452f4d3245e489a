"""Tokenizers, and tokenised sentences: encoded once, stored on disk, memory-mapped."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.text.augment import MASK
from kd_lightning.data.text.corpus import Sentence
from kd_lightning.runtime.assets import TOKENIZERS, discard_folder, fetch, new_folder
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.gguf_files import folder_of, is_gguf
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, write_sealed
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

CHUNK = 10_000
"""Sentences encoded in one call, to limit memory."""

VERSION = 3
"""Raised when a text becomes other tokens, or these other files: what was made before is then not used any more."""


def is_learned(name: str) -> bool:
    """Return whether a tokenizer of this name is learned from the data."""
    return name.partition(":")[0] in ("wordpiece", "bpe")


def load_tokenizer(name: str, training_texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer; without a padding token (GPT-2) it pads with its end-of-text token.

    Args:
        name: An asset such as `"minilm"`; a folder, GGUF file or Hugging Face name; or learned from `training_texts`:
            `"wordpiece:8000"` for a WordPiece vocabulary of at most that size (larger when the texts have more distinct
            characters), or `"bpe:8000"` for byte pairs, which write any text and are what language models read.
        training_texts: The texts for learning a vocabulary.

    Raises:
        ConfigError: Unknown name, not a fast tokenizer, or no padding token.
    """
    kind, _, size = name.partition(":")
    if kind == "wordpiece":
        return _train_wordpiece(name, size, training_texts)
    if kind == "bpe":
        return _train_bpe(name, size, training_texts)
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    place = str(fetch(name) if name in TOKENIZERS else folder_of(name) if is_gguf(name) else name)
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            if Path(place).exists():
                raise
            HfApi().model_info(place, timeout=10)  # fails at once without a network; the next call retries for a minute
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise many types here, all with one meaning for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kinds = f"{', '.join(TOKENIZERS)}, wordpiece:SIZE, bpe:SIZE, a folder, or a Hugging Face name in reach"
        unset = "; by default it is the tokenizer of teacher.checkpoint, or teacher.model"
        raise ConfigError(f"data.tokenizer={name!r}: expected {kinds} ({reason[:200]}){unset}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"data.tokenizer={name!r} has no fast version (tokenizer.json); convert it or choose another")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"data.tokenizer={name!r} has no token to pad with; set pad_token and save it again")
    return tokenizer  # type: ignore[return-value]


def _train_wordpiece(name: str, size: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if not size.isdecimal() or int(size) < 10:
        raise ConfigError(f"data.tokenizer={name!r}: expected a vocabulary size after the colon, e.g. wordpiece:8000")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = special + _learn_pieces(tokenizer, int(size) - len(special), list(texts))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer.model = models.WordPiece(vocab=vocabulary, unk_token="[UNK]")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    entries = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=entries, **names)  # type: ignore[no-untyped-call]


def _train_bpe(name: str, size: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn byte pairs, beginning with all 256 bytes and one special token that ends a text and pads."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    if not size.isdecimal() or int(size) < 257:
        raise ConfigError(f"data.tokenizer={name!r}: expected a size of 257 or more after the colon, e.g. bpe:8000")
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, vocab_size=int(size), show_progress=False, special_tokens=[end])
    names = dict.fromkeys(("eos_token", "pad_token", "unk_token"), end)
    entries = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, model_input_names=entries, **names)  # type: ignore[no-untyped-call]


def _learn_pieces(tokenizer: Any, size: int, texts: list[str]) -> list[str]:
    """Return WordPiece pieces: every character, then the most frequent byte-pair merges.

    `WordPieceTrainer` breaks ties by hash order and so learns a different vocabulary each time; the byte-pair trainer
    does not. Its pieces are written in WordPiece's format, with `##` before a continuation.
    """
    from tokenizers.trainers import BpeTrainer

    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=size, show_progress=False))
    uses: Counter[str] = Counter()
    characters: set[str] = set()
    pieces = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    for encoding in itertools.chain.from_iterable(map(tokenizer.encode_batch, pieces)):
        before = None
        for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
            prefix = "##" if word == before else ""
            uses[prefix + token] += 1
            characters |= {prefix + token[0], *("##" + character for character in token[1:])}
            before = word
    ranked = sorted(uses.keys() - characters, key=lambda piece: (-uses[piece], piece))
    return sorted(characters) + ranked[: max(0, size - len(characters))]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a sha256 over everything that determines a tokenizer's output."""
    backend = _unused(tokenizer)
    more = [tokenizer.pad_token, tokenizer.mask_token, tokenizer.unk_token, tokenizer.model_input_names]
    return hashlib.sha256((backend.to_str() + json.dumps(more)).encode()).hexdigest()


def before_text(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    mask = [*encoded["special_tokens_mask"], 0]
    return list(encoded["input_ids"][: mask.index(0)])


def around_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before a text, and behind it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    before = before_text(tokenizer)
    return before, [token for token, special in pairs if special][len(before) :]


def special_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """Return the numbers of a tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder
    return np.array(sorted(number for number, token in added.items() if token.special), np.int64)


_PROBE = "The  people's 1234 laws,\n\tCaf\u00e9 \u4eba\u6c11 \U0001f642 -- e.g. don't!"


def tokenizer_differences(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> list[str]:
    """Return in what two tokenizers differ, in words; what pads makes no difference."""
    kinds: dict[str, Callable[[Any], Any]] = {
        "their vocabularies": lambda tokenizer: tokenizer.get_vocab(),
        "added tokens": lambda tokenizer: {str(token) for token in tokenizer.added_tokens_decoder.values()},
        "the token that ends a text": lambda tokenizer: tokenizer.eos_token,
        "the tokens around a text": lambda tokenizer: tokenizer("a")["input_ids"],
        "how they cut a text": lambda tokenizer: tokenizer(_PROBE)["input_ids"],
    }
    return [name for name, found in kinds.items() if found(one) != found(other)]


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, independent of its earlier use."""
    _unused(tokenizer)
    tokenizer.save_pretrained(str(folder))


def _unused(tokenizer: Any) -> Any:
    """Return a tokenizer's backend without the padding and truncation of its last call."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


@dataclass(frozen=True)
class TokenStore:
    """Tokenised sentences in one flat array.

    Attributes:
        folder: Where they are stored.
        tokens: Token ids of all sentences, `(T,)` int32.
        offsets: Where each sentence begins and the last one ends, `(N + 1,)` int64.
        types: Which text of a pair each token belongs to, `(T,)` int8; None for single texts.
        pad_token_id: The padding id of batches.
    """

    folder: Path
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    types: NDArray[np.int8] | None
    pad_token_id: int

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (
            self.folder,
            self.pad_token_id,
            False,
        )  # processes share the files, not copies of the arrays

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each sentence, `(N,)`."""
        return np.diff(self.offsets)

    def batch(self, index: NDArray[np.int64]) -> Batch:
        """Return sentences padded on the right to the longest of them.

        Args:
            index: Which sentences, `(B,)`.

        Returns:
            `input_ids`, `attention_mask` and, for pairs, `token_type_ids`, `(B, L)` int64.
        """
        place, mask = padded(self.offsets, index)
        entries = {"input_ids": np.where(mask, self.tokens[place], self.pad_token_id), "attention_mask": mask}
        if self.types is not None:
            entries["token_type_ids"] = np.where(mask, self.types[place], 0)
        return {name: torch.from_numpy(entry.astype(np.int64)) for name, entry in entries.items()}


def padded(offsets: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return rows' positions in a flat token array, and the mask of real tokens, `(B, L)` both.

    Args:
        offsets: Where each row begins and the last one ends, `(N + 1,)`.
        index: Which rows, `(B,)`.
    """
    start, end = offsets[index], offsets[index + 1]
    place = start[:, None] + np.arange((end - start).max())
    mask = place < end[:, None]
    return np.where(mask, place, 0), mask


def open_store(folder: Path, pad_token_id: int, checked: bool = True) -> TokenStore:
    """Open stored tokens.

    Args:
        folder: Where they are stored.
        pad_token_id: The padding id of batches.
        checked: Whether to verify the files' checksums.

    Raises:
        KDError: A file is missing or damaged.
        ValueError: The files are of other tokens.
    """
    meta = read_sealed(folder / "meta.json", "it is written again")
    if checked:
        check_seal(folder, meta["files"], meta["files"], "it is written again")
    tokens = np.asarray(np.memmap(folder / "tokens.int32", np.int32, "r"))  # plain arrays are indexed faster
    offsets = np.load(folder / "offsets.npy")
    types = np.asarray(np.memmap(folder / "types.int8", np.int8, "r")) if meta["types"] else None
    whole = len(offsets) == meta["sentences"] + 1 and len(tokens) == offsets[-1] == meta["tokens"]
    if not whole or meta["fingerprint"] != folder.name or (types is not None and len(types) != len(tokens)):
        raise ValueError(f"{folder} is damaged")
    return TokenStore(folder, tokens, offsets, types, pad_token_id)


def sentences_digest(sentences: Sequence[Sentence]) -> Any:
    """Return a sha256 to go on with, of the list of the sentences."""
    digest = hashlib.sha256(b"[")
    for start in range(0, len(sentences), CHUNK):
        piece = json.dumps(sentences[start : start + CHUNK], ensure_ascii=False)[1:-1]
        digest.update(((", " if start else "") + piece).encode("utf-8", "surrogatepass"))
    digest.update(b"]")
    return digest


def encode_store(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence], content: str, max_length: int, cache: Path
) -> TokenStore:
    """Return tokenised sentences from the cache, or tokenise and store them.

    The cache folder is named after everything that determines its content, so that another text, tokenizer or length
    never matches. A damaged folder is written again.

    Args:
        tokenizer: The tokenizer.
        sentences: Texts or pairs; `MASK` in them stands for the tokenizer's own mask.
        content: The hexadecimal `sentences_digest`.
        max_length: Longer ones are cut to this many tokens.
        cache: The folder of all stored tokens.
    """
    deciding = [VERSION, max_length, tokenizer.truncation_side, tokenizer_fingerprint(tokenizer), content]
    folder = cache / hashlib.sha256(json.dumps(deciding).encode()).hexdigest()
    pad_token_id = int(tokenizer.pad_token_id)
    try:
        return open_store(folder, pad_token_id)
    except (KDError, OSError, ValueError, KeyError) as error:
        if folder.exists():
            log.warning("%s; tokenising again", error)
            discard_folder(folder)
    with new_folder(folder) as temporary:
        _write_store(tokenizer, sentences, max_length, temporary, folder.name)
    return open_store(folder, pad_token_id)


def _write_store(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence], max_length: int, folder: Path, fingerprint: str
) -> None:
    typed = len(sentences[0]) == 2 and "token_type_ids" in tokenizer.model_input_names
    files: dict[str, tuple[Path, Any]] = {"input_ids": (folder / "tokens.int32", np.int32)}
    if typed:
        files["token_type_ids"] = (folder / "types.int8", np.int8)
    lengths = [np.zeros(1, np.int64)]
    truncated = 0
    for start in range(0, len(sentences), CHUNK):
        chunk = sentences[start : start + CHUNK]
        options: dict[str, Any] = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        encoded = tokenizer(*_columns(tokenizer, chunk), **options)
        if not all(encoded["input_ids"]):
            chunk = _readable(tokenizer, chunk, encoded["input_ids"])
            encoded = tokenizer(*_columns(tokenizer, chunk), **options)
        truncated += sum(bool(sentence.overflowing) for sentence in encoded.encodings or ())
        lengths.append(np.array([len(sentence) for sentence in encoded["input_ids"]]))
        for name, (path, dtype) in files.items():
            with path.open("ab") as file:
                np.fromiter(itertools.chain.from_iterable(encoded[name]), dtype).tofile(file)
    if truncated:
        log.info("%d of %d sentences were cut to %d tokens (data.max_length)", truncated, len(sentences), max_length)
    offsets = np.cumsum(np.concatenate(lengths))
    np.save(folder / "offsets.npy", offsets)
    meta = {"fingerprint": fingerprint, "types": typed, "sentences": len(sentences), "tokens": int(offsets[-1])}
    files_written = seal(folder, [*(path.name for path, _ in files.values()), "offsets.npy"])
    write_sealed(folder / "meta.json", {**meta, "files": files_written})


def mask_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's mask token, or its unknown token."""
    token: str | None = tokenizer.mask_token or tokenizer.unk_token
    return token


def _columns(tokenizer: PreTrainedTokenizerBase, sentences: Iterable[Sentence]) -> list[list[str]]:
    """Return the first texts, and the second ones of pairs, as arguments of the tokenizer."""
    mask = mask_token(tokenizer) or ""
    return [[text.replace(MASK, mask) for text in texts] for texts in zip(*sentences, strict=True)]


def _readable(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], found: Iterable[Any]
) -> list[Sentence]:
    """Replace sentences without any token by the unknown token.

    Args:
        tokenizer: It adds none of its own; U+200B has none in many.
        sentences: Texts or pairs.
        found: Whether it found any in each.
    """
    nothing = str(tokenizer.unk_token or tokenizer.eos_token or tokenizer.pad_token)
    return [text if any_token else (nothing, *text[1:]) for text, any_token in zip(sentences, found, strict=True)]


def encode_batch(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], max_length: int | None) -> Batch:
    """Tokenise sentences to the entries of `TokenStore.batch`."""
    options: dict[str, Any] = {"padding": True, "padding_side": "right", "return_attention_mask": True}
    options |= {"truncation": max_length is not None, "max_length": max_length, "return_tensors": "pt"}
    encoded = tokenizer(*_columns(tokenizer, sentences), **options)
    found = encoded["attention_mask"].bool().any(1)
    if not found.all():
        encoded = tokenizer(*_columns(tokenizer, _readable(tokenizer, sentences, found.tolist())), **options)
    return {name: entry for name, entry in encoded.items() if len(sentences[0]) == 2 or name != "token_type_ids"}
