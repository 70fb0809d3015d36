"""Class activation maps: feature maps weighted by gradients, summed over channels.

A map is data: one formula from activations and gradients to weighted activations. What all share
(which layer, where its channels are, the size of the input) is :mod:`onnxplain.methods.spatial`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import LayerError
from onnxplain.graph.emit import Emitter, dims, rank
from onnxplain.graph.grad import backward
from onnxplain.methods.base import Attribution, Layers, Question
from onnxplain.methods.interpolate import (
    MODES,
    check_mode,
    chosen_mode,
    emit_interpolate,
    interpolate,
)
from onnxplain.methods.spatial import (
    Grid,
    Image,
    Transform,
    channel_axis,
    checked,
    example_shape,
    grid,
    image,
    images,
    last_spatial_layer,
    layer_image,
    nearest,
)
from onnxplain.model import Model, single
from onnxplain.rules import Rules, modified
from onnxplain.rules.vjp import VJP
from onnxplain.run.feeds import Arrays, Feeds

Weighted = Callable[[Emitter, ir.Value, ir.Value, list[int]], ir.Value]
"""Weighted activations from activations, gradients (both [N, C, *spatial]) and spatial axes."""


def _by_mean_gradient(op: Emitter, a: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    return op.Mul(a, op.ReduceMean(g, axes, keepdims=1) if axes else g)


def _by_positive_parts(op: Emitter, a: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    """Equations 7 and 19 of Grad-CAM++; where the gradient is zero, so is its share."""
    square = op.Mul(g, g)
    total = op.ReduceSum(a, axes, keepdims=1)
    below = op.Add(op.Mul(square, op.Add(op.Mul(total, g), 2.0)), 1e-6)
    share = op.Div(square, below)
    return op.Mul(a, op.ReduceSum(op.Mul(op.Relu(g), share), axes, keepdims=1))


def _by_gradient(op: Emitter, a: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    return op.Mul(a, g)


def _by_mean_product(op: Emitter, a: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    total = op.Add(op.ReduceSum(a, axes, keepdims=1), 1e-7)
    return op.Mul(a, op.Div(op.ReduceSum(op.Mul(a, g), axes, keepdims=1), total))


def _by_positive_gradient(op: Emitter, a: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    return op.Mul(a, op.Relu(g))


def _by_nothing(op: Emitter, a: ir.Value, g: ir.Value, axes: list[int]) -> ir.Value:
    return a


FORMULAS: dict[str, Weighted] = {
    "grad-cam": _by_mean_gradient,
    "grad-cam++": _by_positive_parts,
    "hires-cam": _by_gradient,
    "xgrad-cam": _by_mean_product,
    "layer-cam": _by_positive_gradient,
    "eigen-cam": _by_nothing,
    "eigen-grad-cam": _by_gradient,
}
"""The weighted activations of each method, by its name."""


class ClassActivationMap(Attribution):
    """A map of where a layer's channels speak for the target, at the size of the input.

    Args:
        model: the model.
        layer: name of a layer with spatial axes, or a list of names. None: the last one that all of
            the image passes on its way to the output; ``method.layer`` names it. Channels may be
            first or last; tokens [N, tokens, dim] are laid out as a grid of the image's aspect (of
            a square where its size is open), without the fewest tokens in front that are too many.
        reshape_transform: instead of that, a function that makes maps [N, C, *spatial] of an array
            of the layer's shape by selecting and rearranging its values.

    Raises:
        LayerError: unknown, or without spatial axes, or a grid that can't be inferred.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient", "image")
    explains = "layer"
    choices: ClassVar = {"interpolate_mode": tuple(MODES)}
    eigen: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        layer: Layers | None = None,
        reshape_transform: Transform | None = None,
    ) -> None:
        super().__init__(model, wrt=layer)
        if layer is None:
            self._wrt = last_spatial_layer(self)
        self.reshape_transform = checked(reshape_transform)

    @property
    def layer(self) -> Layers:
        """The layer (or the list of layers) whose map is made."""
        assert self._wrt is not None
        return self._wrt

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        attribute_to_layer_input: bool = False,
        relu: bool = True,
        eigen_smooth: bool = False,
        interpolate_mode: str | None = None,
        normalize: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name).
            target: int, tuple, one per example, or None.
            additional_forward_args: the remaining inputs, fed and not attributed.
            attribute_to_layer_input: make the map of what enters the layer.
            relu: keep only what speaks for the target.
            eigen_smooth: project the weighted activations on their first principal component
                instead of summing them over channels.
            interpolate_mode: see :func:`interpolate`; None: linear in each axis.
            normalize: shift and scale each example's map to 0..1.

        Returns:
            A map for each layer in the layout of the input it is laid over: [N, 1, H, W], or
            [N, H, W, 1] where channels are last. A list for a list of layers.

        Raises:
            InputError, TargetError, LayerError, NotDifferentiableError, NoRuleError.
        """
        return self._call(locals())

    def _attribute(
        self,
        question: Question,
        relu: bool,
        eigen_smooth: bool,
        interpolate_mode: str | None,
        normalize: bool,
    ) -> Any:
        project = self.eigen or eigen_smooth
        places = [self._place(question, layer) for layer in question.wrt]
        modes = [chosen_mode(interpolate_mode, len(seen.sizes)) for seen, _ in places]

        def write(op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value]) -> list[ir.Value]:
            grads = wrt
            if "gradient" in self.needs:
                grads = backward(op, {of: seed}, wrt, opset=self.model.opset)
            made = []
            for value, grad, (seen, where), mode in zip(wrt, grads, places, modes, strict=True):
                axes = list(range(2, 2 + len(where.sizes)))
                maps = FORMULAS[self.name](op, where.maps(op, value), where.maps(op, grad), axes)
                shape: tuple[int | None, ...] = where.shape
                if not project:
                    maps = op.ReduceSum(maps, [1], keepdims=1)
                    maps = op.Relu(maps) if relu else maps
                    maps = emit_interpolate(op, maps, where.sizes, seen.known, mode)
                    shape = (1, *seen.sizes)
                maps.shape = ir.Shape([dims(value)[0], *shape])
                made.append(maps)
            return made

        key = (self.name, project, relu, *places, *modes)
        found = self._pass(question, key, write)
        if project:
            found = [
                interpolate(np.maximum(m, 0) if relu else m, seen.known, mode)
                for m, (seen, _), mode in zip(
                    map(first_component, found), places, modes, strict=True
                )
            ]
        return question.answer(
            [
                seen.place(unit(m) if normalize else m)
                for m, (seen, _) in zip(found, places, strict=True)
            ]
        )

    def laid_over(self, feeds: Feeds) -> list[str] | None:
        """The image of each map."""
        return images(self, feeds)

    def _place(self, question: Question, layer: ir.Value) -> tuple[Image, Grid]:
        """The image that a layer's map is laid over, and the maps in the layer's values."""
        seen = layer_image(self.model, layer, question.feeds.arrays)
        shape = example_shape(self, layer, question.feeds)
        where = grid(layer, shape, seen.sizes, self.reshape_transform)
        if where is None:
            raise LayerError(
                f"layer '{layer.name}' has shape [N, {', '.join(map(str, shape))}], without "
                f"spatial axes like those of '{seen.name}'; {nearest(self.model, layer)}"
            )
        return seen, where


def unit(maps: np.ndarray) -> np.ndarray:
    """Each example's map shifted and scaled to 0..1; one that is flat is zero."""
    axes = tuple(range(1, maps.ndim))
    maps = maps - maps.min(axis=axes, keepdims=True)
    top = maps.max(axis=axes, keepdims=True)
    return np.asarray(np.divide(maps, top, out=np.zeros_like(maps), where=top > 0))


