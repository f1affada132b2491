"""Documents that are packed into a row see nothing of each other, on every way of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dray.errors import SpecError
from dray.models.build import (
    check_builds,
    documents_apart,
    keeps_documents_apart,
    one_document_a_row,
)
from dray.models.config import make_config
from dray.spec import Spec
from dray.tasks.causal_lm import CausalLM
from small_models import VOCAB, small_model, small_spec, some_ids


class Apart(CausalLM):
    apart = True


def apart_spec(architecture: str) -> Spec:
    return small_spec(architecture).model_copy(update={"task": Apart()})


def configured(architecture: str) -> tuple[Spec, Any]:
    spec = apart_spec(architecture)
    return spec, make_config(spec, vocab_size=VOCAB, pad_token_id=1, eos_token_id=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "gpt_neox", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "mixtral"],
)
def test_a_neighbour_changes_nothing(architecture: str, attention: str) -> None:
    spec, config = configured(architecture)
    assert check_builds(spec, config)
    model = small_model(spec)
    model.config._attn_implementation = attention
    ids, sizes = some_ids(2), (12, 13, 7)
    places = torch.cat([torch.arange(size) for size in sizes]).expand(2, -1)
    other = ids.clone()
    other[:, :12], other[:, 25:] = some_ids(4)[2:, :12], some_ids(4)[2:, 25:]
    middle = slice(12, 25)

    def logits(given: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=given, position_ids=positions).logits
            return found

    for inside in (documents_apart(), torch.no_grad()):  # transformers by itself does the same
        with inside:
            found, changed = logits(ids, places)[:, middle], logits(other, places)[:, middle]
        torch.testing.assert_close(found, changed, rtol=0, atol=2e-6)
    with documents_apart():
        alone = logits(ids[:, middle], places[:, middle])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    # What would be if nobody looked: the test can tell.
    with one_document_a_row():
        leaking = (logits(ids, places) - logits(other, places))[:, middle].abs().max()
    assert float(leaking) > 1e-4


@pytest.mark.parametrize("architecture", ["bloom", "opt", "mamba", "jamba", "qwen3_next"])
def test_an_architecture_that_lets_them_see_each_other_is_refused(architecture: str) -> None:
    spec, config = configured(architecture)
    with pytest.raises(SpecError, match=r"packed into a row see each other.*llama"):
        check_builds(spec, config)
    plain = small_spec(architecture)
    assert not keeps_documents_apart(check_builds(plain, config))
