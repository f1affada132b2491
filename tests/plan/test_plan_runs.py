"""The planned DeepSpeed configurations, run: every stage and offload trains, and they agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# One process with one process group: DeepSpeed keeps its group for the life of the process.
CODE = """
import json, sys, torch
import dray.tasks.parts.losses
from dray.rank.engine import build_engine
from dray.models.build import build_model
from dray.models.groups import parameter_groups
from dray.plan import make_plan, parse_shape
from dray.rank.group import build_ranks, join_alone
from dray.spec import make_spec
from dray.tasks.causal_lm import CausalLM

torch.set_num_threads(1)
# Ten rows of 64: the loss takes several chunks.
dray.tasks.parts.losses.loss_chunk_bytes = lambda on_gpu: 4 * 512 * 10

def losses(stage, offload, precision):
    spec = make_spec({
        "name": "t", "data": {"train": "none", "sequence_tokens": 32},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 512},
        "model": {"architecture": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 2},
        "batch": {"global_rows": 4, "micro_rows": 2}, "duration": {"steps": 3},
        "precision": precision,
        "zero": {"stage": stage, "offload": offload}, "engine": {"compile": False}})
    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=64GB,bf16=1)"))
    build = lambda constructing, gathering: build_model(
        spec, vocab_size=512, pad_token_id=0, eos_token_id=0, constructing=constructing,
        gathering=gathering)
    engine = build_engine(build, lambda model: parameter_groups(model, 0.1), spec.optimizer, plan,
                          ranks, make_objective=CausalLM().objective)
    engine.train(True)
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(3):
        total = 0.0
        for part in range(plan.batch.accumulation):
            ids = torch.randint(0, 512, (2, 32), generator=random)
            terms, _ = engine({"input_ids": ids, "labels": ids.roll(-1, 1)})
            loss, _ = terms["loss"]
            engine.backward(loss / 128, last=part == plan.batch.accumulation - 1)
            total += loss.item() / 128
        found.append((total, float(engine.step(1e-2).grad_norm)))
    return found

join_alone(torch.device("cpu"))
ranks = build_ranks(torch.device("cpu"), 60)
print(json.dumps([losses(*case) for case in json.loads(sys.argv[1])]))
"""
CASES = [
    (0, "none", "fp32"),
    (1, "none", "fp32"),
    (1, "optimizer", "fp32"),
    (3, "parameters", "fp32"),
    (0, "none", "bf16"),
    (1, "none", "bf16"),
    (2, "optimizer", "bf16"),
    (3, "none", "bf16"),
    (3, "parameters", "bf16"),
]


def test_every_planned_configuration_trains_and_they_agree() -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(CASES)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads(done.stdout.strip().splitlines()[-1])
    for (_, _, precision), run in zip(CASES, runs, strict=True):
        tolerance = 1e-4 if precision == "fp32" else 5e-3
        for (loss, norm), (expected_loss, expected_norm) in zip(run, runs[0], strict=True):
            assert loss == pytest.approx(expected_loss, rel=tolerance)
            assert norm == pytest.approx(expected_norm, rel=10 * tolerance)
