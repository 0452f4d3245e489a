"""What each component that a fingerprint names by its VERSION makes of small inputs, as recorded in versions.json.

python -m tests.versions     record what they make now; refused where that has changed and VERSION has not
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.data.corpus import alignment, chat, masking
from kd_lightning.data.corpus import store as corpus
from kd_lightning.data.corpus.blocks import Packing, cut
from kd_lightning.data.corpus.conversations import Conversation
from kd_lightning.data.image import store
from kd_lightning.data.image import views as images
from kd_lightning.data.text import augment, lists, negatives, question_windows, ranking, tokens, words
from kd_lightning.data.text import embedding as pairs
from kd_lightning.data.text.grouped import GroupDataset
from kd_lightning.data.text.groups import TextGroup
from kd_lightning.data.text.questions import Answer, Question
from kd_lightning.data.text.substitutes import ClassWords, Neighbours
from kd_lightning.data.text.tagged import Place, TaggedText, split_words
from kd_lightning.models import (
    bi_encoder,
    bilstm,
    causal_lm,
    cnn,
    continuation,
    embedding,
    hf,
    masked_lm,
    sentence_encoder,
    simkd,
    static_embedding,
    text_cnn,
)
from kd_lightning.models.adapt import run_network
from kd_lightning.teachers import frozen, sampled
from kd_lightning.teachers.cache import manifest
from kd_lightning.teachers.cache.outputs import Storage, decode, encode, specs_of
from kd_lightning.types import NEXT_LOG_PROB, ModelOutput
from tests.models.tiny import batch as a_batch
from tests.models.tiny import tiny

FILE = Path(__file__).with_name("versions.json")
TEXTS = ["A fine film, if long", "dull and loud", "这部电影 is fine", "", "not a film"]
BATCH = {name: value for name, value in a_batch().items() if name != "labels"}


@dataclass(frozen=True)
class Component:
    """A component.

    Attributes:
        version: Its VERSION.
        file: Where that stands.
        make: Returns what it makes, as plain values.
        tolerance: How far numbers may differ from one machine to the next.
    """

    version: int
    file: str
    make: Callable[[], Any]
    tolerance: float = 0.0


def filled(network: nn.Module) -> nn.Module:
    """Return a network in eval mode whose weights are no random numbers."""
    with torch.no_grad():
        for number, weight in enumerate(network.parameters()):
            weight.copy_((torch.arange(weight.numel()).double() ** 2 * 0.618 + number).sin().view_as(weight) / 2)
    return network.eval()


def plain(output: ModelOutput) -> dict[str, Any]:
    """Return an output as lists."""
    return {"logits": output.logits.tolist(), **{name: value.tolist() for name, value in output.features.items()}}


def make_tokens() -> Any:
    """Return texts and pairs in a WordPiece vocabulary learned from them, cut, with a mask."""
    tokenizer = tokens.load_tokenizer("wordpiece:60", TEXTS)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for sentences in ([(text,) for text in TEXTS], [(text, f"{augment.MASK} so loud") for text in TEXTS]):
            stored = tokens.encode_store(tokenizer, sentences, "", 7, Path(folder))
            types = None if stored.types is None else stored.types.tolist()
            found.append([stored.tokens.tolist(), stored.offsets.tolist(), types])
    return [sorted(tokenizer.get_vocab()), found]


def make_words() -> Any:
    """Return tagged texts as windows of tokens, and which words count in which."""
    tokenizer = tokens.load_tokenizer("wordpiece:60", TEXTS)
    texts = [TaggedText(text, split_words(text), None, Place("made", i)) for i, text in enumerate(TEXTS) if text]
    windows = words.encode_words(tokenizer, texts, 6, 2)
    return [getattr(windows, name).tolist() for name in ("tokens", "offsets", "words", "texts")]


def make_question_windows() -> Any:
    """Return questions about a text as windows of tokens, and their labels."""
    tokenizer = tokens.load_tokenizer("wordpiece:60", TEXTS)
    given = [Question("a", "A film?", TEXTS[0], (Answer("fine", 2),), ""), Question("b", "not", TEXTS[2], (), "")]
    windows = question_windows.encode_questions(tokenizer, [(one.text, one.context) for one in given], 16, 7, 3)
    found = [getattr(windows, name).tolist() for name in ("tokens", "chars", "offsets", "questions", "keep")]
    return [*found, question_windows.span_labels_of(windows, given).tolist()]


def make_corpus() -> Any:
    """Return documents encoded, each with an end, how many bytes each token stands for, and the blocks they fill."""
    tokenizer = tokens.load_tokenizer("wordpiece:60", TEXTS)
    with tempfile.TemporaryDirectory() as folder:
        source = corpus.Source("", lambda: iter(TEXTS))
        stored = corpus.encode_corpus(
            corpus.TextEncoder(tokenizer, tokenizer.sep_token_id), {"train": source}, Path(folder)
        )
        found: list[Any] = [getattr(stored, name).tolist() for name in ("tokens", "widths", "offsets", "hashes")]
        for packing in get_args(Packing):
            blocks, _ = cut(stored, {"train": np.array([0, 2, 1, 4])}, 6, packing, int(tokenizer.pad_token_id))
            batch = blocks.batch(np.arange(len(blocks)))
            batch.pop("of_document", None)  # for the errors of scores alone: nothing that is kept depends on it
            found.append({name: entry.tolist() for name, entry in batch.items()})
        return found


def make_aligned() -> Any:
    """Return what a teacher with other tokens and one before each text reads of blocks, and the spans of both."""
    own = tokens.load_tokenizer("wordpiece:60", TEXTS)
    found: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        source = corpus.Source("", lambda: iter(TEXTS))
        student, teacher = (
            corpus.encode_corpus(corpus.TextEncoder(tokenizer, tokenizer.sep_token_id), {"train": source}, Path(folder))
            for tokenizer in (own, tokens.load_tokenizer("wordpiece:75", TEXTS[:3]))
        )
        none = np.zeros(0, np.int64)
        for packing in get_args(Packing):
            blocks, _ = cut(student, {"train": np.array([0, 2, 1, 4])}, 6, packing, 0)
            reading = alignment.TeacherReading(blocks, teacher, np.array([2]), True, 0, (none, none))
            batch, spans = reading.batch(np.arange(len(blocks)))
            found.append({name: entry.tolist() for name, entry in (*batch.items(), ("spans", spans))})
    return found


def make_masks() -> Any:
    """Return masked blocks of documents of which one is cut, by two masks, and one that begins with another."""
    lengths, ids = np.array([25, 7, 8]), np.arange(5, 45, dtype=np.uint16)
    offsets, hashes = np.append(0, lengths.cumsum()), np.array([3, 2**63, 7], np.uint64)
    documents = corpus.CorpusStore(Path(), ids, np.ones(40, np.uint16), offsets, hashes, {"train": 3}, None, "")
    masks, found = masking.Masking(0.3, 4, np.arange(5), 50, 0), []
    for packing, numbers in (("none", [0, 1, 2, 3]), ("concat", [1, 2])):
        blocks, counts = cut(documents, {"train": np.array([2, 0, 1])}, 16, packing, 0)  # type: ignore[arg-type]
        masked = masking.MaskedBlocks(blocks, masks, [1], [2], counts[0], 2)
        batches = [masked.batch(np.array(numbers), np.full(len(numbers), turn)) for turn in (0, 1)]
        found.append([{name: entry.tolist() for name, entry in batch.items()} for batch in batches])
    return found


def make_chat() -> Any:
    """Return conversations by a template with marks and one without, whole and cut: tokens, bytes, what counts."""
    tokenizer = tokens.load_tokenizer("wordpiece:60", [*TEXTS, "user assistant :"])
    names = ("user", "assistant", "user", "assistant")
    contents = (TEXTS[i] for i in (0, 1, 2, 4))
    messages = [{"role": role, "content": text} for role, text in zip(names, contents, strict=True)]
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + ' [SEP] ' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.eos_token = "[SEP]"  # type: ignore[assignment]
    ways = ((plain, "all", 99), (plain, "last", 99), (chat.PLAIN, "all", 99), (plain, "all", 20))
    return [
        [None if entry is None else entry.tolist() for entry in encoded]
        for template, turns, size in ways
        for encoded in chat.ChatEncoder(tokenizer, template, turns, size)([Conversation.of(messages, "here")])  # type: ignore[arg-type]
    ]


def make_views() -> Any:
    """Return views of texts by the settings of several data sets."""
    table = Neighbours({"fine": ["good", "great"], "film": ["movie"], "dull": ["flat"]})
    words = ClassWords([(text,) for text in TEXTS[:3]], [0, 0, 0])
    changes = [
        augment.UNCHANGED,
        augment.Changes(replace_probability=0.5, drop_probability=0.2, substitutes=table),
        augment.Changes(replace_probability=0.5, swap_probability=0.4, crop_probability=0.5, substitutes=words),
    ]
    found = []
    for seed, change in enumerate(changes):
        views = augment.Views([(text,) for text in TEXTS[:3]], 2, seed, 0.2, 0.3, change)
        found.append([views.make(number)[0].replace(augment.MASK, "[MASK]") for number in range(2 * views.per_set)])
    return found


def make_pixels() -> Any:
    """Return an image file in two sizes and colours, as bytes and as a network's numbers."""
    from PIL import Image

    image = (np.arange(9 * 7 * 3) * 37 % 256).astype(np.uint8).reshape(9, 7, 3)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(path := Path(folder, "image.png"))
        for size, channels in ((4, 3), (5, 1)):
            pixels = store.read_image(path, size, channels).copy()
            format = store.ImageFormat(size, channels, [0.4] * channels, [0.2] * channels)
            found.append([pixels.tolist(), format.normalise(pixels[None]).tolist()])
    return found


