"""Edits of a graph: copy, prune, feed a value, a second forward pass, many rows an example."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Emitter, dims, is_float, rank
from onnxplain.rules.affine import is_affine

BATCH = "examples"
"""The symbol of the examples axis in every normalized model."""


def new_input(
    graph: ir.Graph, name: str, like: ir.Value, shape: Sequence[int | str | None]
) -> ir.Value:
    """Add a graph input of the dtype of ``like``."""
    assert like.dtype is not None
    value = ir.Value(name=name, type=ir.TensorType(like.dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def clone(model: ir.Model, values: Sequence[ir.Value] = ()) -> tuple[ir.Model, list[ir.Value]]:
    """A copy of a model that shares its weights, and the copies of some of its values."""
    names = [v.name for v in values]
    copy = model.clone()
    index = value_index(copy.graph)
    return copy, [index[n or ""] for n in names]


def value_index(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every value of a graph by its name."""
    index = {v.name or "": v for v in graph.inputs}
    index |= dict(graph.initializers)
    index |= {v.name or "": v for node in graph for v in node.outputs}
    return index


def prune(model: ir.Model) -> None:
    """Drop the nodes and weights that no output needs."""
    graph = model.graph
    keep = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(out in keep or out.uses() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if value not in keep and not value.uses() and not value.is_graph_input():
            del graph.initializers[name]


def reads(node: ir.Node) -> Iterable[ir.Value]:
    """Values a node reads, those captured by its subgraphs included."""
    yield from (v for v in node.inputs if v is not None)
    for attr in node.attributes.values():
        graphs: Iterable[ir.Graph] = ()
        if attr.type == ir.AttributeType.GRAPH:
            graphs = (attr.as_graph(),)
        elif attr.type == ir.AttributeType.GRAPHS:
            graphs = attr.as_graphs()
        for graph in graphs:
            inner = set(graph.inputs) | set(graph.initializers.values())
            inner |= {v for n in graph for v in n.outputs}
            yield from (v for n in graph for v in reads(n) if v not in inner)
            yield from (v for v in graph.outputs if v not in inner)


def nodes_within(node: ir.Node) -> Iterable[ir.Node]:
    """A node and the nodes of its subgraphs."""
    yield node
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            for inner in attr.as_graph():
                yield from nodes_within(inner)
        elif attr.type == ir.AttributeType.GRAPHS:
            for graph in attr.as_graphs():
                for inner in graph:
                    yield from nodes_within(inner)


def feed(nodes: Iterable[ir.Node], values: Mapping[ir.Value, ir.Value]) -> None:
    """Let ``nodes`` read other values: each key is replaced by its value."""
    for top in nodes:
        for node in nodes_within(top):
            for i, v in enumerate(node.inputs):
                if v is not None and v in values:
                    node.replace_input_with(i, values[v])


def downstream(graph: ir.Graph, sources: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on any of the sources, in order."""
    reached, found = set(sources), []
    for node in graph:
        if any(v in reached for v in reads(node)):
            reached.update(node.outputs)
            found.append(node)
    return found


def upstream(
    graph: ir.Graph, values: Iterable[ir.Value], stop: Collection[ir.Value] = ()
) -> list[ir.Node]:
    """The nodes that any of the values depends on, in order; not what only ``stop`` depends on."""
    needed, found = {v for v in values if v not in stop}, []
    for node in reversed(list(graph)):
        if any(v in needed for v in node.outputs):
            needed.update(v for v in reads(node) if v not in stop)
            found.append(node)
    return found[::-1]


def twin(
    op: Emitter,
    values: Sequence[ir.Value],
    replaced: Mapping[ir.Value, ir.Value],
    copies: dict[ir.Value, ir.Value] | None = None,
) -> list[ir.Value]:
    """A second forward pass: copies of ``values`` computed from other inputs.

    Only what depends on a replaced value is copied; the rest is shared. ``copies`` receives the
    copy of every value that has one.
    """
    copies = {} if copies is None else copies
    copies.update(replaced)
    nodes = set(upstream(op.graph, values))
    for node in downstream(op.graph, replaced):
        if node in nodes and not all(v in replaced for v in node.outputs):
            copies.update(copy_node(op, node, copies))
    return [copies.get(v, v) for v in values]


def copy_node(
    op: Emitter, node: ir.Node, values: Mapping[ir.Value, ir.Value]
) -> dict[ir.Value, ir.Value]:
    """Append a copy of a node that reads other values; returns its outputs by the originals."""
    attributes = [
        ir.Attr(a.name, a.type, a.as_graph().clone(allow_outer_scope_values=True))
        if a.type == ir.AttributeType.GRAPH
        else a
        for a in node.attributes.values()
    ]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [values.get(v, v) if v is not None else None for v in node.inputs],
        attributes,
        num_outputs=len(node.outputs),
        overload=node.overload,
        name=op.name(node.op_type),
    )
    for inner in nodes_within(copy):
        feed([inner], values)
    outputs = {}
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = op.name(old.name) if old.name else ""
        new.type, new.shape = old.type, old.shape
        outputs[old] = new
    op.graph.append(copy)
    return outputs


def stack_rows(op: Emitter, wide: ir.Value, like: ir.Value) -> ir.Value:
    """``[S, N, ...] -> [S * N, ...]``; ``like`` has the trailing dimensions."""
    out = op.Reshape(wide, _with_trailing(op, [op.const(np.asarray([-1], np.int64))], like))
    # Behind the rewrite the examples symbol stands for the new number of rows, everywhere alike.
    out.type, out.shape = like.type, like.shape
    return out


def unstack_rows(op: Emitter, stacked: ir.Value, times: ir.Value, like: ir.Value) -> ir.Value:
    """``[S * N, ...] -> [S, N, ...]``."""
    lead = [times, op.const(np.asarray([-1], np.int64))]
    return op.Reshape(stacked, _with_trailing(op, lead, like))


def _with_trailing(op: Emitter, lead: Sequence[ir.Value], like: ir.Value) -> ir.Value:
    trailing = dims(like)[1:]
    if all(isinstance(d, int) for d in trailing):
        tail = op.const(np.asarray(trailing, np.int64))
    else:
        tail = op.Shape(like, start=1)
    return op.Concat(*lead, tail, axis=0)


def has_rows(value: ir.Value) -> bool:
    """Whether a value's first axis is known to count the examples."""
    return value.shape is not None and dims(value)[:1] == (BATCH,)


def affine_frontier(
    graph: ir.Graph, sources: Sequence[ir.Value], of: Sequence[ir.Value]
) -> list[ir.Value]:
    """Where the affine part behind ``sources`` ends on the way to ``of``, at the latest there.

    Every path from a source to a value of ``of`` passes exactly one of these values, each is an
    affine function of the sources, and each has one row per example.
    """
    needed = set(upstream(graph, of))
    behind = [n for n in downstream(graph, sources) if n in needed]
    depends = set(sources) | {v for n in behind for v in n.outputs}
    fed = {v for n in downstream(graph, graph.inputs) for v in n.outputs} | set(graph.inputs)
    cut = set(of)  # and values of whose consumers one is not affine
    while True:
        affine = set(sources)
        found: dict[ir.Value, None] = {}
        for node in behind:
            varying = [i for i, v in enumerate(node.inputs) if v in depends]
            given = {v for v in reads(node) if v in depends and is_float(v)}
            if (
                is_affine(node, varying)
                and given <= affine
                and not given & cut
                and not any(v in fed and v not in depends for v in reads(node))
                and all(is_float(v) and has_rows(v) for v in node.outputs)
            ):
                affine.update(node.outputs)
            else:
                found.update((v, None) for v in node.inputs if v in given and v in affine)
        found.update((v, None) for v in of if v in affine)
        if found.keys() <= cut:
            return list(found)
        cut.update(found)


# Arguments that decide the layout of a result and not what is in it.
_LAYOUT = {"Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,)}


def row_values(graph: ir.Graph) -> tuple[set[ir.Value], set[ir.Value]]:
    """Values that depend on the examples, and those that depend on how many there are.

    The latter in what they hold, not only in their layout: shape arithmetic, row numbers.
    """
    inputs = {v for v in graph.inputs if BATCH in dims(v)}
    dependent = inputs | {v for n in downstream(graph, inputs) for v in n.outputs}
    found: set[ir.Value] = set()
    for node in graph:
        if node.op_type in ("Shape", "Size") and not node.domain:
            counts = node.inputs[0] in dependent
        else:
            layout = _LAYOUT.get(node.op_type, ()) if not node.domain else ()
            ignored = {node.inputs[i] for i in layout if i < len(node.inputs)}
            content = {v for i, v in enumerate(node.inputs) if i not in layout}
            counts = any(v in found for v in reads(node) if v in content or v not in ignored)
        if counts:
            found.update(node.outputs)
    return dependent, found


class Rows:
    """A copy of the part of a graph behind some values that runs with several rows an example.

    Everything between the keys of ``fed`` and ``of`` is copied and reads the new values instead,
    which hold ``times`` whole batches one after the other. What reaches that part by another way
    is computed once and repeated; what counts the rows (shape arithmetic, row numbers) is computed
    anew for the new number. ``self.of`` are the copies of ``of``.
    """

    def __init__(
        self, op: Emitter, of: Sequence[ir.Value], fed: Mapping[ir.Value, ir.Value], times: ir.Value
    ) -> None:
        self._op, self._times = op, times
        graph = op.graph
        needed = set(upstream(graph, of, stop=fed.keys()))
        behind = [n for n in downstream(graph, fed) if n in needed]
        self._row_dependent, self._counting = row_values(graph)
        self._copies: dict[ir.Value, ir.Value] = dict(fed)
        for node in behind:
            values = {v: self._lift(v) for v in reads(node)}
            self._copies.update(copy_node(op, node, values))
        self.of = [self._copies[v] for v in of]

    def _lift(self, value: ir.Value) -> ir.Value:
        if value not in self._copies:
            if value not in self._row_dependent:
                return value
            self._copies[value] = self._rows_of(value)
        return self._copies[value]

    def _rows_of(self, value: ir.Value) -> ir.Value:
        op, node = self._op, value.producer()
        if has_rows(value) and value not in self._counting:
            ones = np.ones(rank(value) - 1, np.int64)
            out = op.Tile(value, op.Concat(self._times, ones, axis=0))
            out.type, out.shape = value.type, value.shape
            return out
        if node is None:
            raise UnsupportedModelError(
                f"input '{value.name}' has its examples axis elsewhere than first, so the model "
                "can't be run with several rows an example; export it with the examples axis first"
            )
        if node.op_type == "Shape" and node.inputs[0] is not None and has_rows(node.inputs[0]):
            source = node.inputs[0]
            ones = np.ones(rank(source) - 1, np.int64)
            full = op.Mul(op.Shape(source), op.Concat(self._times, ones, axis=0))
            start = node.attributes["start"].as_int() if "start" in node.attributes else 0
            end = node.attributes["end"].as_int() if "end" in node.attributes else rank(source)
            return op.Slice(full, [start], [end])
        copies = copy_node(op, node, {v: self._lift(v) for v in reads(node)})
        self._copies.update(copies)
        return copies[value]
