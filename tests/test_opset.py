"""Raising the opset changes the form of a model and none of its numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.load import load
from onnxplain.graph.normalize import normalize
from onnxplain.graph.opset import _CHANGES, NEWEST, OLDEST, raise_opset
from tests.evaluate import evaluate, random_feeds
from tests.helpers import shared

X = "float[2,3,4,4] x"


def model(opset: int, body: str, inputs: str = X, weights=None, output="float[]") -> ir.Model:
    text = (
        f'<ir_version: 7, opset_import: ["" : {opset}]> g ({inputs}) => ({output} y) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return load(proto)


def f32(*numbers: float) -> np.ndarray:
    return np.asarray(numbers, np.float32)


def i64(numbers) -> np.ndarray:
    return np.asarray(numbers, np.int64)


STATISTICS = {"s": f32(1, 2, 3), "b": f32(0.5, -1, 2), "m": f32(0.1, 0, -0.3), "v": f32(1, 2, 0.5)}
BOXES = {"rois": f32([0, 0, 3, 3], [1, 1, 2, 3]), "at": i64([0, 1])}

ROWS = [
    (7, 'y = Upsample <mode="nearest", scales=[1.0, 1.0, 2.0, 3.0]> (x)', X, {}),
    (7, 'y = Upsample <mode="linear", scales=[1.0, 1.0, 2.0, 2.0]> (x)', X, {}),
    (9, 'y = Upsample <mode="nearest"> (x, s)', X, {"s": f32(1, 1, 1.5, 2)}),
    (9, 'y = Upsample <mode="linear"> (x, s)', X, {"s": f32(1, 1, 2, 2)}),
    (10, 'y = Resize <mode="nearest"> (x, s)', X, {"s": f32(1, 1, 2.5, 2)}),
    (10, 'y = Resize <mode="nearest"> (x, s)', X, {"s": f32(1, 1, 0.6, 0.5)}),
    (10, 'y = Resize <mode="linear"> (x, s)', X, {"s": f32(1, 1, 0.5, 0.5)}),
    (
        11,
        'y = Resize <mode="nearest", coordinate_transformation_mode="tf_half_pixel_for_nn", '
        'nearest_mode="floor"> (x, r, s)',
        X,
        {"r": f32(), "s": f32(1, 1, 1.75, 2)},
    ),
    (
        11,
        'y = Resize <mode="linear"> (x, r, s, z)',
        X,
        {"r": f32(), "s": f32(), "z": i64([2, 3, 7, 2])},
    ),
    (7, "y = BatchNormalization <spatial=1> (x, s, b, m, v)", X, STATISTICS),
    (8, "y = BatchNormalization <epsilon=0.01> (x, s, b, m, v)", X, STATISTICS),
    (9, "y = BatchNormalization (x, s, b, m, v)", X, STATISTICS),
    (13, "y = BatchNormalization (x, s, b, m, v)", X, STATISTICS),
    (7, "y = Dropout <ratio=0.4> (x)", X, {}),
    (10, "y = Dropout (x)", X, {}),
    *[
        (12, f"y = {op} {axis} (x)", X, {})
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for axis in ("", "<axis=0>", "<axis=2>", "<axis=3>", "<axis=-1>")
    ],
    (9, "y = Pad <pads=[0,0,1,2,0,0,0,1], value=1.5> (x)", X, {}),
    (9, "y = Pad <pads=[0,0,1,2,0,0,0,1]> (x)", X, {}),
    (10, 'y = Pad <pads=[0,0,1,2,0,0,0,1], mode="reflect"> (x)', X, {}),
    (10, 'y = Pad <pads=[0,0,1,2,0,0,0,1], mode="edge"> (x)', X, {}),
    (10, "y = Clip <min=-0.5> (x)", X, {}),
    (10, "y = Clip <max=0.5> (x)", X, {}),
    (7, "y = Clip <max=0.5, min=-0.25> (x)", X, {}),
    (10, "y = Clip (x)", X, {}),
    (9, "y = Slice <starts=[1, -3], ends=[2, 9], axes=[1, 2]> (x)", X, {}),
    (9, "y = Slice <starts=[0, 1], ends=[1, 9]> (x)", X, {}),
    (9, "y, i = TopK <k=2, axis=2> (x)", X, {}),
    (10, "y, i = TopK (x, k)", X, {"k": i64([2])}),
    (
        10,
        "y = Scatter <axis=1> (x, i, u)",
        "float[2,3] x",
        {"i": i64([[2, 0]]), "u": f32(9, 8)[None]},
    ),
    (12, "a = Unsqueeze <axes=[0, 3]> (x) y = Squeeze <axes=[3]> (a)", X, {}),
    (12, "a = Unsqueeze <axes=[0]> (x) y = Squeeze (a)", X, {}),
    (11, "a, b = Split <axis=2> (x) y = Sub (a, b)", X, {}),
    (11, "a, b = Split <axis=1, split=[1, 2]> (x) y = Sub (a, b)", X, {}),
    (13, "a, b = Split <axis=2> (x) y = Sub (a, b)", X, {}),
    (12, "y = ReduceSum <axes=[1, -1], keepdims=0> (x)", X, {}),
    (12, "y = ReduceSum (x)", X, {}),
    *[
        (17, f"a = Exp(x) y = Reduce{op} <axes=[1, 2]> (a)", X, {})
        for op in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    ],
    (17, "y = ReduceMean <keepdims=0> (x)", X, {}),
    (
        18,
        "y = GroupNormalization <num_groups=2> (x, s, b)",
        "float[2,6,4] x",
        {"s": f32(1, 3), "b": f32(0.5, -1)},
    ),
    (16, 'y = GridSample <mode="bilinear"> (x, g)', X + ", float[2,2,2,2] g", {}),
    (16, 'y = GridSample <mode="bicubic"> (x, g)', X + ", float[2,2,2,2] g", {}),
    (16, "y = GridSample (x, g)", X + ", float[2,2,2,2] g", {}),
    (17, "y = DFT <axis=1> (x)", "float[2,5,1] x", {}),
    (17, "y = DFT (x)", "float[2,5,1] x", {}),
    (10, "y = RoiAlign <output_height=2, output_width=2> (x, rois, at)", X, BOXES),
    (16, "y = RoiAlign <output_height=2, output_width=2> (x, rois, at)", X, BOXES),
]


@pytest.mark.parametrize(("opset", "body", "inputs", "weights"), ROWS)
def test_numbers_stay(opset, body, inputs, weights) -> None:
    before = model(opset, body, inputs, weights)
    feeds = random_feeds(before)
    expected = evaluate(before, feeds)["y"]
    after = raise_opset(model(opset, body, inputs, weights))
    assert after.graph.opset_imports[""] == 21
    proto = ir.to_proto(after)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(evaluate(after, feeds)["y"], expected, rtol=1e-6, atol=1e-6)


def test_batch_normalization_of_every_position() -> None:
    """spatial=0: statistics of the shape [C, H, W], which onnxruntime has no kernel for."""
    rng = np.random.default_rng(0)
    w = {k: rng.random((3, 4, 4), np.float32) + 0.5 for k in "sbmv"}
    body = "y = BatchNormalization <spatial=0, epsilon=0.1> (x, s, b, m, v)"
    after = raise_opset(model(7, body, weights=w))
    feeds = random_feeds(after)
    expected = (feeds["x"] - w["m"]) / np.sqrt(w["v"] + 0.1) * w["s"] + w["b"]
    np.testing.assert_allclose(evaluate(after, feeds)["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_numbers_that_become_inputs_have_the_dtype_of_the_data(dtype) -> None:
    body = "a = Clip <min=-0.5, max=0.5> (x) y = Pad <pads=[1, 1], value=2.0> (a)"
    after = raise_opset(model(10, body, f"{dtype}[5] x", output=f"{dtype}[]"))
    feeds = random_feeds(after)
    expected = np.pad(feeds["x"].clip(-0.5, 0.5), 1, constant_values=2)
    np.testing.assert_array_equal(evaluate(after, feeds)["y"], expected)


def test_subgraphs_are_raised_too() -> None:
    body = """c = ReduceMax <keepdims=0> (x) zero = Sub (c, c) t = Greater (c, zero)
        y = If (t) <
            then_branch = t1 () => (float[2,1,3] p) { p = Unsqueeze <axes=[1]> (x) },
            else_branch = t2 () => (float[2,1,3] q) {
                r = Clip <max=0.0> (x) q = Unsqueeze <axes=[1]> (r)
            }
        >"""
    before, after = model(10, body, "float[2,3] x"), model(10, body, "float[2,3] x")
    raise_opset(after)
    for sign in (1, -1):
        feeds = {"x": sign * np.abs(random_feeds(before)["x"])}
        np.testing.assert_array_equal(evaluate(after, feeds)["y"], evaluate(before, feeds)["y"])


def test_functions_have_an_opset_of_their_own() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 18, "f" : 1]>
        g (float[2,3] x) => (float[2,3] y) { y = f.Center (x) }
        <domain: "f", opset_import: ["" : 13]>
        Center (a) => (b) { m = ReduceMean <axes=[1]> (a) b = Sub (a, m) }
    """
    after = raise_opset(load(onnx.parser.parse_model(text)))
    feeds = random_feeds(after)
    centered = feeds["x"] - feeds["x"].mean(1, keepdims=True)
    np.testing.assert_allclose(evaluate(after, feeds)["y"], centered, rtol=1e-6)


