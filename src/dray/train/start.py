"""From a spec and a storage to a run that can be driven: what begins here, and what goes on.

All that needs neither data nor Ray is checked first (`look`), so that what must be refused is
refused before anything is read or written. A run that has begun needs nothing but its storage: its
rows, its tokeniser and its configuration are those that it keeps, and its weights those of its
newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dray.corpus.manifest import MANIFEST, dump_manifest, load_manifest
from dray.corpus.prepare import (
    Corpus,
    corpus_key,
    describe_changes,
    find_models,
    with_tokenizer_folder,
)
from dray.corpus.tokenizer_folder import TOKENIZER_JSON
from dray.corpus.tools import FILES
from dray.errors import CorpusError, PlanError, SpecError, StoreError, one_line, translated
from dray.models.counting import make_counted_plan
from dray.models.source import Pretrained, check_weights, find_pretrained
from dray.origin import (
    Origin,
    RunWeights,
    find_run_weights,
    find_teacher,
    make_origin,
    open_weights,
)
from dray.plan import (
    Plan,
    Shape,
    describe_law,
    format_bytes,
    free_disk_bytes,
    make_demands,
    with_numbers,
)
from dray.privacy import check_privacy, keep_noise
from dray.rank.job import Job, make_corpus_plan
from dray.runs import (
    Run,
    check_identity,
    check_storage,
    check_trackers,
    find_begun,
    find_origin,
    find_resume_checkpoint,
    moved_paths,
    open_or_create,
)
from dray.runs.layout import check_run_name
from dray.spec import OPTIMIZERS, Model, Spec, without_places
from dray.storage.filesystem import (
    absolute,
    exists,
    is_local,
    list_files,
    open_filesystem,
    read_bytes,
    shown,
    write_bytes,
)

_SHAPING = (
    "architecture",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "vocab_size",
    "tie_embeddings",
)
"""What of a model decides the shapes of its weights."""
Say = Callable[[str], None]
Prepare = Callable[[Spec], Corpus]
"""Finds a spec's corpus or makes it."""


@dataclass(frozen=True)
class Start:
    """What a call of `train` is about."""

    spec: Spec
    """The caller's, with what a run that has begun decided then."""
    storage: str
    name: str
    fork: str | None
    """Name of the fork of `name` that is wanted."""
    run: Run | None
    """The run, if it has begun already."""
    keeper: Run | None
    """Whose record says what the inputs were: the run's own or, for a new fork, its origin's."""

    @property
    def keeps_rows(self) -> bool:
        """Whether the rows are those that the keeper has: a fork with other data gets its own."""
        if self.run is not None or self.keeper is None:
            return self.run is not None
        before, now = (
            without_places(self.keeper.record()["identity"]),
            without_places(self.spec.identity()),
        )
        return all(before[key] == now[key] for key in ("task", "data", "tokenizer")) and not _moved(
            self.keeper, self.spec, ("task", "data", "tokenizer")
        )


def look(spec: Spec, storage: str, run_name: str | None = None, fork: str | None = None) -> Start:
    """Find out what is wanted and whether it can be. Writes nothing; reads raw data only where the
    spec names other paths than the run began with. Raises UserError."""
    name = check_run_name(spec.name if run_name is None else run_name)
    if fork is not None:
        check_run_name(fork)
    check_storage(storage)
    check_trackers(spec, storage)
    spec.optimizer.check_package()
    if spec.adapters is not None:
        spec.adapters.check_packages()
    run = find_begun(storage, name, fork)
    if spec.distil is not None and (run is None or run.status != "completed"):
        find_teacher(storage, spec.distil.run)
    keeper = run or (find_origin(storage, name)[0] if fork else None)
    if (
        keeper is not None and spec.precision == "auto"
    ):  # a run that is resumed on other hardware computes as it began
        spec = spec.model_copy(update={"precision": keeper.record()["identity"]["precision"]})
    if keeper is not None and spec.is_auto:
        began = keeper.record()["identity"]
        rate, rows = began["optimizer"]["learning_rate"], began["batch"]["global_rows"]
        spec = with_numbers(spec, rate, rows)
    if run is not None:
        check_identity(run, spec)
        _check_moved(run, spec)
    elif keeper is not None:
        _check_same_shape(keeper, spec)
        _check_same_states(keeper, spec)
        _check_same_base(keeper, spec)
    return Start(spec, storage, name, fork, run, keeper)


