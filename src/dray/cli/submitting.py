"""Commands that speak with a cluster's server of jobs."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from signal import SIGINT
from typing import TYPE_CHECKING, Any, TextIO, cast

from dray.cli.words import Parser
from dray.errors import JobLost, PlanError, RunFailed, ServerGone, StoreError, one_line
from dray.processes.signals import Stopped
from dray.processes.streams import Results, warn
from dray.redaction import redact, take_in

if TYPE_CHECKING:
    from dray.jobs import Job, JobServer
    from dray.spec import Source, Spec

SUBMITTED = ("prepare", "train", "tune", "ladder", "release", "evaluate", "predict")
"""Commands that a cluster can run for somebody elsewhere."""
LOOK_SECONDS, SAY_SECONDS, SUPERVISED_SECONDS = 2.0, 60.0, 24 * 3600.0
"""How often a lost server is looked for, how often that is said, and for how long."""
UNSAID_LINES = 20
"""Lines of a job that are shown only if it fails."""


def submit_command(arguments: argparse.Namespace) -> int:
    from dray.jobs import JobServer, make_package
    from dray.plan import format_bytes

    words, inner = _read_words(arguments)
    if arguments.supervise and arguments.detach:
        raise PlanError(
            "dray submit",
            "--supervise and --detach exclude each other",
            "who supervises a job follows it",
            "leave one of them out",
        )
    run = _name(inner, words)
    names, num_left_out = _find_names(inner)
    package = make_package(names, arguments.max_package * 1000**2)
    num_left_out += package.num_left_out
    server = JobServer(_address(arguments))
    submit = partial(server.submit, words, package, run, inner.storage)
    job, is_new = submit()
    left = f", {_count(num_left_out, 'file')} beside them left out" if num_left_out else ""
    warn(
        f"{job.id} submitted with {_count(len(package.files), 'file')}, "
        f"{format_bytes(package.num_bytes)}{left}"
        if is_new
        else f"{job.id} is at work on {run} already; it is followed from its beginning",
        prefix="",
    )
    return _attend(server, job, arguments, submit)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def stop_command(arguments: argparse.Namespace) -> int:
    from dray.jobs import JobServer
    from dray.storage.filesystem import child

    server = JobServer(_address(arguments))
    jobs = server.find(arguments.run)
    if arguments.storage:
        jobs = [job for job in jobs if job.storage == child(arguments.storage)]
    if not jobs or jobs[0].is_over:
        what = f"{jobs[0].id} ended as {jobs[0].status}" if jobs else "there is none"
        raise StoreError(
            f"a job of the run {arguments.run!r}",
            f"{what} on {server.address}",
            way_out=f"`dray runs --address {server.address}` lists all",
        )
    if len(jobs) > 1:
        raise StoreError(
            f"the run {arguments.run!r}",
            f"is at work in {', '.join(job.storage for job in jobs)}",
            way_out="say which one by --storage",
        )
    job = jobs[0]
    warn(f"{job.id} is told to save its state and to end", prefix="")
    job = server.stop(job)
    arguments.out.say(f"{job.id}  {job.status}")
    return 0


def leave_command(arguments: argparse.Namespace) -> int:
    """The node that this runs on is to be taken away."""
    from dray.cluster.local_ray import authenticated
    from dray.cluster.notices import find_address, leave

    address = find_address(arguments.address)
    with authenticated(address):
        nodes = leave(address, arguments.seconds)
    arguments.out.say(f"{', '.join(nodes)} leaves the cluster at {address}: no rank is on it")
    return 0


def arrive_command(arguments: argparse.Namespace) -> int:
    """How a submitted command begins on the cluster: the versions of both sides are compared before
    anything else."""
    import json

    from dray.jobs.arrival import ARRIVAL, EQUAL, compare, versions_here

    different = compare(json.loads(arguments.versions), versions_here())
    print(f"{ARRIVAL} {different or EQUAL}", file=sys.stderr, flush=True)
    if different:
        return PlanError.exit_code
    words = arguments.words[arguments.words[0] == "--" :]
    inner = arguments.parse(words, arguments.out)
    inner.out = Results(cast(TextIO, _Marked(arguments.out.stream)))
    return int(inner.command(inner))


class _Marked:
    """A stream that marks each line: a job has one log, for its result and for all other words."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.encoding = stream, stream.encoding

    def write(self, text: str) -> int:
        from dray.jobs.arrival import RESULT

        # Whatever else stands in the last line of the log ends there. Other signs at which Python
        # splits lines may stand within JSON.
        lines = text.removesuffix("\n").split("\n")
        self._stream.write("\n" + "".join(f"{RESULT} {line}\n" for line in lines))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _read_words(arguments: argparse.Namespace) -> tuple[list[str], argparse.Namespace]:
    """The words of the submitted command, and what they mean. Options of `submit` may stand among
    them."""
    from dray.storage.filesystem import is_uri

    own = Parser(prog="dray submit", add_help=False, allow_abbrev=False)
    add_options(own)
    _, words = own.parse_known_args(arguments.words, namespace=arguments)
    if not words or words[0] not in SUBMITTED:
        raise PlanError(
            "dray submit",
            f"{words[0]!r} is no command for a cluster" if words else "no command is given",
            f"a cluster runs {', '.join(SUBMITTED)}",
        )
    for word in words:
        _check_for_secrets(word, "a word of the command")
    inner = arguments.parse(words, arguments.out)
    if not is_uri(inner.storage) and not os.path.isabs(inner.storage):
        raise PlanError(
            f"--storage {inner.storage}",
            "lies in a job's working directory, which goes away with the job",
            "what a job writes is named by a URI, or by an absolute path that the whole cluster "
            "sees",
            "give e.g. --storage s3://BUCKET/runs",
        )
    run = inner.run if words[0] in ("evaluate", "predict") else ""
    if "/" in run and not is_uri(run) and not os.path.isabs(run):
        raise PlanError(
            run,
            "would be looked for in a job's working directory, where no run is",
            "a run lies in the cluster's storage",
            "give its name and --storage, an absolute path or a URI",
        )
    out = getattr(inner, "file", None)
    if out is not None and not os.path.isabs(out):
        raise PlanError(
            f"--out {out}",
            "lies in a job's working directory, which goes away with the job",
            "predictions are written to a file that the head sees",
            "give an absolute path, or leave --out out: they come here",
        )
    if words[0] == "release":
        _check_release(inner)
    return words, inner


