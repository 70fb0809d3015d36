"""Layer-wise relevance propagation: one walk back that carries relevance."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError
from onnxplain.graph.edit import BATCH, new_input, upstream
from onnxplain.graph.emit import Emitter, const_array, dims, is_float, rank
from onnxplain.graph.grad import Active, backward, check_path, expand_functions
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
    Preset,
    Propagation,
    PropagationRule,
    Selector,
    preset,
)
from onnxplain.run.feeds import Arrays

RuleList = Sequence[tuple[Selector, PropagationRule]]

_INSTEAD = (
    "Choose a rule for it, rules=[(its operator, ox.lrp.Epsilon()), ...]; explain with respect to "
    "a layer behind it; or use IntegratedGradients, which takes its derivative"
)


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
            that are reached first from what is explained), a predicate on the ``onnx_ir.Node``, or
            a list of names. The rule must fit some node of each layer, and some node of the
            operator types; other nodes that match are passed over.
        of, wrt: names of layers, see :class:`Attribution`.

    Raises:
        LayerError: a selector names nothing in the model, or none of the rules matches a layer.
        InputError: not a preset, a list of pairs, or a rule; no rule at all.

    Source: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by
    Layer-Wise Relevance Propagation", PLoS ONE 10(7), 2015, e0130140. Unit: output.
    """

    name = "lrp"
    title = "LRP"
    paper = "Bach et al. 2015, doi:10.1371/journal.pone.0130140"
    choices: ClassVar = {"rules": PRESETS}
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
        self._entries = [e for pair in self.rules for e in self._of_pair(pair)]
        nodes = list(model.graph.graph)
        if self.rules and not any(
            n.op_type in LINEAR if e.selects is None else e.selects(n)
            for e in self._entries
            for n in nodes
        ):
            kinds = ", ".join(sorted({n.op_type for n in nodes}))
            raise LayerError(
                "none of the rules is for a layer of this model; select by its operators "
                f"({kinds}), by names from model.layers(), or by 'first'"
            )

    def _of_pair(self, pair: tuple[Selector, PropagationRule]) -> list[Entry]:
        """A rule with what its selector picks: the operators of a list together, layers alone."""
        selector, rule = pair
        if callable(selector):
            found = [Entry(rule, selector, "a predicate")]
        else:
            names = [selector] if isinstance(selector, str) else selector
            present = {n.op_type for n in self.model.graph.graph}
            kinds = [k for k in names if k in present or onnx.defs.has(k)]
            found = [self._entry(name, rule) for name in names if name not in kinds]
            if kinds:
                said = ", ".join(map(repr, kinds))
                found.append(Entry(rule, lambda node: node.op_type in kinds, said))
        idle = isinstance(pair, Preset)
        return [replace(e, selector=None) for e in found] if idle else found

    def _entry(self, selector: str, rule: PropagationRule) -> Entry:
        """A rule with the layer that its selector names."""
        if selector == "first":
            return Entry(rule, None, "'first'")
        nodes = list(self.model.graph.graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all calls of a reused module are meant
            values = self.model.resolve(selector)
        named = {p.name for v in values if (p := v.producer()) is not None}
        own = {v.name for v in values} | named
        if selector not in own and "#" not in selector:
            ends = ("/" + selector, "." + selector)
            named |= {
                n.name for n in nodes if any(s == selector or s.endswith(ends) for s in scopes(n))
            }
        if not named:
            raise LayerError(f"'{selector}' is a model input: no layer has this name")
        return Entry(rule, lambda node: node.name in named, f"layer '{selector}'", named=True)

    def has_convergence_delta(self) -> bool:
        """True."""
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
            verbose: print which rule is applied to which node, to the standard error stream.

        Returns:
            Relevance of the inputs' shape, in the inputs' form; with the delta if asked for.

        Raises:
            NoRuleError: an operator on the way has no rule.
            LayerError: no relevance reaches a layer.
            InputError: a rule fits none of the nodes that it was chosen for; or the inputs.
            TargetError, NotDifferentiableError.
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
        return question.answer(self._run(question, verbose)[:-1])

    def _with_delta(self, question: Question, verbose: bool = False) -> tuple[Any, Any]:
        *relevance, output = self._run(question, verbose)
        gaps = self._gaps(question, relevance, output)
        return question.answer(relevance), gaps if question.form == "list" else gaps[0]

    def _with_checks(
        self, question: Question, verbose: bool = False
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """The relevance, and how much of the explained value it misses: biases absorb some."""
        *relevance, output = self._run(question, verbose)
        gap = max(self._gaps(question, relevance, output), key=lambda g: float(np.abs(g).sum()))
        absorbed = np.abs(gap) / np.maximum(np.abs(output), 1e-12)
        return question.answer(relevance), {"convergence_delta": gap, "absorbed": absorbed}

    def _gaps(
        self, question: Question, relevance: Sequence[np.ndarray], output: np.ndarray
    ) -> list[np.ndarray]:
        """The convergence delta for each group of sources: all inputs, or each named layer."""
        sums = []
        for value, array in zip(question.wrt, relevance, strict=True):
            axis = 0
            if question.groups is not None and value.shape is not None and BATCH in dims(value):
                axis = dims(value).index(BATCH)
            rows = np.moveaxis(array, axis, 0).reshape(len(output), -1)
            sums.append(rows.sum(axis=1, dtype=np.float64))
        ends = np.cumsum(question.groups or [len(sums)])
        return [output - sum(g) for g in np.split(np.stack(sums), ends[:-1])]

    def _run(self, question: Question, verbose: bool = False) -> list[np.ndarray]:
        """The relevance of each source, and the explained value of each example [N]."""
        if verbose:
            copy, (of, *wrt) = self.model.rewriting(question.of, *question.wrt, exact=False)
            seed = new_input(copy.graph, self._fed("cotangent"), of, dims(of))
            self._write(Emitter(copy.graph, "explain"), of, seed, wrt, _print)
        key = ("lrp", *((s if isinstance(s, str) else _frozen(s), r.key) for s, r in self.rules))
        return self._pass(question, (key, question.at_once), self._write, exact=False)

    def _write(
        self,
        op: Emitter,
        of: ir.Value,
        seed: ir.Value,
        wrt: Sequence[ir.Value],
        log: Callable[[PropagationRule, ir.Node], None] | None = None,
    ) -> list[ir.Value]:
        known = Rules([Known(self._entries, _INSTEAD)])
        active = expand_functions(op.graph, [of], wrt, known)
        check_path(op.graph, [of], wrt, known)
        before = (v for n in upstream(op.graph, wrt) for v in n.inputs if v is not None)
        sources = [*wrt, *(v for v in before if is_float(v) and const_array(v) is None)]
        table = Propagation(
            "lrp",
            chosen=self._entries,
            nodes=active.nodes,
            values=Active(op.graph, [of], sources, known).values,
            fixed=[of, *wrt],
            log=log,
        )
        rules = Rules([table])
        reached = Active(op.graph, [of], wrt, rules).values
        gated = [v for v in wrt if v not in reached]
        if gated:
            self._warn_of_gates(of, gated, len(gated) == len(wrt))
        relevance = op.Mul(of, seed)
        relevance.shape = of.shape
        ends = [v for v in wrt if v in reached]
        found = dict(
            zip(ends, backward(op, {of: relevance}, ends, rules, self.model.opset), strict=True)
        )
        per_example = self._per_example(of)
        score = op.ReduceSum(relevance, list(range(int(per_example), rank(of))) or None)
        return [
            *(found[v] if v in found else op.full_like(v, 0.0) for v in wrt),
            op.Reshape(score, [-1]),
        ]

    def _warn_of_gates(self, of: ir.Value, gated: Sequence[ir.Value], nothing: bool) -> None:
        """Say what gets no relevance; refuse when there is nothing else."""
        names = ", ".join(f"'{v.name}'" for v in gated)
        said = (
            f"no relevance goes from '{of.name}' to {names}: on every way there is a factor that "
            "LRP holds constant, such as attention weights, a gate or a divisor. "
        )
        if nothing:
            raise LayerError(
                f"{said}Choose a layer on the way of the signal, or let factors share alike: "
                "rules=[(('MatMul', 'Mul', 'Einsum'), ox.lrp.Uniform())]"
            )
        warnings.warn(f"{said}Its relevance is zero", stacklevel=2)


def _print(rule: PropagationRule, node: ir.Node) -> None:
    print(f"Applied {rule} on layer {node.name}", file=sys.stderr)


@layer_form
class LayerLRP(LRP):
    """Layer-wise relevance propagation down to a layer (or a list of layers).

    ``return_convergence_delta`` gives one delta for each layer of a list.
    """


def _frozen(selector: Selector) -> Any:
    return selector if callable(selector) else tuple(selector)


def _checked(rules: Any) -> list[tuple[Selector, PropagationRule]]:
    """Rules as a list of pairs."""
    if rules is None:
        return []
    if not isinstance(rules, list | tuple) or not rules:
        raise InputError(
            f"rules={rules!r}: give None, a preset ({', '.join(PRESETS)}), or a list of at "
            "least one (selector, rule)"
        )
    for pair in rules:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"rules hold pairs (selector, rule), not {pair!r}")
        selector, rule = pair
        if not isinstance(rule, PropagationRule):
            hint = "; make one: Epsilon()" if isinstance(rule, type) else ""
            raise InputError(f"{rule!r} is not a rule of onnxplain.lrp, such as Epsilon(){hint}")
        parts = selector if isinstance(selector, list | tuple) else [selector]
        if not parts or not (callable(selector) or all(isinstance(p, str) for p in parts)):
            raise InputError(
                f"selector {selector!r} is not a layer's name, an operator type, 'first', a list "
                "of these, or a predicate on the node"
            )
    return [pair if isinstance(pair, Preset) else (pair[0], pair[1]) for pair in rules]
