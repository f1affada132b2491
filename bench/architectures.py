"""`make models`: which of transformers' architectures dray trains, and why not the others.

For each model type of the installed transformers that has a causal, masked, sequence- or
token-classification head: a tiny model by name and sizes through dray's own path, counted without
memory, and trained two steps under ZeRO 0 by one rank and under ZeRO 3 by two. The losses must be
finite, change, and agree. Each stage runs in forks of its own with a time limit, so that what hangs
or dies costs only itself. What was found is kept in bench/results/architectures.json after each
model: a run that is stopped goes on there, for the same versions. Writes docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from bench.report import RESULTS, ROOT
from dray.models.build import build_model
from dray.models.config import auto_class
from dray.models.counting import count_model
from dray.models.groups import parameter_groups
from dray.plan import make_plan, parse_shape
from dray.rank.engine import build_engine
from dray.rank.group import Ranks, build_ranks
from dray.rank.loop import preload
from dray.rank.rehearsal import make_rows
from dray.spec import Spec, make_spec
from dray.spec.tasks import make_task
from dray.tasks.causal_lm import CausalLM
from dray.tasks.masked_lm import MaskedLM
from dray.tasks.sequence_classification import SequenceClassification
from dray.tasks.token_classification import TokenClassification

TASKS = {
    task.name: task for task in (CausalLM, MaskedLM, SequenceClassification, TokenClassification)
}
PLACES = ((0, 1), (3, 2))
"""ZeRO stages, and by how many ranks."""
VOCAB, LABELS, ROW_TOKENS, ROWS, STEPS = 320, 3, 32, 4, 2
AGREES = 1e-4
"""Relative difference of two stages' losses that sums in another order may make."""
MOST_PARAMETERS = 80_000_000
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4}
SMALL: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "n_shared_experts": 1,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "num_expert_group": 1,
    "num_experts_per_token": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 16,
    "ngram_vocab_size_base": 100,
    "ple_embed_dim": 16,
    "entity_vocab_size": 10,
    "decoder_vocab_size": 320,
    "shape_vocab_size": 10,
    "pronunciation_vocab_size": 10,
}
"""Options that make a model small, where its configuration has them."""
NEEDED: dict[str, dict[str, Any]] = {
    "mamba2": {"options": {"num_heads": 8}},
}
"""What an architecture needs besides, to be built at this size."""
PAGE = ROOT / "docs" / "models.md"
KEPT = RESULTS / "architectures.json"


