"""Layer names: values, nodes and framework scopes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnxplain as ox
from onnxplain.graph.names import scopes
from tests.helpers import HEAD, proto

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def named(text: str, names: list[str], metadata: list[str] | None = None) -> ox.Model:
    """A model whose nodes carry an exporter's names or scope metadata."""
    built = proto(HEAD + text)
    for node, name in zip(built.graph.node, names, strict=True):
        node.name = name
    for node, record in zip(built.graph.node, metadata or [], strict=False):
        node.metadata_props.append(
            onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=record)
        )
    return ox.Model(built)


CHAIN = "g (float[N,4] x) => (float[N,4] y) { a = Exp(x)  b = Sin(a)  c = Cos(b)  y = Tanh(c) }"


def scope_of(name: str) -> tuple[str, ...]:
    import onnx_ir as ir

    return scopes(ir.node("Relu", [ir.val("x")], name=name))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/layer4/layer4.1/conv2/Conv", ("layer4", "layer4.1", "layer4.1.conv2")),
        (
            "/layers/layers.0/blocks/blocks.1/attn/MatMul",
            (
                "layers",
                "layers.0",
                "layers.0.blocks",
                "layers.0.blocks.1",
                "layers.0.blocks.1.attn",
            ),
        ),
        ("/blocks.0/norm1/Div", ("blocks.0", "blocks.0.norm1")),
        ("model/dense/MatMul", ("model", "model/dense")),
        ("/Relu", ()),
        ("Relu_3", ()),
    ],
)
def test_scopes_of_node_names(name: str, found: tuple[str, ...]) -> None:
    assert scope_of(name) == found


def test_torchscript_scopes() -> None:
    model = named(CHAIN, ["/stem/Exp", "/stem/Sin", "/body/body.0/act/Cos", "/head/Tanh"])
    activation = ox.LayerActivation
    np.testing.assert_allclose(activation(model, "stem").attribute(X), np.sin(np.exp(X)), 1e-4)
    np.testing.assert_allclose(
        activation(model, "body.0.act").attribute(X), np.cos(np.sin(np.exp(X))), 1e-3
    )
    entering = activation(model, "body").attribute(X, attribute_to_layer_input=True)
    np.testing.assert_allclose(entering, np.sin(np.exp(X)), 1e-4)
    by_node = activation(model, "/stem/Exp").attribute(X)
    np.testing.assert_allclose(by_node, np.exp(X), 1e-5)
    listed = {layer.name: layer for layer in model.layers()}
    assert listed["c"].scope == "body.0.act"
    assert listed["c"].operator == "Cos"
    assert listed["c"].shape == ("examples", 4)


def test_dynamo_scopes() -> None:
    records = [
        "['', 'stem', 'exp']",
        "['', 'stem', 'sin']",
        "['', 'body', 'body.0', 'cos']",
        "['', 'tanh']",
    ]
    model = named(CHAIN, ["n0", "n1", "n2", "n3"], records)
    np.testing.assert_allclose(
        ox.LayerActivation(model, "body.0").attribute(X), np.cos(np.sin(np.exp(X))), 1e-3
    )


def test_keras_layers_without_their_prefix() -> None:
    prefix = "StatefulPartitionedCall/model"
    model = named(
        CHAIN,
        [
            f"{prefix}/dense/MatMul",
            f"{prefix}/dense/BiasAdd",
            f"{prefix}/dense_1/MatMul",
            f"{prefix}/out/Tanh",
        ],
    )
    np.testing.assert_allclose(
        ox.LayerActivation(model, "dense").attribute(X), np.sin(np.exp(X)), 1e-4
    )


REUSED = """g (float[N,4] x) => (float[N,4] y) {
    a = Relu(x)  b = Sin(a)  c = Relu(b)  d = Cos(c)  y = Relu(d)
}"""


def test_a_reused_module_is_its_last_call() -> None:
    model = named(REUSED, ["/act/Relu", "/Sin", "/act/Relu_1", "/Cos", "/act/Relu_2"])
    first = np.maximum(X, 0)
    with pytest.warns(UserWarning, match="3 times"):
        layer = ox.LayerActivation(model, "act")
    with pytest.warns(UserWarning, match="act#0"):
        last = layer.attribute(X)
    np.testing.assert_allclose(last, model(X)["y"])
    np.testing.assert_allclose(ox.LayerActivation(model, "act#0").attribute(X), first)
    np.testing.assert_allclose(
        ox.LayerActivation(model, "act#1").attribute(X), np.maximum(np.sin(first), 0), 1e-5
    )
    with pytest.raises(ox.LayerError, match="3 time"):
        ox.LayerActivation(model, "act#3")


