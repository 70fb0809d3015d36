"""Baselines that can be named: zero, mean, blur, a number, a file read like the input, ..."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..perturb.maskers import BY_FEATURE, MASKERS, Background, baseline
from .preprocessing import InputSpec, Preprocessing
from .sample import Sample, load_inputs
from .text import token_number

_CHANNELS = {"NCHW": 1, "NHWC": 3, "NCL": 1, "NLC": 2}
_BACKGROUND = "background:"
# Tokens that stand for a missing one, the best first.
_MASKS = ("[MASK]", "<mask>")


def channel_of(layout: str) -> int:
    """The axis of channels, the examples being on the first."""
    return _CHANNELS[layout]


def load_baselines(
    choice: str,
    sample: Sample,
    model_inputs: Sequence[InputSpec],
    preprocessing: Preprocessing,
    seed: int | None = None,
) -> Any:
    """What ``choice`` means for ``sample``, as ``attribute(baselines=...)`` takes it.

    zero: None. A number: that number. mean, blur, noise, gaussian-noise, segment-mean, inpaint: of
    the picture or series itself (see ``perturb.maskers``). mask: the number of the tokenizer's
    token for a missing word. background:FILE: the mean over the rows of a file. Anything else is a
    file, read and preprocessed like the input: one example for all, or one for each; text is cut or
    padded to the input's length.

    Named ones and files are dicts by input name. InputError where the input is no picture and no
    series, or no text.
    """
    if choice == "zero":
        return None
    with suppress(ValueError):
        number = float(choice)
        return int(number) if number.is_integer() else number  # token numbers are integers
    display = sample.display
    name = str(display.input_name)
    x = sample.arrays[name]
    if choice in MASKERS:
        if display.layout is None:
            raise InputError(
                f"--baseline {choice} is for pictures and series, and {name!r} is {display.kind}: "
                "give zero, a number, or a file such as the mean of the training rows"
            )
        if choice in BY_FEATURE:  # the method knows the features
            return {name: choice}
        return {name: baseline(choice, x, channel_of(display.layout), seed=seed, name=name)}
    if choice == "mask":
        if display.kind != "text":
            raise InputError(f"--baseline mask is for text, and {name!r} is {display.kind}")
        return {name: token_number(preprocessing, _MASKS)}
    if display.kind == "text":
        preprocessing = replace(preprocessing, length=x.shape[1])
    if choice.startswith(_BACKGROUND) and not Path(choice).exists():
        file = choice.removeprefix(_BACKGROUND)
        return Background(load_inputs([file], model_inputs, preprocessing).arrays)
    if display.kind != "text" and not Path(choice).suffix and not Path(choice).exists():
        words = ", ".join(["a number", *MASKERS, "mask", f"{_BACKGROUND}FILE"])
        raise InputError(f"--baseline {choice} is no file, and none of {words}")
    return load_inputs([choice], model_inputs, preprocessing).arrays
