"""Fixed batches made dynamic: only where several rows together are the rows one by one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxplain as ox
from onnxplain.errors import InputError
from onnxplain.graph.batch import BatchReport, make_dynamic
from onnxplain.graph.load import load
from onnxplain.graph.normalize import normalize
from onnxplain.graph.opset import raise_opset
from tests.evaluate import evaluate, random_feeds
from tests.helpers import shared

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def normal(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(HEAD + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return normalize(raise_opset(load(proto)), evaluate).model


def axes(model: ir.Model) -> dict[str, int | None]:
    return {v.name or "": 0 for v in model.graph.inputs}


def compare(before: ir.Model, after: ir.Model, fixed: int, rows: int = 5) -> None:
    """Rows that the proof has not seen, together and in batches of the fixed size."""
    groups = [random_feeds(before, fixed, seed) for seed in range(rows)]
    together = {k: np.concatenate([g[k] for g in groups]) for k in groups[0]}
    found = evaluate(after, together)
    apart = [evaluate(before, g) for g in groups]
    for name, array in found.items():
        expected = np.concatenate([a[name] for a in apart])
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


LSTM = {
    "w": f32(1, 12, 4),
    "r": f32(1, 12, 3),
    "b": f32(1, 24),
    "h": f32(1, 1, 3),
    "c": f32(1, 1, 3),
}
ATTENTION = {"wq": f32(8, 8), "wk": f32(8, 8), "perm": f32(1)}

REWRITTEN = {
    "reshape": (
        "g (float[1,3,4] x) => (float[1,5] y) { a = Reshape (x, s) y = MatMul (a, w) }",
        {"s": [1, 12], "w": f32(12, 5)},
    ),
    "reshape with an open dimension": (
        "g (float[1,3,4] x) => (float[1,5] y) { a = Reshape (x, s) y = MatMul (a, w) }",
        {"s": [1, -1], "w": f32(12, 5)},
    ),
    "copied and open dimensions": (
        "g (float[2,3,4] x) => (float[2,4,3] y) { a = Reshape (x, s) b = Reshape (a, t) "
        "y = Neg (b) }",
        {"s": [2, 0, -1, 2], "t": [0, 4, 3]},
    ),
    "two examples": (
        "g (float[2,3,4] x) => (float[2,12] y) { y = Reshape (x, s) }",
        {"s": [2, 12]},
    ),
    "merged with time and split again": (
        "g (float[1,6,4] x) => (float[1,6,5] y) { "
        "a = Reshape (x, s) b = MatMul (a, w) c = Relu (b) y = Reshape (c, t) }",
        {"s": [6, 4], "w": f32(4, 5), "t": [1, 6, 5]},
    ),
    "three examples merged with time": (
        "g (float[3,6,4] x) => (float[3,6,5] y) { "
        "a = Reshape (x, s) b = MatMul (a, w) y = Reshape (b, t) }",
        {"s": [18, 4], "w": f32(4, 5), "t": [3, 6, 5]},
    ),
    "positions added where time is merged": (
        "g (float[1,6,4] x) => (float[1,6,4] y) { "
        "a = Reshape (x, s) b = Add (a, p) y = Reshape (b, t) }",
        {"s": [6, 4], "p": f32(6, 4), "t": [1, 6, 4]},
    ),
    "heads merged with examples behind time": (
        "g (float[1,5,8] x) => (float[1,5,8] y) { "
        "a = Transpose <perm=[1,0,2]> (x) q0 = MatMul (a, wq) k0 = MatMul (a, wk) "
        "q1 = Reshape (q0, s) k1 = Reshape (k0, s) q = Transpose <perm=[1,0,2]> (q1) "
        "k = Transpose <perm=[1,2,0]> (k1) e = MatMul (q, k) p = Softmax (e) v = MatMul (p, q) "
        "b = Transpose <perm=[1,0,2]> (v) c = Reshape (b, t) d = MatMul (c, wq) "
        "f = Reshape (d, u) y = Transpose <perm=[1,0,2]> (f) }",
        {"wq": f32(8, 8), "wk": f32(8, 8), "s": [5, 2, 4], "t": [5, 8], "u": [5, 1, 8]},
    ),
    "class token": (
        "g (float[1,3,4] x) => (float[1,4,4] y) { a = Concat <axis=1> (token, x) y = Mul (a, p) }",
        {"token": f32(1, 1, 4), "p": f32(1, 4, 4)},
    ),
    "class token expanded for two examples": (
        "g (float[2,3,4] x) => (float[2,4,4] y) { t = Expand (token, s) "
        "y = Concat <axis=1> (t, x) }",
        {"token": f32(1, 1, 4), "s": [2, 1, 4]},
    ),
    "tiled token and filled tensor": (
        "g (float[1,3,4] x) => (float[1,5,4] y) { t = Tile (token, s) "
        "z = ConstantOfShape <value=float[1] {2.0}> (q) y = Concat <axis=1> (t, x, z) }",
        {"token": f32(1, 1, 4), "s": [1, 1, 1], "q": [1, 1, 4]},
    ),
    "expand": (
        "g (float[1,1,4] x) => (float[1,3,4] y) { a = Expand (x, s) y = Mul (a, p) }",
        {"s": [1, 3, 4], "p": f32(3, 4)},
    ),
    "constants for two examples": (
        "g (float[2,3] x) => (float[2,3] y) { a = Add (x, p) c = Greater (a, z) "
        "y = Where (c, a, z) }",
        {"p": np.ones((2, 3), np.float32), "z": np.zeros((2, 3), np.float32)},
    ),
    "shapes computed from the input": (
        "g (float[1,3,4] x) => (float[1,12] y) { s = Shape (x) n = Gather (s, zero) "
        "t = Concat <axis=0> (n, rest) y = Reshape (x, t) }",
        {"zero": [0], "rest": [-1]},
    ),
    "squeeze, unsqueeze, transpose": (
        "g (float[1,3,1,4] x) => (float[1,4,3] y) { a = Squeeze (x, two) "
        "b = Transpose <perm=[2,0,1]> (a) c = Unsqueeze (b, two) d = Reshape (c, s) "
        "y = Transpose <perm=[1,0,2]> (d) }",
        {"two": [2], "s": [4, 1, 3]},
    ),
    "recurrent states": (
        "g (float[1,5,4] x) => (float[1,3] y) { a = Transpose <perm=[1,0,2]> (x) "
        "o, l = LSTM <hidden_size=3> (a, w, r, b, , h, c) s = Squeeze (l, zero) y = Tanh (s) }",
        {**LSTM, "zero": [0]},
    ),
    "recurrent states of two examples, and lengths": (
        "g (float[2,5,4] x) => (float[2,3] y) { a = Transpose <perm=[1,0,2]> (x) "
        "o, l = LSTM <hidden_size=3> (a, w, r, b, n, h, c) y = Squeeze (l, zero) }",
        {
            **LSTM,
            "h": np.ones((1, 2, 3), np.float32),
            "c": np.zeros((1, 2, 3), np.float32),
            "n": np.asarray([4, 4], np.int32),
            "zero": [0],
        },
    ),
    "an operator without shape inference": (
        "g (float[1,3,4] x) => (float[1,12] y) { a = com.microsoft.QuickGelu (x) "
        "y = Reshape (a, s) }",
        {"s": [1, 12]},
    ),
    "two inputs": (
        "g (float[1,3,4] x, int64[1,3] m) => (float[1,12] y) { f = Cast <to=1> (m) "
        "u = Reshape (f, t) a = Mul (x, u) y = Reshape (a, s) }",
        {"s": [1, 12], "t": [1, 3, 1]},
    ),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_rewritten(case: str) -> None:
    text, weights = REWRITTEN[case]
    before, model = normal(text, **weights), normal(text, **weights)
    fixed = int(text.split("[")[1].split(",")[0])
    assert make_dynamic(model, axes(model), evaluate) == BatchReport("rewritten", fixed)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert str(value.shape[0]) == "examples"
        assert all(isinstance(d, int) for d in value.shape[1:])
    onnx.checker.check_model(ir.to_proto(model))
    compare(before, model, fixed)


ROWS = {
    "one example is taken out": (
        "g (float[1,3] x) => (float[3] y) { y = Gather <axis=0> (x, zero) }",
        {"zero": np.asarray(0)},
        "node 'Gather'",
    ),
    "attention without an examples axis": (
        "g (float[1,5,4] x) => (float[1,5,4] y) { a = Reshape (x, s) "
        "k = Transpose <perm=[1,0]> (a) e = MatMul (a, k) p = Softmax (e) v = MatMul (p, a) "
        "y = Reshape (v, t) }",
        {"s": [5, 4], "t": [1, 5, 4]},
        "is not that of the rows alone",
    ),
    "examples influence each other": (
        "g (float[2,3] x) => (float[2,3] y) { m = ReduceMean (x, zero) y = Sub (x, m) }",
        {"zero": [0]},
        "is not that of the rows alone",
    ),
    "every example has its own constant": (
        "g (float[2,3] x) => (float[2,3] y) { y = Add (x, p) }",
        {"p": f32(2, 3)},
        "is not that of the rows alone",
    ),
    "examples are copied": (
        "g (float[1,3] x) => (float[4,3] y) { y = Expand (x, s) }",
        {"s": [4, 3]},
        "copies one example",
    ),
    "examples are joined": (
        "g (float[1,3] x) => (float[2,3] y) { y = Concat <axis=0> (x, k) }",
        {"k": f32(1, 3)},
        "joins rows",
    ),
    "features and examples change places": (
        "g (float[1,4,4] x) => (float[1,16] y) { a = Reshape (x, s) "
        "b = Transpose <perm=[1,0]> (a) y = Reshape (b, t) }",
        {"s": [4, 4], "t": [1, 16]},
        "output 'y'",
    ),
    "nothing to prove it with": (
        "g (float[1,3] x) => (float[1,3] y) { a = Mul (x, zero) y = Reshape (a, s) }",
        {"zero": np.zeros(1, np.float32), "s": [1, 3]},
        "do not depend",
    ),
    "no finite numbers": (
        "g (float[1,3] x) => (float[1,3] y) { a = Div (x, zero) y = Reshape (a, s) }",
        {"zero": np.zeros(1, np.float32), "s": [1, 3]},
        "not finite",
    ),
    "it can't be run": (
        "g (float[1,3] x) => (float[1,3] y) { a = Gather <axis=1> (x, nine) "
        "b = Reshape (x, s) y = Add (a, b) }",
        {"nine": [9], "s": [1, 3]},
        "can't be run",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_and_the_model_is_as_it_was(case: str) -> None:
    text, weights, says = ROWS[case]
    model = normal(text, **weights)
    before = ir.to_proto(model).SerializeToString()
    report = make_dynamic(model, axes(model), evaluate)
    assert report.mode == "rows"
    assert report.batch == int(text.split("[")[1].split(",")[0])
    assert says in report.reason
    assert ir.to_proto(model).SerializeToString() == before


# ---- models that declare a symbol ----


def unused(model: ir.Model, feeds: dict) -> dict:
    raise AssertionError("this model needs no proof")


def test_a_symbol_that_reaches_the_outputs_is_believed() -> None:
    model = normal(
        "g (float[batch,3] x) => (float[anything,5] y) { a = MatMul (x, w) y = Relu (a) }",
        w=f32(3, 5),
    )
    assert make_dynamic(model, axes(model), unused) == BatchReport("dynamic", None)
    values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    assert [str(v.shape[0]) for v in values] == ["examples"] * 3


def test_shape_arithmetic_on_a_symbol_is_seen_through() -> None:
    model = normal(
        "g (float[N,3,4] x) => (float[M,12] y) { s = Shape (x) n = Gather (s, zero) "
        "t = Concat <axis=0> (n, rest) a = Reshape (x, t) b = Reshape (a, u) y = Neg (b) }",
        zero=[0],
        rest=[-1],
        u=[-1, 12],
    )
    assert make_dynamic(model, axes(model), unused) == BatchReport("dynamic", None)
    assert [str(d) for d in model.graph.outputs[0].shape] == ["examples", "12"]


def test_an_output_of_another_domain_is_tried() -> None:
    model = normal("g (float[N,3] x) => (float[] y) { y = com.microsoft.QuickGelu (x) }")
    assert make_dynamic(model, axes(model), evaluate) == BatchReport("dynamic", None)
    assert str(model.graph.outputs[0].shape[0]) == "examples"


def test_a_symbol_that_a_constant_contradicts() -> None:
    """The exporter declared the batch dynamic, but traced Python integers."""
    text = """g (float[N,3,4] x) => (float[N,13] y) { a = Reshape (x, s)
        y = Concat <axis=1> (a, k) }"""
    weights = {"s": [1, 12], "k": f32(1, 1)}
    before, model = normal(text, **weights), normal(text, **weights)
    assert make_dynamic(model, axes(model), evaluate) == BatchReport("rewritten", 1)
    compare(before, model, 1)


def test_a_symbol_where_two_examples_were_traced() -> None:
    text = """g (float[N,3,4] x) => (float[N,8,2] y) { a = Concat <axis=1> (k, x)
        y = Reshape (a, s) }"""
    weights = {"s": [2, -1, 2], "k": np.tile(f32(1, 1, 4), (2, 1, 1))}
    before, model = normal(text, **weights), normal(text, **weights)
    assert make_dynamic(model, axes(model), evaluate) == BatchReport("rewritten", 2)
    feeds = {"x": f32(4, 3, 4)}
    parts = [evaluate(before, {"x": feeds["x"][i : i + 2]})["y"] for i in (0, 2)]
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], np.concatenate(parts))


def test_a_symbol_where_only_two_examples_fit() -> None:
    """Each has constants of its own, so one row means nothing: pairs are run."""
    model = normal("g (float[N,3] x) => (float[N,3] y) { y = Add (x, k) }", k=f32(2, 3))
    report = make_dynamic(model, axes(model), evaluate)
    assert (report.mode, report.batch) == ("rows", 2)
    assert [v.shape for v in (*model.graph.inputs, *model.graph.outputs)] == [(2, 3), (2, 3)]


COUPLED = {
    "mean": "m = ReduceMean (x, zero) y = Sub (x, m)",
    "softmax": "y = Softmax <axis=-2> (x)",
    "sum": "y = CumSum (x, first)",
    "matmul": "t = Transpose <perm=[1,0]> (x) a = MatMul (t, x) y = MatMul (x, a)",
    "gemm": "a = Gemm <transA=1> (x, x) y = MatMul (x, a)",
    "first": "a = Gather <axis=0> (x, zero) y = Sub (x, a)",
}


@pytest.mark.parametrize("case", COUPLED)
def test_examples_that_depend_on_each_other(case: str, caplog: pytest.LogCaptureFixture) -> None:
    model = normal(
        f"g (float[N,3] x) => (float[N,3] y) {{ {COUPLED[case]} }}", zero=[0], first=np.int64(0)
    )
    report = make_dynamic(model, axes(model), evaluate)
    assert (report.mode, report.batch) == ("coupled", None)
    assert "explained together" in caplog.text


def test_operators_along_other_axes_need_no_proof() -> None:
    model = normal(
        """g (float[N,3] x) => (float[N,3] y) { m = ReduceMean (x, one) a = Sub (x, m)
        s = Softmax <axis=1> (a) c = CumSum (s, last) y = Gemm <transB=1> (c, w) }""",
        one=[1],
        last=np.int64(-1),
        w=f32(3, 3),
    )
    assert make_dynamic(model, axes(model), unused) == BatchReport("dynamic", None)


def test_one_number_for_all_examples() -> None:
    model = normal("g (float[N,3] x) => (float y) { y = ReduceMean <keepdims=0> (x) }")
    report = make_dynamic(model, axes(model), evaluate)
    assert (report.mode, report.batch) == ("dynamic", None)
    assert str(model.graph.inputs[0].shape[0]) == "examples"


def test_symbolic_time_beside_a_fixed_batch() -> None:
    text = """g (float[1,T,4] x) => (float[1,T,4] y) { s = Shape (x) n = Gather (s, one)
        t = Concat <axis=0> (b, n, two, two) a = Reshape (x, t) c = Neg (a)
        y = Reshape (c, u) }"""
    weights = {"one": [1], "b": [1], "two": [2], "u": [1, -1, 4]}
    before, model = normal(text, **weights), normal(text, **weights)
    report = make_dynamic(model, axes(model), evaluate)
    if report.mode == "rewritten":
        x = f32(3, 7, 4)
        rows = [evaluate(before, {"x": r[None]})["y"] for r in x]
        np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], np.concatenate(rows))
    assert report == BatchReport("rewritten", 1)


# ---- axes ----


def test_inputs_that_all_examples_share() -> None:
    text = """g (float[1,3] x, float[1,3] rate) => (float[1,3] y) {
        a = Mul (x, rate) y = Reshape (a, s) }"""
    model = normal(text, s=[1, 3])
    report = make_dynamic(model, {"x": 0, "rate": None}, evaluate)
    assert report == BatchReport("rewritten", 1)
    assert [str(v.shape) for v in model.graph.inputs] == ["[examples,3]", "[1,3]"]


def test_examples_on_another_axis() -> None:
    text = "g (float[4,1,3] x) => (float[4,3,1] y) { y = Transpose <perm=[0,2,1]> (x) }"
    model = normal(text)
    assert make_dynamic(model, {"x": 1}, evaluate) == BatchReport("rewritten", 1)
    assert [str(d) for d in model.graph.outputs[0].shape] == ["4", "3", "examples"]


@pytest.mark.parametrize("axis", ["x", 0.0, True, {"x": "0"}, {"x": 1.5}])
def test_an_examples_axis_that_is_no_integer(axis: object) -> None:
    text = HEAD + "g (float[N,3] x) => (float[N,3] y) { y = Neg (x) }"
    with pytest.raises(InputError, match="examples_axis is an integer"):
        ox.Model(onnx.parser.parse_model(text), examples_axis=axis)  # type: ignore[arg-type]


def test_pairs_are_run_and_filled_up() -> None:
    text, k, x = "g (float[N,3] x) => (float[N,3] y) { y = Add (x, k) }", f32(2, 3), f32(5, 3)
    model = ox.Model(ir.to_proto(normal(text, k=k)))
    np.testing.assert_array_equal(model(x)["y"], x + k[[0, 1, 0, 1, 0]])


def test_no_examples_axis_at_all() -> None:
    model = normal("g (float[2,3] x) => (float[2,3] y) { y = Neg (x) }")
    assert make_dynamic(model, {"x": None}, unused) == BatchReport("dynamic", None)
    assert list(model.graph.inputs[0].shape) == [2, 3]


def test_inputs_that_disagree() -> None:
    model = normal(
        "g (float[2,3] x, float[4,3] z) => (float[6,3] y) { y = Concat <axis=0> (x, z) }"
    )
    report = make_dynamic(model, axes(model), unused)
    assert report.mode == "rows"
    assert "'x' 2, 'z' 4" in report.reason


def test_an_axis_that_is_not_there() -> None:
    model = normal("g (float[2,3] x) => (float[2,3] y) { y = Neg (x) }")
    with pytest.raises(InputError, match="'x' has 2 dimensions, so axis 2"):
        make_dynamic(model, {"x": 2}, evaluate)


# ---- real models ----


@pytest.mark.parametrize(
    "name",
    ["mnist8/mnist-8.onnx", "attention_mnist/self-attention-mnist-pgd-medium-sim.onnx"],
)
def test_real_models_of_one_row(name: str) -> None:
    path = shared(name)
    before = load(path)
    model = normalize(raise_opset(load(path)), evaluate).model
    assert make_dynamic(model, axes(model), evaluate) == BatchReport("rewritten", 1)
    compare(before, model, 1, rows=7)


@pytest.mark.parametrize(
    "name",
    [
        "dianna/mnist_model.onnx",
        "dianna/geometric_shapes_model.onnx",
        "dianna/season_prediction_model_temp_max_binary.onnx",
        "dianna/penguin_model.onnx",
        "resnet8_cifar10_nhwc/pretrainedResnet.onnx",
        "vww_nhwc/vww_96_float.onnx",
        "squeezenet/squeezenet1.0-dc.onnx",
        "squeezenet/squeezenet1.0-dc-qdq-int8.onnx",
    ],
)
def test_real_models_with_a_symbol(name: str) -> None:
    model = normalize(raise_opset(load(shared(name))), evaluate).model
    assert make_dynamic(model, axes(model), unused) == BatchReport("dynamic", None)
    assert all(str(v.shape[0]) == "examples" for v in model.graph.outputs)