def make_image_views() -> Any:
    """Return views of two images: moved, mirrored, mixed."""
    pixels = (np.arange(2 * 16) * 29 % 256).astype(np.uint8).reshape(2, 1, 4, 4)
    mixing = images.Mixing(0.4, 0.4, 0.7)
    made = [images.ImageViews(2, 3, seed, 2, 0.5, mix) for seed, mix in enumerate((images.Mixing(), mixing))]
    return [[views.make(number, lambda i: pixels[i]).tolist() for number in range(8)] for views in made]


def make_halves() -> Any:
    """Return what teachers output in a CPU's precisions below float32."""
    network = filled(tiny("bert", layers=2))
    return [plain(frozen.FrozenTeacher(network, precision)(BATCH)) for precision in ("bf16", "int8-dynamic")]


def make_outputs() -> Any:
    """Return what a teacher outputs, with and without features, and of its own tokens."""
    network = filled(tiny("bert", layers=2))
    found = {"logits": plain(frozen.FrozenTeacher(network)(BATCH))}
    features = ["hidden[-1]", "attention[0]", "embeddings", "pooled"]
    found["features"] = plain(frozen.FrozenTeacher(network, features=features)(BATCH))
    own = {f"teacher_{name}": value.flip(1) for name, value in BATCH.items()}
    return {**found, "own tokens": plain(frozen.FrozenTeacher(network)({**BATCH, **own}))}


