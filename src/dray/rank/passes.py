"""How a micro batch is learnt from: by one pass of its rows, or by several: under two masks of
dropout, or on inputs that are made worse.

Refuses models without a table of embeddings, and tasks without logits where outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dray.errors import SpecError
from dray.rank.chance import Chance
from dray.rank.teaching import divergence
from dray.spec import Adversarial, Regularization
from dray.tasks import Batch
from dray.tasks.rows import IGNORED

_START = 1
"""The name of draws of where a row's perturbation begins."""
_EPSILON = {"fgm": 1.0, "pgd": 1.0, "freelb": 1.0, "smart": 1e-3}
_STEP = {"pgd": 0.3, "freelb": 0.1, "smart": 1e-3}
_WEIGHT = {"fgm": 0.5, "pgd": 0.5, "smart": 1.0}
_TINY = 1e-30
"""What a length is at least."""


@dataclass(frozen=True)
class Micro:
    """What may be done with a micro batch."""

    forward: Callable[[Batch], Any]
    """The engine's forward pass of the objective, which a backward pass follows."""
    probe: Callable[[Batch], Any]
    """The same for gradients of what goes in alone: nothing is learnt from it."""
    backward: Backward


class Backward(Protocol):
    """Adds the gradient of a summed loss; `last`: none of this micro batch comes after it."""

    def __call__(self, loss: Tensor, *, last: bool) -> None: ...


class Passes:
    """How a micro batch is learnt from: by one pass."""

    def around(self, objective: nn.Module) -> nn.Module:
        """What the engine has in the place of the objective. Raises SpecError where it cannot be
        learnt from so."""
        return objective

    def learn(self, micro: Micro, batch: Batch) -> Tensor:
        """Make the gradients. Returns the summed loss that they are of, without a graph."""
        terms, _ = micro.forward(batch)
        loss: Tensor = terms["loss"][0]
        micro.backward(loss, last=True)
        return loss.detach()


def build_passes(given: Regularization, chance: Chance) -> Passes:
    """The passes that a spec's regularisation wants."""
    if given.r_drop:
        return TwoMasks(given.r_drop, chance)
    if given.adversarial is None:
        return Passes()
    return (Smooth if given.adversarial.name == "smart" else Worse)(given.adversarial, chance)


class TwoMasks(Passes):
    """R-Drop (Liang et al. 2021): the mean of the losses of two passes, and `weight` times the sum
    of the divergences of their outputs from each other, over 4: what the paper has, halved, so that
    a rate means what it does without."""

    def __init__(self, weight: float, chance: Chance) -> None:
        self._weight, self._chance = weight, chance

    def around(self, objective: Any) -> nn.Module:
        """The pair of passes as one."""
        _check_outputs(objective, "regularization.r_drop")
        return _Several(objective, self._pair)

    def _pair(self, objective: Any, batch: Batch) -> Any:
        if not torch.is_grad_enabled():
            return objective(batch)
        (terms, output), first = _compared(objective, batch)
        with self._chance.another_pass(1):
            (others, _), second = _compared(objective, batch)
        apart = symmetric_divergence(first, second)
        (own, count), (other, _) = terms["loss"], others["loss"]
        loss = (own + other) / 2 + self._weight * apart / 4
        return {**terms, "loss": (loss, count)}, output


