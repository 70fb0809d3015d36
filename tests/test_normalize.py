"""The normal form: what goes, what stays, and that the numbers don't change."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxplain.errors import ModelError
from onnxplain.graph.load import load
from onnxplain.graph.normalize import Normalized, fold_batchnorm, normalize
from onnxplain.run.session import Session
from tests.evaluate import evaluate, random_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 21, "f" : 1]>'


def model(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(HEAD + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return load(proto)


def checked(text: str, **weights: np.ndarray) -> Normalized:
    """The normal form, after comparing its outputs with the model's as it was."""
    before = model(text, **weights)
    feeds = random_feeds(before)
    expected = evaluate(before, feeds)
    result = normalize(model(text, **weights), evaluate)
    found = evaluate(result.model, {k: v for k, v in feeds.items() if k in names(result)})
    assert list(found) == list(expected)
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, rtol=1e-5, atol=1e-4)
    values = [v.name for n in result.model.graph for v in n.outputs if v.name != ""]
    values += list(result.model.graph.initializers) + list(names(result))
    assert all(values)
    assert len(set(values)) == len(values)
    return result


def names(result: Normalized) -> list[str | None]:
    return [v.name for v in result.model.graph.inputs]


def operators(result: Normalized) -> list[str]:
    return [node.op_type for node in result.model.graph]


# ---- functions ----


def test_functions_are_inlined_with_their_metadata() -> None:
    text = """
        g (float[2,3] x) => (float[2,3] y) { a = f.Twice (x) y = f.Outer (a) }
        <domain: "f", opset_import: ["" : 21]> Twice (a) => (b) { b = Add (a, a) }
        <domain: "f", opset_import: ["" : 21, "f" : 1]>
        Outer (a) => (c) { b = f.Twice (a) c = Relu (b) }
    """
    result = checked(text)
    assert operators(result) == ["Add", "Add", "Relu"]
    assert not result.model.functions
    before = model(text)
    for node, name in zip(before.graph, ("first", "second"), strict=True):
        node.name = name
        node.metadata_props["scope"] = name
    result = normalize(before, evaluate)
    scopes = [node.metadata_props["scope"] for node in result.model.graph]
    assert scopes == ["first", "second", "second"]
    assert result.aliases == {"first": "a", "second": "y"}


def test_a_function_that_hands_its_input_through() -> None:
    """The name of the call's output must not move to the model's input."""
    result = normalize(
        model("""g (float[2] x) => (float[2] y, float[2] z) { y, a = f.Same (x) z = Neg (a) }
        <domain: "f", opset_import: ["" : 21]> Same (a) => (b, a) { b = Relu (a) }"""),
        evaluate,
    )
    assert names(result) == ["x"]
    assert operators(result) == ["Relu", "Neg"]
    assert result.aliases["a"] == "x"


def test_functions_in_a_circle() -> None:
    with pytest.raises(ModelError, match="circle"):
        normalize(
            model("""g (float[2] x) => (float[2] y) { y = f.A (x) }
            <domain: "f", opset_import: ["" : 21, "f" : 1]> A (a) => (b) { b = f.B (a) }
            <domain: "f", opset_import: ["" : 21, "f" : 1]> B (a) => (b) { b = f.A (a) }"""),
            evaluate,
        )


# ---- copies ----


def test_identities_leave_aliases() -> None:
    text = """g (float[2] x) => (float[2] y) {
        [first] a = Identity (x) b = Neg (a) c = Identity (b) [third] d = Identity (c)
        e = Relu (d) y = Identity (e) }"""
    result = checked(text)
    assert operators(result) == ["Neg", "Relu"]
    expected = {"first": "x", "a": "x", "c": "b", "third": "b", "d": "b", "e": "y"}
    assert result.aliases.items() >= expected.items()
    assert set(result.aliases.values()) <= {"x", "b", "y"}


