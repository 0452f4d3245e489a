"""Every term's mean over an optimizer step: of uneven batches it is the mean of one batch of all their examples."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kd_lightning import losses
from kd_lightning.losses.adaptive_kl import AdaptiveKLLoss
from kd_lightning.losses.annealing_kd import AnnealingKDLoss
from kd_lightning.losses.attention_transfer import AttentionTransferLoss
from kd_lightning.losses.byot import BYOTLoss
from kd_lightning.losses.cat_kd import CATKDLoss
from kd_lightning.losses.channel_wise import ChannelWiseLoss
from kd_lightning.losses.contrastive import ContrastiveLoss
from kd_lightning.losses.cosine_scores import CosineScoreLoss
from kd_lightning.losses.crd import CRDLoss
from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.cross_tokenizer import CrossTokenizerLoss
from kd_lightning.losses.deep_mutual import DeepMutualLoss
from kd_lightning.losses.dist import DISTLoss
from kd_lightning.losses.distilbert_cosine import DistilBERTCosineLoss
from kd_lightning.losses.dkd import DKDLoss
from kd_lightning.losses.embedding_cosine import EmbeddingCosineLoss
from kd_lightning.losses.embedding_mse import EmbeddingMSELoss
from kd_lightning.losses.factor_transfer import FactorTransferLoss
from kd_lightning.losses.feature_pair import FeaturePairTerm
from kd_lightning.losses.fsp import FSPLoss
from kd_lightning.losses.fused_linear import FusedLinearKDLoss
from kd_lightning.losses.generalized_jsd import GeneralizedJSDLoss
from kd_lightning.losses.hint import HintLoss, LayerHintLoss
from kd_lightning.losses.label_trust import LabelTrustLoss
from kd_lightning.losses.list_labels import ListLabelsLoss
from kd_lightning.losses.listwise_kl import ListwiseKLLoss
from kd_lightning.losses.logit_mse import LogitMSELoss
from kd_lightning.losses.margin_mse import MarginMSELoss
from kd_lightning.losses.margin_mse_scores import MarginMSEScoresLoss
from kd_lightning.losses.mgd import MGDLoss
from kd_lightning.losses.minilm import MiniLMLoss
from kd_lightning.losses.minilmv2 import MiniLMv2Loss
from kd_lightning.losses.mobilebert import MobileBERTAttentionLoss, MobileBERTFeatureMapLoss
from kd_lightning.losses.multi_label import MultiLabelLoss
from kd_lightning.losses.nkd import NKDLoss
from kd_lightning.losses.nst import NSTLoss
from kd_lightning.losses.ofd import OFDLoss
from kd_lightning.losses.pair_labels import PairLabelsLoss
from kd_lightning.losses.pkd import PKDLoss
from kd_lightning.losses.ranknet import RankNetLoss
from kd_lightning.losses.regression import RegressionLoss
from kd_lightning.losses.relations import RelationTerm
from kd_lightning.losses.reverse_kl import ReverseKLLoss
from kd_lightning.losses.review_kd import ReviewKDLoss
from kd_lightning.losses.similarity_kl import SimilarityKLLoss
from kd_lightning.losses.simkd import SimKDLoss
from kd_lightning.losses.skew_kl import SkewKLLoss
from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.span_labels import SpanLabelsLoss
from kd_lightning.losses.span_soft_target import SpanSoftTargetLoss
from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.losses.standardized import StandardizedLoss
from kd_lightning.losses.task_term import TaskTerm
from kd_lightning.losses.teacher_free import TeacherFreeLoss
from kd_lightning.losses.term import Term
from kd_lightning.losses.tinybert_attention import TinyBERTAttentionLoss
from kd_lightning.losses.tinybert_embedding import TinyBERTEmbeddingLoss
from kd_lightning.losses.tinybert_hidden import TinyBERTHiddenLoss
from kd_lightning.losses.total_variation import TotalVariationLoss
from kd_lightning.losses.vid import VIDLoss
from kd_lightning.losses.wsld import WSLDLoss
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.training.objective import Objective
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.losses.conformance import randn

SIZE, LENGTH, CLASSES, WIDTH = 7, 5, 4, 6
STEP = slice(0, 1), slice(1, 5), slice(5, 7)
"""The examples of each batch of a step."""
LENGTHS = torch.tensor([5, 1, 2, 0, 1, 4, 5])  # the fourth is padding alone
PADDING = torch.arange(LENGTH) < LENGTHS.unsqueeze(1)
LABELS = torch.tensor([2, IGNORE, IGNORE, 1, IGNORE, 0, 3])
TOKEN_LABELS = (torch.arange(SIZE * LENGTH).view(SIZE, LENGTH) % CLASSES).masked_fill(~PADDING, IGNORE)
NAN = torch.nan
SCORES = torch.tensor([0.5, NAN, NAN, 1.0, -100.0, NAN, 2.0])
SEVERAL = torch.stack([SCORES, SCORES.nan_to_num(3.0), SCORES], dim=1)

EXAMPLES: Batch = {"labels": LABELS, "index": torch.arange(SIZE)}
TEXTS: Batch = EXAMPLES | {"attention_mask": PADDING.long()}
UNLABELLED: Batch = {"attention_mask": PADDING.long(), "index": torch.arange(SIZE)}
IDS: Batch = UNLABELLED | {"input_ids": torch.zeros(SIZE, LENGTH, dtype=torch.long)}
SOME = TOKEN_LABELS.masked_fill(TOKEN_LABELS == 2, IGNORE)
TOKENS: Batch = {"labels": SOME, "attention_mask": PADDING.long(), "keep": PADDING}
PAIRS: Batch = {
    "group": torch.tensor([0, 1, 1, 2, 2, 3, 3]), "place": torch.tensor([0, 0, 1, 0, 1, 0, 1]),
    "text": torch.arange(SIZE), "score": torch.tensor([NAN, 0.1, 0.1, 0.5, 0.5, 1.0, 1.0]),
}  # fmt: skip
"""A single text and scored pairs; no batch of a step has half of one."""
SPANS: Batch = {
    "labels": torch.tensor([
        [0, 1, 0, 2, 0], [3] + [IGNORE] * 4, [IGNORE] * 5, [IGNORE] * 5, [3] + [IGNORE] * 4, [1, 0, 0, 2, IGNORE],
        [IGNORE] * 5,
    ]),
    "attention_mask": PADDING.long(), "keep": PADDING, "question": torch.tensor([0, 0, 1, 2, 2, 3, 4]),
}  # fmt: skip
LISTS: Batch = {
    "group": torch.tensor([0, 1, 1, 1, 1, 3, 3]), "labels": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0]),
}  # fmt: skip
"""A document alone and two queries; no batch of a step has a part of one."""
TASKS: Batch = {"labels": SCORES, "task": torch.tensor([0, 0, 1, 0, 1, 1, 1])}


def features(seed: int) -> dict[str, Tensor]:
    """What a text or image network gives beside its logits."""

    def of(*shape: int) -> Tensor:
        return randn(SIZE, *shape, seed=seed + len(shape))

    attention = (of(2, LENGTH, LENGTH) + randn(1, seed=seed)).softmax(-1)
    found = {f"hidden[{i}]": of(LENGTH, WIDTH) + i for i in range(3)} | {
        f"attention[{i}]": attention.clone() for i in range(2)
    }
    found |= {f"feature_maps[{i}]": of(WIDTH, 4, 4) * (i + 2) for i in (0, 1, -1, -2)}
    return found | {
        "attention[-1]": attention, "qkv[-1]": of(LENGTH, 3, WIDTH), "embeddings": of(LENGTH, WIDTH),
        "pooled": of(WIDTH), "simkd_projector": of(WIDTH), "cam": of(CLASSES, 4, 4), "peers": of(2, CLASSES),
        "last_hidden": of(LENGTH, WIDTH),
    }  # fmt: skip


def outputs(logits: tuple[int, ...]) -> tuple[ModelOutput, ModelOutput]:
    student = ModelOutput(randn(SIZE, *logits, seed=1), features(3))
    student.features |= {"head": randn(CLASSES, WIDTH, seed=5), "peers": student.features["peers"]}
    teacher = ModelOutput(randn(SIZE, *logits, seed=2), features(30) | {"head": randn(CLASSES, WIDTH, seed=6)})
    return student, teacher


def narrowed(output: ModelOutput) -> ModelOutput:
    return ModelOutput(output.logits.float(), {name: x.float() for name, x in output.features.items()})


def cut(output: ModelOutput, rows: slice) -> ModelOutput:
    return ModelOutput(
        output.logits[rows], {name: x if name == "head" else x[rows] for name, x in output.features.items()}
    )


# not here: DIST's part over the batch, and what compares a batch's relations, which are values of a batch as a whole
ROWS, POSITIONS, SCORE, THREE = (CLASSES,), (LENGTH, CLASSES), (1,), (3,)
OF_LOGITS: list[Callable[..., Term]] = [
    AdaptiveKLLoss, AnnealingKDLoss, lambda: DISTLoss(intra_weight=0.0), DKDLoss, GeneralizedJSDLoss, LabelTrustLoss,
    LogitMSELoss, MultiLabelLoss, NKDLoss, ReverseKLLoss, SkewKLLoss, SoftTargetLoss, lambda: SparseKDLoss(top_k=2),
    TotalVariationLoss, WSLDLoss,
    CrossEntropyLoss, TeacherFreeLoss, lambda: StandardizedLoss(DKDLoss()), lambda: StandardizedLoss(DeepMutualLoss()),
    DeepMutualLoss,
]  # fmt: skip
WITHOUT_LABELS = (AnnealingKDLoss, LogitMSELoss, SoftTargetLoss, ReverseKLLoss, MultiLabelLoss)
OF_TOKENS: list[Callable[..., Term]] = [
    lambda: HintLoss("hidden[2]", "hidden[2]"), LayerHintLoss, lambda: VIDLoss("hidden[2]", "hidden[2]"),
    lambda: MGDLoss("hidden[2]", "hidden[2]", ratio=0.0), DistilBERTCosineLoss, MiniLMLoss,
    lambda: MiniLMv2Loss(relation_heads=2), MobileBERTAttentionLoss, MobileBERTFeatureMapLoss, TinyBERTAttentionLoss,
    TinyBERTEmbeddingLoss, TinyBERTHiddenLoss, lambda: AttentionTransferLoss("hidden"), lambda: NSTLoss("hidden"),
    lambda: ChannelWiseLoss("hidden[2]", "hidden[2]"), BYOTLoss, CRDLoss,
    lambda: FSPLoss(["hidden[1]", "hidden[2]"], ["hidden[1]", "hidden[2]"]),
]  # fmt: skip
OF_EXAMPLES: list[Callable[..., Term]] = [
    HintLoss, VIDLoss, SimKDLoss, CRDLoss, CATKDLoss, OFDLoss, ReviewKDLoss, FactorTransferLoss, AttentionTransferLoss,
    NSTLoss, ChannelWiseLoss, lambda: MGDLoss(ratio=0.0), lambda: BYOTLoss("feature_maps"),
    lambda: FSPLoss(["feature_maps[0]", "feature_maps[1]"], ["feature_maps[0]", "feature_maps[1]"]),
]  # fmt: skip
FIRST = LENGTHS.clamp(min=1)
WITH_FIRST = TEXTS | {"attention_mask": (torch.arange(LENGTH) < FIRST.unsqueeze(1)).long()}
OTHERS: list[tuple[Callable[..., Term], tuple[int, ...], Batch]] = [
    (PKDLoss, ROWS, WITH_FIRST),
    (FusedLinearKDLoss, SCORE, TOKENS),
    (lambda: FusedLinearKDLoss(ce_weight=0.0), SCORE, next_tokens(IDS)),
    (RegressionLoss, SCORE, {"labels": SCORES}),
    *(
        (lambda: RegressionLoss(target="labels"), size, {"labels": labels})
        for size, labels in ((SCORE, SCORES), (SCORE, SCORES.unsqueeze(1)), (THREE, SEVERAL))
    ),
    (EmbeddingMSELoss, ROWS, EXAMPLES),
    (EmbeddingCosineLoss, ROWS, EXAMPLES),
    (CosineScoreLoss, ROWS, PAIRS),
    (PairLabelsLoss, ROWS, PAIRS),
    (SpanLabelsLoss, (LENGTH, 2), SPANS),
    (SpanSoftTargetLoss, (LENGTH, 2), SPANS),
    *((term, SCORE, LISTS) for term in (ListLabelsLoss, ListwiseKLLoss, MarginMSEScoresLoss, RankNetLoss)),
    (lambda: TaskTerm(SoftTargetLoss(), "one", 0, range(0, 2), scores=True), ROWS, TASKS),
    (lambda: TaskTerm(RegressionLoss(target="labels"), "one", 1, range(2, 3), scores=True), ROWS, TASKS),
]  # fmt: skip


def cases() -> Iterator[tuple[Callable[..., Term], tuple[int, ...], Batch]]:
    for term in OF_LOGITS:
        yield term, ROWS, EXAMPLES
        yield term, ROWS, TEXTS
        if term not in (DeepMutualLoss, OF_LOGITS[-2]):
            yield term, POSITIONS, TOKENS
    for term in WITHOUT_LABELS:
        yield term, ROWS, UNLABELLED
        yield term, POSITIONS, UNLABELLED | {"keep": PADDING}
        yield term, POSITIONS, next_tokens(IDS)
        yield term, POSITIONS, next_tokens(IDS | TOKENS)
    for term in OF_TOKENS:
        yield term, ROWS, TEXTS
    for term in OF_EXAMPLES:
        yield term, ROWS, EXAMPLES
    yield from OTHERS


def value_and_gradients(
    objective: Objective, size: tuple[int, ...], batch: Batch, step: tuple[slice, ...]
) -> list[Tensor]:
    """Return the loss and its gradients, averaged over the batches of a step as Lightning does."""
    student, teacher = outputs(size)
    leaves = [student.logits, *student.features.values()]
    for x in leaves:
        x.requires_grad_()
    batches = [{name: x[rows] for name, x in batch.items()} for rows in step]
    mean = torch.stack([objective.counts(one) for one in batches]).mean(0)
    total = torch.zeros((), dtype=torch.float64)
    for one, rows in zip(batches, step, strict=True):
        torch.manual_seed(0)  # CRD's negatives
        total = total + objective(cut(student, rows), cut(teacher, rows), one, 0.2, mean)[0] / len(step)
    return [total.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


@pytest.mark.parametrize(("make", "size", "batch"), list(cases()))
def test_uneven_batches_average_to_the_whole(make: Callable[..., Term], size: tuple[int, ...], batch: Batch) -> None:
    torch.manual_seed(0)
    term = make()
    term.plan(lambda kind: 2, lambda kind: 2)
    objective = Objective({"term": term}, {"term": 1.0})
    objective.connect(*(narrowed(output) for output in outputs(size)), SIZE)
    objective.double().eval()
    whole = value_and_gradients(objective, size, batch, (slice(None),))
    torch.manual_seed(0)
    plain, _ = objective(*outputs(size), batch, 0.2)
    torch.testing.assert_close(whole[0], plain.detach().double())
    assert whole[0] != 0
    for found, expected in zip(value_and_gradients(objective, size, batch, STEP), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_no_term_is_forgotten() -> None:
    modules = [
        importlib.import_module(f"{losses.__name__}.{one.name}") for one in pkgutil.iter_modules(losses.__path__)
    ]
    terms = {
        found for module in modules for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, Term) and not inspect.isabstract(found) and not issubclass(found, RelationTerm)
    }  # fmt: skip
    others = {FeaturePairTerm, CrossTokenizerLoss}  # abstract in all but name; of two texts, in its own tests
    others |= {ContrastiveLoss, MarginMSELoss, SimilarityKLLoss}  # of a batch as a whole
    assert terms - others == {type(make()) for make, _, _ in cases()}


def holed(output: ModelOutput) -> ModelOutput:
    """The output with NaN at padding, of whatever has positions."""

    def of(name: str, x: Tensor) -> Tensor:
        if name == "head" or x.ndim < 3 or x.shape[1] not in (LENGTH, 2) or "map" in name or name == "peers":
            return x
        if name.startswith("attention"):
            return torch.where(PADDING[:, None, :, None] & PADDING[:, None, None, :], x, torch.nan)
        return torch.where(PADDING.view(SIZE, LENGTH, *[1] * (x.ndim - 2)), x, torch.nan)

    return ModelOutput(of("logits", output.logits), {name: of(name, x) for name, x in output.features.items()})


@pytest.mark.parametrize(
    ("make", "size", "batch"), [case for case in cases() if "attention_mask" in case[2] and case[0] is not PKDLoss]
)
def test_nan_at_padding_reaches_neither_value_nor_gradient(
    make: Callable[..., Term], size: tuple[int, ...], batch: Batch
) -> None:
    torch.manual_seed(0)
    term = make()
    term.plan(lambda kind: 2, lambda kind: 2)
    objective = Objective({"term": term}, {"term": 1.0})
    objective.connect(*(narrowed(output) for output in outputs(size)), SIZE)
    objective.double().eval()
    found = []
    for student, teacher in (outputs(size), map(holed, outputs(size))):
        leaves = [x.requires_grad_() for x in (student.logits, *student.features.values())]
        torch.manual_seed(0)
        value, _ = objective(student, teacher, batch, 0.2)
        found.append([value, *torch.autograd.grad(value, [*leaves, *term.parameters()], materialize_grads=True)])
    for again, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(again, expected)
