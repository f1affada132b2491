"""What tasks are made of, and share.

From records to rows: `encoding.py` (texts), `chat.py` with `templates.py` (conversations),
`prompts.py` and `answers.py` (answers to prompts), `images.py`, `sounds.py`. From rows to tensors:
`columns.py`. Losses around models: `objectives.py` on `losses.py` and `heads.py`, `classes.py`,
`mixed_labels.py`, `alignments.py`, `answer_objectives.py`, `similarity.py`, `towers.py`. Models
that write: `writing.py` with `answering.py`, `rollouts.py`. Metrics: `metrics.py`,
`answer_metrics.py`, `text_metrics.py`, `ranking.py`.
"""
