"""A run from its beginning to its end, seen from the driver.

`driver.py` drives it: `train` on Ray, `train_locally` in this process alone. `start.py` finds out what is wanted and
begins the run, `worker.py` is a rank on Ray, `mailbox.py` the actor between ranks and driver.
"""

from dray.train.driver import train, train_locally

__all__ = ["train", "train_locally"]
