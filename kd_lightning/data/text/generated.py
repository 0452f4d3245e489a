"""Sentences that a language model writes, for the teacher to label (He et al. 2022, arXiv 2106.06168)."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from kd_lightning.data.kept_texts import PIECE, KeptTexts
from kd_lightning.data.labels import folded
from kd_lightning.data.options import check_least, check_probabilities
from kd_lightning.data.text.corpus import Corpus, Sentence, is_blank
from kd_lightning.data.text.ends import text_ends
from kd_lightning.data.text.tokens import before_text, load_tokenizer, tokenizer_fingerprint
from kd_lightning.models.causal_lm import CausalLM, causal_lm
from kd_lightning.models.continuation import VERSION, continuations
from kd_lightning.models.fits import text_positions
from kd_lightning.models.rebuild import describe, versions
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.runtime.fingerprints import digest, network_digest
from kd_lightning.runtime.mixing import mixed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

Prompts = Literal["words", "classes"]
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Letters of scripts without spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each is a word."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
GRAM = 5
"""Words of the runs by which a copy is known."""
COPIED = 0.5
"""A text of whose runs more are in the data's own is a copy of them."""


def class_prompt(name: str) -> str:
    """Return what a text begins with whose class a language model is to know.

    >>> class_prompt("positive") + " a gorgeous film"
    'positive: a gorgeous film'
    """
    return f"{name}:"


