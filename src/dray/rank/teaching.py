"""Learning from a teacher: a model that stays as it is makes outputs of the same batch, and a
student's loss is how far it is from them, beside the task's own.

The teacher is no part of the module that is wrapped: it has no gradients, no optimiser's states,
and stands in no checkpoint. Refuses a teacher of other outputs, and tasks without logits over
classes or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dray.corpus.manifest import Manifest
from dray.errors import SpecError
from dray.models.build import build_model, sizes_by
from dray.models.groups import find_blocks
from dray.origin import find_teacher
from dray.runs import CheckpointReader, choose_checkpoint
from dray.spec import Distil
from dray.tasks import Batch
from dray.tasks.rows import IGNORED

CHUNK_LOGITS = 16_000_000
"""Logits of one side that are compared at a time."""


def load_teacher(storage: str, distil: Distil, manifest: Manifest, device: torch.device) -> Any:
    """The model that teaches, in fp32 in evaluation mode. Raises SpecError for a run that cannot
    teach, StoreError for a damaged checkpoint."""
    run = find_teacher(storage, distil.run)
    spec, kept = run.spec(), run.model() or {}
    info = choose_checkpoint(run, None)
    model = build_model(
        spec,
        **sizes_by(manifest, spec.task.on(manifest, spec.model.num_labels).num_labels),
        initial_weights=False,
        config=kept["config"],
    )
    with run.hold(info), CheckpointReader(run, info) as reader, torch.no_grad():
        reader.check_files()
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name).reshape(parameter.shape))
        for name, buffer in model.named_buffers():
            if reader.has(name, "buffer"):
                buffer.copy_(reader.read(name, "buffer").reshape(buffer.shape))
    return model.requires_grad_(False).to(device).eval()


class TaughtLoss(nn.Module):
    """A task's loss with a teacher's beside it: (1 - share) · own + share · T² · KL(teacher ‖
    student) at temperature T for each target (Hinton, Vinyals and Dean, 2015), and for each target
    the mean squared errors of hidden states and attentions by their weights. Without gradients it
    is the task's own."""

    def __init__(self, objective: Any, teacher: Any, settings: Distil) -> None:
        super().__init__()
        if not hasattr(objective, "taught"):
            raise SpecError(
                "distil",
                f"{type(objective).__name__} has no logits over classes or tokens",
                "a student learns a teacher's distribution",
                "leave it out",
            )
        self.objective, self.settings = objective, settings
        self.model = objective.model
        self._teacher = (teacher,)  # a tuple: a module would be the engine's
        _check_outputs(self.model, teacher)
        if settings.attention:
            for model in (self.model, teacher):
                model.set_attn_implementation("eager")  # others give no probabilities
        if settings.hidden or settings.attention:
            self._pairs = _pair_blocks(self.model, teacher)

    def forward(self, batch: Batch) -> Any:
        if not torch.is_grad_enabled():
            return self.objective(batch)
        settings, (teacher,) = self.settings, self._teacher
        with _seen(self.model, settings) as student, _seen(teacher, settings) as taught:
            terms, output = self.objective(batch)
            with torch.no_grad():
                self.objective.outputs_of(teacher, batch)
        own, count = terms["loss"]
        real = batch["labels"].flatten() != IGNORED
        wanted, found = (
            self.objective.rows_of(model, seen["output"])[real]
            for model, seen in ((teacher, taught), (self.model, student))
        )
        loss = (1 - settings.share) * own
        if settings.share:
            heads = self.objective.head_of(teacher), self.objective.head_of(self.model)
            loss = loss + settings.share * divergence(
                wanted, found, settings.temperature, heads=heads
            )
        mask = batch.get("attention_mask")
        for weight, kind in ((settings.hidden, "hidden"), (settings.attention, "attention")):
            if weight:
                errors = [
                    _mean_square(student[f"{kind}{ours}"], taught[f"{kind}{theirs}"], mask)
                    for ours, theirs in self._pairs
                ]
                loss = loss + weight * count * torch.stack(errors).mean()
        return {**terms, "loss": (loss, count)}, output


def divergence(wanted: Tensor, found: Tensor, temperature: float, *, heads: Any) -> Tensor:
    """Σ over targets of T² · KL(teacher ‖ student). `wanted` and `found` [targets, …] become logits
    by the heads (None: they are), a chunk at a time, so that those of a vocabulary need no room."""

    def part(wanted: Tensor, found: Tensor) -> Tensor:
        theirs, ours = (
            (value if head is None else head(value)).float() / temperature
            for value, head in zip((wanted, found), heads, strict=True)
        )
        return F.kl_div(
            F.log_softmax(ours, dim=-1),
            F.log_softmax(theirs, dim=-1),
            reduction="sum",
            log_target=True,
        )

    width = found.shape[-1] if heads[1] is None else heads[1].out_features
    size = max(1, CHUNK_LOGITS // width)
    total = found.new_zeros((), dtype=torch.float32)
    for theirs, ours in zip(torch.split(wanted, size), torch.split(found, size), strict=True):
        if heads[1] is None:
            total = total + part(theirs, ours)
        else:
            total = total + checkpoint(part, theirs, ours, use_reentrant=False)
    return total * temperature**2


def _mean_square(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """The mean squared error, over tokens that are no padding."""
    errors = (ours.float() - theirs.float()).square()
    if mask is None:
        return errors.mean()
    if errors.dim() == 3:
        return (errors.mean(dim=-1) * mask).sum() / mask.sum()
    return (errors.mean(dim=1).sum(dim=-1) * mask).sum() / mask.sum()


def _check_outputs(student: Any, teacher: Any) -> None:
    names = ("vocab_size", "num_labels", "hidden_size")
    for name in names:
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if name != "hidden_size" and ours != theirs:
            raise SpecError(
                "distil.run",
                f"has {theirs} for {name}, and the student {ours}",
                "both tell the same",
            )


def _pair_blocks(student: Any, teacher: Any) -> list[tuple[int, int]]:
    """Each block of the student, with the one of the teacher as far up as it is."""
    ours, theirs = len(find_blocks(student)), len(find_blocks(teacher))
    if student.config.hidden_size != teacher.config.hidden_size or not ours:
        raise SpecError(
            "distil.hidden",
            "the student's blocks are not as wide as the teacher's, or there are none",
            "outputs are compared place by place",
            "leave hidden and attention at 0",
        )
    return [(place, round((place + 1) * theirs / ours) - 1) for place in range(ours)]


@contextmanager
def _seen(model: Any, settings: Distil) -> Iterator[dict[str, Tensor]]:
    """What goes through a model within the block: its `output`, that of the objective's part of it,
    and those of blocks and attentions that are asked for."""
    seen: dict[str, Any] = {}
    handles = [
        part.register_forward_hook(lambda module, given, output: seen.__setitem__("output", output))
        for part in {model, model.base_model}
    ]
    for place, block in enumerate(find_blocks(model)):
        if settings.hidden:
            handles.append(block.register_forward_hook(_keeper(seen, f"hidden{place}")))
        if settings.attention:
            keeper = _keeper(seen, f"attention{place}", at=1)
            inside = (inner for inner in block.modules() if inner is not block)
            handles += [inner.register_forward_hook(keeper) for inner in inside]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keeper(seen: dict[str, Any], name: str, at: int = 0) -> Any:
    def keep(module: nn.Module, given: Any, output: Any) -> None:
        if at and not (isinstance(output, tuple) and len(output) > at):
            return
        value = output[at] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.dim() == 3 + at:
            seen[name] = value

    return keep
