"""What the benchmarks below the training loop share: dray's engine for a spec's model, and its
steps on random rows.

By itself it is an arm of bench.training: `torchrun --nproc-per-node 2 -m bench.engines` trains the
model and the rows of `bench/ddp_loop.py` on the engine, without Ray and the loop around it, and
prints one JSON line on rank 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dray.models.build import build_model
from dray.models.groups import parameter_groups
from dray.plan import Plan, local_shape, make_plan
from dray.processes.heap import prepare_process
from dray.rank.device import pin, send
from dray.rank.engine import Engine, build_engine
from dray.rank.group import Ranks, build_ranks
from dray.spec import Spec, make_spec
from dray.tasks.causal_lm import CausalLM


def build(spec: Spec, plan: Plan, ranks: Ranks) -> Engine:
    """One rank's engine, with new weights."""
    return build_engine(
        lambda constructing, gathering: build_model(
            spec,
            vocab_size=spec.tokenizer.vocab_size,
            pad_token_id=0,
            eos_token_id=0,
            constructing=constructing,
            gathering=gathering,
        ),
        lambda model: parameter_groups(model, spec.optimizer.weight_decay),
        spec.optimizer,
        plan,
        ranks,
        make_objective=CausalLM().objective,
    )


def make_case(num_ranks: int, stage: int, precision: str = "auto") -> Spec:
    """The model and the rows of bench/ddp_loop.py."""
    return make_spec(
        {
            "name": "engines",
            "data": {"train": "none", "sequence_tokens": 512},
            "tokenizer": {"train": "byte_bpe", "vocab_size": 8192},
            "model": {"architecture": "llama", "hidden_size": 384, "num_layers": 6, "num_heads": 6},
            "batch": {"global_rows": 8 * num_ranks, "micro_rows": 8},
            "duration": {"steps": 1},
            "precision": precision,
            "resources": {"workers": num_ranks},
            "zero": {"stage": stage},
            "engine": {"compile": False},
        }
    )


def train_steps(
    engine: Engine, spec: Spec, plan: Plan, ranks: Ranks, num_steps: int
) -> Iterator[int]:
    """Train on random rows; the number of each step once it is done."""
    random = torch.Generator().manual_seed(ranks.rank)
    shape = (plan.batch.micro_rows, spec.data.sequence_tokens)
    engine.train(True)
    for step in range(1, num_steps + 1):
        ids = torch.randint(0, spec.tokenizer.vocab_size, shape, generator=random)
        batch = send(pin({"input_ids": ids, "labels": ids}, ranks.device), ranks.device)
        terms, _ = engine(batch)
        loss, _ = terms["loss"]
        engine.backward(loss / ids.numel(), last=True)
        engine.step(1e-4)
        del loss, terms
        yield step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    prepare_process(1)
    dist.init_process_group("gloo")
    ranks = build_ranks(torch.device("cpu"), timeout_seconds=300)
    spec = make_case(ranks.num_ranks, options.stage, options.precision)
    plan = make_plan(spec, local_shape(), with_ray=False)
    engine, times = build(spec, plan, ranks), [time.perf_counter()]
    times += [time.perf_counter() for _ in train_steps(engine, spec, plan, ranks, options.steps)]
    if ranks.rank == 0:
        seconds = statistics.median(
            after - before for before, after in itertools.pairwise(times[3:])
        )
        print(
            json.dumps(
                {"tokens_per_second": plan.batch.global_rows * spec.data.sequence_tokens / seconds}
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
