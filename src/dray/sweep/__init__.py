"""A sweep: many runs of one spec, each with other values of some of its keys.

`space.py` says what is tried, how, and what it may cost; `search.py` draws values by what is known
(Optuna), `policies.py` stops trials that fall behind (Ray Tune's schedulers). `study.py` is the
state of a sweep, made of the events (`events.py`) that `record.py` keeps in the storage, and
`summary.py` tells it. `room.py` finds out how many trials fit at once; `driver.py` runs them, each
by `trial.py`.
"""
