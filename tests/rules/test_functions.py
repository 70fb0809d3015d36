"""Operators without a rule are differentiated through the function body that ONNX gives them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxplain.errors import NoRuleError
from onnxplain.graph import functions
from onnxplain.graph.edit import value_index
from tests.projection import Case, check, check_adjoint, gradient, load, make_model

rng = np.random.default_rng(0)
normal = rng.standard_normal


def ints(*values: object) -> np.ndarray:
    return np.asarray(values, np.int64)


LABELS = rng.integers(0, 3, (2, 4))
HEADS = {"q_num_heads": 2, "kv_num_heads": 2}
QUERY, KEYS = normal((2, 4, 3, 8)), normal((2, 2, 5, 8))

ROWS = [
    Case("Shrink", [normal((3, 4))], name="default"),
    Case("Shrink", [normal((3, 4))], {"lambd": 0.3, "bias": 0.1}, symbolic=[0], name="attributes"),
    Case("ThresholdedRelu", [normal((3, 4))], {"alpha": 0.2}),
    Case(
        "NegativeLogLikelihoodLoss",
        [normal((2, 3, 4)), LABELS, normal(3)],
        {"ignore_index": 1},
        name="weights",
    ),
    Case(
        "NegativeLogLikelihoodLoss",
        [normal((2, 3)), ints(2, 0)],
        {"reduction": "sum"},
        opset=22,
        symbolic=[0],
        name="sum",
    ),
    Case(
        "SoftmaxCrossEntropyLoss", [normal((2, 3, 4)), LABELS], {"reduction": "none"}, name="none"
    ),
    Case(
        "SoftmaxCrossEntropyLoss",
        [normal((2, 3, 4)), LABELS, normal(3)],
        {"ignore_index": 1},
        outputs=2,
        of=1,
        wrt=[0],
        symbolic=[0],
        name="log-prob",
    ),
    Case("CenterCropPad", [normal((2, 3, 4)), ints(5, 2)], {"axes": [1, -1]}, const=[1]),
    Case("CenterCropPad", [normal((3, 4)), ints(2, 5)], const=[1], name="all-axes"),
    Case(
        "Attention",
        [normal((2, 3, 8)) for _ in range(3)],
        {**HEADS, "is_causal": 1},
        opset=23,
        name="3d-causal",
    ),
    Case(
        "Attention",
        [normal((2, 3, 8)), normal((2, 5, 4)), normal((2, 5, 6))],
        {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3},
        opset=23,
        name="grouped",
    ),
    Case(
        "Attention",
        [QUERY, KEYS, KEYS + 1.0, normal((3, 5))],
        {"softcap": 2.0},
        opset=24,
        symbolic=[0],
        name="mask-softcap",
    ),
    Case(
        "Attention",
        [QUERY, KEYS, KEYS + 1.0, None, KEYS[:, :, :2], KEYS[:, :, 1:3]],
        opset=23,
        outputs=3,
        name="past",
    ),
    Case("Attention", [QUERY, KEYS, KEYS, normal((3, 5)) > -1.0], opset=23, name="boolean-mask"),
    Case("RotaryEmbedding", [normal((2, 3, 4, 8)), normal((2, 4, 4)), normal((2, 4, 4))], opset=23),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


# The reference evaluator computes this grid in single precision, too coarse for differences.
GRIDS = [
    Case("AffineGrid", [normal((2, 2, 3)), ints(2, 1, 3, 4)], const=[1], name="2d"),
    Case(
        "AffineGrid",
        [normal((2, 3, 4)), ints(2, 1, 2, 3, 4)],
        {"align_corners": 1},
        const=[1],
        name="3d",
    ),
]


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_affine_grid(case: Case) -> None:
    check_adjoint(case)


def parse(text: str, opset: int = 21) -> ir.Model:
    return load(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}'))


def test_outputs_stay_the_same_values() -> None:
    model = parse("""g (float[N, 3] x, int64[N] t) => (float loss, float[N, 3] p) {
        loss, p = SoftmaxCrossEntropyLoss(x, t)
    }""")
    loss, p = model.graph.outputs
    assert functions.expand(model.graph, model.graph[0])
    assert value_index(model.graph)["p"] is p
    assert value_index(model.graph)["loss"] is loss
    assert {node.op_type for node in model.graph} >= {"LogSoftmax", "NegativeLogLikelihoodLoss"}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_shape_arithmetic_of_the_body_is_folded() -> None:
    model = parse("""g (float[N, 2, 3] theta) => (float[N, 4, 5, 2] grid)
        <int64[4] size = {2, 1, 4, 5}> { grid = AffineGrid(theta, size) }""")
    functions.expand(model.graph, model.graph[0])
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"If", "Range", "Shape", "ConstantOfShape"}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_body_in_older_operators_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body whose operators changed since is converted to the graph's opset."""
    body = onnx.parser.parse_function("""
        <opset_import: ["" : 11], domain: ""> Shrink (x) => (y) {
            s = ReduceMean <axes = [1], keepdims = 0> (x)
            y = Unsqueeze <axes = [0]> (s)
        }""")
    monkeypatch.setattr(functions, "_function", lambda *_: body)
    model = parse("g (float[2, 3] x) => (float[1, 2] y) { y = Shrink(x) }")
    assert functions.expand(model.graph, model.graph[0])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (y,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(
        None, {"x": np.float32([[1, 2, 3], [4, 5, 6]])}
    )
    np.testing.assert_array_equal(y, [[2, 5]])


def test_without_rule_and_body_it_is_refused() -> None:
    case = Case("MaxRoiPool", [normal((1, 1, 4, 4)), normal((1, 5))], {"pooled_shape": [2, 2]})
    with pytest.raises(NoRuleError, match=r"MaxRoiPool.*perturbation"):
        gradient(load(make_model(case)), "y0", ["x0"])