def first_component(maps: np.ndarray) -> np.ndarray:
    """Maps [N, C, *spatial] projected on their first principal component, [N, 1, *spatial].

    Positions are the observations; channels are centered first. The component's sign is that of
    ``numpy.linalg.svd``, as in pytorch-grad-cam; the mathematics leaves it open.
    """
    flat = np.nan_to_num(maps, posinf=None, neginf=None).reshape(*maps.shape[:2], -1)
    flat = flat.swapaxes(1, 2)
    flat = flat - flat.mean(axis=1, keepdims=True)
    _, _, vt = np.linalg.svd(flat, full_matrices=False)
    return np.asarray((flat @ vt[:, 0, :, None]).reshape(len(maps), 1, *maps.shape[2:]))


class GradCAM(ClassActivationMap):
    """Grad-CAM: activations weighted by each channel's mean gradient, summed over channels.

    Source: Selvaraju et al., "Grad-CAM", 2016, arXiv:1610.02391, equations 1 and 2. Unit: output.
    """

    name = "grad-cam"
    title = "Grad-CAM"
    paper = "Selvaraju et al. 2016, arXiv:1610.02391"


class GradCAMPlusPlus(ClassActivationMap):
    """Grad-CAM++: channels weighted by their positive gradients, by how few share the evidence.

    Source: Chattopadhyay et al., "Grad-CAM++", 2017, arXiv:1710.11063, equations 7 and 19 (of the
    exponential of the output). Unit: output.
    """

    name = "grad-cam++"
    title = "Grad-CAM++"
    paper = "Chattopadhyay et al. 2017, arXiv:1710.11063"


