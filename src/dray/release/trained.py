"""A trained model read back from a run's checkpoint into one process, for evaluation, generation
and export.

Nothing is unpickled: the configuration comes from the run's spec, the weights from verified
safetensors fragments.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from dray.corpus.manifest import Manifest, load_run_manifest
from dray.errors import SpecError, StoreError
from dray.models.adapters import adapt, leave_only_head, merge
from dray.models.build import build_model, fit_to_train, sizes_by
from dray.models.freezing import is_base
from dray.models.packed import Packed, Packing, install, state_shape, states_of
from dray.origin import make_origin, open_weights
from dray.release.opened import Opened
from dray.runs import CheckpointInfo, CheckpointReader, Run, choose_checkpoint
from dray.spec import Adapters, Spec
from dray.storage.filesystem import child, list_files, open_filesystem

Weights = Literal["trained", "ema", "swa"]
"""Which of a checkpoint's weights: those that were trained, or their moving average."""


@dataclass(frozen=True)
class Chosen:
    """Which adapters a model is to have: the run's own, and those of other runs on the same
    base."""

    own: bool = True
    others: tuple[str, ...] = ()
    """Names of the runs, whose newest checkpoints are read."""

    def told(self) -> dict[str, Any]:
        """What of it a result should say: nothing, where it is as the run has it."""
        if self == Chosen():
            return {}
        return {"adapters": [*(["own"] if self.own else []), *self.others]}


@dataclass(frozen=True)
class Trained(Opened):
    """A model with what it was trained from."""

    run: Run
    checkpoint: CheckpointInfo
    spec: Spec
    corpus: str
    manifest: Manifest
    weights: Weights = "trained"
    chosen: Chosen = Chosen()
    unpacked: bool = False
    """Whether weights that are stored in fewer bytes are held in fp32, as an export needs them."""

    @cached_property
    def model(self) -> Any:
        """A transformers model in fp32, in evaluation mode; read when it is first asked for. What
        is stored in fewer bytes is held as it is stored, unless `unpacked`. Raises
        StoreError for a checkpoint that is damaged, or has no such weights, and SpecError for
        adapters that do not go together."""
        run, spec, manifest = self.run, self.spec, self.manifest
        kept, origin = run.model(), None
        if spec.keeps_base and kept and kept["pretrained"]:
            origin = make_origin(kept["pretrained"], run.storage)
            origin.check()
        model = build_model(
            spec,
            **sizes_by(manifest, spec.task.on(manifest, spec.model.num_labels).num_labels),
            initial_weights=spec.keeps_base,
            config=kept["config"] if kept else None,
            weights=None if origin is None else open_weights(origin),
            adapted=False,
        )
        if self.chosen != Chosen():
            return self._adapted_otherwise(model).eval()
        if spec.adapters is not None:
            adapt(model, spec, unpacked=True)
        else:
            fit_to_train(model, spec)
        packed = self._fill(model)
        if packed and not self.unpacked:
            install(model, packed)
        return model.eval()

    def _fill(
        self, model: torch.nn.Module, *, only: Collection[str] | None = None
    ) -> dict[str, Packed]:
        """Read the checkpoint into a model, or into what of it has one of the names. Returns what
        is stored in fewer bytes, by name: the model has its values, too. Raises StoreError."""
        run, info = self.run, self.checkpoint
        with run.hold(info), CheckpointReader(run, info) as reader:
            reader.check_files("try another --step")
            if self.weights != "trained" and not reader.names(self.weights):
                raise StoreError(
                    info.path,
                    f"holds no average of the weights (--weights {self.weights})",
                    f"a run keeps one if its spec has regularization.{self.weights}",
                    "leave --weights out for the trained weights",
                )
            return _fill(model, reader, self.weights, only)

    def _adapted_otherwise(self, model: Any) -> Any:
        """A base with the adapters that are chosen. Those that change weights become a part of
        them, one after the other, before the one kind that does not."""
        _check_chosen(self)
        before = {name for name, _ in model.named_parameters()}
        leave_only_head(model, self.spec)
        self._fill(model)
        runs = [
            *([self] if self.chosen.own else []),
            *(open_trained(self.run.storage, name) for name in self.chosen.others),
        ]
        for trained in sorted(runs, key=_place_of):
            adapt(model, trained.spec, unpacked=True)
            trained._fill(model, only={n for n, _ in model.named_parameters()} - before)
            if trained.spec.adapters.merges and len(runs) > 1:  # type: ignore[union-attr]
                merge(model)
        return model

    @cached_property
    def adapters(self) -> Adapters | None:
        """Those that its model has beside its weights; None for a model that has none, or into
        which all are merged. Known before the model is read. Raises as `model` does for adapters
        that do not go together."""
        own = self.spec.adapters
        if self.chosen == Chosen():
            return own
        _check_chosen(self)
        others = [open_trained(self.run.storage, name).spec.adapters for name in self.chosen.others]
        kinds = [kind for kind in (own if self.chosen.own else None, *others) if kind is not None]
        if len(kinds) == 1:
            return kinds[0]
        return next((kind for kind in kinds if not kind.merges), None)

    @property
    def where(self) -> str:
        return f"run {self.run.name!r}"

    @property
    def tokenizer_folder(self) -> str:
        """The tokeniser: the run's own copy, or the corpus' where an earlier version kept none."""
        kept = child(self.run.corpus_copy, "tokenizer")
        return kept if list_files(*open_filesystem(kept)) else child(self.corpus, "tokenizer")