def test_names_metadata_and_other_domains_stay() -> None:
    text = """
        <ir_version: 7, opset_import: ["" : 11, "com.microsoft" : 1]>
        g (float[2,3,4] x) => (float[2,3,4] y) {
            a = com.microsoft.Gelu (x)
            y = Softmax <axis=1> (a)
        }
    """
    before = onnx.parser.parse_model(text)
    before.graph.node[1].name = "/head/Softmax"
    before.graph.node[1].metadata_props.add(key="scope", value="head")
    after = raise_opset(load(before))
    y = next(v for v in after.graph.outputs if v.name == "y")
    assert y.producer().name == "/head/Softmax"
    assert all(n.metadata_props.get("scope") == "head" for n in after.graph if n.op_type != "Gelu")
    names = [n.name for n in after.graph if n.name]
    assert len(names) == len(set(names))
    feeds = random_feeds(after)
    np.testing.assert_allclose(evaluate(after, feeds)["y"], evaluate(before, feeds)["y"], rtol=1e-6)


def test_later_opsets_stay() -> None:
    assert raise_opset(model(23, "y = Relu (x)")).graph.opset_imports[""] == 23


@pytest.mark.parametrize(
    ("opset", "body", "says"),
    [
        (NEWEST + 1, "y = Relu (x)", f"{NEWEST} at most"),
        (OLDEST - 1, "y = Relu (x)", f"opset {OLDEST - 1}"),
        (9, "y = ImageScaler <scale=2.0> (x)", "ImageScaler"),
        (9, 'y = Resize <mode="nearest"> (x, s)', "Resize"),
        (10, 'y = Resize <mode="nearest"> (x, s)', "enlarges one axis and shrinks another"),
        (
            13,
            "y, m2, v2 = BatchNormalization <training_mode=1> (x, s, b, m, v) z = Relu (m2)",
            "training",
        ),
    ],
)
def test_what_cannot_be_raised_is_named(opset, body, says) -> None:
    weights = STATISTICS if "Batch" in body else {"s": f32(1, 1, 2, 0.5)}
    with pytest.raises(UnsupportedModelError, match=says):
        raise_opset(model(opset, body, weights=weights))