def make_next() -> Any:
    """Return the feature of how likely each next token was."""
    network = filled(causal_lm.causal_lm_small(30, 16, 8, 1, 2))
    return plain(frozen.FrozenTeacher(network, features=[NEXT_LOG_PROB])(BATCH))


def make_stored() -> Any:
    """Return what is stored of outputs in every way, and what is read back."""
    logits, mask = torch.tensor([[1.0, -2.0, 0.3, 4.1], [0.1, 0.2, -7.0, 0.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    hidden = torch.arange(12.0).sin().view(2, 3, 2)
    found = []
    for storage in (Storage(), Storage("float16", 2), Storage("bfloat16")):
        for spec in specs_of(ModelOutput(logits, {"hidden": hidden}), mask, storage):
            value = logits if spec.name == "logits" else hidden
            parts = encode(spec, value, mask.bool(), torch.arange(2))
            back: Any = decode(spec, parts) if spec.name == "logits" else None
            stored = {name: part.tolist() for name, part in parts.items()}
            found.append([spec.to_json(), stored, None if back is None else back.tolist()])
    return found


def make_drawn() -> Any:
    """Return which tokens are drawn, with what is kept of them."""
    logits = (torch.arange(2 * 4 * 20) * 0.7).sin().view(2, 4, 20) * 3
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = sampled.drawn(logits, 5, sampled.starts_of(ids, mask))
    return [found.ids.tolist(), found.values.tolist(), found.rest.tolist()]


def make_continuations() -> Any:
    """Return how a language model goes on with texts, by its likeliest tokens and by draws."""
    model, texts = causal_lm.causal_lm_small(30, 16, 8, 1, 2), [torch.tensor([3, 4, 5]), torch.tensor([7])]
    filled(model)
    return [
        [new.tolist() for new in continuation.continuations(model, texts, 6, [29], temperature, seed=1)]
        for temperature in (0.0, 1.0)
    ]


def of_network(network: Callable[[], nn.Module], **inputs: Tensor) -> Callable[[], Any]:
    """Return what makes a network's output for inputs."""
    return lambda: run_network(filled(network()), inputs or BATCH).logits.tolist()


def _around_bert() -> nn.Module:
    network = tiny("bert", layers=1)
    network.set_input_embeddings(embedding.FactorizedEmbedding(30, 3, 8))
    return network


def _pooled(pooling: hf.Pooling) -> nn.Module:
    encoder: Any = tiny("bert").bert
    return hf.PooledClassifier(encoder, 3, pooling)


DOCUMENTS = {
    "input_ids": BATCH["input_ids"],
    "document_ids": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, -1, -1]]),
    "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]),
}
PIXELS = {"pixel_values": (torch.arange(2 * 3 * 64) * 0.37).sin().view(2, 3, 8, 8)}


