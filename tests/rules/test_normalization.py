from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph import shapes
from tests.projection import Case, check, evaluate, gradient, load, make_model
from tests.rules.test_elementwise import apart, between, normal, vjp

IMAGE = normal(2, 4, 3, 2)
ROW = normal(2, 4)


def batch_norm(x: np.ndarray, **more: object) -> Case:
    c = x.shape[1]
    return Case(
        "BatchNormalization",
        [x, normal(c), normal(c), normal(c), between(0.5, 2, c)],
        {"epsilon": 0.01},
        **more,  # type: ignore[arg-type]
    )


ROWS = [
    batch_norm(IMAGE),
    batch_norm(IMAGE, const=(1, 2, 3, 4), symbolic=(0,), name="const"),
    batch_norm(ROW, name="rank-2"),
    batch_norm(normal(2, 3, 2, 1, 2), name="rank-5"),
    batch_norm(np.zeros((0, 4, 3)), name="empty"),
    *(
        Case(
            "LayerNormalization",
            [IMAGE, normal(*IMAGE.shape[axis:]), *bias],
            {"axis": axis},
            name=f"{axis}-{'bias' if bias else 'no-bias'}",
            symbolic=symbolic,
        )
        for axis, bias, symbolic in (
            (-1, [normal(2)], ()),
            (-1, [], (0, 1)),
            (2, [normal(3, 2)], (0,)),
            (1, [], ()),
        )
    ),
    Case(
        "LayerNormalization",
        [normal(2, 3, 4), normal(3, 1), normal(1, 4)],
        {"axis": 1},
        name="broadcast-scale",
    ),
    Case("LayerNormalization", [np.zeros((0, 3)), normal(3)], name="empty"),
    *(
        Case(
            "RMSNormalization",
            [IMAGE, normal(*IMAGE.shape[axis:])],
            {"axis": axis},
            opset=23,
            name=str(axis),
            symbolic=symbolic,
        )
        for axis, symbolic in ((-1, ()), (1, (0,)))
    ),
    *(
        Case(
            "InstanceNormalization",
            [x, normal(4), normal(4)],
            {"epsilon": 0.01},
            name=name,
            symbolic=symbolic,
        )
        for name, x, symbolic in (
            ("image", IMAGE, ()),
            ("series", normal(2, 4, 5), ()),
            ("symbolic", IMAGE, (0,)),
        )
    ),
    *(
        Case(
            "GroupNormalization",
            [IMAGE, normal(4), normal(4)],
            {"num_groups": groups, "epsilon": 0.01},
            name=f"{groups}{'-symbolic' * bool(symbolic)}",
            symbolic=symbolic,
        )
        for groups, symbolic in ((1, ()), (2, ()), (4, ()), (2, (0,)))
    ),
    *(
        Case(
            "LRN",
            [normal(2, 5, 3, 2)],
            {"size": size, "alpha": 0.3, "beta": 0.6, "bias": 1.5},
            name=str(size),
            dtypes=("float32", "float16")[: 2 * (size % 2)],
        )  # onnxruntime takes odd sizes only
        for size in (1, 2, 3, 4)
    ),
    Case("LRN", [normal(2, 5, 3, 2)], {"size": 3, "alpha": 0.3}, symbolic=(0,), name="symbolic"),
    *(
        Case(
            "LpNormalization",
            [apart(3, 4)],
            {"p": p, "axis": axis},
            name=f"{p}-{axis}",
            symbolic=(0,) * p,
        )
        for p in (1, 2)
        for axis in (0, -1)
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v for k, v in feeds.items() if k in names})


