"""Why a run ended as it did: the class of its failure, the rank that failed first, the evidence,
and the way out.

Reads the run folder alone, on any filesystem, with neither torch nor ray. The causes themselves are
`dray.errors.Cause`; `faults` is the table of rules that tell them, `cases` frees errors of their
wrappers, `stalls` reads stacks, heartbeats and step times, `diagnosis` puts them together.
"""

from __future__ import annotations

from dray.doctor.diagnosis import Diagnosis, Exhibit, Past, diagnose
from dray.doctor.faults import classify

__all__ = ["Diagnosis", "Exhibit", "Past", "classify", "diagnose"]
