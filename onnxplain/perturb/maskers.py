"""What "off" means: the values that take the place of a feature's own.

A masker gives an array of the input's shape; a switched-off feature gets its part of it. Where the
values follow from the example (blur, mean, inpainting), each example has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxplain.errors import InputError

# The standard deviation of a blur is the shorter side over this.
BLUR = 10

MASKERS = {
    "zero": "0",
    "mean": "each channel's own mean",
    "blur": f"a Gaussian blur, its standard deviation the shorter side / {BLUR}",
    "noise": "uniform noise over each channel's own range",
    "gaussian-noise": "normal noise of each channel's own mean and standard deviation",
    "segment-mean": "the mean of each feature's region, by channel",
    "inpaint": "each feature's region filled in from what surrounds it",
}
"""Every masker that has a name, and what it gives."""
BY_FEATURE = ("segment-mean", "inpaint")
# Inpainting solves a system of equations for each feature.
_MOST_INPAINTED = 4096


@dataclass(frozen=True)
class Background:
    """Rows of a data set that take the place of what is off; scores are averaged over them.

    rows: [B, ...] of the explained input; a tuple or dict of these where there are several inputs,
        the first row of one belonging to the first of the other.
    """

    rows: Any


def baseline(
    kind: str,
    x: np.ndarray,
    channel: int | None = None,
    *,
    ids: np.ndarray | None = None,
    seed: int | None = None,
    name: str = "input",
) -> np.ndarray:
    """The values of a masker by its name.

    Args:
        kind: one of ``MASKERS``.
        x: [N, ...], the input.
        channel: its axis of channels; None where it has none. All others but the first are places.
        ids: the features of its elements, [1|N, ...] of the same shape; for "segment-mean" and
            "inpaint".
        seed: for noise; None: 0, so that the same input always gets the same.
        name: what the input is called in errors.

    Returns:
        [1|N, ...] of the dtype of ``x`` (rounded where that is an integer).

    Raises:
        InputError: there is no such masker, or it makes no sense for such an input.
    """
    if kind not in MASKERS:
        known = ", ".join(MASKERS)
        raise InputError(
            f"there is no baseline '{kind}'; the named ones are {known}, besides numbers, arrays "
            "and Background(rows)"
        )
    if kind == "zero":
        return np.zeros((1, *x.shape[1:]), x.dtype)
    places = [axis for axis in range(1, x.ndim) if axis != channel]
    if x.ndim < 3 or x.dtype.kind not in "fiu":
        raise InputError(
            f"baseline '{kind}' is made of values that lie side by side, and input '{name}' of "
            f"shape {list(x.shape)} ({x.dtype}) is no picture and no series: give a number, such "
            "as the token of padding, an array such as the mean of the training rows, or "
            "Background(rows)"
        )
    if kind not in BY_FEATURE:
        return _like(x, _BY_CHANNEL[kind](x.astype(np.float64), places, seed or 0))
    if ids is None:
        raise InputError(
            f"baseline '{kind}' is made feature by feature, and this method has no feature mask: "
            "take mean or blur"
        )
    fill = segment_mean if kind == "segment-mean" else inpaint
    if not np.ptp(ids):
        raise InputError(
            f"baseline '{kind}': input '{name}' is one feature as a whole; give a feature_mask "
            "(segments), or take blur"
        )
    return _like(x, fill(x.astype(np.float64), channel, np.broadcast_to(ids, x.shape), name))


def channel_mean(x: np.ndarray, places: Sequence[int], seed: int = 0) -> np.ndarray:
    """Each channel's mean over all places, of the shape of ``x``."""
    return np.broadcast_to(x.mean(axis=tuple(places), keepdims=True), x.shape)


def blur(
    x: np.ndarray, places: Sequence[int], seed: int = 0, *, sigma: float | None = None
) -> np.ndarray:
    """``x`` under a Gaussian along its places; ``sigma`` in places, default shorter side / 10."""
    from skimage import filters

    gaussian: Any = filters.gaussian  # scikit-image has no types
    width = min(x.shape[axis] for axis in places) / BLUR if sigma is None else sigma
    widths = [width if axis in places else 0 for axis in range(x.ndim)]
    return np.asarray(gaussian(x, sigma=widths, preserve_range=True))


