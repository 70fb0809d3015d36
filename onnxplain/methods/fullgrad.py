"""FullGrad: what the input and every bias contribute to the output, laid over the input."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError
from onnxplain.graph.emit import Emitter, const_array, dims, rank
from onnxplain.graph.grad import Active, backward
from onnxplain.methods.base import Attribution, Question
from onnxplain.methods.cam import unit
from onnxplain.methods.interpolate import MODES, chosen_mode, emit_interpolate
from onnxplain.methods.spatial import Grid, Image, grid, image, instead
from onnxplain.model import Model
from onnxplain.rules.affine import is_affine
from onnxplain.rules.vjp import VJP
from onnxplain.run.feeds import Arrays


class FullGrad(Attribution):
    """FullGrad: the input's part of the output and that of every bias, as one map.

    Where all operators are piecewise linear, input times gradient and every bias times its gradient
    add up to the output. Biases are those of convolutions, dense layers and batch normalizations,
    and constants that are added. For the map, the absolute value of each channel with spatial axes
    is shifted and scaled to 0..1, upsampled, and summed.

    Source: Srinivas and Fleuret, "Full-Gradient Representation for Neural Network Visualization",
    2019, arXiv:1905.00780. Unit: none.

    Args:
        model: the model.
    """

    name = "full-grad"
    title = "FullGrad"
    paper = "Srinivas and Fleuret 2019, arXiv:1905.00780"
    needs = ("gradient", "image")
    choices: ClassVar = {"interpolate_mode": tuple(MODES)}
    check = (
        "completeness_gap: |sum of all parts - output| / |output|; not small where operators are "
        "not piecewise linear (softmax, normalization, smooth activations)"
    )

    def __init__(self, model: Model) -> None:
        super().__init__(model)

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        interpolate_mode: str | None = None,
        normalize: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`; a map is laid
                over each input with spatial axes.
            interpolate_mode: see :func:`interpolate`; None: linear in each axis.
            normalize: shift and scale each example's map to 0..1.

        Returns:
            Maps in the inputs' form and layout, with one channel.

        Raises:
            InputError: an input has no spatial axes; others as :meth:`Saliency.attribute`.
        """
        return self._call(locals())

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        return self._with_checks(question, **options)[0]

    def _with_checks(
        self, question: Question, interpolate_mode: str | None, normalize: bool
    ) -> tuple[Any, dict[str, np.ndarray]]:
        *maps, parts, output = self._parts(question, interpolate_mode)
        seen = [self._image(question, v) for v in question.wrt]
        size = np.maximum(np.abs(output), np.finfo(np.float32).tiny)
        result = question.answer(
            [i.place(unit(m) if normalize else m) for i, m in zip(seen, maps, strict=True)]
        )
        return result, {"completeness_gap": np.abs(parts - output) / size}

    def _image(self, question: Question, value: ir.Value) -> Image:
        seen = image(value, value, question.feeds.arrays[value.name or ""].shape[1:])
        if seen is None:
            raise InputError(
                f"input '{value.name}' has no spatial axes to lay a map over; "
                f"{instead(question.feeds)}"
            )
        return seen

    def _parts(self, question: Question, interpolate_mode: str | None) -> list[np.ndarray]:
        """A map for each input, the sum of all parts [N], and the explained output [N]."""
        seen = [self._image(question, v) for v in question.wrt]
        modes = [chosen_mode(interpolate_mode, len(i.sizes)) for i in seen]
        addends = biases(self.model.graph.graph, question.of, question.wrt)
        shapes = [self._trailing(a.y, question.feeds, False) for a in addends]
        grids = [
            [
                _grid_or_none(a.y, s, i) if dims(a.y)[:1] == dims(v)[:1] else None
                for a, s in zip(addends, shapes, strict=True)
            ]
            for i, v in zip(seen, question.wrt, strict=True)
        ]
        fed = [self._trailing(v, question.feeds, False) for v in question.wrt]
        computed = [a.value for a in addends if isinstance(a.value, ir.Value)]

        def write(
            op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
        ) -> list[ir.Value]:
            ys, given = more[: len(addends)], iter(more[len(addends) :])
            grads = backward(op, {of: seed}, [*wrt, *ys], opset=self.model.opset)
            terms = [op.Mul(x, g) for x, g in zip(wrt, grads, strict=False)]
            for addend, g in zip(addends, grads[len(wrt) :], strict=True):
                terms.append(op.Mul(g, addend.write(op, given, g)))
            for term, value in zip(terms, [*wrt, *ys], strict=True):
                term.shape = value.shape
            made = []
            for k, (where, mode) in enumerate(zip(seen, modes, strict=True)):
                own = (terms[k], _whole(where, fed[k]))
                placed = [own, *zip(terms[len(wrt) :], grids[k], strict=True)]
                made.append(_overlaid(op, placed, where.known, mode))
                made[-1].shape = ir.Shape([dims(wrt[k])[0], 1, *where.sizes])
            rows = op.vector(op.dim(of, 0), -1)
            for flat in (terms, [op.Mul(of, seed)]):
                sums = [op.ReduceSum(op.Reshape(t, rows), [1], keepdims=0) for t in flat]
                made.append(op.Sum(*sums))
                made[-1].shape = ir.Shape([dims(of)[0]])
            return made

        key: Hashable = (self.name, *seen, *modes)
        return self._pass(question, key, write, more=[*(a.y for a in addends), *computed])


