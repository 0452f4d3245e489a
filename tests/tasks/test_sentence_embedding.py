from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import SentenceEmbedding, task_of
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.tasks.retrieval import AT_ONCE, PairScores, TeacherScores, judged, ranking_scores, search
from kd_lightning.tasks.scores import Scores
from kd_lightning.types import Batch, ModelOutput

NAN = math.nan


def rows(groups: list[list[int]], score: list[float] | None = None) -> Batch:
    """Groups of texts by their numbers, as a split has them."""
    group = torch.tensor([number for number, texts in enumerate(groups) for _ in texts])
    place = torch.tensor([place for texts in groups for place in range(len(texts))])
    text = torch.tensor([one for texts in groups for one in texts])
    scores = torch.tensor(score or [NAN] * len(groups))[group]
    none = torch.full((len(text),), NAN)
    return {"index": torch.arange(len(text)), "group": group, "place": place, "text": text, "score": scores,
            "labels": none, "input_ids": torch.zeros(len(text), 3, dtype=torch.long)}  # fmt: skip


def scored(scores: PairScores, embeddings: Tensor, batch: Batch, order: list[list[int]]) -> dict[str, float]:
    """Scores of a split that comes in these batches."""
    for part in order:
        scores.update(embeddings[part], batch["labels"][part], {name: value[part] for name, value in batch.items()})
    return {name: float(value) for name, value in scores.compute().items()}


def test_ranks_by_hand() -> None:
    """Ranks 1, 3 and none of the ten: nDCG 1, 1/2 and 0; one of two relevant documents at rank 2."""
    found = torch.tensor([[4, 1, 2, 3], [0, 1, 4, 2], [0, 1, 2, 3], [0, 1, 2, 4]])
    relevant = torch.tensor([[0, 4], [1, 4], [2, 5], [3, 1], [3, 5]])
    scores = ranking_scores(found, relevant, 6)
    gain = 1 / math.log2(3)
    assert scores["ndcg@10"].tolist() == pytest.approx([1, 0.5, 0, gain / (1 + gain)])
    assert scores["mrr@10"].tolist() == pytest.approx([1, 1 / 3, 0, 1 / 2])
    assert scores["recall@1"].tolist() == [1, 0, 0, 0]
    assert scores["recall@10"].tolist() == [1, 1, 0, 0.5]


def test_relevance_follows_from_texts() -> None:
    """Two groups with one query share their positives; a triplet's negative is a document, a plain text neither."""
    batch = rows([[10, 11], [10, 12], [13, 14, 15], [16], [11, 10]])
    task = judged(batch["group"], batch["place"], batch["text"])
    texts = batch["text"]
    assert texts[task.queries].tolist() == [10, 11, 13]
    assert texts[task.documents].tolist() == [10, 11, 12, 14, 15]
    assert task.relevant.tolist() == [[0, 1], [0, 2], [1, 0], [2, 3]]
    assert task.same.tolist() == [0, 1, -1]  # 10 and 11 are documents, too, which they do not find


def test_search_in_pieces_is_search(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(7, 4, generator=generator), torch.randn(9, 4, generator=generator)
    never = torch.tensor([-1, 0, 1, 2, -1, 3, 4])
    whole = search(queries, documents, 5, never)
    assert queries.numel() * documents.numel() <= AT_ONCE
    monkeypatch.setattr("kd_lightning.tasks.retrieval.AT_ONCE", 20)
    assert torch.equal(search(queries, documents, 5, never), whole)
    near = (queries @ documents.T).argsort(1, descending=True)
    for row, own, expected in zip(whole.tolist(), never.tolist(), near.tolist(), strict=True):
        assert row == [one for one in expected if one != own][:5]
    assert search(queries[:0], documents, 5).shape == (0, 5)


def test_scores_do_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    batch = rows([[2 * i, 2 * i + 1] for i in range(20)])
    embeddings = torch.randn(40, 8, generator=generator)
    one = scored(PairScores(False, [4]), embeddings, batch, [list(range(40))])
    shuffled = torch.randperm(40, generator=generator).tolist()
    other = scored(PairScores(False, [4]), embeddings, batch, [shuffled[:7], shuffled[7:30], shuffled[30:]])
    assert one == other
    assert set(one) == {"ndcg@10", "mrr@10", "recall@1", "recall@10", "ndcg@10/4"}
    cut = scored(PairScores(False), embeddings[:, :4], batch, [list(range(40))])
    assert one["ndcg@10/4"] == cut["ndcg@10"] != one["ndcg@10"]


def test_perfect_and_damaged_embeddings() -> None:
    batch = rows([[2 * i, 2 * i + 1] for i in range(6)])
    embeddings = torch.eye(6).repeat_interleave(2, dim=0) * 3
    assert set(scored(PairScores(False), embeddings, batch, [list(range(12))]).values()) == {1.0}
    embeddings[3, 2] = NAN
    assert all(map(math.isnan, scored(PairScores(False), embeddings, batch, [list(range(12))]).values()))


def test_scored_pairs_are_ranked_as_scipy_ranks_them() -> None:
    generator = torch.Generator().manual_seed(2)
    given = torch.rand(12, generator=generator).tolist()
    batch = rows([[2 * i, 2 * i + 1] for i in range(12)], given)
    embeddings = torch.randn(24, 5, generator=generator)
    found = scored(PairScores(True, [3]), embeddings, batch, [list(range(24))])
    cosines = F.cosine_similarity(embeddings[::2], embeddings[1::2])
    assert found["spearman"] == pytest.approx(spearmanr(cosines, given).statistic, abs=1e-6)
    cosines = F.cosine_similarity(embeddings[::2, :3], embeddings[1::2, :3])
    assert found["spearman/3"] == pytest.approx(spearmanr(cosines, given).statistic, abs=1e-6)


def test_nearness_to_a_teacher_of_any_width() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(30, 6, generator=generator)
    turned = teacher @ torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    batch = {"index": torch.arange(30)}

    def nearness(student: Tensor) -> dict[str, float]:
        scores = TeacherScores()
        for part in (slice(0, 11), slice(11, 30)):
            scores.update(student[part], teacher[part], {"index": batch["index"][part]})
        return {name: float(value) for name, value in scores.compute().items()}

    assert nearness(2 * teacher) == pytest.approx({"cosine_to_teacher": 1.0, "spearman_to_teacher": 1.0})
    assert nearness(turned)["spearman_to_teacher"] == pytest.approx(1.0)
    assert abs(nearness(turned)["cosine_to_teacher"]) < 0.9
    narrow = nearness(teacher[:, :3])
    assert set(narrow) == {"spearman_to_teacher"}
    upper = torch.triu_indices(30, 30, 1)
    own, theirs = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in (teacher[:, :3], teacher))
    expected = spearmanr(own[upper[0], upper[1]], theirs[upper[0], upper[1]]).statistic
    assert narrow["spearman_to_teacher"] == pytest.approx(expected, abs=1e-5)


