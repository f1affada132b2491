"""Benchmarks: each arm in processes of its own, the arms in turn, ratios and medians; `python -m
bench` runs all."""

import os

# Ray gives its workers niceness 15, and would lose to plain processes on a machine that is not
# quiet: here all arms run at the same one.
os.environ.setdefault("RAY_worker_niceness", "0")
