"""What is switched on and off together, where the user does not say: segments, tokens, windows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..perturb.segments import SEGMENTATIONS, Segmentation, as_picture, segmentation, segments_of
from .baselines import channel_of
from .files import read_npy
from .sample import Sample

# How each algorithm is told the number of segments, where it can be.
_COUNTS = {"slic": "n_segments", "watershed": "markers"}
# A window's side is the shorter side of the picture over this, 16 of 224.
_WINDOWS = 14


def load_segmentation(choice: str) -> Segmentation:
    """What ``NAME``, ``NAME:N`` (about N segments) or a ``.npy`` file of segment numbers means.

    ``grid:N`` divides the picture into N x N rectangles.

    Raises FileFormatError, or InputError for an unknown name or a number that means nothing to it.
    """
    name, colon, count = choice.partition(":")
    if name not in (*SEGMENTATIONS, "grid"):
        if choice.endswith(".npy"):
            return read_npy(Path(choice))
        raise InputError(
            f"--segments {choice}: give {', '.join(SEGMENTATIONS)}, grid:N, or a .npy file with "
            "the segment number of each pixel"
        )
    if not colon and name != "grid":
        return segmentation(name)
    if name not in (*_COUNTS, "grid") or not count.isdecimal() or int(count) < 2:
        raise InputError(
            f"--segments {choice}: a number (2 or more) is for {', '.join(_COUNTS)} and grid; "
            "leave it out, or divide the picture yourself (a .npy file)"
        )
    if name == "grid":
        return partial(_grid, int(count))
    return segmentation(name, **{_COUNTS[name]: int(count)})


def _grid(count: int, picture: np.ndarray) -> np.ndarray:
    rows, columns = (np.arange(size) * count // size for size in picture.shape[:2])
    return np.asarray(rows[:, None] * count + columns)


def load_segments(choice: str, sample: Sample) -> dict[str, np.ndarray]:
    """The segment of each pixel of each picture, int64, by input name: a ``feature_mask``.

    ``choice``: see ``load_segmentation``; a file holds [H, W], or [N, H, W] for each picture its
    own. The result has length 1 along the channels. InputError where the input is no picture.
    """
    display = sample.display
    name = str(display.input_name)
    x = sample.arrays[name]
    if display.kind != "image" or display.layout is None:
        raise InputError(
            f"--segments {choice}: input {name!r} takes {display.kind}, and only pictures have "
            "segments; number its features with --option feature_mask=FILE.npy"
        )
    channel = channel_of(display.layout)
    how = load_segmentation(choice)
    own = isinstance(how, np.ndarray) and how.ndim == 3
    if own and len(how) != len(x):  # type: ignore[arg-type]
        raise InputError(f"--segments {choice}: {len(how)} divisions of {len(x)} picture(s)")  # type: ignore[arg-type]
    pictures = display.images if display.images is not None else np.moveaxis(x, channel, -1)
    found = [
        segments_of(as_picture(picture), how[i] if own else how)  # type: ignore[index]
        for i, picture in enumerate(pictures)
    ]
    return {name: np.expand_dims(np.stack(found), channel)}


def token_features(sample: Sample) -> dict[str, np.ndarray] | None:
    """A feature for each token, and one for all padding of a text, int64 [N, T].

    None where there is no padding: each token is a feature of its own then anyway.
    """
    name, tokens = str(sample.display.input_name), sample.display.tokens
    x = sample.arrays[name]
    if tokens is None or x.ndim != 2 or all(len(row) >= x.shape[1] for row in tokens):
        return None
    lengths = np.array([[len(row)] for row in tokens])
    return {name: np.minimum(np.arange(x.shape[1]), lengths)}


def default_windows(
    sample: Sample, explained: list[str]
) -> tuple[tuple[int, ...] | tuple[tuple[int, ...], ...], Any]:
    """Window and stride for occlusion: squares over all channels, half of which overlap.

    Their side is a 14th of the picture's shorter side, or of a series (2 at least); elsewhere a
    window is one value. A tuple of these where several inputs are explained.
    """
    sizes = list(map(partial(_window, sample), explained))
    shapes, strides = (tuple(parts) for parts in zip(*sizes, strict=True))
    return (shapes, strides) if len(explained) > 1 else (shapes[0], strides[0])


def _window(sample: Sample, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, display = sample.arrays[name].shape[1:], sample.display
    if name != display.input_name or display.layout is None:
        return (1,) * len(shape), (1,) * len(shape)
    channel = channel_of(display.layout) - 1
    places = [size for axis, size in enumerate(shape) if axis != channel]
    side = min(max(min(places) // _WINDOWS, 2), *places)
    window = tuple(size if axis == channel else side for axis, size in enumerate(shape))
    stride = tuple(
        size if axis == channel else max(side // 2, 1) for axis, size in enumerate(shape)
    )
    return window, stride