def test_texts_are_drawn_from_queries_and_documents_alike() -> None:
    """Queries and documents alternate; the student has the teacher's embeddings of the queries alone."""
    generator = torch.Generator().manual_seed(4)
    for count in (1_600, 2_400):
        teacher, noise = (torch.randn(count, 8, generator=generator) for _ in range(2))
        student = torch.where(torch.arange(count)[:, None] % 2 == 0, teacher, noise)
        scores = TeacherScores()
        scores.update(student, teacher, {"index": torch.arange(count)})
        assert 0.2 < scores.compute()["spearman_to_teacher"] < 0.35  # a quarter of the pairs are of two queries


@pytest.mark.parametrize("scores", [PairScores(False, [4]), PairScores(True), TeacherScores()])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_texts_there_are_no_scores(scores: Scores) -> None:
    found = scores.compute()
    assert set(found) == set(scores.names)
    assert all(value.isnan() for value in found.values())


class Table(nn.Module):
    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def __call__(self, batch: Batch) -> ModelOutput:
        return ModelOutput(self.vectors[batch["index"]])


def test_an_evaluation_has_each_querys_scores() -> None:
    batch = rows([[2 * i, 2 * i + 1] for i in range(6)])
    vectors = torch.eye(6).repeat_interleave(2, dim=0)
    vectors[11] = vectors[1]
    models = {"teacher": Table(torch.eye(6).repeat_interleave(2, dim=0)), "student": Table(vectors)}
    batches = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 5), slice(5, 12))]
    found = evaluate_all(SentenceEmbedding(6), models, batches, reference="teacher")
    assert found["student"].examples == 12
    units = found["student"].units["ndcg@10"]
    assert units.totals.mean() == pytest.approx(found["student"].scores["ndcg@10"])
    assert (units.totals < 1).sum() >= 1
    assert found["teacher"].scores["cosine_to_teacher"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "task", [SentenceEmbedding(8), SentenceEmbedding(8, True, [4, 2]), SentenceEmbedding(384, widths=[64])]
)
def test_a_description_makes_the_task_again(task: SentenceEmbedding) -> None:
    again = task_of(task.description)
    assert isinstance(again, SentenceEmbedding)
    assert again.settings == task.settings
    assert list(again.specs) == list(task.specs)
    assert task.monitor in task.scores().names
    assert set(task.scores().names) | set(task.fidelity().names) == set(task.specs)


def test_embeddings_are_read_with_length_1() -> None:
    (record,) = SentenceEmbedding(2).read(torch.tensor([[3.0, 4.0]]), {}, [])
    assert record["embedding"] == pytest.approx([0.6, 0.8])
    assert SentenceEmbedding(2).cells(record) == {"embedding": "+0.600 +0.800 ... (2 numbers)"}
    with pytest.raises(KDError, match="predicts NaN"):
        SentenceEmbedding(2).read(torch.tensor([[NAN, 1.0]]), {}, [])


def test_what_is_no_embedding() -> None:
    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.long)}
    with pytest.raises(ConfigError, match=re.escape("it outputs [3, 4, 5] for 3 texts")):
        SentenceEmbedding(5).check_logits(torch.zeros(3, 4, 5), batch)
    with pytest.raises(ConfigError, match=r"data\.widths: 8 is not between 0 and the embedding's own width, 8"):
        SentenceEmbedding(8, widths=[8])


def test_single_texts_teach_nothing_without_a_teacher() -> None:
    with pytest.raises(ConfigError, match=re.escape("set stages=[distill]")):
        SentenceEmbedding(8, pairs=False).terms()


def test_parts_of_a_split_do_not_add_up() -> None:
    assert not PairScores(False).divides
    with pytest.raises(TypeError, match="do not add up"):
        PairScores(False).states()