class Worse(Passes):
    """A task's loss on embeddings that are moved to where it is greater.

    - fgm (Miyato, Dai and Goodfellow 2017): by epsilon along the gradient. The loss is
      (1 - weight) · of the rows as they are + weight · of the moved ones.
    - pgd (Madry et al. 2018): as fgm, in `steps` steps from where the rows are, each back into the
      ball of epsilon.
    - freelb (Zhu et al. 2020): from a uniform place in the ball on; the loss is the mean of those
      at all places, which all give gradients to the weights.

    Distances are 2-norms of a row's embeddings together, padding left out. Each pass has its
    backward pass before the next one, so that activations of one are there at a time.
    """

    def __init__(self, settings: Adversarial, chance: Chance) -> None:
        name = settings.name
        self._name, self._num_steps = name, settings.num_steps
        self._epsilon = settings.epsilon or _EPSILON[name]
        self._step = settings.step_size or _STEP.get(name, self._epsilon)
        self._weight = settings.weight or _WEIGHT.get(name, 0.0)
        self._chance = chance

    def around(self, objective: Any) -> nn.Module:
        """The objective, with embeddings that can be moved."""
        self._embeddings = MovedEmbeddings(objective.model)
        around: nn.Module = objective
        return around

    def learn(self, micro: Micro, batch: Batch) -> Tensor:
        learn = self._freelb if self._name == "freelb" else self._worst
        return learn(micro, batch)

    def _worst(self, micro: Micro, batch: Batch) -> Tensor:
        embeddings = self._embeddings
        with embeddings.watched(batch):
            own: Tensor = micro.forward(batch)[0]["loss"][0]
            micro.backward((1 - self._weight) * own, last=False)
        added = self._stepped(None)
        for _ in range(self._num_steps - 1):
            with embeddings.watched(batch, added):
                embeddings.climb(micro.probe(batch)[0]["loss"][0])
            added = self._stepped(added)
        with embeddings.watched(batch, added):
            worse: Tensor = micro.forward(batch)[0]["loss"][0]
            micro.backward(self._weight * worse, last=True)
        return ((1 - self._weight) * own + self._weight * worse).detach()

    def _freelb(self, micro: Micro, batch: Batch) -> Tensor:
        total, added = None, cast("Added", self._start)
        for step in range(self._num_steps):
            with self._embeddings.watched(batch, added):
                loss: Tensor = micro.forward(batch)[0]["loss"][0] / self._num_steps
                micro.backward(loss, last=step == self._num_steps - 1)
            total = loss.detach() if total is None else total + loss.detach()
            added = self._stepped(self._embeddings.added)
        assert total is not None
        return total

    def _start(self, embedded: Tensor) -> Tensor:
        """Uniform in a cube whose corners are epsilon away; padding, which goes by what else is in
        the batch, stays where it is."""
        real = self._embeddings.masked(torch.ones_like(embedded, dtype=torch.float32))
        uniform = (2 * self._chance.uniform(embedded.shape, _START) - 1) * real
        size = real.sum(dim=_inner(real), keepdim=True).clamp(min=1)
        return self._epsilon * size.rsqrt() * uniform

    def _stepped(self, added: Tensor | None) -> Tensor:
        """One step up, along each row's gradient, and back into its ball."""
        gradient = self._embeddings.gradient()
        norms = torch.linalg.vector_norm(gradient, dim=_inner(gradient), keepdim=True)
        along: Tensor = self._step * gradient / norms.clamp(min=_TINY)
        moved = along if added is None else added + along
        norms = torch.linalg.vector_norm(moved, dim=_inner(moved), keepdim=True)
        inside: Tensor = (self._epsilon / norms.clamp(min=_TINY)).clamp(max=1.0)
        return moved * inside


class Smooth(Passes):
    """SMART (Jiang et al. 2020), its smoothness without the Bregman proximal point: embeddings are
    moved to where the outputs differ most from what they are, no number by more than epsilon; the
    loss is the task's own + weight · the divergences of the outputs from each other.

    The paper's epsilon is 1e-5, where the divergence's gradient is mostly rounding in fp32; 1e-3 is
    taken here.
    """

    def __init__(self, settings: Adversarial, chance: Chance) -> None:
        self._num_steps = settings.num_steps
        self._epsilon = settings.epsilon or _EPSILON["smart"]
        self._step = settings.step_size or _STEP["smart"]
        self._weight = settings.weight or _WEIGHT["smart"]
        self._chance = chance
        self._pass: Callable[[Any, Batch], Any] | None = None

    def around(self, objective: Any) -> nn.Module:
        """What the objective computes in each of the passes."""
        _check_outputs(objective, "regularization.adversarial.name = smart")
        self._embeddings = MovedEmbeddings(objective.model)
        return _Several(objective, self._compute)

    def learn(self, micro: Micro, batch: Batch) -> Tensor:
        embeddings, added = self._embeddings, cast("Added", self._start)
        with torch.no_grad():
            self._pass = self._look
            micro.probe(batch)
        self._pass = self._climb
        for _ in range(self._num_steps):
            with embeddings.watched(batch, added):
                embeddings.climb(micro.probe(batch)[0]["loss"][0])
            added = self._stepped()
        self._pass, self._added = self._pair, added
        loss: Tensor = micro.forward(batch)[0]["loss"][0]
        micro.backward(loss, last=True)
        self._pass = None
        return loss.detach()

    def _compute(self, objective: Any, batch: Batch) -> Any:
        return objective(batch) if self._pass is None else self._pass(objective, batch)

    def _look(self, objective: Any, batch: Batch) -> Any:
        """The outputs as they are, which stay while it climbs."""
        self._fixed = _compared(objective, batch, objective.outputs_of)[1]
        return {}, {}

    def _climb(self, objective: Any, batch: Batch) -> Any:
        (terms, output), moved = _compared(objective, batch)
        apart = symmetric_divergence(self._fixed, moved)
        return {"loss": (apart, terms["loss"][1])}, output

    def _pair(self, objective: Any, batch: Batch) -> Any:
        (terms, output), as_it_is = _compared(objective, batch)
        with self._embeddings.watched(batch, self._added):
            _, moved = _compared(objective, batch)
        own, count = terms["loss"]
        loss = own + self._weight * symmetric_divergence(as_it_is, moved)
        return {**terms, "loss": (loss, count)}, output

    def _start(self, embedded: Tensor) -> Tensor:
        return self._epsilon * self._embeddings.masked(self._chance.normal(embedded.shape, _START))

    def _stepped(self) -> Tensor:
        """One step up, by each row's greatest gradient, no number further than epsilon."""
        gradient, at = self._embeddings.gradient(), self._embeddings.added
        greatest = gradient.abs().amax(dim=_inner(gradient), keepdim=True)
        moved = at + self._step * gradient / greatest.clamp(min=_TINY)
        inside: Tensor = moved.clamp(-self._epsilon, self._epsilon)
        return inside


