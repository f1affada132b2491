"""What rules say of documents, as a column of rows: of the text that is learnt from, by lexicons
that the corpus keeps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.account import to_json
from dray.corpus.prepare import Corpus, corpus_key, find, prepare
from dray.corpus.rewriting import Rewriter
from dray.corpus.shards import read_groups
from dray.corpus.stream import RowStream
from dray.corpus.tokenizing import load_decoder
from dray.errors import CorpusError, SpecError
from dray.spec import Spec, make_spec
from dray.storage.filesystem import open_filesystem
from dray.tasks.rows import VOTES
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = ("red", "green", "old", "new", "cold", "warm")
RULES: list[dict[str, Any]] = [
    {"name": "aged", "label": "b", "words": ["OLD", "ancient"]},
    {"name": "two_colours", "label": "a", "regex": r"\b(red|green)\b.*\b(red|green)\b"},
    {"name": "weather", "lexicon": {"path": "weather.tsv", "word": "it", "label": "says"}},
    {"name": "never", "label": "a", "words": ["elephant"]},
]


def expected_votes(text: str) -> list[int]:
    words = text.split()
    colours = sum(word in ("red", "green") for word in words)
    cold, warm = words.count("cold"), words.count("warm")
    weather = 0 if cold == warm else 1 if cold > warm else 2
    return [2 * ("old" in words), int(colours > 1), weather, 0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labelled texts and a lexicon, in the working directory."""
    drawn, records = random.Random(0), []
    for _ in range(120):
        text = " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(3, 9)))
        records.append({"text": text, "other": drawn.choice(WORDS), "label": drawn.choice("ab")})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (tmp_path / "weather.tsv").write_text("it\tsays\nCold\ta\nwarm\tb\n", encoding="utf-8")
    (tmp_path / "words").write_text("warm cold\ncold warm\nold new\nred blue\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec_of(rules: Any = RULES, **sections: Any) -> Spec:
    task = {
        "name": "sequence_classification",
        "constraints": {"labels": ["a", "b"], "rules": rules},
        **sections.pop("task", {}),
    }
    data = {
        "train": [{"path": "a.jsonl", "label": "label", **sections.pop("source", {})}],
        "validation": {"share": 0.2},
        "sequence_tokens": 32,
        "cleaning": {"deduplicate": "none"},
    }
    tree = tiny_tree(Path(), task=task, data=data, **sections)
    tree["model"] = {"architecture": "bert", "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    return make_spec(tree)


def rows_of(corpus: Corpus, split: str = "train") -> list[dict[str, Any]]:
    filesystem, folder = open_filesystem(corpus.folder)
    (source,) = getattr(corpus.manifest, split).sources
    size = corpus.manifest.group_rows
    groups = list(range(-(-source.num_rows // size)))
    found: list[dict[str, Any]] = read_groups(filesystem, folder, source, groups, size).to_pylist()
    return found


def texts_of(corpus: Corpus, rows: list[dict[str, Any]]) -> list[str]:
    decoder = load_decoder(f"{corpus.folder}/tokenizer")
    return [
        decoder.decode(row["input_ids"][: row["num_tokens"]], skip_special_tokens=True)
        for row in rows
    ]


def test_rows_have_what_each_rule_says_of_their_text(folder: Path) -> None:
    corpus = prepare(spec_of(), "runs")
    for split in ("train", "validation"):
        rows = rows_of(corpus, split)
        for row, text in zip(rows, texts_of(corpus, rows), strict=True):
            assert row[VOTES] == expected_votes(text), text
    votes = [row[VOTES] for row in rows_of(corpus)]
    counts = {rule["name"]: sum(vote[n] > 0 for vote in votes) for n, rule in enumerate(RULES)}
    assert corpus.manifest.votes == counts
    assert min(counts["aged"], counts["two_colours"], counts["weather"]) > 10
    said = "\n".join(corpus.describe())
    assert f"rules        vote for training rows: 'aged' ({counts['aged']})" in said
    assert "rules        never votes for no training row" in said
    assert to_json(corpus.manifest, corpus.source_files())["votes"] == counts


def test_of_a_pair_rules_see_both_texts_a_line_each(folder: Path) -> None:
    rules = [
        {"name": "ends", "label": "a", "regex": r"(?m)^(red|green)$"},
        {"name": "over", "label": "b", "regex": r"warm.cold"},
    ]
    pair = {"task": {"pairs": True}, "source": {"columns": {"text_pair": "other"}}}
    corpus = prepare(spec_of(rules, **pair), "runs")
    decoder = load_decoder(f"{corpus.folder}/tokenizer")
    num = 0
    for row in rows_of(corpus):
        other = [
            token
            for token, segment in zip(row["input_ids"], row["segment"], strict=True)
            if segment
        ]
        said = decoder.decode(other, skip_special_tokens=True).strip()
        is_colour = said.rpartition("|")[2] in ("red", "green")
        num += is_colour
        assert row[VOTES][0] == is_colour
    assert num > 10


def test_a_corpus_is_known_by_what_rules_say_and_lexicons_hold(folder: Path) -> None:
    corpus = prepare(spec_of(), "runs")
    assert find(spec_of(), "runs") == corpus
    (folder / "elsewhere").mkdir()
    (folder / "weather.tsv").rename(folder / "elsewhere" / "any.tsv")
    moved = [dict(rule) for rule in RULES]
    moved[2]["lexicon"] = {**RULES[2]["lexicon"], "path": f"{folder}/elsewhere/any.tsv"}
    moved[0]["weight"] = 3.0
    assert find(spec_of(moved), "runs") == corpus
    keys = {corpus.manifest.key, corpus_key(spec_of(moved[:2])), corpus_key(spec_of(moved[:1]))}
    (folder / "elsewhere" / "any.tsv").write_text("it\tsays\ncold\tb\n", encoding="utf-8")
    keys.add(corpus_key(spec_of(moved)))
    plain = spec_of(moved[:2]).model_dump(mode="json") | {"task": "sequence_classification"}
    keys.add(corpus_key(make_spec(plain)))
    assert len(keys) == 5
    bare = prepare(make_spec(plain), "runs")
    assert "votes" not in bare.manifest.model_dump(mode="json")
    assert VOTES not in rows_of(bare)[0]
    assert not any("rules  " in line for line in bare.describe())


def test_a_row_in_other_words_has_the_votes_of_these(folder: Path) -> None:
    spec = spec_of(
        augmentation={"kinds": ["synonyms"], "thesaurus": "words", "share": 0.7, "strength": 0.5}
    )
    corpus = prepare(spec, "runs")
    (folder / "weather.tsv").unlink()  # a corpus has what it needs
    assert spec.augmentation is not None

    def learnt(num_ranks: int, start_step: int) -> dict[int, list[Any]]:
        reader = RowStream(
            corpus.folder, corpus.manifest.key, spec.seed, 12, num_ranks, -(-12 // num_ranks), 1,
            start_step, 16, rewriter=Rewriter(spec.augmentation, spec.task, spec.seed),  # type: ignore[arg-type]
        )  # fmt: skip
        found: dict[int, list[Any]] = {}
        for rank in range(num_ranks):
            for load in reader.loads():
                block = reader.read_block(load, rank)
                for segment, rows in reader.cut(block, load):
                    if segment.kind == "train":
                        for number, row in enumerate(rows.to_pylist()):
                            step = segment.first + number // reader.rows_per_rank
                            found.setdefault(step, []).append(row)
        return {step: [row for row in rows if row["row_id"] >= 0] for step, rows in found.items()}

    alone = learnt(1, 0)
    rows = [row for step in alone.values() for row in step]
    by_row: dict[int, set[str]] = {}
    for row, text in zip(rows, texts_of(corpus, rows), strict=True):
        assert row[VOTES] == expected_votes(text), text
        by_row.setdefault(row["row_id"], set()).add(json.dumps(row[VOTES]))
    assert sum(len(votes) > 1 for votes in by_row.values()) > len(by_row) / 4
    assert learnt(3, 5) == {step: rows for step, rows in alone.items() if step > 5}


@pytest.mark.parametrize(
    ("rule", "lexicon", "error", "message"),
    [
        ({"lexicon": {"path": "nowhere.csv"}}, None, CorpusError,
         r"rule x: nowhere\.csv is no file"),
        ({"lexicon": {"path": "x.csv"}}, "word,label\nred,c\n", CorpusError,
         r"rule x: x\.csv has the label 'c'; labels are a, b"),
        ({"lexicon": {"path": "x.csv"}}, "it,says\nred,a\n", CorpusError,
         r"x\.csv has no column word; it has it, says"),
        ({"lexicon": {"path": "x.csv"}}, "", CorpusError, r"rule x: x\.csv is no table"),
        ({"label": "a", "regex": "("}, None, SpecError,
         r"constraints\.rules\.0\.regex = '\(': the pattern is none \(missing \)"),
    ],
)  # fmt: skip
def test_rules_that_no_text_can_be_asked_by_are_refused_before_anything_is_written(
    folder: Path, rule: dict[str, Any], lexicon: str | None, error: type[Exception], message: str
) -> None:
    if lexicon is not None:
        (folder / "x.csv").write_text(lexicon, encoding="utf-8")
    with pytest.raises(error, match=message):
        prepare(spec_of([{"name": "x", **rule}]), "runs")
    assert not (folder / "runs").exists()


def test_a_pattern_that_takes_for_ever_is_named_with_the_document(folder: Path) -> None:
    with (folder / "a.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "zz " + "a" * 200, "label": "a"}))
    slow = [{"name": "slow", "label": "a", "regex": r"\b(a|aa)+$b?c"}]
    message = r"rule slow: took longer than 1 s over the document that begins 'zz aaa"
    with pytest.raises(CorpusError, match=message):
        prepare(spec_of(slow), "runs")
    assert not (folder / "runs").exists()


def test_words_of_a_lexicon_are_texts_whatever_they_look_like(folder: Path) -> None:
    """Readers of csv like to take `null` for nothing, and `01` for a number."""
    (folder / "x.csv").write_text("word,label\nnull,01\ntrue,1\n7,01\n", encoding="utf-8")
    told = [("null and void", "01"), ("none", "1"), ("true", "1"), ("07", "01"), ("7 up", "01")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in told]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rules = {"labels": ["01", "1"], "rules": [{"name": "x", "lexicon": {"path": "x.csv"}}]}
    spec = spec_of(task={"constraints": rules})
    whole = spec.model_dump(mode="json")
    corpus = prepare(make_spec({**whole, "data": {**whole["data"], "validation": None}}), "runs")
    rows = rows_of(corpus)
    found = dict(zip(texts_of(corpus, rows), (row[VOTES] for row in rows), strict=True))
    assert found == {
        "null and void": [1], "none": [0], "true": [2], "07": [0], "7 up": [1],
    }  # fmt: skip
