"""Smaller and faster models from a trained run: `compress.py` makes a new run by methods in
sequence, one file a method.

`method.py` says what a method is, `methods.py` which there are and what `--with` means,
`keeping.py` what is stored. `table.py` measures before and after, `gate.py` refuses what lost too
much. Methods share `calibrating.py` (rows of the corpus, and what matters by them), `shrinking.py`
(a smaller architecture) and `recovering.py` (training what is left).
"""