class HiResCAM(ClassActivationMap):
    """HiResCAM: activations times gradients, value by value, summed over channels.

    Source: Draelos and Carin, "Use HiResCAM instead of Grad-CAM", 2020, arXiv:2011.08891. Unit:
    output; where only linear operators follow the layer, the map (``relu=False``, at the layer's
    size) adds up to the output without its bias.
    """

    name = "hires-cam"
    title = "HiResCAM"
    paper = "Draelos and Carin 2020, arXiv:2011.08891"


class XGradCAM(ClassActivationMap):
    """XGrad-CAM: channels weighted by their mean gradient, averaged with their activations.

    Source: Fu et al., "Axiom-based Grad-CAM", 2020, arXiv:2008.02312. Unit: output.
    """

    name = "xgrad-cam"
    title = "XGrad-CAM"
    paper = "Fu et al. 2020, arXiv:2008.02312"


class LayerCAM(ClassActivationMap):
    """LayerCAM: activations times the positive part of their gradients, summed over channels.

    Source: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
    IEEE Transactions on Image Processing 30, 2021. Unit: output.
    """

    name = "layer-cam"
    title = "LayerCAM"
    paper = "Jiang et al. 2021, IEEE TIP 30"


class EigenCAM(ClassActivationMap):
    """Eigen-CAM: activations projected on their first principal component; needs no target.

    Source: Muhammad and Yeasin, "Eigen-CAM", 2020, arXiv:2008.00299. Unit: the layer's. The map is
    the same for every target.
    """

    name = "eigen-cam"
    title = "Eigen-CAM"
    paper = "Muhammad and Yeasin 2020, arXiv:2008.00299"
    needs = ("image",)
    eigen = True

    def _parse(self, arguments: Mapping[str, Any]) -> Any:
        axes = rank(self.model.output) - 1
        return super()._parse({**arguments, "target": (0,) * axes if axes > 0 else None})


class EigenGradCAM(ClassActivationMap):
    """Eigen-Grad-CAM: activations times gradients, projected on their first principal component.

    Source: Gildenblat et al., pytorch-grad-cam, 2021, after Eigen-CAM (arXiv:2008.00299). Unit:
    output.
    """

    name = "eigen-grad-cam"
    title = "Eigen-Grad-CAM"
    paper = "after Muhammad and Yeasin 2020, arXiv:2008.00299"
    eigen = True


class LayerGradCam(Attribution):
    """Grad-CAM at a layer: mean gradients times activations, summed over channels, signed.

    Channels are the second axis, or the last one of a layer of four axes and more whose operators
    say so. Source: Selvaraju et al., 2016, arXiv:1610.02391. Unit: output.

    Args:
        model: the model.
        layer: a layer's name, or a list of names. Its first axis has to count the examples.

    Raises:
        LayerError: it counts something else, or there is no second axis.
    """

    name = "layer-grad-cam"
    title = "Layer Grad-CAM"
    paper = GradCAM.paper
    needs = ("gradient", "layer")
    explains = "layer"

    def __init__(self, model: Model, layer: Layers) -> None:
        super().__init__(model, wrt=layer)

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
    ) -> Any:
        """Explain examples by a layer.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`.
            attribute_to_layer_input: explain by what enters the layer.
            relu_attributions: keep only what speaks for the target.
            attr_dim_summation: sum over channels.

        Returns:
            An array of the layer's shape, with one channel if summed; a tuple where several values
            leave the scope; a list for a list of layers.
        """
        return self._call(locals())

    def _attribute(
        self, question: Question, relu_attributions: bool, attr_dim_summation: bool
    ) -> Any:
        def write(op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value]) -> list[ir.Value]:
            grads = backward(op, {of: seed}, wrt, opset=self.model.opset)
            return [
                layer_grad_cam(op, a, g, relu_attributions, attr_dim_summation)
                for a, g in zip(wrt, grads, strict=True)
            ]

        for value in question.wrt:
            if rank(value) < 2:
                raise LayerError(
                    f"layer '{value.name}' has one number per example, no channels; "
                    f"{nearest(self.model, value)}"
                )
            example_shape(self, value, question.feeds)
        key = (self.name, relu_attributions, attr_dim_summation)
        return question.answer(self._pass(question, key, write))


