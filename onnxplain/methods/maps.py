"""Saliency maps: what comes back to a place of an image or a layer, as one number.

Every map of TorchRay is data here: the rules of the way back, and the number made of a place's
channels. Resizing and smoothing are one matrix an axis, in the same graph. The recipes of the
CNN visualization collections are the same gradients as pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError
from onnxplain.graph.emit import Emitter, dims, rank
from onnxplain.graph.grad import backward
from onnxplain.methods.base import Attribution, Layers, Question
from onnxplain.methods.interpolate import MODES, check_mode, emit_along, matrices, smoothing
from onnxplain.methods.modified import ModifiedActivations
from onnxplain.methods.spatial import (
    Grid,
    Image,
    Transform,
    channel_axis,
    checked,
    example_shape,
    first_wider,
    grid,
    image,
    images,
    instead,
    last_spatial_layer,
    layer_image,
    nearest,
)
from onnxplain.model import Model, single
from onnxplain.rules import modified
from onnxplain.run.feeds import Arrays, Feeds

# Reductions make a map [N, 1, *spatial], or colors [N, C, *spatial], of values, of what came back
# to them (both [N, C, *spatial]) and of the numbers of the spatial axes.


def colors(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """What came back."""
    return g


def products(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """Values times what came back."""
    return op.Mul(x, g)


def largest(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """The largest size over channels."""
    return op.ReduceMax(op.Abs(g), [1], keepdims=1)


def total(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """The sum over channels."""
    return op.ReduceSum(g, [1], keepdims=1)


def positive_total(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """The sum over channels where it is positive."""
    return op.Relu(total(op, x, g, axes))


def total_size(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """The sum of sizes over channels."""
    return total(op, x, op.Abs(g), axes)


def total_product(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """The sum of products over channels."""
    return total(op, x, op.Mul(x, g), axes)


def total_product_size(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """The sum of the sizes of products over channels."""
    return total_size(op, x, op.Mul(x, g), axes)


def by_mean_gradient(op: Emitter, x: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """Values times each channel's mean gradient, summed over channels where that is positive."""
    return op.Relu(total_product(op, x, op.ReduceMean(g, axes, keepdims=1), axes))


