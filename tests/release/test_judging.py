"""Intervals, curves, calibration, slices and paired tests against what scikit-learn, scipy and
seqeval give for the same rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from dray.errors import PlanError
from dray.release.judging.calibration import (
    at_temperature,
    calibrate,
    fit_temperature,
    make_bins,
    reliability,
)
from dray.release.judging.curves import curves
from dray.release.judging.intervals import compare, compare_right_answers, intervals
from dray.release.judging.judge import Asked
from dray.release.judging.slices import check_kinds, slice_metrics
from dray.tasks.parts.ratio_scores import Ratios, perplexity
from dray.tasks.parts.scores import Classes, LabelSets, Numbers, Scores, quarters
from dray.tasks.parts.tag_scores import Entities


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def drawn(num: int = 300, classes: int = 2, seed: int = 0, sure: float = 1.0) -> Classes:
    """Rows of which a model knows something; `sure`: how many times too large its logits are."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(num, classes)) * 1.5
    shares = softmax(logits)
    wanted = np.array([draw.choice(classes, p=row) for row in shares])
    found = softmax(logits * sure)
    names = tuple("abcdef"[:classes])
    return Classes(wanted, found.argmax(axis=1), found, names)


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_scikit_learns(classes: int) -> None:
    scores = drawn(classes=classes)
    found, wanted, guesses = scores.metrics(), scores.wanted, scores.guesses
    average = "binary" if classes == 2 else "macro"
    precision, recall, f1, _ = sk.precision_recall_fscore_support(wanted, guesses, average=average)
    assert found["accuracy"] == sk.accuracy_score(wanted, guesses)
    assert (found["precision"], found["recall"], found["f1"]) == (precision, recall, f1)
    assert found["mcc"] == sk.matthews_corrcoef(wanted, guesses)
    likely = scores.probabilities[:, 1] if classes == 2 else scores.probabilities
    assert found["brier"] == pytest.approx(sk.brier_score_loss(wanted, likely))
    assert found["log_loss"] == pytest.approx(sk.log_loss(wanted, scores.probabilities))
    assert found["auc"] == pytest.approx(sk.roc_auc_score(wanted, likely, multi_class="ovr"))
    truth = wanted if classes == 2 else np.eye(classes)[wanted]
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(truth, likely))
    assert scores.confusion() == sk.confusion_matrix(wanted, guesses).tolist()


def test_classes_in_an_order_have_their_distances() -> None:
    scores = replace(drawn(classes=3), ranks=(2, 0, 1))
    ranks = np.array(scores.ranks)
    kappa = sk.cohen_kappa_score(ranks[scores.wanted], ranks[scores.guesses], weights="quadratic")
    assert scores.metrics()["kappa"] == kappa
    assert scores.metrics()["mae"] == np.abs(ranks[scores.wanted] - ranks[scores.guesses]).mean()


def test_what_rows_of_one_class_cannot_tell_is_undefined() -> None:
    scores = drawn()
    found = scores.take(np.flatnonzero(scores.wanted == 0)).metrics()
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"recall", "f1", "mcc", "auc", "average_precision"}
    told = intervals(scores.take(np.flatnonzero(scores.wanted == 0)), 20, 0)
    assert told["auc"] == {"value": None, "low": None, "high": None, "num_undefined": 20}


def test_metrics_of_label_sets_and_of_numbers_are_scikit_learns() -> None:
    draw = np.random.default_rng(1)
    wanted, likely = draw.integers(0, 2, (100, 3)), draw.random((100, 3))
    found = LabelSets(wanted, likely, ("a", "b", "c")).metrics()
    guesses = likely > 0.5
    assert found["f1"] == sk.f1_score(wanted, guesses, average="micro")
    assert found["accuracy"] == sk.accuracy_score(wanted, guesses)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(wanted, likely))
    assert found["brier"] == pytest.approx(sk.brier_score_loss(wanted.ravel(), likely.ravel()))
    one, other = draw.normal(size=50), draw.normal(size=50)
    numbers = Numbers(one, other).metrics()
    assert numbers["rmse"] == pytest.approx(sk.root_mean_squared_error(one, other))
    assert numbers["r2"] == pytest.approx(sk.r2_score(one, other))
    assert numbers["spearman"] == pytest.approx(stats.spearmanr(one, other).statistic)
    assert numbers["bias"] == pytest.approx(other.mean() - one.mean())


