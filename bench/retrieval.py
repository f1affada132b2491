"""What finding answers by shared words gives, on the pairs that dray's recipe `embedding` holds
out: tf-idf, learnt of the training pairs, and cosines.

    python -m bench.retrieval [--data ../shared/data/dialogue/alpaca_en_demo.json.gz]
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from dray.corpus.cleaning import hash_texts, held_out, normalize
from dray.tasks.rows import SEPARATOR


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Instructions and answers, in the order of the file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(record["instruction"], record["output"]) for record in json.load(file)]


def find_answers(pairs: list[tuple[str, str]], share: float = 0.2) -> dict[str, float]:
    """The place of each held-out answer among all of them, by its words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # As dray does: equal pairs count once, and a pair's side depends on its texts alone.
    texts = pa.array([SEPARATOR.join(pair) for pair in dict.fromkeys(pairs)], pa.large_string())
    texts = normalize(texts, "NFC")
    held = held_out(hash_texts(texts)[1], share)
    known = [text.split(SEPARATOR) for text in texts.filter(pa.array(~held)).to_pylist()]
    asked = [text.split(SEPARATOR) for text in texts.filter(pa.array(held)).to_pylist()]
    words = TfidfVectorizer(sublinear_tf=True).fit([text for pair in known for text in pair])
    firsts, seconds = (words.transform([pair[side] for pair in asked]) for side in (0, 1))
    cosines = (firsts @ seconds.T).toarray()
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
    print(json.dumps(find_answers(read_pairs(parser.parse_args().data)), indent=1))


if __name__ == "__main__":
    main()
