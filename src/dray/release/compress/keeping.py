"""What is stored of a compressed model: a run whose one checkpoint holds weights alone, packed ones
as they are, and whose spec starts from the run that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dray.models.config import make_kept_config
from dray.models.packed import Packed, state_shape
from dray.release.compress.method import Candidate, Method
from dray.release.trained import Trained
from dray.runs import Driver, Run, make_fragment_key
from dray.runs.finished import create_finished
from dray.spec import Spec, make_spec


def make_compressed_spec(trained: Trained, name: str, **sections: Any) -> Spec:
    """The spec of a run that is made from another one: its own, but for what was only of its
    training, with weights that start from it; `sections` replace others."""
    tree = trained.spec.model_dump(mode="json")
    released = ("evaluate", "compress", "export", "serve")
    for key in ("adapters", "freezing", "distil", "privacy", *released):
        tree.pop(key, None)
    for average in ("ema", "swa"):
        tree["regularization"].pop(average, None)
    tree["optimizer"].pop("width_transfer", None)
    tree["optimizer"].pop("block_rate", None)
    labels = trained.spec.model.num_labels
    tree["model"] = {
        "run": trained.run.name,
        "step": trained.checkpoint.step,
        **({} if labels is None else {"num_labels": labels}),
    }
    if not trained.checkpoint.step:  # a run of drawn weights
        del tree["model"]["step"]
    if trained.spec.task.tokenizes:
        tree["tokenizer"] = {"run": trained.run.name}
    else:
        tree.pop("tokenizer", None)
    return make_spec(tree | {"name": name} | sections, f"run {name}", kept=True)


def weight_tensors(model: Any, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    """What a checkpoint stores of a model in fp32, by fragment key: weights as they are or packed,
    and buffers; 1-D."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in packed:
            for state, tensor in packed[name].states.items():
                tensors[make_fragment_key(name, state, 0)] = tensor.reshape(-1)
        else:
            tensors[make_fragment_key(name, "param", 0)] = parameter.detach().float().reshape(-1)
    for name, buffer in _buffers(model).items():
        tensors[make_fragment_key(name, "buffer", 0)] = buffer.detach().reshape(-1)
    return tensors


def make_metadata(
    model: Any, packed: Mapping[str, Packed], spec: Spec, step: int
) -> dict[str, Any]:
    """The metadata of the checkpoint of a model in fp32."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    shapes |= {name: list(buffer.shape) for name, buffer in _buffers(model).items()}
    others = {
        name: {state: list(state_shape(one.packing, one.shape, state)) for state in one.states}
        for name, one in packed.items()
    }
    return {
        "step": step,
        "optimizer_step": 0,
        "tokens": 0,
        "loss_scale": {},
        "fingerprint": spec.fingerprint(),
        "shapes": shapes,
        **({"state_shapes": others} if others else {}),
        **(
            {"packing": {name: one.packing.to_json() for name, one in packed.items()}}
            if packed
            else {}
        ),
        "zero_stage": 0,
        "num_ranks": 1,
        "best": None,
        "validations_without_better": 0,
        "validation": {},
        "validation_step": step,
    }


def keep(
    run: Run,
    driver: Driver,
    candidate: Candidate,
    methods: Sequence[Method],
    contents: Contents,
    *,
    manifest_sha256: str,
    table: Mapping[str, Any] | None = None,
) -> None:
    """Make the run that is held of a candidate's contents. Raises StoreError."""
    parent = candidate.trained
    create_finished(
        run,
        driver,
        contents.spec,
        like=parent.run,
        config=contents.config,
        tensors=contents.tensors,
        metadata=contents.metadata,
        step=parent.checkpoint.step,
        compressed={
            "run": parent.run.name,
            "step": parent.checkpoint.step,
            "attempt": parent.checkpoint.attempt,
            "manifest_sha256": manifest_sha256,
            "methods": [method.told() for method in methods],
            "packed": bool(candidate.packed),
        },
        table=table,
    )


class Contents:
    """What is stored of a candidate, taken before layers hold its weights otherwise."""

    def __init__(self, candidate: Candidate, name: str) -> None:
        self.spec = make_compressed_spec(candidate.trained, name)
        self.config = make_kept_config(candidate.model)
        self.tensors = weight_tensors(candidate.model, candidate.packed)
        step = candidate.trained.checkpoint.step
        self.metadata = make_metadata(candidate.model, candidate.packed, self.spec, step)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def _buffers(model: Any) -> dict[str, Tensor]:
    """Persistent buffers by name."""
    found = {}
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            found[name] = buffer
    return found
