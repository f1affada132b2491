"""Simple and honest models beside dray's, on the same splits: tf-idf with logistic regression, and
a conditional random field over words and their shapes.

What a setting leaves open (the strength of the regularisation) is chosen on dev, as dray's best
epoch is; where there is no dev set, it is left at its default.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Texts = tuple[list[str], list[str]]
"""Texts and their classes."""
Sentences = tuple[list[list[str]], list[list[str]]]
"""Words and their tags, sentence by sentence."""
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)


def read_sst2(path: Path) -> Texts:
    """Sentence, tab, class a line; no header, quotes are words."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        rows = [line.rstrip("\n").rpartition("\t") for line in stream if line.strip()]
    return [row[0] for row in rows], [row[2] for row in rows]


def divide(texts: Sequence[str], share: float) -> list[bool]:
    """Which texts dray holds out, by the text alone: a share of them."""
    import pyarrow as pa

    from dray.corpus.cleaning import hash_texts, held_out, normalize

    normal = normalize(pa.array(texts, pa.large_string()), "NFC")
    found: list[bool] = held_out(hash_texts(normal)[1], share).tolist()
    return found


def batches(trained: Any, split: Any) -> Iterator[Any]:
    """The rows of a split of a trained run's corpus as its task's batches, a source at a time."""
    from dray.corpus.shards import read_groups
    from dray.storage.filesystem import open_filesystem

    filesystem, folder = open_filesystem(trained.corpus)
    size = trained.manifest.group_rows
    for source in split.sources:
        groups = list(range(-(-source.num_rows // size)))
        yield trained.task.collate(read_groups(filesystem, folder, source, groups, size))


def read_hotel(path: Path, share: float) -> tuple[Texts, Texts]:
    """Training and held-out reviews, divided as the corpus divides them: by the text alone."""
    with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["review"].strip()]
    held = divide([row["review"] for row in rows], share)
    sides: tuple[Texts, Texts] = (([], []), ([], []))
    for row, is_held in zip(rows, held, strict=True):
        sides[int(is_held)][0].append(row["review"])
        sides[int(is_held)][1].append(row["label"])
    return sides


def read_conll(path: Path) -> Sentences:
    """Word, tab, tag a line; blank lines between sentences."""
    words: list[list[str]] = []
    tags: list[list[str]] = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        lines = [line.split("\t") for line in block.splitlines() if line.strip()]
        if lines:
            words.append([line[0] for line in lines])
            tags.append([line[1] for line in lines])
    return words, tags


def tfidf(train: Texts, dev: Texts | None, test: Texts, *, analyzer: str, longest: int) -> float:
    """Accuracy on `test` of logistic regression on tf-idf of n-grams up to `longest`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(
        analyzer=analyzer, ngram_range=(1, longest), sublinear_tf=True, min_df=2
    )
    features = vectors.fit_transform(train[0])

    def fitted(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=2000).fit(features, train[1])

    if dev is None:
        model = fitted(1.0)
    else:
        seen = vectors.transform(dev[0])
        model = max(map(fitted, STRENGTHS), key=lambda model: model.score(seen, dev[1]))
    return float(model.score(vectors.transform(test[0]), test[1]))


def crf(train: Sentences, dev: Sentences, test: Sentences) -> dict[str, Any]:
    """seqeval's report by type on `test` of a linear-chain CRF, its two penalties chosen by F1 on
    dev."""
    import sklearn_crfsuite
    from seqeval.metrics import classification_report, f1_score

    features = [[*map_features(words)] for words in train[0]]
    seen = [[*map_features(words)] for words in dev[0]]

    def fitted(c1: float, c2: float) -> Any:
        model = sklearn_crfsuite.CRF(
            algorithm="lbfgs", c1=c1, c2=c2, max_iterations=100, all_possible_transitions=True
        )
        return model.fit(features, train[1])

    models = [fitted(c1, c2) for c1 in (0.01, 0.1) for c2 in (0.01, 0.1)]
    best = max(models, key=lambda model: f1_score(dev[1], model.predict(seen)))
    told = best.predict([[*map_features(words)] for words in test[0]])
    report: dict[str, Any] = classification_report(test[1], told, output_dict=True)
    return report


def map_features(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A word, its ends, its shape and those of its neighbours, for each word of a sentence."""
    for place, word in enumerate(words):
        found: dict[str, Any] = {"bias": 1.0, "word": word.lower(), "shape": shape(word)}
        found |= {f"start{n}": word[:n] for n in (1, 2, 3)}
        found |= {f"end{n}": word[-n:].lower() for n in (1, 2, 3, 4)}
        found |= {
            "title": word.istitle(),
            "upper": word.isupper(),
            "digit": any(c.isdigit() for c in word),
            "mark": word[:1] in "@#" or word.startswith("http"),
        }
        for step in (-2, -1, 1, 2):
            inside = 0 <= place + step < len(words)
            near = words[place + step] if inside else "<end>"
            found |= {f"{step}:word": near.lower(), f"{step}:shape": shape(near)}
        yield found


def shape(word: str) -> str:
    """`McDonald's` as `XxXxxxxx'x`, each run cut to two."""
    letters = io.StringIO()
    for c in word[:40]:
        letters.write("X" if c.isupper() else "x" if c.isalpha() else "d" if c.isdigit() else c)
    return re.sub(r"(.)\1{2,}", r"\1\1", letters.getvalue())


def pixels(path: Path, num_train: int, keep: int | None = None) -> float:
    """Accuracy of logistic regression on the pixels of MNIST's images in the folder `path`, or on
    `keep` principal components of them, learnt from the first `num_train`, on the others. Its
    strength is chosen by the last thousand that it learns from."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    from dray.corpus.idx import parse_idx

    images, labels = (
        parse_idx(gzip.decompress((path / f"t10k-{name}-ubyte.gz").read_bytes()))
        for name in ("images-idx3", "labels-idx1")
    )
    seen = images.reshape(len(images), -1) / 255.0
    if keep is not None:
        seen = PCA(keep, random_state=0).fit(seen[:num_train]).transform(seen)

    def fitted(strength: float, stop: int) -> Any:
        model = LogisticRegression(C=strength, max_iter=500)
        return model.fit(seen[:stop], labels[:stop])

    part = slice(num_train - 1000, num_train)
    best = max(
        (0.01, 0.03, 0.1, 0.3, 1.0),
        key=lambda strength: fitted(strength, part.start).score(seen[part], labels[part]),
    )
    return float(fitted(best, num_train).score(seen[num_train:], labels[num_train:]))


def answers(storage: str, run: str) -> dict[str, float]:
    """How often, of the pairs that a run holds out, the longer answer is the chosen one, and that
    which its reference finds likelier, where it has one."""
    from dray.release.trained import open_trained
    from dray.tasks import IGNORED

    trained = open_trained(storage, run)
    sums = {"longer": 0.0, "likelier": 0.0}
    num = 0
    for batch in batches(trained, trained.manifest.validation):
        lengths = (batch["labels"] != IGNORED).sum(dim=-1)
        found = {"longer": lengths, "likelier": batch.get("reference")}
        for name, values in found.items():
            if values is not None:
                first, second = values[batch["real"]].unbind(dim=1)
                sums[name] += float((first > second).sum() + 0.5 * (first == second).sum())
        num += int(batch["real"].sum())
    return {name: value / num for name, value in sums.items() if value}


def sources(folder: Path, share: float, letters: int | None = None) -> float:
    """The mean F1 of the collections that the texts of a folder are from, of those that dray holds
    out: logistic regression on tf-idf of words, of their first `letters`, all classes weighing the
    same."""
    import json

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for record in map(json.loads, stream):
                found.setdefault(record["text"], record["source"])  # equal texts count once
    held = divide([*found], share)
    sides: list[list[tuple[str, str]]] = [[], []]
    for text, source, is_held in zip(found, found.values(), held, strict=True):
        sides[int(is_held)].append((text[:letters], source))
    (known, classes), (asked, wanted) = (zip(*side, strict=True) for side in sides)
    words = TfidfVectorizer(sublinear_tf=True, min_df=2)
    model = LogisticRegression(max_iter=2000, class_weight="balanced")
    model.fit(words.fit_transform(known), classes)
    told = model.predict(words.transform(asked))
    return float(f1_score(wanted, told, average="macro"))
