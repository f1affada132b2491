"""How long a step takes on this machine: measured on thin copies of the model, and kept.

Copies with one and with three blocks take a few steps through dray's own engine, in as many
processes as the plan has ranks; what a block and what the rest costs follows from the two, and a
model of any depth from these. The tables and matrices have their real sizes, the rows their real
length, so that caches, threads, ZeRO's copies and the collectives count as they will. It reads no
data, and needs no Ray. Reading what is kept imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dray.errors import PlanError
from dray.plan import Dimensions, Plan, load_dimensions
from dray.processes.heap import prepare_process
from dray.spec import Spec
from dray.storage.cache import cache_folder

if TYPE_CHECKING:
    from dray.rank.chance import Chance
    from dray.rank.engine import Engine
    from dray.rank.group import Ranks
    from dray.rank.passes import Passes

NUM_BLOCKS = (1, 3)
"""Blocks of the two thin copies."""
WARM_STEPS, NUM_STEPS = 1, 3
RAY_SHARE = 0.93
"""Speed that is left to the ranks beside the processes of a local Ray and the reader."""
Config = Mapping[str, Any] | None
_LIBRARIES = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of a rank, for the whole model: of a micro batch's two passes, and of the last micro
    batch of a step with what follows it, the reduction and the update."""

    micro_seconds: float
    last_seconds: float

    def step_seconds(self, accumulation: int) -> float:
        """Seconds of a step of so many micro batches, under Ray."""
        return ((accumulation - 1) * self.micro_seconds + self.last_seconds) / RAY_SHARE


def find_rehearsal(spec: Spec, plan: Plan, config: Config = None) -> Rehearsal | None:
    """What was measured for such a plan on this machine, if anything was. `config`: of the run that
    the model starts from, if it does."""
    try:
        return Rehearsal(**json.loads(_place(spec, plan, config).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or not ours: it is measured anew
        return None
    except metadata.PackageNotFoundError:  # planned where nothing can be trained
        return None


def rehearse(spec: Spec, plan: Plan, config: Config = None) -> Rehearsal:
    """Measure the plan's step on this machine, some 20 to 60 s, and keep it. Raises PlanError for
    ranks on GPUs."""
    if plan.on_gpu:
        raise PlanError(
            "--measure",
            f"the plan's {plan.num_ranks} workers run on GPUs",
            "a rehearsal measures this machine's CPUs",
            "the first steps of the run tell its speed",
        )
    if not spec.task.tokenizes:
        raise PlanError(
            "--measure",
            f"rows of {spec.task.name} are no tokens",
            "a rehearsal draws tokens for its rows",
            "the first steps of the run tell its speed",
        )
    if spec.task.adds:
        raise PlanError(
            "--measure",
            f"{spec.task.name} adds a part to a model that stays as it is",
            "a rehearsal takes a model's blocks to cost alike",
            "the first steps of the run tell its speed",
        )
    import torch.multiprocessing

    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="dray-rehearsal-") as folder:
        spawn(_run_rank, args=(spec, plan, config, folder), nprocs=plan.num_ranks)
        ranks = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(folder).glob("rank-*.json"))
        ]
    sizes = load_dimensions(spec, config=config, counted=plan.counted)
    slowest = [
        {name: max(rank[index][name] for rank in ranks) for name in ("micro", "last")}
        for index in range(len(NUM_BLOCKS))
    ]
    # A block of a thin copy is one of the encoder and one of the decoder, where there are both.
    num_blocks = sizes.layers // 2 if spec.task.head.behind_encoder else sizes.layers
    found = Rehearsal(
        *(_extend([thin[name] for thin in slowest], num_blocks) for name in ("micro", "last"))
    )
    place = _place(spec, plan, config)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def _extend(seconds: list[float], num_blocks: int) -> float:
    """The straight line through the two thin copies, at the model's depth. A block costs no less
    than nothing."""
    (few, many), (short, long) = NUM_BLOCKS, seconds
    a_block = max(0.0, (long - short) / (many - few))
    return short + a_block * (num_blocks - few)


