"""A trained model read back from a run's checkpoint into one process, for evaluation, generation and export.

Nothing is unpickled: the configuration comes from the run's spec, the weights from verified safetensors fragments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dray.corpus.manifest import Manifest, load_manifest
from dray.errors import StoreError
from dray.models import build_model
from dray.spec import Spec
from dray.store import LOWER_IS_BETTER, CheckpointInfo, CheckpointReader, Run, open_filesystem


@dataclass(frozen=True)
class Trained:
    """A model with what it was trained from."""

    run: Run
    checkpoint: CheckpointInfo
    spec: Spec
    corpus: str
    manifest: Manifest
    model: Any
    """A transformers model in fp32, in evaluation mode."""

    @property
    def tokenizer_folder(self) -> str:
        """The corpus' tokeniser, on the corpus' storage."""
        return f"{self.corpus}/tokenizer"


def load_trained(storage: str, name: str, step: str | int | None = None) -> Trained:
    """Load the model of a run at a step: a number, `best` by the run's validation metric, or None for the newest.

    Raises StoreError when there is no such run or checkpoint, or it is damaged.
    """
    run = Run.open(storage, name)
    info = choose_checkpoint(run, step)
    spec, corpus = run.spec(), run.record()["corpus"]
    manifest = load_manifest(*open_filesystem(corpus))
    model = build_model(
        spec, vocab_size=manifest.vocab_size, num_labels=len(manifest.labels) or 2, labels=manifest.labels,
        pad_token_id=manifest.pad_token_id, eos_token_id=manifest.eos_token_id, initial_weights=False,
    )
    with run.hold(info), CheckpointReader(run, info) as reader:
        problems = reader.verify_files(range(reader.num_files))
        if problems:
            raise StoreError(info.path, "; ".join(problems), "a damaged checkpoint is never loaded",
                             "try another --step")
        _fill(model, reader)
    model.eval()
    return Trained(run, info, spec, corpus, manifest, model)


def choose_checkpoint(run: Run, step: str | int | None) -> CheckpointInfo:
    """The checkpoint a person means. Raises StoreError that lists the steps there are."""
    found = run.checkpoints()
    if step is None:
        newest = run.latest_checkpoint()
        if newest is not None:
            return newest
    elif step == "best":
        metric = run.spec().validation.metric
        scored = [info for info in found if metric in info.metrics]
        sign = 1 if metric in LOWER_IS_BETTER else -1
        if scored:
            return min(scored, key=lambda info: sign * info.metrics[metric])
    else:
        for info in found:
            if str(info.step) == str(step):
                return info
    steps = ", ".join(str(info.step) for info in found) or "none"
    raise StoreError(f"run {run.name!r}", f"no sound checkpoint {step or ''}".strip(), f"steps with one: {steps}")


@torch.no_grad()
def _fill(model: torch.nn.Module, reader: CheckpointReader) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(reader.read(name).reshape(parameter.shape))
    for name, buffer in model.named_buffers():
        if reader.has(name, "buffer"):
            buffer.copy_(reader.read(name, "buffer").reshape(buffer.shape))
