"""Folders that lie in installed Python packages: some bring data, some real pretrained models."""

from __future__ import annotations

import importlib.util
import os

from dray.errors import StoreError

PACKAGE_SCHEME = "python:"


def in_package(place: str) -> str:
    """`python:PACKAGE/PATH` as the absolute path of what an installed package holds; any other
    place as it is. The package is found, never imported. Raises StoreError if it is not
    installed."""
    if not place.startswith(PACKAGE_SCHEME):
        return place
    package, _, inner = place.removeprefix(PACKAGE_SCHEME).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    if ".." in inner.split("/"):
        raise StoreError(
            place, "leads out of the package", "PATH names what the package itself holds"
        )
    if not folders:
        raise StoreError(
            place,
            f"no package {package!r} is installed",
            f"{PACKAGE_SCHEME}PACKAGE/PATH names a folder in an installed package",
        )
    return os.path.join(os.path.abspath(folders[0]), inner).rstrip("/")