@dataclass
class Found:
    """What became of an architecture with a head."""

    architecture: str
    task: str
    num_parameters: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of each step, by ZeRO stage."""
    options: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0

    @property
    def trains(self) -> bool:
        return not self.problem


# ---- one rank ----------------------------------------------------------------------------------


def tiny_spec(architecture: str, task: str, stage: int = 0, num_ranks: int = 1) -> Spec:
    """A spec of the architecture at its smallest."""
    labelled = {"label": "label"} if "label" in make_task(task).fields else {}
    source = {"path": "none", **labelled}
    return make_spec(
        {
            "name": "tiny",
            "task": task,
            "data": {"train": source, "sequence_tokens": ROW_TOKENS},
            "tokenizer": {"train": "byte_bpe", "vocab_size": VOCAB},
            "model": {"architecture": architecture} | SIZES | needed(architecture),
            "batch": {"global_rows": ROWS, "micro_rows": 2},
            "duration": {"steps": STEPS},
            "precision": "fp32",
            "resources": {"workers": num_ranks},
            "zero": {"stage": stage},
            "engine": {"compile": False},
        }
    )


def needed(architecture: str) -> dict[str, Any]:
    """What the model section says besides the sizes."""
    from transformers import CONFIG_MAPPING

    own = dict(NEEDED.get(architecture, {}))
    try:
        default = CONFIG_MAPPING[architecture]()
    except Exception:  # its problem is told when dray makes it
        return own
    known = {*default.to_dict(), *default.attribute_map}
    small = {name: value for name, value in SMALL.items() if name in known}
    return own | {"options": small | own.get("options", {})}


def count(ranks: Ranks, architecture: str, task: str) -> tuple[int, dict[str, Any]]:
    """(parameters, options) of the model, counted without memory."""
    spec = tiny_spec(architecture, task)
    found = count_model(spec, vocab_size=VOCAB, num_labels=LABELS, pad_token_id=1)
    return found.count.total, dict(spec.model.options)


def train(ranks: Ranks, architecture: str, task: str, stage: int) -> tuple[int, list[float]]:
    """(parameters, the loss of each step) of a run of two steps."""
    spec = tiny_spec(architecture, task, stage, ranks.num_ranks)
    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=64GB)"), with_ray=False)
    corpus = SimpleNamespace(
        pad_token_id=1, labels=tuple("abc")[:LABELS], mask_token_id=2, vocab_size=VOCAB
    )
    bound = spec.task.on(corpus)
    engine = build_engine(
        lambda constructing, gathering: build_model(
            spec,
            vocab_size=VOCAB,
            num_labels=LABELS,
            labels=corpus.labels,
            pad_token_id=1,
            eos_token_id=0,
            constructing=constructing,
            gathering=gathering,
        ),
        lambda model: parameter_groups(model, spec.optimizer.weight_decay),
        spec.optimizer,
        plan,
        ranks,
        make_objective=bound.objective,
    )
    rows = make_rows(bound, num_rows=ROWS, width=ROW_TOKENS, vocab_size=VOCAB, num_labels=LABELS)
    share = ROWS // ranks.num_ranks
    mine = rows.slice(ranks.rank * share, share)
    batches = [bound.collate(mine.slice(at, 2)) for at in range(0, share, 2)]
    (targets,) = ranks.sum([sum(bound.num_targets(batch) for batch in batches)])
    engine.train(True)
    losses = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(batches):
            torch.manual_seed(step)
            terms, _ = engine(batch)
            summed, _ = terms["loss"]
            mean = summed * (ranks.num_ranks / targets)
            engine.backward(mean, last=index == len(batches) - 1)
            total += summed.detach().double()
        update = engine.step(1e-3)
        if not update.applied:
            raise ArithmeticError(f"the gradient's norm is {float(update.grad_norm)}")
        losses.append(float(ranks.total(total)) / targets)
    sizes = (math.prod(shape) for shape in engine.parameter_shapes.values())
    return sum(sizes), losses


# ---- groups of ranks ---------------------------------------------------------------------------


class Failed(Exception):
    """A group of ranks that did not do its work: what the first of them said, in a line."""


def run_group(
    work: Callable[..., Any], num_ranks: int, *arguments: Any, limit_seconds: float
) -> Any:
    """What rank 0 returns of `work(ranks, *arguments)` in so many forks of this process. Raises
    Failed."""
    fork = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(num_ranks)]
        processes = [
            fork.Process(
                target=_run_rank,
                args=(pipes[rank][1], _Place(folder, rank, num_ranks), work, arguments),
            )
            for rank in range(num_ranks)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        try:
            return _collect([ours for ours, _ in pipes], time.monotonic() + limit_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], until: float) -> Any:
    """Rank 0's answer, once all have answered. Raises Failed with the first problem."""
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise Failed("took too long")
        for pipe in ready:
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "its process died"
            if not ok:
                raise Failed(value)
            found[waiting[pipe]] = value  # type: ignore[index]
    return found[0]


@dataclass(frozen=True)
class _Place:
    """Where the ranks of a group meet, and which one this is."""

    folder: str
    rank: int
    num_ranks: int


def _run_rank(pipe: Connection, place: _Place, work: Callable[..., Any], arguments: Any) -> None:
    rank, num_ranks = place.rank, place.num_ranks
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store = dist.FileStore(f"{place.folder}/rendezvous", num_ranks)
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store)
        pipe.send((True, work(build_ranks(torch.device("cpu"), 120), *arguments)))
        dist.barrier()  # a rank that leaves early breaks its neighbours' connections
    except BaseException as error:
        pipe.send((False, _say(error)))
    # torch 2.13: a gloo thread that drops its last tensor while Python finalises aborts the
    # process.
    os._exit(0)


def _say(error: BaseException) -> str:
    """An error on one line, without the places in memory and on disk that it names."""
    text = " ".join(str(error).split()) or "without a word"
    text = re.sub(r"0x[0-9a-f]+|/\S+/", "…", text)
    name = type(error).__name__
    return (text if name.endswith("SpecError") else f"{name}: {text}")[:240]


# ---- all of them -------------------------------------------------------------------------------


def find_cases() -> list[tuple[str, str]]:
    """Every architecture with each of the heads that it has."""
    return sorted(
        (architecture, name)
        for name, task in TASKS.items()
        for architecture in auto_class(task().head)._model_mapping._model_mapping
    )