def open_run(
    start: Start,
    shape: Shape,
    prepared: Prepare,
    say: Say,
    *,
    corpus: Corpus | None = None,
    with_ray: bool = True,
) -> tuple[Run, Job]:
    """Begin the run or take it up, and describe it to the workers. Raises UserError; before the
    run's folder is made nothing is written but the corpus."""
    spec = start.spec
    origin, config = _find_model(start)
    if not start.keeps_rows:  # what cannot run is refused before the corpus is read
        if origin is not None or spec.model.options or spec.trains_part:
            # Its model is built here to be checked: so it is counted here, not by another process.
            from dray.models.build import import_transformers

            import_transformers()
        given = with_tokenizer_folder(spec, start.storage)
        plan = make_counted_plan(given, shape, with_ray=with_ray, config=config)
        _check_disk(start, spec, plan)
        spec = spec.model_copy(
            update={"precision": plan.precision} if spec.precision == "auto" else {}
        )
        looks = origin is not None or spec.model.options or spec.trains_part
        if looks or not plan.parameters_exact:
            _check_model(spec, given.tokenizer.path, origin, config)
    if corpus is not None:
        _check_width(spec, corpus)
    corpus = corpus or _find_corpus(start, spec, prepared, say)
    spec.task.check(corpus.manifest)
    plan = make_corpus_plan(spec, shape, corpus.manifest, with_ray=with_ray, config=config)
    _check_disk(start, spec, plan)
    if spec.is_auto and plan.law is not None:
        spec = with_numbers(spec, plan.law.learning_rate, plan.law.global_rows)
        say(describe_law(plan.law))
    if origin is not None:
        if start.run is not None and (spec.keeps_base or find_resume_checkpoint(start.run) is None):
            origin.check()
        origin = origin.pinned()
    if start.run is None and start.keeper is not None:
        before = start.keeper.record()["identity"]["regularization"]
        for average in ("ema", "swa"):
            if getattr(spec.regularization, average) is not None and not before.get(average):
                say(
                    f"{start.keeper.name} kept no {average} of its weights: it begins with the fork"
                )
    origin_of_fork = start.keeper if start.run is None else None
    check_privacy(spec, corpus.manifest, plan.num_steps or 0, start.run, origin_of_fork)
    run = open_or_create(
        start.storage,
        start.name,
        spec,
        plan.model_dump(mode="json"),
        corpus=corpus.folder,
        corpus_key=corpus.manifest.key,
        fork=start.fork,
    )
    if (
        origin is not None
        and config is not None
        and (run.model() or {}).get("pretrained") != origin.to_json()
    ):
        run.keep_model(config, origin.to_json())
    if spec.keeps_base and isinstance(origin, RunWeights):
        origin.keep_for(run.name)
    _keep_corpus(run, corpus)
    keep_noise(run, spec, corpus.manifest, plan.num_steps or 0)
    return run, Job(
        spec,
        plan,
        corpus.folder,
        corpus.manifest,
        run.storage,
        run.name,
        config,
        origin,
        run_nonce=str(run.record().get("nonce", "")),
    )


def _check_disk(start: Start, spec: Spec, plan: Plan) -> None:
    """Raise PlanError where the storage is a disk with less room than the run will take for the
    checkpoints that it keeps: it would train, and save nothing."""
    filesystem, path = open_filesystem(start.storage)
    run = start.run
    if not is_local(filesystem):
        return
    there = run.checkpoints(verified_only=False) if run is not None else []
    if there and there[-1].step >= (plan.num_steps or math.inf):
        return  # it has done all its steps
    demands = make_demands(spec, plan)
    # How many there will be is not known before the corpus is, nor without a speed to go by.
    at_once = 1 if demands.num_checkpoints is None else demands.kept_checkpoints
    held = sum(info.num_bytes for info in there)
    needed, free = at_once * plan.checkpoint_bytes - held, free_disk_bytes(path)
    if needed <= free:
        return
    each = format_bytes(plan.checkpoint_bytes)
    kept = f"{at_once} of {each} at once" if at_once > 1 else each
    fewer = spec.checkpoint.keep_last + spec.checkpoint.keep_best > 1
    raise PlanError(
        f"--storage {shown(start.storage)}",
        f"has {format_bytes(free)} free",
        f"the run's checkpoints take {format_bytes(needed)}{' more' if held else ''} ({kept})",
        f"{'keep fewer (checkpoint.keep_last=1), ' if fewer else ''}free some, or name another "
        "--storage",
    )


# ---- rows --------------------------------------------------------------------------------------


