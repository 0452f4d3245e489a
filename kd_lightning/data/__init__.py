"""Data modules: where sentences come from, and how they become batches."""

from kd_lightning.data.corpus import Corpus, Examples
from kd_lightning.data.files import FileReader
from kd_lightning.data.hf_dataset import HFDataset
from kd_lightning.data.reviews import Reviews
from kd_lightning.data.text import TextData
from kd_lightning.data.text_files import TextFiles

__all__ = ["Corpus", "Examples", "FileReader", "HFDataset", "Reviews", "TextData", "TextFiles"]
