"""Training samples as pure functions of (seed, sample number): made on the spot, or from files."""

from scenarios.data.stream import Batch, Dataset, make_dataset

__all__ = ["Batch", "Dataset", "make_dataset"]
