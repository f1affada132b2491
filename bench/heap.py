"""A step with a heap that keeps what it frees, as dray's ranks have it, beside glibc's own: `python
-m bench.heap`.

Single processes without Ray train the model of bench.training on random rows, one thread each, in
turn; medians of the steps after the third, over all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

from bench.report import ROOT, write_section
from dray.plan import local_shape, make_plan


def train(keeps: bool, num_steps: int) -> list[float]:
    """Seconds of each step after the third."""
    import torch

    from bench.engines import build, make_case, train_steps
    from dray.processes.heap import prepare_process
    from dray.rank.group import build_ranks, join_alone

    if keeps:
        prepare_process(1)
    torch.set_num_threads(1)
    join_alone(torch.device("cpu"))
    spec = make_case(1, stage=0)
    plan, ranks = (
        make_plan(spec, local_shape(), with_ray=False),
        build_ranks(torch.device("cpu"), timeout_seconds=300),
    )
    engine, times = build(spec, plan, ranks), [time.perf_counter()]
    times += [time.perf_counter() for _ in train_steps(engine, spec, plan, ranks, num_steps)]
    return [after - before for before, after in itertools.pairwise(times[3:])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arm", choices=["keeps", "returns"], help="be one arm: print its times")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(train(options.arm == "keeps", options.steps)))
        return
    times: dict[str, list[float]] = {"keeps": [], "returns": []}
    for _ in range(options.rounds):
        for arm, seconds in times.items():
            command = [
                sys.executable,
                "-m",
                "bench.heap",
                "--arm",
                arm,
                "--steps",
                str(options.steps),
            ]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            seconds += json.loads(done.stdout.splitlines()[-1])
            print(arm, f"{statistics.median(seconds):.3f}", file=sys.stderr, flush=True)
    middle = {arm: statistics.median(seconds) for arm, seconds in times.items()}
    write_section(
        "heap",
        f"{options.rounds} rounds, medians: a step takes {middle['keeps']:.3f} s with a heap that "
        f"keeps what it frees, {middle['returns']:.3f} s with glibc's own: "
        f"{1 - middle['keeps'] / middle['returns']:.0%} less.",
        times,
    )


if __name__ == "__main__":
    main()
