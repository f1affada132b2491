"""Text from a run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from dray.errors import SpecError
from dray.export import local_tokenizer
from dray.trained import load_trained


def generate(storage: str, name: str, prompts: Sequence[str], *, step: str | int | None = None, max_tokens: int = 64,
             temperature: float = 0.8, top_p: float = 0.95, seed: int = 0) -> list[str]:
    """A continuation of each prompt: new text only. Temperature 0 takes the likeliest token each time.

    Raises UserError for a run that does not generate, and for sampling settings out of range.
    """
    import torch

    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise SpecError("generate", f"max_tokens {max_tokens}, temperature {temperature}, top_p {top_p}",
                        "max_tokens ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1")
    trained = load_trained(storage, name, step)
    if trained.spec.task != "causal_lm":
        raise SpecError(f"run {name!r}", f"its task is {trained.spec.task}", "only causal_lm generates text")
    with local_tokenizer(trained) as tokenizer:
        torch.manual_seed(seed)
        texts = []
        longest = trained.spec.model.max_positions or trained.spec.data.sequence_tokens
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
            if ids.shape[1] == 0:  # an empty prompt begins where documents begin
                ids = torch.tensor([[trained.manifest.eos_token_id]])
            ids = ids[:, -max(1, longest - 1):]
            room = min(max_tokens, longest - ids.shape[1])
            sampling = ({"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature
                        else {"do_sample": False})
            with torch.no_grad():
                out = trained.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(1, room), use_cache=True,
                    pad_token_id=trained.manifest.pad_token_id, eos_token_id=trained.manifest.eos_token_id, **sampling,
                )
            texts.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
    return texts
