"""The plan as a plain text table for people. It computes nothing that the plan does not hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dray.plan.demands import Demands
from dray.plan.memory import MEMORY_TERMS
from dray.plan.plan import Plan
from dray.plan.prices import Cost
from dray.plan.stages import Stage


def format_plan(plan: Plan, demands: Demands | None = None, cost: Cost | None = None) -> str:
    """Several lines of text, without a trailing newline; with what the run takes of its storage,
    and what it costs, where that is given."""
    sections = [
        _hardware(plan),
        _batch(plan),
        _model(plan),
        _memory(plan),
        _time(plan) + ([] if demands is None else _failures(demands)),
        *([] if demands is None else [_storage(plan, demands)]),
        *([] if cost is None else [_money(cost)]),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections)
    return text + ("\n\n" + "\n".join(f"note: {note}" for note in plan.notes) if plan.notes else "")


def format_stages(stages: Sequence[Stage]) -> str:
    """The stages of a release as a part of that text."""
    lines = [
        _row(one.stage, "" if one.num_bytes is None else format_bytes(one.num_bytes), one.what)
        for one in stages
    ]
    return "\n".join(["stages of dray release", *lines])


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


def format_money(amount: float, currency: str = "") -> str:
    """To the cent below a hundred, whole above that."""
    text = f"{amount:,.0f}" if amount >= 100 else f"{amount:.2f}"
    return f"{text} {currency}".rstrip()


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
    work = [
        _row(
            "FLOPs a token",
            f"{plan.flops_per_token_strict:.3g}",
            "strict: 6·(N without tables + head) + attention"
            if plan.num_trained_parameters is None
            else "strict; 4 instead of 6 for what is not trained",
        ),
        _row("", f"{plan.flops_per_token_loose:.3g}", "loose: 6·N + 12·L·d·T"),
    ]
    if plan.counted is not None and (row := plan.counted.row) is not None:
        size = "" if row.tokens == 1 else f" of {row.tokens:,} tokens"
        adds = plan.num_trained_parameters is not None
        passes = "1 pass of what stays, 3 of what is added" if adds else "3 forward passes"
        work = [_row("FLOPs a row", f"{row.flops:.3g}", f"measured{size}: {passes}")]
    return [
        "model",
        _row("parameters", f"{plan.num_parameters:,}", exact),
        *_trained(plan),
        _row("of these tables", f"{plan.num_embedding_parameters:,}", "looked up, not multiplied"),
        *work,
        _row("checkpoint", format_bytes(plan.checkpoint_bytes), "fp32 weights and two moments"),
    ]


def _trained(plan: Plan) -> list[str]:
    """What of the model is trained, where that is not all."""
    if plan.num_trained_parameters is None:
        return []
    share = plan.num_trained_parameters / plan.num_parameters
    said = f"{share:.2%}; the rest gets no gradients and stands in no checkpoint"
    return [_row("of these trained", f"{plan.num_trained_parameters:,}", said)]


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
    """What `checkpoint: auto` comes to if saves take what the plan says; it begins with no more
    than ten minutes."""
    found = plan.save_interval
    if found is None:
        return []
    failures = f"a failure every {format_seconds(found.failure_seconds)} by a published rate"
    return [
        _row(
            "saves, if auto",
            format_seconds(found.seconds),
            f"a save holds up {found.held_seconds:.2g} s, {failures}",
        )
    ]


def _failures(demands: Demands) -> list[str]:
    """The time with what goes wrong."""
    if demands.goodput is None:
        return []
    seconds, between = demands.seconds_with_failures, demands.save_seconds
    saved = "at the end alone" if between is None else f"every {format_seconds(between)}"
    time = "never" if seconds is None else format_seconds(seconds)
    return [_row("with failures", time, f"{demands.goodput:.2%} of the time counts, saved {saved}")]


def _storage(plan: Plan, demands: Demands) -> list[str]:
    """Disk, and requests where they are billed."""
    shards, total = demands.shard_bytes, demands.total_bytes
    count = "" if demands.num_checkpoints is None else f", of {demands.num_checkpoints:,} in all"
    lines = [
        "storage",
        _row("token shards", "after preparing" if shards is None else format_bytes(shards)),
        _row(
            "checkpoints",
            format_bytes(demands.checkpoints_bytes),
            f"{demands.kept_checkpoints} × {format_bytes(plan.checkpoint_bytes)} at once{count}",
        ),
        _row("records", format_bytes(demands.records_bytes)),
        _row(
            "total",
            "after preparing" if total is None else format_bytes(total),
            _describe_room(demands),
        ),
    ]
    asked = demands.requests
    if asked is None:
        return lines
    return [
        *lines,
        _row("PUT, LIST", _count(asked.total_puts), f"{asked.checkpoint_puts:,} a checkpoint"),
        _row("GET, HEAD", _count(asked.total_gets), f"{asked.checkpoint_gets:,} a checkpoint"),
    ]


def _describe_room(demands: Demands) -> str:
    free = demands.free_bytes
    if free is None:
        return ""
    needed = demands.total_bytes or demands.checkpoints_bytes + demands.records_bytes
    if needed > free:
        return f"of {format_bytes(free)} free: does not fit"
    known = "fits" if demands.total_bytes else "checkpoints and records fit"
    return f"of {format_bytes(free)} free: {known}"


def _count(number: int | None) -> str:
    return "after preparing" if number is None else f"{number:,}"


def _money(cost: Cost) -> list[str]:
    listed = f"listed {cost.as_of}, approximate" if cost.approximate else cost.as_of
    source = f"{cost.rented}{f'; {listed}' if listed else ''}"
    known = cost.money is not None and cost.hours is not None
    return [
        "money",
        _row("an hour", format_money(cost.price_per_hour, cost.currency), source),
        _row(
            "the run",
            format_money(cost.money or 0.0, cost.currency) if known else "unknown",
            f"{format_seconds(3600 * (cost.hours or 0.0))}, failures included" if known else "",
        ),
    ]
