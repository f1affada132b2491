"""Labels from rules instead of from people: `rules.py` what a rule says of a record, `model.py`
what rules that contradict each other say together, `labelled.py` a file of labelled records."""
