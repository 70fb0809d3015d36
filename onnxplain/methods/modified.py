"""Guided backpropagation and deconvolution: the gradient under other rules for activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from onnxplain.graph.edit import clone, downstream, upstream
from onnxplain.graph.grad import expand_functions
from onnxplain.methods.base import Attribution, Layers, Question
from onnxplain.methods.forms import neuron_form
from onnxplain.methods.gradient import GradientAttribution
from onnxplain.model import Model
from onnxplain.rules import Rules, modified
from onnxplain.rules.vjp import VJP
from onnxplain.run.feeds import Arrays


class ModifiedActivations(Attribution):
    """What knows another rule for activations, and which operators it is for."""

    choices: ClassVar = {"activations": ("relu", "all")}
    rule: ClassVar[Callable[..., Any]]

    def _modify(self, activations: str | Sequence[str]) -> None:
        self.activations = activations if isinstance(activations, str) else tuple(activations)
        self.table = modified.table(type(self).rule, self.activations)
        self.rules = Rules([self.table]) + VJP

    def _warn_if_plain(self, question: Question) -> None:
        """Say so where no operator on the way is changed; once there is a result to speak of."""
        graph = self.model.graph.graph
        behind = set(downstream(graph, question.wrt))
        if any(self.table.find(n) for n in upstream(graph, [question.of]) if n in behind):
            return
        # Function bodies, those of quantized layers, may hold some.
        copy, (of, *wrt) = clone(self.model.graph, [question.of, *question.wrt])
        active = expand_functions(copy.graph, [of], wrt, self.rules)
        if not any(self.table.find(n) for n in active.nodes):
            warnings.warn(
                f"no operator between '{question.wrt[0].name}' and '{question.of.name}' is one that"
                f" activations={self.activations!r} stands for, so this is the plain gradient; "
                "name the model's activations (activations='all' takes every one)",
                stacklevel=5,
            )


class ModifiedBackprop(ModifiedActivations, GradientAttribution):
    """The gradient with another rule for activations.

    Args:
        model: the model.
        activations: operators that the rule is for: "relu" (Relu, ThresholdedRelu, Clip with
            minimum 0 such as ReLU6, Max with 0, Where(x > 0, x, 0), and the QuantizeLinear that
            stands for a ReLU in a quantized model), "all" (LeakyRelu, PRelu, Elu, Gelu, Swish,
            Sigmoid, Tanh, ... too), or a list of operator types. An activation that was exported as
            several operators is none of them.
        of, wrt: names of layers, see :class:`Attribution`.

    Raises:
        InputError: ``activations`` names no activation functions.
    """

    def __init__(
        self,
        model: Model,
        activations: str | Sequence[str] = "relu",
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, of=of, wrt=wrt)
        self._modify(activations)

    def attribute(
        self, inputs: Arrays, target: Any = None, additional_forward_args: Arrays = None
    ) -> Any:
        """Explain examples; arguments, result and errors as :meth:`Saliency.attribute`.

        Warns where no operator on the way is changed: the result is the plain gradient then.
        """
        return self._call(locals())

    def _attribute(self, question: Question) -> Any:
        key = (self.table.name, self.activations)
        made = self._gradient(question, "gradient", self.rules, key)
        self._warn_if_plain(question)
        return made


class GuidedBackprop(ModifiedBackprop):
    """The gradient, of which every ReLU lets only the positive part back.

    Source: Springenberg et al., "Striving for Simplicity: The All Convolutional Net", 2014,
    arXiv:1412.6806, section 3.4. Unit: output per input unit.
    """

    name = "guided-backprop"
    title = "Guided Backprop"
    paper = "Springenberg et al. 2014, arXiv:1412.6806"
    rule = staticmethod(modified.guided)


class Deconvolution(ModifiedBackprop):
    """The gradient, with every ReLU replaced on the way back by a ReLU of what comes back.

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2013,
    arXiv:1311.2901, section 2.1. Unit: output per input unit.
    """

    name = "deconvolution"
    title = "Deconvolution"
    paper = "Zeiler and Fergus 2013, arXiv:1311.2901"
    rule = staticmethod(modified.deconvolution)


@neuron_form
class NeuronGuidedBackprop(GuidedBackprop):
    """Guided backpropagation from a neuron of a layer to the inputs.

    Source: Springenberg et al., 2014, arXiv:1412.6806, section 3.4.
    """


@neuron_form
class NeuronDeconvolution(Deconvolution):
    """Deconvolution from a neuron of a layer to the inputs.

    Source: Zeiler and Fergus, 2013, arXiv:1311.2901, section 2.1.
    """