def test_every_incompatible_change_of_the_standard_is_known() -> None:
    """Attributes that went or changed, inputs that came or moved, in any opset we raise through."""
    versions: dict[str, dict[int, onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, {})[schema.since_version] = schema
    broken = {
        (name, new)
        for name, found in versions.items()
        for old, new in zip(sorted(found), sorted(found)[1:], strict=False)
        if OLDEST < new <= NEWEST and not compatible(found[old], found[new])
    }
    # Constant's value became optional; BatchNormalization 14 renamed inputs.
    assert broken - {("Constant", 11)} <= set(_CHANGES)
    assert ("Softmax", 13) in broken


def compatible(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    def attributes(schema):
        return {
            k: (a.type, a.required, a.default_value.SerializeToString())
            for k, a in schema.attributes.items()
        }

    before, after = attributes(old), attributes(new)
    kept = all(after.get(k) == a for k, a in before.items())
    added = all(not after[k][1] for k in after.keys() - before.keys())
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    inputs = [i.name for i in new.inputs][: len(old.inputs)] == [i.name for i in old.inputs]
    inputs &= all(i.option != single for i in new.inputs[len(old.inputs) :])
    return kept and added and inputs and not new.deprecated


@pytest.mark.parametrize(
    "name",
    [
        "mnist8/mnist-8.onnx",
        "dianna/mnist_model.onnx",
        "dianna/geometric_shapes_model.onnx",
        "dianna/season_prediction_model_temp_max_binary.onnx",
        "dianna/penguin_model.onnx",
        "resnet8_cifar10_nhwc/pretrainedResnet.onnx",
        "vww_nhwc/vww_96_float.onnx",
        "attention_mnist/self-attention-mnist-pgd-medium-sim.onnx",
        "squeezenet/squeezenet1.0-dc.onnx",
        "squeezenet/squeezenet1.0-dc-qdq-int8.onnx",
        "wine_xgboost/xgboost_classifier_tree.onnx",
    ],
)
def test_real_models_keep_their_numbers(name) -> None:
    path = shared(name)
    before = load(path)
    after = normalize(raise_opset(load(path)), evaluate).model
    feeds = random_feeds(after)
    expected, found = evaluate(before, feeds), evaluate(after, feeds)
    assert list(expected) == list(found)
    for key, array in expected.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(found[key], array, rtol=1e-5, atol=1e-6 * scale)