def uniform_noise(x: np.ndarray, places: Sequence[int], seed: int = 0) -> np.ndarray:
    """Noise between each channel's least and largest value; the same draws for every example."""
    low, high = (f(axis=tuple(places), keepdims=True) for f in (x.min, x.max))
    return np.asarray(low + (high - low) * np.random.default_rng(seed).random((1, *x.shape[1:])))


def gaussian_noise(x: np.ndarray, places: Sequence[int], seed: int = 0) -> np.ndarray:
    """Noise of each channel's mean and standard deviation; the same draws for every example."""
    mean, deviation = (f(axis=tuple(places), keepdims=True) for f in (x.mean, x.std))
    draws = np.random.default_rng(seed).standard_normal((1, *x.shape[1:]))
    return np.asarray(mean + deviation * draws)


_BY_CHANNEL = {
    "mean": channel_mean,
    "blur": blur,
    "noise": uniform_noise,
    "gaussian-noise": gaussian_noise,
}


def segment_mean(
    x: np.ndarray, channel: int | None, ids: np.ndarray, name: str = "input"
) -> np.ndarray:
    """The mean of each feature's region, for each channel by itself (LIME's ``hide_color=None``).

    Raises:
        InputError: no feature has more than one place, so every mean is the value itself.
    """
    count = 1 if channel is None else x.shape[channel]
    at = np.zeros((), np.int64)
    if channel is not None:
        at = np.arange(count).reshape([-1 if a == channel else 1 for a in range(1, x.ndim)])
    means = np.empty_like(x)
    for mean, row, features in zip(means, x, ids, strict=True):
        groups = ((features - ids.min()) * count + at).ravel()
        sizes = np.maximum(np.bincount(groups), 1)
        mean[:] = (np.bincount(groups, row.ravel()) / sizes)[groups].reshape(row.shape)
    if np.array_equal(means, x):
        raise InputError(
            f"baseline 'segment-mean': the mean of each feature of input '{name}' is its own value;"
            " give a feature_mask of larger regions (segments), or take mean or blur"
        )
    return means


def inpaint(x: np.ndarray, channel: int | None, ids: np.ndarray, name: str = "input") -> np.ndarray:
    """Each feature's region filled in from what surrounds it, by biharmonic equations.

    A region sees its surroundings as they are in the input, be they on or off in a sample; that
    keeps it one array an example. A feature of a channel alone is filled in within that channel.

    Raises:
        InputError: a feature has all of a channel, so nothing surrounds it; or there are too many
            features to fill in one by one.
    """
    if (count := len(np.unique(ids))) > _MOST_INPAINTED:
        raise InputError(
            f"baseline 'inpaint': {count} features of input '{name}' would be filled in one by one;"
            " give a feature_mask of larger regions (segments), or take mean or blur"
        )
    from skimage import restoration

    fill: Any = restoration.inpaint_biharmonic
    filled = np.empty_like(x)
    for out, row, features in zip(filled, x, ids, strict=True):
        if channel is None:
            out, row, features = out[..., None], row[..., None], features[..., None]
        else:
            out, row, features = (np.moveaxis(a, channel - 1, -1) for a in (out, row, features))
        alike = (features == features[..., :1]).all()
        for planes in [slice(None)] if alike else [slice(c, c + 1) for c in range(row.shape[-1])]:
            regions, known = features[..., planes][..., 0], row[..., planes]
            for feature in np.unique(regions):
                mask = regions == feature
                if mask.all():
                    raise InputError(
                        f"baseline 'inpaint': feature {feature} of input '{name}' has all of a "
                        "channel, so nothing surrounds it; give a feature_mask of smaller regions "
                        "(segments)"
                    )
                out[..., planes][mask] = fill(known, mask, channel_axis=-1)[mask]
    return filled


def _like(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values in the dtype of ``x``."""
    if x.dtype.kind in "iu":
        info = np.iinfo(x.dtype)
        values = np.clip(np.rint(values), info.min, info.max)
    return values.astype(x.dtype)
