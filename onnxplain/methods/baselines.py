"""What an input is compared with: a baseline, or a distribution of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxplain.errors import InputError
from onnxplain.model import Model
from onnxplain.run.feeds import Feeds, by_name, check_array


def named_baselines(model: Model, feeds: Feeds, baselines: Any) -> dict[str, np.ndarray]:
    """Baselines of the explained inputs, each with first dimension 1 or N.

    Args:
        model: the model.
        feeds: its checked inputs.
        baselines: None (zeros), a number, an array, or a tuple or dict of these.

    Raises:
        InputError: a baseline doesn't fit its input.
    """
    found = _arrays(model, feeds, baselines)
    for name, array in found.items():
        x = feeds.arrays[name]
        if array.shape[1:] != x.shape[1:] or array.shape[0] not in (1, len(x)):
            raise InputError(
                f"baseline of '{name}': shape {list(array.shape)} was given for an input of shape "
                f"{list(x.shape)}; give that shape, the same with first dimension 1, or a number"
            )
    return found


def distributions(model: Model, feeds: Feeds, baselines: Any) -> dict[str, np.ndarray]:
    """Baselines to draw from or to average over, [B, ...] for each explained input.

    Args:
        model: the model.
        feeds: its checked inputs.
        baselines: an array, or a tuple or dict of these; the first dimension counts baselines.

    Raises:
        InputError: missing, only one, another number for each input, or of another shape.
    """
    if baselines is None:
        raise InputError(
            "no baselines were given (baselines=): this method averages over a distribution of "
            "them; give two or more examples of the input's shape, such as rows of training data"
        )
    found = _arrays(model, feeds, baselines)
    counts = {name: len(array) for name, array in found.items()}
    for name, array in found.items():
        x = feeds.arrays[name]
        if array.shape[1:] != x.shape[1:]:
            raise InputError(
                f"baselines of '{name}': shape {list(array.shape)} was given for an input of shape "
                f"{list(x.shape)}; give [number of baselines, {', '.join(map(str, x.shape[1:]))}]"
            )
        if len(array) < 2:
            raise InputError(
                f"baselines of '{name}': one baseline is no distribution; give at least two, or "
                "use a method with a single baseline (integrated-gradients, deep-lift)"
            )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{k}': {v}" for k, v in counts.items())
        raise InputError(
            f"the inputs have different numbers of baselines ({listed}); give as many for each, "
            "the first of one belonging to the first of the other"
        )
    return found


def _arrays(model: Model, feeds: Feeds, baselines: Any) -> dict[str, np.ndarray]:
    """What was given for each explained input, examples first, of the input's dtype."""
    names = list(feeds.explained)
    given: Mapping[str, Any] = {}
    if isinstance(baselines, Mapping | tuple):
        given, _ = by_name(baselines, names, "baselines")
    elif baselines is not None:
        if np.ndim(baselines) == 0:
            given = dict.fromkeys(names, baselines)
        elif len(names) == 1:
            given = {names[0]: baselines}
        else:
            raise InputError(
                f"one array can't be the baseline of {len(names)} inputs ({', '.join(names)}); "
                "give a number, or a tuple or dict with one for each"
            )
    values = {v.name: v for v in model.graph.graph.inputs}
    found = {}
    for name in names:
        if model.axes[name] is None:
            raise InputError(
                f"input '{name}' is shared by all examples (examples_axis), so a path of each "
                "example's own can't lead to it; pass it in additional_forward_args"
            )
        x, baseline = feeds.arrays[name], given.get(name)
        if baseline is None or np.ndim(baseline) == 0:
            array = np.full((1, *x.shape[1:]), 0 if baseline is None else baseline)
        else:
            array = np.asarray(baseline)
            if array.shape == x.shape[1:]:
                array = array[None]
            elif array.ndim == x.ndim:
                array = np.moveaxis(array, model.axes[name] or 0, 0)
        found[name] = check_array(values[name], array, 0, "baseline of")
    return found
