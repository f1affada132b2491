"""The engine's fragments across places: what one ZeRO stage wrote, another reads, at another number of ranks.

Real DeepSpeed in real processes over gloo; the checkpoint goes through dray's own store.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from dray.plan import make_plan, parse_shape
from dray.spec import make_spec
from dray.store import CheckpointReader, CheckpointWriter, Run, make_fragment_key, verify_checkpoint
from tiny import tiny_tree

VOCAB, WIDTH, GLOBAL_ROWS, HALF, STEPS = 256, 32, 12, 3, 6


def make_case(stage: int, ranks: int, precision: str, offload: str) -> Any:
    spec = make_spec(tiny_tree(
        Path("none"), data={"sequence_tokens": WIDTH, "validation": None},
        batch={"global_rows": GLOBAL_ROWS, "micro_rows": 2},
        model={"hidden_size": 32}, resources={"workers": ranks}, zero={"stage": stage, "offload": offload},
        precision=precision, tokenizer={"vocab_size": 258}, duration={"steps": STEPS}))
    # A CPU that is said to compute in bf16: slow here, and exact enough for a tiny model.
    return spec, make_plan(spec, parse_shape("1xCPU(cpus=8,memory=16GB,bf16=1)"), with_ray=False)


def run_rank(rank: int, folder: str, case: tuple[int, int, str, str], resume: bool) -> None:
    """Train steps 1..HALF and save, or restore and train the rest; losses go to a file."""
    stage, ranks_wanted, precision, offload = case
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks_wanted), DS_ACCELERATOR="cpu")
    import torch.distributed as dist

    from dray.engine import build_engine
    from dray.models import build_model, parameter_groups
    from dray.ranks import build_ranks
    from dray.tasks import build_task

    torch.set_num_threads(1)
    spec, plan = make_case(*case)
    name = f"{folder}/rendezvous-{stage}-{ranks_wanted}-{precision}-{offload}-{resume}"
    dist.init_process_group("gloo", rank=rank, world_size=ranks_wanted, store=dist.FileStore(name, ranks_wanted))
    ranks = build_ranks(torch.device("cpu"), 120)
    task = build_task(spec, type("Ids", (), {"pad_token_id": 0, "labels": ()})())
    engine = build_engine(
        lambda constructing, gathering: build_model(
            spec, vocab_size=VOCAB, constructing=constructing, gathering=gathering),
        lambda model: parameter_groups(model, 0.1), spec.optimizer, plan, ranks)
    run = Run.open(folder, "engine")
    if resume:
        with CheckpointReader(run, run.latest_checkpoint()) as reader:
            engine.restore(reader, HALF, {})
    data = torch.randint(0, VOCAB, (STEPS, GLOBAL_ROWS, WIDTH), generator=torch.Generator().manual_seed(1))
    share = GLOBAL_ROWS // ranks_wanted
    losses = []
    for step in range(HALF if resume else 0, STEPS):
        if step == HALF and not resume:
            writer = CheckpointWriter(run, HALF, 1)
            tensors = {make_fragment_key(f.parameter, state, f.start): view.detach()
                       for f in engine.fragments() for state, view in f.states.items()}
            files = ranks.gather(writer.write_rank(rank, ranks_wanted, tensors))
            if rank == 0:
                shapes = {name: list(shape) for name, shape in engine.parameter_shapes.items()}
                writer.commit(files, {"shapes": shapes})
        mine = data[step, rank * share:(rank + 1) * share]
        total, micros = 0.0, range(0, share, 2)
        for at in micros:
            ids = mine[at:at + 2]
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            loss, _ = task.loss_sum(engine, {"input_ids": ids, "labels": labels}, 0.0)
            engine.backward(loss * ranks_wanted / (GLOBAL_ROWS * (WIDTH - 1)), last=at == micros[-1])
            total += float(loss)
        norm = engine.step(1e-3).grad_norm
        losses.append((sum(ranks.gather(total)) / (GLOBAL_ROWS * (WIDTH - 1)), norm))
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    os._exit(0)  # torch 2.13: a gloo thread that drops its last tensor while Python finalises aborts the process


def go(folder: Path, case: tuple[int, int, str, str], resume: bool) -> list[tuple[float, float]]:
    mp.spawn(run_rank, args=(str(folder), case, resume), nprocs=case[1])
    return [tuple(item) for item in json.loads((folder / "losses.json").read_text())]


@pytest.mark.parametrize(
    ("first", "others", "within"),
    [
        ((1, 2, "fp32", "none"), [(0, 1, "fp32", "none"), (3, 3, "fp32", "none"), (2, 2, "fp32", "optimizer")], 1e-5),
        ((3, 2, "fp32", "none"), [(3, 2, "fp32", "parameters"), (1, 3, "fp32", "none")], 1e-5),
        ((0, 2, "bf16", "none"), [(3, 2, "bf16", "none"), (1, 2, "bf16", "none")], 2e-3),
    ],
)
def test_what_one_place_wrote_another_reads(tmp_path: Path, first: Any, others: list[Any], within: float):
    spec, plan = make_case(*first)
    run = Run.create(str(tmp_path), "engine", spec, plan.model_dump(mode="json"))
    run.begin_attempt(num_ranks=first[1], start_step=0)
    whole = go(tmp_path, first, resume=False)
    assert len(whole) == STEPS
    report = verify_checkpoint(run, run.latest_checkpoint())
    assert report.ok, report.problems
    again = go(tmp_path, first, resume=True)
    assert again == whole[HALF:]  # in its own place: bit for bit
    for other in others:
        losses = go(tmp_path, other, resume=True)
        for (loss, norm), (expected, expected_norm) in zip(losses, whole[HALF:], strict=True):
            assert loss == pytest.approx(expected, abs=within), other
            assert norm == pytest.approx(expected_norm, rel=100 * within), other
