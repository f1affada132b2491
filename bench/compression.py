"""What compression costs and gives, on SST-2 with MiniLM and on English text with a small language
model: `make compress`. The table goes to docs/compress.md.

Trains both runs where the storage has none, compresses each by some recipes in one call each, and
leaves every figure as that call measured it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dray
from bench.report import ROOT, write_section
from dray.release.compress.compress import compress
from dray.runs import Run
from dray.runs.layout import RUN_FILE
from dray.train.driver import train

SST2 = {
    "int8": ["int8"],
    "int8_dynamic": ["int8_dynamic"],
    "int4": ["int4"],
    "width 1/2, recovery, int8_dynamic": [
        "width:share=0.5,rows=128,recover=200,rate=0.00005",
        "int8_dynamic",
    ],
    "4 of 6 layers, distil, int8_dynamic": [
        "layers:keep=4,by=spaced",
        "distil:steps=400,rate=0.00005,share=0.7,hidden=0.5",
        "int8_dynamic",
    ],
}
ONE_EPOCH = [
    "duration.epochs=1",
    "schedule.warmup_steps=20",
    "validation.every_steps=216",
    "checkpoint.every_steps=108",
]
"""What is compressed is a run of some minutes: the recipe's own three epochs reach more."""
ENGLISH = {
    "int8": ["int8"],
    "int8_dynamic": ["int8_dynamic"],
    "int4": ["int4"],
    "width 3/4, recovery, int8_dynamic": ["width:share=0.75,recover=100", "int8_dynamic"],
    "4 of 6 layers, distil, int8_dynamic": [
        "layers:keep=4,by=spaced",
        "distil:steps=400,rate=0.001,share=0.7",
        "int8_dynamic",
    ],
}


def english() -> Any:
    """A language model of 6 M parameters on documents of corpus_en."""
    return dray.make_spec(
        {
            "name": "speeches",
            "data": {
                "train": ["../shared/data/corpus_en/*.jsonl.gz"],
                "validation": {"share": 0.02},
                "sequence_tokens": 256,
            },
            "tokenizer": {"train": "byte_bpe", "vocab_size": 4096},
            "model": {
                "architecture": "llama",
                "hidden_size": 256,
                "num_layers": 6,
                "num_heads": 4,
                "num_kv_heads": 2,
            },
            "batch": {"global_rows": 16, "micro_rows": 4},
            "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup_steps": 20},
            "duration": {"steps": 400},
            "validation": {"max_rows": None},
            "resources": {"workers": 2},
        }
    )


def main(storage: str = "runs/compression", *, only: str = "") -> None:
    """Train, compress, and write a section for each run."""
    for spec, recipes, metrics in (
        (dray.load_spec("sst2_minilm", ONE_EPOCH), SST2, ("accuracy",)),
        (english(), ENGLISH, ("accuracy", "perplexity")),
    ):
        if only not in ("", spec.name):
            continue
        if (
            Run.find(storage, spec.name) is None
            or Run.open(storage, spec.name).status != "completed"
        ):
            train(spec, storage=storage)
        heads = [f"{metric} before | after | difference (95 %)" for metric in metrics]
        lines = [
            f"| methods | {' | '.join(heads)} | stored | in memory | one row | a batch |",
            "|---" * (5 + 3 * len(metrics)) + "|",
        ]
        figures = {}
        for number, (words, methods) in enumerate(recipes.items()):
            name = f"{spec.name}-{number}"
            if Run.find(storage, name) is None:
                compress(
                    storage,
                    spec.name,
                    methods,
                    new_name=name,
                    train=train,
                    say=partial(print, file=sys.stderr, flush=True),
                )
            table = Run.open(storage, name).compression()
            assert table is not None, f"{name} has no {RUN_FILE}"
            figures[words] = table
            lines.append(_row(words, table, metrics))
        page = ROOT / "docs" / "compress.md"
        write_section(f"compression of {spec.name}", "\n".join(lines), figures, page)


def _row(words: str, table: dict[str, Any], metrics: Sequence[str]) -> str:
    sizes, speed = table["sizes"], table["speed"]
    cells = []
    for metric in metrics:
        found = table["metrics"][metric]
        change = found["difference"]
        cells += [
            f"{found['before']['value']:.4f}",
            f"{found['after']['value']:.4f}",
            f"{change['value']:+.4f} ({change['low']:+.4f} … {change['high']:+.4f})",
        ]
    ratios = [sizes["before"][n] / sizes["after"][n] for n in ("weights_bytes", "memory_bytes")]
    cells += [f"÷ {ratio:.2f}" for ratio in ratios]
    cells += [f"× {speed[n]['speedup']:.2f}" for n in ("row_seconds", "rows_per_second")]
    return f"| {words} | {' | '.join(cells)} |"


def kernels() -> None:
    """Ways to multiply tokens with a matrix of 384 × 1,536, in turns: medians."""
    import statistics
    import time
    from collections.abc import Callable

    import torch

    from dray.models.packed import Int8Linear, PackedLinear, Packing, pack

    weight = torch.randn(1536, 384, generator=torch.Generator().manual_seed(0)) / 20
    packed = pack(weight, Packing("int8"))
    dynamic = pack(weight, Packing("int8", activations="dynamic"))
    half = weight.bfloat16()
    codes, scales = packed.states["weight_codes"], packed.states["weight_scales"].flatten()
    lines = ["| tokens | " + " | ".join(_KERNELS) + " |", "|---" * (len(_KERNELS) + 1) + "|"]
    figures = {}
    for num_tokens in (1, 24, 1024):
        given = torch.randn(num_tokens, 384, generator=torch.Generator().manual_seed(1))
        layers = [PackedLinear(packed, None)]
        layers += [Int8Linear(dynamic, None, engine) for engine in ("x86", "onednn")]
        ways: list[Callable[[], Any]] = [
            lambda given=given: torch.nn.functional.linear(given, weight),
            lambda given=given: torch.nn.functional.linear(given.bfloat16(), half),
            *(lambda given=given, layer=layer: layer(given) for layer in layers),
            lambda given=given: torch.ops.aten._weight_int8pack_mm(given, codes, scales),
        ]
        taken: list[list[float]] = [[] for _ in ways]
        with torch.no_grad():
            for _ in range(15):
                for place, way in enumerate(ways):
                    begun = time.perf_counter()
                    way()
                    taken[place].append(time.perf_counter() - begun)
        found = [statistics.median(one) * 1e3 for one in taken]
        figures[num_tokens] = dict(zip(_KERNELS, found, strict=True))
        lines.append(f"| {num_tokens:,} | " + " | ".join(f"{ms:.2f} ms" for ms in found) + " |")
    write_section("kernels", "\n".join(lines), figures, ROOT / "docs" / "compress.md")


_KERNELS = (
    "fp32",
    "bf16",
    "`int8`, unpacked a pass",
    "`linear_dynamic`, x86",
    "`linear_dynamic`, oneDNN",
    "`_weight_int8pack_mm`",
)

if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if wanted in ("", "kernels"):
        kernels()
    if wanted != "kernels":
        main(only=wanted)
