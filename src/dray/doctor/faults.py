"""The table of faults: what is looked at, what it means, and the way out. The first rule that
matches wins.

The texts are those that torch, DeepSpeed, gloo, NCCL, Ray, pyarrow and the operating system really
give. A sentence's `{names}` are filled from the case, from named groups of the pattern, and from
the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.doctor.cases import (
    COLLECTIVE_TIMEOUT,
    CONNECTION_LOST,
    CORPUS_FOLDER,
    OWN_FILE,
    Case,
    make_cases,
)
from dray.errors import (
    BadNumbers,
    Cause,
    CheckpointDamaged,
    CheckpointsLost,
    CorpusError,
    GroupDissolved,
    Interrupted,
    LossSpike,
    PlanError,
    ReadsDiffer,
    SaveFailed,
    SpecError,
    StorageFailed,
    StorageNotShared,
    StoreError,
    UserError,
)

_USED = re.compile(r"Memory on the node \(IP: (?P<ip>[^,]+),[^)]*\) was [^(]*\((?P<share>[\d.]+)\)")
CRASHES = frozenset({"SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE", "SIGTRAP", "SIGSYS"})
HIGH_MEMORY_SHARE = 0.95
"""Ray's memory monitor kills from here on; a SIGKILL at such a load is taken for the kernel's."""


class Values(dict[str, Any]):
    """What sentences are filled with; what nobody knows is called so."""

    def __missing__(self, name: str) -> str:
        return "unknown"


AGAIN = "the same command goes on from {resume}"
_ASKED_TO_LEAVE = (
    "{who} was asked to leave{at}: the cloud took node {node} away, or the process got SIGTERM"
)

Sentence = str | Callable[[Values], str]


@dataclass(frozen=True)
class Rule:
    """One line of the table. It matches if its types or patterns do (any of them), and its
    condition holds.

    `own`: dray's own errors; `types`: alternatives of a foreign error's last name (or of its full
    one); `text`: in the errors' text; `log`: in what the rank printed, looked at only where it left
    no error.
    """

    fault: Cause
    cause: str
    way_out: Sentence
    own: tuple[type[BaseException], ...] = ()
    types: str = ""
    text: str = ""
    log: str = ""
    when: Callable[[Case], bool] | None = None

    def match(self, case: Case) -> dict[str, str] | None:
        """The pattern's named groups if the rule matches."""
        if self.when is not None and not self.when(case):
            return None
        if not (self.own or self.types or self.text or self.log):
            return {}
        for pattern, searched in (
            (self.text, case.text),
            (self.log, case.log if case.lost else ""),
        ):
            found = re.search(pattern, searched, re.S) if pattern else None
            if found:
                return {
                    name: " ".join(value.split())
                    for name, value in found.groupdict().items()
                    if value
                }
        types = "|".join(filter(None, (*(error.__name__ for error in self.own), self.types)))
        return {} if types and re.search(rf"(?:^|\.)(?:{types})$", case.error_type) else None


def _spare_gpu_memory(values: Values) -> str:
    """The cheapest measure that is not taken yet."""
    if isinstance(micro := values["micro_rows"], int) and micro > 1:
        return (
            f"run it again with batch.micro_rows={micro // 2} (it was {micro}); the result "
            "does not depend on it"
        )
    if values["activation_checkpointing"] is False:
        return "run it again with engine.activation_checkpointing=true"
    if isinstance(stage := values["zero_stage"], int) and stage < 3:
        return f"run it again with zero.stage={stage + 1} (it was {stage})"
    if values["offload"] == "none":
        return "run it again with zero.offload=optimizer"
    return (
        "use more workers (resources.workers) or GPUs with more memory; `dray plan` shows the "
        "memory by term"
    )


def _spare_host_memory(values: Values) -> str:
    if values["offload"] not in ("none", "unknown"):
        return (
            f"run it again with zero.offload=none (it was {values['offload']}), or on nodes "
            "with more memory"
        )
    if values["on_gpu"] is False:
        return _spare_gpu_memory(values) + "; or put fewer workers on a node"
    return "put fewer workers on a node (resources.cpus_per_worker), or use nodes with more memory"


