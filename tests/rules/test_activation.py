from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxplain.graph import shapes
from tests.projection import Case, check, gradient, load, make_model
from tests.rules.test_elementwise import apart, normal, vjp

X = apart(5, 4) * 2.02  # -4 ... 4, away from the kinks at 0, 1/2, 1, 5/2, 3

ROWS = [
    *(
        Case(op, [X])
        for op in (
            "Relu",
            "LeakyRelu",
            "Elu",
            "Selu",
            "ThresholdedRelu",
            "Sigmoid",
            "HardSigmoid",
            "HardSwish",
            "Softplus",
            "Softsign",
            "Gelu",
            "Mish",
        )
    ),
    Case("Relu", [np.float64(-0.5)], name="scalar"),
    Case("Relu", [np.zeros((0, 3))], name="empty"),
    Case("Relu", [X], symbolic=(0,), name="symbolic"),
    Case("LeakyRelu", [X], {"alpha": -0.3}, name="negative"),
    Case("LeakyRelu", [X], {"alpha": 2.0}, name="steep"),
    *(
        Case("PRelu", [normal(2, 3, 4), slope], name=name, symbolic=symbolic)
        for symbolic in ((), (0, 1))
        for name, slope in {
            "channel": normal(3, 1),
            "scalar": np.asarray(0.3),
            "one": normal(1),
            "full": normal(2, 3, 4),
        }.items()
    ),
    Case("Elu", [X], {"alpha": 0.5}, name="alpha"),
    Case("Elu", [X], {"alpha": -0.5}, name="negative"),
    Case("Selu", [X], {"alpha": 0.7, "gamma": 1.3}, name="alpha"),
    Case("Selu", [X], {"alpha": 0.7, "gamma": -1.3}, name="negative-gamma"),
    Case("Selu", [X], {"alpha": -0.7}, name="negative-alpha"),
    # float64 from opset 28 on, which onnxruntime does not take; test_far_out runs float32
    Case("Celu", [X], opset=28, dtypes=()),
    Case("Celu", [X], {"alpha": 0.5}, opset=28, dtypes=(), name="alpha"),
    Case("Celu", [X], {"alpha": -4.0}, opset=28, dtypes=(), name="negative"),
    Case("ThresholdedRelu", [X], {"alpha": -0.6}, name="negative"),
    Case("Shrink", [X], {"lambd": 0.6, "bias": 0.3}),
    Case("Shrink", [X], {"lambd": -0.6, "bias": 0.3}, name="negative"),
    Case("HardSigmoid", [X], {"alpha": 0.4, "beta": 0.3}, name="alpha"),
    Case("Gelu", [X], {"approximate": "tanh"}, name="tanh"),
    Case("Swish", [X], opset=24),
    Case("Swish", [X], {"alpha": 1.7}, opset=24, name="alpha"),
    *(
        Case(op, [normal(2, 3, 4)], {"axis": axis}, name=str(axis))
        for op in ("Softmax", "LogSoftmax")
        for axis in (0, 1, -1)
    ),
    Case("Softmax", [np.zeros((0, 3))], name="empty"),
    Case("Softmax", [normal(2, 3)], symbolic=(0,), name="symbolic"),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    ("op", "attrs", "x", "want"),
    [
        ("Relu", {}, [-1, 0, 1], [0, 0, 1]),
        ("LeakyRelu", {"alpha": 0.25}, [-1, 0, 1], [0.25, 0.25, 1]),
        ("Elu", {"alpha": 2.0}, [0, 1], [2, 1]),
        ("Celu", {"alpha": 2.0}, [0, 1], [1, 1]),
        ("HardSigmoid", {"alpha": 0.25, "beta": 0.5}, [-2, 0, 2], [0, 0.25, 0]),
        ("HardSwish", {}, [-4, -3, 3, 4], [0, 0, 1, 1]),
        ("ThresholdedRelu", {"alpha": 1.0}, [1, 1.5], [0, 1]),
        ("Shrink", {"lambd": 0.5}, [-0.5, 0.5, 0.6], [0, 0, 1]),
        ("Softsign", {}, [0, -1, 1], [1, 0.25, 0.25]),
    ],
)
def test_kinks(op: str, attrs: dict[str, float], x: list[float], want: list[float]) -> None:
    (got,) = vjp(Case(op, [np.array(x, float)], attrs, opset=28 if op == "Celu" else 21))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "attrs", "limits"),
    [
        ("Sigmoid", {}, (0, 0)),
        ("Softplus", {}, (0, 1)),
        ("Mish", {}, (0, 1)),
        ("Gelu", {}, (0, 1)),
        ("Gelu", {"approximate": "tanh"}, (0, 1)),
        ("HardSwish", {}, (0, 1)),
        ("Elu", {}, (0, 1)),
        ("Selu", {}, (0, 1.0507009)),
        ("Celu", {}, (0, 1)),
        ("Swish", {}, (0, 1)),
        ("Softsign", {}, (0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_far_out(op: str, attrs: dict[str, str], limits: tuple[float, float], dtype: str) -> None:
    """Slopes far from zero are finite and right, to the second order."""
    if op == "Celu" and dtype != "float32":
        pytest.skip("Celu takes float32 only")
    far = 6e4 if dtype == "float16" else 1e30
    x = np.array([-far, -200.0, 200.0, far])
    case = Case(op, [x], attrs, opset=24 if op == "Swish" else 21)
    back = gradient(load(make_model(case, dtype)), "y0", ["x0"])
    shapes.infer(back)
    twice = gradient(back, "x0.grad", ["x0"])
    feeds = {"x0": x.astype(dtype), "cotangent": np.ones(4, dtype)}
    seed = next(v.name for v in twice.graph.inputs if v.name not in feeds)
    for model, want in ((back, np.repeat(limits, 2)), (twice, np.zeros(4))):
        session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        known = {i.name for i in session.get_inputs()}
        full = {**feeds, seed: np.ones(4, dtype)}
        got = session.run(None, {k: v for k, v in full.items() if k in known})[1]
        np.testing.assert_allclose(got, want, atol=2e-4 if dtype == "float32" else 2e-3)


def test_prelu_slope_at_zero() -> None:
    x, slope = vjp(Case("PRelu", [np.array([-1.0, 0.0, 1.0]), np.array([0.25])]))
    np.testing.assert_array_equal(x, [0.25, 0.25, 1])
    np.testing.assert_array_equal(slope, [-1])


def test_softmax_of_large_logits() -> None:
    (got,) = vjp(Case("Softmax", [np.array([[1e4, 0.0, -1e4]])]), np.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(got, np.zeros((1, 3)))
