"""Layer names: a value, a node, or the framework's own scope as the exporter recorded it."""

from __future__ import annotations

import ast
import difflib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
    if ";" in name:
        name = _own_part(name, node.op_type)
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


def _own_part(name: str, op_type: str) -> str:
    """Of the layers that TensorFlow Lite fused into one name, the one whose work a node does.

    ``model/act/Relu;model/conv/BiasAdd;model/conv/Conv2D`` names a convolution; its Relu is another
    node. Kernels are no guide to the layer, since equal constants share one name; biases are.
    """
    parts = name.split(";")
    wanted = {"BiasAdd"} if op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") else {op_type}
    for part in parts:
        last = part.rpartition("/")[2]
        if last in wanted or last.lower() == op_type.lower():
            return part
    return ""


def _qualify(path: str, part: str) -> str:
    """``layer4`` + ``layer4.1`` is ``layer4.1``; ``a.blocks`` + ``blocks.0`` is ``a.blocks.0``."""
    if not path:
        return part
    head, _, tail = part.rpartition(".")
    if head and (path == head or path.endswith("." + head)):
        return f"{path}.{tail}"
    return f"{path}.{part}"


class Names:
    """Finds values by value name, node name or scope.

    Args:
        graph: the graph.
        aliases: value names that are gone, and the value that stands for each; ``scope#0`` is a
            call of a scope of which no node is left.
    """

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
        self._gone: dict[str, list[ir.Value]] = {}
        present = dict(self._values)
        for alias, name in (aliases or {}).items():
            scope, _, call = alias.rpartition("#")
            if name not in present:
                continue
            if scope and call.isdecimal():
                self._gone.setdefault(scope, []).append(present[name])
            else:
                self._values.setdefault(alias, present[name])

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
            name: value, node or scope; ``scope#1`` is the second call of a reused module. A model
                input keeps its name before a scope.
            entering: the values that enter the layer instead of those that leave it.

        Raises:
            LayerError: unknown or ambiguous; the message names the nearest candidates.
        """
        if not isinstance(name, str):
            raise LayerError(
                f"a layer is named by a string, not by {type(name).__name__} ({name!r}); "
                "model.layers() lists the names"
            )
        if name not in self._values and name not in self._nodes:
            return self._of_scope(name, entering)
        value = self._values[name] if name in self._values else self._nodes[name].outputs[0]
        if name in self._scopes or name in self._gone:
            self._check_unambiguous(name, value, entering)
        if not entering:
            return (value,)
        node = value.producer()
        if node is None:
            raise LayerError(f"'{name}' is a model input: nothing enters it")
        return self._inputs([node], name)

    def unique(self, value: ir.Value) -> str | None:
        """A name of a value that no scope has, if there is one."""
        node = value.producer()
        names = [value.name]
        if node is not None and node.outputs[0] is value:
            names.append(node.name)
        for name in filter(None, names):
            taken = self._values.get(name, value) is not value
            if not taken and name not in self._scopes and name not in self._gone:
                return name
        return None

    def _check_unambiguous(self, name: str, value: ir.Value, entering: bool) -> None:
        """Refuse a name of a value that is also that of a scope and means something else there."""
        node = value.producer()
        if node is None:
            warnings.warn(
                f"'{name}' is taken for the model input; the module of that name is '{name}#0'",
                stacklevel=4,
            )
            return
        calls = self._calls(name)
        module = self._side(calls[-1], name, entering)
        if module == (self._inputs([node], name) if entering else (value,)):
            return
        other = self.unique(value)
        raise LayerError(
            f"'{name}' is ambiguous: a module and a value of the graph (of {node.op_type} node "
            f"'{node.name}') have this name. Write '{name}#{len(calls) - 1}' for the module"
            + (f" and '{other}' for the value" if other else "; the value has no other name")
        )

    def _of_scope(self, name: str, entering: bool) -> tuple[ir.Value, ...]:
        """What leaves or enters the call of a scope that ``name`` means."""
        stem, mark, number = name.partition("#")
        scope = self._scope(stem, name)
        if mark and not number.isdecimal():
            raise self._unknown(name)
        calls = self._calls(scope)
        if not mark:
            self._warn_of_others(scope, len(calls))
        elif int(number) >= len(calls):
            raise LayerError(
                f"layer '{name}': scope '{scope}' is entered {len(calls)} time(s); "
                f"'{scope}#{len(calls) - 1}' is its last call"
            )
        return self._side(calls[int(number) if mark else -1], name, entering)

    def _calls(self, scope: str) -> Sequence[Sequence[ir.Node] | ir.Value]:
        """The nodes of each call of a scope; the value that a call of removed nodes hands on."""
        if scope not in self._scopes:
            return self._gone[scope]
        calls = _split_calls(self._scopes[scope])
        return calls + [
            call
            for later in self._numbered(scope, calls[0], weighted=True)
            for call in _split_calls(self._scopes[later])
        ]

    def _numbered(self, scope: str, call: Sequence[ir.Node], *, weighted: bool) -> list[str]:
        """``scope_1``, ...: what PyTorch's TorchScript exporter names a module's later calls.

        Modules of their own can have such names too, so those with weights must share them.
        """
        if _has_weights(call) != weighted:
            return []
        return [
            other
            for other, nodes in self._scopes.items()
            if other.startswith(f"{scope}_")
            and other[len(scope) + 1 :].isdecimal()
            and _alike(call, _split_calls(nodes)[0])
        ]

    def _warn_of_others(self, scope: str, calls: int) -> None:
        if calls > 1:
            others = ", ".join(f"'{scope}#{i}'" for i in range(calls - 1))
            warnings.warn(
                f"layer '{scope}' is entered {calls} times; its last call is used "
                f"(the others are {others})",
                stacklevel=4,
            )
        nodes = self._scopes.get(scope, [])
        if nodes and (nodes[0].name or "").startswith("/"):
            for other in self._numbered(scope, _split_calls(nodes)[0], weighted=False):
                warnings.warn(
                    f"layer '{other}' looks like a later call of '{scope}', whose first call is "
                    f"used; name '{other}' for that one",
                    stacklevel=4,
                )

    def _scope(self, stem: str, name: str) -> str:
        known = [*self._scopes, *self._gone]
        if stem in known:
            return stem
        ending = [s for s in known if s.endswith(("/" + stem, "." + stem))]
        if len(ending) == 1:
            return ending[0]
        if ending:
            raise LayerError(
                f"layer '{name}' is ambiguous: it could be {', '.join(sorted(ending)[:8])}; "
                "give the full name"
            )
        raise self._unknown(name)

    def _unknown(self, name: str) -> LayerError:
        stem = name.partition("#")[0]
        known = [*self._scopes, *self._gone, *self._values, *self._nodes]
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        near += [k for k in known if stem and stem in k and k not in near][: 4 - len(near)]
        hint = f"did you mean {', '.join(repr(n) for n in near)}? " if near else ""
        return LayerError(f"no layer '{name}' in the model; {hint}model.layers() lists all names")

    def _side(
        self, call: Sequence[ir.Node] | ir.Value, name: str, entering: bool
    ) -> tuple[ir.Value, ...]:
        if isinstance(call, ir.Value):
            return (call,)
        return self._inputs(call, name) if entering else self._outputs(call)

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

    Nodes that values connect belong to one call, unless they are a sequence that repeats with the
    same weights: then a call feeds the next. Groups that are alike (same operators, same weights,
    same modules within) are calls; else they are branches of one call.
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
    calls = [call for group in groups.values() for call in _repeats(group)]
    alike = all(_alike(calls[0], call) and _within(calls[0]) == _within(call) for call in calls)
    return calls if alike else [list(nodes)]


def _repeats(nodes: list[ir.Node]) -> list[list[ir.Node]]:
    """The shortest sequence with weights that the nodes repeat, as often as they do."""
    for size in range(1, len(nodes) // 2 + 1):
        if len(nodes) % size:
            continue
        parts = [nodes[i : i + size] for i in range(0, len(nodes), size)]
        if _has_weights(parts[0]) and all(_alike(parts[0], part) for part in parts):
            return parts
    return [nodes]


def _alike(a: Sequence[ir.Node], b: Sequence[ir.Node]) -> bool:
    """Whether two sequences of nodes have the same operators and the same weights."""
    if [n.op_identifier() for n in a] != [n.op_identifier() for n in b]:
        return False
    ours, theirs = _weights(a), _weights(b)
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _within(nodes: Sequence[ir.Node]) -> list[tuple[str, ...]]:
    """The scopes of each node: two modules side by side differ, two calls of one do not.

    Without the ``_1`` that PyTorch's TorchScript exporter gives to later calls of inner modules.
    """
    return [tuple(re.sub(r"_\d+(?=\.|$)", "", s) for s in scopes(node)) for node in nodes]


def _weights(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [v for node in nodes for v in node.inputs if v is not None and v.is_initializer()]


def _has_weights(nodes: Sequence[ir.Node]) -> bool:
    """Whether something learned is among the constants; numbers, sizes and axes are not."""
    sizes = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    return any(
        v.dtype not in sizes and v.shape is not None and math.prod(v.shape.numpy()) > 1
        for v in _weights(nodes)
    )


def _same(a: ir.Value, b: ir.Value) -> bool:
    """Whether two weights are equal: exporters and folding copy those of a reused module."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    ours, theirs = const_array(a), const_array(b)
    return ours is not None and theirs is not None and np.array_equal(ours, theirs)
