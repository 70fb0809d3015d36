"""Gradient methods: one forward and one backward pass per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxplain.graph.edit import new_input, prune
from onnxplain.graph.emit import Emitter, dims
from onnxplain.graph.grad import backward
from onnxplain.methods.base import Attribution, Layers, Question
from onnxplain.model import Model
from onnxplain.run.feeds import Arrays

Formula = Literal["gradient", "absolute", "product"]

FORMULAS: dict[Formula, Callable[[Emitter, ir.Value, ir.Value], ir.Value]] = {
    "gradient": lambda op, value, grad: grad,
    "absolute": lambda op, value, grad: op.Abs(grad),
    "product": lambda op, value, grad: op.Mul(value, grad),
}
"""The attribution of a value from itself and its gradient."""

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def emit_attribution(op: Emitter, value: ir.Value, name: str, source: ir.Value) -> None:
    """Make the attributions of ``source`` an output; half precision leaves as float32."""
    out = op.Cast(value, to=ir.DataType.FLOAT) if value.dtype in HALVES else op.Identity(value)
    out.name, out.shape = name, source.shape
    op.graph.outputs.append(out)


class _Gradient(Attribution):
    """What gradient methods share: the backward graph, and one formula behind it."""

    def _build(self, question: Question, formula: Formula) -> ir.Model:
        """The explainer: inputs of the model and ``cotangent``; outputs ``attribution.I``."""
        copy, values = self.model.rewriting(question.of, *question.wrt)
        of, wrt = values[0], values[1:]
        op = Emitter(copy.graph, "explain")
        seed = new_input(copy.graph, self.model.free_name("cotangent"), of, dims(of))
        grads = backward(op, {of: seed}, wrt, opset=self.model.opset)
        copy.graph.outputs.clear()
        for i, (value, grad) in enumerate(zip(wrt, grads, strict=True)):
            name = self.model.free_name(f"attribution.{i}")
            emit_attribution(op, FORMULAS[formula](op, value, grad), name, value)
        prune(copy)
        return copy

    def _run(self, question: Question, formula: Formula) -> Any:
        program = self.model.program(
            (formula, question.key), lambda: self._build(question, formula)
        )
        cotangent = self.model.free_name("cotangent")
        if question.at_once:
            seed = np.asarray(question.seeds(slice(0, 1))[0])
            found = program.session({**question.feeds.arrays, cotangent: seed})
        else:
            found = self.model.run(program, question.feeds, {cotangent: question.seeds})
        return question.answer(list(found.values()))


class Saliency(_Gradient):
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
        question = self._ask(inputs, target, additional_forward_args)
        return self._run(question, "absolute" if abs else "gradient")


class InputXGradient(_Gradient):
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
        return self._run(self._ask(inputs, target, additional_forward_args), "product")


class LayerGradientXActivation(_Gradient):
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

    def __init__(self, model: Model, layer: Layers, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, wrt=layer)
        self.multiplies_by_inputs = multiply_by_inputs

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
        question = self._ask(
            inputs, target, additional_forward_args, wrt_entering=attribute_to_layer_input
        )
        return self._run(question, "product" if self.multiplies_by_inputs else "gradient")


class NeuronGradient(_Gradient):
    """The gradient of one neuron of a layer with respect to the inputs.

    Args:
        model: the model.
        layer: name of the neuron's layer.
    """

    name = "neuron-gradient"
    title = "Neuron Gradient"
    paper = "Simonyan et al. 2013, arXiv:1312.6034"
    needs = ("gradient", "layer", "neuron")

    def __init__(self, model: Model, layer: str) -> None:
        super().__init__(model, of=layer)

    def attribute(
        self,
        inputs: Arrays,
        neuron_selector: Any,
        additional_forward_args: Arrays = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Explain a neuron.

        Args:
            inputs, additional_forward_args: as :meth:`Saliency.attribute`.
            neuron_selector: int, or tuple of ints and slices (summed), without the examples axis.
            attribute_to_neuron_input: the neuron is one of the values that enter the layer.

        Returns:
            Gradients of the inputs' shape, in the inputs' form.

        Raises:
            NeuronError: the selector doesn't fit the layer's shape.
        """
        question = self._ask(
            inputs,
            neuron_selector,
            additional_forward_args,
            of_entering=attribute_to_neuron_input,
        )
        return self._run(question, "gradient")


class LayerActivation(Attribution):
    """The values of a layer.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
    """

    name = "layer-activation"
    title = "Layer Activation"
    needs = ("layer",)

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
