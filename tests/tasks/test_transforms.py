"""Transforms of rows of numbers are those that the libraries make, whatever a row stands beside."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import pywt
from pydantic import ValidationError
from sklearn.decomposition import PCA, TruncatedSVD

from dray.errors import CorpusError
from dray.tasks.feature_classification import FeatureClassification, Transform
from dray.tasks.parts.transforms import apply_transforms, fit_transforms

Settings = FeatureClassification.Settings


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    mixed = drawn.normal(size=(shape[0], 6)) @ drawn.normal(size=(6, int(np.prod(shape[1:]))))
    return (mixed + 0.1 * drawn.normal(size=mixed.shape) + 3.0).reshape(shape)


def through(values: np.ndarray, others: np.ndarray, **given: Any) -> np.ndarray:
    """What a transform that is fitted to some rows makes of others."""
    transforms = [Transform(**given)]
    fitted = json.loads(json.dumps(fit_transforms(transforms, values, "here")))  # as it is kept
    return apply_transforms(transforms, fitted, others)


def test_numbers_lose_their_mean_and_their_scale_and_still_ones_become_0() -> None:
    values, others = numbers(50, 8), numbers(7, 8, seed=1)
    values[:, 3] = 5.0
    found = through(values, others, name="standardize")
    wanted = (others - values.mean(0)) / np.where(values.std(0) == 0, 1, values.std(0))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    own = through(values, values, name="standardize")
    assert (own[:, 3] == 0).all()
    (fitted,) = fit_transforms([Transform(name="standardize")], values, "here")
    assert fitted["said"] == "standardize: 8 numbers by 50 documents; 1 never vary and become 0"


@pytest.mark.parametrize("whiten", [False, True])
def test_principal_components_are_scikit_learns(whiten: bool) -> None:
    values, others = numbers(60, 10), numbers(9, 10, seed=1)
    model = PCA(4, whiten=whiten, random_state=0).fit(values)
    found = through(values, others, name="pca", keep=4, whiten=whiten)
    np.testing.assert_allclose(found, model.transform(others), rtol=1e-4, atol=1e-4)
    (fitted,) = fit_transforms([Transform(name="pca", keep=4)], values, "here")
    share = model.explained_variance_ratio_.sum()
    assert fitted["said"] == f"pca: 4 of 10 numbers have {share:.1%} of the variance"


def test_truncated_svd_is_scikit_learns_and_leaves_zeros_zero() -> None:
    values, others = numbers(60, 10), numbers(9, 10, seed=1)
    others[0] = 0.0
    found = through(values, others, name="truncated_svd", keep=4)
    model = TruncatedSVD(4, random_state=0).fit(values)
    np.testing.assert_allclose(found, model.transform(others), rtol=1e-4, atol=1e-4)
    assert (found[0] == 0).all()


def test_of_a_signal_the_strongest_frequencies_are_kept() -> None:
    times = np.arange(64)
    drawn = np.random.default_rng(0)
    values = np.stack([np.sin(2 * np.pi * (4 * times / 64 + p)) for p in drawn.random(30)])
    values += np.stack([0.5 * np.cos(2 * np.pi * (11 * times / 64 + p)) for p in drawn.random(30)])
    (fitted,) = fit_transforms([Transform(name="fourier", keep=2)], values, "here")
    found = apply_transforms([Transform(name="fourier", keep=2)], [fitted], values)
    strengths = np.abs(np.fft.rfft(values, norm="ortho"))
    np.testing.assert_allclose(found, strengths[:, [4, 11]], rtol=1e-5)
    assert fitted["said"] == "fourier: 2 of 33 coefficients have 100.0% of the energy"


def test_all_wavelet_coefficients_of_an_orthogonal_wavelet_have_the_energy_of_the_row() -> None:
    values = numbers(5, 32)
    found = through(values, values, name="wavelet", keep=32)
    np.testing.assert_allclose(np.square(found).sum(1), np.square(values).sum(1), rtol=1e-5)
    approximation, *details = pywt.wavedec(values, "haar", "periodization", axis=1)
    assert found.shape[1] == approximation.shape[1] + sum(level.shape[1] for level in details)
    np.testing.assert_allclose(found[:, 0], approximation[:, 0], rtol=1e-5)


def test_of_images_both_axes_are_transformed() -> None:
    values = numbers(40, 8, 8, 1)
    found = through(values, values[:3], name="wavelet", keep=64, levels=1)
    coarse, _ = pywt.dwt2(values[:3, :, :, 0], "haar", "periodization", axes=(1, 2))
    np.testing.assert_allclose(found[:, :16], coarse.reshape(3, 16), rtol=1e-4, atol=1e-5)
    strengths = np.abs(np.fft.rfft2(values[:3, :, :, 0], norm="ortho")).reshape(3, -1)
    own = through(values, values[:3], name="fourier", keep=40)
    np.testing.assert_allclose(own, strengths, rtol=1e-4, atol=1e-5)


def test_transforms_follow_each_other() -> None:
    values = numbers(50, 16)
    both = [Transform(name="fourier", keep=9), Transform(name="pca", keep=3)]
    fitted = fit_transforms(both, values, "here")
    strengths = np.abs(np.fft.rfft(values, norm="ortho"))
    wanted = PCA(3, random_state=0).fit_transform(strengths)
    np.testing.assert_allclose(apply_transforms(both, fitted, values), wanted, atol=1e-4)


def test_more_than_there_is_cannot_be_kept() -> None:
    values = numbers(5, 16)
    for given, most in (("pca", 4), ("truncated_svd", 4), ("fourier", 9), ("wavelet", 16)):
        with pytest.raises(CorpusError, match=rf"here\.0\.keep = 17: .* no more than {most} to"):
            fit_transforms([Transform(name=given, keep=17)], values, "here")


def test_a_wavelet_parts_rows_as_often_as_they_are_long_enough_for() -> None:
    with pytest.raises(CorpusError, match=r"here\.0\.levels = 5: rows of 16 .* at most 4 times"):
        fit_transforms([Transform(name="wavelet", keep=3, levels=5)], numbers(5, 16), "here")


def test_what_was_fitted_otherwise_is_not_applied() -> None:
    values = numbers(30, 16)
    fitted = fit_transforms([Transform(name="pca", keep=3)], values, "here")
    with pytest.raises(CorpusError, match=r"'keep': 4.* is asked for, and .*'keep': 3"):
        apply_transforms([Transform(name="pca", keep=4)], fitted, values)
    with pytest.raises(CorpusError, match=r"'shape': \[12\]"):
        apply_transforms([Transform(name="pca", keep=3)], fitted, values[:, :12])
    with pytest.raises(CorpusError, match="0 are asked for, and 1 were fitted"):
        apply_transforms([], fitted, values)
    broken = {**fitted[0], "mean": {"shape": [99], "fp32": fitted[0]["mean"]["fp32"]}}
    with pytest.raises(CorpusError, match="has no array"):
        apply_transforms([Transform(name="pca", keep=3)], [broken], values)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "pca"}, "pca needs `keep`"),
        ({"name": "standardize", "keep": 3}, "standardize keeps all numbers"),
        ({"name": "fourier", "keep": 3, "whiten": True}, "whiten is of pca"),
        ({"name": "pca", "keep": 3, "levels": 2}, "levels are of wavelet"),
        ({"name": "wavelet", "keep": 3, "wavelet": "harr"}, "harr"),
    ],
)
def test_a_transform_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Transform(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "columns names none"),
        ({"columns": ["a", "a"]}, "names one twice"),
        ({"columns": ["a", "label"]}, "names `label`"),
        ({"columns": ["a", "b"], "size": 1}, "2 columns have more"),
        ({"columns": ["a"], "channels": 3}, "channels are of images"),
        ({"columns": ["a", "b", "c"], "patch": 2}, "3 numbers are left, no multiple"),
        ({"of": "image", "columns": ["a"]}, "columns are of columns"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**given)


def test_the_numbers_that_are_left_are_known_before_any_data_is() -> None:
    assert Settings(columns=["a", "b"]).num_left == 2
    assert Settings(columns=["a", "b"], size=40).num_left == 40
    assert Settings(of="image", size=8, channels=3).num_left == 192
    kept = [{"name": "fourier", "keep": 9}, {"name": "standardize"}]
    assert Settings(of="image", transforms=kept).num_left == 9
