"""LSTM, GRU and RNN over a known number of steps, written out in elementary operators.

Every value keeps a leading axis of length 1, which is the step or the direction: what a recurrent
operator stacks is a Concat then, and no step reshapes. Layout 1 is transposed at both ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxplain.errors import NoRuleError
from onnxplain.graph.emit import Call, Emitter, const_array, dims

# Gates, and the default activations, of each operator.
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
OPERATORS = frozenset(_GATES)

_Function = Callable[[ir.Value], ir.Value]

# What computes an activation ("" where no operator does), and its parameters with the values that
# onnxruntime takes where they are not given.
_OPERATORS: dict[str, tuple[str, dict[str, float]]] = {
    "elu": ("Elu", {"alpha": 1.0}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
    "leakyrelu": ("LeakyRelu", {"alpha": 0.01}),
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "tanh": ("Tanh", {}),
    "thresholdedrelu": ("ThresholdedRelu", {"alpha": 0.0}),
    "affine": ("", {"alpha": 0.0, "beta": 0.0}),
    "scaledtanh": ("", {"alpha": 0.0, "beta": 0.0}),
}


def body(node: ir.Node, opset: int) -> ir.Model:
    """A recurrent node as a model of elementary operators, with the inputs and outputs it has.

    Raises:
        NoRuleError: the number of steps is not known, sequences have lengths of their own, or an
            attribute (``clip``, ``input_forget``) has no counterpart here.
    """
    call = Call(node, opset, ())
    steps, directions = _sizes(call)
    given = [
        None if v is None else ir.Value(name=f"in{i}", type=v.type, shape=v.shape)
        for i, v in enumerate(node.inputs)
    ]
    graph = ir.Graph([v for v in given if v is not None], [], nodes=[], opset_imports={"": opset})
    op = Emitter(graph, "step")
    rows_first = bool(call.attr("layout"))
    x = given[0]
    assert x is not None
    if rows_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    sequences, ends = [], []
    for d in range(directions):
        direction = _Direction(op, call, given, d)
        states = list(direction.run(x, steps))
        hidden = [h for h, _ in states]
        if direction.backwards:
            hidden.reverse()
        sequences.append(op.Unsqueeze(op.Concat(*hidden, axis=0), [1]))
        ends.append(states[-1])
    written = [op.Concat(*sequences, axis=1)]
    written += [op.Concat(*(end[i] for end in ends), axis=0) for i in range(len(node.outputs) - 1)]
    if rows_first:
        written = [
            op.Transpose(v, perm=[2, 0, 1, 3] if i == 0 else [1, 0, 2])
            for i, v in enumerate(written)
        ]
    graph.outputs.extend(v for v, out in zip(written, node.outputs, strict=True) if out.name)
    return ir.Model(graph, ir_version=10)


def _sizes(call: Call) -> tuple[int, int]:
    """The number of steps and of directions; refuses what can't be written out."""

    def refuse(reason: str, advice: str = "") -> NoRuleError:
        return NoRuleError(
            f"operator {call.node.op_type} (node '{call.node.name}') can't be differentiated: "
            f"{reason}. {advice}Explain with respect to a layer behind it, or use a perturbation "
            "method, which needs no gradient"
        )

    for name in ("clip", "input_forget"):
        if call.attr(name):
            raise refuse(f"it has the attribute {name}")
    x, w = call.x[:2]
    steps = None if x.shape is None else dims(x)[1 if call.attr("layout") else 0]
    directions = None if w.shape is None else dims(w)[0]
    if not isinstance(steps, int) or not isinstance(directions, int):
        raise refuse(
            f"its number of steps is not known (x: {x.shape}, w: {w.shape})",
            "Export the model with a fixed sequence length. ",
        )
    lengths = call.const(4)
    if call.has(4) and (lengths is None or (lengths != steps).any()):
        raise refuse(
            "its sequences have lengths of their own (sequence_lens)",
            "Export the model without them. ",
        )
    return steps, directions


