"""The stages that `dray release` will go through, in words, with the bytes of what they leave where
that is arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from dray.plan.plan import Plan
from dray.spec import Export, Spec

VALUE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Of a number in a GGUF file. q8_0: blocks of 32 codes and one scale in fp16
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""


class Stage(BaseModel):
    """One of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    what: str
    """What it does, in words."""
    num_bytes: int | None = None
    """Of what it leaves on the storage or in a folder; None: not known before."""


def make_stages(spec: Spec, plan: Plan) -> tuple[Stage, ...]:
    """All stages of a spec, in order. Raises nothing: what cannot be is refused elsewhere."""
    return tuple(_stages(spec, plan))


def _stages(spec: Spec, plan: Plan) -> Iterator[Stage]:
    yield Stage(stage="prepare", what="raw data → token shards", num_bytes=plan.shard_bytes)
    steps = (
        "as many steps as its epochs have"
        if plan.num_steps is None
        else f"{plan.num_steps:,} steps"
    )
    yield Stage(stage="train", what=steps, num_bytes=plan.checkpoint_bytes)
    if spec.evaluate is not None:
        rows = "the data of evaluate.data" if spec.evaluate.data else "the validation rows"
        gate = [
            f"{metric} {'≥' if spec.task.metrics[metric] == 'higher' else '≤'} {bound:g}"
            for metric, bound in spec.evaluate.gate.items()
        ]
        yield Stage(stage="evaluate", what=f"on {rows}: {', '.join(gate) or 'no gate'}")
    if spec.compress is not None:
        drops = [f"{metric} by {most}" for metric, most in spec.compress.max_drop.items()]
        what = ", ".join(spec.compress.methods)
        may = f"; may get worse: {', '.join(drops)}" if drops else "; no gate"
        yield Stage(stage="compress", what=what + may)
    for one in spec.export:
        values = f" in {one.values}" if one.format == "gguf" else ""
        signed = ", signed" if one.sign else ""
        yield Stage(
            stage="export",
            what=f"{one.format}{values} → {one.folder}{signed}",
            num_bytes=_export_bytes(one, spec, plan),
        )
    if spec.serve is not None:
        name = spec.serve.name or spec.name
        yield Stage(stage="promote", what=f"a version of {name}")
        least, most = spec.serve.range
        times = f"{least if least == most else f'{least} to {most}'} replica{'s' * (most > 1)}"
        yield Stage(
            stage="serve",
            what=f"{spec.serve.scheme}://{spec.serve.host}:{spec.serve.port}, {times} of {name}",
        )


def _export_bytes(section: Export, spec: Spec, plan: Plan) -> int | None:
    """Of the weights; a compressed model's follow from its methods' results."""
    if spec.compress is not None and section.of != "trained":
        return None
    size = VALUE_BYTES[section.values] if section.format == "gguf" else 4.0
    return int(size * plan.num_parameters)