def _lower_rate(values: Values) -> str:
    measures = [
        f"lower optimizer.learning_rate (it was {values['learning_rate']})",
        f"more schedule.warmup_steps (it was {values['warmup_steps']})",
    ]
    if values["precision"] == "fp16":
        measures.insert(0, "precision=bf16")
    begun = values["resume_step"]
    how = (
        f"fork the run from {values['resume']} (--fork NEW_NAME)"
        if begun
        else "start it anew (--run NEW_NAME)"
    )
    return f"{how} with {', or '.join(measures)}"


def _go_on_without(values: Values) -> str:
    """What to do after a checkpoint was set aside."""
    if values["checkpoints_lost"] != "unknown":
        return str(values["checkpoints_lost"])
    return f"what was set aside is not used; the same command goes on from {values['resume']}"


def _preempted(case: Case) -> bool:
    return bool(case.failure.get("preempted")) and (case.lost or case.symptom)


def _node_is_lost(case: Case) -> bool:
    return bool(case.failure.get("nodes_lost")) and (case.lost or case.symptom)


def _hung(case: Case) -> bool:
    return case.failure.get("detected_by") == "hang" and case.lost


def _waited_in_a_hang(case: Case) -> bool:
    return case.failure.get("detected_by") == "hang" and case.symptom


def _in_corpus(case: Case) -> bool:
    """Whether dray's innermost frame lies in the reading of rows."""
    own = [file for file, _, _ in case.frames if OWN_FILE.search(file)]
    return bool(own) and CORPUS_FOLDER in own[-1]


def _host_is_full(case: Case) -> bool:
    gone = case.failure.get("preempted") or case.failure.get("nodes_lost")
    return case.lost and not gone and (case.memory_share or 0.0) >= HIGH_MEMORY_SHARE


