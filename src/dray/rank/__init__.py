"""One rank: what every worker of a run does, without knowing Ray or the command line.

`job.py` says what it is to do; `loop.py` is the training loop, fed by `feeding.py`; `engine.py` is
the one place that speaks DeepSpeed; `saving.py` writes checkpoints while training goes on;
`group.py` is the ranks' agreement, `device.py` a GPU's queue and clocks, `pulse.py` the signs of
life; `schedule.py` and `numerics.py` are arithmetic; `rehearsal.py` times some steps for a plan.
Names come from the modules themselves: some import torch, `job.py` does not.
"""
