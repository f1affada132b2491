"""What is done with a trained model: `trained.py` loads one from a checkpoint, `evaluate.py`
measures it, `generate.py` continues prompts, `export.py` writes a Hugging Face folder.
"""
