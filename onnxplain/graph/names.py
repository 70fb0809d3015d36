"""Layer names: a value, a node, or the framework's own scope as the exporter recorded it."""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxplain.errors import LayerError
from onnxplain.graph.emit import const_array, dims

_DYNAMO = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Layer:
    """What can be named as a layer: a value of the graph and where it comes from."""

    name: str
    operator: str
    shape: tuple[int | str | None, ...] | None
    scope: str | None
    dtype: str
    node: str


def scopes(node: ir.Node) -> tuple[str, ...]:
    """The framework scopes a node belongs to, outermost first.

    PyTorch's dynamo exporter writes them as metadata; its TorchScript exporter
    (``/layer4/layer4.1/conv2/Conv``) and tf2onnx (``model/dense/MatMul``) as node names.
    """
    recorded = node.metadata_props.get(_DYNAMO)
    if recorded:
        try:
            return tuple(str(s) for s in ast.literal_eval(recorded)[:-1] if s)
        except (ValueError, SyntaxError):
            return ()
    name = node.name or ""
    if "/" not in name:
        return ()
    parts = [p for p in name.split("/")[:-1] if p]
    if not name.startswith("/"):
        return tuple("/".join(parts[: i + 1]) for i in range(len(parts)))
    path, found = "", []
    for part in parts:
        path = _qualify(path, part)
        found.append(path)
    return tuple(found)


def _qualify(path: str, part: str) -> str:
    """``layer4`` + ``layer4.1`` is ``layer4.1``; ``a.blocks`` + ``blocks.0`` is ``a.blocks.0``."""
    if not path:
        return part
    head, _, tail = part.rpartition(".")
    if head and (path == head or path.endswith("." + head)):
        return f"{path}.{tail}"
    return f"{path}.{part}"


class Names:
    """Finds values by value name, node name or scope."""

    def __init__(self, graph: ir.Graph, aliases: Mapping[str, str] | None = None) -> None:
        self._graph = graph
        self._values: dict[str, ir.Value] = {v.name or "": v for v in graph.inputs}
        self._nodes: dict[str, ir.Node] = {}
        self._scopes: dict[str, list[ir.Node]] = {}
        for node in graph:
            self._nodes.setdefault(node.name or "", node)
            for value in node.outputs:
                if value.name:
                    self._values[value.name] = value
            for scope in scopes(node):
                self._scopes.setdefault(scope, []).append(node)
        for alias, name in (aliases or {}).items():
            if name in self._values:
                self._values.setdefault(alias, self._values[name])

    def layers(self) -> list[Layer]:
        """Every value that can be named, in the order in which it is computed."""
        found = []
        for node in self._graph:
            for value in node.outputs:
                if value.name:
                    inner = scopes(node)
                    found.append(
                        Layer(
                            value.name,
                            node.op_type,
                            None if value.shape is None else dims(value),
                            inner[-1] if inner else None,
                            value.dtype.name.lower() if value.dtype else "unknown",
                            node.name or "",
                        )
                    )
        return found

    def resolve(self, name: str, *, entering: bool = False) -> tuple[ir.Value, ...]:
        """The values that a layer name stands for.

        Args:
            name: value, node or scope; ``scope#1`` is the second call of a reused module.
            entering: the values that enter the layer instead of those that leave it.

        Raises:
            LayerError: unknown or ambiguous; the message names the nearest candidates.
        """
        if not isinstance(name, str):
            raise LayerError(
                f"a layer is named by a string, not by {type(name).__name__} ({name!r}); "
                "model.layers() lists the names"
            )
        if name in self._values:
            value = self._values[name]
            node = value.producer()
            if not entering:
                return (value,)
            if node is None:
                raise LayerError(f"'{name}' is a model input: nothing enters it")
            return self._inputs([node], name)
        if name in self._nodes:
            node = self._nodes[name]
            return self._inputs([node], name) if entering else (node.outputs[0],)
        calls = self._calls(name)
        return self._inputs(calls, name) if entering else self._outputs(calls)

    def _calls(self, name: str) -> list[ir.Node]:
        """The nodes of the call of a scope that ``name`` means."""
        stem, _, number = name.partition("#")
        scope = self._scope(stem, name)
        calls = _split_calls(self._scopes[scope])
        if number:
            if not number.isdigit() or int(number) >= len(calls):
                raise LayerError(
                    f"layer '{name}': scope '{scope}' is entered {len(calls)} time(s); use "
                    f"'{scope}#0' to '{scope}#{len(calls) - 1}'"
                )
            return calls[int(number)]
        if len(calls) > 1:
            others = ", ".join(f"'{scope}#{i}'" for i in range(len(calls) - 1))
            warnings.warn(
                f"layer '{scope}' is entered {len(calls)} times; its last call is used "
                f"(the others are {others})",
                stacklevel=2,
            )
        return calls[-1]

    def _scope(self, stem: str, name: str) -> str:
        if stem in self._scopes:
            return stem
        ending = [s for s in self._scopes if s.endswith(("/" + stem, "." + stem))]
        if len(ending) == 1:
            return ending[0]
        if ending:
            raise LayerError(
                f"layer '{name}' is ambiguous: it could be {', '.join(sorted(ending)[:8])}; "
                "give the full name"
            )
        known = [*self._scopes, *self._values, *self._nodes]
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        near += [k for k in known if stem and stem in k and k not in near][: 4 - len(near)]
        hint = f"did you mean {', '.join(repr(n) for n in near)}? " if near else ""
        raise LayerError(f"no layer '{name}' in the model; {hint}model.layers() lists all names")

    def _outputs(self, nodes: Sequence[ir.Node]) -> tuple[ir.Value, ...]:
        inside = set(nodes)
        left = [
            v
            for node in nodes
            for v in node.outputs
            if v.name and (v.is_graph_output() or any(u.node not in inside for u in v.uses()))
        ]
        return tuple(left) or (nodes[-1].outputs[0],)

    def _inputs(self, nodes: Sequence[ir.Node], name: str) -> tuple[ir.Value, ...]:
        inside = set(nodes)
        entered = dict.fromkeys(
            v
            for node in nodes
            for v in node.inputs
            if v is not None
            and v.producer() not in inside
            and const_array(v) is None
            and not v.is_initializer()
        )
        if not entered:
            raise LayerError(f"nothing but constants enters layer '{name}'")
        return tuple(entered)


def _split_calls(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Separate the calls of a reused module.

    Nodes that values connect belong to one call. Two unconnected groups are two calls when they
    are alike (same operators, same weights); else they are branches of one call.
    """
    parent = {node: node for node in nodes}

    def root(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in nodes:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in parent:
                a, b = root(node), root(producer)
                if a is not b:
                    parent[a] = b
    groups: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(root(node), []).append(node)

    def kind(group: Sequence[ir.Node]) -> tuple[object, ...]:
        weights = {v.name for n in group for v in n.inputs if v is not None and v.is_initializer()}
        return tuple(n.op_type for n in group), frozenset(weights)

    calls = list(groups.values())
    if len({kind(c) for c in calls}) == 1:
        return calls
    return [list(nodes)]