def make_pairs() -> Any:
    """Return the columns of a pair, a triplet and a text alone, and batches of their groups and of their texts."""
    groups = [TextGroup(("a b", "c"), 0.5), TextGroup(("d", "a b", "e f g")), TextGroup(("h",))]
    columns = pairs.TextColumns(groups)
    columns.score = np.nan_to_num(columns.score, nan=-1.0)
    with tempfile.TemporaryDirectory() as folder:
        texts = [(text,) for group in groups for text in group.texts]
        tokenizer = tokens.load_tokenizer("wordpiece:40", [text for (text,) in texts])
        store = tokens.encode_store(tokenizer, texts, "0", 8, Path(folder))
        found = []
        for grouped in (True, False):
            data = GroupDataset({"": store}, columns, range(len(texts)), grouped)
            positions, lengths = data.turn(0)
            batch = {name: value.tolist() for name, value in data[positions].items() if name != "labels"}
            found.append([positions.tolist(), lengths.tolist(), batch])
    return found


RANKED = [
    lists.RankedList("a b", ("c", "d e"), (0, 2)), lists.RankedList("c", ("f", "g", "d e"), (1, 0, 0.5)),
]  # fmt: skip


def make_rankings() -> Any:
    """Return the columns of two queries, and batches of whole ones."""
    rows = [(one.query, document) for one in RANKED for document in one.documents]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokens.load_tokenizer("wordpiece:40", [text for row in rows for text in row])
        store = tokens.encode_store(tokenizer, rows, "0", 8, Path(folder))
        data = GroupDataset({"": store}, ranking.GradeColumns(RANKED), range(len(rows)), grouped=True)
        positions, lengths = data.turn(0)
        return [positions.tolist(), lengths.tolist(), {name: value.tolist() for name, value in data[positions].items()}]


def make_negatives() -> Any:
    """Return the embeddings by which documents are found, and queries with those that are found."""

    class Fixed(negatives.Encoder):
        def nearest(self, queries: Any, documents: Any, count: int) -> Any:
            return np.arange(count)[None].repeat(len(queries), 0)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokens.load_tokenizer("wordpiece:30", TEXTS[:2])
        bert: Any = filled(tiny("bert").bert)
        bert.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        bert.save_pretrained(folder)
        tokens.write_tokenizer(tokenizer, Path(folder))
        encoder = Fixed(folder, 8)
        found = negatives.with_negatives(RANKED, 2, encoder)
        return [encoder.embed(TEXTS[:2]).tolist(), [[one.documents, one.grades] for one in found]]


