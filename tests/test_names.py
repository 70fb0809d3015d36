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
        ox.LayerActivation(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ox.LayerError, match="nothing enters"):
        ox.LayerActivation(model, "x").attribute(X, attribute_to_layer_input=True)


def test_removed_identities_keep_their_names() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { a = Exp(x)  b = Identity(a)  y = Sin(b) }"
    model = named(text, ["e", "/pass/Identity", "s"])
    np.testing.assert_allclose(ox.LayerActivation(model, "b").attribute(X), np.exp(X), 1e-5)