def _grid_or_none(layer: ir.Value, shape: Sequence[int], seen: Image) -> Grid | None:
    try:
        return grid(layer, shape, seen.sizes)
    except LayerError:  # a part of the output that has no place in the image
        return None


def _whole(seen: Image, shape: Sequence[int]) -> Grid:
    """An input's own values (of this shape without the examples axis) as maps."""
    if seen.channels is None:
        return Grid(1, 0, (1, *shape))
    return Grid(seen.channels, 0, (shape[seen.channels - 1], *seen.known))


def _overlaid(
    op: Emitter, placed: Sequence[tuple[ir.Value, Grid | None]], sizes: Sequence[int], mode: str
) -> ir.Value:
    """The size of each term, channel by channel from 0 to 1, upsampled and summed."""
    by_size: dict[tuple[int, ...], list[ir.Value]] = {}
    for term, where in placed:
        if where is not None:
            axes = list(range(2, 2 + len(where.sizes)))
            maps = op.Abs(where.maps(op, term))
            maps = op.Sub(maps, op.ReduceMin(maps, axes, keepdims=1))
            maps = op.Div(maps, op.Add(op.ReduceMax(maps, axes, keepdims=1), 1e-7))
            by_size.setdefault(where.sizes, []).append(op.ReduceSum(maps, [1], keepdims=1))
    summed = ((size, op.Sum(*maps)) for size, maps in by_size.items())
    return op.Sum(*(emit_interpolate(op, maps, size, sizes, mode) for size, maps in summed))


@dataclass(frozen=True)
class Addend:
    """What a node adds to a linear function of the inputs: ``y = linear(x) + factor * value``.

    Attributes:
        y: the node's output.
        value: an array, or a value that does not depend on what is explained.
        factor: a number.
        by_channel: ``value`` has one number per channel, the second axis of ``y``.
    """

    y: ir.Value
    value: ir.Value | np.ndarray
    factor: float = 1.0
    by_channel: bool = False

    def write(self, op: Emitter, given: Iterator[ir.Value], like: ir.Value) -> ir.Value:
        """The addend, to be broadcast to ``y``; computed ones are taken from ``given``."""
        b = next(given) if isinstance(self.value, ir.Value) else op.const(self.value)
        b = op.cast_like(b, like)
        if self.by_channel:
            b = op.Reshape(b, [-1, *[1] * (rank(self.y) - 2)])
        return op.Mul(b, self.factor) if self.factor != 1 else b


def biases(graph: ir.Graph, of: ir.Value, wrt: Sequence[ir.Value]) -> list[Addend]:
    """Every bias on a differentiable way from ``wrt`` to ``of``."""
    active = Active(graph, [of], wrt, VJP)
    found = []
    for node in active.nodes:
        if node.outputs[0] in active.values and not node.domain:
            varying = [i for i, v in enumerate(node.inputs) if v in active.values]
            found += _addends(node, varying)
    return found


def _addends(node: ir.Node, varying: list[int]) -> list[Addend]:
    y, x = node.outputs[0], node.inputs
    if node.op_type == "BatchNormalization":
        statistics = [a for v in x[1:5] if (a := const_array(v)) is not None]
        if len(statistics) < 4:
            return []
        scale, shift, mean, var = statistics
        epsilon = node.attributes.get("epsilon")
        deviation = np.sqrt(var + (1e-5 if epsilon is None else epsilon.as_float()))
        return [Addend(y, shift - mean * scale / deviation, by_channel=True)]
    factor, by_channel = 1.0, node.op_type in ("Conv", "ConvTranspose")
    if by_channel or node.op_type == "Gemm":
        value = x[2] if len(x) > 2 and 2 not in varying else None
        if "beta" in node.attributes:
            factor = node.attributes["beta"].as_float()
    elif node.op_type in ("Add", "Sub") and len(varying) == 1:
        value, other = x[1 - varying[0]], x[varying[0]]
        factor = -1.0 if node.op_type == "Sub" and varying == [0] else 1.0
        if value is None or other is None or not _is_bias(value, other):
            return []
    else:
        return []
    if value is None:
        return []
    constant = const_array(value)
    return [Addend(y, value if constant is None else constant, factor, by_channel)]


def _is_bias(addend: ir.Value, other: ir.Value) -> bool:
    """Whether a fixed addend is a bias, and not part of an activation's formula (1 + erf(x))."""
    constant, node = const_array(addend), other.producer()
    return constant is None or constant.size > 1 or node is None or is_affine(node, [0])
