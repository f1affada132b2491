"""`dray serve` under load beside transformers' own server, with and without its continuous
batching, on SmolLM2-135M-Instruct: `python -m bench.serving`, or `make serve-load`. Writes
docs/serving.md.

All servers run at once, and idle while another one is asked. Clients ask one thing after the other,
each for an answer of a fixed number of tokens, streamed, to prompts of several lengths. Arms take
turns in every round. What is told: tokens a second over all clients, and seconds of whole answers.
Wants a quiet machine, and says how busy it was.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import openai

from bench import real_models
from bench.report import ROOT, write_section

CLIENTS = (1, 8, 32)
NUM_TOKENS = 32
LEAST_ASKED = 8
"""Answers of all clients together in a round, so that one client's have a median."""
PROMPTS = (
    "What is the capital of France?",
    "Tell a story of a lighthouse keeper who finds a letter in a bottle. " * 4,
    "Explain how rain comes about, step by step, for a child of ten years. " * 12,
    "Write a haiku about snow.",
)


@dataclass
class Arm:
    """A server."""

    name: str
    words: Sequence[str]
    """The command that starts it, without its port."""
    model: str
    port: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Of whole answers, by the number of clients."""
    first: dict[int, list[float]] = field(default_factory=dict)
    """Until the first piece."""
    rates: dict[int, list[float]] = field(default_factory=dict)
    """Tokens a second over all clients, a round each."""


def make_arms(folder: Path) -> list[Arm]:
    python = sys.executable
    theirs = [str(Path(python).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    return [
        Arm("dray serve", [python, "-m", "dray.cli", "serve", str(folder)], folder.name),
        Arm("transformers serve", theirs, str(folder)),
        Arm(
            "transformers serve --continuous-batching",
            [*theirs, "--continuous-batching"],
            str(folder),
        ),
    ]


@contextmanager
def running(arm: Arm, port: int, out: Path) -> Iterator[None]:
    """The arm's server for the time of the block. Raises SystemExit where it does not come up."""
    arm.port = port
    with out.open("wb") as stream:
        words = [*arm.words, "--port", str(port)]
        server = subprocess.Popen(words, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 300
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{arm.name} did not come up: {out.read_text()[-2000:]}")
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        ask(arm, 0)  # whatever is loaded at the first request
        yield
    finally:
        server.terminate()
        server.wait(120)


def ask(arm: Arm, number: int) -> tuple[float, float, int]:
    """One answer: seconds of it, until its first piece, and its tokens."""
    began = time.perf_counter()
    first, pieces = 0.0, 0
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{arm.port}/v1", api_key="none", timeout=900, max_retries=0
    ) as client:
        for piece in client.chat.completions.create(
            model=arm.model,
            messages=[{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
        ):
            if piece.choices and piece.choices[0].delta.content:
                first = first or time.perf_counter() - began
                pieces += 1
    return time.perf_counter() - began, first, pieces


def measure(arm: Arm, num_clients: int, num_each: int) -> None:
    """One round of an arm."""
    began = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        found = list(pool.map(lambda number: ask(arm, number), range(num_clients * num_each)))
    total = time.perf_counter() - began
    arm.seconds.setdefault(num_clients, []).extend(seconds for seconds, _, _ in found)
    arm.first.setdefault(num_clients, []).extend(first for _, first, _ in found)
    arm.rates.setdefault(num_clients, []).append(sum(count for _, _, count in found) / total)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, of those that were seen."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def make_table(arms: Sequence[Arm], busy: float) -> str:
    lines = [
        "| clients | server | tokens/s | first piece, p50 | answer, p50 | p95 | p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for clients in CLIENTS:
        for arm in arms:
            if clients not in arm.seconds:
                continue
            seconds = arm.seconds[clients]
            cells = [
                f"{statistics.median(arm.rates[clients]):.1f}",
                f"{statistics.median(arm.first[clients]):.2f} s",
                *(f"{quantile(seconds, share):.2f} s" for share in (0.5, 0.95, 0.99)),
            ]
            lines.append(f"| {clients} | {arm.name} | {' | '.join(cells)} |")
    lines.append(
        f"\nSmolLM2-135M-Instruct in fp32, {NUM_TOKENS} tokens an answer, prompts of "
        f"{len(PROMPTS)} lengths, {os.cpu_count()} CPUs; load average {busy:.1f} at the start. "
        "`python -m bench.serving`"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=2, help="answers of a client in a round")
    parser.add_argument("--clients", type=int, nargs="*", default=list(CLIENTS))
    parser.add_argument("--model", type=Path, help="a folder with the model (default: it is made)")
    parser.add_argument("--no-write", action="store_true", help="print the table alone")
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        arms = make_arms(given.model or real_models.smollm2(Path(scratch)))
        for place, arm in enumerate(arms):
            stack.enter_context(running(arm, 8400 + place, Path(scratch) / f"{place}.log"))
        for turn in range(given.rounds):
            for clients in given.clients:
                for place in range(len(arms)):
                    each = max(given.each, LEAST_ASKED // clients)
                    measure(arms[(turn + place) % len(arms)], clients, each)
    table = make_table(arms, busy)
    if given.no_write:
        print(table)
        return
    figures = [{"arm": a.name, "seconds": a.seconds, "rates": a.rates} for a in arms]
    write_section("serving-load", table, figures, page=ROOT / "docs" / "serving.md")


if __name__ == "__main__":
    main()
