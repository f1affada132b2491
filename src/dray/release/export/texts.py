"""Rows of plain text, by which a model is compared with what another runtime makes of it.

Tokens at random are no measure: a trained model may answer such rows chaotically, so that the last
bit of a sum decides over whole logits, and nobody asks it that.
"""

from __future__ import annotations

import torch

from dray.release.trained import Trained

_TEXTS = (
    "The old bridge between the two towns had been closed since the autumn storms, and nobody knew "
    "when the boats would carry people over the river again.",
    "How much is 17 times 23? It is 391, since 17 times 20 is 340 and 17 times 3 is 51.",
    "def read_lines(path):\n    with open(path) as file:\n        return [line for line in file]\n",
    "A film that is slow at first, often funny, and in the end far better than its reviews said.",
    "这家酒店的房间很干净,服务也很好,早餐有很多种选择,离车站只有五分钟。",
    "Der Zug fährt um 9:45 Uhr ab; wer später kommt, muss bis zum Mittag warten.",
)


def text_rows(trained: Trained, rows: int, tokens: int) -> torch.Tensor | None:
    """[rows, tokens], int64: texts as training encoded them, each row from another one on; None
    for a task whose tokens are no pieces of text."""
    task = trained.spec.task
    if not task.tokenizes or task.whole_words:
        return None
    texts = [trained.encode(text) for text in _TEXTS]
    found = []
    for row in range(rows):
        ids: list[int] = []
        place = row
        while len(ids) < tokens:
            ids += texts[place % len(texts)] or [0]
            place += 1
        found.append(ids[:tokens])
    return torch.tensor(found)
