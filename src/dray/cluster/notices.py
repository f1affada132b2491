"""Notices that a node is to be taken away, passed on to Ray as its drain: then the ranks save, and
go on elsewhere.

Clouds tell a machine by its metadata server, which somebody on the node has to ask. Kubernetes runs
what the pod names as `preStop`, which is `dray leave` (cluster/kuberay).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, Protocol

import psutil

from dray.cluster.nodes import check_address
from dray.errors import PlanError, RunFailed

LOOK_SECONDS = 5.0
"""How often a metadata server is asked, as AWS recommends."""
ANSWER_SECONDS = 2.0
"""A metadata server answers at once, if there is one."""
_LINK_LOCAL = "http://169.254.169.254"
_SHORTEST_SECONDS = 1.0
_RANK = "RayTrainWorker"
"""How Ray calls the process of a rank."""


@dataclass(frozen=True)
class Notice:
    """A node is to be taken away."""

    seconds: float
    """From now."""
    by: str


class Metadata(Protocol):
    """A cloud's metadata server; each method may raise what `requests` raises."""

    def is_here(self) -> bool:
        """Whether this machine is of that cloud."""

    def look(self) -> Notice | None:
        """The notice, if there is one."""


class Aws:
    """EC2 spot instances: two minutes before the end. Instance metadata service, version 2:
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""

    def __init__(self, base: str | None = None) -> None:
        given = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        self._base = (base or given or _LINK_LOCAL).rstrip("/")
        self._token = ""

    def is_here(self) -> bool:
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            return False
        self._renew()
        return bool(self._token)

    def look(self) -> Notice | None:
        answer = _get(f"{self._base}/latest/meta-data/spot/instance-action", self._header())
        if answer.status_code == 401:  # the token has run out
            self._renew()
            return None
        if answer.status_code != 200:
            return None
        end = datetime.fromisoformat(answer.json()["time"].replace("Z", "+00:00"))
        return Notice(_until(end), "AWS")

    def _header(self) -> dict[str, str]:
        return {"X-aws-ec2-metadata-token": self._token}

    def _renew(self) -> None:
        import requests

        answer = requests.put(
            f"{self._base}/latest/api/token",
            headers={"X-aws-ec2-metadata-token-ttl-seconds": "21600"},
            timeout=ANSWER_SECONDS,
        )
        self._token = answer.text if answer.status_code == 200 else ""


class Gcp:
    """Compute Engine spot VMs: half a minute before the end.
    https://cloud.google.com/compute/docs/instances/spot#preemption-process"""

    seconds = 30.0

    def __init__(self, base: str | None = None) -> None:
        host = os.environ.get("GCE_METADATA_HOST")
        given = f"http://{host}" if host else _LINK_LOCAL
        self._base = (base or given).rstrip("/")

    def is_here(self) -> bool:
        return bool(_get(self._base, {}).headers.get("Metadata-Flavor") == "Google")

    def look(self) -> Notice | None:
        answer = _get(
            f"{self._base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
        )
        said = answer.status_code == 200 and answer.text.strip().upper() == "TRUE"
        return Notice(self.seconds, "Google Cloud") if said else None


class Azure:
    """Azure spot VMs: at least half a minute before the end. Scheduled events:
    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events"""

    def __init__(self, base: str | None = None) -> None:
        self._base = (base or _LINK_LOCAL).rstrip("/")

    def is_here(self) -> bool:
        return bool(self._ask("/metadata/instance?api-version=2021-02-01").status_code == 200)

    def look(self) -> Notice | None:
        answer = self._ask("/metadata/scheduledevents?api-version=2020-07-01")
        if answer.status_code != 200:
            return None
        for event in answer.json().get("Events", ()):
            if event.get("EventType") in ("Preempt", "Terminate"):
                told = event.get("NotBefore")
                return Notice(_until(parsedate_to_datetime(told)) if told else 30.0, "Azure")
        return None

    def _ask(self, path: str) -> Any:
        return _get(self._base + path, {"Metadata": "true"})