def examine(architecture: str, task: str, limit_seconds: float) -> Found:
    """Count and train one."""
    begun, found = time.monotonic(), Found(architecture, task)
    where = "configuration"
    try:
        counted, found.options = run_group(
            count, 1, architecture, task, limit_seconds=limit_seconds
        )
        found.num_parameters = counted
        if counted > MOST_PARAMETERS:
            raise Failed(f"has {counted:,} parameters at its smallest")
        for stage, num_ranks in PLACES:
            where = f"ZeRO {stage}"
            number, losses = run_group(
                train, num_ranks, architecture, task, stage, limit_seconds=limit_seconds
            )
            found.losses[str(stage)] = losses
            if number != counted:
                raise Failed(f"has {number:,} parameters, counted were {counted:,}")
            if not all(math.isfinite(loss) for loss in losses) or losses[0] == losses[-1]:
                raise Failed(f"its losses are {losses}")
        where = "stages"
        apart = max(
            abs(one - other) / abs(one) for one, other in zip(*found.losses.values(), strict=True)
        )
        if apart > AGREES:
            raise Failed(f"their losses differ by {apart:.1e}: {found.losses}")
    except Failed as failure:
        found.problem = f"{where}: {failure}"
    found.seconds = time.monotonic() - begun
    return found


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", "deepspeed")}


def load_kept() -> dict[tuple[str, str], Found]:
    """What an earlier run found with these versions."""
    try:
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if kept["versions"] != versions():
        return {}
    return {(one["architecture"], one["task"]): Found(**one) for one in kept["found"]}


def keep(found: dict[tuple[str, str], Found]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"versions": versions(), "found": [asdict(found[key]) for key in sorted(found)]}, indent=1
    )
    made = KEPT.with_suffix(".partial")
    made.write_text(text, encoding="utf-8")
    made.rename(KEPT)


# ---- the page ----------------------------------------------------------------------------------


def write_page(found: dict[tuple[str, str], Found]) -> None:
    """docs/models.md."""
    used = versions()
    by_task = {task: [one for one in found.values() if one.task == task] for task in TASKS}
    lines = [
        INTRODUCTION.format(**used, agrees=AGREES),
        "| task | trains | of |\n|---|--:|--:|",
        *(
            f"| `{task}` | {sum(one.trains for one in ones)} | {len(ones)} |"
            for task, ones in by_task.items()
        ),
        "\n## What trains\n",
        f"| architecture | {' | '.join(f'`{task}`' for task in TASKS)} | options |",
        f"|---|{':-:|' * len(TASKS)}---|",
        *_rows(found),
        "\n## What does not, and why\n",
        "| architecture | task | why |\n|---|---|---|",
        *(
            f"| {one.architecture} | `{one.task}` | {_cell(one.problem)} |"
            for _, one in sorted(found.items())
            if not one.trains
        ),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


INTRODUCTION = """\
# Architectures

<!-- Written by `make models`. -->

Every model type of transformers {transformers} that has a head for one of these tasks, tiny, by
name and sizes: counted without memory, built, and trained two steps under ZeRO 0 by one rank and
under ZeRO 3 by two (CPU, fp32, torch {torch}, DeepSpeed {deepspeed}). It trains where as many
parameters are built as were counted, and where the losses are finite, change, and agree under both
stages to {agrees:g}. That says nothing of what it learns at its real size. Numbers of experts,
ranks and states are made small where a configuration has them. ✓: by name and sizes alone; ○: with
the options that are named besides.
"""


def _rows(found: dict[tuple[str, str], Found]) -> Iterator[str]:
    for architecture in sorted({name for name, _ in found}):
        ones = {task: found.get((architecture, task)) for task in TASKS}
        if not any(one is not None and one.trains for one in ones.values()):
            continue
        settings = NEEDED.get(architecture, {})
        options = {**settings.get("options", {})} | {
            name: value for name, value in settings.items() if name != "options"
        }
        mark = "○" if options else "✓"
        marks = ("" if one is None else mark if one.trains else "–" for one in ones.values())
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        yield f"| {architecture} | {' | '.join(marks)} | {words} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures whose name this expression finds")
    parser.add_argument("--again", action="store_true", help="those that failed before, too")
    parser.add_argument("--limit-seconds", type=float, default=120.0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads, which a fork would lose
    preload()
    cases, found = find_cases(), load_kept()
    wanted = [
        case
        for case in cases
        if re.search(options.only, case[0])
        and (case not in found or (options.again and not found[case].trains))
    ]
    begun = time.monotonic()
    for number, (architecture, task) in enumerate(wanted, 1):
        one = examine(architecture, task, options.limit_seconds)
        found[architecture, task] = one
        keep(found)
        print(
            f"{number}/{len(wanted)} {architecture} {task}: {one.problem or 'trains'} "
            f"({one.seconds:.1f} s)",
            file=sys.stderr,
            flush=True,
        )
    counts = Counter(one.trains for one in found.values())
    print(
        f"{counts[True]} of {len(found)} train; {time.monotonic() - begun:.0f} s", file=sys.stderr
    )
    if all(case in found for case in cases):
        write_page({case: found[case] for case in cases})


if __name__ == "__main__":
    main()
