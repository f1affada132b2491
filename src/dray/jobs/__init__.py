"""A command of dray as a job of a Ray cluster, through the server of jobs alone.

`package.py`: what goes there, the spec and the small files that it names; `server.py`: submit,
follow, stop, list; `supervising.py`: which of them are begun anew; `arrival.py`: how the command
begins there, once the versions are compared.
"""

from dray.jobs.package import Package, make_package, staged
from dray.jobs.server import Job, JobServer
from dray.jobs.supervising import Restarts, lost_by

__all__ = [
    "Job",
    "JobServer",
    "Package",
    "Restarts",
    "lost_by",
    "make_package",
    "staged",
]
