"""Layer-wise relevance propagation: one walk back that carries relevance."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError, NotDifferentiableError
from onnxplain.graph.edit import new_input
from onnxplain.graph.emit import Emitter, dims, rank
from onnxplain.graph.grad import backward, expand_functions
from onnxplain.graph.names import scopes
from onnxplain.methods.base import Attribution, Layers, Question
from onnxplain.methods.forms import layer_form
from onnxplain.model import Model
from onnxplain.rules import Rules
from onnxplain.rules.lrp import (
    LINEAR,
    PRESETS,
    Entry,
    Known,
    PropagationRule,
    Propagation,
    Selector,
    preset,
)
from onnxplain.run.feeds import Arrays

RuleList = Sequence[tuple[Selector, PropagationRule]]


class LRP(Attribution):
    """Layer-wise relevance propagation: the explained value, handed back layer by layer.

    Every layer hands the relevance of its outputs to its inputs by a rule of :mod:`onnxplain.lrp`,
    which also says what happens where no rule is chosen. A BatchNormalization behind a convolution
    or Gemm is part of that layer, and so is a bias that a node behind it adds.

    Args:
        model: the model.
        rules: None for Captum's default (Epsilon with 1e-9 for all that is linear, Pass for
            activations); the name of a preset (:func:`onnxplain.lrp.preset`); or a list of
            ``(selector, rule)`` of which the first that matches and fits a node wins. A selector is
            the name of a layer (all nodes of a scope), an operator type, "first" (the linear layers
            that are reached first from what is explained), a predicate on the ``onnx_ir.Node``, or a
            list of names.
        of, wrt: names of layers, see :class:`Attribution`.

    Raises:
        LayerError: a selector names nothing in the model, or none of the rules matches a layer.
        InputError: not a preset, a list of pairs, or a rule.

    Source: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by
    Layer-Wise Relevance Propagation", PLoS ONE 10(7), 2015, e0130140. Unit: output.
    """

    name = "lrp"
    title = "LRP"
    paper = "Bach et al. 2015, doi:10.1371/journal.pone.0130140"
    check = "convergence_delta: explained value minus the sum of relevance (biases absorb some)"
    multiplies_by_inputs = True

    def __init__(
        self,
        model: Model,
        rules: str | RuleList | None = None,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, of=of, wrt=wrt)
        if isinstance(rules, str):
            rules = preset(rules)
        self.rules: list[tuple[Selector, PropagationRule]] = _checked(rules)
        self._entries = [e for s, rule in self.rules for e in self._resolved(s, rule)]
        nodes = list(model.graph.graph)
        if self.rules and not any(_matches(e, n) for e in self._entries for n in nodes):
            kinds = ", ".join(sorted({n.op_type for n in nodes}))
            raise LayerError(
                "none of the rules is for a layer of this model; select by its operators "
                f"({kinds}), by names from model.layers(), or by 'first'"
            )

    def has_convergence_delta(self) -> bool:
        return True

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args: as :meth:`Saliency.attribute`.
            return_convergence_delta: also return [N], the explained value minus the sum of an
                example's relevance: what biases, other constants and stabilizers absorbed.
            verbose: print which rule is applied to which node.

        Returns:
            Relevance of the inputs' shape, in the inputs' form; with the delta if asked for.

        Raises:
            NoRuleError: an operator on the way has no rule.
            LayerError: no relevance reaches a layer.
            InputError, TargetError, NotDifferentiableError.
        """
        return self._call(locals())

    def compute_convergence_delta(self, attributions: Any, output: Any) -> np.ndarray:
        """The explained value minus the sum of each example's relevance.

        Args:
            attributions: one array or several, [N, ...] each.
            output: the explained value of each example, [N].

        Returns:
            float64 [N].
        """
        if isinstance(attributions, dict):
            attributions = tuple(attributions.values())
        parts = attributions if isinstance(attributions, tuple | list) else (attributions,)
        rows = [np.asarray(a, np.float64) for a in parts]
        return np.ravel(output) - sum(a.reshape(len(a), -1).sum(1) for a in rows)

    def _attribute(self, question: Question, verbose: bool = False) -> Any:
        return self._run(question, verbose)[0]

    def _with_delta(self, question: Question, verbose: bool = False) -> tuple[Any, Any]:
        relevance, output = self._run(question, verbose)
        if isinstance(relevance, list):
            return relevance, [self._gap(question, r, output) for r in relevance]
        return relevance, self._gap(question, relevance, output)

    def explain(self, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
        question, options, _ = self._parse({**arguments, "return_convergence_delta": False})
        relevance, delta = self._with_delta(question, **options)
        if isinstance(delta, list):
            delta = delta[int(np.argmax([np.abs(d).max(initial=0) for d in delta]))]
        return relevance, {"convergence_delta": delta}
