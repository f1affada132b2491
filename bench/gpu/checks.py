"""What must hold on a GPU and cannot be seen without one: `bench/gpu/run.sh --checks [CHECK …]`.

Each check runs dray's own path and says what it found; the command ends with 1 if one of them does
not hold. On a machine without a GPU the same checks run on the CPU, which shows that they run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engines import build, train_steps
from bench.gpu.one import build_corpus
from dray.models.build import one_document_a_row
from dray.plan import local_shape, make_plan
from dray.rank.device import HostCopy, build_copy_stream
from dray.rank.group import build_ranks, join_alone
from dray.runs import CheckpointInfo, CheckpointReader, Run
from dray.spec import Spec, make_spec
from dray.tasks.parts import losses
from dray.train.driver import train_locally

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
STAGES = (0, 1, 2, 3)


class DoesNotHold(AssertionError):
    """What a check found otherwise."""


def hold(condition: bool, found: str) -> str:
    """`found`, if the condition holds. Raises DoesNotHold."""
    if not condition:
        raise DoesNotHold(found)
    return found


def small(stage: int, *, steps: int = 8, precision: str = "fp32", **sections: Any) -> Spec:
    """A llama of a hundred thousand parameters."""
    tree: dict[str, Any] = {
        "name": "check",
        "data": {"train": "random", "sequence_tokens": 64},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 512},
        "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        "batch": {"global_rows": 8, "micro_rows": 4},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "optimizer": {"learning_rate": 1e-2},
        "duration": {"steps": steps},
        "precision": precision,
        "resources": {"workers": 1, "gpus_per_worker": int(ON_GPU)},
        "zero": {"stage": stage},
        "engine": {"compile": False},
    }
    return make_spec({**tree, **sections})


@contextmanager
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dray-check-") as path:
        yield path


def trained(spec: Spec, where: str, name: str = "check") -> Run:
    corpus = build_corpus(f"{where}/corpus", spec, 64 * spec.batch.global_rows)
    return train_locally(
        spec, storage=f"{where}/runs", run_name=name, corpus=corpus, shape=local_shape()
    ).run


def weights(run: Run) -> dict[str, Tensor]:
    """The newest checkpoint's fp32 weights by name, flat."""
    newest = run.latest_checkpoint()
    if newest is None:
        raise DoesNotHold("no checkpoint was committed")
    return weights_in(run, newest)


def weights_in(run: Run, checkpoint: CheckpointInfo) -> dict[str, Tensor]:
    """A checkpoint's fp32 weights by name, flat."""
    with CheckpointReader(run, checkpoint) as reader:
        return {
            name: reader.read(name, "param", 0, math.prod(shape))
            for name, shape in reader.metadata["shapes"].items()
        }


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def shape() -> str:
    """The card is found, and known."""
    found = local_shape()
    if not ON_GPU:
        return hold(found.accelerators_per_node == 0, "no GPU, and none is planned with")
    card, total = found.accelerator, torch.cuda.mem_get_info()[1]
    if card is None or card.memory_bytes is None:
        raise DoesNotHold("the driver told nothing of the card")
    return hold(
        abs(card.memory_bytes / total - 1) < 0.02 and card.half_flops is not None,
        f"{torch.cuda.get_device_name()} is planned as {card.name}, {card.memory_bytes:,} bytes "
        f"({total:,} by CUDA), {card.half_flops or 0:.3g} FLOP/s in half precision",
    )


def ceilings() -> str:
    """What this card reaches: a large product in bf16, and a large copy."""
    if not ON_GPU:
        return "no GPU"
    left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    product = milliseconds(lambda: left @ right)
    big = torch.empty(2 * 2**30, dtype=torch.uint8, device=DEVICE)
    copy = milliseconds(big.clone)
    return f"{2 * 8192**3 / product / 1e9:.0f} TFLOP/s, {2 * big.numel() / copy / 1e9:.2f} TB/s"


def milliseconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """The middle of some runs, by the device."""
    times = []
    for _ in range(repeats + 3):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended))
    return sorted(times[3:])[repeats // 2]


def loss() -> str:
    """The loss in chunks, compiled and not, is the whole one in value and gradients."""
    rows, width, classes = (16_384, 1024, 50257) if ON_GPU else (512, 32, 16_384)
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, width, device=DEVICE, generator=generator)
    weight = torch.randn(classes, width, device=DEVICE, generator=generator) / math.sqrt(width)
    labels = torch.randint(0, classes, (rows,), device=DEVICE, generator=generator)
    labels[::5] = -100
    found = []
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs = [value.to(dtype).requires_grad_() for value in (hidden, weight)]
        exact = [value.detach().double().requires_grad_() for value in inputs]
        wanted_loss = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
        wanted = [wanted_loss, *torch.autograd.grad(wanted_loss, exact)]
        del wanted_loss
        for way in ("compiled", "plain"):
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            kept = losses._compiled_chunk_loss
            if way == "plain":
                losses._compiled_chunk_loss = lambda: losses._chunk_loss
            try:
                mine_loss = losses.linear_cross_entropy(inputs[0], inputs[1], None, labels)
                mine = [mine_loss, *torch.autograd.grad(mine_loss, inputs)]
            finally:
                losses._compiled_chunk_loss = kept
            peak = torch.cuda.max_memory_allocated() - before if ON_GPU else 0
            errors = [
                float(((a.double() - b).norm() / b.norm()).detach())
                for a, b in zip(mine, wanted, strict=True)
            ]
            text = f"{way} {str(dtype)[6:]} {max(errors):.1e}, {peak / 2**20:.0f} MiB"
            found.append(hold(max(errors) < tolerance, text))
    return "; ".join(found) + f"; whole logits would be {rows * classes * 4 / 2**20:.0f} MiB"


def stages() -> str:
    """All ZeRO stages learn the same, in each precision."""
    found = []
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.03), ("fp16", 0.03)):
        if precision != "fp32" and not ON_GPU:
            continue
        ends = {}
        for stage in STAGES:
            with folder() as where:
                rows = trained(small(stage, precision=precision), where).metrics()
                ends[stage] = rows[-1]["loss"]
        spread = max(ends.values()) - min(ends.values())
        found.append(hold(spread < tolerance, f"{precision} losses within {spread:.1e}: {ends}"))
    return "; ".join(found)


def resume() -> str:
    """A run that is taken up again, at another stage too, ends where one at a stretch ends."""
    found = []
    for precision in ("fp32", "bf16") if ON_GPU else ("fp32",):
        for stage in STAGES:
            with folder() as where:
                whole = trained(small(stage, steps=8, precision=precision), where, "whole")
                trained(small(stage, steps=4, precision=precision), where, "parts")
                parts = trained(
                    small((stage + 1) % 4, steps=8, precision=precision), where, "parts"
                )
                rows = [
                    [(row["step"], row["rows_digest"]) for row in run.metrics()]
                    for run in (whole, parts)
                ]
                hold(rows[0] == rows[1], f"stage {stage}: other rows")
                apart = farthest(weights(whole), weights(parts))
                found.append(hold(apart < 2e-3, f"{precision} {stage}: {apart:.1e}"))
    return "weights apart by " + ", ".join(found)


def saves() -> str:
    """A checkpoint of a step is that step's, though the next steps were queued meanwhile."""
    with folder() as where:
        every = small(1, steps=6, checkpoint={"every_steps": 1, "keep_last": 10})
        run, found = trained(every, where, "every"), []
        for info in run.checkpoints():
            alone = weights(trained(small(1, steps=info.step), where, f"to{info.step}"))
            found.append(farthest(weights_in(run, info), alone))
        return hold(len(found) == 6 and max(found) < 1e-4, f"apart by {max(found):.1e}")


def copying() -> str:
    """How long a gigabyte of states holds the host up, and how long it travels."""
    states = {str(number): torch.randn(2**26, device=DEVICE) for number in range(4)}
    found = []
    for _ in range(2):
        begun = time.perf_counter()
        copy = HostCopy(states, build_copy_stream(DEVICE))
        blocked = time.perf_counter() - begun
        copies = copy.finish()
        found.append(f"{blocked:.2f} s blocked, {time.perf_counter() - begun:.2f} s in all")
    same = all(torch.equal(copies[name], states[name].cpu()) for name in states)
    return hold(same, "1 GiB twice: " + "; ".join(found))


def waits() -> str:
    """How often a step waits for the device, and where; dray's own files may not."""
    if not ON_GPU:
        return "no GPU to wait for"
    told, mine = [], 0
    for stage in STAGES:
        spec = small(stage, precision="bf16")
        plan = make_plan(spec, local_shape(), with_ray=False)
        join_alone(DEVICE)
        ranks = build_ranks(DEVICE, timeout_seconds=300)
        engine = build(spec, plan, ranks)
        list(train_steps(engine, spec, plan, ranks, 3))
        places: Counter[str] = Counter()

        def note(message: Any, *_: Any, **__: Any) -> None:
            if "synchroniz" in str(message):
                places[_caller()] += 1  # noqa: B023 - called at once

        kept, warnings.showwarning = warnings.showwarning, note
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            with one_document_a_row():
                list(train_steps(engine, spec, plan, ranks, 4))
            torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = kept
        mine += sum(count for place, count in places.items() if "dray/" in place)
        told.append(
            f"stage {stage}: "
            + (", ".join(f"{count / 4:g} × {place}" for place, count in places.items()) or "none")
        )
    return hold(mine == 0, "waits a step: " + "; ".join(told))


