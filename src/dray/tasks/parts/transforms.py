"""Transforms of rows of numbers, one after the other: fitted to a sample of the training documents
once, and then the same for every row there is.

What was fitted is plain values, which a corpus keeps in its manifest: whoever has that, or an
export, transforms as training did. Refuses to keep more numbers than a transform makes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dray.errors import CorpusError, one_line
from dray.processes.imports import require_package

if TYPE_CHECKING:
    from dray.tasks.feature_classification import Transform

Numbers = npt.NDArray[np.float64]
Fitted = dict[str, Any]
"""What is known of a transform: JSON, with arrays as `_packed` has them, and `said`, a sentence."""


def fit_transforms(
    transforms: Sequence[Transform], values: Numbers, where: str
) -> tuple[Fitted, ...]:
    """What each transform takes from a sample, [rows, *shape], as those before it leave it. Raises
    CorpusError for one that the sample is too small for, or that keeps more than there is."""
    found = []
    for place, one in enumerate(transforms):
        fitted = _FITS[one.name](one, values, f"{where}.{place}")
        found.append({"transform": _known(one, values), **fitted})
        values = _apply(one, fitted, values)
    return tuple(found)


def apply_transforms(
    transforms: Sequence[Transform], fitted: Sequence[Mapping[str, Any]], values: Numbers
) -> npt.NDArray[np.float32]:
    """Rows [rows, *shape] transformed, [rows, numbers that are left]. Raises CorpusError where
    these are not the transforms that were fitted."""
    if len(fitted) != len(transforms):
        raise _other_transforms(f"{len(transforms)} are asked for, and {len(fitted)} were fitted")
    for one, own in zip(transforms, fitted, strict=True):
        if (known := _known(one, values)) != own["transform"]:
            raise _other_transforms(f"{known} is asked for, and {own['transform']} was fitted")
        values = _apply(one, own, values)
    return _flat(values).astype(np.float32)


def _known(one: Transform, values: Numbers) -> dict[str, Any]:
    """What a transform is, and of which shape the rows are that it is given."""
    return {**one.model_dump(mode="json", exclude_defaults=True), "shape": list(values.shape[1:])}


def _other_transforms(what: str) -> CorpusError:
    return CorpusError(
        "task.transforms",
        what,
        "weights know the numbers that they were trained on",
        "ask for the transforms of the model that the run starts from",
    )


def _apply(one: Transform, fitted: Mapping[str, Any], values: Numbers) -> Numbers:
    if one.name == "standardize":
        return (values - _array(fitted["mean"])) / _array(fitted["scale"])
    if one.name in ("fourier", "wavelet"):
        return _coefficients(one, values)[:, _array(fitted["places"]).astype(np.int64)]
    flat = _flat(values)
    return (flat - _array(fitted["mean"])) @ _array(fitted["directions"]).T


def _fit_standardize(one: Transform, values: Numbers, where: str) -> Fitted:
    scale = values.std(axis=0)
    still = int((scale == 0).sum())
    said = f"standardize: {scale.size:,} numbers by {len(values):,} documents"
    if still:
        said += f"; {still:,} never vary and become 0"
    return {
        "mean": _packed(values.mean(axis=0)),
        "scale": _packed(np.where(scale == 0, 1.0, scale)),
        "said": said,
    }


def _fit_directions(one: Transform, values: Numbers, where: str) -> Fitted:
    from sklearn.decomposition import PCA, TruncatedSVD

    flat = _flat(values)
    keep = int(one.keep or 0)
    # Of rows less their mean one direction less is known than there are rows.
    most = min(len(flat) - 1, flat.shape[1])
    _check_keep(one, keep, most, where, f"{len(flat):,} documents of {flat.shape[1]:,} numbers")
    total = float(flat.var(axis=0).sum()) or 1.0
    if one.name == "pca":
        model: Any = PCA(keep, random_state=0)
        model.fit(flat)
        directions, mean = model.components_, model.mean_
        if one.whiten:
            spread = np.sqrt(np.maximum(model.explained_variance_, np.finfo(np.float32).tiny))
            directions = directions / spread[:, None]
        share = float(model.explained_variance_ratio_.sum())
    else:
        model = TruncatedSVD(keep, random_state=0)
        left = model.fit_transform(flat)
        directions, mean = model.components_, np.zeros(flat.shape[1])
        share = float(left.var(axis=0).sum() / total)
    said = f"{one.name}: {keep:,} of {flat.shape[1]:,} numbers have {share:.1%} of the variance"
    return {"mean": _packed(mean), "directions": _packed(directions), "said": said}


def _fit_places(one: Transform, values: Numbers, where: str) -> Fitted:
    if one.levels is not None and one.levels > (most := _most_levels(one, values)):
        raise CorpusError(
            f"{where}.levels = {one.levels}",
            f"rows of {' × '.join(map(str, values.shape[1:]))} are parted at most {most} times",
            f"{one.wavelet} needs so many numbers",
            "leave it out",
        )
    coefficients = _coefficients(one, values)
    strength = np.square(coefficients).mean(axis=0)
    keep = int(one.keep or 0)
    _check_keep(one, keep, strength.size, where, f"{one.name} makes {strength.size:,}")
    # A stable sort: of coefficients that are as strong the first ones.
    places = np.sort(np.argsort(-strength, kind="stable")[:keep])
    share = float(strength[places].sum() / (strength.sum() or 1.0))
    said = f"{one.name}: {keep:,} of {strength.size:,} coefficients have {share:.1%} of the energy"
    return {"places": _packed(places), "said": said}


_FITS: Mapping[str, Callable[[Transform, Numbers, str], Fitted]] = {
    "standardize": _fit_standardize,
    "pca": _fit_directions,
    "truncated_svd": _fit_directions,
    "fourier": _fit_places,
    "wavelet": _fit_places,
}


def _check_keep(one: Transform, keep: int, most: int, where: str, has: str) -> None:
    if keep > most:
        raise CorpusError(
            f"{where}.keep = {keep}",
            f"{one.name} has no more than {most:,} to keep",
            has,
            "keep fewer" if most else "give more documents",
        )


def _coefficients(one: Transform, values: Numbers) -> Numbers:
    """All coefficients of rows, [rows, coefficients]: along the one axis of a row of numbers, or
    along the first two of an image, [height, width, channels]."""
    axes = _axes(values)
    if one.name == "fourier":
        found = np.abs(np.fft.rfftn(values, axes=axes, norm="ortho"))
        return _flat(found)
    levels = one.levels or _most_levels(one, values)
    import pywt

    # Periodic edges: an orthogonal wavelet makes as many coefficients as there are numbers.
    parts = pywt.wavedecn(values, one.wavelet, "periodization", levels, axes)
    pieces = [parts[0], *(level[key] for level in parts[1:] for key in sorted(level))]
    return np.concatenate([_flat(piece) for piece in pieces], axis=1)


def _flat(values: Numbers) -> Numbers:
    """[rows, numbers], of none, too."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _axes(values: Numbers) -> tuple[int, ...]:
    return (1,) if values.ndim == 2 else (1, 2)


def _most_levels(one: Transform, values: Numbers) -> int:
    """How often rows can be parted by a wavelet; at least once."""
    require_package("pywt", "transforms", "wavelet transforms")
    import pywt

    shortest = min(values.shape[axis] for axis in _axes(values))
    return max(1, int(pywt.dwt_max_level(shortest, pywt.Wavelet(one.wavelet).dec_len)))


def _packed(values: npt.NDArray[Any]) -> dict[str, Any]:
    """An array as JSON has it: its shape, and its numbers as fp32 in base64."""
    content = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(content.shape), "fp32": base64.b64encode(content.tobytes()).decode()}


def _array(packed: Mapping[str, Any]) -> Numbers:
    """An array that was packed. Raises CorpusError: a manifest may come from anybody."""
    try:
        content = np.frombuffer(base64.b64decode(packed["fp32"], validate=True), "<f4")
        return content.reshape([int(size) for size in packed["shape"]]).astype(np.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise CorpusError(
            "what was fitted", f"has no array where one is wanted ({one_line(error)})"
        ) from error