RULES: tuple[Rule, ...] = (
    Rule(
        Cause.INTERRUPTED, "a person stopped {who}{at}", AGAIN, own=(Interrupted, KeyboardInterrupt)
    ),
    # ---- memory
    Rule(
        Cause.GPU_MEMORY,
        "{who} ran out of GPU memory{at} (it asked for {size} more)",
        _spare_gpu_memory,
        types=r"torch\.OutOfMemoryError|torch\.cuda\.OutOfMemoryError|torch\.AcceleratorOutOfMemoryError",
        text=r"(?:CUDA|HIP|XPU|NPU) out of memory(?:\. Tried to allocate (?P<size>[\d.]+ \w+))?"
        r"|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Failed to CUDA calloc",
    ),
    Rule(
        Cause.HOST_MEMORY,
        "Ray killed {who}{at} because node {node} had {used_share} of its memory in use",
        _spare_host_memory,
        types=r"ray\.exceptions\.OutOfMemoryError",
        text=r"killed due to the node running low on memory|\(tasks / actors\) killed due to "
        r"memory pressure",
    ),
    Rule(
        Cause.HOST_MEMORY,
        "Ray's object store on node {node} is full ({who}{at})",
        "give it more memory (`ray start --object-store-memory`), and its node's /dev/shm too",
        types="ObjectStoreFullError",
        text="The local object store is full of objects",
    ),
    Rule(
        Cause.HOST_MEMORY,
        "shared memory (/dev/shm) ran out under {who}{at}",
        "enlarge /dev/shm (for a container: --shm-size=16g or an emptyDir of medium Memory)",
        text=r"/dev/shm[^\n]*No space left|No space left[^\n]*/dev/shm|out of shared memory",
        log=r"/dev/shm[^\n]*No space left|insufficient shared memory",
    ),
    Rule(
        Cause.HOST_MEMORY,
        "{who} could not get {size} of memory{at}",
        _spare_host_memory,
        types="MemoryError|_ArrayMemoryError|ArrowMemoryError",
        text=r"DefaultCPUAllocator: [^:]*: you tried to allocate (?P<size>\d+ bytes)"
        r"|Unable to allocate (?P<array>[\d.]+ \w+) for an array|malloc of size (?P<malloc>\d+) "
        r"failed"
        r"|std::bad_alloc|Cannot allocate memory",
        log=r"std::bad_alloc|Out of memory: Killed process|oom-kill",
    ),
    Rule(
        Cause.HOST_MEMORY,
        "{who} was killed{at} while its node's memory was {used_share} used",
        _spare_host_memory,
        when=_host_is_full,
    ),
    Rule(
        Cause.CONFIGURATION,
        "node {node}, where {who} is, sees another storage than the driver: {error}",
        "name a shared file system or a bucket with --storage, or mount the storage on every node",
        own=(StorageNotShared,),
    ),
    # ---- rows, storage
    Rule(
        Cause.STORAGE,
        "no space is left where {who} wrote{at}: {error}",
        "free space in {storage} (checkpoint.keep_last={keep_last} keeps fewer), then give the "
        "same command again",
        types="OutOfDiskError",
        text=r"No space left on device|\[Errno 28\]|Disk quota exceeded|\[Errno 122\]",
    ),
    Rule(
        Cause.DATA,
        "{who} met a token or label outside of what the model knows{at}: {error}",
        "make tokenizer and model agree (model.vocab_size, number of labels), then prepare the "
        "corpus again",
        text=r"index out of range in self|Target -?\d+ is out of bounds|device-side assert "
        r"triggered",
    ),
    Rule(
        Cause.DATA,
        "the corpus cannot be used: {error}",
        "do as the message says, then `dray prepare`",
        own=(CorpusError,),
    ),
    Rule(
        Cause.DATA,
        "{who} could not read its rows{at}: {error}",
        "check the corpus ({corpus}) and its storage; deleting its folder and `dray prepare` "
        "build it anew",
        when=lambda case: bool(case.error_type) and not case.symptom and _in_corpus(case),
    ),
    Rule(
        Cause.STORAGE,
        "none of the run's checkpoints can be used: {error}",
        "do as the message says",
        own=(CheckpointsLost,),
        text=r"none of its checkpoints can be used",
    ),
    Rule(
        Cause.CHECKPOINT,
        "a checkpoint is damaged ({who}): {error}",
        _go_on_without,
        own=(CheckpointDamaged,),
        text=r"^checkpoint \S+ is damaged",
    ),
    Rule(
        Cause.STORAGE,
        "ranks read a checkpoint differently: {error}",
        "take the node that is named there out of the cluster, and test its memory and disk; "
        + AGAIN,
        own=(ReadsDiffer,),
    ),
    Rule(
        Cause.STORAGE,
        "storage failed {who}{at}: {error}",
        "check that {storage} is reachable, mounted and writable with the nodes' credentials; "
        + AGAIN,
        own=(StoreError, StorageFailed, SaveFailed),
        types="PermissionError|BlockingIOError",
        text=r"AWS Error (?P<aws>\w+)|Read-only file system|Input/output error|Stale file "
        r"handle|Permission denied"
        r"|Transport endpoint is not connected|When \w+ing [^\n]*(?:key|bucket) "
        r"'|google::cloud::Status"
        r"|Unable to locate credentials|Too many open files",
    ),
    # ---- numbers
    Rule(
        Cause.NUMERICS,
        "training diverged on {who}{at}: {error}",
        _lower_rate,
        own=(BadNumbers,),
        types="FloatingPointError",
        text=r"Current loss scale already at minimum|returned nan values in its \d+th output"
        r"|gradients from `parameters` is non-finite|(?:loss|gradient)\S* (?:is|are) not finite",
    ),
    Rule(Cause.SPIKE, "the loss leapt on {who}{at}: {error}", _lower_rate, own=(LossSpike,)),
    # ---- what was asked for
    Rule(
        Cause.CONFIGURATION,
        "a library is missing where {who} runs: {error}",
        "install the same packages on every node (node {node}), e.g. by the image or `pip install "
        "dray[train]`",
        types="ModuleNotFoundError|ImportError",
    ),
    Rule(
        Cause.CONFIGURATION,
        "{who} was refused what the spec asks for: {error}",
        "do as the message says",
        own=(SpecError, PlanError, UserError),
        types="DeepSpeedConfigError|ZeRORuntimeException",
    ),
    Rule(
        Cause.CONFIGURATION,
        "the cluster cannot give the workers what they need: {error}",
        "ask for less (resources.workers={workers}, cpus_per_worker, gpus_per_worker) or let "
        "the cluster grow; `ray status` shows what it has",
        types=r"WorkerGroupStartup(?:Timeout|Failed)Error|InsufficientClusterResourcesError|TaskUnschedulableError"
        r"|ActorUnschedulableError",
    ),
    Rule(
        Cause.CONFIGURATION,
        "the workers' environment cannot be set up: {error}",
        "mend the runtime environment or the token that the message names",
        types="RuntimeEnvSetupError|AuthenticationError",
    ),
    Rule(
        Cause.CONFIGURATION,
        "{who} cannot use its GPU: {error}",
        "match driver, CUDA and torch on node {node} (`nvidia-smi`), and resources.gpus_per_worker",
        text=r"CUDA driver version is insufficient|no CUDA-capable device|No CUDA GPUs are "
        r"available"
        r"|invalid device ordinal|no kernel image is available",
    ),
    Rule(
        Cause.CONFIGURATION,
        "{who} cannot reach the other ranks: {error}",
        "open the ports between the nodes, and check which interface is used (GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME)",
        text=r"The client socket has failed to connect|failed to listen on|EADDRINUSE|Address "
        r"already in use"
        r"|Unable to find address for",
    ),
    # ---- a process that is gone
    Rule(
        Cause.KILLED,
        "the process that starts the workers was killed from outside: {error}",
        "look on the driver's node for who did it (`dmesg -T`, the batch system, `ray stop`); "
        + AGAIN,
        text=r"Ray Train's controller was lost",
    ),
    Rule(
        Cause.PREEMPTION,
        _ASKED_TO_LEAVE,
        AGAIN + " (checkpoint.every_minutes bounds what is lost)",
        own=(GroupDissolved,),
        types="PreemptionError",
        text=r"forcibly preempted|interrupted by node preemption|node was preempted",
    ),
    Rule(
        Cause.PREEMPTION,
        _ASKED_TO_LEAVE,
        AGAIN + " (checkpoint.every_minutes bounds what is lost)",
        when=_preempted,
    ),
    Rule(
        Cause.NODE_LOSS,
        "the head of the Ray cluster went away, and with it all that the cluster knew",
        "start a head again (`ray start --head`, and the other nodes) or give another --address; "
        + AGAIN,
        text="the head of the Ray cluster is gone",
    ),
    Rule(
        Cause.NODE_LOSS,
        "node {node} went away with {who}{at}",
        "see that the node comes back or another joins (`ray status`); " + AGAIN,
        types="NodeDiedError|LocalRayletDiedError",
        text=r"because its node has died|node was terminated unexpectedly|has been marked dead "
        r"because the detector"
        r"|Raylet is terminated|uncorrectable ECC error",
    ),
    Rule(
        Cause.NODE_LOSS,
        "node {node} went away with {who}{at}",
        "see that the node comes back or another joins (`ray status`); " + AGAIN,
        when=_node_is_lost,
    ),
    Rule(
        Cause.HANG,
        "{who} held up the others{at}",
        "look at the frame in which it stands; " + AGAIN,
        types="NCCLHangError|WorkerHealthCheckTimeoutError",
    ),
    Rule(
        Cause.HANG,
        "{who} held up the others{at}",
        "look at the frame in which it stands; " + AGAIN,
        when=_hung,
    ),
    Rule(
        Cause.CODE,
        "{who} crashed in native code{at} ({exit})",
        "read the stack of the crash; a library that does not fit the node's processor or driver "
        "is the usual reason",
        when=lambda case: case.exit in CRASHES,
    ),
    Rule(
        Cause.CODE,
        "{who} crashed in native code{at}: {crash}",
        "read the stack of the crash; a library that does not fit the node's processor or driver "
        "is the usual reason",
        log=r"Fatal Python error: (?P<crash>[^\n]+)|(?P<signal>terminate called after "
        r"throwing[^\n]+)",
    ),
    Rule(
        Cause.CODE,
        "{who} ended itself{at} without an error ({exit})",
        "read the end of its log: something called exit; " + AGAIN,
        when=lambda case: (
            case.exit.startswith("exit code") or case.error_type == "builtins.SystemExit"
        ),
    ),
    Rule(
        Cause.KILLED,
        "{who} was killed from outside{at} ({exit})",
        "look on node {node} for who did it (`dmesg -T`, the batch system, `ray stop`); " + AGAIN,
        when=lambda case: case.lost,
    ),
    # ---- ranks that only saw another one go
    Rule(
        Cause.HANG,
        "{who} waited for a rank that hung{at}",
        "look at the rank that is missing or furthest behind; " + AGAIN,
        when=_waited_in_a_hang,
    ),
    Rule(
        Cause.HANG,
        "a collective of {who} waited in vain for another rank{at}",
        "look at the rank that is missing or furthest behind; " + AGAIN,
        when=lambda case: bool(COLLECTIVE_TIMEOUT.search(case.text)),
    ),
    Rule(
        Cause.KILLED,
        "a rank went away without a word; {who} lost its connection to it{at}",
        "look on the nodes for who ended it (`dmesg -T`, the batch system); " + AGAIN,
        when=lambda case: bool(CONNECTION_LOST.search(case.text)),
    ),
    Rule(
        Cause.CODE,
        "{who} raised {error}{at}",
        "mend what the traceback shows; " + AGAIN,
        when=lambda case: bool(case.error_type),
    ),
    Rule(
        Cause.UNKNOWN,
        "{who} ended{at} and nothing says why{said}",
        "start it again with --verbose, and look into Ray's logs on node {node}",
    ),
)


