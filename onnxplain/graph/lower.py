"""Exact rewrites of the forward graph that make the way back through it cheaper."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from onnxplain.graph.emit import Emitter


def sink_relu(model: ir.Model, keep: Collection[str]) -> None:
    """``MaxPool(Relu(x)) -> Relu(MaxPool(x))``, in place: the mask of the way back is smaller.

    Both are the same function, and have the same derivative: a window whose maximum is positive has
    it at the same place, any other has none. Only for the true derivative: a rule that changes what
    passes a Relu (guided backpropagation) does not commute with overlapping windows.

    Args:
        model: the graph to rewrite.
        keep: names of values that must stay.
    """
    graph = model.graph
    op = Emitter(graph, "sunk")
    changed = False
    for pool in list(graph):
        if pool.op_type != "MaxPool" or pool.domain or len(pool.outputs) > 1:
            continue
        relu = pool.inputs[0].producer() if pool.inputs[0] is not None else None
        if relu is None or relu.op_type != "Relu" or relu.domain:
            continue
        inner, outer = relu.outputs[0], pool.outputs[0]
        if inner.is_graph_output() or len(inner.uses()) > 1 or inner.name in keep:
            continue
        pool.replace_input_with(0, relu.inputs[0])
        name, outer.name = outer.name, op.name("pooled")
        after = op.Relu(outer)
        after.name, after.type, after.shape = name, outer.type, outer.shape
        for node, index in list(outer.uses()):
            if node is not after.producer():
                node.replace_input_with(index, after)
        graph.outputs[:] = [after if v is outer else v for v in graph.outputs]
        graph.remove(relu, safe=True)
        changed = True
    if changed:
        graph.sort()
