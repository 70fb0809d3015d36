"""RISE: random masks, weighted by the scores that they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.blackbox import BlackBox
from onnxplain.errors import EvaluationError, InputError
from onnxplain.graph.emit import is_float
from onnxplain.methods.base import Question, flag
from onnxplain.methods.interpolate import MODES, check_mode, interpolate
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import (
    Baselines,
    Found,
    PerturbationAttribution,
    Plan,
    drawn_seed,
)
from onnxplain.methods.spatial import first_wider, image
from onnxplain.perturb.engine import check_tolerance
from onnxplain.perturb.features import Features
from onnxplain.perturb.forms import Sampler
from onnxplain.perturb.grid import Grid, Layout, MapMeans, Masks
from onnxplain.run.feeds import Arrays


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-scores)), without overflow."""
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * scores))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": sigmoid,
    "none": lambda scores: scores,
}
"""What is made of scores before they weigh masks."""


# Masks whose mean score is taken for the usual one.
_PILOT = 64


class RISE(PerturbationAttribution):
    """The mean of random masks, each weighted by the score of the input under it.

    A mask is a small grid of cells that are kept (1) or not (0), stretched linearly over the
    spatial axes and shifted by up to a cell; where it is not 1, the baseline is mixed in. Source:
    Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models",
    2018, arXiv:1806.07421, section 3; masks, sigmoid and the division by the number of masks (and
    not by ``p`` too) as in TorchRay. Unit: the sigmoid of the output.

    - Images and series have their channels where the operators around the input say. Inputs of
      integers (pixels of 0 to 255) get masks of 0 and 1: each place has that of its nearest cell.
    - Tables [N, columns] and token sequences [N, tokens]: each column or token is a cell by itself.
      A token that is not kept becomes the baseline, by default token 0: give the number of the mask
      or padding token.
    - Several inputs are masked together, each by a grid of its own.

    Args:
        model: an ox.Model or ox.BlackBox.
    """

    name = "rise"
    title = "RISE"
    paper = "Petsiuk et al. 2018, arXiv:1806.07421"
    needs = ("random",)
    check = "standard_error: of the map, as a share of what differs from its mean"
    every_output = True
    around = True
    choices: ClassVar = {"resize_mode": tuple(MODES), "activation": tuple(ACTIVATIONS)}

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        num_masks: int = 8000,
        num_cells: int | tuple[int, ...] = 7,
        filter_masks: np.ndarray | None = None,
        batch_size: int | None = None,
        p: float = 0.5,
        resize: bool | tuple[int, ...] = False,
        resize_mode: str = "bilinear",
        additional_forward_args: Arrays = None,
        show_progress: bool = False,
        *,
        baselines: Baselines = None,
        activation: str = "sigmoid",
        centered: bool = False,
        seed: int | None = None,
        tolerance: float | None = None,
        return_standard_error: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, baselines, target, additional_forward_args, show_progress: as
                :meth:`FeatureAblation.attribute`. All examples get the same masks.
            num_masks: how many masks, at most.
            num_cells: cells along each spatial axis; a tuple gives one number for each of them
                (channels have none), and stretches cells over tables and tokens too.
            filter_masks: masks to use instead, [num_masks, *spatial] or [num_masks, 1, *spatial],
                as they are: numbers, of which 1 keeps and 0 replaces. For one explained input.
            batch_size: the most masks in one run; None: as many as fit the memory. The result does
                not depend on it.
            p: the probability that a cell is kept, above 0 and at most 1.
            resize: True resizes maps to the input's size (which they have), a tuple (width, height)
                to that size.
            resize_mode: "bilinear", "bicubic", "nearest" or "area"; "linear" for series.
            activation: "sigmoid" as TorchRay, or "none": scores weigh masks as they are. Where
                nearly all masks leave a sigmoid or probability near 1, "none" tells more.
            centered: weigh masks by how far their score is from the mean score, so that the map
                shows where keeping raises or lowers it, and next to nothing of how often each place
                happened to be kept: the same map, less a constant, from far fewer masks.
            seed: the masks depend on it alone; None draws one.
            tolerance: stop an example when the standard errors of its map are, summed, at most this
                share of what differs from the map's mean.
            return_standard_error: return the standard errors too (of resized maps, at most so
                large).

        Returns:
            A map for each input in its layout: [N, 1, H, W], or [N, H, W, 1] where channels are
            last; [N, ...] where there is no channel axis. With target None and several output
            values, there are as many maps in the place of the channels. With
            ``return_standard_error``, a tuple of this and the errors.

        Raises:
            InputError: an option is out of range, or an input has no spatial axes, or more than
                two; EvaluationError: the model failed part-way.
        """
        return self._call(locals())

    def _attribute(
        self, question: Question, *, return_standard_error: bool = False, **options: Any
    ) -> Any:
        options["moments"] = return_standard_error
        return super()._attribute(question, return_standard_error=return_standard_error, **options)

    def _find(
        self,
        question: Question,
        num_masks: int,
        num_cells: int | tuple[int, ...],
        filter_masks: np.ndarray | None,
        batch_size: int | None,
        p: float,
        resize: bool | tuple[int, ...],
        resize_mode: str,
        baselines: Baselines,
        activation: str,
        centered: bool,
        seed: int | None,
        tolerance: float | None,
        show_progress: bool,
        moments: bool = False,
    ) -> Found:
        count = positive(num_masks, "num_masks")
        if batch_size is not None:
            positive(batch_size, "batch_size")
        if activation not in ACTIVATIONS:
            raise InputError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        number = isinstance(p, int | float | np.number) and not isinstance(p, bool)
        if not number or not 0 < p <= 1:
            raise InputError(f"p is a probability above 0 and at most 1, not {p!r}")
        tolerance, base = check_tolerance(tolerance), drawn_seed(seed)
        pilot = min(_PILOT, count) if flag("centered", centered) else 0
        shapes = self._shapes(question)
        layouts = {
            v.name or "": self._layout(v, shapes[v.name or ""][1:], num_cells, filter_masks is None)
            for v in question.wrt
        }
        sizes = {k: _sizes(v, resize, resize_mode) for k, v in layouts.items()}
        # Errors of all of many outputs would cost more than the maps: they are on demand.
        moments = moments or tolerance is not None or math.prod(question.shape) == 1
        moments |= question.indices is not None
        form: Grid | Masks
        sampler: Sampler
        if filter_masks is None:
            form, kept = Grid(layouts), np.asarray(p, np.float64)
            sampler = form.sampler(base, float(p))
        else:
            form, sampler = _given(filter_masks, layouts, count, question)
            kept = np.mean(filter_masks, axis=0, dtype=np.float64).ravel()

        def plan(features: Features) -> Plan:
            def means(game: Any) -> MapMeans:
                return MapMeans(form, ACTIVATIONS[activation], moments, pilot, kept)

            return Plan(form, sampler, count, means, tolerance=tolerance)

        try:
            found = self._evaluated(
                question,
                [_whole(shapes)],
                plan,
                baselines=baselines,
                at_most=batch_size,
                show_progress=show_progress,
                seed=base,
                by_feature=False,
            )
        except EvaluationError as error:
            if isinstance(error.partial, Found):
                error.partial = _placed(error.partial, layouts, sizes, resize_mode)
            raise
        return _placed(found, layouts, sizes, resize_mode)

    def _layout(
        self,
        value: ir.Value,
        shape: tuple[int, ...],
        num_cells: int | tuple[int, ...],
        stretched: bool,
    ) -> Layout:
        """How grids lie over an input."""
        stretch = MODES["linear" if is_float(value) else "nearest"][0]
        where = f"input '{value.name}' of shape [N, {', '.join(map(str, shape))}]"
        given = num_cells if isinstance(num_cells, tuple | list) else None
        axes, channels = self._spatial(value, shape, None if given is None else len(given), where)
        if not 1 <= len(axes) <= 2:
            raise InputError(
                f"{where} has {len(axes)} spatial axes to lay a mask over; RISE takes one or two: "
                "use feature-ablation or kernel-shap with a feature_mask"
            )
        if len(shape) == 1 and given is None:
            return Layout(shape, axes, None, stretch)
        cells = tuple(positive(n, "num_cells") for n in given or [num_cells] * len(axes))
        if len(cells) != len(axes):
            raise InputError(
                f"num_cells={num_cells!r}: {where} has {len(axes)} spatial axes; give one number "
                "for each of them"
            )
        for axis, n in zip(axes, cells, strict=True):
            if n > shape[axis] and stretched:
                raise InputError(
                    f"num_cells={num_cells!r}: {where} has {shape[axis]} places along an axis, too "
                    f"few for {n} cells; give fewer, or a tuple with one number for each spatial "
                    "axis"
                )
        return Layout(shape, axes, cells, stretch, channels)

    def _spatial(
        self, value: ir.Value, shape: tuple[int, ...], wanted: int | None, where: str
    ) -> tuple[tuple[int, ...], int | None]:
        """The spatial axes of an input, of which the user may say the number, and its channels."""
        every = tuple(range(len(shape)))
        if len(shape) <= 1 or wanted == len(shape):
            return every, None
        model: Any = self.model
        if isinstance(model, BlackBox):
            if len(shape) == 2 and wanted is None:
                raise InputError(
                    f"{where}: which of its axes are places can't be told of a function; give "
                    "num_cells as a tuple: (7,) for a series with channels, (7, 7) for an image "
                    "without"
                )
            seen = image(value, value, shape, integers=True)
        else:
            seen = image(value, first_wider(model, value), shape, integers=True)
        assert seen is not None
        single = [a for a in every if shape[a] == 1]
        channels = None if seen.channels is None else seen.channels - 1
        if channels is None and len(single) == 1:
            channels = single[0]
        spatial = tuple(a for a in every if a != channels)
        # There is nothing to tell apart along an axis of one place.
        return tuple(a for a in spatial if shape[a] > 1) or spatial, channels

    def _shaped(self, question: Question, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Maps that are in their places, of the dtype of each source."""
        wide = (ir.DataType.DOUBLE,)
        return [
            array.astype(np.float64 if value.dtype in wide else np.float32)
            for array, value in zip(arrays, question.wrt, strict=True)
        ]


