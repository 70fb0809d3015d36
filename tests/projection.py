"""The projection check: one test for every derivative rule.

For a graph ``y = f(x)`` and random ``u`` (direction) and ``v`` (cotangent), ``<v, J u>`` by a
central difference must equal ``<vjp(v), u>`` from the emitted graph, in float64. onnxruntime has no
float64 kernel for some operators, so float64 runs on ONNX's reference evaluator; the same emitted
graph is then run by onnxruntime in float32 and float16 and compared with the float64 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort

from onnxplain.graph import shapes
from onnxplain.graph.edit import value_index
from onnxplain.graph.grad import differentiate
from onnxplain.rules import Rules
from onnxplain.rules.vjp import VJP
from tests.reference import CORRECTED


@dataclass
class Case:
    """One row: an operator, its inputs (float64 arrays or typed constants) and attributes.

    ``wrt``: indices of the inputs to differentiate (default: every float64 one). ``const``: indices
    given as initializers. ``symbolic``: input indices whose dimensions are declared symbolic, so
    that the rule can't know them. ``second``: also check derivatives of the derivative.
    ``dtypes``: what onnxruntime runs the emitted graph in.
    """

    op: str
    inputs: Sequence[np.ndarray | None]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    wrt: Sequence[int] | None = None
    const: Sequence[int] = ()
    outputs: int = 1
    of: int = 0
    symbolic: Sequence[int] = ()
    second: bool = True
    dtypes: Sequence[str] = ("float32", "float16")
    opset: int = 21
    domain: str = ""
    name: str = ""
    tolerance: float = 1e-6

    def __str__(self) -> str:
        return f"{self.op}-{self.name}" if self.name else self.op


def make_model(case: Case, dtype: str = "float64") -> onnx.ModelProto:
    """The one-node model of a case with its floating-point tensors in ``dtype``."""
    names, inputs, initializers = [], [], []
    for i, array in enumerate(case.inputs):
        if array is None:
            names.append("")
            continue
        array = np.asarray(array)
        if array.dtype == np.float64:
            array = array.astype(dtype)
        name = f"x{i}"
        names.append(name)
        if i in case.const:
            initializers.append(onnx.numpy_helper.from_array(array, name))
        else:
            shape = (
                [f"{name}_{k}" for k in range(array.ndim)] if i in case.symbolic else array.shape
            )
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    outs = [f"y{i}" for i in range(case.outputs)]
    node = onnx.helper.make_node(
        case.op, names, outs, name="node", domain=case.domain, **dict(case.attrs)
    )
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        [node],
        "case",
        inputs,
        [onnx.helper.make_tensor_value_info(f"y{case.of}", kind, None)],
        initializers,
    )
    opsets = [onnx.helper.make_opsetid("", case.opset)]
    if case.domain:
        opsets.append(onnx.helper.make_opsetid(case.domain, 1))
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def load(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    shapes.infer(model)
    return model


def evaluate(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs by ONNX's reference evaluator (float64)."""
    proto = ir.to_proto(model)
    names = {i.name for i in proto.graph.input}
    return onnx.reference.ReferenceEvaluator(proto, new_ops=CORRECTED).run(
        None, {k: v for k, v in feeds.items() if k in names}
    )


def gradient(model: ir.Model, of: str, wrt: Sequence[str], rules: Rules = VJP) -> ir.Model:
    index = value_index(model.graph)
    out = differentiate(model, index[of], [index[w] for w in wrt], rules)
    assert {n.domain for n in out.graph} <= {""}, "only the standard domain may be emitted"
    onnx.checker.check_model(ir.to_proto(out), full_check=True)
    return out