def test_second_derivatives_of_the_fused_layer_norm() -> None:
    """Single precision uses the LayerNormalization operator, float64 (checked above) does not."""
    case = Case("LayerNormalization", [normal(2, 3, 8), normal(8), normal(8)])
    feeds = {"x0": case.inputs[0], "x1": case.inputs[1], "x2": case.inputs[2]}
    feeds |= {"cotangent": normal(2, 3, 8), "cotangent_": normal(2, 3, 8)}
    results = []
    for dtype in ("float64", "float32"):
        back = gradient(load(make_model(case, dtype)), "y0", ["x0"])
        shapes.infer(back)
        twice = gradient(back, "x0.grad", ["x0", "x1", "cotangent"])
        typed = {k: np.asarray(v, dtype) for k, v in feeds.items()}
        results.append((evaluate if dtype == "float64" else run)(twice, typed))
        fused = [n for n in back.graph if n.op_type == "LayerNormalization"]
        assert len(fused) == 1 + (dtype == "float32")
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("dims", ["2, 3, 8", "N, M, 8"])
def test_layer_norm_statistics_carry_gradients(dims: str) -> None:
    model = load(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 21]>
            case (float[{dims}] x, float[8] s) => (float[{dims}] z) {{
                y, mean, inverse = LayerNormalization(x, s)
                a = Mul(y, mean)
                z = Mul(a, inverse)
            }}"""
        )
    )
    x, s, g, u = normal(2, 3, 8), normal(8), normal(2, 3, 8), normal(2, 3, 8)
    feeds = {"x": x, "s": s, "cotangent": g}
    back = gradient(model, "z", ["x"])
    got = run(back, {k: np.float32(v) for k, v in feeds.items()})[1]

    def loss(x: np.ndarray) -> float:
        mean = x.mean(-1, keepdims=True)
        inverse = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return float(np.sum(g * (x - mean) * inverse * s * mean * inverse))

    assert np.sum(got * u) == pytest.approx(slope(loss, x, u), abs=1e-4)


def slope(loss: Callable[[np.ndarray], float], x: np.ndarray, u: np.ndarray) -> float:
    return (loss(x + 1e-6 * u) - loss(x - 1e-6 * u)) / 2e-6


@pytest.mark.parametrize("axes", [[0, 2, 3], [1, -1]], ids=str)
def test_mean_variance_normalization(axes: list[int]) -> None:
    """The standard's function body types in float32 with given axes only, so no float64 row."""
    over = tuple(axes)
    case = Case("MeanVarianceNormalization", [IMAGE], {"axes": axes}, symbolic=(0,) * axes[0])
    g, u = normal(*IMAGE.shape), normal(*IMAGE.shape)
    back = gradient(load(make_model(case, "float32")), "y0", ["x0"])
    got = run(back, {"x0": np.float32(IMAGE), "cotangent": np.float32(g)})[1]

    def loss(x: np.ndarray) -> float:
        centered = x - x.mean(over, keepdims=True)
        return float(np.sum(g * centered / x.std(over, keepdims=True)))

    assert np.sum(got * u) == pytest.approx(slope(loss, IMAGE, u), abs=1e-4)


def test_half_precision_is_computed_in_single() -> None:
    """The variance of these rows, 1e6, has no half-precision square."""
    x = np.array([[1000.0, -1000, 1000, -900]])
    for op, more in (("LayerNormalization", ()), ("RMSNormalization", ())):
        case = Case(op, [x, np.ones(4), *more], opset=23)
        g = np.array([[1.0, 2, 3, 4]])
        (want, _) = vjp(case, g)
        back = gradient(load(make_model(case, "float16")), "y0", ["x0"])
        feeds = {"x0": x, "x1": np.ones(4), "cotangent": g}
        got = run(back, {k: np.float16(v) for k, v in feeds.items()})[1]
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-5)


def test_zeros_have_no_direction() -> None:
    for p in (1, 2):
        np.testing.assert_array_equal(
            vjp(Case("LpNormalization", [np.zeros(3)], {"p": p})), [[0] * 3]
        )


def test_batch_norm_in_training_mode_is_refused() -> None:
    case = batch_norm(IMAGE)
    case.attrs = {"training_mode": 1}
    case.outputs = 3
    with pytest.raises(UnsupportedModelError, match="training mode"):
        gradient(load(make_model(case)), "y0", ["x0"])