def _check_release(inner: argparse.Namespace) -> None:
    """Raise PlanError for stages that a job cannot do, or whose results would go with it."""
    from dray.spec import make_spec

    spec = make_spec(_load(inner), inner.spec)
    if "serve" in spec.stages and inner.until in (None, "serve"):
        raise PlanError(
            "dray submit release",
            "would serve for as long as its job lives",
            "a cluster's services are KubeRay's, or those of `dray serve --address`",
            "give --until promote: services of that storage follow",
        )
    for number, one in enumerate(spec.export):
        for key, path in (("folder", one.folder), ("sign", one.sign)):
            if path is not None and not os.path.isabs(path):
                raise PlanError(
                    f"export.{number}.{key} = {path}",
                    "lies in a job's working directory, which goes away with the job",
                    "what a release writes, and its key, are named by paths that the head sees",
                    "give an absolute path",
                )


def _check_for_secrets(text: str, what: str) -> None:
    """Raise PlanError for credentials: the server of jobs keeps and shows what it is given."""
    uris = re.findall(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'\[\]{},]+", text)
    if redact(text, {}) != text or any(take_in(uri) != uri for uri in uris):
        raise PlanError(
            "dray submit",
            f"{what} holds credentials",
            "the server of jobs keeps and shows what it is given",
            "leave them out, and give them to the cluster's nodes through their environment",
        )


def _name(inner: argparse.Namespace, words: Sequence[str]) -> str:
    """What the job is known by: the run or sweep that it works on; of what only reads a run, the
    very command."""
    from dray.spec import NAME_RULE, RUN_NAME

    if words[0] in ("evaluate", "predict"):
        which = hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]
        last = re.sub(r"[^A-Za-z0-9._-]", "-", inner.run.rstrip("/").rpartition("/")[2])
        return f"{last}-{words[0]}-{which}"
    given = getattr(inner, "fork", None) or getattr(inner, "run_name", None)
    endings = {"tune": "-sweep", "ladder": "-ladder", "prepare": "-prepare"}
    name = str(given or f"{_load(inner)['name']}{endings.get(words[0], '')}")
    if not re.fullmatch(RUN_NAME, name):
        raise PlanError(f"--run {name}"[:200], "not a name", NAME_RULE)
    return name


def _load(inner: argparse.Namespace) -> dict[str, Any]:
    from dray.spec import load_tree
    from dray.sweep.space import split_overrides

    of_spec, _ = split_overrides(inner.overrides)
    return load_tree(inner.spec, of_spec)


