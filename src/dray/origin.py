"""The weights that a run starts from: those of a folder, or of a checkpoint of another run.

Found once, by the driver, and pinned by what they hold; ranks read them until the run has a
checkpoint of its own. Imports no torch before they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dray.errors import SpecError, StoreError
from dray.models.source import READS_WEIGHTS, Pretrained
from dray.runs import CheckpointInfo, CheckpointReader, Run, choose_checkpoint, keep_checkpoint
from dray.storage.filesystem import absolute, child, shown

if TYPE_CHECKING:
    from dray.models.weights import Stored, Weights


@dataclass(frozen=True)
class RunWeights:
    """A checkpoint of another run in the same storage."""

    storage: str
    run: str
    step: int
    attempt: int
    digest: str = ""
    """SHA-256 of the checkpoint's manifest, which has those of its files; empty: not pinned yet."""

    def find(self) -> tuple[Run, CheckpointInfo]:
        """The run and its checkpoint. Raises StoreError if either is gone."""
        run = Run.open(self.storage, self.run)
        for info in run.checkpoints():
            if (info.step, info.attempt) == (self.step, self.attempt):
                return run, info
        raise StoreError(
            f"run {self.run!r}",
            f"its checkpoint of step {self.step} is gone",
            READS_WEIGHTS,
            "begin another run: --run NEW_NAME",
        )

    def config(self) -> dict[str, Any]:
        """The configuration of its model. Raises StoreError if the run keeps none."""
        kept = Run.open(self.storage, self.run).model()
        if kept is None:
            raise StoreError(
                f"run {self.run!r}",
                "keeps no configuration of its model",
                way_out="export it, and give the folder as model.path",
            )
        config: dict[str, Any] = kept["config"]
        return config

    @property
    def tokenizer_folder(self) -> str:
        return child(Run.open(self.storage, self.run).corpus_copy, "tokenizer")

    def check(self) -> None:
        """Raise StoreError unless the checkpoint is there and is the one that was pinned."""
        run, info = self.find()
        with CheckpointReader(run, info) as reader:
            if self.digest and reader.manifest_sha256 != self.digest:
                raise StoreError(
                    info.path,
                    "is another checkpoint than when the run began",
                    READS_WEIGHTS,
                    "begin another run: --run NEW_NAME",
                )

    def pinned(self) -> RunWeights:
        """The same with its digest, for which every byte of the checkpoint is checked. Raises
        StoreError."""
        if self.digest:
            return self
        run, info = self.find()
        with run.hold(info), CheckpointReader(run, info) as reader:
            reader.check_files("try another model.step")
            return replace(self, digest=reader.manifest_sha256)

    def keep_for(self, name: str) -> None:
        """Spare the checkpoint for as long as the run of that name exists."""
        run, info = self.find()
        keep_checkpoint(run, info.path, name, "base")

    def to_json(self) -> dict[str, Any]:
        """Without the storage, which may be moved."""
        return {
            "run": self.run,
            "step": self.step,
            "attempt": self.attempt,
            "digest": self.digest,
        }


Origin = Pretrained | RunWeights


def find_run_weights(
    storage: str, name: str, step: int | str, key: str = "model.run"
) -> RunWeights:
    """The checkpoint that `model.run` and `model.step`, or another `key`, mean now. Raises
    SpecError."""
    try:
        run = Run.open(storage, name)
        info, whole = choose_checkpoint(run, None if step == "newest" else step), run.spec()
    except StoreError as error:
        raise SpecError(
            f"{key} = {name}", str(error), "the weights of another run are read from it"
        ) from error
    if (made := run.compressed()) is not None and made["packed"]:
        raise SpecError(
            f"{key} = {name}",
            f"its weights are stored in fewer bytes (compressed from {made['run']})",
            "a run starts from whole weights",
            f"give {key}={made['run']}",
        )
    if whole.keeps_base:
        raise SpecError(
            f"{key} = {name}",
            "its checkpoints hold only what it trained of its model",
            "a run starts from whole weights",
            f"`dray export {name} FOLDER`, and give {key.replace('.run', '.path')}=FOLDER",
        )
    return RunWeights(absolute(storage), name, info.step, info.attempt)  # ranks are elsewhere


def find_teacher(storage: str, name: str) -> Run:
    """The run that `distil.run` names. Raises SpecError for one that is not there, is not complete,
    or has no whole weights."""
    run = Run.find(storage, name)
    if run is None:
        raise SpecError(
            f"distil.run = {name}",
            f"no such run in {shown(absolute(storage))}",
            "a teacher is another run of the storage",
            "name another storage with --storage",
        )
    made = run.compressed()
    has_whole = run.model() is not None and not run.spec().keeps_base
    if run.status != "completed" or not has_whole or (made and made["packed"]):
        raise SpecError(
            f"distil.run = {name}",
            "is not complete" if run.status != "completed" else "has no whole weights of its own",
            "a teacher stays what it is while a student learns, and is read whole",
            "let it end, or give a run that was trained whole",
        )
    return run


def make_origin(kept: Mapping[str, Any], storage: str) -> Origin:
    """An origin as a run of this storage keeps it."""
    return RunWeights(absolute(storage), **kept) if "run" in kept else Pretrained(**kept)


@contextmanager
def held(origin: Origin | None) -> Iterator[None]:
    """Keep retention from deleting the checkpoint while the block runs, if it is one."""
    if not isinstance(origin, RunWeights):
        yield
        return
    run, info = origin.find()
    with run.hold(info):
        yield


def open_weights(origin: Origin) -> Weights:
    """What ranks read. Raises UserError if it is gone."""
    if isinstance(origin, RunWeights):
        return _CheckpointWeights(*origin.find(), origin.config())
    from dray.models.folder import FolderWeights

    return FolderWeights(origin.folder())


@dataclass(frozen=True)
class _CheckpointWeights:
    """The tensors of a checkpoint as weights of a model."""

    run: Run
    info: CheckpointInfo
    made_for: Mapping[str, Any]
    key: str = "model.run"

    @property
    def name(self) -> str:
        return f"run {self.run.name}, step {self.info.step}"

    def config(self) -> Mapping[str, Any]:
        return self.made_for

    def open(
        self, model: Any, opened: ExitStack, *, headers_only: bool = False
    ) -> Sequence[Stored]:
        from dray.models.weights import Stored, name_in, shapes_of

        opened.enter_context(self.run.hold(self.info))
        reader = opened.enter_context(CheckpointReader(self.run, self.info))

        def read(name: str, state: str) -> Any:
            return reader.read(name, state).reshape(reader.shape(name))

        known = shapes_of(model)
        return [
            Stored(
                name_in(model, name, known), name, reader.shape(name), partial(read, name, state)
            )
            for state in ("param", "buffer")
            for name in reader.names(state)
        ]