@dataclass(frozen=True)
class Finding:
    """A case and the rule that it falls under."""

    case: Case
    rule: Rule
    groups: Mapping[str, str]

    @property
    def fault(self) -> Cause:
        return self.rule.fault

    def cause(self, values: Mapping[str, Any]) -> str:
        """The cause in one sentence."""
        return self.rule.cause.format_map(self._values(values))

    def way_out(self, values: Mapping[str, Any]) -> str:
        """The way out in one sentence."""
        filled, sentence = self._values(values), self.rule.way_out
        return sentence.format_map(filled) if isinstance(sentence, str) else sentence(filled)

    def _values(self, values: Mapping[str, Any]) -> Values:
        case = self.case
        own = {
            "who": "the driver" if case.rank is None else f"rank {case.rank}",
            "at": f" at step {case.step}" if case.step is not None else "",
            "error": case.error or "no message",
            "exit": case.exit or "no exit status is known",
            "said": f": {case.error}" if case.error else "",
        }
        lost = [str(node) for node in case.failure.get("nodes_lost") or []]
        if case.node or lost:
            own["node"] = case.node or lost[0]
        if case.memory_share is not None:
            own["used_share"] = f"{case.memory_share:.0%}"
        if size := self.groups.get("array") or self.groups.get("malloc"):
            own["size"] = size
        if "signal" in self.groups:
            own["crash"] = self.groups["signal"]
        if used := _USED.search(case.text):
            own |= {"used_share": f"{float(used['share']):.0%}", "node": case.node or used["ip"]}
        return Values({**values, **own, **self.groups})


