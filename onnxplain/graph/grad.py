"""Reverse-mode differentiation of an ONNX graph: the walk, and only the walk.

The walk knows no operator. It finds the nodes between ``of`` and ``wrt``, visits them backwards,
asks the injected rules for cotangents, and alone handles zeros, absent gradients, accumulation over
fan-out, un-broadcasting, dtypes and arity. What it emits are standard operators that have rules
themselves, so its result can be differentiated again.

Integers between a quantizer and a dequantizer stand for real numbers: the gradient runs through
them, as float32 in steps of the integer, and rules see them as float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxplain.errors import LayerError, NoRuleError, NotDifferentiableError
from onnxplain.graph import functions
from onnxplain.graph.edit import clone, prune, reads, value_index
from onnxplain.graph.emit import Call, Emitter, const_array, is_float
from onnxplain.rules import Rules, apply
from onnxplain.rules.vjp import NO_DERIVATIVE, VJP

_PERTURB = (
    "Explain with respect to a layer behind it, or use a perturbation method, which needs no "
    "gradient"
)

# What quantized integers, and sums of their products, are stored in.
QUANTIZED = frozenset(
    ir.DataType[name]
    for name in (
        "INT2 INT4 INT8 INT16 INT32 UINT2 UINT4 UINT8 UINT16 "
        "FLOAT4E2M1 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ"
    ).split()
    if name in ir.DataType.__members__
)


def backward(
    op: Emitter,
    seeds: Mapping[ir.Value, ir.Value],
    wrt: Sequence[ir.Value],
    rules: Rules = VJP,
    opset: int = 21,
    reference: Mapping[ir.Value, ir.Value] | None = None,
) -> list[ir.Value]:
    """Emit the vector-Jacobian product of ``seeds`` with respect to ``wrt`` into ``op.graph``.

    Args:
        op: writes into the graph that holds the forward nodes.
        seeds: the cotangent of each explained value, of its dtype and shape.
        wrt: floating-point values of the graph: inputs or intermediates.
        rules: derivative rules, first match wins.
        opset: the graph's version of the standard operators.
        reference: the twin of each value in a second forward pass, for rules that compare the two
            (DeepLIFT). Function bodies must be expanded before that pass is made:
            :func:`expand_functions`.

    Returns:
        One value per entry of ``wrt``, of its dtype and shape.

    Raises:
        NotDifferentiableError: only operators without derivative join the two.
        LayerError: an entry of ``wrt`` does not influence any seed.
        NoRuleError: an operator between the two has neither rule nor function body.
    """
    of = list(seeds)
    active = expand_functions(op.graph, of, wrt, rules)
    _check_connected(op.graph, of, wrt, active)
    cotangents: dict[ir.Value, list[ir.Value]] = {}
    for value, seed in seeds.items():
        cotangents.setdefault(value, []).append(seed)

    for node in reversed(active.nodes):
        if not any(out in cotangents for out in node.outputs):
            continue
        rule = rules.find(node)
        assert rule is not None  # expand_functions refused otherwise
        sources, results = active.ends[node]
        wanted = [v in active.values and v in sources for v in node.inputs]
        call = Call(node, opset, wanted, reference)
        if any(v.dtype in QUANTIZED for v in (*sources, *results)):
            # int32 may also be an index.
            twins = dict(zip((*node.inputs, *node.outputs), (*call.x0, *call.y0), strict=True))
            for v in {*reads(node), *node.outputs}:
                if v in active.values or v.dtype != ir.DataType.INT32:
                    real, twin = _real(op, v), twins.get(v, v)
                    call.replace(v, real, real if twin is v else _real(op, twin))
        gs = [
            _total(op, cotangents, out) if out in cotangents else op.full_like(y, 0.0)
            for out, y in zip(node.outputs, call.y, strict=True)
            if out in results
        ]
        for i, g in apply(op, rule, call, gs):
            cotangents.setdefault(node.inputs[i], []).append(g)  # type: ignore[arg-type]
    return [_total(op, cotangents, value) for value in wrt]


def differentiate(
    model: ir.Model, of: ir.Value, wrt: Sequence[ir.Value], rules: Rules = VJP
) -> ir.Model:
    """The backward graph as a model of its own.

    Inputs: those of ``model`` and ``cotangent`` (dtype and shape of ``of``). Outputs: ``of`` and
    one ``NAME.grad`` per value of ``wrt`` (underscores follow where that name is taken, as in a
    second derivative). Errors as :func:`backward`.
    """
    model, (of, *wrt) = clone(model, [of, *wrt])
    graph = model.graph
    op = Emitter(graph, "grad")
    seed = ir.Value(name=_free(graph, "cotangent"), type=of.type, shape=of.shape)
    graph.inputs.append(seed)
    grads = backward(op, {of: seed}, wrt, rules, graph.opset_imports.get("", 1))
    graph.outputs[:] = [of]
    for value, grad in zip(wrt, grads, strict=True):
        out = op.Identity(grad)
        out.name = _free(graph, f"{value.name}.grad")
        out.type, out.shape = value.type, value.shape
        graph.outputs.append(out)
    prune(model)
    return model


def _free(graph: ir.Graph, name: str) -> str:
    """``name``, with underscores behind it until no value has it."""
    taken = value_index(graph)
    while name in taken:
        name += "_"
    return name


class Active:
    """Nodes and values through which a differentiable path from ``wrt`` to ``of`` runs.

    ``ends`` holds, for each of these nodes, the inputs and outputs that can carry a gradient.
    """

    def __init__(
        self, graph: ir.Graph, of: Sequence[ir.Value], wrt: Sequence[ir.Value], rules: Rules
    ) -> None:
        reached: set[ir.Value] = set(wrt)
        self.ends: dict[ir.Node, tuple[list[ir.Value], list[ir.Value]]] = {}
        for node in graph:
            if (node.domain, node.op_type) in NO_DERIVATIVE:
                continue
            rule = rules.find(node)
            quantizes = rule is not None and rule.quantizes
            sources = list(reads(node))[: 1 if quantizes else None]
            if rule is not None and rule.operands is not None:
                sources = [v for i in rule.operands if (v := node.inputs[i]) is not None]
            if any(v in reached for v in sources):
                integers = quantizes or any(v in reached and not is_float(v) for v in sources)
                outs = [
                    v
                    for v in node.outputs[: 1 if quantizes else None]
                    if v.name and (is_float(v) or (integers and v.dtype in QUANTIZED))
                ]
                if outs:
                    reached.update(outs)
                    self.ends[node] = sources, outs
        needed: set[ir.Value] = set(of)
        self.nodes: list[ir.Node] = []
        for node in reversed(self.ends):
            sources, outs = self.ends[node]
            if any(v in needed for v in outs):
                needed.update(v for v in sources if v in reached)
                self.nodes.append(node)
        self.nodes.reverse()
        self.values = needed & reached


def _real(op: Emitter, value: ir.Value) -> ir.Value:
    """An integer that may stand for a real number as float32; anything else as it is."""
    if value.dtype not in QUANTIZED:
        return value
    constant = const_array(value)
    if constant is not None:
        return op.const(constant.astype(np.float32))
    real: ir.Value = op.Cast(value, to=ir.DataType.FLOAT)
    real.shape = value.shape
    return real


def expand_functions(
    graph: ir.Graph, of: Sequence[ir.Value], wrt: Sequence[ir.Value], rules: Rules = VJP
) -> Active:
    """Replace active operators that have no rule by their function bodies, until all have one.

    Raises:
        NoRuleError: an operator has neither.
    """
    while True:
        active = Active(graph, of, wrt, rules)
        found = ((n, rules.find(n)) for n in active.nodes)
        missing = [n for n, rule in found if rule is None or rule.expands]
        if not missing:
            return active
        for node in missing:
            if not functions.expand(graph, node):
                kind, instead = "derivative rule", _PERTURB
                if VJP.find(node) is not None:
                    kind, instead = f"{rules.tables[-1].name} rule", rules.tables[-1].instead
                raise NoRuleError(
                    f"operator {node.op_type} (domain '{node.domain or 'ai.onnx'}', node "
                    f"'{node.name}') between '{of[0].name}' and '{wrt[0].name}' has no {kind} and "
                    f"no function body. {instead or _PERTURB}"
                )


def check_path(
    graph: ir.Graph, of: Sequence[ir.Value], wrt: Sequence[ir.Value], rules: Rules = VJP
) -> None:
    """Refuse, as :func:`backward` does, when no differentiable path joins ``wrt`` and ``of``."""
    _check_connected(graph, of, wrt, Active(graph, of, wrt, rules))


def _check_connected(
    graph: ir.Graph, of: Sequence[ir.Value], wrt: Sequence[ir.Value], active: Active
) -> None:
    for value in wrt:
        if not is_float(value):
            raise NotDifferentiableError(
                f"'{value.name}' has dtype {value.dtype}, which can't carry a gradient; explain "
                "with respect to the layer that turns it into numbers (an embedding)"
            )
        if value in active.values and any(v in active.values for v in of):
            continue
        reached, blocked = {value}, []
        for node in graph:
            if any(v in reached for v in reads(node)):
                reached.update(node.outputs)
                if (node.domain, node.op_type) in NO_DERIVATIVE:
                    blocked.append(node)
        if not any(v in reached for v in of):
            raise LayerError(
                f"'{of[0].name}' does not depend on '{value.name}': there is nothing to explain "
                "between them; choose a layer on the way to the explained value"
            )
        names = ", ".join(sorted({n.op_type for n in blocked})) or "casts to integers"
        raise NotDifferentiableError(
            f"no differentiable path joins '{value.name}' and '{of[0].name}': every path passes "
            f"an operator without derivative ({names}). Gradient methods can't explain this "
            "model; use a perturbation method"
        )


def _total(op: Emitter, cotangents: dict[ir.Value, list[ir.Value]], value: ir.Value) -> ir.Value:
    """The accumulated cotangent of a value (kept, so that it is summed once)."""
    parts = cotangents[value]
    total = parts[0]
    for part in parts[1:]:
        total = op.Add(total, part)
        total.shape = value.shape
    cotangents[value] = [total]
    return total