class SaliencyMap(Attribution):
    """A map of what comes back to each place of the image or of a layer.

    Args:
        model: the model.
        saliency_layer: name of the layer (or a list of names) that the map is of; None: the inputs.
            Channels and space are found as for :class:`ClassActivationMap`.
        reshape_transform: instead of that, a function that makes maps [N, C, *spatial] of an array
            of the layer's shape by selecting and rearranging its values.
        of, wrt: names of layers, see :class:`Attribution`; ``wrt`` is another name of
            ``saliency_layer``.

    Raises:
        LayerError: unknown, or without spatial axes.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient", "image")
    explains = "layer"
    choices: ClassVar = {"resize_mode": tuple(MODES)}
    exact: ClassVar[bool] = True
    """Whether the derivative itself is taken."""
    of_inputs: ClassVar[bool] = True
    """Whether the map is of the inputs where no layer is named; else of the last spatial layer."""
    reduce: ClassVar[Callable[..., ir.Value]]

    def __init__(
        self,
        model: Model,
        saliency_layer: Layers | None = None,
        reshape_transform: Transform | None = None,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, of=of, wrt=saliency_layer if wrt is None else wrt)
        if self._wrt is None and not self.of_inputs:
            self._wrt = last_spatial_layer(self)
        self.reshape_transform = checked(reshape_transform)

    @property
    def layer(self) -> Layers | None:
        """The layer (or the list of layers) that the map is of; None: the inputs."""
        return self._wrt

    def laid_over(self, feeds: Feeds) -> list[str] | None:
        """The image of each layer's map."""
        return None if self._wrt is None else images(self, feeds)

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        resize: bool | Sequence[int] = False,
        resize_mode: str = "bilinear",
        smooth: float = 0.0,
        additional_forward_args: Arrays = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`.
            resize: True resizes the map to the image, a tuple (width, height) to that size.
            resize_mode: "bilinear", "bicubic", "nearest" or "area"; "linear" for maps of one
                spatial axis, "trilinear" of three.
            smooth: standard deviation of a Gaussian filter behind that, as a fraction of the map's
                longest side.

        Returns:
            A map for each input or layer, in the layout of the image: [N, 1, H, W], or [N, H, W, 1]
            where its channels are last.

        Raises:
            LayerError: an input or a layer without spatial axes.
            InputError: a size or a mode that doesn't fit them.
        """
        return self._call(locals())

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        maps = self._maps(question, type(self).reduce, **options)
        return question.answer(maps[: len(question.wrt)])

    def _maps(
        self,
        question: Question,
        reduce: Callable[..., ir.Value],
        resize: bool | Sequence[int],
        resize_mode: str,
        smooth: float,
    ) -> list[np.ndarray]:
        """The map of each source in the layout of its image, and what :meth:`_figures` adds."""
        places = [self._place(question, value) for value in question.wrt]
        finishes = [_finish(*place, resize, resize_mode, smooth) for place in places]

        def write(
            op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
        ) -> list[ir.Value]:
            made = []
            backs = self._back(op, of, seed, wrt, *more)
            for value, back, (_, where), finish in zip(wrt, backs, places, finishes, strict=True):
                axes = list(range(2, 2 + len(where.sizes)))
                found = reduce(op, where.maps(op, value), where.maps(op, back), axes)
                found = emit_along(op, found, finish)
                channels = where.shape[0] if reduce in (colors, products) else 1
                sizes = [len(matrix) for matrix in finish] or where.sizes
                found.shape = ir.Shape([dims(value)[0], channels, *sizes])
                made.append(found)
            return [*made, *self._figures(op, backs)]

        more, key = self._more(question)
        key = (self.name, reduce, key, *places, str(resize), resize_mode, smooth)
        found = self._pass(question, key, write, exact=self.exact, more=more)
        made = [s.place(m) for m, (s, _) in zip(found, places, strict=False)]
        return [*made, *found[len(made) :]]

    def _more(self, question: Question) -> tuple[Sequence[ir.Value], Hashable]:
        """Further values that :meth:`_back` needs, and what else the graph depends on."""
        return (), None

    def _back(
        self, op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
    ) -> list[ir.Value]:
        """What comes back to each source."""
        return backward(op, {of: seed}, wrt, opset=self.model.opset)

    def _figures(self, op: Emitter, backs: Sequence[ir.Value]) -> list[ir.Value]:
        """Further outputs, made of what comes back."""
        return []

    def _place(self, question: Question, value: ir.Value) -> tuple[Image, Grid]:
        """The image that a map is laid over, and where a value has its channels and its space."""
        shape = example_shape(self, value, question.feeds)
        where: Grid | None = None
        if not value.is_graph_input():
            seen = layer_image(self.model, value, question.feeds.arrays)
            where = grid(value, shape, seen.sizes, self.reshape_transform)
        elif (found := image(value, first_wider(self.model, value), shape)) is not None:
            seen = found
            channels = 1 if found.channels is None else shape[found.channels - 1]
            sizes = tuple(s for s in found.sizes if s is not None)
            where = Grid(found.channels or 1, 0, (channels, *sizes))
        if where is None:
            fed = value.is_graph_input()
            hint = instead(question.feeds) if fed else nearest(self.model, value)
            raise LayerError(
                f"'{value.name}' has shape [N, {', '.join(map(str, shape))}], without spatial axes "
                f"to make a map of; {hint}"
            )
        return seen, where


def _finish(
    seen: Image, where: Grid, resize: bool | Sequence[int], mode: str, smooth: float
) -> list[np.ndarray]:
    """The matrix of each spatial axis that resizes and smooths a map; none if it stays as it is."""
    sizes = where.sizes
    check_mode(mode, len(sizes) if resize is not False else None, "resize_mode")
    if resize is True:
        sizes = tuple(s for s in seen.sizes if s is not None)
    elif resize is not False:
        sizes = tuple(resize)[::-1] if isinstance(resize, tuple | list) else ()
        whole = all(isinstance(s, int | np.integer) and s > 0 for s in sizes)
        if len(sizes) != len(where.sizes) or not whole:
            raise InputError(
                f"resize={resize!r} is no size of a map with {len(where.sizes)} spatial axes: give "
                "True, False or positive integers, (width, height)"
            )
    if not (math.isfinite(smooth) and smooth >= 0):
        raise InputError(f"smooth={smooth!r} is a fraction of the map's longest side, 0 or more")
    if resize is False and not smooth:
        return []
    scale = [np.eye(s) for s in sizes] if resize is False else matrices(where.sizes, sizes, mode)
    return [smoothing(len(m), smooth * max(sizes)) @ m for m in scale]


class GradientMap(SaliencyMap):
    """The largest size of the gradient over channels, place by place (TorchRay's "gradient").

    Source: Simonyan et al., 2013, arXiv:1312.6034, section 3.1. Unit: output per unit of the image
    or layer.
    """

    name = "gradient-map"
    title = "Gradient Map"
    paper = "Simonyan et al. 2013, arXiv:1312.6034"
    reduce = staticmethod(largest)


class LinearApproximation(SaliencyMap):
    """A layer's values times the gradient, summed over channels (TorchRay's "linear_approx").

    Source: Kindermans et al., "Investigating the influence of noise and distractors on the
    interpretation of neural networks", 2016, arXiv:1611.07270. Unit: output.
    """

    name = "linear-approximation"
    title = "Linear Approximation"
    paper = "Kindermans et al. 2016, arXiv:1611.07270"
    multiplies_by_inputs = True
    reduce = staticmethod(total_product)


class GradCAMMap(SaliencyMap):
    """Grad-CAM of a layer, at the layer's size if not resized (TorchRay's "grad_cam").

    Where ``saliency_layer`` is None, it is the last layer that all of the image passes on its way
    out; ``method.layer`` names it.

    Source: Selvaraju et al., "Grad-CAM", 2016, arXiv:1610.02391, equations 1 and 2. Unit: output.
    """

    name = "grad-cam-map"
    title = "Grad-CAM Map"
    paper = "Selvaraju et al. 2016, arXiv:1610.02391"
    of_inputs = False
    reduce = staticmethod(by_mean_gradient)


class _ModifiedBackward(ModifiedActivations, SaliencyMap):
    """The way back under another rule for activations."""

    exact = False

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        made = super()._attribute(question, *args, **options)
        self._warn_if_plain(question)
        return made

    def _more(self, question: Question) -> tuple[Sequence[ir.Value], Hashable]:
        return (), self.activations

    def _back(
        self, op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
    ) -> list[ir.Value]:
        return backward(op, {of: seed}, wrt, self.rules, self.model.opset)


class _ModifiedMap(_ModifiedBackward):
    """The gradient map under another rule for activations."""

    reduce = staticmethod(largest)

    def __init__(
        self,
        model: Model,
        saliency_layer: Layers | None = None,
        activations: str | Sequence[str] = "relu",
        reshape_transform: Transform | None = None,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, saliency_layer, reshape_transform, of=of, wrt=wrt)
        self._modify(activations)


class GuidedBackpropMap(_ModifiedMap):
    """The largest size of guided backpropagation over channels (TorchRay's "guided_backprop").

    Source: Springenberg et al., 2014, arXiv:1412.6806, section 3.4.
    """

    name = "guided-backprop-map"
    title = "Guided Backprop Map"
    paper = "Springenberg et al. 2014, arXiv:1412.6806"
    rule = staticmethod(modified.guided)


class DeconvolutionMap(_ModifiedMap):
    """The largest size of deconvolution over channels (TorchRay's "deconvnet").

    Source: Zeiler and Fergus, 2013, arXiv:1311.2901, section 2.1.
    """

    name = "deconvolution-map"
    title = "Deconvolution Map"
    paper = "Zeiler and Fergus 2013, arXiv:1311.2901"
    rule = staticmethod(modified.deconvolution)


# ---- recipes of the CNN visualization collections ---------------------------------------------


class Picture(SaliencyMap):
    """What comes back to the image in its own colors, or as a grayscale picture."""

    paper = "Simonyan et al. 2013, arXiv:1312.6034"
    explains = "inputs"
    shows: ClassVar[tuple[Callable[..., ir.Value], Callable[..., ir.Value]]]

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        target: Any = None,
        grayscale: bool = False,
        additional_forward_args: Arrays = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`.
            grayscale: sum the sizes over channels and scale them to 0..1, from the least to the
                99th percentile of the example.

        Returns:
            An array of the image's shape; grayscale with one channel.

        Raises:
            LayerError: an input without spatial axes.
            The errors of :meth:`Saliency.attribute`.
        """
        return self._call(locals())

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        gray = options["grayscale"]
        found = self._maps(question, self.shows[gray], False, "bilinear", 0.0)
        return question.answer([_brightness(m) for m in found] if gray else found)


def _brightness(maps: np.ndarray) -> np.ndarray:
    """Each example from its least value (0) to its 99th percentile (1); one that is flat is 0."""
    axes = tuple(range(1, maps.ndim))
    maps = maps - maps.min(axis=axes, keepdims=True)
    top = np.percentile(maps, 99, axis=axes, keepdims=True)
    return np.clip(np.divide(maps, top, out=np.zeros_like(maps), where=top > 0), 0, 1)


class VanillaBackprop(Picture):
    """The gradient by the image, as a picture.

    Source: Simonyan et al., 2013, arXiv:1312.6034, section 3; as a recipe in pytorch-cnn-
    visualizations. Unit: output per unit of the image.
    """

    name = "vanilla-backprop"
    title = "Vanilla Backprop"
    shows = (colors, total_size)


class GradientTimesImage(Picture):
    """The gradient by the image times the image, as a picture.

    Source: Shrikumar et al., "Not Just a Black Box", 2016, arXiv:1605.01713; as a recipe in
    pytorch-cnn-visualizations. Unit: output.
    """

    name = "gradient-times-image"
    title = "Gradient Times Image"
    paper = "Shrikumar et al. 2016, arXiv:1605.01713"
    multiplies_by_inputs = True
    shows = (products, total_product_size)


class LayerActivationGuidedBackprop(_ModifiedBackward, Picture):
    """What in the image drives a filter of a layer, by guided backpropagation, as a picture.

    The sum of the filter's sizes over all places is explained.

    Args:
        model: the model.
        layer: name of the filter's layer.
        activations: as in :class:`GuidedBackprop`.

    Source: Springenberg et al., 2014, arXiv:1412.6806, section 3.4; as a recipe in pytorch-cnn-
    visualizations. Unit: the layer's per unit of the image.
    """

    name = "layer-activation-guided-backprop"
    title = "Layer Activation with Guided Backprop"
    paper = "Springenberg et al. 2014, arXiv:1412.6806"
    needs = ("gradient", "layer", "neuron", "image")
    rule = staticmethod(modified.guided)
    shows = (colors, total_size)

    def __init__(self, model: Model, layer: str, activations: str | Sequence[str] = "relu") -> None:
        super().__init__(model, of=layer)
        self._modify(activations)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        neuron_selector: Any,
        grayscale: bool = False,
        additional_forward_args: Arrays = None,
    ) -> Any:
        """Explain a filter.

        Args:
            inputs, additional_forward_args: as :meth:`Saliency.attribute`.
            neuron_selector: the filter's number; or a tuple of ints and slices, without the
                examples axis, for some of its places.
            grayscale: as :meth:`VanillaBackprop.attribute`.

        Returns:
            An array of the image's shape; grayscale with one channel.

        Raises:
            NeuronError: the selector doesn't fit the layer's shape.
            LayerError: an input without spatial axes.
        """
        return self._call(locals())

    def _parse(self, arguments: Mapping[str, Any]) -> Any:
        chosen = arguments["neuron_selector"]
        if isinstance(chosen, int | np.integer) and not isinstance(chosen, bool):
            layer = single(self.model, self.of)
            axis = (rank(layer) > 2 and channel_axis(layer)) or 1
            chosen = tuple(chosen if a == axis else slice(None) for a in range(1, rank(layer)))
        return super()._parse({**arguments, "neuron_selector": chosen})

    def _back(
        self, op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
    ) -> list[ir.Value]:
        towards = op.Mul(seed, op.Sign(of))
        towards.shape = of.shape
        return super()._back(op, of, towards, wrt, *more)
