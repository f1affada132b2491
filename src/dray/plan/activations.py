"""What a transformer block keeps for its backward pass, in bytes a token, by architecture.

Counted on transformers' eager layers with scaled-dot-product attention, whose flash kernels keep no
square of scores; and on compiled blocks, which compute again what is cheap. A test compares both
with what autograd really saves.
"""

from __future__ import annotations

from dray.plan.parameters import Dimensions

# Elements a block keeps of a token: (hidden sizes, intermediate sizes), and the same with dropout,
# whose masks are kept while attention takes another way. gpt2's GELU is six operations.
_KEPT = {
    "gpt2": ((8, 5), (10, 5)),
    "gpt_neox": ((10, 2), (9, 2)),
    "bert": ((8, 2), (10, 2)),
    "roberta": ((8, 2), (10, 2)),
    "distilbert": ((8, 2), (9, 2)),
    "modernbert": ((10, 4), (9, 5)),
    "vit": ((8, 2), (10, 2)),
}
_KEPT_COMPILED = {"gpt2": (8, 2), "gpt_neox": (10, 2), "modernbert": (10, 3)}
"""The same of compiled blocks, where it is less: masks of dropout are drawn again."""
_MASKED = ("bert", "roberta", "distilbert", "modernbert")


def layer_bytes_per_token(
    sizes: Dimensions,
    element_bytes: int,
    dropout: float,
    sequence_tokens: int,
    *,
    on_gpu: bool,
    compiled: bool = False,
) -> int:
    """Bytes that one block keeps of one token."""
    hidden, wide = sizes.hidden, sizes.intermediate
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # Normalisers of the softmax, statistics of the norms.
    extra = 4 * sizes.heads + 16
    if sizes.architecture in _KEPT:
        counts = _KEPT[sizes.architecture][bool(dropout) and not compiled]
        narrow_count, wide_count = (
            _KEPT_COMPILED.get(sizes.architecture, counts) if compiled else counts
        )
        elements = narrow_count * hidden + wide_count * wide
    else:
        # Residual, normalised and scaled, twice; queries, keys, values and the attention's output;
        # the feed-forward.
        elements = 6 * hidden + 2 * queries + 2 * keys + (4 if sizes.gated else 2) * wide
        if compiled:  # what is scaled, and one of the feed-forward's, is computed again
            elements -= 2 * hidden + (wide if sizes.gated else 0)
        elif element_bytes < 4:
            extra += 4 * hidden  # RMSNorm keeps its input in fp32
    if sizes.architecture in _MASKED and not dropout:
        elements += sequence_tokens  # each block turns the mask of padding into numbers of its own
    if dropout and not on_gpu:
        elements += (
            3 * sizes.heads * sequence_tokens
        )  # with dropout a CPU's attention keeps its squares of scores
    return elements * element_bytes + extra


def checkpoint_bytes_per_token(sizes: Dimensions, element_bytes: int) -> int:
    """Bytes of a block's input, which is all that is kept of it when it is recomputed."""
    return sizes.hidden * element_bytes


def layer_working_bytes_per_token(sizes: Dimensions, element_bytes: int) -> int:
    """Bytes that come and go in one block's backward pass: the feed-forward's gradients and the
    residual's."""
    return (3 * sizes.intermediate + 3 * sizes.hidden) * element_bytes