COMPONENTS = {
    "tokens": Component(tokens.VERSION, "data/text/tokens.py", make_tokens),
    "words": Component(words.VERSION, "data/text/words.py", make_words),
    "question windows": Component(question_windows.VERSION, "data/text/question_windows.py", make_question_windows),
    "chat": Component(chat.VERSION, "data/corpus/chat.py", make_chat),
    "corpus": Component(corpus.VERSION, "data/corpus/store.py", make_corpus),
    "aligned blocks": Component(alignment.VERSION, "data/corpus/alignment.py", make_aligned),
    "next log probabilities": Component(frozen.VERSION, "teachers/frozen.py", make_next, 1e-4),
    "masks": Component(masking.VERSION, "data/corpus/masking.py", make_masks),
    "views": Component(augment.VERSION, "data/text/augment.py", make_views),
    "pixels": Component(store.VERSION, "data/image/store.py", make_pixels, 1e-6),
    "image views": Component(images.VERSION, "data/image/views.py", make_image_views),
    "teacher outputs": Component(frozen.VERSION, "teachers/frozen.py", make_outputs, 1e-4),
    "teacher precisions": Component(frozen.VERSION, "teachers/frozen.py", make_halves, 0.03),
    "stored outputs": Component(manifest.FORMAT, "teachers/cache/manifest.py (FORMAT)", make_stored, 1e-6),
    "drawn tokens": Component(sampled.VERSION, "teachers/sampled.py", make_drawn, 1e-4),
    "continuations": Component(continuation.VERSION, "models/continuation.py", make_continuations),
    "BiLSTM": Component(
        bilstm.BiLSTM.VERSION, "models/bilstm.py", of_network(lambda: bilstm.BiLSTM(3, 30, 4, 5, 2)), 1e-4
    ),
    "TextCNN": Component(
        text_cnn.TextCNN.VERSION,
        "models/text_cnn.py",
        of_network(lambda: text_cnn.TextCNN(3, 30, kernel_sizes=[1, 2])),
        1e-4,
    ),
    "CNN": Component(cnn.CNN.VERSION, "models/cnn.py", of_network(lambda: cnn.CNN(3, 3, [4, 6]), **PIXELS), 1e-4),
    "ResNet": Component(
        cnn.ResNet.VERSION, "models/cnn.py", of_network(lambda: cnn.ResNet(3, 3, 8, 0.25), **PIXELS), 1e-4
    ),
    "CausalLM": Component(
        causal_lm.CausalLM.VERSION,
        "models/causal_lm.py",
        of_network(lambda: causal_lm.causal_lm_small(30, 8, 8, 1, 2), **DOCUMENTS),
        1e-4,
    ),
    "MaskedLM": Component(
        masked_lm.MaskedLM.VERSION,
        "models/masked_lm.py",
        of_network(lambda: masked_lm.masked_lm_small(30, 8, 0, 8, 1), **BATCH, masked_places=torch.tensor([[1], [2]])),
        1e-4,
    ),
    "PooledClassifier": Component(
        hf.PooledClassifier.VERSION,
        "models/hf.py",
        lambda: [of_network(partial(_pooled, pooling))() for pooling in get_args(hf.Pooling)],
        1e-4,
    ),
    "SentenceEncoder": Component(
        sentence_encoder.SentenceEncoder.VERSION,
        "models/sentence_encoder.py",
        of_network(lambda: sentence_encoder.SentenceEncoder(tiny("bert").bert, 5)),
        1e-4,
    ),
    "StaticEmbedding": Component(
        static_embedding.StaticEmbedding.VERSION,
        "models/static_embedding.py",
        of_network(lambda: static_embedding.StaticEmbedding(4, 30, 1, [2, 3])),
        1e-4,
    ),
    "pairs": Component(pairs.VERSION, "data/text/embedding.py", make_pairs),
    "rankings": Component(ranking.VERSION, "data/text/ranking.py", make_rankings),
    "hard negatives": Component(negatives.VERSION, "data/text/negatives.py", make_negatives, 1e-4),
    "BiEncoder": Component(
        bi_encoder.BiEncoder.VERSION,
        "models/bi_encoder.py",
        of_network(
            lambda: bi_encoder.BiEncoder(static_embedding.StaticEmbedding(4, 30, 1, [2]), 1),
            **BATCH | {"token_type_ids": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]])},
        ),
        1e-4,
    ),
    "SimKDStudent": Component(
        simkd.SimKDStudent.VERSION,
        "models/simkd.py",
        of_network(lambda: simkd.SimKDStudent(bilstm.BiLSTM(3, 30, 4, 5, 1), 6, 3, 7)),
        1e-4,
    ),
    "FactorizedEmbedding": Component(
        embedding.FactorizedEmbedding.VERSION, "models/embedding.py", of_network(_around_bert), 1e-4
    ),
}


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two nested values are the same, numbers up to a tolerance."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key], tolerance) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected, [tolerance] * len(found)))
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return bool(found == expected)


def rounded(value: Any) -> Any:
    """Return nested values with short numbers."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def problem(component: Component, recorded: dict[str, Any] | None) -> str | None:
    """Return what is to be done where a component makes something else than was recorded, or has another version."""
    if recorded is None or component.version != recorded["version"]:
        return f"{component.file} has a new VERSION: record what it makes now (python -m tests.versions)"
    if not same(rounded(component.make()), recorded["makes"], component.tolerance):
        return (
            f"{component.file} makes something else than before, and what users keep would be taken for it: raise "
            "VERSION there and record (python -m tests.versions); a new version of torch or tokenizers may do it too"
        )
    return None


def main() -> None:
    """Write versions.json."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, component in COMPONENTS.items():
        recorded = known.get(name)
        if recorded and recorded["version"] == component.version and (wrong := problem(component, recorded)):
            sys.exit(wrong)
    made = {name: {"version": one.version, "makes": rounded(one.make())} for name, one in COMPONENTS.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(one, ensure_ascii=False)}" for name, one in made.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