def test_emptied_scopes_leave_aliases() -> None:
    proto = onnx.parser.parse_model(
        HEAD + "g (float[2] x) => (float[2] y) { a = Identity(x)  b = Exp(a)  y = Sin(b) }"
    )
    for node, name in zip(proto.graph.node, ("/a/b/Identity", "/a/Exp", "/Sin"), strict=True):
        node.name = name
    result = normalize(load(proto), evaluate)
    assert result.aliases == {"a": "x", "/a/b/Identity": "x", "a.b#0": "x"}


def test_outputs_keep_their_names() -> None:
    """An input, or a value that is an output already, can't take another output's name."""
    text = """g (float[2] x) => (float[2] a, float[2] b, float[2] c, float[2] w) {
        a = Identity (x) b = Neg (x) c = Identity (b) w = Identity (k) }"""
    result = checked(text, k=np.ones(2, np.float32))
    assert operators(result).count("Identity") == 3


def test_identities_in_subgraphs() -> None:
    result = checked("""g (float[2] x) => (float[2] y) {
        s = ReduceSum <keepdims=0> (x) z = Sub (s, s) t = Greater (s, z) i = Identity (x)
        y = If (t) <then_branch = p () => (float[2] a) { a = Identity (i) },
                    else_branch = q () => (float[2] c) { b = Neg (i) c = Identity (b) }> }""")
    branches = [a.as_graph() for a in list(result.model.graph)[-1].attributes.values()]
    assert [[n.op_type for n in g] for g in branches] in (
        [["Identity"], ["Neg"]],
        [["Neg"], ["Identity"]],
    )


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        ("a = Dropout (x)", False),
        ("a = Dropout (x, ratio)", False),
        ("a = Dropout (x, ratio, off)", False),
        ("a, mask = Dropout (x, ratio)", False),
        ("a = Dropout (x, ratio, on)", True),
        ("a, m = Dropout (x) n = Cast <to=1> (m) b = Add (a, n)", True),
    ],
)
def test_dropout(call, kept) -> None:
    last = "b" if "b = " in call else "a"
    weights = {"ratio": np.float32(0.0), "on": np.asarray(True), "off": np.asarray(False)}
    result = checked(
        f"g (float[2] x) => (float[2] y) {{ {call} y = Neg ({last}) }}",
        **{k: np.asarray(v) for k, v in weights.items() if k in call},
    )
    assert ("Dropout" in operators(result)) == kept
    assert ("a" in result.aliases) != kept


# ---- constants ----


def test_constants_of_every_form() -> None:
    result = checked("""g (float[2,2] x) => (float[2] y, float z) {
        i = Constant <value_int=1> () a = Constant <value_ints=[0, 1]> ()
        f = Constant <value_float=2.5> () v = Constant <value_floats=[1.0, 3.0]> ()
        t = Constant <value=float[2] {4, 5}> ()
        p = Gather <axis=0> (x, i) q = Add (p, v) r = Mul (q, t) s = Mul (r, f)
        u = Unsqueeze (s, a) y = Squeeze (u, a) z = Constant <value_float=7.0> () }""")
    # A constant that is an output of the model stays a node.
    assert operators(result).count("Constant") == 1


def test_weights_that_are_also_inputs() -> None:
    text = "g (float[2] x, float[2] w) => (float[2] y) { y = Add (x, w) }"
    assert names(checked(text, w=np.ones(2, np.float32))) == ["x"]


def test_constants_are_folded_in_one_call() -> None:
    text = """g (float[4,3] x) => (float[4,3] y, float[3] k) {
        a = Transpose (w) b = Neg (a) c = Exp (b) d = ReduceSum <keepdims=0> (c, axes)
        k = Neg (d) m = MatMul (x, b) y = Add (m, d) }"""
    calls = []

    def counted(part: ir.Model, feeds: dict) -> dict:
        calls.append([n.op_type for n in part.graph])
        return evaluate(part, feeds)

    w = np.arange(9, dtype=np.float32).reshape(3, 3) / 9
    weights = {"w": w, "axes": np.asarray([0])}
    result = normalize(model(text, **weights), counted)
    assert calls == [["Transpose", "Neg", "Exp", "ReduceSum"]]
    assert operators(result) == ["Neg", "MatMul", "Add"]
    np.testing.assert_array_equal(result.model.graph.initializers["b"].const_value.numpy(), -w.T)
    checked(text, **weights)


