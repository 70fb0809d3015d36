from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxplain.errors import UnsupportedModelError
from tests.projection import Case, check, evaluate, gradient, load, make_model

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def apart(*shape: int) -> np.ndarray:
    """Numbers of both signs, no two closer than 0.1 and none closer to zero."""
    count = int(np.prod(shape))
    steps = np.arange(1, count + 1) * 0.1 + 0.05
    signs = RNG.choice([-1.0, 1.0], count)
    return RNG.permutation(steps * signs).reshape(shape)


def between(low: float, high: float, *shape: int) -> np.ndarray:
    return RNG.uniform(low, high, shape)


def vjp(case: Case, cotangent: np.ndarray | float = 1.0) -> list[np.ndarray]:
    """The emitted cotangents of the float64 inputs, for exact values."""
    feeds = {f"x{i}": a for i, a in enumerate(case.inputs) if a is not None and i not in case.const}
    wrt = [k for k, a in feeds.items() if np.asarray(a).dtype == np.float64]
    back = gradient(load(make_model(case)), "y0", wrt)
    model = load(make_model(case))
    (y,) = evaluate(model, feeds)
    return evaluate(back, {**feeds, "cotangent": np.broadcast_to(cotangent, y.shape) * 1.0})[1:]


A34 = between(0.5, 2.0, 3, 4)
INTS = np.array([[-3.0, -2.0, 2.0, 3.0]])

UNARY = {
    "Identity": normal(2, 3),
    "Neg": normal(2, 3),
    "Abs": apart(2, 3),
    "Exp": normal(2, 3),
    "Log": between(0.5, 2, 2, 3),
    "Sqrt": between(0.5, 2, 2, 3),
    "Reciprocal": between(0.5, 2, 2, 3),
    "Sin": normal(2, 3),
    "Cos": normal(2, 3),
    "Tan": between(-1, 1, 2, 3),
    "Asin": between(-0.8, 0.8, 2, 3),
    "Acos": between(-0.8, 0.8, 2, 3),
    "Atan": normal(2, 3),
    "Sinh": normal(2, 3),
    "Cosh": normal(2, 3),
    "Tanh": normal(2, 3),
    "Asinh": normal(2, 3),
    "Acosh": between(1.5, 3, 2, 3),
    "Atanh": between(-0.8, 0.8, 2, 3),
    "Erf": normal(2, 3),
}

