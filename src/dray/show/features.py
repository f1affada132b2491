"""Features of a block for people: in a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.show.html import Page


def format_features(found: Mapping[str, Any]) -> str:
    """Each feature with the tokens on which it fires most strongly, between what stands there."""
    lines = [_head(found)]
    for one in found["features"]:
        lines += ["", f"feature {one['feature']}, on {one['share']:.2%} of the tokens"]
        lines += [f"  {token['activation']:.3f}  {_context(token)}" for token in one["tokens"]]
    return "\n".join(lines)


def _head(found: Mapping[str, Any]) -> str:
    return (
        f"{found['num_firing']:,} of {found['num_features']:,} features fire on "
        f"{found['num_tokens']:,} tokens of {found['num_records']:,} records"
    )


def _context(told: Mapping[str, Any]) -> str:
    """The tokens around one, which stands in brackets."""
    parts = [
        f"{' ' * token.startswith(' ')}[{token.strip()}]" if index == told["at"] else token
        for index, token in enumerate(told["tokens"])
    ]
    return " ".join("".join(parts).split())


def make_features_page(found: Mapping[str, Any]) -> Page:
    """All of it as a page: the deeper a token's colour, the more strongly the feature fires."""
    page = Page(f"What {found['run']} found")
    page.facts({"run": found["run"], "step": found["step"]})
    page.note(_head(found))
    for one in found["features"]:
        page.section(f"Feature {one['feature']}", f"fires on {one['share']:.2%} of the tokens")
        for token in one["tokens"]:
            page.tokens(token["tokens"], token["activations"])
    return page
