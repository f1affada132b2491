"""A small model that writes, as a folder that `dray export` could have made: its weights are drawn,
so that its words mean nothing, but are always the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from chats import make_tools
from dray.models.folder import save_pretrained_folder
from small_models import small_model, small_spec
from tiny import source_for


def save_small_writer(folder: Path, row_tokens: int = 256) -> Path:
    """A llama of 2 layers with a byte-level tokeniser of 330 tokens and ChatML."""
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    tools = make_tools(tokenizer)
    data = {"train": [source_for("causal_lm")], "sequence_tokens": row_tokens}
    spec = small_spec("llama", sections={"data": data})
    vocab = 330
    model = small_model(spec, vocab_size=vocab, pad_token_id=1, eos_token_id=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    assert tools.chat_template
    save_pretrained_folder(model.state_dict(), model, tokenizer, folder)
    return folder


def change_weights(folder: Path) -> Path:
    """Make another model of a saved one. Returns its folder."""
    (path,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder
