"""Outputs of scikit-learn style models: sequences of maps unwrapped, the explained one chosen."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxplain.errors import InputError, UnsupportedModelError
from onnxplain.graph.emit import is_float


def unwrap_zipmaps(model: ir.Model) -> dict[str, list[str]]:
    """Replace every output made by ZipMap by the array behind it; returns the labels by output."""
    graph = model.graph
    labels: dict[str, list[str]] = {}
    for i, output in enumerate(graph.outputs):
        node = output.producer()
        if node is None or node.op_type != "ZipMap":
            continue
        source = node.inputs[0]
        assert source is not None
        for key in ("classlabels_strings", "classlabels_int64s"):
            if key in node.attributes:
                labels[output.name or ""] = [
                    v.decode() if isinstance(v, bytes) else str(v)
                    for v in node.attributes[key].value
                ]
        name = output.name
        output.name = f"{name}.maps"
        graph.outputs[i] = source
        if source.name != name:
            source.name = name
        if not output.uses():
            graph.remove(node, safe=False)
    return labels


def drop_unusable(model: ir.Model) -> None:
    """Forget outputs that are no tensors (sequences, maps, optionals)."""
    graph = model.graph
    graph.outputs[:] = [
        v for v in graph.outputs if v.type is None or isinstance(v.type, ir.TensorType)
    ]


def choose(model: ir.Model, wanted: str | None) -> ir.Value:
    """The output to explain: the named one, or the first floating-point one."""
    by_name: Mapping[str, ir.Value] = {v.name or "": v for v in model.graph.outputs}
    listed = (
        ", ".join(f"{n} ({v.dtype.name.lower() if v.dtype else '?'})" for n, v in by_name.items())
        or "none"
    )
    if wanted is not None:
        if wanted not in by_name:
            raise InputError(f"output '{wanted}' is not in the model; its outputs are: {listed}")
        if not is_float(by_name[wanted]):
            raise UnsupportedModelError(
                f"output '{wanted}' is not floating-point, so no score can be explained; "
                f"the outputs are: {listed}"
            )
        return by_name[wanted]
    for value in by_name.values():
        if is_float(value):
            return value
    raise UnsupportedModelError(
        f"the model has no floating-point output (outputs: {listed}); a bare label can't be "
        "explained: export the model with its scores or probabilities"
    )
