"""A run from its beginning to its end, seen from the driver; the loop over its steps is a rank's
(`dray.rank.loop`).

`driver.py` drives it: `train` on Ray, `train_locally` in this process alone. `start.py` finds out
what is wanted and begins the run, `launching.py` starts the ranks and follows them, `recorder.py`
makes metrics of what they say, `caller.py` tells of them and asks whether to stop. On Ray,
`worker.py` is a rank, `posting.py` its side of `mailbox.py`; `recovery.py` decides after a failure.
"""

from dray.cluster.placement import Placement, reserved
from dray.train.driver import Ended, train, train_locally

__all__ = ["Ended", "Placement", "reserved", "train", "train_locally"]
