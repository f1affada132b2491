"""What is done with a trained model: `trained.py` loads one from a checkpoint, `exported.py` from a
folder (`opened.py` is what both have), `evaluate.py` measures it (`measuring.py`: in this process,
or by workers), `judging/` tells what lies behind a metric, `checks.py` asks it prompts of a file,
`predict.py` tells of each record, `generate.py` continues prompts, `compress/` makes a smaller run
of it, `export/` writes it for others.
"""