def _find_corpus(start: Start, spec: Spec, prepared: Prepare, say: Say) -> Corpus:
    """The corpus on the keeper's record, wherever the raw files are by now; else the spec's own."""
    keeper = start.keeper
    folder = keeper.corpus if keeper is not None and start.keeps_rows else ""
    if keeper is None or not folder:
        return prepared(spec)
    filesystem, path = open_filesystem(folder)
    if not exists(filesystem, f"{path}/{MANIFEST}"):
        return _make_corpus_again(keeper, folder, spec, prepared, say)
    corpus = Corpus(folder, load_manifest(filesystem, path))
    if changes := describe_changes(spec, corpus):
        say(f"{keeper.name} keeps the rows it began with: {changes}")
    return corpus


def _check_width(spec: Spec, corpus: Corpus) -> None:
    """Raise SpecError for a given corpus that was prepared for rows of another length."""
    if corpus.manifest.sequence_tokens != spec.data.sequence_tokens:
        raise SpecError(
            f"data.sequence_tokens = {spec.data.sequence_tokens}",
            f"the corpus {corpus.manifest.key} that was given has rows of "
            f"{corpus.manifest.sequence_tokens} tokens",
            "a run reads the corpus of its spec",
            "give prepare(spec, storage)",
        )


def _make_corpus_again(keeper: Run, folder: str, spec: Spec, prepared: Prepare, say: Say) -> Corpus:
    """A corpus that was deleted comes back row by row where the raw files still hold what they
    held."""
    if not _holds_the_same(keeper, spec):
        raise StoreError(
            f"run {keeper.name!r}",
            f"its corpus is gone from {shown(folder)}",
            "a run keeps the rows it began with",
            "put that folder back, or name another run with --run",
        )
    say(
        f"the corpus of {keeper.name} is gone from {shown(folder)}: it is prepared again from the "
        "same files"
    )
    return prepared(spec)


def _keep_corpus(run: Run, corpus: Corpus) -> None:
    """Keep in the run what a model must know of its corpus: the manifest, and before it the
    tokeniser and the files that its task goes by."""
    filesystem, path = open_filesystem(run.corpus_copy)
    if exists(filesystem, f"{path}/{MANIFEST}"):
        return
    source, folder = open_filesystem(corpus.folder)
    for part in ("tokenizer", FILES):
        for name in list_files(source, f"{folder}/{part}"):
            content = read_bytes(source, f"{folder}/{part}/{name}")
            write_bytes(filesystem, f"{path}/{part}/{name}", content)
    write_bytes(filesystem, f"{path}/{MANIFEST}", dump_manifest(corpus.manifest))


# ---- inputs that lie elsewhere -----------------------------------------------------------------


def _moved(run: Run, spec: Spec, sections: tuple[str, ...]) -> list[str]:
    return [path for path in moved_paths(run, spec) if path.partition(".")[0] in sections]


def _check_moved(run: Run, spec: Spec) -> None:
    """Raise StoreError if the spec names other inputs than the run began with, and they hold
    something else."""
    moved = _moved(run, spec, ("task", "data", "tokenizer"))
    if moved and not _holds_the_same(run, spec):
        raise _other_inputs(run, moved)
    if _moved(run, spec, ("model",)):
        kept = (run.model() or {}).get("pretrained")
        began = kept["place"] if kept else run.record()["identity"]["model"]["path"]
        place = (
            find_pretrained(str(spec.model.path)).place if kept else absolute(str(spec.model.path))
        )
        if place != began and not (
            kept and find_pretrained(str(spec.model.path)).pinned().digest == kept["digest"]
        ):
            raise _other_inputs(run, ["model.path"])


def _other_inputs(run: Run, moved: list[str]) -> StoreError:
    return StoreError(
        f"run {run.name!r}",
        f"its spec differs in {', '.join(moved)}",
        "a run keeps its identity, and what lies there is not what it began with",
        "undo the change, name another run with --run, or start from its newest checkpoint with "
        "--fork NEW_NAME",
    )


def _holds_the_same(run: Run, spec: Spec) -> bool:
    """Whether the raw files that the spec names now would become the run's corpus."""
    try:
        own = with_tokenizer_folder(spec, run.storage)
        kept = (run.model() or {}).get("pretrained")
        models = find_models(own, run.storage, kept and make_origin(kept, run.storage))
        return bool(corpus_key(own, **models) == run.record()["corpus_key"])
    except CorpusError:
        return False


# ---- the model ---------------------------------------------------------------------------------