def _get(place: str, headers: dict[str, str]) -> Any:
    import requests

    return requests.get(place, headers=headers, timeout=ANSWER_SECONDS)


def _until(end: datetime) -> float:
    return max(_SHORTEST_SECONDS, (end - datetime.now(UTC)).total_seconds())


def find_metadata() -> Metadata | None:
    """The metadata server of the cloud that this machine is of."""
    import requests

    for cloud in (Aws(), Gcp(), Azure()):
        with suppress(requests.exceptions.RequestException, ValueError):
            if cloud.is_here():
                return cloud
    return None


def watch(metadata: Metadata) -> Notice:
    """Ask a metadata server until it has a notice."""
    import requests

    while True:
        with suppress(requests.exceptions.RequestException, ValueError, KeyError):
            if (notice := metadata.look()) is not None:
                return notice
        time.sleep(LOOK_SECONDS)


def drain(gcs_address: str, node_id: str, notice: Notice) -> str:
    """Tell a cluster that a node is to be taken away: nothing new is put there, and ranks on it are
    told. Returns why it was refused; empty: it was not."""
    reasons: Any = import_module("ray.core.generated.autoscaler_pb2").DrainNodeReason
    client: Any = import_module("ray._raylet").GcsClient(address=gcs_address)
    accepted, why = client.drain_node(
        node_id,
        reasons.Value("DRAIN_NODE_REASON_PREEMPTION"),
        f"{notice.by} takes it away",
        int((time.time() + notice.seconds) * 1000),
    )
    return "" if accepted else str(why or "refused")


def pass_on(gcs_address: str, node_id: str) -> None:
    """On a node: wait for a notice of its cloud, if it is in one, and have its cluster drain it."""
    if (metadata := find_metadata()) is not None:
        drain(gcs_address, node_id, watch(metadata))


def find_address(given: str | None) -> str:
    """The address of the cluster that this machine has a node of; whether it answers is found out
    by `authenticated`. Raises PlanError."""
    from ray._private.services import canonicalize_bootstrap_address

    given = given or os.environ.get("RAY_ADDRESS") or "auto"
    check_address(given)
    found = canonicalize_bootstrap_address(given)
    if found is None:
        raise PlanError("--address", "no Ray runs on this machine", way_out="give HOST:PORT")
    return str(found)


def leave(gcs_address: str, seconds: float) -> list[str]:
    """Have the node that this runs on drained, which goes in so many seconds, and wait until no
    rank is on it any more, but not longer. Returns its address, or those of several.

    Raises PlanError where no node of that cluster is on this machine, and for its head; RunFailed
    where the cluster refuses, or a rank is still there at the end.
    """
    client: Any = import_module("ray._raylet").GcsClient(address=gcs_address)
    own = {item.address for found in psutil.net_if_addrs().values() for item in found}
    nodes = {
        node_id.hex(): node
        for node_id, node in client.get_all_node_info().items()
        if node.state == 0 and node.node_manager_address in own
    }
    if not nodes:
        raise PlanError("dray leave", f"no node of {gcs_address} is on this machine")
    if any(node.is_head_node for node in nodes.values()):
        raise PlanError(
            "dray leave",
            f"this machine is the head of {gcs_address}",
            "a cluster ends with its head: nodes leave it",
            "`dray stop RUN` has a run save and end",
        )
    refusals = {drain(gcs_address, node, Notice(seconds, "who called it")) for node in nodes}
    if any(refusals):
        why = "; ".join(sorted(filter(None, refusals)))
        raise RunFailed(f"the cluster does not let this node go: {why}")
    deadline = time.monotonic() + seconds
    while _has_ranks():
        if time.monotonic() > deadline:
            raise RunFailed(f"a rank is still on this node after {seconds:g} s")
        time.sleep(0.5)
    return [node.node_manager_address for node in nodes.values()]


def _has_ranks() -> bool:
    return any(
        _RANK in " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    )
