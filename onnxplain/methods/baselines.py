"""What an input is compared with: a baseline, or a distribution of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.blackbox import BlackBox
from onnxplain.errors import InputError
from onnxplain.methods.spatial import image
from onnxplain.model import Model
from onnxplain.perturb import maskers
from onnxplain.perturb.features import Features
from onnxplain.run.feeds import Feeds, by_name, check_array


def named_baselines(
    model: Model | BlackBox,
    feeds: Feeds,
    baselines: Any,
    features: Sequence[Features] = (),
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    """Baselines of the explained inputs, each with first dimension 1 or N.

    Args:
        model: the model.
        feeds: its checked inputs.
        baselines: None (zeros), a number, the name of a masker ("blur", see ``perturb.maskers``),
            an array, or a tuple or dict of these.
        features: of all examples, in groups, for maskers that fill in features.
        seed: for maskers that draw.

    Raises:
        InputError: a baseline doesn't fit its input.
    """
    found = _arrays(model, feeds, baselines, named=True, features=features, seed=seed)
    for name, array in found.items():
        x = feeds.arrays[name]
        if array.shape[1:] != x.shape[1:] or array.shape[0] not in (1, len(x)):
            raise InputError(
                f"baseline of '{name}': shape {list(array.shape)} was given for an input of shape "
                f"{list(x.shape)}; give that shape, the same with first dimension 1, or a number"
            )
    return found


def masked_baselines(
    model: Model | BlackBox,
    feeds: Feeds,
    baselines: Any,
    features: Sequence[Features] = (),
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    """What switched-off features of the explained inputs have in their place.

    Args:
        model, feeds, features, seed: see :func:`named_baselines`.
        baselines: as there, or ``Background(rows)``.

    Returns:
        [B, 1|N, ...] for each explained input: scores are averaged over the B, of which there is
        one but for ``Background(rows)``.

    Raises:
        InputError: a baseline doesn't fit its input.
    """
    if not isinstance(baselines, maskers.Background):
        found = named_baselines(model, feeds, baselines, features, seed)
        return {name: array[None] for name, array in found.items()}
    rows = _arrays(model, feeds, baselines.rows)
    for name, array in rows.items():
        x = feeds.arrays[name]
        if array.shape[1:] != x.shape[1:] or not len(array):
            raise InputError(
                f"background of '{name}': shape {list(array.shape)} was given for an input of "
                f"shape {list(x.shape)}; give [rows, {', '.join(map(str, x.shape[1:]))}]"
            )
    if len({len(array) for array in rows.values()}) > 1:
        listed = ", ".join(f"'{k}': {len(v)}" for k, v in rows.items())
        raise InputError(
            f"the inputs have different numbers of background rows ({listed}); give as many for "
            "each, the first of one belonging to the first of the other"
        )
    return {name: array[:, None] for name, array in rows.items()}


def channel_axis(model: Model | BlackBox, name: str, x: np.ndarray) -> int | None:
    """Which axis of an input [N, ...] of three or more holds its channels; None: none of them.

    Of a model, the operators around it tell; else an axis of 1, 3 or 4, and last the second.

    Raises:
        InputError: a function's input of three axes, where it can't be told.
    """
    value = None
    if isinstance(model, Model):
        (value,) = (v for v in model.graph.graph.inputs if v.name == name)
    if value is not None and (found := image(value, value, x.shape[1:])) is not None:
        return found.channels
    if value is None and x.ndim == 3:
        raise InputError(
            f"input '{name}' of shape {list(x.shape)}: which of its axes are places can't be told "
            "of a function; make the baseline an array (see onnxplain.perturb.maskers)"
        )
    last, second = (x.shape[axis] in (1, 3, 4) for axis in (-1, 1))
    return x.ndim - 1 if last and not second else 1


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
                "use a method with a single baseline (integrated-gradients, kernel-shap)"
            )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{k}': {v}" for k, v in counts.items())
        raise InputError(
            f"the inputs have different numbers of baselines ({listed}); give as many for each, "
            "the first of one belonging to the first of the other"
        )
    return found


def _arrays(
    model: Model | BlackBox,
    feeds: Feeds,
    baselines: Any,
    *,
    named: bool = False,
    features: Sequence[Features] = (),
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    """What was given for each explained input, examples first, of the input's dtype.

    ``named``: whether names of maskers are understood.
    """
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
    found = {}
    for name in names:
        if model.axes[name] is None:
            raise InputError(
                f"input '{name}' is shared by all examples (examples_axis), so a path of each "
                "example's own can't lead to it; pass it in additional_forward_args"
            )
        x, baseline = feeds.arrays[name], given.get(name)
        if isinstance(baseline, str) and x.dtype.kind != "O":
            if not named:
                raise InputError(
                    f"baselines of '{name}': '{baseline}' is one baseline for each example; rows "
                    "of them are wanted here, such as those of a data set"
                )
            channel = None if x.ndim < 3 else channel_axis(model, name, x)
            found[name] = _masked(baseline, name, x, channel, features, seed)
            continue
        if baseline is None or np.ndim(baseline) == 0:
            array = np.full((1, *x.shape[1:]), 0 if baseline is None else baseline)
        else:
            array = np.asarray(baseline)
            if array.shape == x.shape[1:]:
                array = array[None]
            elif array.ndim == x.ndim:
                array = np.moveaxis(array, model.axes[name] or 0, 0)
        found[name] = check_array(_value(model, name, x), array, 0, "baseline of")
    return found


def _masked(
    kind: str,
    name: str,
    x: np.ndarray,
    channel: int | None,
    features: Sequence[Features],
    seed: int | None,
) -> np.ndarray:
    """The array of a masker."""
    if not features or kind not in maskers.BY_FEATURE:
        return maskers.baseline(kind, x, channel, seed=seed, name=name)
    filled = np.empty_like(x)
    for group in features:
        rows, ids = group.examples, group.ids[name]
        filled[rows] = maskers.baseline(kind, x[rows], channel, ids=ids, name=name)
    return filled


def _value(model: Model | BlackBox, name: str, x: np.ndarray) -> ir.Value:
    """What is known of an input: the model's word, or what a function is fed."""
    if isinstance(model, BlackBox):
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(x.dtype)))
    return next(v for v in model.graph.graph.inputs if v.name == name)
