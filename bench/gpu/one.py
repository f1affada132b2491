"""One case of the GPU benchmark in a process of its own: `python -m bench.gpu.one SHAPE STAGE MODE
[profile]`.

The rows are random tokens written as real token shards; everything after that is dray's own path
without Ray. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from pyarrow import fs as pafs

from bench.engines import build, train_steps
from dray.corpus.manifest import VERSION, Manifest, Packing, SourceRows, Split
from dray.corpus.prepare import Corpus
from dray.corpus.shards import make_batch, stored_columns, write_shard
from dray.models.build import one_document_a_row
from dray.plan import Shape, local_shape, make_plan
from dray.rank.group import build_ranks, join_alone
from dray.rank.job import make_corpus_plan
from dray.show.progress import Display
from dray.spec import Spec, make_spec
from dray.train.driver import train_locally

# name: architecture, hidden, layers, heads, kv heads, feed-forward, tokens a row, vocabulary,
# global rows, micro rows
SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": ("llama", 64, 2, 4, 4, None, 64, 512, 4, 2),
    "gpt2-124m": ("gpt2", 768, 12, 12, None, None, 1024, 50257, 32, 32),
    "llama-1b": ("llama", 2048, 16, 32, 8, 8192, 2048, 32000, 32, 8),
    "llama-3b": ("llama", 3072, 28, 24, 8, 8192, 2048, 32000, 8, 4),
}
NUM_STEPS = {"tiny": 8, "gpt2-124m": 30, "llama-1b": 14, "llama-3b": 12}
WARM = 4


def make_case(shape: str, stage: int, compiled: bool, num_steps: int) -> Spec:
    architecture, hidden, layers, heads, kv_heads, feed_forward, width, vocab, rows, micro = SHAPES[
        shape
    ]
    on_gpu = shape != "tiny"
    return make_spec(
        {
            "name": f"{shape}-z{stage}-{'compiled' if compiled else 'eager'}",
            "data": {"train": "random", "sequence_tokens": width},
            "tokenizer": {"train": "byte_bpe", "vocab_size": vocab},
            "model": {
                "architecture": architecture,
                "hidden_size": hidden,
                "num_layers": layers,
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "intermediate_size": feed_forward,
            },
            "batch": {"global_rows": rows, "micro_rows": micro},
            "schedule": {"name": "constant", "warmup_steps": 5},
            "optimizer": {"learning_rate": 1e-4},
            "duration": {"steps": num_steps + 2},
            "precision": "bf16" if on_gpu else "fp32",
            "resources": {"workers": 1, "gpus_per_worker": int(on_gpu)},
            "zero": {"stage": stage},
            "engine": {"compile": compiled},
        }
    )


def build_corpus(folder: str, spec: Spec, num_rows: int) -> Corpus:
    """Random tokens as token shards."""
    width, vocab = spec.data.sequence_tokens, spec.tokenizer.vocab_size
    dtype = "uint16" if vocab <= 65536 else "uint32"
    tokens = np.random.default_rng(0).integers(0, vocab, (num_rows, width)).astype(dtype)
    columns = stored_columns(spec.task, width, dtype)
    rows = make_batch(
        columns, {"input_ids": tokens, "num_tokens": np.full(num_rows, width, np.int32)}
    )
    shard = write_shard(pafs.LocalFileSystem(), folder, "train/random.arrow", rows, 256)
    source = SourceRows(
        name="random",
        weight=None,
        num_rows=num_rows,
        num_documents=num_rows,
        num_tokens=num_rows * width,
        num_text_bytes=4 * num_rows * width,
        shards=(shard,),
    )
    packing = Packing(
        utilization=1.0, num_cut_documents=0, num_truncated_documents=0, num_truncated_tokens=0
    )
    manifest = Manifest(
        version=VERSION,
        key="random",
        sequence_tokens=width,
        group_rows=256,
        vocab_size=vocab,
        pad_token_id=0,
        eos_token_id=0,
        encoder="tokenizers",
        labels=(),
        train=Split(sources=(source,)),
        validation=None,
        num_source_files=0,
        num_source_bytes=0,
        dropped={},
        num_records=num_rows,
        num_bad=0,
        packing=packing,
        shuffle_seed=0,
    )
    return Corpus(folder, manifest)


class _Enough(Exception):
    """All steps that are measured have been."""


class _Until(Display):
    """Ends a run at a step: the checkpoint of its end would take longer than its steps."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.rows = last, list[Mapping[str, Any]]()

    def step(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        if row["step"] >= self.last:
            raise _Enough


def measure(spec: Spec, shape: Shape, num_steps: int) -> dict[str, Any]:
    """Train through dray's own path, and take the middle of its steps."""
    seen = _Until(num_steps)
    with tempfile.TemporaryDirectory(prefix="dray-gpu-") as folder, suppress(_Enough):
        corpus = build_corpus(folder + "/corpus", spec, (num_steps + 2) * spec.batch.global_rows)
        plan = make_corpus_plan(spec, shape, corpus.manifest, with_ray=False)
        train_locally(spec, storage=folder + "/runs", corpus=corpus, shape=shape, display=seen)
    rows = seen.rows[WARM:]
    keys = ("tokens_per_second", "mfu", "mfu_strict")
    middle = {key: statistics.median(row[key] or 0.0 for row in rows) for key in keys}
    return {
        **middle,
        "num_parameters": plan.num_parameters,
        "loss": [seen.rows[0]["loss"], rows[-1]["loss"]],
        "peak_bytes": max(row["memory_bytes_max"] for row in rows) + _bytes_beside_torch(),
        "planned_bytes": plan.memory.total,
        "plan": plan.memory.model_dump(),
        **_torch_bytes(),
    }


def _bytes_beside_torch() -> int:
    """What this process holds of a card besides torch's pool: CUDA's context and the libraries'
    own buffers. The card must be ours alone."""
    if not torch.cuda.is_initialized():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _torch_bytes() -> dict[str, int]:
    if not torch.cuda.is_initialized():
        return {}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "beside_bytes": _bytes_beside_torch(),
    }


def profile(spec: Spec, shape: Shape) -> dict[str, Any]:
    """What three steps of the engine spend their time on, without the loop around it."""
    on_gpu = bool(spec.resources.gpus_per_worker)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    join_alone(device)
    ranks, plan = build_ranks(device, timeout_seconds=300), make_plan(spec, shape, with_ray=False)
    engine = build(spec, plan, ranks)
    with one_document_a_row():
        list(train_steps(engine, spec, plan, ranks, WARM))
        with torch.profiler.profile() as found:
            list(train_steps(engine, spec, plan, ranks, 3))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return {
        "profile": found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    }


def main() -> None:
    name, stage, compiled = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "compiled"
    num_steps = NUM_STEPS[name]
    spec, shape = make_case(name, stage, compiled, num_steps), local_shape()
    found = profile(spec, shape) if sys.argv[4:] == ["profile"] else measure(spec, shape, num_steps)
    print(json.dumps({"shape": name, "stage": stage, "compiled": compiled, **found}))


if __name__ == "__main__":
    main()
