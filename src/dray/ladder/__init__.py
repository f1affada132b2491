"""Smaller models of a spec, trained as a sweep, and what they tell of the model itself before it is
paid for.

rungs.py: which models, and how long; scaling.py: the law that is fitted to their losses;
forecast.py: what it says of the spec; driver.py: all of it in turn.
"""
