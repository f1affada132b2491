"""FLOPs a token, forward and backward.

Two counts, because papers use both: the loose one multiplies every parameter and whole attention
squares, the strict one only what is multiplied.
"""

from __future__ import annotations

from dray.plan.parameters import Dimensions, ParameterCount


def flops_per_token_loose(sizes: Dimensions, count: ParameterCount, sequence_tokens: int) -> float:
    """6·N_total + 12·L·d·T."""
    return 6.0 * count.total + 12.0 * sizes.layers * sizes.heads * sizes.head_dim * sequence_tokens


def flops_per_token_strict(sizes: Dimensions, count: ParameterCount, sequence_tokens: int) -> float:
    """6·(N_nonembedding + head) + 6·L·d·T; models that look both ways multiply the whole square,
    12·L·d·T."""
    square = 6.0 if sizes.causal else 12.0
    # A classifier's head sees one token of a row: nothing, next to the others.
    head = count.head if sizes.head.each == "token" else 0
    return (
        6.0 * (count.body + head)
        + square * sizes.layers * sizes.heads * sizes.head_dim * sequence_tokens
    )