ROWS = [
    *(Case(name, [x]) for name, x in UNARY.items()),
    Case("Exp", [np.float64(0.5)], name="scalar"),
    Case("Tanh", [np.zeros((0, 3))], name="empty"),
    Case("Cast", [normal(3)], {"to": onnx.TensorProto.DOUBLE}, dtypes=()),
    Case("CastLike", [normal(3), normal(2)], dtypes=("float32", "float16")),
    Case("Dropout", [normal(3), np.float64(0.5)], wrt=[0], const=[1]),
    Case("Dropout", [normal(3), np.float64(0.5), np.bool_(False)], const=[2], name="mode"),
    # broadcasting in every position
    *(
        Case(op, [a, b], name=f"{name}-{how}", symbolic=(0, 1) if how == "symbolic" else ())
        for op in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Mean")
        for name, a, b in (
            ("row", A34, between(0.5, 2, 4)),
            ("column", A34 + 2, between(0.5, 2, 3, 1)),
            ("both", between(0.5, 1, 3, 1), between(1.2, 2, 2, 1, 4)),
            ("scalar", np.float64(0.4), A34),
        )
        for how in ("static", "symbolic")
        if how == "static" or name in ("both", "row")
    ),
    Case("Mul", [np.zeros((0, 4)), between(1, 2, 4)], name="empty"),
    Case("Mul", [normal(2, 1), np.zeros((2, 0))], name="empty-broadcast"),
    # powers
    *(
        Case("Pow", [between(0.5, 2, 2, 3), np.asarray(e)], const=[1], name=f"const-{e}")
        for e in (0.0, 0.5, 1.0, 2.0, 3.0, -1.0, -1.5)
    ),
    Case("Pow", [INTS, np.array(3)], name="integer"),
    Case("Pow", [INTS, np.array([0, 1, 2, -1])], const=[1], name="integers-const"),
    Case("Pow", [INTS, np.array([[0], [1], [2], [-2]])], name="integers-broadcast"),
    Case("Pow", [INTS, np.array([0.0, 1.0, 2.0, -1.0])], wrt=[0], name="negative-base"),
    Case(
        "Pow",
        [np.array([0.0, 2.0]), np.array([2.5, 0.0])],
        wrt=[1],
        name="exponent-at-zero",
        second=False,
    ),
    Case("Mod", [apart(2, 3) * 7, between(1.1, 2, 3)], {"fmod": 1}, dtypes=("float32",)),
    # any number of inputs
    *(
        Case(op, xs, name=f"{len(xs)}-inputs")
        for op in ("Sum", "Mean", "Max", "Min")
        for xs in ([apart(2, 3)], [apart(4), apart(3, 1) + 0.03, apart(2, 1, 1) - 0.02])
    ),
    # selection
    Case("Where", [np.array([[True], [False]]), normal(3), normal(2, 1)]),
    Case(
        "Where",
        [RNG.random((2, 3)) < 0.5, np.float64(1), normal(2, 3)],
        symbolic=(0, 2),
        name="scalar",
    ),
    *(
        Case("Clip", [apart(4, 3), *limits], name=name)
        for name, limits in {
            "both": [np.float64(-0.4), np.float64(0.5)],
            "min": [np.float64(-0.4)],
            "max": [None, np.float64(0.5)],
            "none": [],
        }.items()
    ),
    Case("Clip", [apart(4, 3), np.float64(0.5), np.float64(-0.2)], name="min-above-max"),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


def test_ties_share_evenly() -> None:
    two = np.array([1.0, 2.0]), np.array([1.0, 3.0])
    for op, want in (("Max", ([0.5, 0], [0.5, 1])), ("Min", ([0.5, 1], [0.5, 0]))):
        np.testing.assert_array_equal(vjp(Case(op, two)), want)
    three = vjp(Case("Max", [np.float64(2.0)] * 3))
    np.testing.assert_allclose(three, [1 / 3] * 3)


@pytest.mark.parametrize("const", [(), (1,)], ids=["computed", "const"])
def test_pow_at_base_zero(const: tuple[int, ...]) -> None:
    case = Case("Pow", [np.zeros(4), np.array([0.0, 1.0, 2.0, 1.5])], const=const)
    base, *exponent = vjp(case)
    np.testing.assert_array_equal(base, [0, 1, 0, 0])
    assert all(np.array_equal(e, np.zeros(4)) for e in exponent)


def test_abs_at_zero() -> None:
    np.testing.assert_array_equal(vjp(Case("Abs", [np.array([0.0, -2.0, 3.0])])), [[0, -1, 1]])


def test_clip_at_its_limits() -> None:
    case = Case("Clip", [np.array([-1.0, 0.0, 3.0, 6.0, 7.0]), np.float64(0), np.float64(6)])
    x, low, high = vjp(case)
    np.testing.assert_array_equal(x, [0, 1, 1, 1, 0])
    assert (low, high) == (1, 1)


def test_where_keeps_what_is_not_taken_out() -> None:
    case = Case("Where", [np.array([True, False]), np.zeros(2), np.zeros(2)])
    x, y = vjp(case, np.array([np.inf, 1.0]))
    np.testing.assert_array_equal(x, [np.inf, 0])
    np.testing.assert_array_equal(y, [0, 1])


def test_cast_brings_the_cotangent_back() -> None:
    model = load(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21]>
            case (double[2] x, float[2] w) => (float[2] y) { h = Cast<to = 1>(x)  y = Mul(h, w) }"""
        )
    )
    w = np.array([2, 3], np.float32)
    back = gradient(model, "y", ["x"])
    got = evaluate(back, {"x": np.ones(2), "w": w, "cotangent": np.ones(2, np.float32)})[1]
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, w)


@pytest.mark.parametrize("mode", [(2,), ()], ids=["constant", "computed"])
def test_dropout_in_training_mode_is_refused(mode: tuple[int, ...]) -> None:
    case = Case("Dropout", [normal(3), np.float64(0.5), np.bool_(True)], const=[1, *mode])
    with pytest.raises(UnsupportedModelError, match="training mode"):
        gradient(load(make_model(case)), "y0", ["x0"])
