"""Excitation backpropagation: where a winner-take-all walk from the target comes by."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import LayerError, NotDifferentiableError
from onnxplain.graph.edit import upstream
from onnxplain.graph.emit import Emitter
from onnxplain.graph.grad import backward, expand_functions
from onnxplain.methods.base import Layers, Question
from onnxplain.methods.maps import SaliencyMap, positive_total, total
from onnxplain.methods.spatial import Transform, layer_name
from onnxplain.model import Model, single
from onnxplain.rules import Rules
from onnxplain.rules.excitation import excitation, varies
from onnxplain.rules.lrp import LINEAR, Known, Propagation

# What a layer that is called by one name may hold behind its linear operator.
_FOLLOWS = frozenset(
    "Add Softmax LogSoftmax Sigmoid Reshape Flatten Squeeze Unsqueeze Transpose Identity Cast "
    "QuantizeLinear DequantizeLinear".split()
)
LARGE = 10.0
"""Where the sizes of the probabilities add up to more than this, they are none."""


class _Excitation(SaliencyMap):
    """A map of the walk down from the target."""

    paper = "Zhang et al. 2016, arXiv:1608.00507"
    exact = False
    ignore_negative = False

    def _walk(
        self,
        op: Emitter,
        seeds: Mapping[ir.Value, ir.Value],
        wrt: Sequence[ir.Value],
        against: ir.Node | None = None,
    ) -> list[ir.Value]:
        """The probability of each source, from those of the seeds."""
        rules = excitation(self.ignore_negative, against)
        active = expand_functions(op.graph, list(seeds), wrt, Rules([Known(rules)]))
        table = Propagation(
            "excitation",
            chosen=rules,
            nodes=active.nodes,
            values=active.values,
            fixed=[*seeds, *wrt],
        )
        try:
            return backward(op, seeds, wrt, Rules([table]), self.model.opset)
        except NotDifferentiableError as error:
            raise LayerError(
                f"the walk never visits {' or '.join(repr(v.name) for v in wrt)}: every way there "
                "leads through a weight (attention, a gate, a divisor) or what is subtracted; "
                "choose a layer whose values are weighed"
            ) from error

    def _back(
        self, op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
    ) -> list[ir.Value]:
        return self._walk(op, {of: seed}, wrt)

    def _more(self, question: Question) -> tuple[Sequence[ir.Value], Hashable]:
        return (), self.ignore_negative

    def _figures(self, op: Emitter, backs: Sequence[ir.Value]) -> list[ir.Value]:
        """The sum and the size of the probabilities of each source, [N, sources] each."""
        flat = [op.Flatten(op.Cast(b, to=ir.DataType.FLOAT)) for b in backs]
        return [
            op.Concat(*(op.ReduceSum(f(v), [1], keepdims=1) for v in flat), axis=1)
            for f in (op.Identity, op.Abs)
        ]

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        return self._with_checks(question, **options)[0]

    def _with_checks(
        self, question: Question, *args: Any, **options: Any
    ) -> tuple[Any, dict[str, np.ndarray]]:
        *made, total, size = self._maps(question, type(self).reduce, **options)
        if (size > LARGE).any():
            warnings.warn(
                f"the probabilities of a layer have sizes that add up to {size.max():.3g}, not 1: "
                "activations on the way are negative, for which excitation backpropagation was not "
                "made; let these excite nothing (ignore_negative=True), or explain by a later "
                "layer, or by LRP",
                stacklevel=5,
            )
        starts = np.cumsum([0, *(question.groups or [len(made)])])[:-1]
        sums = np.add.reduceat(total.astype(np.float64), starts, axis=1)
        worst = np.abs(sums - 1).argmax(axis=1)
        checks = {"probability": sums[np.arange(len(sums)), worst]}
        return question.answer(made), checks


class ExcitationBackprop(_Excitation):
    """The probability with which a winner-take-all walk down from the target visits each place.

    A neuron picks one of those before it, in proportion to its value times the positive weight
    between them. Made for networks whose activations are not negative; ``rules/excitation.py`` says
    what operators mean that the paper does not name.

    Args:
        model: the model.
        saliency_layer: name of the layer (or a list of names) that the map is of; None: the inputs.
        ignore_negative: negative activations and pixels excite nothing; False: they count with
            their sign, as in TorchRay.
        reshape_transform, of, wrt: as in :class:`SaliencyMap`.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016,
    arXiv:1608.00507, section 3.2. Unit: probability; a map that is neither resized nor smoothed
    adds up to 1 where the whole walk passes its layer and something excites every neuron on it.
    """

    name = "excitation-backprop"
    title = "Excitation Backprop"
    check = "probability: sum over the layer, 1 if nothing of the walk is lost or passes elsewhere"
    reduce = staticmethod(total)

    def __init__(
        self,
        model: Model,
        saliency_layer: Layers | None = None,
        ignore_negative: bool = False,
        reshape_transform: Transform | None = None,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, saliency_layer, reshape_transform, of=of, wrt=wrt)
        self.ignore_negative = ignore_negative


class ContrastiveExcitationBackprop(_Excitation):
    """Excitation backpropagation of what speaks for the target more than against it.

    From ``contrast_layer`` on, the walk carries the difference to a second walk, one that starts
    with the weights of the classifier flipped.

    Args:
        model: the model.
        saliency_layer: name of the layer (or a list of names) that the map is of; None: the inputs.
        contrast_layer: name of the layer where the two walks meet, between ``saliency_layer`` and
            the classifier; None: what enters the classifier.
        classifier_layer: name of the linear layer (a convolution, a matrix product) whose weights
            are flipped; None: the last one before the output. ``method.classifier`` names it.
        ignore_negative: as in :class:`ExcitationBackprop`.
        reshape_transform, of, wrt: as in :class:`SaliencyMap`.

    Source: Zhang et al., 2016, arXiv:1608.00507, section 3.4. Unit: probability; only where the
    difference is positive.

    Raises:
        LayerError: unknown, no linear layer, or in another order.
    """

    name = "contrastive-excitation-backprop"
    title = "Contrastive Excitation Backprop"
    reduce = staticmethod(positive_total)

    def __init__(
        self,
        model: Model,
        saliency_layer: Layers | None = None,
        contrast_layer: str | None = None,
        classifier_layer: str | None = None,
        ignore_negative: bool = False,
        reshape_transform: Transform | None = None,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, saliency_layer, reshape_transform, of=of, wrt=wrt)
        self.ignore_negative = ignore_negative
        explained, groups = self._resolve(False, False)
        node = _classifier(model, explained, classifier_layer)
        self._flipped = node.outputs[0]
        entering = next(v for v in node.inputs if v is not None and varies(v))
        self._contrast = single(model, contrast_layer) if contrast_layer else entering
        graph, named = model.graph.graph, layer_name(model, self._contrast)
        behind = {v for n in upstream(graph, [entering]) for v in n.outputs} | {entering}
        if self._contrast not in behind:
            raise LayerError(
                f"contrast layer '{named}' is not before the classifier '{self.classifier}'; "
                f"leave it out for what enters that, '{layer_name(model, entering)}'"
            )
        before = {v for n in upstream(graph, [self._contrast]) for v in (*n.inputs, *n.outputs)}
        for value in (v for group in groups or () for v in group):
            if value not in before | {self._contrast}:
                raise LayerError(
                    f"saliency layer '{layer_name(model, value)}' is not before the contrast layer "
                    f"'{named}', so no contrast reaches it; name a later contrast layer, or leave "
                    "it out for the last possible one"
                )

    def _with_checks(
        self, question: Question, *args: Any, **options: Any
    ) -> tuple[Any, dict[str, np.ndarray]]:
        return super()._with_checks(question, **options)[0], {}  # differences add up to nothing

    @property
    def classifier(self) -> str:
        """Name of the layer whose weights are flipped."""
        return layer_name(self.model, self._flipped)

    def _more(self, question: Question) -> tuple[Sequence[ir.Value], Hashable]:
        more = (self._flipped, self._contrast)
        return more, (self.ignore_negative, *(v.name for v in more))

    def _back(
        self, op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value], *more: ir.Value
    ) -> list[ir.Value]:
        """The rules are linear: a difference at a layer is one more thing that comes back there."""
        flipped, contrast = more
        (other,) = self._walk(op, {of: seed}, [contrast], flipped.producer())
        other = op.Neg(other)
        other.shape = contrast.shape
        return self._walk(op, {of: seed, contrast: other}, wrt)


def _classifier(model: Model, of: ir.Value, name: str | None) -> ir.Node:
    """The linear layer of a name, its bias or what follows it; the last one before ``of``."""
    nodes = upstream(model.graph.graph, [of])
    linear = [
        n
        for n in nodes
        if n.op_type in LINEAR
        and [varies(v) for v in n.inputs[:2] if v is not None].count(True) == 1
    ]
    if not linear:
        raise LayerError(
            f"no convolution or matrix product with weights leads to '{of.name}', so there is no "
            "classifier to flip; use ExcitationBackprop"
        )
    if name is None:
        return linear[-1]
    node = single(model, name).producer()
    while node is not None and node not in linear:
        before = [v for v in node.inputs if v is not None and varies(v)]
        follows = node in nodes and node.op_type in _FOLLOWS and len(before) == 1
        node = before[0].producer() if follows else None
    if node is None:
        raise LayerError(
            f"classifier layer '{name}' is no convolution or matrix product with weights on the "
            f"way to '{of.name}'; leave it out for '{layer_name(model, linear[-1].outputs[0])}'"
        )
    return node
