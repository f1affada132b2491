"""FLOPs a token of a row, forward and backward, of all sequences that a row becomes.

Two counts, because papers use both: the loose one multiplies every parameter and whole attention
squares, the strict one only what is multiplied. What is never trained needs no gradient of its own:
4 instead of 6 for each of its parameters. Neither counts the states of blocks that do not
attend (Mamba's scan, a linear attention's): next to their matrices they are little. A row that is
no text was measured as a whole, and each of its tokens has its share.
"""

from __future__ import annotations

from dray.plan.parameters import Dimensions, ParameterCount


def flops_per_token_loose(sizes: Dimensions, count: ParameterCount, sequence_tokens: int) -> float:
    """6·N + 12·L·d·T. Of a mixture, N is what a token goes through; of a head, its share."""
    if sizes.row is not None:
        return sizes.row.flops / sizes.row.tokens
    blocks = sum(number for number, _ in sizes.attention)
    parameters = count.total - count.body + count.active - (1.0 - sizes.head.share) * count.head
    each = _each(count)
    once = each * parameters + 12.0 * blocks * sizes.heads * sizes.head_dim * sequence_tokens
    return once * sizes.head.sequences


def flops_per_token_strict(sizes: Dimensions, count: ParameterCount, sequence_tokens: int) -> float:
    """6·(N_nonembedding + head) + 12·d·(tokens that each token sees, over the L blocks): T/2 in
    causal blocks, T in those that look both ways, less where a window is narrower."""
    if sizes.row is not None:
        return sizes.row.flops / sizes.row.tokens
    seen = sum(
        number * _mean_seen(window or sequence_tokens, sequence_tokens, causal=sizes.causal)
        for number, window in sizes.attention
    )
    # A classifier's head sees one token of a row: nothing, next to the others.
    head = count.head * sizes.head.share if sizes.head.each == "token" else 0
    once = _each(count) * (count.active + head) + 12.0 * sizes.heads * sizes.head_dim * seen
    return once * sizes.head.sequences


def _each(count: ParameterCount) -> float:
    """FLOPs of a parameter and token: 2 forward, 2 for the gradient of what goes in, 2 for its
    own."""
    return 6.0 - 2.0 * count.base / max(1, count.total)


def _mean_seen(window: int, sequence_tokens: int, *, causal: bool) -> float:
    """Tokens of a row that a token sees on average: the first ones of a causal row have fewer
    before them."""
    width = min(window, sequence_tokens)
    return width - width * width / (2.0 * sequence_tokens) if causal else float(width)