class _Direction:
    """One direction of a layer: its weights, activations and initial state."""

    def __init__(
        self, op: Emitter, call: Call, given: Sequence[ir.Value | None], index: int
    ) -> None:
        self.op, self.call, self.given, self.index = op, call, given, index
        self.kind = call.node.op_type
        self.gates = _GATES[self.kind]
        self.backwards = index == 1 or call.attr("direction") == "reverse"
        count = len(_ACTIVATIONS[self.kind])
        self.f = _activations(op, call)[index * count : (index + 1) * count]

    def run(self, x: ir.Value, steps: int) -> Iterator[tuple[ir.Value, ir.Value]]:
        """The hidden state and the cell, [1, N, hidden] each, after each step as they are run."""
        op = self.op
        # The part that does not depend on the state is one product for all steps.
        entering = _sum(op, op.MatMul(x, self._matrix(1, 0, self.gates)), self._bias(0, self.gates))
        parts = op.Split(entering, axis=0, num_outputs=steps, _outputs=steps)
        parts = list(parts) if steps > 1 else [parts]
        h, c = self._initial(5), self._initial(6)
        step = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self.kind]
        for part in reversed(parts) if self.backwards else parts:
            h, c = step(part, h, c)
            yield h, c

    def _lstm(
        self, x: ir.Value, h: ir.Value | None, c: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        op, (f, g, k) = self.op, self.f
        i, o, forget, new = op.Split(self._affine(x, h, 0, 4), axis=2, num_outputs=4, _outputs=4)
        i, forget = self._peep(i, c, 0), self._peep(forget, c, 2)
        kept = None if c is None else op.Mul(f(forget), c)
        c = _sum(op, op.Mul(f(i), g(new)), kept)
        return op.Mul(f(self._peep(o, c, 1)), k(c)), c

    def _gru(self, x: ir.Value, h: ir.Value | None, _: object) -> tuple[ir.Value, ir.Value]:
        op, (f, g) = self.op, self.f
        size = self._size()
        gates, new = op.Split(x, [2 * size, size], axis=2, _outputs=2)
        update, reset = op.Split(self._affine(gates, h, 0, 2), axis=2, num_outputs=2, _outputs=2)
        update, reset = f(update), f(reset)
        if self.call.attr("linear_before_reset"):
            seen = self._recurrent(h, 2, 3)
            new = _sum(op, new, None if seen is None else op.Mul(reset, seen))
        else:
            new = self._affine(new, None if h is None else op.Mul(reset, h), 2, 3)
        mixed = op.Mul(op.Sub(op.full_like(update, 1.0), update), g(new))
        h = _sum(op, mixed, None if h is None else op.Mul(update, h))
        return h, h

    def _rnn(self, x: ir.Value, h: ir.Value | None, _: object) -> tuple[ir.Value, ir.Value]:
        h = self.f[0](self._affine(x, h, 0, 1))
        return h, h

    def _affine(self, x: ir.Value, h: ir.Value | None, first: int, last: int) -> ir.Value:
        return _sum(self.op, x, self._recurrent(h, first, last))

    def _recurrent(self, h: ir.Value | None, first: int, last: int) -> ir.Value | None:
        """What the state adds to some gates; its bias alone where it is zero, None without one."""
        bias = self._bias(self.gates + first, self.gates + last)
        if h is None:
            return bias
        return _sum(self.op, self.op.MatMul(h, self._matrix(2, first, last)), bias)

    def _peep(self, gate: ir.Value, c: ir.Value | None, index: int) -> ir.Value:
        weights = self._part(7, index, index + 1)
        if weights is None or c is None:
            return gate
        added: ir.Value = self.op.Add(gate, self.op.Mul(weights, c))
        return added

    def _initial(self, index: int) -> ir.Value | None:
        """The state before the first step, [1, N, hidden]; None where it is zero."""
        constant = self.call.const(index)
        if not self.call.has(index) or (constant is not None and not constant.any()):
            return None
        axis = 1 if self.call.attr("layout") else 0
        state: ir.Value = self.op.Slice(self.given[index], [self.index], [self.index + 1], [axis])
        return self.op.Transpose(state, perm=[1, 0, 2]) if axis else state

    def _size(self) -> int:
        size = self.call.attr("hidden_size")
        return int(size if size is not None else dims(self.call.x[2])[2])  # type: ignore[arg-type]

    def _bias(self, first: int, last: int) -> ir.Value | None:
        return self._part(3, first, last)

    def _part(self, index: int, first: int, last: int) -> ir.Value | None:
        """This direction's rows of a weight, for the gates from ``first`` to before ``last``."""
        if not self.call.has(index):
            return None
        start, stop = first * self._size(), last * self._size()
        constant = self.call.const(index)
        if constant is not None:
            return self.op.const(constant[self.index, start:stop])
        weight = self.op.Gather(self.given[index], np.int64(self.index), axis=0)
        part: ir.Value = self.op.Slice(weight, [start], [stop], [0])
        return part

    def _matrix(self, index: int, first: int, last: int) -> ir.Value:
        """The same, transposed: [inputs, gates * hidden]."""
        part = self._part(index, first, last)
        assert part is not None
        constant = const_array(part)
        if constant is not None:
            return self.op.const(np.ascontiguousarray(constant.T))
        turned: ir.Value = self.op.Transpose(part, perm=[1, 0])
        return turned


def _sum(op: Emitter, value: ir.Value, other: ir.Value | None) -> ir.Value:
    return value if other is None else op.Add(value, other)


def _activations(op: Emitter, call: Call) -> list[_Function]:
    """The activations of all directions; parameters go to those that take some, in order."""
    names = call.attr("activations")
    if not names:
        both = 2 if call.attr("direction") == "bidirectional" else 1
        names = _ACTIVATIONS[call.node.op_type] * both
    given = {k: list(call.attr(f"activation_{k}") or ()) for k in ("alpha", "beta")}
    found = []
    for name in names:
        name = (name.decode() if isinstance(name, bytes) else name).lower()
        attributes = dict(_OPERATORS[name][1])
        attributes |= {k: given[k].pop(0) for k in attributes if given[k]}
        found.append(_activation(op, name, attributes))
    return found


def _activation(op: Emitter, name: str, attributes: dict[str, float]) -> _Function:
    if name == "affine":
        return lambda x: op.Add(op.Mul(x, attributes["alpha"]), attributes["beta"])
    if name == "scaledtanh":
        return lambda x: op.Mul(op.Tanh(op.Mul(x, attributes["beta"])), attributes["alpha"])
    return functools.partial(getattr(op, _OPERATORS[name][0]), **attributes)