def test_what_is_not_folded() -> None:
    """Large results, random numbers, quantized weights."""
    result = checked(
        """g (float[600,600] x) => (float[600,600] y) {
        big = Expand (one, shape) q = DequantizeLinear (w, scale) r = RandomNormal <shape=[1]> ()
        zero = Sub (r, r) a = Add (x, big) b = Add (a, q) y = Add (b, zero) }""",
        one=np.ones(1, np.float32),
        shape=np.asarray([600, 600]),
        w=np.asarray([5], np.int8),
        scale=np.float32(0.5).reshape(()),
    )
    assert {"Expand", "DequantizeLinear", "RandomNormal"} <= set(operators(result))


def test_large_weights_are_folded_where_that_does_not_grow_the_model() -> None:
    w = np.random.default_rng(0).random((600, 500), np.float32)
    text = "g (float[2,500] x) => (float[2,600] y) { t = Transpose (w) y = MatMul (x, t) }"
    assert operators(checked(text, w=w)) == ["MatMul"]


def test_shape_arithmetic_of_the_inputs_stays() -> None:
    """A fixed batch size must not become a constant before it has been made dynamic."""
    result = checked("""g (float[2,3] x) => (float[6] y) {
        s = Shape (x) p = ReduceProd (s) y = Reshape (x, p) }""")
    assert operators(result)[0] == "Shape"


# ---- order and names ----


def test_dead_nodes_and_weights_go() -> None:
    result = checked(
        "g (float[2] x) => (float[2] y) { a = Exp (x) b = Add (a, w) y = Neg (x) }",
        w=np.ones(2, np.float32),
    )
    assert operators(result) == ["Neg"]
    assert not result.model.graph.initializers


def test_nodes_are_sorted() -> None:
    proto = onnx.parser.parse_model(
        HEAD + "g (float[2] x) => (float[2] y) { a = Exp (x) b = Neg (a) y = Relu (b) }"
    )
    proto.graph.node.reverse()
    result = normalize(load(proto), evaluate)
    assert operators(result) == ["Exp", "Neg", "Relu"]


def test_a_cycle() -> None:
    with pytest.raises(ModelError, match="cycle"):
        normalize(
            model("g (float[2] x) => (float[2] y) { a = Add (x, b) b = Neg (a) y = Relu (b) }"),
            evaluate,
        )


def test_names_are_unique_and_absent_outputs_stay_absent() -> None:
    before = model(
        "g (float[3,2,4] x) => (float[1,2,5] y) { , y = GRU <hidden_size=5> (x, w, r) }",
        w=np.ones((1, 15, 4), np.float32),
        r=np.ones((1, 15, 5), np.float32),
    )
    node = normalize(before, evaluate).model.graph[0]
    assert [v.name for v in node.outputs] == ["", "y"]
    assert node.name


def test_shapes_are_inferred() -> None:
    result = checked("""g (float[N,3] x) => (float[N,6] y) {
        a = Concat <axis=1> (x, x) y = Neg (a) }""")
    value = result.model.graph[0].outputs[0]
    assert value.dtype == ir.DataType.FLOAT
    assert [str(d) for d in value.shape] == ["N", "6"]


# ---- batch normalization ----

RNG = np.random.default_rng(1)


def weights(channels: int, *shape: int, bias: bool = True) -> dict[str, np.ndarray]:
    found = {"w": RNG.standard_normal(shape).astype(np.float32)}
    if bias:
        found["c"] = RNG.standard_normal(channels).astype(np.float32)
    for name in "sbmv":
        found[name] = (RNG.random(channels) + 0.5).astype(np.float32)
    return found


