"""What finding answers without learning to gives, on the pairs that dray's recipe `embedding` holds
out: tf-idf, learnt of the training pairs, and MiniLM's vectors; by cosines.

    python -m bench.retrieval [--data ../shared/data/dialogue/alpaca_en_demo.json.gz]
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bench.real_models import minilm
from dray.corpus.cleaning import hash_texts, held_out, normalize
from dray.tasks.rows import SEPARATOR

TOKENS = 128
"""Of a text, as in the recipe."""


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Instructions and answers, in the order of the file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(record["instruction"], record["output"]) for record in json.load(file)]


def divide(pairs: list[tuple[str, str]], share: float) -> tuple[list[list[str]], list[list[str]]]:
    """Pairs to learn from and held-out ones, as dray divides them: equal pairs count once, and a
    pair's side depends on its texts alone."""
    texts = pa.array([SEPARATOR.join(pair) for pair in dict.fromkeys(pairs)], pa.large_string())
    texts = normalize(texts, "NFC")
    held = held_out(hash_texts(texts)[1], share)
    known, asked = (texts.filter(pa.array(side)).to_pylist() for side in (~held, held))
    return [text.split(SEPARATOR) for text in known], [text.split(SEPARATOR) for text in asked]


def find_answers(pairs: list[tuple[str, str]], share: float = 0.2) -> dict[str, float]:
    """The place of each held-out answer among all of them, by its words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known, asked = divide(pairs, share)
    words = TfidfVectorizer(sublinear_tf=True).fit([text for pair in known for text in pair])
    firsts, seconds = (words.transform([pair[side] for pair in asked]) for side in (0, 1))
    return _measure((firsts @ seconds.T).toarray())


def ask_minilm(pairs: list[tuple[str, str]], share: float = 0.2) -> dict[str, float]:
    """The same by the cosines of MiniLM's vectors, the means of a text's tokens, as it comes."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    sides = []
    with torch.no_grad():
        for texts in zip(*divide(pairs, share)[1], strict=True):
            vectors = []
            for start in range(0, len(texts), 32):
                some = list(texts[start : start + 32])
                given = tokenizer(
                    some, return_tensors="pt", padding=True, truncation=True, max_length=TOKENS
                )
                mask = given["attention_mask"][..., None]
                hidden = model(**given).last_hidden_state
                vectors.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
            sides.append(torch.nn.functional.normalize(torch.cat(vectors), dim=-1))
    return _measure((sides[0] @ sides[1].T).numpy())


def _measure(cosines: npt.NDArray[np.float64]) -> dict[str, float]:
    places = (cosines >= np.diag(cosines)[:, None]).sum(axis=1)
    return {
        "recall_1": float((places <= 1).mean()),
        "recall_10": float((places <= 10).mean()),
        "mrr": float((1 / places).mean()),
        "num": float(len(places)),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", default="../shared/data/dialogue/alpaca_en_demo.json.gz", type=Path
    )
    pairs = read_pairs(parser.parse_args().data)
    print(json.dumps({"tf-idf": find_answers(pairs), "MiniLM": ask_minilm(pairs)}, indent=1))


if __name__ == "__main__":
    main()