def project(
    model: ir.Model,
    of: str,
    wrt: Sequence[str],
    feeds: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    tolerance: float,
    eps: float = 1e-6,
    rules: Rules = VJP,
) -> tuple[ir.Model, dict[str, np.ndarray], list[np.ndarray]]:
    """Check one derivative; returns the backward model, its feeds and its outputs."""
    back = gradient(model, of, wrt, rules)
    index = value_index(model.graph)
    forward = model.clone()
    forward.graph.outputs[:] = [value_index(forward.graph)[of]]
    (y,) = evaluate(forward, feeds)
    seed = next(v.name for v in back.graph.inputs if v.name not in index)
    cotangent = rng.standard_normal(y.shape)
    full = {**feeds, seed: cotangent}
    results = evaluate(back, full)
    grads = results[1:]
    for name, g in zip(wrt, grads, strict=True):
        assert g.shape == feeds[name].shape, f"{name}: {g.shape} for {feeds[name].shape}"
        assert g.dtype == feeds[name].dtype
    for name, g in zip(wrt, grads, strict=True):
        u = rng.standard_normal(feeds[name].shape)
        plus = evaluate(forward, {**feeds, name: feeds[name] + eps * u})[0]
        minus = evaluate(forward, {**feeds, name: feeds[name] - eps * u})[0]
        numeric = float(np.sum(cotangent * (plus - minus)) / (2 * eps))
        emitted = float(np.sum(g * u))
        scale = max(1.0, abs(numeric), float(np.linalg.norm(g) * np.linalg.norm(u)))
        assert abs(numeric - emitted) <= tolerance * scale, (
            f"d{of}/d{name}: finite difference {numeric:.9g}, emitted {emitted:.9g}"
        )
    return back, full, results


def check(case: Case, rules: Rules = VJP) -> None:
    """Run every check of a case; raises AssertionError with what differed."""
    rng = np.random.default_rng(7)
    wrt = (
        [
            i
            for i, a in enumerate(case.inputs)
            if a is not None and np.asarray(a).dtype == np.float64 and i not in case.const
        ]
        if case.wrt is None
        else list(case.wrt)
    )
    names = [f"x{i}" for i in wrt]
    of = f"y{case.of}"
    feeds = {
        f"x{i}": np.asarray(a)
        for i, a in enumerate(case.inputs)
        if a is not None and i not in case.const
    }
    back, full, results = project(
        load(make_model(case)), of, names, feeds, rng, case.tolerance, rules=rules
    )
    if case.second:
        shapes.infer(back)
        for name in names:
            inner = f"{name}.grad"
            again = [v for v in (*names, "cotangent") if _depends(back, inner, v)]
            if again:
                project(back, inner, again, full, rng, case.tolerance * 100, rules=rules)
    for dtype in case.dtypes:
        low = gradient(load(make_model(case, dtype)), of, names, rules)
        session = ort.InferenceSession(
            ir.to_proto(low).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        known = {i.name for i in session.get_inputs()}
        cast = {
            k: v.astype(dtype) if v.dtype == np.float64 else v
            for k, v in full.items()
            if k in known
        }
        tolerance = {"float32": 1e-4, "float16": 3e-2}.get(dtype, 1e-9)
        for got, want in zip(session.run(None, cast), results, strict=True):
            assert got.dtype == np.dtype(dtype)
            scale = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            np.testing.assert_allclose(
                got.astype(np.float64), want, rtol=tolerance, atol=tolerance * scale
            )


def _depends(model: ir.Model, of: str, wrt: str) -> bool:
    """Whether a differentiable path joins two values (a linear rule has no second derivative)."""
    from onnxplain.graph.grad import Active

    index = value_index(model.graph)
    active = Active(model.graph, [index[of]], [index[wrt]], VJP)
    return index[of] in active.values


def check_adjoint(case: Case) -> None:
    """Check a linear operator by onnxruntime alone: <v, A u> = <vjp(v), u>, in float32.

    For what ONNX's reference evaluator does not do, or does wrong.
    """
    rng = np.random.default_rng(7)
    arrays = {f"x{i}": np.asarray(a) for i, a in enumerate(case.inputs) if a is not None}
    names = [k for k, a in arrays.items() if a.dtype == np.float64]
    feeds = {
        k: rng.standard_normal(a.shape).astype(np.float32) if k in names else a
        for k, a in arrays.items()
        if int(k[1:]) not in case.const
    }
    back = gradient(load(make_model(case, "float32")), f"y{case.of}", names)
    session = ort.InferenceSession(
        ir.to_proto(back).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    known = {i.name for i in session.get_inputs()}
    shape_of = ort.InferenceSession(
        make_model(case, "float32").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = shape_of.run(None, feeds)
    v = rng.standard_normal(y.shape).astype(np.float32)
    results = session.run(None, {k: a for k, a in {**feeds, "cotangent": v}.items() if k in known})
    want = float(np.sum(v.astype(np.float64) * y))
    got = sum(
        float(np.sum(g.astype(np.float64) * feeds[k]))
        for k, g in zip(names, results[1:], strict=True)
    )
    scale = max(1.0, float(np.linalg.norm(v) * np.linalg.norm(y)))
    assert abs(got - want) <= 1e-5 * scale, f"<v, A u> = {want:.7g}, <vjp(v), u> = {got:.7g}"