def _find_names(inner: argparse.Namespace) -> tuple[list[str], int]:
    """What a command names of this machine: spec, space, data, tokeniser and model; and how many
    files of its data's folders are none of the data."""
    from pathlib import Path

    from dray.jobs.package import local_names
    from dray.spec import make_spec

    named = [getattr(inner, key, None) for key in ("spec", "space")]
    names = [name for name in named if name and Path(name).is_file()]
    for name in names:
        if Path(name).is_absolute():
            raise PlanError(
                name,
                "is an absolute path, which is the cluster's own",
                "what lies here is named relative to the working directory",
                f"give {os.path.relpath(name)}",
            )
        _check_for_secrets(Path(name).read_text(encoding="utf-8", errors="replace"), name)
    sources = [_source(given) for given in getattr(inner, "data", None) or ()]
    if getattr(inner, "spec", None):
        spec = make_spec(_load(inner), inner.spec)
        sources += _sources_of(spec)
        names += local_names(_places_of(spec))
    num_left_out = 0
    for source in sources:
        files, beside = _find_inputs(source)
        names += files
        num_left_out += beside
    return names, num_left_out


def _sources_of(spec: Spec) -> list[Source]:
    """Whatever a spec reads records of."""
    from dray.spec import Source

    validation, rules = spec.data.validation, spec.data.cleaning.decontaminate
    found = [*spec.data.train, *(validation if isinstance(validation, tuple) else ())]
    gathered = [source.gather for source in found if source.gather is not None]
    found += [Source(path=one.names.path) for one in gathered if one.names is not None]
    if rules is not None:
        found += rules.against
    if spec.evaluate is not None:
        found += [_source(one) for one in spec.evaluate.words]
    return found


def _places_of(spec: Spec) -> list[str]:
    """The files and folders that a spec names beside its sources."""
    places = [spec.tokenizer.path, spec.model.path, *spec.task.files.values()]
    if spec.data.redaction is not None:
        places.append(spec.data.redaction.names)
    if spec.augmentation is not None:
        places.append(spec.augmentation.thesaurus)
        if (translators := spec.augmentation.back_translation) is not None:
            places += [translators.there.path, translators.back.path]
    return [place for place in places if place]


def _source(given: str) -> Source:
    from dray.release.evaluate import as_source
    from dray.spec import Source

    return Source.model_validate({"format": "text", **as_source(given)})  # only its files matter


def _find_inputs(source: Source) -> tuple[list[str], int]:
    """The files of a source that lie on this machine, as `dray prepare` would find them, and how
    many it would leave out: there its account cannot tell of them."""
    from dray.corpus.sources import list_source
    from dray.jobs.package import local_names

    paths = local_names(source.paths)
    if not paths:
        return [], 0
    found = list_source(source.model_copy(update={"path": tuple(paths)}), "data")
    left_out = sum(item.num_files for item in found.left_out)
    return [os.path.relpath(file.path) for file in found.files], left_out


@dataclass
class _Listener:
    """Takes the lines of a job: the result goes to standard output, and the others to standard
    error, or are kept for the case that the job fails."""

    out: Results
    show: Callable[[str], object]
    """Where its words go."""
    silent: bool
    """What the command says is kept, too, and not only what Ray says before it begins."""
    leaves: bool
    """It is enough to hear that the command has begun."""
    arrived: bool = False
    different: str = ""
    """What of the versions differs there."""
    unsaid: deque[str] = field(default_factory=lambda: deque(maxlen=UNSAID_LINES))

    def hear(self, line: str) -> None:
        """Take a line. Raises _Enough."""
        from dray.jobs.arrival import ARRIVAL, EQUAL, RESULT

        if line.startswith(ARRIVAL):
            self.unsaid.clear()
            self.arrived, said = True, line.removeprefix(ARRIVAL).strip()
            self.different = said if said != EQUAL else ""
            if self.leaves and not self.different:
                raise _Enough
        elif line.startswith(RESULT):
            self.out.say(line.removeprefix(RESULT).removeprefix(" "))
        elif self.silent or not self.arrived:
            self.unsaid.append(line)
        else:
            self.show(line)


class _Enough(Exception):
    """Nothing more is to be heard."""