def _find_model(start: Start) -> tuple[Origin | None, Mapping[str, Any] | None]:
    """Where the initial weights lie, and the configuration: as the keeper has them, else as found
    now."""
    kept = start.keeper.model() if start.keeper is not None else None
    model = start.spec.model
    if not model.origin:
        return None, kept["config"] if kept and start.run is not None else None
    before = kept["pretrained"] if kept else None
    if kept and before and (start.run is not None or _names_the_same(before, model)):
        origin = make_origin(before, start.storage)
        if isinstance(origin, Pretrained):
            origin = _at_its_new_place(origin, str(model.path))
        return origin, kept["config"]
    if model.run:
        found = find_run_weights(start.storage, model.run, model.step)
        return found, found.config()
    from dray.models.config import read_config

    pretrained = find_pretrained(str(model.path))
    folder = pretrained.folder()
    check_weights(folder)
    return pretrained, read_config(folder)


def _names_the_same(kept: Mapping[str, Any], model: Model) -> bool:
    """Whether a fork names the weights that its origin started from."""
    return kept.get("run") == model.run and kept.get("path") == model.path


def _at_its_new_place(kept: Pretrained, path: str) -> Pretrained:
    """A folder that the spec names by another path holds the same (`_check_moved`), and is read
    there."""
    if path in (kept.path, kept.place):
        return kept
    return Pretrained(path, find_pretrained(path).place, kept.digest)


def _check_same_shape(origin: Run, spec: Spec) -> None:
    """Raise SpecError for a fork whose model cannot take the weights of its origin's checkpoint."""
    before, now = origin.record()["identity"]["model"], spec.identity()["model"]
    if changed := [
        f"model.{name}"
        for name in _SHAPING
        if None not in (before.get(name), now.get(name)) and before[name] != now[name]
    ]:
        raise SpecError(
            f"--fork of {origin.name}",
            f"its spec differs in {', '.join(changed)}",
            "a fork goes on with the weights of its origin, which have another shape",
            "undo the change, or begin another run with --run",
        )


def _check_same_states(origin: Run, spec: Spec) -> None:
    """Raise SpecError for a fork whose optimiser cannot go on with what its origin's kept."""
    given = origin.record()["identity"]["optimizer"]
    before, now = OPTIMIZERS[given["name"]].model_validate(given), spec.optimizer
    if not now.keeps_as(before):
        raise SpecError(
            f"--fork of {origin.name}",
            f"its optimiser was {before.name}{'' if before.name != now.name else ' otherwise'}, "
            f"the spec's is {now.name}",
            "a fork goes on with what the optimiser of its origin kept",
            "undo the change, or begin another run with model.run",
        )


def _check_same_base(origin: Run, spec: Spec) -> None:
    """Raise SpecError for a fork that trains another part of its origin's model, or another model:
    what is not trained is in no checkpoint."""
    before, now = origin.record()["identity"], spec.identity()
    keys = ["adapters", "freezing", *(["task"] if spec.task.adds else [])]
    if spec.keeps_base:
        keys += ["model", *(["seed"] if not spec.model.origin else [])]
    if changed := [key for key in keys if before.get(key) != now.get(key)]:
        raise SpecError(
            f"--fork of {origin.name}",
            f"its spec differs in {', '.join(changed)}",
            "a checkpoint holds what is trained, and the rest is made again from the spec",
            "undo the change, or begin another run with model.run or model.path",
        )


def _check_model(
    spec: Spec, tokenizer: str | None, origin: Origin | None, config: Mapping[str, Any] | None
) -> None:
    """Raise SpecError for a model that transformers does not know, that cannot take the spec's
    settings, or whose weights are not those of its configuration or of the spec's tokeniser, which
    lies in the folder `tokenizer` unless it is trained."""
    from dray.models.build import check_builds, check_trains
    from dray.models.config import check_vocabulary, make_config
    from dray.models.weights import check_fit

    vocab_size = (tokenizer and _count_tokens(tokenizer)) or spec.tokenizer.vocab_size
    kept = None
    if isinstance(origin, RunWeights) and config is not None:
        if spec.task.tokenizes:
            check_vocabulary(spec, config, origin.tokenizer_folder, vocab_size, tokenizer or "")
        kept = config
    model = check_builds(spec, make_config(spec, vocab_size=vocab_size, kept=kept))
    if origin is not None:
        check_fit(model, open_weights(origin))
    check_trains(model, spec)


def _count_tokens(folder: str) -> int | None:
    """Tokens of a folder's tokenizer.json; None if it has none. Raises SpecError."""
    from tokenizers import Tokenizer

    filesystem, path = open_filesystem(folder)
    if not exists(filesystem, f"{path}/{TOKENIZER_JSON}"):
        return None
    content = read_bytes(filesystem, f"{path}/{TOKENIZER_JSON}")
    with translated(
        lambda error: SpecError(
            "tokenizer.path", f"{path}/{TOKENIZER_JSON} cannot be loaded ({one_line(error)})"
        )
    ):
        return int(Tokenizer.from_str(content.decode()).get_vocab_size())
