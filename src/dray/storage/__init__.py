"""Files on any filesystem, by path or URI.

`filesystem.py` opens, reads and writes, `retrying.py` tries again what may pass, `exclusive.py`
creates what only one may create, `digests.py` knows files by their content, `packages.py` finds
folders in installed packages. Names come from the modules themselves.
"""
