"""Gradient methods: one forward and one backward pass per example."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import Emitter
from onnxplain.graph.grad import backward
from onnxplain.methods.base import Attribution, Layers, Question, flag
from onnxplain.methods.forms import neuron_form
from onnxplain.model import Model
from onnxplain.rules import Rules
from onnxplain.rules.vjp import VJP
from onnxplain.run.feeds import Arrays

Formula = Literal["gradient", "absolute", "product"]

FORMULAS: dict[Formula, Callable[[Emitter, ir.Value, ir.Value], ir.Value]] = {
    "gradient": lambda op, value, grad: grad,
    "absolute": lambda op, value, grad: op.Abs(grad),
    "product": lambda op, value, grad: op.Mul(value, grad),
}
"""The attribution of a value from itself and its gradient."""


class GradientAttribution(Attribution):
    """What gradient methods share: the backward graph under some rules, and a formula behind it."""

    def _gradient(
        self, question: Question, formula: Formula, rules: Rules = VJP, key: Hashable = None
    ) -> Any:
        """Attributions by a formula; ``key`` tells rules other than the derivatives apart."""

        def write(
            op: Emitter, of: ir.Value, seed: ir.Value, wrt: Sequence[ir.Value]
        ) -> list[ir.Value]:
            grads = backward(op, {of: seed}, wrt, rules, self.model.opset)
            found = []
            for value, grad in zip(wrt, grads, strict=True):
                found.append(FORMULAS[formula](op, value, grad))
                found[-1].shape = value.shape
            return found

        arrays = self._pass(question, (formula, key), write, exact=rules is VJP)
        return question.answer(arrays)


class Saliency(GradientAttribution):
    """The gradient of the output with respect to the input, by default its absolute value.

    Source: Simonyan, Vedaldi, Zisserman, "Deep Inside Convolutional Networks", 2013,
    arXiv:1312.6034, section 3. Unit: output per input unit.
    """

    name = "saliency"
    title = "Saliency"
    paper = "Simonyan et al. 2013, arXiv:1312.6034"

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        abs: bool = True,
        additional_forward_args: Arrays = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name).
            target: int, tuple, one per example, or None (see the README); with ``of`` a layer, a
                neuron selector.
            abs: return absolute values.
            additional_forward_args: the remaining inputs, fed and not attributed.

        Returns:
            Attributions of the inputs' shape, in the inputs' form.

        Raises:
            InputError, TargetError, LayerError, NotDifferentiableError, NoRuleError.
        """
        return self._call(locals())

    def _attribute(self, question: Question, abs: bool = True) -> Any:
        return self._gradient(question, "absolute" if flag("abs", abs) else "gradient")


class InputXGradient(GradientAttribution):
    """The input times the gradient of the output with respect to it.

    Source: Shrikumar et al., "Not Just a Black Box", 2016, arXiv:1605.01713. Unit: output.
    """

    name = "input-x-gradient"
    title = "Input X Gradient"
    paper = "Shrikumar et al. 2016, arXiv:1605.01713"
    multiplies_by_inputs = True

    def attribute(
        self, inputs: Arrays, target: Any = None, additional_forward_args: Arrays = None
    ) -> Any:
        """Explain examples; arguments, result and errors as :meth:`Saliency.attribute`."""
        return self._call(locals())

    def _attribute(self, question: Question) -> Any:
        return self._gradient(question, "product")


class _SignedGradient(GradientAttribution):
    """The gradient itself; :class:`NeuronGradient` is its neuron form."""

    name = "gradient"
    title = "Gradient"
    paper = Saliency.paper

    def attribute(
        self, inputs: Arrays, target: Any = None, additional_forward_args: Arrays = None
    ) -> Any:
        """Explain examples; arguments, result and errors as :meth:`Saliency.attribute`."""
        return self._call(locals())

    def _attribute(self, question: Question) -> Any:
        return self._gradient(question, "gradient")


class LayerGradientXActivation(GradientAttribution):
    """A layer's values times the gradient of the output with respect to them.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
        multiply_by_inputs: False gives the bare gradient.
    """

    name = "layer-gradient-x-activation"
    title = "Layer Gradient X Activation"
    paper = "Shrikumar et al. 2016, arXiv:1605.01713"
    needs = ("gradient", "layer")
    explains = "layer"

    def __init__(self, model: Model, layer: Layers, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, wrt=layer)
        self.multiplies_by_inputs = flag("multiply_by_inputs", multiply_by_inputs)

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Explain examples by a layer.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`.
            attribute_to_layer_input: explain by what enters the layer.

        Returns:
            An array of the layer's shape; a tuple where several values leave the scope; a list for
            a list of layers.
        """
        return self._call(locals())

    def _attribute(self, question: Question) -> Any:
        return self._gradient(question, "product" if self.multiplies_by_inputs else "gradient")


@neuron_form
class NeuronGradient(_SignedGradient):
    """The gradient of one neuron of a layer with respect to the inputs.

    Source: Simonyan et al., 2013, arXiv:1312.6034, section 3.
    """

    name = "neuron-gradient"
    title = "Neuron Gradient"


class LayerActivation(Attribution):
    """The values of a layer.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
    """

    name = "layer-activation"
    title = "Layer Activation"
    needs = ("layer",)
    explains = "layer"

    def __init__(self, model: Model, layer: Layers) -> None:
        super().__init__(model, wrt=layer)

    def attribute(
        self,
        inputs: Arrays,
        additional_forward_args: Arrays = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """A layer's values, [N, ...] each; a list for a list of layers."""
        _, groups = self._resolve(False, attribute_to_layer_input)
        assert groups is not None
        feeds = self.model.feeds(inputs, additional_forward_args)
        names = list(dict.fromkeys(v.name or "" for g in groups for v in g))
        fed = {n: feeds.arrays[n] for n in names if n in feeds.arrays}
        computed = [n for n in names if n not in fed]
        found: dict[str, np.ndarray] = dict(fed)
        if computed:
            found |= self.model.run(self.model.forward(computed), feeds)
        results = [
            tuple(found[v.name or ""] for v in g) if len(g) > 1 else found[g[0].name or ""]
            for g in groups
        ]
        return results if isinstance(self._wrt, list) else results[0]

    def explain(self, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """The layer's values: there is nothing to check."""
        return self.attribute(**arguments), {}
