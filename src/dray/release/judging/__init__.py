"""What lies behind a metric, as pure functions of what a model gave for each row: `intervals.py`
how sure it is, and whether two runs differ; `calibration.py` whether probabilities are what they
say; `curves.py` what other thresholds would give; `slices.py` of which rows; `judge.py` asks them.
"""