def _whole(shapes: Mapping[str, tuple[int, ...]]) -> Features:
    """All examples in one group, each input one feature: masks know of no features."""
    ids = {k: np.zeros((1,) * len(shape), np.int64) for k, shape in shapes.items()}
    count = next(iter(shapes.values()))[0]
    return Features(shapes, ids, 1, np.zeros((1, 1), np.int64), np.arange(count))


def _given(
    filter_masks: Any, layouts: Mapping[str, Layout], count: int, question: Question
) -> tuple[Masks, Sampler]:
    """The form and the samples of the user's own masks."""
    if len(layouts) > 1:
        raise InputError(
            f"filter_masks is for one explained input, and there are {len(layouts)} "
            f"({', '.join(layouts)}); pass the others in additional_forward_args"
        )
    ((name, layout),) = layouts.items()
    masks = np.asarray(filter_masks)
    sizes = layout.sizes
    fits = masks.shape[1:] in (sizes, (1, *sizes), layout.spread)
    if not fits or masks.dtype.kind not in "fiub" or not np.isfinite(masks).all():
        raise InputError(
            f"filter_masks: {masks.dtype} {list(masks.shape)} was given for '{name}'; give finite "
            f"numbers, [num_masks, {', '.join(map(str, sizes))}]"
        )
    if len(masks) != count:
        raise InputError(f"filter_masks holds {len(masks)} masks: give num_masks={len(masks)} too")
    if not is_float(question.wrt[0]) and not np.isin(masks, (0, 1)).all():
        raise InputError(f"filter_masks: '{name}' holds integers, which are kept (1) or not (0)")
    flat = masks.reshape(count, *sizes)
    return Masks(layout), lambda piece: {"mask": flat[piece].astype(np.float32)}


