"""One small web page to try what is served: three files, as they are, without a build step.

It asks for no key, since it tells nothing by itself: what it shows it asks of the service's routes,
with the key that somebody types. Nothing from elsewhere is loaded, and no script of another place
runs in it.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
}
"""By path."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(api: FastAPI) -> None:
    """Give an application the page's paths."""

    def add(path: str, name: str, kind: str) -> None:
        content = (files(__package__) / name).read_bytes()

        @api.get(path, include_in_schema=False)
        async def told() -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

    for path, (name, kind) in FILES.items():
        add(path, name, kind)
