"""Pictures divided into segments, by scikit-image or a function of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onnxplain.errors import InputError, failing

Segmenter = Callable[[np.ndarray], np.ndarray]
"""Takes a picture [H, W, 3] and returns a segment number for each pixel, [H, W]."""

Segmentation = str | Segmenter | np.ndarray
"""The name of an algorithm, a function, or the segments themselves."""

# Side of the square pictures for which the sizes below are meant; smaller ones get smaller ones.
_USUAL = 224


def _quickshift(share: float) -> dict[str, Any]:
    return {"kernel_size": max(4 * share, 1), "max_dist": 200 * share, "ratio": 0.2}


def _slic(share: float) -> dict[str, Any]:
    return {"n_segments": max(round(100 * share), 8), "compactness": 10, "start_label": 0}


def _felzenszwalb(share: float) -> dict[str, Any]:
    return {"scale": 100, "sigma": 0.5 * share, "min_size": max(round(50 * share**2), 1)}


def _watershed(share: float) -> dict[str, Any]:
    return {"markers": max(round(100 * share), 8), "compactness": 0.001}


_DEFAULTS = {
    "quickshift": _quickshift,
    "slic": _slic,
    "felzenszwalb": _felzenszwalb,
    "watershed": _watershed,
}
SEGMENTATIONS = tuple(_DEFAULTS)


def segmentation(name: str, **options: Any) -> Segmenter:
    """An algorithm of scikit-image as a function of pictures.

    Defaults: quickshift as the lime package has it (kernel_size 4, max_dist 200, ratio 0.2), slic
    with 100 segments, felzenszwalb with scale 100, watershed of the Sobel gradient with 100
    markers. Where the picture is smaller than 224 x 224, lengths and numbers of segments are in
    proportion to its side.

    Args:
        name: "quickshift", "slic", "felzenszwalb" or "watershed".
        options: parameters of the algorithm, in place of the defaults.

    Raises:
        InputError: there is no such algorithm; when called, that it refuses options or picture.
    """
    if not isinstance(name, str) or name not in _DEFAULTS:
        raise InputError(
            f"segmentation is one of {', '.join(_DEFAULTS)}, a function of the picture, or the "
            f"segments [H, W], not {name!r}"
        )

    def divide(picture: np.ndarray) -> np.ndarray:
        from skimage import color, filters
        from skimage import segmentation as algorithms

        sobel: Any = filters.sobel  # scikit-image has no types
        share = min(math.sqrt(picture.shape[0] * picture.shape[1]) / _USUAL, 1.0)
        given = {**_DEFAULTS[name](share), **options}
        source = sobel(color.rgb2gray(picture)) if name == "watershed" else picture
        try:
            return np.asarray(getattr(algorithms, name)(source, **given))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"segmentation {name!r} of a picture of shape {list(picture.shape)} with {given}: "
                f"{error}"
            ) from error

    return divide


def segments_of(picture: np.ndarray, how: Segmentation) -> np.ndarray:
    """The segment of each pixel, int64 [H, W], numbered from 0 without gaps in the given order.

    Args:
        picture: [H, W, 3].
        how: the name of an algorithm, a function, or the segments [H, W] themselves.

    Raises:
        InputError: wrong shape or dtype, or a single segment.
    """
    if isinstance(how, str):
        how = segmentation(how)
    with failing("segmentation"):
        found = np.asarray(how(picture) if callable(how) else how)
    if found.shape != picture.shape[:2]:
        raise InputError(
            f"the segmentation has shape {list(found.shape)}, but the picture has "
            f"{picture.shape[0]} x {picture.shape[1]} pixels: return one segment number for each"
        )
    if found.dtype.kind not in "iub":
        raise InputError(
            f"the segmentation holds {found.dtype}, not segment numbers: make them integers"
        )
    labels, numbers = np.unique(found, return_inverse=True)
    if len(labels) < 2:
        raise InputError(
            f"the segmentation of the picture of {picture.shape[0]} x {picture.shape[1]} pixels "
            "has a single segment, so there is nothing to compare: take another algorithm "
            "(segmentation='slic'), or a finer one (segmentation('quickshift', kernel_size=1))"
        )
    return numbers.reshape(found.shape).astype(np.int64)


def segment_means(image: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The image [H, W, C] with each segment in its mean color, of the image's dtype."""
    flat = segments.ravel()
    sums = [np.bincount(flat, channel) for channel in image.reshape(flat.size, -1).T]
    means = np.stack(sums, axis=1) / np.bincount(flat)[:, None]
    return means[segments].astype(image.dtype)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An image [H, W] or [H, W, C] as [H, W, 3]; its mean channel thrice where C is not 3."""
    if image.ndim == 3 and image.shape[2] == 3:
        return image
    if image.ndim == 3:
        image = image[:, :, 0] if image.shape[2] == 1 else image.mean(axis=2)
    return np.repeat(image[:, :, None], 3, axis=2)


def as_picture(values: np.ndarray) -> np.ndarray:
    """What a model is fed [H, W, C] as a picture to divide: RGB float64 in 0..1.

    Values in 0..1 are taken as they are, others stretched to that range.
    """
    rgb = as_rgb(values.astype(np.float64))
    low, high = rgb.min(), rgb.max()
    if (low >= 0 and high <= 1) or low == high:
        return rgb.clip(0, 1)
    return (rgb - low) / (high - low)