def test_entities_are_seqevals_for_any_sample_of_sentences() -> None:
    from seqeval import metrics as seqeval

    draw, tags = np.random.default_rng(2), ("O", "B-x", "I-x", "B-y", "I-y")
    sentences = [tuple(draw.choice(tags, 8, p=(0.4, 0.2, 0.15, 0.15, 0.1))) for _ in range(40)]
    guessed = [
        tuple(tag if draw.random() < 0.8 else str(draw.choice(tags)) for tag in own)
        for own in sentences
    ]
    scores = Entities(tuple(sentences), tuple(guessed), True)
    for rows in (np.arange(40), draw.integers(0, 40, 40)):
        wanted = [list(map(str, sentences[row])) for row in rows]
        found = [list(map(str, guessed[row])) for row in rows]
        own = scores.take(rows).metrics()
        assert own["f1"] == pytest.approx(seqeval.f1_score(wanted, found))
        assert own["precision"] == pytest.approx(seqeval.precision_score(wanted, found))
        assert own["recall"] == pytest.approx(seqeval.recall_score(wanted, found))
        assert own["accuracy"] == pytest.approx(seqeval.accuracy_score(wanted, found))
    assert sum(map(sum, scores.confusion())) == 320


def test_intervals_are_scipys_bootstrap_and_the_same_each_time() -> None:
    scores = drawn(400)
    right = scores.correct().astype(float)
    other = stats.bootstrap(
        (right,), np.mean, n_resamples=4000, method="percentile", random_state=5
    ).confidence_interval
    found = intervals(scores, 600, 0)
    assert found["accuracy"]["value"] == right.mean()
    # Both are noisy by about a tenth of the interval's own half width.
    noise = 0.2 * (other.high - other.low) / 2
    assert found["accuracy"]["low"] == pytest.approx(other.low, abs=noise)
    assert found["accuracy"]["high"] == pytest.approx(other.high, abs=noise)
    assert intervals(scores, 20, 0) == intervals(scores, 20, 0) != intervals(scores, 20, 1)


def test_a_language_models_perplexity_is_of_all_tokens_of_the_rows() -> None:
    losses, targets = np.array([4.0, 30.0, 6.0]), np.array([2.0, 10.0, 4.0])
    scores = Ratios({"loss": (losses, targets)}, "loss", derive=perplexity)
    assert scores.metrics() == {"loss": 2.5, "perplexity": math.exp(2.5)}
    assert scores.take(np.array([1, 1])).metrics()["loss"] == 3.0
    assert scores.costs().tolist() == [2.0, 3.0, 1.5]


def test_a_paired_test_is_scipys_permutation_test() -> None:
    first, noise = drawn(60), np.random.default_rng(9)
    wrong = noise.random(60) < 0.25
    second = replace(first, guesses=np.where(wrong, 1 - first.guesses, first.guesses))
    own, other = first.correct().astype(float), second.correct().astype(float)
    expected = stats.permutation_test(
        (other, own),
        lambda one, two: np.mean(one) - np.mean(two),
        permutation_type="samples",
        n_resamples=4000,
        random_state=3,
    )
    found = compare(first, second, 300, 0)["accuracy"]
    assert found["difference"] == pytest.approx(expected.statistic)
    assert found["p_value"] == pytest.approx(expected.pvalue, abs=0.08)
    assert found["low"] <= found["difference"] <= found["high"]
    same = compare(first, first, 20, 0)
    assert {one["p_value"] for one in same.values()} == {1.0}
    assert {one["difference"] for one in same.values()} == {0.0}