def open_trained(
    storage: str,
    name: str,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),
    *,
    unpacked: bool = False,
) -> Trained:
    """What a run has at a step: a number, `best` by the run's validation metric (which measured the
    trained weights), or None for the newest. Its model is not read yet.

    Raises StoreError when there is no such run or checkpoint.
    """
    run = Run.open(storage, name)
    info = choose_checkpoint(run, step)
    manifest = load_run_manifest(run)
    return Trained(run, info, run.spec(), run.corpus, manifest, weights, chosen, unpacked)


def load_trained(
    storage: str,
    name: str,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),
    *,
    unpacked: bool = False,
) -> Trained:
    """As `open_trained`, with its model read. Raises StoreError also when the checkpoint is damaged
    or has no such weights."""
    trained = open_trained(storage, name, step, weights, chosen, unpacked=unpacked)
    _ = trained.model
    return trained


def _place_of(trained: Trained) -> tuple[bool, bool]:
    """When adapters come into a base among others: first those that pack it, since they were
    trained on what is packed; those that do not merge last."""
    adapters: Any = trained.spec.adapters
    return not adapters.merges, not adapters.quantized


def _check_chosen(trained: Trained) -> None:
    """Raise SpecError for adapters that there are not, that belong to another base, or that do not
    add up."""
    where, chosen = f"run {trained.run.name!r}", trained.chosen
    if trained.spec.adapters is None:
        raise SpecError(
            where,
            "has no adapters: it was trained whole",
            "adapters are put into the base of a run that has some",
            "leave --adapter and --no-adapters out",
        )
    runs = [trained] if chosen.own else []
    for name in chosen.others:
        other = open_trained(trained.run.storage, name)
        if other.spec.adapters is None:
            raise SpecError(f"--adapter {name}", "has no adapters: it was trained whole")
        if base_of(other) != base_of(trained):
            raise SpecError(
                f"--adapter {name}",
                f"was trained on another model than {trained.run.name}",
                "adapters mean something in the weights that they were trained in",
                "name a run with the same model",
            )
        runs.append(other)
    lasting = [one for one in runs if one.spec.adapters and not one.spec.adapters.merges]
    if len(lasting) > 1:
        kinds = " and ".join(f"{one.run.name}: {one.spec.adapters.name}" for one in lasting)  # type: ignore[union-attr]
        raise SpecError(
            "--adapter",
            f"{kinds}",
            "of those that do not change weights (prefix, prompt, bottleneck) there may be one",
            "leave one of them out, --no-adapters the run's own",
        )


def base_of(trained: Trained) -> Any:
    """What two runs with the same base have in common: what its weights are known by, or what they
    are drawn from."""
    kept = trained.run.model()
    pretrained = kept["pretrained"] if kept else None
    if pretrained is not None:
        return pretrained["digest"]
    return (
        trained.spec.model.model_dump(mode="json"),
        trained.spec.seed,
        trained.manifest.vocab_size,
    )


@torch.no_grad()
def _fill(
    model: torch.nn.Module,
    reader: CheckpointReader,
    weights: Weights,
    only: Collection[str] | None = None,
) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    packings = reader.metadata.get("packing") or {}
    for name, parameter in model.named_parameters():
        if is_base(parameter) or (only is not None and name not in only):
            continue
        if name in packings:
            packed[name] = _read_packed(reader, name, packings[name], tuple(parameter.shape))
            parameter.copy_(packed[name].unpacked())
            continue
        # Frozen parameters have no average: it would be themselves.
        state = weights if reader.has(name, weights) else "param"
        parameter.copy_(reader.read(name, state).reshape(parameter.shape))
    for name, buffer in model.named_buffers():
        if reader.has(name, "buffer"):
            buffer.copy_(reader.read(name, "buffer").reshape(buffer.shape))
    return packed


def _read_packed(
    reader: CheckpointReader, name: str, kept: dict[str, Any], shape: tuple[int, ...]
) -> Packed:
    """Raises StoreError."""
    packing = Packing.from_json(kept, reader.path)
    states = {
        state: reader.read(name, state).reshape(state_shape(packing, shape, state))
        for state in states_of(packing)
    }
    return Packed(packing, shape, states)
