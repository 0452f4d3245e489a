"""Sentences as a `LightningDataModule`: tokenised once, in batches of similar length."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kd_lightning.config.budget import worth
from kd_lightning.data.classification import ClassificationData
from kd_lightning.data.datamodule import Role
from kd_lightning.data.options import check_probabilities
from kd_lightning.data.splits import stratified_order
from kd_lightning.data.text import augment, tokens
from kd_lightning.data.text.augment import Changes, Views
from kd_lightning.data.text.corpus import Corpus, Sentence
from kd_lightning.data.text.dataset import FreshViews, TokenDataset
from kd_lightning.data.text.generated import Generated, Prompts
from kd_lightning.data.text.substitutes import ClassWords, Neighbours, NoEmbeddings, nearest_words
from kd_lightning.data.text.tokenized import ROLES, TokenizedData
from kd_lightning.data.text.tokens import (
    TokenStore,
    encode_batch,
    encode_store,
    mask_token,
    sentences_digest,
    tokenizer_fingerprint,
)
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.types import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

ReplaceBy = Literal["neighbours", "class"]
REPLACED = 0.1
"""How often a word is replaced where that is `auto`, and there are words to replace it by."""


class TextData(TokenizedData, ClassificationData):
    """Labelled sentences or pairs with one class each, and unlabelled sentences for distillation.

    Subclasses implement `read`. The teacher labels the views, since a masked word may change the class.

    Sentences are tokenised once and stored on disk, so that a batch is a few array look-ups; worker processes rarely
    help.

    Args:
        mask_probability: How often a view's word is masked.
        ngram_probability: How often a view is cut to at most five words.
        replace_probability: How often a view's word is replaced; `auto`: 0.1, or 0 where `replace_by` is `neighbours`
            and the teacher's tokenizer comes with no word embeddings.
        replace_by: Words by which: `neighbours` in the word embeddings of the checkpoint that the teacher's tokenizer
            belongs to, or words of other training sentences of the same `class`.
        drop_probability: How often a view's word is dropped.
        swap_probability: How often a view's word is swapped with the next one.
        crop_probability: How often a view is cropped to a random run of its words.
        crop_share: How long that run is, as a share of the words.
        transfer: Unlabelled sentences: files, or names that the source knows.
        generate: How many sentences a language model writes for the transfer set (`Generated`, for all of these).
        generator: That model.
        generate_from: What it continues: `words` or `classes`.
        generate_temperature: Of its draw.
        generate_top_p: The mass that it draws from.
        cache_dir: Where encoded sentences are kept; by default under `$KD_LIGHTNING_HOME`.
        options: Those of `TokenizedData` and `ClassificationData`; sentences of more than `max_length` tokens are cut.
            Sentences of `transfer` come after those that `train_examples` leaves out, and `transfer_examples` does not
            count them.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        mask_probability: float = 0.1,
        ngram_probability: float = 0.25,
        replace_probability: float | Literal["auto"] = "auto",
        replace_by: ReplaceBy = "neighbours",
        drop_probability: float = 0.05,
        swap_probability: float = 0.0,
        crop_probability: float = 0.0,
        crop_share: float = 0.5,
        transfer: Sequence[str] = (),
        generate: int = 0,
        generator: str | None = None,
        generate_from: Prompts = "words",
        generate_temperature: float = 1.0,
        generate_top_p: float = 0.95,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._may_replace = replace_probability == "auto"
        chances: dict[str, Any] = {
            "replace_probability": REPLACED if replace_probability == "auto" else replace_probability,
            "drop_probability": drop_probability, "swap_probability": swap_probability,
            "crop_probability": crop_probability, "crop_share": crop_share,
        }  # fmt: skip
        check_probabilities(mask_probability=mask_probability, ngram_probability=ngram_probability, **chances)
        chances = {name: float(value) for name, value in chances.items()}  # 0 and 0.0 are one fingerprint
        if replace_by not in get_args(ReplaceBy):
            hint = did_you_mean(str(replace_by), get_args(ReplaceBy))
            raise ConfigError(f"data.replace_by={replace_by!r} is unknown{hint}")
        self.mask_probability = mask_probability
        self.ngram_probability = ngram_probability
        self.replace_by = replace_by
        self._chances = chances
        # A copy for a teacher with another tokenizer has the same views.
        self._neighbours_in = self.tokenizer_names["teacher"]
        self.generated = Generated(generate, generator, generate_from, generate_temperature, generate_top_p)
        self._written: list[Sentence] | None = None
        self.transfer = [transfer] if isinstance(transfer, str) else list(transfer)
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "tokens"

    @abstractmethod
    def read(self) -> Corpus:
        """Return the class names and the labelled and unlabelled sentences."""

    # -- getting ready ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.drawn()
        self._load_tokenizers([text for sentence in corpus.train.texts for text in sentence])
        if self._written is None:
            self._written = self.generated.write(corpus, self.max_length, self.split_seed)
        corpus = replace(corpus, transfer=[*corpus.transfer, *self._written])
        size = fmean(sum(len(text.encode()) for text in sentence) for sentence in corpus.train.texts)
        self.worth = worth(size, self.max_length)
        self._decide_views(len(corpus.train), len(corpus.transfer))
        self._changes = self._changes_for(corpus)
        views = Views(
            corpus.train.texts, self.views, self.split_seed, self.mask_probability, self.ngram_probability,
            self._changes,
        )  # fmt: skip
        parts: dict[str, list[Sentence]] = {
            "train": corpus.train.texts,
            "views": [views.make(number) for number in range(views.per_set * (self.view_sets or 0))],
            "transfer": corpus.transfer,
            "validation": corpus.validation.texts,
            "test": corpus.test.texts,
        }
        self._lay_out([len(parts[name]) for name in self.parts])
        examples = self._spans["test"].stop
        if corpus.regression:
            self._labels = np.full(examples, np.nan, np.float32)
        else:
            self._labels = np.full(examples, IGNORE, np.int64)
        for name in ("train", "validation", "test"):
            self._labels[self._spans[name].start : self._spans[name].stop] = getattr(corpus, name).labels
        self._fresh = None if self.repeatable else views
        self.texts_per_example = len(corpus.train.texts[0])
        self.class_names = corpus.class_names
        self._encode([text for name in self.parts for text in parts[name]])

    def drawn(self) -> Corpus:
        """Read the corpus, with `train_examples` labelled sentences; others join the transfer set."""
        corpus = self.read()
        scores = np.asarray(corpus.train.labels)
        labels = np.zeros(len(scores), np.int64) if corpus.regression else scores
        train, left = self._draw(stratified_order(labels, self.split_seed), labels)
        texts = corpus.train.texts
        return replace(corpus, train=corpus.train.take(train), transfer=[*(texts[i] for i in left), *corpus.transfer])

    def _changes_for(self, corpus: Corpus) -> Changes:
        """Return the changes of views other than masking, with their substitutes."""
        if not self.views or not self._chances["replace_probability"]:
            return Changes(**self._chances)
        if self.replace_by == "class":
            if corpus.regression:
                raise ConfigError("data.replace_by=class: a regression has no classes; use data.replace_by=neighbours")
            labels = [int(label) for label in corpus.train.labels]
            return Changes(**self._chances, substitutes=ClassWords(corpus.train.texts, labels))
        texts = [text for sentence in corpus.train.texts for text in sentence]
        try:
            return Changes(**self._chances, substitutes=nearest_words(texts, self._neighbours_in))
        except NoEmbeddings as error:
            if not self._may_replace:
                raise
            log.info("%s; no words are replaced in views (data.replace_probability=auto)", error)
            self._chances = self._chances | {"replace_probability": 0.0}
            return Changes(**self._chances)

    def _load_tokenizers(self, training_texts: list[str]) -> dict[str, PreTrainedTokenizerFast]:
        loaded = super()._load_tokenizers(training_texts)
        for name, tokenizer in loaded.items():
            if mask_token(tokenizer) is None and self.views and self.mask_probability:
                message = f"{name!r} has no token to mask words with"
                raise ConfigError(f"{message}; set data.mask_probability=0 or data.views=0")
        return loaded

    def _encode(self, texts: list[Sentence]) -> None:
        """Encode everything, and set the fingerprints: of all data, without the pool, and for teacher outputs."""
        digest = sentences_digest(texts)
        sentences = digest.hexdigest()
        prints = [tokenizer_fingerprint(self.tokenizer_of(role)) for role in ROLES]
        self._stores: dict[Role, TokenStore] = {}
        for role in ROLES[: 1 + self.has_two_tokenizers]:
            tokenizer = self.tokenizer_of(role)
            self._stores[role] = encode_store(tokenizer, texts, sentences, self.max_length, self.cache_dir)
        self._stores.setdefault("teacher", self._stores["student"])
        self.teacher_key = {
            "sentences": sentences,
            "examples": len(texts),
            "tokens": tokens.VERSION,
            "tokenizer": prints[1],
            "max_length": self.max_length,
            "truncation": self.teacher_tokenizer.truncation_side,
        }
        self.fingerprint = self._name(digest, self.parts, prints)
        kept = [text for name in self._without_pool for text in texts[self._spans[name].start : self._spans[name].stop]]
        digest = sentences_digest(kept)
        self._labelled = self._labelled_name(digest.copy())
        self._fingerprints = {True: self.fingerprint, False: self._name(digest, self._without_pool, prints)}

    def _labelled_name(self, digest: Any) -> str:
        parts = self._without_pool
        content = [self._of(self._labels, parts).tolist(), self.class_names, self._spans_of(parts)]
        digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        found: str = digest.hexdigest()
        return found

    def _name(self, digest: Any, parts: Sequence[str], prints: list[str]) -> str:
        """Return the fingerprint of some splits, from their digest and the tokenizers' fingerprints."""
        content = {
            "labels": self._of(self._labels, parts).tolist(),
            "class_names": self.class_names,
            "spans": self._spans_of(parts),
            "tokenizers": prints,
            "max_length": self.max_length,
            "truncation": [self.tokenizer_of(role).truncation_side for role in ROLES],
            "tokens": tokens.VERSION,
            "pool": self._pool_content() if "views" in parts else {},
        }
        digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        found: str = digest.hexdigest()
        return found

    def _pool_content(self) -> dict[str, Any]:
        """Return the settings of views that the texts of the pool do not determine."""
        content: dict[str, Any] = {} if self.pool_ratio is None else {"pool_ratio": self.pool_ratio}
        if self.views and self.view_sets != 1:
            content |= {
                "version": augment.VERSION, "views": self.views, "sets": self.view_sets, "seed": self.split_seed,
                "mask_probability": self.mask_probability, "ngram_probability": self.ngram_probability,
            }  # fmt: skip
            if any(chance for name, chance in self._chances.items() if name != "crop_share"):
                found = self._changes.substitutes
                words = found.digest if isinstance(found, Neighbours) else self.replace_by
                content |= self._chances | {"substitutes": words}
        return content

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of the teacher's tokens of each example, `(num_examples,)`."""
        return self._stores["teacher"].lengths

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest input in tokens, and how many texts an example has."""
        return {"max_length": self.max_length, "texts": self.texts_per_example}

    def encode(self, texts: Sequence[str] | Sequence[tuple[str, str]], role: Role = "student") -> Batch:
        """Return new texts (or pairs) as one batch, `(B, L)`, without labels."""
        self.prepare()
        sentences = [(text,) if isinstance(text, str) else text for text in texts]
        return encode_batch(self.tokenizer_of(role), sentences, self.max_length)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _training_dataset(self) -> TokenDataset:
        data = self._trained_on(self._dataset("train", "transfer" if self._pool else "train"))
        if self._pool:
            sets = self.view_sets or 1
            views, size = self._spans["views"], self.sizes["views"] // sets
            data.turns = [views[number * size : (number + 1) * size] for number in range(sets)]
            if self._fresh is not None:
                tokenizers = {prefix: self.tokenizer_of(role) for prefix, role in self._readers().items()}
                data.fresh = FreshViews(self._fresh, tokenizers, self.max_length)
        return data

    def _dataset(self, first: str, last: str) -> TokenDataset:
        self.prepare()
        stores = {prefix: self._stores[role] for prefix, role in self._readers().items()}
        return TokenDataset(stores, self._labels, range(self._spans[first].start, self._spans[last].stop))