def _caller() -> str:
    """The innermost frames that wait: a library's place, and the file of dray's that called it."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/site-packages/torch/" not in frame.filename
        and "checks.py" not in frame.filename
        and "warnings.py" not in frame.filename
    ]
    place = frames[-1]
    return "/".join(Path(place.filename).parts[-3:]) + f":{place.lineno}"


def stopping() -> str:
    """On Ray: a run that is stopped and taken up again has the rows and the losses of one at a
    stretch."""
    with folder() as where:
        if not write_text_spec(where, steps=400 if ON_GPU else 40):
            return "left out: Ray is not installed here"
        _stop_and_go_on(where)
        _dray(where, "train", "spec.yaml", "--run", "whole")
        parts, whole = (Run.open(f"{where}/runs", name).metrics() for name in ("parts", "whole"))
        summary = json.loads(_dray(where, "show", "parts", "--json"))
    same = [row["rows_digest"] for row in parts] == [row["rows_digest"] for row in whole]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(parts, whole, strict=True))
    return hold(
        same and apart < 0.2 and summary["status"] == "completed" and len(summary["attempts"]) > 1,
        f"{len(parts)} steps in {len(summary['attempts'])} attempts, the rows "
        f"{'the same' if same else 'others'}, losses within {apart:.1e}, "
        f"from {parts[0]['loss']:.3f} to {parts[-1]['loss']:.3f}",
    )


def release() -> str:
    """On Ray: a run is trained, and evaluated to what it measured itself; it generates and is
    exported."""
    with folder() as where:
        if not write_text_spec(where, steps=60 if ON_GPU else 20):
            return "left out: Ray is not installed here"
        _dray(where, "train", "spec.yaml", "--run", "done")
        measured = json.loads(_dray(where, "show", "done", "--json"))["validation"]["loss"]
        evaluated = json.loads(_dray(where, "evaluate", "done", "--json"))["loss"]
        told = _dray(where, "generate", "done", "--prompt", "def ", "--max-tokens", "16")
        _dray(where, "export", "done", "out")
        files = sorted(path.name for path in Path(where, "out").iterdir())
    return hold(
        abs(measured - evaluated) < 0.01 and "model.safetensors" in files,
        f"measured {measured:.5f}, evaluated {evaluated:.5f}, generated {told!r}, exported {files}",
    )


def write_text_spec(where: str, steps: int) -> bool:
    """A spec for Python's own sources in this folder; False where there is no Ray."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    text = Path(where, "text")
    text.mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]:
        shutil.copy(source, text / f"{source.stem}.txt")
    spec = {
        "name": "check",
        "data": {
            "train": f"{text}/*.txt",
            "validation": {"share": 0.1},
            "sequence_tokens": 128,
        },
        "tokenizer": {"train": "byte_bpe", "vocab_size": 1024},
        "model": {"architecture": "llama", "hidden_size": 256, "num_layers": 4, "num_heads": 4},
        "batch": {"global_rows": 16, "micro_rows": 8},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"name": "constant", "warmup_steps": 5},
        "duration": {"steps": steps},
        "precision": "bf16" if ON_GPU else "fp32",
        "checkpoint": {"every_steps": 100},
        "validation": {"every_steps": 200},
        "resources": {"workers": 1, "gpus_per_worker": int(ON_GPU)},
    }
    Path(where, "spec.yaml").write_text(json.dumps(spec))
    return True


def _stop_and_go_on(where: str) -> None:
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dray.cli", "train", "spec.yaml", "--run", "parts"],
        cwd=where,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        if line.startswith("step ") and "loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    sys.stderr.writelines(process.stderr)
    process.wait()
    print(f"  stopped after {time.monotonic() - begun:.1f} s", flush=True)
    hold(process.returncode == 143, f"ended with {process.returncode}")
    _dray(where, "train", "spec.yaml", "--run", "parts")


def _dray(where: str, *words: str) -> str:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", *words],
        cwd=where,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    hold(done.returncode == 0, f"dray {' '.join(words)}: {done.returncode}")
    print(f"  dray {' '.join(words)}: {time.monotonic() - begun:.1f} s", flush=True)
    return done.stdout


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


CHECKS: dict[str, Callable[[], str]] = {
    check.__name__: check
    for check in (shape, ceilings, loss, copying, stages, resume, saves, waits, stopping, release)
}


def main() -> int:
    """Run the checks that are named, or all."""
    failed = 0
    for name in sys.argv[1:] or CHECKS:
        begun = time.monotonic()
        try:
            told, found = "holds", CHECKS[name]()
        except DoesNotHold as error:
            told, found = "DOES NOT HOLD", str(error)
        except Exception:  # one that breaks must not take the others with it
            told, found = "BROKE", traceback.format_exc(limit=-8)
        failed += told != "holds"
        print(f"{name} {told} ({time.monotonic() - begun:.0f} s): {found}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