def _place(spec: Spec, plan: Plan, config: Config = None) -> Path:
    """The file of what is kept: named by all that the time of a step depends on, the number of
    blocks aside."""
    sizes = vars(load_dimensions(spec, config=config, counted=plan.counted)) | {"layers": None}
    known = {
        "machine": [platform.node(), _cpu_name(), plan.shape.cpus_per_node],
        "libraries": [metadata.version(name) for name in _LIBRARIES],
        "sizes": repr(sizes),
        "task": spec.task.name,
        **spec.model_dump(mode="json", include={"adapters", "freezing"}),
        "optimizer": [spec.optimizer.name, spec.regularization.ema is not None],
        "ranks": plan.num_ranks,
        "cpus": spec.resources.cpus_per_worker,
        "precision": plan.precision,
        "micro_rows": plan.batch.micro_rows,
        "tokens": plan.row_tokens,
        "deepspeed": plan.deepspeed,
        "compile": plan.compile,
        "checkpointing": plan.activation_checkpointing,
        "regularization": spec.regularization.model_dump(mode="json"),
        "accumulates": plan.batch.accumulation > 1,
    }
    key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return Path(cache_folder("rehearsals"), f"{key}.json")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )


def _run_rank(rank: int, spec: Spec, plan: Plan, config: Config, folder: str) -> None:
    """Measure the thin copies as one rank of the plan; leave the seconds in a file."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(plan.num_ranks),
        DS_ACCELERATOR="cpu",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch
    import torch.distributed as dist

    from dray.rank.group import build_ranks

    prepare_process(spec.resources.cpus_per_worker)
    store: Any = dist.FileStore(f"{folder}/store", plan.num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=rank, world_size=plan.num_ranks, store=store)
    ranks = build_ranks(torch.device("cpu"), timeout_seconds=600)
    sizes = load_dimensions(spec, config=config, counted=plan.counted)
    seconds = [
        _time_steps(
            *_build_thin(spec, plan, config, ranks, sizes, num_blocks=number),
            spec=spec,
            plan=plan,
            ranks=ranks,
            sizes=sizes,
        )
        for number in NUM_BLOCKS
    ]
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(seconds), encoding="utf-8")
    dist.barrier()
    # torch 2.13: a gloo thread that drops its last tensor while Python finalises aborts the
    # process.
    os._exit(0)


def _build_thin(
    spec: Spec, plan: Plan, config: Config, ranks: Ranks, sizes: Dimensions, *, num_blocks: int
) -> tuple[Engine, Chance, Passes]:
    from dray.models.build import build_model, enable_activation_checkpointing
    from dray.models.groups import parameter_groups
    from dray.rank.chance import Chance
    from dray.rank.engine import build_engine
    from dray.rank.hooks import build_hooks
    from dray.rank.passes import build_passes

    chance = Chance()
    passes = build_passes(spec.regularization, chance)

    def build(constructing: Any, gathering: Any) -> Any:
        model = build_model(
            spec,
            vocab_size=sizes.vocab,
            num_labels=sizes.num_labels,
            pad_token_id=0,
            eos_token_id=0,
            constructing=constructing,
            gathering=gathering,
            config=config,
            num_blocks=num_blocks,
        )
        if plan.activation_checkpointing:
            enable_activation_checkpointing(model, chance.contexts)
        return model

    def surround(model: Any) -> Any:
        objective = _task(spec, sizes).objective(model)
        chance.watch(objective)
        return passes.around(objective)

    engine = build_engine(
        build,
        lambda model: parameter_groups(model, spec.optimizer.weight_decay),
        spec.optimizer,
        plan,
        ranks,
        make_objective=surround,
        hooks=build_hooks(spec, chance),
    )
    return engine, chance, passes


def _time_steps(
    engine: Engine,
    chance: Chance,
    passes: Passes,
    *,
    spec: Spec,
    plan: Plan,
    ranks: Ranks,
    sizes: Dimensions,
) -> dict[str, float]:
    """Seconds of a micro batch before the last, where the plan has any, and of the last one with
    the update: medians, and their mean over the widths where batches differ in width."""
    import numpy as np

    from dray.rank.exploring import explore
    from dray.rank.passes import Micro

    task = _task(spec, sizes)
    tables = [
        make_rows(
            task,
            num_rows=plan.batch.micro_rows,
            width=width,
            vocab_size=sizes.vocab,
            num_labels=sizes.num_labels,
        )
        for width in _widths(spec, plan)
    ]
    engine.train(True)
    found: dict[str, list[list[float]]] = {name: [[] for _ in tables] for name in ("micro", "last")}
    for number in range(len(tables) * (WARM_STEPS + NUM_STEPS)):
        nth = number % len(tables)
        engine.begin_step(number + 1)
        table = tables[nth]
        for index in reversed(range(min(2, plan.batch.accumulation))):
            ranks.barrier()
            begun = time.perf_counter()
            batch = task.collate(table)
            if task.explores:
                (batch,) = explore(engine, task, [batch], ranks)
                engine.train(True)
            with chance.rows(spec.seed, number, np.arange(table.num_rows), ranks.device):
                targets = max(1, task.num_targets(batch))
                backward = partial(_backward, engine, targets, index == 0)
                passes.learn(Micro(engine, engine.probe, backward), batch)
            if index == 0:
                engine.step(1e-6)
            found["micro" if index else "last"][nth].append(time.perf_counter() - begun)
    return {
        name: statistics.fmean(
            statistics.median(seconds[WARM_STEPS:] or [0.0]) for seconds in by_width
        )
        for name, by_width in found.items()
    }


def _backward(engine: Engine, targets: int, is_last: bool, loss: Any, *, last: bool) -> None:
    engine.backward(loss / targets, last=last and is_last)


def _widths(spec: Spec, plan: Plan) -> list[int]:
    """The widths that batches have. Where they differ, a heap that fits one of them is faulted in
    anew for the next."""
    if spec.task.packs:
        return [plan.row_tokens]
    widths = (round(share * plan.row_tokens) for share in (1.5, 0.5, 1.0))
    return [min(spec.data.sequence_tokens, max(1, width)) for width in widths]


def make_rows(task: Any, *, num_rows: int, width: int, vocab_size: int, num_labels: int) -> Any:
    """Random rows as the corpus would give them, each of its full length."""
    import numpy as np
    import pyarrow as pa

    from dray.corpus.packing import Varying
    from dray.corpus.shards import make_batch, stored_columns
    from dray.tasks.rows import VOTES

    random = np.random.default_rng(0)
    columns = stored_columns(task, width, "uint32", num_labels)
    # Rules vote for two labels at least, or keep out.
    most = {"input_ids": vocab_size, "num_tokens": 1, VOTES: 3}
    values: dict[str, Any] = {}
    for column in columns:
        shape = (num_rows * width,) if column.varies else (num_rows, *column.shape)
        drawn = random.integers(0, most.get(column.name, max(1, num_labels)), shape)
        found = drawn.astype(column.dtype)
        lengths = np.full(num_rows, width)
        values[column.name] = Varying(found, lengths) if column.varies else found
    values["num_tokens"][:] = width
    batch = make_batch(columns, values)
    return pa.Table.from_batches([batch]).append_column("row_id", pa.array(np.arange(num_rows)))


def _task(spec: Spec, sizes: Dimensions) -> Any:
    labels = tuple(map(str, range(sizes.num_labels)))
    corpus = SimpleNamespace(
        pad_token_id=0,
        labels=labels,
        label_counts=dict.fromkeys(labels, 1),
        mask_token_id=1,
        vocab_size=sizes.vocab,
    )
    return spec.task.on(corpus, spec.model.num_labels)
