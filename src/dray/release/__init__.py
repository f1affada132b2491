"""What is done with a trained model: `trained.py` loads one from a checkpoint, `evaluate.py`
measures it (`measuring.py`: in this process, or by workers), `predict.py` tells of each record,
`generate.py` continues prompts, `export.py` writes a Hugging Face folder.
"""
