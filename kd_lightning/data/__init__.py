"""Data modules: where sentences and images come from, and how they become batches."""

from kd_lightning.data.base import ClassificationData, selected
from kd_lightning.data.corpus import Corpus, Examples
from kd_lightning.data.fashion_mnist import FashionMNIST
from kd_lightning.data.files import FileReader
from kd_lightning.data.hf_dataset import HFDataset
from kd_lightning.data.image_folder import ImageFolder
from kd_lightning.data.images import ImageCorpus, ImageData
from kd_lightning.data.multi_task import MultiTaskData
from kd_lightning.data.reviews import Reviews
from kd_lightning.data.text import TextData
from kd_lightning.data.text_files import TextFiles

__all__ = [
    "ClassificationData",
    "Corpus",
    "Examples",
    "FashionMNIST",
    "FileReader",
    "HFDataset",
    "ImageCorpus",
    "ImageData",
    "ImageFolder",
    "MultiTaskData",
    "Reviews",
    "TextData",
    "TextFiles",
    "selected",
]
