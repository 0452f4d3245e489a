"""Running text as a `LightningDataModule`: tokenised once, split by document, served in blocks."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.corpus import alignment
from kd_lightning.data.corpus.alignment import AlignedDataset, TeacherReading
from kd_lightning.data.corpus.blocks import BlockDataset, Blocks, JoinedBlocks, Packing, cut
from kd_lightning.data.corpus.generated import GeneratedEncoder
from kd_lightning.data.corpus.masking import MaskedBlocks, MaskedDataset, Masks
from kd_lightning.data.corpus.splits import splits_of
from kd_lightning.data.corpus.store import (
    COUNTED,
    FILES,
    VERSION,
    Encoder,
    Source,
    TextEncoder,
    encode_corpus,
)
from kd_lightning.data.datamodule import IndexedData, Role, log
from kd_lightning.data.options import check_fractions, check_least
from kd_lightning.data.text.tokens import (
    before_text,
    load_tokenizer,
    special_tokens,
    tokenizer_differences,
    tokenizer_fingerprint,
)
from kd_lightning.data.text.trim import PREFIX, trim_tokenizer
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.seals import seal
from kd_lightning.tasks import CausalLanguageModeling, MaskedLanguageModeling, Task
from kd_lightning.tasks.causal_lm import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATED = "generated"
"""The split of texts that a teacher generated."""
MASKS = "masks"
"""The training blocks again, masked otherwise."""
LEARNED_FROM = 100_000
"""Documents that a tokenizer is learned from, where it is learned from the data."""


class CorpusData(IndexedData):
    """Documents, of which a language model predicts each next token, or the masked ones.

    A subclass says where they come from, in `sources`. An example is a block of tokens. Batches have the entries of
    `kd_lightning.data.corpus.blocks.Blocks.batch`, or of `masking.MaskedBlocks.batch`, and `index`, the number of the
    block: first those of the training documents, which stand in an order that their texts decide, then the same by
    further masks, then validation, then test. A masked block begins and ends with the tokens that the tokenizer puts
    around a text (`[CLS]`, `[SEP]`), within `block_size`. Validation and test have one mask each.

    A corpus is split by document, never by block. Where a split is not given, documents are drawn by their texts; of
    several copies of a text, and of training documents that are in another split too, no two splits have any.

    Args:
        tokenizer: A folder, a Hugging Face name, or `"bpe:8000"` to learn one from the training documents. Teacher and
            student read the same tokens. `"trimmed:NAME"` keeps those of NAME that the training text uses, and what
            writes any other text; a checkpoint of Hugging Face then teaches with these tokens alone.
        block_size: Tokens of a block.
        packing: What stands in a block: `documents` one after the other, of which none sees another; the same as one
            text (`concat`); or `none` but a single document. Masked ones are the last two.
        end_of_text: Whether each document ends with the tokenizer's end-of-text token; a masked one that stands alone
            does not.
        validation_fraction: How many of the documents to hold out for a missing validation split.
        test_fraction: How many to hold out for a missing test split.
        train_tokens: Train on so many tokens only; a smaller choice is part of a larger one. None: all.
        eval_tokens: Validate and test on about so many tokens only, in blocks from all over each split. None: all.
        teacher_tokenizer: The teacher's, where it has one of its own: it must be the student's but for the padding.
        cross_tokenizer: Whether it may be another: batches then have the teacher's tokens of the same text under
            `teacher_*`, and `spans` of both that are the same bytes (`kd_lightning.data.corpus.alignment`).
        mask_probability: Share of a block's tokens that are masked and predicted; 0: each token is, from those before.
        mask_sets: How many masks each training block has: epoch e trains on mask `e % mask_sets`. All have an `index`,
            so that a teacher's outputs can be cached. None: new masks in every epoch, which cannot be cached. The steps
            do not depend on it.
        cache_dir: Where encoded documents are kept; by default under `$KD_LIGHTNING_HOME`.
        options: Those of `IndexedData`.

    Raises:
        ConfigError: An option out of its range.
    """

    modality = "corpus"
    sets_by = ("data.mask_sets", "data.mask_sets")

    def __init__(
        self,
        tokenizer: str,
        block_size: int = 512,
        packing: Packing = "documents",
        end_of_text: bool = True,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        train_tokens: int | None = None,
        eval_tokens: int | None = None,
        teacher_tokenizer: str | None = None,
        cross_tokenizer: bool = False,
        mask_probability: float = 0.0,
        mask_sets: int | None = 1,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = {"train_tokens": train_tokens, "eval_tokens": eval_tokens}
        check_least(2, block_size=block_size, **{name: tokens for name, tokens in given.items() if tokens is not None})
        if packing not in get_args(Packing):
            raise ConfigError(f"data.packing={packing!r} is unknown{did_you_mean(str(packing), get_args(Packing))}")
        shares = {"validation": validation_fraction, "test": test_fraction}
        check_fractions(list(shares.values()), "the documents")
        if not mask_probability and mask_sets != 1:
            raise ConfigError(
                f"data.mask_sets={'null' if mask_sets is None else mask_sets}: no token is masked; set "
                "data.mask_probability=0.15 or another share, or leave it out (data.mask_sets=1)"
            )
        self.masks = Masks(mask_probability, mask_sets) if mask_probability else None
        self._masked: MaskedBlocks | None = None
        if self.masks is not None:
            self.masks.check(packing, tokenizer, cross_tokenizer)
            self.parts = self._without_pool = ("train", MASKS, "validation", "test")
        self.tokenizer_name, self.teacher_tokenizer_name = tokenizer, teacher_tokenizer
        self.cross_tokenizer = cross_tokenizer
        self._reading: TeacherReading | None = None
        self._teachers_tokenizer: PreTrainedTokenizerFast | None = None
        self._kept: Kept | None = None
        self._originals = True
        self._blocks: Blocks | JoinedBlocks
        self.block_size = block_size
        self.packing: Packing = packing
        self.end_of_text = end_of_text
        self.shares = shares
        self.train_tokens, self.eval_tokens = train_tokens, eval_tokens
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "corpora"

    @abstractmethod
    def sources(self) -> Mapping[str, Source]:
        """Return the documents: `train`, and `validation` and `test` where they are given."""

    # -- getting ready ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Encode, split and cut everything; a second call does nothing."""
        if self.fingerprint:
            return
        sources = self.sources()
        texts = itertools.islice(self._learned_from(sources["train"]), LEARNED_FROM)
        self._tokenizer = load_tokenizer(self.tokenizer_name.removeprefix(PREFIX), texts)
        self._whole = self._tokenizer
        teachers = self._of_teacher()
        encoder = self._encoder()
        store = encode_corpus(encoder, sources, self.cache_dir)
        if store.note:
            log.warning("%s", store.note)
        documents = splits_of(store, self.shares, self.split_seed)
        if self.tokenizer_name.startswith(PREFIX):
            size = len(self._tokenizer)
            used = store.used(documents["train"], size, self.train_tokens)
            self._tokenizer, ids = trim_tokenizer(self._tokenizer, used)
            self._kept = Kept(ids, size)
            log.info("vocabulary trimmed from %d to %d tokens", size, len(ids))
            encoder = self._encoder()
            store = encode_corpus(encoder, sources, self.cache_dir)  # the same documents
        limits = {} if self.train_tokens is None else {"train": self.train_tokens}
        spread = {} if self.eval_tokens is None else dict.fromkeys(self.shares, self.eval_tokens)
        pad = int(self._tokenizer.pad_token_id)
        size = self.block_size if self.masks is None else self.masks.room(self._tokenizer, self.block_size)
        self._blocks, counts = blocks, _ = cut(store, documents, size, self.packing, pad, limits, spread)
        if self.masks is not None:
            self._masked = self.masks.of(blocks, counts[0], self._tokenizer, self.split_seed)
            counts = [counts[0], len(self._masked) - len(blocks), *counts[1:]]
        self._lay_out(counts)
        if teachers is not None:
            self._read_by(teachers, sources, blocks)
        self.teacher_key = {
            "corpus": digest({name: source.key for name, source in sources.items()}),
            "documents": digest({name: store.hashes[chosen].tolist() for name, chosen in documents.items()}),
            "examples": self.num_examples, "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "encoding": encoder.key, "block_size": self.block_size, "packing": self.packing,
            "train_tokens": self.train_tokens, "eval_tokens": self.eval_tokens, "version": VERSION,
        }  # fmt: skip
        if self.masks is not None:
            self.teacher_key["masks"] = self.masks.key(self.split_seed)
        self.fingerprint = self._labelled = digest(self.teacher_key)
        if teachers is not None:
            reads = [tokenizer_fingerprint(teachers), self._encoder_of(teachers).key, alignment.VERSION]
            self.teacher_key["teacher_reads"] = digest(reads)

    def _of_teacher(self) -> PreTrainedTokenizerFast | None:
        """Return the teacher's tokenizer, if it is another than the student's.

        Raises:
            ConfigError: It is, and none but the student's can be read.
        """
        name, own = self.teacher_tokenizer_name, self.tokenizer_name.removeprefix(PREFIX)
        if name in (None, own) or (Path(name).is_dir() and not any(Path(name).glob("tokenizer*"))):
            return None
        teachers = load_tokenizer(name)
        differs = tokenizer_differences(teachers, self._whole)
        if not differs:
            return None
        if not self.cross_tokenizer:
            other = ", or set data.cross_tokenizer=true and distillation=cross_tokenizer, which compares the same text"
            raise ConfigError(
                f"the teacher's tokenizer {name} and data.tokenizer={self.tokenizer_name} differ in "
                f"{', '.join(differs)}: give the data the teacher's{other * (self.masks is None)}"
            )
        return teachers

    def _read_by(self, tokenizer: PreTrainedTokenizerFast, sources: Mapping[str, Source], blocks: Blocks) -> None:
        """Encode the documents for a teacher with another tokenizer."""
        store = encode_corpus(self._encoder_of(tokenizer), sources, self.cache_dir)
        before, pad = np.array(before_text(tokenizer), np.int64), int(tokenizer.pad_token_id)
        special = special_tokens(self._tokenizer), special_tokens(tokenizer)
        self._reading = TeacherReading(blocks, store, before, self.end_of_text, pad, special)
        if store.counted is not None:
            same, turns = len(self._reading.compared[0]), len(self._reading.turns[0].begins)
            if not same:
                raise ConfigError(
                    "data.cross_tokenizer=true: no assistant's turn is the same text in the chat templates of student "
                    "and teacher; set data.chat_template, which the student reads by"
                )
            if same < turns:
                log.warning("%d of %d turns are another text in the teacher's template: left out", turns - same, turns)
        self._teachers_tokenizer, self.other_tokens = tokenizer, True

    def _learned_from(self, source: Source) -> Iterator[str]:
        """Return the texts that a tokenizer is learned from."""
        return source.documents()

    def _encoder(self) -> Encoder:
        """Return what turns documents into tokens."""
        return self._encoder_of(self._tokenizer)

    def _encoder_of(self, tokenizer: PreTrainedTokenizerFast) -> Encoder:
        """Return what turns documents into tokens of a teacher's tokenizer."""
        alone = self.masks is not None and self.packing == "none"
        return TextEncoder(tokenizer, None if alone else self._end(tokenizer), bare=self.masks is not None)

    def _end(self, tokenizer: PreTrainedTokenizerFast) -> int | None:
        """Return the token that ends a document."""
        if not self.end_of_text:
            return None
        found = tokenizer.eos_token_id
        found = tokenizer.sep_token_id if found is None else found
        if found is None:
            raise ConfigError(
                f"data.tokenizer={tokenizer.name_or_path or self.tokenizer_name!r} has no end-of-text token: set "
                "data.end_of_text=false, or give it an eos_token and save it again"
            )
        return int(found)

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The masked tokens, or the next one: of the teacher's where these alone are selected."""
        if self.masks is not None:
            return MaskedLanguageModeling(len(self._tokenizer))
        if self._tokens == "teacher" and self._teachers_tokenizer is not None:
            return CausalLanguageModeling(len(self._teachers_tokenizer))
        return CausalLanguageModeling(len(self._tokenizer), self._kept)

    @property
    def title(self) -> str:
        """What is predicted, in a few words."""
        return "next token" if self.masks is None else "masked tokens"

    @property
    def repeatable(self) -> bool:
        """Whether every training example has an `index`; fresh masks (`mask_sets=None`) have none."""
        return self.masks is None or self.masks.sets is not None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens the teacher reads of each block, `(num_examples,)`; of its own about how many."""
        if self._reading is not None:
            return self._reading.lengths
        return (self._blocks if self._masked is None else self._masked).lengths

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network: `vocab_size`, `pad_token_id` and `block_size`."""
        tokenizer: Any = self.tokenizer_of(role)
        pad = int(tokenizer.pad_token_id)
        return {"vocab_size": len(tokenizer), "pad_token_id": pad, "block_size": self.block_size}

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest input in tokens, and that it is one text."""
        return {"max_length": self.block_size, "texts": 1}

    def tokenizer_of(self, role: Role) -> PreTrainedTokenizerFast:
        """Return the tokenizer: the teacher's where it has its own."""
        self.prepare()
        return self._tokenizer if role == "student" else self._teachers_tokenizer or self._tokenizer

    def read_with(self, tokenizers: Mapping[Role, str]) -> None:
        """Read with this tokenizer's folder, whoever's it is."""
        self.tokenizer_name = next(iter(tokenizers.values()), self.tokenizer_name)
        self.teacher_tokenizer_name = None  # nobody else reads

    def reading(self, tokenizer: str) -> Self:
        """Return this very object for a teacher that reads the same tokens.

        Raises:
            ConfigError: It reads others.
        """
        self.prepare()
        if tokenizer_differences(load_tokenizer(tokenizer), self._whole):
            raise ConfigError(
                f"the teacher reads with {tokenizer}, the student with data.tokenizer={self.tokenizer_name}: their "
                "tokens cannot be compared one by one; give the data the teacher's tokenizer"
            )
        return self

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return fold -1 for all examples; several folds are refused, since blocks share documents."""
        if count > 1:
            raise ConfigError(f"teacher.folds={count}: blocks share documents, so there are no folds of them; set 1")
        return super().folds(count)

    # -- generated texts ----------------------------------------------------------------------------------------------

    def prompts(self, tokens: int) -> list[list[int]]:
        """Return how the training texts begin, each beginning once.

        In a conversation, all before a turn that counts is one, for each such turn.

        Args:
            tokens: The most of a beginning of running text, which is up to half of what a block has of it.
        """
        found: dict[tuple[int, ...], None] = {}
        blocks = self._dataset("train", "train")
        for start in range(0, len(blocks), self.eval_batch_size):
            batch = blocks[range(start, min(start + self.eval_batch_size, len(blocks)))]
            found |= {tuple(one.tolist()): None for one in self.task.prompts(batch, tokens, every=True)}
        return [list(one) for one in found]

    def with_texts(self, source: Source, originals: bool) -> Self:
        """Return the data with generated texts, which are trained on where the pool is (`select`).

        Their blocks follow those of the test split; of their tokens only those count that were generated.

        Args:
            source: The texts, as `GeneratedEncoder` reads them.
            originals: Whether the training text is trained on as well.
        """
        self.prepare()
        blocks, pad = self._blocks, int(self._tokenizer.pad_token_id)
        assert isinstance(blocks, Blocks)
        store = encode_corpus(GeneratedEncoder(self._tokenizer), {GENERATED: source}, self.cache_dir)
        more, counts = cut(store, {GENERATED: np.arange(len(store))}, self.block_size, self.packing, pad)
        chosen = self._copy()
        chosen._blocks, chosen._originals = JoinedBlocks(blocks, more), originals
        chosen.parts = (*self.parts, GENERATED)
        chosen._lay_out([*self.sizes.values(), *counts])
        content = digest(seal(store.folder, (*FILES, COUNTED)))
        chosen.teacher_key = {**self.teacher_key, "examples": len(chosen._blocks), "generated": content}
        chosen._fingerprints = {False: self.fingerprint, True: digest([chosen.teacher_key, originals])}
        chosen.fingerprint = chosen._fingerprints[self._pool]
        return chosen

    # -- batches ------------------------------------------------------------------------------------------------------

    def _training_dataset(self) -> BlockDataset:
        self.prepare()
        if self._masked is not None:
            return MaskedDataset(self._masked, range(self._spans[MASKS].stop), fresh=not self.repeatable)
        if not self._pool or GENERATED not in self.parts:
            return self._trained_on(self._dataset("train", "train"))
        data = self._dataset("train", GENERATED)
        data.left_out = np.ones(len(data), np.bool_)
        for span in (self._spans["train"], self._spans[GENERATED])[not self._originals :]:
            data.left_out[span.start : span.stop] = False
        return data

    def _dataset(self, first: str, last: str) -> BlockDataset:
        self.prepare()
        span = range(self._spans[first].start, self._spans[last].stop)
        if self._masked is not None:
            return MaskedDataset(self._masked, span)
        if self._reading is None or self._tokens == "student":
            return BlockDataset(self._blocks, span)
        return AlignedDataset(self._reading, span, self._tokens == "teacher")