def test_right_answers_are_compared_by_mcnemars_exact_test() -> None:
    first = Classes(
        np.zeros(20, int), np.array([1] * 9 + [0] * 11), np.full((20, 2), 0.5), ("a", "b")
    )
    second = replace(first, guesses=np.array([0] * 8 + [1] * 2 + [0] * 10))
    found = compare_right_answers(first, second)
    assert found is not None
    assert (found["only_first"], found["only_second"]) == (1, 8)
    assert found["p_value"] == pytest.approx(2 * sum(math.comb(9, k) for k in (0, 1)) / 2**9)
    assert (
        compare_right_answers(Numbers(np.ones(2), np.ones(2)), Numbers(np.ones(2), np.ones(2)))
        is None
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_curves_are_scikit_learns(classes: int) -> None:
    scores = drawn(500, classes)
    found = curves(scores)
    assert list(found) == (["b"] if classes == 2 else ["a", "b", "c"])
    for name, one in found.items():
        place = scores.labels.index(name)
        truth, likely = scores.wanted == place, scores.probabilities[:, place]
        assert one["auc"] == pytest.approx(sk.roc_auc_score(truth, likely))
        false_rate, true_rate, _ = sk.roc_curve(truth, likely)
        points = set(zip(false_rate.tolist(), true_rate.tolist(), strict=True))
        own = one["roc"]
        drawn_points = list(zip(own["false_positive_rate"], own["true_positive_rate"], strict=True))
        assert set(drawn_points) <= points
        assert (drawn_points[0], drawn_points[-1]) == ((0.0, 0.0), (1.0, 1.0))
        assert max(map(len, own.values())) <= 200


def test_the_calibration_error_is_that_of_scikit_learns_bins() -> None:
    scores = drawn(1000, 3, sure=2.5)
    confidence, right = scores.probabilities.max(axis=1), scores.correct()
    told = reliability(scores)
    for strategy, key in (("uniform", "ece"), ("quantile", "ece_equal_mass")):
        share, mean = calibration_curve(right, confidence, n_bins=15, strategy=strategy)
        sizes = [one["num"] for one in make_bins(confidence, right, equal_mass=key != "ece")]
        error = np.average(np.abs(share - mean), weights=sizes)
        assert told[key] == pytest.approx(error, abs=1e-3)
    assert sum(one["num"] for one in told["bins"]) == 1000


def test_a_temperature_is_fitted_on_other_rows_than_it_is_measured_on() -> None:
    scores = drawn(4000, 3, sure=2.5)
    assert fit_temperature(scores) == pytest.approx(2.5, rel=0.1)
    found = calibrate(scores, 0)
    assert (found["num_fitted"], found["num_measured"]) == (2000, 2000)
    assert found["after"]["ece"] < 0.5 * found["before"]["ece"]
    assert found["after"]["log_loss"] < found["before"]["log_loss"]
    # What the measured half holds has no part in the temperature.
    order = np.random.default_rng([0, 2]).permutation(4000)
    changed = scores.wanted.copy()
    changed[order[2000:]] = 0
    assert calibrate(replace(scores, wanted=changed), 0)["temperature"] == found["temperature"]
    with pytest.raises(PlanError, match=r"--calibrate: there are 19 rows"):
        calibrate(scores.take(np.arange(19)), 0)


def test_a_temperature_of_one_changes_nothing() -> None:
    for scores in (
        drawn(),
        LabelSets(np.ones((2, 2), int), np.array([[0.3, 0.9], [0.5, 0.1]]), ("a", "b")),
    ):
        assert np.allclose(at_temperature(scores, 1.0).probabilities, scores.probabilities)


def test_slices_are_metrics_of_their_rows() -> None:
    scores = drawn(200)
    lengths = np.arange(200) // 3
    masks = quarters(lengths)
    assert sum(int(rows.sum()) for rows in masks.values()) == 200
    assert next(iter(masks)) == "0 to 16"
    found = slice_metrics(masks, scores, None, 0)
    for name, rows in masks.items():
        right = scores.correct()[rows]
        assert found[name]["num"] == len(right)
        assert found[name]["metrics"]["accuracy"] == {"value": right.mean()}
    assert quarters(np.zeros(4)).keys() == {"0 to 0"}
    with pytest.raises(PlanError, match=r"--slices colour: a corpus does not keep"):
        check_kinds(["label", "colour"])


@pytest.mark.parametrize("num", [0, 19, 100_001])
def test_too_few_or_too_many_samples_are_refused(num: int) -> None:
    with pytest.raises(PlanError, match="--intervals"):
        Asked(num).check()


def test_what_is_joined_can_be_taken_apart_again() -> None:
    every: list[Scores] = [
        drawn(5),
        LabelSets(np.ones((2, 1), int), np.ones((2, 1)), ("a",)),
        Numbers(np.arange(3.0), np.arange(3.0) + 1),
        Ratios({"loss": (np.arange(2.0), np.ones(2))}, "loss"),
        Entities((("B-x",), ("O",)), (("O",), ("O",)), True),
    ]
    for scores in every:
        both = scores.join(scores)
        assert len(both) == 2 * len(scores)
        again = both.take(np.arange(len(scores), 2 * len(scores)))
        assert again.metrics() == pytest.approx(scores.metrics(), nan_ok=True)
        assert again.is_same_truth(scores)
        assert len(scores.costs()) == len(scores)
        assert scores.told(0)
