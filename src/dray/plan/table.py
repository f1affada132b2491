"""The plan as a plain text table for people. It computes nothing that the plan does not hold."""

from __future__ import annotations

import re

from dray.plan.memory import MEMORY_TERMS
from dray.plan.plan import Plan


def format_plan(plan: Plan) -> str:
    """Several lines of text, without a trailing newline."""
    sections = [_hardware(plan), _batch(plan), _model(plan), _memory(plan), _time(plan)]
    text = "\n\n".join("\n".join(lines) for lines in sections)
    return text + ("\n\n" + "\n".join(f"note: {note}" for note in plan.notes) if plan.notes else "")


def format_bytes(count: float) -> str:
    """Decimal units, three figures: 1.23 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:,.0f} {unit}"
            )
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """The two greatest units: 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<20} {value:>16}  {remark}".rstrip()


def _hardware(plan: Plan) -> list[str]:
    shape = plan.shape
    card = "CPU"
    if shape.accelerator:
        size = shape.accelerator.memory_bytes
        card = f"{shape.num_accelerators} × {shape.accelerator.name}" + (
            f" ({format_bytes(size)})" if size else ""
        )
    memory = format_bytes(shape.memory_bytes_per_node)
    nodes = f"{shape.num_nodes} node{'s' * (shape.num_nodes > 1)}"
    return [
        f"{shape.name or 'cluster'}: {nodes}, {card}, {shape.cpus_per_node:g} CPUs and {memory} a "
        "node",
        _row("ranks", str(plan.num_ranks), "on GPUs" if plan.on_gpu else "on CPUs"),
        _row("precision", plan.precision),
        *(
            _row("" if number else "ZeRO", "" if number else str(plan.zero_stage), remark)
            for number, remark in enumerate(re.split("[:;] ", plan.zero_reason))
        ),
        _row("offload", plan.offload),
        _row("compile", "yes" if plan.compile else "no"),
    ]


def _batch(plan: Plan) -> list[str]:
    batch = plan.batch
    padded = f" - {batch.padded_rows} padded" if batch.padded_rows else ""
    product = (
        f"{batch.num_ranks} ranks × {batch.micro_rows} rows × {batch.accumulation} micro "
        f"batches{padded}"
    )
    tokens = "unknown" if plan.num_tokens is None else f"{plan.num_tokens:,}"
    return [
        "batch",
        _row("rows a step", f"{batch.global_rows:,}", f"= {product}"),
        _row("tokens a step", f"{plan.tokens_per_step:,}"),
        _row("steps", "after preparing" if plan.num_steps is None else f"{plan.num_steps:,}"),
        _row("tokens", tokens),
        *_rate(plan),
        _row(
            "token shards",
            "after preparing" if plan.shard_bytes is None else format_bytes(plan.shard_bytes),
        ),
    ]


def _rate(plan: Plan) -> list[str]:
    """The learning rate, beside what the Step Law says."""
    if plan.learning_rate is None:
        return []
    law = plan.law
    said = "" if law is None else f"the Step Law: {law.learning_rate:.3g} at {law.global_rows} rows"
    return [_row("learning rate", f"{plan.learning_rate:.3g}", said)]


def _model(plan: Plan) -> list[str]:
    exact = "" if plan.parameters_exact else "estimated by formula"
    if plan.counted is not None:
        exact = "counted on the model itself"
    return [
        "model",
        _row("parameters", f"{plan.num_parameters:,}", exact),
        _row("of these tables", f"{plan.num_embedding_parameters:,}", "looked up, not multiplied"),
        _row(
            "FLOPs a token",
            f"{plan.flops_per_token_strict:.3g}",
            "strict: 6·(N without tables + head) + attention",
        ),
        _row("", f"{plan.flops_per_token_loose:.3g}", "loose: 6·N + 12·L·d·T"),
        _row("checkpoint", format_bytes(plan.checkpoint_bytes), "fp32 weights and two moments"),
    ]


def _memory(plan: Plan) -> list[str]:
    memory, limit = plan.memory, plan.memory_limit_bytes
    lines = [f"memory of a rank at its peak ({memory.peak})"]
    lines += [_row(term, format_bytes(getattr(memory, term))) for term in MEMORY_TERMS]
    room = "limit unknown" if limit is None else f"of {format_bytes(limit)}: fits"
    lines.append(_row("total", format_bytes(memory.total), room))
    other = (
        "kept instead"
        if plan.activation_checkpointing
        else "recomputed (engine.activation_checkpointing=true)"
    )
    size = (
        memory.activations_kept
        if plan.activation_checkpointing
        else memory.activations_checkpointed
    )
    lines.append(_row("activations", format_bytes(size), f"if {other}"))
    host_limit = format_bytes(plan.host_limit_bytes)
    lines.append(_row("host, a node", format_bytes(memory.host_bytes), f"of {host_limit}: fits"))
    return lines


def _time(plan: Plan) -> list[str]:
    peak = (
        "unknown"
        if plan.peak_flops_per_rank is None
        else f"{plan.peak_flops_per_rank / 1e12:.3g} TFLOP/s"
    )
    time = "unknown" if plan.est_seconds is None else format_seconds(plan.est_seconds)
    rate = ""
    if plan.est_seconds and plan.num_tokens:
        rate = f"{plan.num_tokens / plan.est_seconds:,.0f} tokens/s, start included"
    step = "unknown" if plan.step_seconds is None else f"{plan.step_seconds:.3g} s"
    source = (
        "measured on this machine"
        if plan.step_measured
        else "by usual rates; a run measures its own"
    )
    return [
        "time",
        _row("peak of a rank", peak, plan.precision),
        _row("a step", step, source),
        _row("estimate", time, rate),
        *_saves(plan),
    ]


def _saves(plan: Plan) -> list[str]:
    """What `checkpoint: auto` would begin with."""
    found = plan.save_interval
    if found is None:
        return []
    failures = f"a failure every {format_seconds(found.failure_seconds)} by a published rate"
    return [
        _row(
            "saves, if auto",
            format_seconds(found.seconds),
            f"a save holds up {found.held_seconds:.2g} s, {failures}; "
            f"{found.goodput:.2%} of the time counts",
        )
    ]
