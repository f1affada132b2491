"""A run from its beginning to its end, seen from the driver.

`driver.py` drives it: `train` on Ray, `train_locally` in this process alone. `start.py` finds out
what is wanted and begins the run, `launching.py` starts the ranks and follows them, `recorder.py`
makes metrics of what they say. On Ray, `worker.py` is a rank, `posting.py` its side of
`mailbox.py`; `recovery.py` decides after a failure.
"""

from dray.train.driver import train, train_locally

__all__ = ["train", "train_locally"]
