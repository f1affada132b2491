"""Operating-system processes: how workers start, keep their memory, and end.

`forkserver.py` starts workers as forks of one process, `worker_setup.py` is what a local Ray's node
runs to start one; `heap.py` sets a rank's threads and memory, `imports.py` imports heavy libraries
without what they drag along; `ahead.py` has a thread work ahead of the one who wants its work;
`signals.py` turns signals into wishes to stop, `streams.py` keeps a command's result apart from all
else that is printed. Importing this package imports nothing.
"""
