"""Near-duplicates: shingles, candidates, verified links, and whole corpora without them."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dray.corpus.near import MAX_STARS, band_keys, paired
from dray.corpus.prepare import Corpus, corpus_key, prepare
from dray.corpus.shards import read_groups
from dray.corpus.shingles import WINDOW, hash_words, shingle, similarities
from dray.errors import SpecError
from dray.spec import Near, Spec, make_spec
from dray.storage.filesystem import open_filesystem
from tiny import tiny_tree

WORDS = [f"w{i}" for i in range(2000)]


def strings(*texts: str) -> pa.Array:
    return pa.array(texts, pa.large_string())


def own_shingles(text: str, size: int) -> set[tuple[str, ...]]:
    """The definition, word by word."""
    words = re.findall(r"[a-z0-9]+|[一-龥]", text.lower())
    runs = {tuple(words[i : i + size]) for i in range(max(0, len(words) - size + 1))}
    return runs or ({tuple(words)} if words else set())


def jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / max(1, len(a | b))


# --- shingles ------------------------------------------------------------------------------------


def test_words_are_equal_whatever_stands_between_and_above_them() -> None:
    hashes, counts = hash_words(strings("The cat, the CAT", "", " … ", "cat", "漢字cat"))
    assert counts.tolist() == [4, 0, 0, 1, 3]
    the, cat = hashes[0], hashes[1]
    assert hashes.tolist() == [the, cat, the, cat, cat, hashes[5], hashes[6], cat]
    assert len({the, cat, hashes[5], hashes[6]}) == 4


def test_words_keep_their_hash_across_windows() -> None:
    text = " ".join(f"w{i}" for i in range(WINDOW // 3))
    assert len(text) > WINDOW
    hashes, counts = hash_words(strings(text, "w1 w70000"))
    assert counts.tolist() == [WINDOW // 3, 2]
    assert len(set(hashes.tolist())) == WINDOW // 3
    assert (hashes[-2], hashes[-1]) == (hashes[1], hashes[70000])


def test_anagrams_and_prefixes_differ() -> None:
    words = ["ab", "ba", "a", "aa", "aaa", "abc", "cab", "bca", "acb"]
    hashes, _ = hash_words(strings(*words))
    assert len(set(hashes.tolist())) == len(words)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_shingles_are_those_of_the_definition(size: int) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS[:30], k=rng.randint(0, 40))) for _ in range(200)]
    texts += ["", "one", "字字字字字字", "a 字 b"]
    found, counts = shingle(strings(*texts), size)
    own = [own_shingles(text, size) for text in texts]
    assert counts.tolist() == [len(runs) for runs in own]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    for start, stop in itertools.pairwise(bounds):
        assert (np.diff(found[start:stop].astype(np.int64)) > 0).all()
    left, right = (np.array(rng.choices(range(len(texts)), k=500)) for _ in range(2))
    told = similarities(found, bounds, left, right)
    wanted = [jaccard(own[a], own[b]) for a, b in zip(left, right, strict=True)]
    assert told == pytest.approx(wanted)


def test_a_batch_says_of_a_text_what_it_says_alone() -> None:
    texts = ["a b c d e f", "x y", "ein Wort und noch eins und", "漢字漢字漢字"]
    together, counts = shingle(strings(*texts), 3)
    alone = [shingle(strings(text), 3)[0] for text in texts]
    assert counts.tolist() == [len(own) for own in alone]
    assert together.tolist() == np.concatenate(alone).tolist()


def test_no_texts_have_no_shingles() -> None:
    found, counts = shingle(strings(), 5)
    assert (len(found), len(counts)) == (0, 0)


# --- candidates ----------------------------------------------------------------------------------


def test_equal_bands_are_as_likely_as_the_formula_says() -> None:
    rng = random.Random(1)
    near = Near()
    sets, wanted = [], []
    for _ in range(400):
        base = rng.sample(range(2**32), 300)
        fresh = rng.sample(range(2**32), 40)
        pair = base, base[:260] + fresh
        sets += [np.array(sorted(one), np.uint32) for one in pair]
        wanted.append(jaccard(set(pair[0]), set(pair[1])))
    bounds = np.cumsum([0, *map(len, sets)])
    keys = band_keys(np.concatenate(sets), bounds, near)
    assert keys.shape == (800, 16)
    found = (keys[::2] == keys[1::2]).any(axis=1).mean()
    probability = np.mean([1 - (1 - share**8) ** 16 for share in wanted])
    assert found == pytest.approx(probability, abs=0.06)


def test_all_pairs_of_few_and_stars_of_many() -> None:
    left, right = paired(np.array([1, 2, 2, 2, 5, 6, 6], np.uint64))
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == [
        (1, 2), (1, 3), (2, 3), (5, 6),
    ]  # fmt: skip
    many = 10 * MAX_STARS
    left, right = paired(np.zeros(many, np.uint64))
    assert set(right.tolist()) == set(range(1, many))
    assert max(Counter(right.tolist()).values()) == MAX_STARS
    assert (left < right).all()
    assert paired(np.empty(0, np.uint64))[0].tolist() == []


# --- settings ------------------------------------------------------------------------------------


def make(train: Any, task: str = "causal_lm", **data: Any) -> Spec:
    tree = tiny_tree(Path("."), task=task)
    tree["data"] = {"train": train, "sequence_tokens": 32, **data}
    tree["tokenizer"] = {"train": "byte_bpe", "vocab_size": 300}
    return make_spec(tree)


@pytest.mark.parametrize(
    ("cleaning", "said"),
    [
        (
            {"deduplicate": "near", "near": {"bands": 17}},
            "permutations 128 are no multiple of bands 17",
        ),
        ({"deduplicate": "near", "near": {"bands": 1}}, "give more bands"),
        ({"near": {"similarity": 0.9}}, "deduplicate: near"),
        ({"deduplicate": "near", "near": {"similarity": 1.1}}, "similarity"),
    ],
)
def test_settings_that_find_nothing_are_refused(cleaning: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make("x.jsonl", cleaning=cleaning)


def test_a_spec_without_it_is_dumped_as_before() -> None:
    assert "near" not in make("x.jsonl").data.cleaning.model_dump()


# --- whole corpora -------------------------------------------------------------------------------


def varied(text: str, share: float, rng: random.Random) -> str:
    """With some of its words replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), int(share * len(words))):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def write(path: Path, texts: list[str], labels: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": text} for text in texts]
    for record, label in zip(records, labels or [], strict=False):
        record["label"] = label
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def kept_texts(corpus: Corpus, split: str = "train") -> Counter[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{corpus.folder}/tokenizer/tokenizer.json")
    found: Counter[str] = Counter()
    filesystem, folder = open_filesystem(corpus.folder)
    for source in getattr(corpus.manifest, split).sources:
        groups = range(-(-source.num_rows // corpus.manifest.group_rows))
        table = read_groups(filesystem, folder, source, groups, corpus.manifest.group_rows)
        for row in table.to_pylist():
            ids = row["input_ids"][: row["num_tokens"]]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            found.update(part for part in text.split("<|endoftext|>") if part)
    return found


def planted(seed: int = 0) -> tuple[list[str], list[str]]:
    """Originals, and texts that are near one of them, by way of another at times."""
    rng = random.Random(seed)
    originals = [" ".join(rng.choices(WORDS, k=rng.randint(60, 120))) for _ in range(150)]
    near = [varied(text, 0.02, rng) for text in originals[:40]]
    return originals, near


@pytest.mark.usefixtures("local_ray")
def test_the_first_of_near_duplicates_is_kept_however_files_are_cut(tmp_path: Path) -> None:
    originals, near = planted()
    texts = [*originals, *near, *originals[:10]]
    long = {"sequence_tokens": 1024}
    write(tmp_path / "one/a.jsonl", texts)
    for place in range(5):
        write(tmp_path / f"many/{place}.jsonl", texts[place * 40 : (place + 1) * 40])
    cleaning = {"deduplicate": "near"}
    corpora = [
        prepare(make(str(tmp_path / name), cleaning=cleaning, **long), str(tmp_path / "out"))
        for name in ("one", "many")
    ]
    for corpus in corpora:
        assert corpus.manifest.dropped == {"duplicate": 10, "near_duplicate": 40}
        assert kept_texts(corpus) == Counter(originals)
        assert any("40 near_duplicate" in line for line in corpus.describe())


@pytest.mark.usefixtures("local_ray")
def test_training_documents_near_those_of_validation_are_left_out(tmp_path: Path) -> None:
    originals, near = planted()
    write(tmp_path / "train.jsonl", originals)
    write(tmp_path / "held.jsonl", near[:20])
    spec = make(
        str(tmp_path / "train.jsonl"),
        validation=str(tmp_path / "held.jsonl"),
        cleaning={"deduplicate": "near"},
        sequence_tokens=1024,
    )
    corpus = prepare(spec, str(tmp_path / "out"))
    assert corpus.manifest.dropped == {"near_in_validation": 20}
    assert kept_texts(corpus) == Counter(originals[20:])
    assert kept_texts(corpus, "validation") == Counter(near[:20])


@pytest.mark.usefixtures("local_ray")
def test_labels_of_near_duplicates_that_contradict_are_counted(tmp_path: Path) -> None:
    originals, near = planted()
    labels = ["ab"[place % 2] for place in range(len(originals))]
    other = ["a" if place < 7 else labels[place] for place in range(len(near))]
    path = write(tmp_path / "in.jsonl", originals + near, labels + other)
    spec = make(
        {"path": str(path), "label": "label"},
        task="sequence_classification",
        cleaning={"deduplicate": "near"},
    )
    manifest = prepare(spec, str(tmp_path / "out")).manifest
    assert manifest.dropped == {"near_duplicate": 40}
    assert manifest.num_contradicting == 3
    assert manifest.train.documents_by_label == {"a": 75, "b": 75}


def test_the_key_knows_the_settings(tmp_path: Path) -> None:
    path = str(write(tmp_path / "in.jsonl", ["a b c"]))
    keys = {
        corpus_key(make(path, cleaning=cleaning))
        for cleaning in (
            {},
            {"deduplicate": "near"},
            {"deduplicate": "near", "near": {"similarity": 0.9}},
        )
    }
    assert len(keys) == 3