def _sizes(layout: Layout, resize: Any, mode: str) -> tuple[int, ...] | None:
    """The size that maps are resized to; None where they stay as they are.

    Raises:
        InputError: no size of such a map, or a mode that does not fit it.
    """
    axes = len(layout.axes)
    wanted = isinstance(resize, tuple | list)
    check_mode(mode, axes if wanted else None, "resize_mode")
    if isinstance(resize, bool | np.bool_):
        return None
    found = tuple(resize)[::-1] if wanted else ()
    whole = all(isinstance(s, int | np.integer) and s > 0 for s in found)
    if len(found) != axes or not whole or len(layout.shape) == 1:
        raise InputError(
            f"resize={resize!r} is no size of a map with {axes} spatial axes: give True, False or "
            "positive integers, (width, height)"
        )
    return found


def _placed(
    found: Found,
    layouts: Mapping[str, Layout],
    sizes: Mapping[str, tuple[int, ...] | None],
    mode: str,
) -> Found:
    """Means [N, K, places of all inputs] as maps in the layouts of the inputs."""
    for kind in (found.values, found.errors):
        if not kind:
            continue
        (whole,) = kind
        ends = np.cumsum([math.prod(v.sizes) for v in layouts.values()])[:-1]
        parts = np.split(whole, ends, axis=2)
        kind[:] = [
            _map(part, layout, sizes[name], mode)
            for (name, layout), part in zip(layouts.items(), parts, strict=True)
        ]
    return found


def _map(means: np.ndarray, layout: Layout, sizes: tuple[int, ...] | None, mode: str) -> np.ndarray:
    """Means [N, K, places] as [N, K, *spatial], the K where the input has its channels."""
    maps = means.reshape(*means.shape[:2], *layout.sizes)
    if sizes is not None:
        maps = interpolate(maps, sizes, mode)
    at = dict(zip(layout.axes, maps.shape[2:], strict=True))
    places = [at.get(axis, 1) for axis in range(len(layout.shape)) if axis != layout.channels]
    maps = maps.reshape(*maps.shape[:2], *places)
    if layout.channels is not None:
        return np.moveaxis(maps, 1, 1 + layout.channels)
    return maps[:, 0] if maps.shape[1] == 1 else maps