def _attend(
    server: JobServer,
    job: Job,
    arguments: argparse.Namespace,
    submit: Callable[[], tuple[Job, bool]],
) -> int:
    """Follow a job to its end, or to what was asked for; the exit code. One that is supervised is
    submitted anew when it is lost."""
    from dray.jobs import Restarts
    from dray.show.progress import Display

    left, restarts, ended = 0, Restarts(), None
    try:
        with suppress(_Enough), Display().relaying() as show:
            while ended is None:
                listener = _Listener(
                    arguments.out, show, silent=arguments.wait, leaves=arguments.detach
                )
                ended, why = _follow(server, job, listener, supervise=arguments.supervise)
                if ended is None or (why and restarts.lost()):
                    show(f"{job.id} was lost: {why}; it is begun anew")
                    job, ended = _begin_anew(server, submit, show), None
        if ended is not None:
            return _end(ended, listener)
    except KeyboardInterrupt as error:
        warn(f"{job.id} goes on without you", prefix="")
        left = 128 + error.number if isinstance(error, Stopped) and error.number != SIGINT else 0
    how = f"--address {server.address}"
    warn(
        f"the same command follows it again; `dray stop {job.run} {how}` ends it; "
        f"`dray runs {how}` lists all",
        prefix="",
    )
    return left


def _follow(
    server: JobServer, job: Job, listener: _Listener, *, supervise: bool
) -> tuple[Job | None, str]:
    """A job that has ended, if it is known, and by what it was lost, if it was. Raises JobLost
    where nobody supervises."""
    from dray.jobs import lost_by

    try:
        ended = server.follow(job, listener.hear)
    except JobLost as error:
        if not supervise:
            raise
        return None, one_line(error)
    return ended, lost_by(ended) if supervise else ""


def _begin_anew(
    server: JobServer, submit: Callable[[], tuple[Job, bool]], show: Callable[[str], object]
) -> Job:
    """The job, submitted once the server is there. Raises RunFailed if it is not for a day."""
    from dray.plan import format_seconds

    began = told = time.monotonic()
    while True:
        if server.answers():
            with suppress(ServerGone):  # again, meanwhile
                return submit()[0]
        if time.monotonic() - told > SAY_SECONDS:
            told = time.monotonic()
            waited = format_seconds(told - began)
            show(f"{server.address} has not answered for {waited}")
        if time.monotonic() - began > SUPERVISED_SECONDS:
            raise RunFailed(f"{server.address} has not answered for a day")
        time.sleep(LOOK_SECONDS)


def _end(job: Job, listener: _Listener) -> int:
    """Tell how a job ended; its exit code. Raises PlanError if its command could not begin."""
    from dray.jobs.server import exit_code

    if listener.different:
        raise PlanError(
            "--address",
            f"the cluster has other versions: {listener.different}",
            "both sides have the same",
            "install the cluster's versions here, or yours there",
        )
    if "No module named dray\n" in f"{job.message}\n" or "No module named 'dray'" in job.message:
        raise PlanError(
            "--address",
            "the cluster's Python has no dray",
            "the head and each node that works have it",
            "pip install 'dray[cluster]' there, or use an image that has it",
        )
    if "No space left on device" in job.message and not listener.arrived:
        raise PlanError(
            "--address",
            "the disk of the cluster's head is full",
            "a job's files and logs lie in Ray's folder there (--temp-dir, /tmp/ray)",
            "make room there",
        )
    if code := exit_code(job):
        for line in listener.unsaid:
            warn(line, prefix="")
        if not listener.arrived and job.message:
            warn(one_line(job.message), prefix="")
        warn(f"{job.id}  {job.status}, exit code {code}", prefix="")
    return code


def _address(arguments: argparse.Namespace) -> str:
    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise PlanError(
            "--address",
            "no cluster is named",
            "the address of its server of jobs, http://HEAD:8265 if nothing else was said, or "
            "RAY_API_SERVER_ADDRESS",
        )
    return str(address)


OPTIONS = {
    "address": None,
    "wait": False,
    "detach": False,
    "supervise": False,
    "max_package": 100,
}
"""What the options of `submit` are where they are not given."""


def _megabytes(text: str) -> int:
    if not text.isdecimal() or int(text) > 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of megabytes")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `submit`, which are read twice: they may stand before its command and among
    the words of it. So they have no defaults of their own."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--address",
        metavar="URL",
        help="of the server of jobs: http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)",
    )
    add("--wait", action="store_true", help="say nothing but the result and the end")
    add("--detach", action="store_true", help="come back once the command has begun there")
    add(
        "--supervise",
        action="store_true",
        help="begin it anew if its driver or the head is lost: it goes on from its checkpoint",
    )
    add(
        "--max-package",
        type=_megabytes,
        metavar="MB",
        help=f"of the files that go with the command (default: {OPTIONS['max_package']})",
    )