def test_branches_of_one_call_are_a_tuple() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) { a = Exp(x)  b = Sin(x)  y = Add(a, b) }"""
    model = named(text, ["/two/Exp", "/two/Sin", "/Add"])
    got = ox.LayerActivation(model, "two").attribute(X)
    assert isinstance(got, tuple)
    np.testing.assert_allclose(got[1], np.sin(X), 1e-5)
    parts = ox.LayerGradientXActivation(model, "two").attribute(X, target=1)
    assert [p.shape for p in parts] == [(3, 4), (3, 4)]


def test_unknown_and_ambiguous_names() -> None:
    model = named(CHAIN, ["a/act/Exp", "b/act/Sin", "c/Cos", "d/Tanh"])
    with pytest.raises(ox.LayerError, match="ambiguous"):
        ox.LayerActivation(model, "act")
    with pytest.raises(ox.LayerError, match="did you mean"):
        ox.LayerActivation(model, "a/akt")
    with pytest.raises(ox.LayerError, match="string"):
        model.resolve(3)  # type: ignore[arg-type]
    for name in ("b/act#", "b/act#x", "b/act#-1", "b/act#²"):
        with pytest.raises(ox.LayerError, match="no layer"):
            model.resolve(name)
    with pytest.raises(ox.LayerError, match="nothing enters"):
        ox.LayerActivation(model, "x").attribute(X, attribute_to_layer_input=True)


def test_removed_identities_keep_their_names() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { a = Exp(x)  b = Identity(a)  y = Sin(b) }"
    model = named(text, ["e", "/pass/Identity", "s"])
    np.testing.assert_allclose(ox.LayerActivation(model, "b").attribute(X), np.exp(X), 1e-5)


def test_removed_modules_are_the_value_they_hand_on() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        a = Exp(x)  b = Identity(a)  c = Sin(b)  d = Dropout(c)  e = Tanh(d)  y = Cos(e)
    }"""
    names = ["e", "/body/drop/Identity", "/body/Sin", "/body/drop/Dropout", "t", "c"]
    model = named(text, names)
    first, last = np.exp(X), np.sin(np.exp(X))
    with pytest.warns(UserWarning, match="drop#0"):
        got = ox.LayerActivation(model, "body.drop").attribute(X)
    np.testing.assert_allclose(got, last, 1e-4)
    for side in (False, True):
        layer = ox.LayerActivation(model, "body.drop#0")
        got = layer.attribute(X, attribute_to_layer_input=side)
        np.testing.assert_allclose(got, first, 1e-5)
    assert [v.name for v in model.resolve("body")] == ["c"]
    with pytest.raises(ox.LayerError, match="2 time"):
        model.resolve("body.drop#2")


def test_a_value_with_the_name_of_another_module() -> None:
    """PyTorch's dynamo exporter numbers values by operator: ``sin`` need not be of module sin."""
    text = "g (float[N,4] x) => (float[N,4] y) { sin = Sin(x)  a = Sin(sin)  y = Tanh(a) }"
    model = named(text, ["node_sin", "a", "y"], ["['', 'sin']", "['', 'sin', 'sin_1']", "['y']"])
    with pytest.raises(
        ox.LayerError, match=r"ambiguous.*'sin#0' for the module and 'node_sin' for"
    ):
        ox.LayerActivation(model, "sin")
    for name, want in (("sin#0", np.sin(np.sin(X))), ("node_sin", np.sin(X))):
        np.testing.assert_allclose(ox.LayerActivation(model, name).attribute(X), want, 1e-5)
    (value,) = model.resolve("node_sin")
    assert model.names.unique(value) == "node_sin"
    same = named(text, ["node_sin", "a", "y"], ["['', 'sin', 'sin']", "['', 'a']", "['y']"])
    assert same.resolve("sin") == same.resolve("sin#0") == same.resolve("node_sin")


def test_an_input_with_the_name_of_a_module() -> None:
    model = named("g (float[N,4] x) => (float[N,4] y) { y = Exp(x) }", ["/x/Exp"])
    with pytest.warns(UserWarning, match=r"taken for the model input.*'x#0'"):
        assert [v.name for v in model.resolve("x")] == ["x"]
    assert [v.name for v in model.resolve("x#0")] == ["y"]


