"""What people say of a served model's answers, as a dataset in the storage: `entry.py` is one of
them and what is learnt of it, `dataset.py` where they lie."""

from dray.feedback.dataset import Dataset, Snapshot
from dray.feedback.entry import Entry, Rating

__all__ = ["Dataset", "Entry", "Rating", "Snapshot"]