def layer_grad_cam(
    op: Emitter, a: ir.Value, g: ir.Value, relu: bool = True, summed: bool = True
) -> ir.Value:
    """Grad-CAM of activations and their gradients, in their layout."""
    channels = (channel_axis(a) if rank(a) >= 4 else None) or 1
    made = _by_mean_gradient(op, a, g, [k for k in range(1, rank(a)) if k != channels])
    shape = list(dims(a))
    if summed:
        made, shape[channels] = op.ReduceSum(made, [channels], keepdims=1), 1
    made = op.Relu(made) if relu else made
    made.shape = ir.Shape(shape)
    return made


class GuidedGradCam(Attribution):
    """Guided backpropagation times the upsampled positive Grad-CAM of a layer.

    Both ways back share one forward pass. Source: Selvaraju et al., "Grad-CAM", 2016,
    arXiv:1610.02391. Unit: square of the output per input unit.

    Args:
        model: the model.
        layer: name of a layer with spatial axes.
    """

    name = "guided-grad-cam"
    title = "Guided Grad-CAM"
    paper = GradCAM.paper
    needs = ("gradient", "layer", "image")
    choices: ClassVar = {"interpolate_mode": tuple(MODES)}

    def __init__(self, model: Model, layer: str) -> None:
        super().__init__(model)
        self.layer = layer
        single(model, layer)  # an unknown name is refused where it is given

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`.
            interpolate_mode: see :func:`interpolate`.
            attribute_to_layer_input: take the map of what enters the layer.

        Returns:
            Attributions of the inputs' shape, in the inputs' form. An input without spatial axes
            gets an empty array, with a warning.

        Raises:
            LayerError: the layer's map fits no input; other errors as :meth:`Saliency.attribute`.
        """
        return self._call(locals())

    def _parse(self, arguments: Mapping[str, Any]) -> Any:
        entering = arguments["attribute_to_layer_input"]
        question, options, delta = super()._parse(arguments)
        return question, {**options, "entering": entering}, delta

    def _attribute(self, question: Question, interpolate_mode: str, entering: bool) -> Any:
        layer = single(self.model, self.layer, entering=entering)
        shape = example_shape(self, layer, question.feeds)
        places = [self._place(question, v, layer, shape) for v in question.wrt]
        fitting = [i for i, place in enumerate(places) if place is not None]
        if not fitting:
            raise LayerError(
                f"layer '{layer.name}' has shape [N, {', '.join(map(str, shape))}], without "
                f"spatial axes like those of an explained input; {nearest(self.model, layer)}"
            )
        for place in filter(None, places):
            check_mode(interpolate_mode, len(place[0].sizes))
        guided = Rules([modified.table(modified.guided)]) + VJP

        def write(
            op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], at: ir.Value
        ) -> list[ir.Value]:
            opset = self.model.opset
            ways = backward(op, {of: seed}, [wrt[i] for i in fitting], guided, opset)
            (grad,) = backward(op, {of: seed}, [at], opset=opset)
            made = []
            for i, way in zip(fitting, ways, strict=True):
                seen, where = places[i]  # type: ignore[misc]
                axes = list(range(2, 2 + len(where.sizes)))
                maps = _by_mean_gradient(op, where.maps(op, at), where.maps(op, grad), axes)
                maps = op.Relu(op.ReduceSum(maps, [1], keepdims=1))
                maps = emit_interpolate(op, maps, where.sizes, seen.known, interpolate_mode)
                last = len(axes) + 1
                if seen.channels is None:
                    maps = op.Squeeze(maps, [1])
                elif seen.channels != 1:
                    maps = op.Transpose(maps, perm=[0, *range(2, last + 1), 1])
                out = op.Mul(way, op.cast_like(maps, way))
                out.shape = wrt[i].shape
                made.append(out)
            return made

        key: Hashable = (self.name, interpolate_mode, layer.name, *places)
        found = iter(self._pass(question, key, write, exact=False, more=[layer]))
        if len(fitting) < len(places):
            left = [v.name for v, place in zip(question.wrt, places, strict=True) if place is None]
            warnings.warn(
                f"the map of layer '{layer.name}' can't be laid over input(s) {', '.join(left)}: "  # type: ignore[arg-type]
                "their attributions are empty",
                stacklevel=4,
            )
        return question.answer([next(found) if place else np.zeros((0,)) for place in places])

    def _place(
        self, question: Question, value: ir.Value, layer: ir.Value, shape: Sequence[int]
    ) -> tuple[Image, Grid] | None:
        """How the layer's map lies over an input; None where it can't."""
        seen = image(value, layer, question.feeds.arrays[value.name or ""].shape[1:])
        where = None if seen is None else grid(layer, shape, seen.sizes)
        return None if seen is None or where is None else (seen, where)
