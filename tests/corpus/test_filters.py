"""The published rules for documents of the web, languages, decontamination, and corpora that were
made by them."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dray.cli import main
from dray.corpus import prepare as prepare_module
from dray.corpus.cleaning import clean
from dray.corpus.examples import CHARS, EACH, KEPT, examples_of, merged
from dray.corpus.filters import judge
from dray.corpus.languages import language_of
from dray.corpus.prepare import Corpus, corpus_key, prepare
from dray.errors import CorpusError, SpecError
from dray.spec import Cleaning, Filters, Spec, load_spec, make_spec
from dray.spec.loading import apply_overrides
from tiny import tiny_tree

MESSY = Path(__file__).parents[3] / "shared/data/web_messy"
PROSE = (
    "The people of the town went to the river with their boats, and that was the day when it all "
    "began to change. Nobody could have known how far the water would rise after the storm. They "
    "carried what they had up the hill, and the old bell rang until morning came at last."
)
OTHER = (
    "An engineer drew the plan of a bridge that should be wide enough for two carts. She had to "
    "find timber that winter would not split, and stone that could be cut to size by hand. When "
    "spring came the first arch stood, with a lamp at either end and a keeper to light it."
)


def broken(text: str, **filters: Any) -> str | None:
    return judge(text, Filters.model_validate(filters), Counter())[1]


# --- Gopher --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PROSE, None),
        ("The dog of the house.", "too few words"),
        (" ".join(["I a"] * 60 + ["the of"]), "words too short"),
        ("the of " + " ".join(["internationalisation"] * 60), "words too long"),
        (PROSE + " #" * 10, "too many symbols"),
        (PROSE + " ..." * 10, "too many symbols"),
        ("\n".join(f"- {word} {PROSE[:40]}" for word in "abcdefghij"), "too many bullets"),
        ("\n".join(f"{PROSE[:90]} {word} ..." for word in "abcdef"), "too many ellipses"),
        (PROSE + " 12:30" * 40, "too few words with letters"),
        ("Das Haus steht am Fluss, dort wohnen viele Leute. " * 8, "too few stop words"),
    ],
)
def test_gopher_tells_prose(text: str, said: str | None) -> None:
    expected = said and f"gopher_quality: {said}"
    assert broken(text, gopher_quality={}) == expected


def test_thresholds_are_of_the_spec() -> None:
    german = "Das Haus steht am Fluss, dort wohnen viele Leute. " * 8
    assert broken(german, gopher_quality={"min_stop_words": 0}) is None
    assert broken("of the", gopher_quality={"min_words": 2, "min_mean_word_chars": 0}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{PROSE}\n{OTHER}", None),
        (f"{PROSE}\n\n{OTHER}\n\n{PROSE}", "duplicate paragraphs"),
        (f"{PROSE}\n\nA\n\nB\n\nC\n\nD\n\nE\n\n{PROSE}", "characters in duplicate paragraphs"),
        (f"{PROSE}\nHome\nHome\nHome", "duplicate lines"),
        (f"{PROSE}\n{PROSE}\nA\nB\nC\nD", "characters in duplicate lines"),
        (f"{PROSE} {'more news ' * 20}", "characters in the top 2-gram"),
        (f"{OTHER} So: {OTHER}", "characters in duplicate 5-grams"),
    ],
)
def test_gopher_tells_repetition(text: str, said: str | None) -> None:
    expected = said and f"gopher_repetition: {said}"
    assert broken(text, gopher_repetition={}) == expected


def test_repeated_words_count_once() -> None:
    """`a b c d e` four times over: of 20 words 15 lie in runs of 5 that were there before, however
    many such runs each lies in."""
    text = "aa bb cc dd ee " * 4
    rules = {"max_top_ngram_char_shares": [1, 1, 1], "max_duplicate_line_share": 1}
    for share, said in (
        (0.76, None), (0.74, "gopher_repetition: characters in duplicate 5-grams")
    ):  # fmt: skip
        shares = [share, 1, 1, 1, 1, 1]
        found = broken(text, gopher_repetition={**rules, "max_duplicate_ngram_char_shares": shares})
        assert found == said


def test_the_top_run_is_the_longest_of_the_most_frequent() -> None:
    text = "one two x one two y longword other z longword other q"
    size = len("longwordother") * 2
    total = len(text.replace(" ", ""))
    rules = {"max_duplicate_ngram_char_shares": [1] * 6}
    for share, said in (
        (size / total + 0.01, None),
        (size / total - 0.01, "gopher_repetition: characters in the top 2-gram"),
    ):
        shares = [share, 1, 1]
        assert (
            broken(text, gopher_repetition={**rules, "max_top_ngram_char_shares": shares}) == said
        )


# --- C4 and FineWeb ------------------------------------------------------------------------------

SENTENCES = "\n".join(f"This is sentence number {n} of the page." for n in range(6))


def test_c4_takes_lines_out_and_counts_them() -> None:
    menu = "Home\nAbout us and the shop\nWe use cookies to make this site better.\n"
    script = "Please enable JavaScript to see this page.\n"
    text = f"{menu}{script}{SENTENCES} It is so.[1]\nRead on...\n{'x' * 1001} is long here.\n"
    removed: Counter[str] = Counter()
    kept, said = judge(text, Filters.model_validate({"c4": {}}), removed)
    assert said is None
    assert kept == f"{SENTENCES} It is so."
    assert removed == {
        "c4: lines of too few words": 2,
        "c4: lines without an end mark": 1,
        "c4: lines about policies": 1,
        "c4: lines about JavaScript": 1,
        "c4: lines with a long word": 1,
        "c4: citation marks": 1,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SENTENCES.replace("\n", " "), None),
        ("Only one sentence is here. And another one is.", "too few sentences"),
        (SENTENCES + "\nfunction () { return 1; }", "curly bracket"),
        (SENTENCES + "\nLorem ipsum dolor sit amet.", "lorem ipsum"),
        ("Home\nShop\nNews", "too few sentences"),
    ],
)
def test_c4_leaves_documents_out(text: str, said: str | None) -> None:
    assert broken(text, c4={}) == (said and f"c4: {said}")


def test_a_document_of_blank_lines_is_none() -> None:
    rules = {"min_sentences": 0, "min_line_words": 0, "terminal_punctuation": False}
    assert broken(" \n\n ", c4=rules) == "c4: no line left"


def test_what_is_taken_out_of_documents_that_go_is_not_counted() -> None:
    removed: Counter[str] = Counter()
    assert judge("Home\nShop\nNews", Filters.model_validate({"c4": {}}), removed)[1]
    assert not removed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PROSE, None),
        ("今天天气很好，我们去河边散步，然后回家吃饭，晚上看了一部关于历史的电影。", None),
        ("\n".join([PROSE[:80]] * 9), "too few lines with an end mark"),
        ("\n".join(f"Item {n}." for n in range(9)), "too many short lines"),
        (f"{PROSE}\n{PROSE}", "characters in duplicate lines"),
        ("\n\n\n\n".join(f"It costs {n}-much-more-than-{n}-thousand-coins." for n in range(9)),
         "too many newlines"),
        (" \n ", "no lines"),
    ],
)  # fmt: skip
def test_fineweb_tells_lists(text: str, said: str | None) -> None:
    rules = {"max_newline_word_ratio": 1.0} if said is None else {}
    assert broken(text, fineweb=rules) == (said and f"fineweb: {said}")


def test_the_first_rule_of_several_is_told() -> None:
    rules: dict[str, Any] = {"fineweb": {}, "c4": {}, "gopher_quality": {}, "gopher_repetition": {}}
    assert broken("Home\nHome\nHome", **rules) == "gopher_repetition: duplicate lines"


# --- languages and examples ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (PROSE, "en"),
        ("Das Haus steht am Fluss, und dort wohnen seit vielen Jahren die alten Leute.", "de"),
        ("今天天气很好，我们去河边散步，然后回家吃饭。", "zh"),
        ("Le chat dort sur la table de la cuisine pendant que la pluie tombe dehors.", "fr"),
    ],
)
def test_languages_are_told(text: str, code: str) -> None:
    found, score = language_of(text)
    assert found == code
    assert 0.5 < score <= 1
    assert language_of("3.14 - 42")[1] < 0.5


def test_examples_are_the_same_however_documents_come() -> None:
    import numpy as np

    from dray.corpus.cleaning import hash_texts

    texts = [f"document {n} {'x' * n * 20}" for n in range(50)]
    whole = examples_of("gone", pa.array(texts, pa.large_string()),
                        hash_texts(pa.array(texts, pa.large_string()))[1])  # fmt: skip
    parts = []
    for start in (40, 0, 20):
        part = pa.array(texts[start : start + (10 if start == 40 else 20)], pa.large_string())
        parts.append(examples_of("gone", part, hash_texts(part)[1]))
    assert merged(parts) == merged([whole])
    assert len(merged(parts)["gone"]) == EACH
    assert all(len(text) <= CHARS for _, text in merged(parts)["gone"])
    assert examples_of("gone", pa.array([], pa.large_string()), np.empty(0, np.uint64)) == {}


def test_what_is_to_be_forgotten_is_no_example() -> None:
    from dray.corpus.cleaning import digest_of

    rules = Cleaning(forget=(digest_of("a secret"), digest_of("s")), min_chars=3)
    found = clean(pa.array(["a secret", "s", "b", "kept"], pa.large_string()), None, rules)
    assert found.dropped == {"forgotten": 2, "too_short": 1}
    assert [*found.examples] == ["too_short"]


# --- the spec ------------------------------------------------------------------------------------


def make(train: Any, task: str = "causal_lm", **cleaning: Any) -> Spec:
    tree = tiny_tree(Path("."), task=task)
    tree["data"] = {"train": train, "sequence_tokens": 64, "cleaning": cleaning}
    return make_spec(tree)


def test_names_stand_for_the_published_thresholds() -> None:
    long = make("x", filters={"c4": {}, "fineweb": None}).data.cleaning
    assert make("x", filters=["c4", "fineweb"]).data.cleaning == long
    assert make("x", filters="c4").data.cleaning.filters.c4 is not None
    tree = {"data": {"cleaning": {"filters": ["c4", "fineweb"]}}}
    changed = apply_overrides(tree, ["data.cleaning.filters.c4.min_sentences=3"])
    assert changed["data"]["cleaning"]["filters"] == {"c4": {"min_sentences": 3}, "fineweb": {}}


def test_languages_are_codes() -> None:
    short = make("x", languages="en").data.cleaning
    assert short == make("x", languages={"keep": ["en"]}).data.cleaning
    for norwegian in (False, [False], "no"):  # YAML reads `no` as false
        languages = make("x", languages=norwegian).data.cleaning.languages
        assert languages is not None
        assert languages.keep == ("no",)


@pytest.mark.parametrize(
    ("cleaning", "said"),
    [
        ({"filters": ["c5"]}, "unknown key data.cleaning.filters.c5; did you mean"),
        ({"filters": [{"c4": {}}]}, "thresholds need a mapping"),
        (
            {"filters": {"c4": {"min_sentence": 3}}},
            "did you mean data.cleaning.filters.c4.min_",
        ),
        ({"languages": []}, "languages"),
        ({"languages": ["English"]}, "languages"),
        ({"decontaminate": {}}, "against"),
        ({"languages": ["EN"]}, "a code of two or three small letters, such as en"),
        ({"filters": ["c4", "c4"]}, "c4 is there twice"),
        ({"filters": {"gopher_quality": {"min_words": 9, "max_words": 8}}}, "min_words is above"),
    ],
)
def test_what_is_no_rule_is_refused(cleaning: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make("x", **cleaning)


def test_a_spec_without_rules_is_dumped_as_before() -> None:
    dumped = make("x").data.cleaning.model_dump(mode="json")
    assert not {"filters", "languages", "decontaminate"} & dumped.keys()


@pytest.mark.parametrize(
    ("task", "cleaning", "said"),
    [
        ("causal_lm", {"languages": ["qq"]}, "is no language that can be told"),
        ("token_classification", {"filters": "c4"}, "a field of kind words"),
        ("instruction", {"languages": "en"}, "a field of kind record"),
        ("token_classification", {"languages": "en"}, "a field of kind words"),
        ("instruction", {"decontaminate": {"against": "x"}}, "a field of kind record"),
    ],
)
def test_rules_that_do_not_fit_are_refused_before_anything_is_read(
    task: str, cleaning: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = {"path": str(tmp_path / "none"), "label": "label"}
    with pytest.raises(SpecError, match=said):
        prepare(make(source, task, **cleaning), str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_package_that_is_absent_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    from dray.processes import imports

    monkeypatch.setattr(imports, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"py3langid is not installed.*pip install 'dray\[web\]'"):
        prepare(make(str(tmp_path), languages="en"), str(tmp_path / "runs"))


# --- corpora -------------------------------------------------------------------------------------


def test_what_is_not_there_is_told_before_a_ray_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*given: Any, **more: Any) -> Any:
        raise AssertionError("a Ray is started")

    monkeypatch.setattr("dray.cluster.connection.connect", connect)
    monkeypatch.setattr("dray.train.driver.connect", connect)
    write(tmp_path / "a.jsonl", numbered(20))
    tree = tiny_tree(tmp_path)
    tree["data"]["cleaning"] = {"decontaminate": {"against": str(tmp_path / "none.jsonl")}}
    (tmp_path / "spec.yaml").write_text(json.dumps(tree))
    for command in ("prepare", "train"):
        words = [command, str(tmp_path / "spec.yaml"), "--storage", str(tmp_path / "runs")]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "data.cleaning.decontaminate.against.0.path" in said
        assert main([*words, "data.cleaning.languages=[qq]"]) == 2
        assert "is no language that can be told" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def numbered(count: int) -> list[str]:
    words = [f"word{n}" for n in range(500)]
    return [" ".join(random.Random(n).choices(words, k=30)) for n in range(count)]


@pytest.mark.usefixtures("local_ray")
def test_no_training_document_shares_text_with_an_evaluation_set(tmp_path: Path) -> None:
    texts = numbered(200)
    run = " ".join(texts[3].upper().split()[5:18])  # 13 words, written otherwise
    inside = f"What follows was in a test -- {run}! -- and nothing else of it."
    nearly = " ".join(texts[4].split()[5:17])  # 12 words of another one
    train = write(tmp_path / "a.jsonl", [*texts[20:], inside, nearly, "so short a test"])
    asked = [texts[3], texts[4], "so short a test", "a test", run]
    against = write(tmp_path / "test.jsonl", asked)
    spec = make(str(train), decontaminate={"against": str(against)})
    corpus = prepare(spec, str(tmp_path / "runs"))
    manifest = corpus.manifest
    assert manifest.dropped == {"sharing text with an evaluation set": 2}
    assert manifest.evaluation == {"texts": 5, "short_texts": 2}
    assert sorted(corpus.examples()["sharing text with an evaluation set"]) == sorted(
        [inside, "so short a test"]
    )
    assert "5 texts to share nothing with, 2 of them too short" in "\n".join(corpus.describe())
    lax = make(str(train), decontaminate={"against": str(against), "max_ngrams": 1})
    assert prepare(lax, str(tmp_path / "runs")).manifest.dropped == {}

    moved = tmp_path / "elsewhere.jsonl"
    against.rename(moved)
    other = make(str(train), decontaminate={"against": str(moved)})
    assert corpus_key(other) == manifest.key  # it is what the set holds that counts
    write(moved, [texts[3]])
    assert corpus_key(other) != manifest.key
    moved.write_text('{"text": "..."}\n')
    with pytest.raises(CorpusError, match=r"elsewhere\.jsonl holds no words"):
        prepare(other, str(tmp_path / "runs"))
    moved.write_text('{"question": "a"}\n')
    with pytest.raises(CorpusError, match="no text column 'text'; columns: question"):
        prepare(other, str(tmp_path / "runs"))
    moved.write_text('{"text": "a"}\nno json\n')
    with pytest.raises(CorpusError, match="every text of an evaluation set is looked for"):
        prepare(other, str(tmp_path / "runs"))
    with pytest.raises(CorpusError, match=r"data\.cleaning\.decontaminate\.against\.0\.path"):
        prepare(spec, str(tmp_path / "runs"))


@pytest.mark.usefixtures("local_ray")
def test_validation_documents_may_share_text_with_what_they_are(tmp_path: Path) -> None:
    texts = numbered(60)
    train = write(tmp_path / "a.jsonl", texts[:40])
    held = write(tmp_path / "b.jsonl", texts[40:])
    tree = tiny_tree(Path("."))
    tree["data"] = {
        "train": str(train),
        "validation": str(held),
        "sequence_tokens": 64,
        "cleaning": {"decontaminate": {"against": str(held)}},
    }
    manifest = prepare(make_spec(tree), str(tmp_path / "runs")).manifest
    assert manifest.dropped == {}
    assert manifest.validation is not None
    assert manifest.validation.num_documents == 20


def pages() -> list[str]:
    found: list[str] = []
    for name in ("CC-MAIN-20190717121559-20190717143559-00140.jsonl.gz", "c4_demo.jsonl.gz"):
        with gzip.open(MESSY / name, "rt", encoding="utf-8") as file:
            found += [json.loads(line)["text"] for line in file]
    return found


RULES = {
    "languages": {"keep": ["en"], "min_score": 0.5},
    "filters": ["gopher_repetition", "gopher_quality", "c4", "fineweb"],
}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif(not MESSY.exists(), reason="needs the pages of web_messy")
def test_pages_of_the_web_are_kept_or_counted_however_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pages()[400:]  # as many of one crawl as of C4
    train = write(tmp_path / "a.jsonl", texts)
    spec = make(str(train), **RULES)
    found: list[Corpus] = []
    for number, size in enumerate((1 << 30, 300_000)):
        monkeypatch.setattr(prepare_module, "choose_part_bytes", lambda files, size=size: size)
        found.append(prepare(spec, str(tmp_path / f"runs{number}")))
    whole, parts = (corpus.manifest for corpus in found)
    for name in ("dropped", "removed", "languages", "num_records"):
        assert getattr(whole, name) == getattr(parts, name)
    assert found[0].examples().keys() == found[1].examples().keys()
    assert found[0].examples()[KEPT] == found[1].examples()[KEPT]
    assert whole.train.num_documents + sum(whole.dropped.values()) == len(texts)
    assert whole.languages.keys() == {"en"}
    # What each rule says alone is what the corpus counts, a document for its first reason.
    removed: Counter[str] = Counter()
    rules = Filters.model_validate({name: {} for name in RULES["filters"]})
    told = Counter(
        judge(text, rules, removed)[1]
        for text in clean(pa.array(texts, pa.large_string()), None, Cleaning()).texts.to_pylist()
        if language_of(text)[0] == "en" and language_of(text)[1] >= 0.5
    )
    del told[None]
    assert {k: n for k, n in whole.dropped.items() if ": " in k} == told
    assert whole.removed == removed


@pytest.mark.usefixtures("local_ray")
def test_a_page_shows_what_was_kept_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "Write to jane.roe@example.org about it"
    texts = [*(f"{PROSE} {n}." for n in range(30)), "<b>short</b>", f"{secret} {'.' * 40}"]
    write(tmp_path / "a.jsonl", texts)
    tree = tiny_tree(Path("."))
    tree["data"] = {
        "train": str(tmp_path / "a.jsonl"),
        "sequence_tokens": 64,
        "cleaning": {"filters": "gopher_quality"},
        "redaction": {},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(tree))
    page = tmp_path / "page.html"
    words = ["prepare", str(tmp_path / "spec.yaml"), "--storage", str(tmp_path / "runs")]
    assert main([*words, "--html", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dropped"] == {"gopher_quality: too few words": 2}
    text = page.read_text()
    assert "gopher_quality: too few words" in text
    assert "&lt;b&gt;short&lt;/b&gt;" in text
    assert PROSE[:40] in text
    assert "[EMAIL]" in text
    assert "jane.roe" not in text
    assert "jane.roe" not in Path(told["folder"], "examples.json").read_text()
    # Of tagged words no beginning is shown: cut in two, a list cannot be redacted.
    lines = [f"w{n}\t{tag}" for n in range(20) for tag in ("O", "B-PER")]
    lines.append("jane.roe@example.org\tO")
    (tmp_path / "b.conll").write_text("\n".join([*lines, "", *lines[:4], ""]) + "\n")
    tree = tiny_tree(Path("."), task="token_classification")
    tree["data"] = {
        "train": str(tmp_path / "b.conll"),
        "sequence_tokens": 64,
        "cleaning": {"max_chars": 100},
        "redaction": {},
    }
    corpus = prepare(make_spec(tree), str(tmp_path / "runs"))
    assert corpus.manifest.dropped == {"too_long": 1}
    assert corpus.examples() == {}
    assert load_spec(str(tmp_path / "spec.yaml"), []).data.redaction is not None
