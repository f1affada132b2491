"""Every task's model as a function of tensors: what goes in is named, grows with rows and tokens
as it is said to, and padding changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.tasks.parts.graphs import ANSWER, ROWS, TOKENS
from small_models import VOCAB, small_model
from task_cases import CASES
from task_cases import make as make_spec_of

OUTPUTS = {"embedding": "embeddings", "rating": "ratings", "sparse_autoencoder": "features"}


@dataclass
class Corpus:
    """What a task wants to know of one."""

    pad_token_id: int | None = 1
    labels: tuple[str, ...] = ("a", "b", "c")
    mask_token_id: int | None = 2
    vocab_size: int = VOCAB
    label_counts: dict[str, float] = field(default_factory=lambda: {"a": 1.0, "b": 1.0, "c": 1.0})


def make(name: str) -> tuple[Any, Any]:
    """A task on a corpus, and a small model of it."""
    spec = make_spec_of(name, Path("none"))
    bound = spec.task.on(Corpus(), spec.model.num_labels)
    return bound, small_model(spec, num_labels=bound.num_labels)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_goes_in_and_comes_out(name: str) -> None:
    bound, model = make(name)
    task = bound.name
    graph = bound.graph(model)
    assert graph.output == OUTPUTS.get(task, "logits")
    assert all(axes[0] == ROWS for axes in graph.inputs.values())
    grows = any(TOKENS in axes for axes in graph.inputs.values())
    assert grows == (task not in ("feature_classification", "image_classification", "rating"))
    assert (ANSWER in str(graph.inputs)) == (name == "seq2seq")
    for rows, tokens in ((1, 9), (4, 12)):
        batch = graph.draw(rows, tokens, torch.Generator().manual_seed(rows))
        assert list(batch) == list(graph.inputs)
        found = graph.module(*batch.values())
        assert len(found) == rows
        assert found.isfinite().all()
        if "attention_mask" not in batch or not bound.tokenizes:
            continue
        inside = int(batch["attention_mask"][-1].sum())
        if rows > 1:
            assert inside < tokens
        own = {name: values[-1:, :inside] for name, values in batch.items()}
        if "decoder_input_ids" in batch:
            own["decoder_input_ids"] = batch["decoder_input_ids"][-1:]
        alone = graph.module(*own.values())
        last = found[-1:, :inside] if found.dim() > 2 and name != "seq2seq" else found[-1:]
        assert torch.allclose(last, alone, atol=1e-4)


@torch.no_grad()
def test_it_is_what_predictions_are_made_of() -> None:
    bound, model = make("embedding")
    graph = bound.graph(model)
    batch = graph.draw(3, 8, torch.Generator().manual_seed(0))
    _, output = bound.objective(model)({**batch, "real": torch.ones(3, dtype=torch.bool)})
    assert torch.allclose(output["pooled"][:, 0], graph.module(*batch.values()), atol=1e-6)
    bound, model = make("rating")
    graph = bound.graph(model)
    batch = graph.draw(3, 8, torch.Generator().manual_seed(0))
    more = {"labels": torch.zeros(3), "hidden": torch.zeros(3, 2, dtype=torch.bool)}
    _, output = bound.objective(model).eval()({**batch, **more})
    found = graph.module(*batch.values())
    assert torch.allclose(output["numbers"], found, atol=1e-6)
    assert ((found >= 1) & (found <= 5)).all()