def twice(suffix: str, *, shared: bool = True) -> ox.Model:
    """A block of MatMul and Relu that feeds itself, the calls named as an exporter does."""
    text = """g (float[N,4] x) => (float[N,4] y) {
        a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  d = Relu(c)  y = Tanh(d) }"""
    w = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    built = proto(HEAD + text, w=w, v=w if shared else w + 1)
    names = ["fc/MatMul", "act/Relu", f"fc{suffix}/MatMul", f"act{suffix}/Relu"]
    for node, name in zip(built.graph.node, names, strict=False):
        node.name = f"/block/{name}"
    return ox.Model(built)


@pytest.mark.parametrize("suffix", ["", "_1"])
def test_a_block_that_feeds_itself(suffix: str) -> None:
    model = twice(suffix)
    for name, sides in {"block": ("d", "b"), "block.fc": ("c", "b")}.items():
        with pytest.warns(UserWarning, match=f"{name}#0"):
            assert [v.name for v in model.resolve(name)] == [sides[0]]
        with pytest.warns(UserWarning, match="2 times"):
            assert [v.name for v in model.resolve(name, entering=True)] == [sides[1]]
    assert [v.name for v in model.resolve("block#0")] == ["b"]
    assert [v.name for v in model.resolve("block#1", entering=True)] == ["b"]


def test_modules_side_by_side_are_branches_of_one_call() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { a = Relu(x)  b = Relu(x)  y = Add(a, b) }"
    model = named(text, ["/multi/one/Relu", "/multi/two/Relu", "/Add"])
    assert [v.name for v in model.resolve("multi")] == ["a", "b"]


def test_modules_that_only_look_alike() -> None:
    model = twice("_1", shared=False)
    assert [v.name for v in model.resolve("block")] == ["d"]
    assert [v.name for v in model.resolve("block", entering=True)] == ["x"]
    assert [v.name for v in model.resolve("block.fc")] == ["a"]
    with pytest.warns(UserWarning, match="'block.act_1' looks like a later call"):
        assert [v.name for v in model.resolve("block.act")] == ["b"]


def tokens(body: str) -> ox.Model:
    """A classifier of five tokens: ``body`` makes ``e`` [N, 5, 4] of ``ids``."""
    rng = np.random.default_rng(2)
    tables = {t: rng.standard_normal((9, 4)).astype(np.float32) for t in ("word", "position")}
    text = f"""g (int64[N,5] ids) => (float[N,4] y) {{
        {body}  t = Tanh(e)  y = ReduceMean<keepdims=0>(t, one) }}"""
    weights = tables | {"one": np.asarray([1]), "axis": np.asarray(1), "pad": np.asarray(1)}
    return ox.Model(proto(HEAD + text, **weights, long=np.asarray([0, -1])))


def test_the_embedding_is_looked_up_by_the_ids_themselves() -> None:
    """RoBERTa computes positions from the ids, and looks them up first."""
    model = tokens("""same = Equal(ids, pad)  kept = Not(same)  mask = Cast<to=7>(kept)
        p = CumSum(mask, axis)  places = Gather(position, p)
        small = Cast<to=6>(ids)  row = Reshape(small, long)  words = Gather(word, row)
        e = Add(places, words)""")
    assert [v.name for v in model.embeddings("ids")] == ["words"]
    layer = model.embedding("ids")
    assert layer is not None
    assert layer.name == "words"


def test_several_embeddings_of_the_same_ids() -> None:
    model = tokens("a = Gather(word, ids)  b = Gather(position, ids)  e = Add(a, b)")
    assert [v.name for v in model.embeddings("ids")] == ["a", "b"]
    with pytest.raises(ox.LayerError, match=r"2 embeddings \('a', 'b'\): choose one with layer="):
        model.embedding("ids")
    ids = np.asarray([[1, 2, 3, 4, 5]])
    with pytest.raises(ox.LayerError, match="choose one"):
        ox.explain(model, ids, target=0)
    assert list(ox.explain(model, ids, target=0, layer="a").arrays) == ["a"]


def test_no_embedding() -> None:
    model = tokens("f = Cast<to=1>(ids)  u = Unsqueeze(f, one)  e = Identity(u)")
    assert model.embeddings("ids") == ()
    assert model.embedding("ids") is None