@dataclass(frozen=True)
class Generated:
    """How many texts a language model writes, and how.

    Attributes:
        texts: So many; fewer remain, without copies and repeats.
        generator: The model: a folder, a GGUF file, or a name on the Hugging Face hub.
        prompts: What it continues: the first token of training texts (`words`), or their classes (`classes`), as
            `class_prompt` writes them.
        temperature: Tokens are drawn from `softmax(logits / temperature)`.
        top_p: They are drawn from the likeliest ones that have so much of the mass together.

    Raises:
        ConfigError: One of them is out of its range.
    """

    texts: int = 0
    generator: str | None = None
    prompts: Prompts = "words"
    temperature: float = 1.0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        check_least(0, generate=self.texts)
        if self.texts and not self.generator:
            raise ConfigError(f"data.generate={self.texts}: set data.generator, the language model that writes them")
        if self.prompts not in get_args(Prompts):
            raise ConfigError(
                f"data.generate_from={self.prompts!r} is unknown{did_you_mean(self.prompts, get_args(Prompts))}"
            )
        check_probabilities(generate_top_p=self.top_p)
        if not (self.temperature > 0 and math.isfinite(self.temperature) and self.top_p):
            raise ConfigError(
                f"data.generate_temperature={self.temperature:g}, data.generate_top_p={self.top_p:g}: expected finite "
                "numbers above 0; texts that are alike teach nothing"
            )

    def write(self, corpus: Corpus, new_tokens: int, seed: int) -> list[Sentence]:
        """Return texts without copies of the data's own, repeats and empty ones; what is drawn is kept.

        A smaller number of texts is the beginning of a larger one.

        Args:
            corpus: The data, whose training texts are begun with, and which no text may copy.
            new_tokens: The most that is written of a text.
            seed: Of the prompts and the draw.

        Raises:
            ConfigError: There is no such language model, or the data are of another kind.
        """
        if not self.texts:
            return []
        if len(corpus.train.texts[0]) > 1:
            raise ConfigError(f"data.generate={self.texts}: examples of two texts cannot be generated; set it to 0")
        if corpus.regression and self.prompts == "classes":
            raise ConfigError("data.generate_from=classes: a regression has no classes; use words")
        tokenizer, model = self._load()
        prompts = self._prompts(corpus, tokenizer, seed)
        _check_room(model, max(map(len, prompts)), new_tokens)
        ends = text_ends(tokenizer, chat=False)
        key = {
            "version": VERSION, "weights": network_digest(model), "network": describe(model),
            "versions": versions(model), "tokenizer": tokenizer_fingerprint(tokenizer), "piece": PIECE,
            "ends": ends, "new_tokens": new_tokens, "seed": seed, "from": self.prompts, "top_p": self.top_p,
            "temperature": self.temperature,
            "training": digest([corpus.train.texts, corpus.train.labels, corpus.class_names]),
        }  # fmt: skip
        kept = KeptTexts(home() / "generated" / digest(key), prompts, key, "generator")

        def draw(chosen: Sequence[Sequence[int]], start: int) -> list[list[int]]:
            model.to("cuda" if torch.cuda.is_available() else "cpu")  # here alone: what is kept needs no GPU
            given = [torch.tensor(prompt) for prompt in chosen]
            of = mixed_seed(seed, start)
            drawn = continuations(model, given, new_tokens, ends, self.temperature, of, self.top_p)
            return [tokens.tolist() for tokens in drawn]

        def decode(tokens: list[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

        kept.complete(draw, decode, PIECE, log.info)
        with_prompt = self.prompts == "words"
        pairs = itertools.islice(kept, self.texts)
        return original((decode([*prompt, *new] if with_prompt else new) for prompt, new in pairs), corpus)

    def _load(self) -> tuple[PreTrainedTokenizerFast, CausalLM]:
        """Return the language model and its tokenizer."""
        name = str(self.generator)
        expected = (
            f"data.generator={name}: expected a language model that predicts the next token, with its tokenizer: a "
            "folder, such as an export of experiment=writer, a GGUF file, or a name on the Hugging Face hub"
        )
        if name.startswith(("wordpiece:", "bpe:")):
            raise ConfigError(expected)
        try:
            tokenizer = load_tokenizer(name)
        except ConfigError as error:
            raise ConfigError(expected) from error
        try:
            return tokenizer, causal_lm(name, len(tokenizer))
        except ConfigError as error:
            raise ConfigError(f"{expected} ({error})") from error

    def _prompts(self, corpus: Corpus, tokenizer: Any, seed: int) -> list[list[int]]:
        """Return what each text begins with: that of a training example, drawn at random; of whole pieces."""
        before = before_text(tokenizer)

        def begin(text: str) -> list[int]:
            return [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]]

        chosen = np.random.default_rng(seed).integers(len(corpus.train), size=-(-self.texts // PIECE) * PIECE)
        if self.prompts == "classes":
            labels = [int(corpus.train.labels[i]) for i in chosen]
            known = {label: begin(class_prompt(corpus.class_names[label])) for label in set(labels)}
            return [known[label] for label in labels]
        return [begin(corpus.train.texts[number][0])[: len(before) + 1] for number in chosen]


def _check_room(model: CausalLM, prompt: int, new_tokens: int) -> None:
    """Refuse texts that are longer than a model has positions for."""
    positions = text_positions(model.network)
    if positions is not None and prompt + new_tokens > positions:
        raise ConfigError(
            f"data.max_length={new_tokens}: data.generator has positions for {positions} tokens, of which a prompt "
            f"has up to {prompt}; lower it, or write with another model"
        )


def original(texts: Iterable[str], corpus: Corpus) -> list[Sentence]:
    """Return the texts that are no copies of the data's own, each once, and log how many were left out."""
    known: set[tuple[str, ...]] = set()
    for part in (corpus.train.texts, corpus.validation.texts, corpus.test.texts, corpus.transfer):
        for sentence in part:
            known.update(_runs(sentence[0]))
    seen: set[str] = set()
    found: list[Sentence] = []
    left = {"empty": 0, "with half a character": 0, "copies of the data's own": 0, "repeats": 0}
    for text in (" ".join(text.split()) for text in texts):
        if is_blank(text):
            left["empty"] += 1
        elif "\ufffd" in text:
            left["with half a character"] += 1
        elif is_copy(text, known):
            left["copies of the data's own"] += 1
        elif (normal := folded(text)) in seen:
            left["repeats"] += 1
        else:
            seen.add(normal)
            found.append((text,))
    out = ", ".join(f"{count} {what}" for what, count in left.items())
    log.info("%d generated texts join the transfer set; left out: %s", len(found), out)
    return found


def is_copy(text: str, known: set[tuple[str, ...]]) -> bool:
    """Return whether more than half of a text's runs of five words are known; a shorter text is a run."""
    runs = list(_runs(text))
    return sum(run in known for run in runs) > COPIED * len(runs)


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    """Yield each run of five words, without case and marks; of a shorter text all of it."""
    words = WORD.findall(folded(text)) or [folded(text)]
    for start in range(max(len(words) - GRAM, 0) + 1):
        yield tuple(words[start : start + GRAM])
