"""Data modules for sentences and images.

>>> import kd_lightning as kd
>>> data = kd.data.TextFiles("my.csv", tokenizer="wordpiece:400", batch_size=16)  # loaded when training starts
"""

from kd_lightning.data.classification import ClassificationData
from kd_lightning.data.corpus.datamodule import CorpusData
from kd_lightning.data.datamodule import IndexedData, selected
from kd_lightning.data.image.datamodule import ImageCorpus, ImageData
from kd_lightning.data.multi_task import MultiTaskData
from kd_lightning.data.sources.chat import ChatData, Chatterbot
from kd_lightning.data.sources.debian_pairs import DebianPairs
from kd_lightning.data.sources.debian_questions import DebianQuestions
from kd_lightning.data.sources.debian_ranking import DebianRanking
from kd_lightning.data.sources.debian_sections import DebianSections
from kd_lightning.data.sources.embedding_files import EmbeddingFiles
from kd_lightning.data.sources.fashion_mnist import FashionMNIST
from kd_lightning.data.sources.files import FileReader
from kd_lightning.data.sources.general_text import GeneralDocuments, GeneralText
from kd_lightning.data.sources.hf_dataset import HFDataset
from kd_lightning.data.sources.image_folder import ImageFolder
from kd_lightning.data.sources.lm_text import LMTextData
from kd_lightning.data.sources.personal_data import PersonalData
from kd_lightning.data.sources.question_files import QuestionFiles
from kd_lightning.data.sources.ranking_files import RankingFiles
from kd_lightning.data.sources.reviews import Reviews
from kd_lightning.data.sources.sotu import Sotu
from kd_lightning.data.sources.sotu_eras import SotuEras
from kd_lightning.data.sources.text_files import TextFiles
from kd_lightning.data.sources.token_files import TokenFiles
from kd_lightning.data.sources.training_texts import TrainingTexts
from kd_lightning.data.text.corpus import Corpus, Examples
from kd_lightning.data.text.datamodule import TextData
from kd_lightning.data.text.embedding import EmbeddingData
from kd_lightning.data.text.ranking import RankingData

__all__ = [
    "ChatData",
    "Chatterbot",
    "ClassificationData",
    "Corpus",
    "CorpusData",
    "DebianPairs",
    "DebianQuestions",
    "DebianRanking",
    "DebianSections",
    "EmbeddingData",
    "EmbeddingFiles",
    "Examples",
    "FashionMNIST",
    "FileReader",
    "GeneralDocuments",
    "GeneralText",
    "HFDataset",
    "ImageCorpus",
    "ImageData",
    "ImageFolder",
    "IndexedData",
    "LMTextData",
    "MultiTaskData",
    "PersonalData",
    "QuestionFiles",
    "RankingData",
    "RankingFiles",
    "Reviews",
    "Sotu",
    "SotuEras",
    "TextData",
    "TextFiles",
    "TokenFiles",
    "TrainingTexts",
    "selected",
]
