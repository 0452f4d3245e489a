"""What is predicted: its labels, its loss from labels, its scores, and how a prediction is read.

>>> import kd_lightning as kd
>>> kd.tasks.Classification(3).scores().names
['accuracy', 'macro_f1', 'ece', 'cross_entropy']
"""

from kd_lightning.tasks.base import Task
from kd_lightning.tasks.causal_lm import CausalLanguageModeling
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.masked_lm import MaskedLanguageModeling
from kd_lightning.tasks.multi_task import MultiTask, task_of
from kd_lightning.tasks.question_answering import QuestionAnswering
from kd_lightning.tasks.ranking import Ranking
from kd_lightning.tasks.regression import Regression
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.tasks.sentence_embedding import SentenceEmbedding
from kd_lightning.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLanguageModeling",
    "Classification",
    "MaskedLanguageModeling",
    "MultiTask",
    "QuestionAnswering",
    "Ranking",
    "Regression",
    "ScoreSpec",
    "Scores",
    "SentenceEmbedding",
    "Task",
    "TokenClassification",
    "task_of",
]