class _Several(nn.Module):
    """An objective of which a pass computes more; without gradients it is the task's own, unless a
    pass wants otherwise."""

    def __init__(self, objective: Any, compute: Callable[[Any, Batch], Any]) -> None:
        super().__init__()
        self.objective, self.model = objective, objective.model
        self._compute = compute

    def forward(self, batch: Batch) -> Any:
        return self._compute(self.objective, batch)


Added = Tensor | Callable[[Tensor], Tensor] | None


class MovedEmbeddings:
    """The embeddings of a model, to which something may be added, and their gradients. Raises
    SpecError for a model that has none."""

    def __init__(self, model: Any) -> None:
        self._watches = False
        self._mask: Tensor | None = None
        self._given: Added = None
        self._added: Tensor | None = None
        self._moved: Tensor | None = None
        self._gradient: Tensor | None = None
        _find_embeddings(model).register_forward_hook(self._move)

    @contextmanager
    def watched(self, batch: Batch, added: Added = None) -> Iterator[None]:
        """Within it the embeddings of a batch have something added: [rows, tokens, …], or what a
        function makes of them."""
        self._watches, self._given, self._mask = True, added, batch.get("attention_mask")
        self._gradient = None
        try:
            yield
        finally:
            self._watches = False

    def _move(self, module: nn.Module, given: Any, output: Tensor) -> Tensor:
        if not (self._watches and torch.is_grad_enabled()):
            return output
        added = self._given
        if callable(added) and not isinstance(added, Tensor):
            with torch.no_grad():
                added = added(output)
        self._added = added
        moved = output if added is None else output + added.to(output.dtype)
        if not moved.requires_grad:  # tables that are not trained
            moved = moved.detach().requires_grad_()
        moved.retain_grad()
        self._moved = moved
        return moved

    @property
    def added(self) -> Tensor:
        """What was added last."""
        assert self._added is not None
        return self._added

    def climb(self, loss: Tensor) -> None:
        """Find the gradient alone: nothing is learnt."""
        assert self._moved is not None
        (self._gradient,) = torch.autograd.grad(loss, self._moved)

    def gradient(self) -> Tensor:
        """Of the last pass, fp32, with zeros for padding."""
        assert self._moved is not None
        found = self._gradient if self._gradient is not None else self._moved.grad
        assert found is not None
        return self.masked(found.float())

    def masked(self, values: Tensor) -> Tensor:
        """With zeros for padding."""
        mask = self._mask
        if mask is None or mask.numel() != values.shape[:2].numel():
            return values
        return values * mask.reshape(*values.shape[:2], *[1] * (values.dim() - 2))


def symmetric_divergence(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> Tensor:
    """Σ over targets of KL(one ‖ other) + KL(other ‖ one), of what `_compared` gives."""
    (ours, head), (theirs, _) = one, other
    heads = (head, head)
    return divergence(ours, theirs, 1.0, heads=heads) + divergence(theirs, ours, 1.0, heads=heads)


def _compared(
    objective: Any, batch: Batch, compute: Callable[..., Any] | None = None
) -> tuple[Any, tuple[Tensor, Any]]:
    """A pass, and what of it is compared: rows beside the targets, and what makes logits of them.
    `compute`: what shows the model a batch, in the place of the objective."""
    seen: list[Any] = []
    model = objective.model
    handles = [
        part.register_forward_hook(lambda module, given, output: seen.append(output))
        for part in {model, model.base_model}
    ]
    try:
        found = objective(batch) if compute is None else compute(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    real = batch["labels"].flatten() != IGNORED
    return found, (objective.rows_of(model, seen[-1])[real], objective.head_of(model))


def _check_outputs(objective: Any, where: str) -> None:
    if not hasattr(objective, "taught"):
        raise SpecError(
            where,
            f"{type(objective).__name__} has no logits over classes or tokens",
            "outputs are compared as distributions",
            "leave it out, or give regularization.adversarial.name=fgm",
        )


def _find_embeddings(model: Any) -> nn.Module:
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise SpecError(
            "regularization.adversarial",
            f"{type(model).__name__} has no embeddings that transformers knows",
            "it is the embeddings of a row that are moved",
            "leave it out",
        )
    return found


def _inner(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.dim()))