def find_rule(case: Case) -> Finding:
    """The first rule that matches."""
    for rule in RULES:
        groups = rule.match(case)
        if groups is not None:
            return Finding(case, rule, groups)
    raise AssertionError("the last rule matches everything")


def find_first(cases: Sequence[Case]) -> Finding | None:
    """What came first: what a rank ended the attempt with on purpose, then an error that is no mere
    symptom of another rank's, then the earliest, then the lowest rank.

    A death whose time is not known comes after an error whose time is: a dead rank brings about
    symptoms only, so an error of another kind was there before it.
    """
    findings = [find_rule(case) for case in cases]

    def order(finding: Finding) -> tuple[Any, ...]:
        case = finding.case
        return (
            not case.on_purpose,
            case.symptom,
            finding.fault is Cause.UNKNOWN,
            case.time is None,
            case.time or 0.0,
            -1 if case.rank is None else case.rank,
        )

    return min(findings, key=order, default=None)


def classify(failure: Mapping[str, Any]) -> Cause:
    """The cause of a failed attempt, from its document alone."""
    if (first := find_first(make_cases(failure))) is not None:
        return first.fault
    if failure.get("preempted"):
        return Cause.PREEMPTION
    if failure.get("nodes_lost"):
        return Cause.NODE_LOSS
    if failure.get("detected_by") in ("hang", "numerics"):
        return Cause(str(failure["detected_by"]))
    return Cause.UNKNOWN
