"""Text from a run's checkpoint, on the GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dray.errors import SpecError
from dray.release.trained import Chosen, Weights, load_trained

MAX_BEAMS = 64


def generate(
    storage: str,
    name: str,
    prompts: Sequence[str],
    *,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),  # noqa: B008 - frozen
    max_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    beams: int = 1,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """A continuation of each prompt, or the answer to it: new text only. Temperature 0 takes the
    likeliest token each time, and more `beams` than one the likeliest text of so many that are
    followed.

    `say` is told where the model has no room for a whole prompt and all tokens. Raises UserError
    for a run that does not generate, and for sampling settings out of range.
    """
    import torch

    if (
        max_tokens < 1
        or not 0 <= temperature < math.inf
        or not 0 < top_p <= 1
        or not 0 <= seed < 2**63
        or not 1 <= beams <= MAX_BEAMS
    ):
        settings = f"max_tokens {max_tokens}, temperature {temperature}, top_p {top_p}, seed {seed}"
        rule = "max_tokens ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1, 0 ≤ seed < 2^63"
        raise SpecError(
            "generate", f"{settings}, beams {beams}", f"{rule}, 1 ≤ beams ≤ {MAX_BEAMS}"
        )
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise SpecError(f"prompt {number}", "is no valid UTF-8", "a prompt is text") from error
    trained = load_trained(storage, name, step, weights, chosen)
    task, tools = trained.task, trained.tools
    if not task.generates:
        raise SpecError(
            f"run {name!r}",
            f"its task is {task.name}",
            "only language models write text",
        )
    manifest, device = trained.manifest, trained.move_to_device()
    pad = manifest.eos_token_id if manifest.pad_token_id is None else manifest.pad_token_id
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature and beams == 1
        else {"do_sample": False, "num_beams": beams}
    )
    answers_apart = bool(getattr(trained.model.config, "is_encoder_decoder", False))
    torch.manual_seed(seed)
    texts = []
    for number, prompt in enumerate(prompts, 1):
        # An empty prompt begins where documents begin.
        ids = task.prompt(trained.normal(prompt), tools) or [int(manifest.eos_token_id or 0)]
        kept, room = fit_prompt(len(ids), max_tokens, trained.longest_row, apart=answers_apart)
        if kept < len(ids) and not task.continues:
            raise SpecError(
                f"prompt {number}",
                f"is {len(ids):,} tokens, and with {max_tokens:,} new ones the model takes "
                f"{trained.longest_row:,}",
                f"{task.name} answers whole prompts",
                "shorten it, or give a smaller --max-tokens",
            )
        if say and (kept, room) != (len(ids), max_tokens):
            say(
                f"prompt {number}: {len(ids):,} tokens and {max_tokens:,} new ones, but the model "
                f"takes {trained.longest_row:,}; its last {kept:,} are continued by at most "
                f"{room:,}"
            )
        given = torch.tensor([ids[-kept:]], device=device)
        with torch.no_grad():
            out = trained.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=room,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=manifest.eos_token_id,
                **sampling,
            )
        texts.append(trained.decode(out[0, 0 if answers_apart else kept :].tolist()))
    return texts


def fit_prompt(
    num_tokens: int, max_tokens: int, longest: int | None, *, apart: bool = False
) -> tuple[int, int]:
    """How many of a prompt's last tokens are kept, and the new ones there is room for, in a row of
    `longest` tokens; `apart`: in a row each.

    A long prompt gives way to the new tokens down to half of the row.
    """
    if longest is None or num_tokens + max_tokens <= longest:
        return num_tokens, max_tokens
    if apart:
        return min(num_tokens, longest), min(max_tokens, longest)
    kept = min(num_tokens, max(longest - max_tokens, longest // 2))
    return kept, min(max_tokens, longest - kept)
