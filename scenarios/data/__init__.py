"""Training samples as pure functions of (seed, sample number): made on the spot, or from files."""

from scenarios.data.batch import Batch, Dataset
from scenarios.data.bert import BertBatch, BertDataset
from scenarios.data.stream import make_dataset

__all__ = ["Batch", "BertBatch", "BertDataset", "Dataset", "make_dataset"]
