"""Baselines that can be named: zero, mean, blur, a number, or a file read like the input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from .preprocessing import InputSpec, Preprocessing
from .sample import Sample, load_inputs

_CHANNELS = {"NCHW": 1, "NHWC": 3, "NCL": 1, "NLC": 2}
BLUR = 10  # the blur's standard deviation is the shorter side over this


def load_baselines(
    choice: str, sample: Sample, model_inputs: Sequence[InputSpec], preprocessing: Preprocessing
) -> Any:
    """What ``choice`` means for ``sample``, as ``attribute(baselines=...)`` takes it.

    zero: None. A number: that number. mean: each channel's own mean over the picture or series.
    blur: the picture under a Gaussian with standard deviation (shorter side) / 10. Anything else
    is a file, read and preprocessed like the input: one example for all, or one for each; text is
    cut or padded to the input's length.

    The last three are dicts of arrays by input name. InputError where the input has no channels to
    average, or no pixels to blur.
    """
    if choice == "zero":
        return None
    with suppress(ValueError):
        number = float(choice)
        return int(number) if number.is_integer() else number  # token numbers are integers
    display = sample.display
    name = str(display.input_name)
    x = sample.arrays[name]
    if choice not in ("mean", "blur"):
        if display.kind == "text":
            preprocessing = replace(preprocessing, length=x.shape[1])
        return load_inputs([choice], model_inputs, preprocessing).arrays
    if display.layout is None or (choice == "blur" and display.kind != "image"):
        raise InputError(
            f"--baseline {choice} is for "
            f"{'pictures' if choice == 'blur' else 'pictures and series'}, and {name!r} is "
            f"{display.kind}: give zero, a number, or a file such as the mean of the training rows"
        )
    channel = _CHANNELS[display.layout]
    places = tuple(axis for axis in range(1, x.ndim) if axis != channel)
    if choice == "mean":
        average = x.mean(axis=places, keepdims=True, dtype=np.float64)
        return {name: np.broadcast_to(average, x.shape).astype(x.dtype)}
    from skimage import filters

    gaussian: Any = filters.gaussian  # scikit-image has no types
    sigma = min(x.shape[axis] for axis in places) / BLUR
    widths = [sigma if axis in places else 0 for axis in range(x.ndim)]
    return {name: gaussian(x, sigma=widths, preserve_range=True).astype(x.dtype)}