@pytest.mark.parametrize(
    ("x", "before", "params"),
    [
        ("float[2,4,5,5]", "Conv (x, w)", weights(6, 6, 4, 3, 3, bias=False)),
        ("float[2,4,5,5]", "Conv <group=2> (x, w, c)", weights(6, 6, 2, 3, 3)),
        ("float[2,4,5]", "Conv (x, w, c)", weights(6, 6, 4, 3)),
        ("float[2,4,5,5]", "ConvTranspose (x, w)", weights(6, 4, 6, 2, 2, bias=False)),
        ("float[2,4,5,5]", "ConvTranspose <group=2> (x, w, c)", weights(6, 4, 3, 2, 2)),
        ("float[2,4]", "Gemm (x, w, c)", weights(3, 4, 3)),
        ("float[2,4]", "Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, c)", weights(3, 3, 4)),
        ("float[2,4]", "Gemm <beta=0.0> (x, w, c)", weights(3, 4, 3)),
        ("float[2,4]", "Gemm (x, w)", weights(3, 4, 3, bias=False)),
    ],
)
def test_batch_normalization_is_folded(x, before, params) -> None:
    text = f"""g ({x} x) => (float[] y) {{
        h = {before} n = BatchNormalization <epsilon=0.01> (h, s, b, m, v) y = Relu (n) }}"""
    result = checked(text, **params)
    feeds = random_feeds(result.model)
    expected = evaluate(result.model, feeds)["y"]
    fold_batchnorm(result.model, set())
    assert operators(result) == [before.split()[0], "Relu"]
    assert result.model.graph[0].outputs[0].name == "n"
    np.testing.assert_allclose(evaluate(result.model, feeds)["y"], expected, rtol=1e-5, atol=1e-5)


def test_folding_is_done_in_double_precision() -> None:
    text = """g (float[2,1,3] x) => (float[] y) {
        h = Conv (x, w) y = BatchNormalization <epsilon=0.0> (h, s, b, m, v) }"""
    p = weights(1, 1, 1, 1, bias=False)
    p["v"][:] = 3
    result = normalize(model(text, **p), evaluate)
    fold_batchnorm(result.model, set())
    folded = result.model.graph[0].inputs[1].const_value.numpy()
    factor = np.float64(p["s"][0]) / np.sqrt(np.float64(3))
    assert folded.item() == np.float32(np.float64(p["w"].item()) * factor)


@pytest.mark.parametrize(
    ("outputs", "tail", "keep"),
    [
        ("float[] y", "", {"h"}),
        ("float[] y, float[] h", "", set()),
        ("float[] y, float[] z", "z = Neg (h)", set()),
    ],
)
def test_batch_normalization_stays_where_the_value_before_it_is_needed(outputs, tail, keep) -> None:
    text = f"""g (float[2,4,5] x) => ({outputs}) {{
        h = Conv (x, w) y = BatchNormalization (h, s, b, m, v) {tail} }}"""
    result = checked(text, **weights(6, 6, 4, 3, bias=False))
    fold_batchnorm(result.model, keep)
    assert "BatchNormalization" in operators(result)


def test_computed_weights_are_not_folded() -> None:
    text = """g (float[2,4,5] x, float[6,4,3] w) => (float[] y) {
        h = Conv (x, w) y = BatchNormalization (h, s, b, m, v) }"""
    p = weights(6, 6, 4, 3, bias=False)
    del p["w"]
    result = checked(text, **p)
    fold_batchnorm(result.model, set())
    assert "BatchNormalization" in operators(result)


@pytest.mark.parametrize("axis", [1, -2])
def test_pads_of_some_axes_survive_onnxruntime(axis: int) -> None:
    """Its optimizer moves a Transpose past a Pad with axes, and then reads outside of them."""
    text = """g (float[2,2,3] x) => (float[] y) {
        t = Transpose<perm=[0,2,1]> (x)
        p = Pad (t, pads, , axes)
        y = Transpose<perm=[0,2,1]> (p) }"""
    result = checked(text, pads=np.array([1, 2]), axes=np.array([axis]))
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    (got,) = Session(result.model, ["CPUExecutionProvider"])({"x": x}).values()
    np.testing.assert_array_equal(got, np.pad(x, [(0, 0), (0, 0), (1, 2)]))
