"""LSTM, GRU and RNN written out step by step: the values of onnxruntime, and derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxplain as ox
from onnxplain.errors import NoRuleError
from onnxplain.graph import functions
from tests.evaluate import evaluate
from tests.helpers import HEAD, model, proto
from tests.projection import Case, load, make_model, project

rng = np.random.default_rng(0)
T, N, I, H = 3, 2, 4, 5  # noqa: E741
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def case(
    kind: str,
    *parts: str,
    directions: int = 1,
    steps: int = T,
    **attributes: Any,
) -> Case:
    """One node; ``parts`` names the optional inputs it has: b, h, c, p."""
    gates, first = GATES[kind] * H, attributes.get("layout", 0)
    shapes = {
        "x": (N, steps, I) if first else (steps, N, I),
        "w": (directions, gates, I),
        "r": (directions, gates, H),
        "b": (directions, 2 * gates),
        "h": (N, directions, H) if first else (directions, N, H),
        "c": (N, directions, H) if first else (directions, N, H),
        "p": (directions, 3 * H),
    }
    order = ("x", "w", "r", "b", None, "h") + (("c", "p") if kind == "LSTM" else ())
    given = {"x", "w", "r", *parts}
    inputs = [rng.standard_normal(shapes[k]) * 0.7 if k in given else None for k in order]
    while inputs[-1] is None:
        inputs.pop()
    name = "-".join((*parts, f"{directions}", *map(str, attributes.values())))
    outputs = 3 if kind == "LSTM" else 2
    return Case(kind, inputs, {"hidden_size": H, **attributes}, outputs=outputs, name=name)


BOTH = {"directions": 2, "direction": "bidirectional"}
CASES = [
    case("LSTM"),
    case("LSTM", steps=1),
    case("LSTM", "b", "h", "c", "p"),
    case("LSTM", "b", "c", direction="reverse"),
    case("LSTM", "b", "h", "c", "p", **BOTH),
    case("LSTM", "h", activations=["HardSigmoid", "Softsign", "Relu"], activation_alpha=[0.3]),
    case(
        "LSTM",
        "b",
        activations=["Sigmoid", "LeakyRelu", "Tanh", "HardSigmoid", "Elu", "Softplus"],
        activation_alpha=[0.2, 0.25, 0.7],
        activation_beta=[0.4],
        **BOTH,
    ),
    case("GRU"),
    case("GRU", "b", "h"),
    case("GRU", "b", "h", linear_before_reset=1),
    case("GRU", "b", linear_before_reset=1),
    case("GRU", linear_before_reset=1, direction="reverse"),
    case("GRU", "b", "h", linear_before_reset=1, **BOTH),
    case("RNN"),
    case("RNN", "b", "h", **BOTH),
    case("RNN", "b", activations=["Affine"], activation_alpha=[0.5], activation_beta=[0.1]),
    case("RNN", "b", activations=["ScaledTanh"], activation_alpha=[1.5], activation_beta=[0.6]),
    case("RNN", "b", activations=["ThresholdedRelu"], activation_alpha=[0.1]),
    *(
        case("RNN", "b", activations=[name])
        for name in ("Affine", "Elu", "HardSigmoid", "LeakyRelu", "ScaledTanh", "ThresholdedRelu")
    ),
]
ROWS_FIRST = [
    case("LSTM", "b", "h", "c", "p", layout=1, **BOTH),
    case("GRU", "b", "h", layout=1),
    case("RNN", "b", layout=1),
]


def written_out(case: Case, constant: bool) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The case in float32 with its node replaced by the steps, and its feeds."""
    case.const = [i for i in (1, 2, 3, 7) if i < len(case.inputs)] if constant else []
    proto = all_outputs(case)
    graph = load(proto)
    assert functions.expand(graph.graph, graph.graph[0])
    feeds = {
        f"x{i}": np.asarray(a, np.float32)
        for i, a in enumerate(case.inputs)
        if a is not None and i not in case.const
    }
    return graph, feeds


def all_outputs(case: Case) -> onnx.ModelProto:
    proto = make_model(case, "float32")
    kind = proto.graph.output[0].type
    del proto.graph.output[:]
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=f"y{i}", type=kind) for i in range(case.outputs)
    )
    return proto


@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_onnxruntimes(case: Case, constant: bool) -> None:
    graph, feeds = written_out(case, constant)
    assert not {n.op_type for n in graph.graph} & {"LSTM", "GRU", "RNN"}
    want = evaluate(all_outputs(case), feeds)
    for name, got in evaluate(graph, feeds).items():
        np.testing.assert_allclose(got, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ROWS_FIRST, ids=str)
def test_rows_first(case: Case) -> None:
    """onnxruntime has no kernel for this layout: it is the other one with its axes moved."""
    graph, feeds = written_out(case, constant=False)
    inputs = [
        a.swapaxes(0, 1) if i in (0, 5, 6) and a is not None else a
        for i, a in enumerate(case.inputs)
    ]
    attrs = {k: v for k, v in case.attrs.items() if k != "layout"}
    steps_first = Case(case.op, inputs, attrs, outputs=case.outputs)
    moved = {k: a.swapaxes(0, 1) if k in ("x0", "x5", "x6") else a for k, a in feeds.items()}
    want = evaluate(all_outputs(steps_first), moved)
    for name, got in evaluate(graph, feeds).items():
        turned = want[name].transpose((2, 0, 1, 3) if name == "y0" else (1, 0, 2))
        np.testing.assert_allclose(got, turned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("index", [2, 4, 9, 12])
def test_derivatives(index: int, of: int) -> None:
    """Of the steps in float64, by every input, weights included, against finite differences."""
    case = CASES[index]
    graph = load(make_model(Case(case.op, case.inputs, case.attrs, outputs=case.outputs, of=of)))
    assert functions.expand(graph.graph, graph.graph[0])
    feeds = {f"x{i}": np.asarray(a) for i, a in enumerate(case.inputs) if a is not None}
    project(graph, f"y{of}", list(feeds), feeds, np.random.default_rng(1), 1e-6)


# The sequence enters as [N, T, I] and its last hidden state is classified.
CLASSIFIER = (
    HEAD
    + """classifier (float[N,STEPS,4] x) => (float[N,3] y) {
    steps_first = Transpose<perm=[1,0,2]>(x)
    all, last = LSTM<hidden_size=5>(steps_first, w, r, b)
    zero = Constant<value_ints=[0]>()
    h = Squeeze(last, zero)
    y = MatMul(h, head)
}"""
)
WEIGHTS = {
    "w": rng.standard_normal((1, 20, 4)),
    "r": rng.standard_normal((1, 20, 5)),
    "b": rng.standard_normal((1, 40)),
    "head": rng.standard_normal((5, 3)),
}
WEIGHTS = {k: v.astype(np.float32) for k, v in WEIGHTS.items()}


def test_methods_explain_a_recurrent_model() -> None:
    net = model(CLASSIFIER.replace("STEPS", "6"), WEIGHTS)
    x = rng.standard_normal((5, 6, 4)).astype(np.float32)
    got = ox.Saliency(net).attribute(x, target=1, abs=False)
    u = rng.standard_normal(x.shape).astype(np.float32)
    ends = [net(x + sign * 1e-2 * u)["y"][:, 1] for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-2
    np.testing.assert_allclose((got * u).sum((1, 2)), slope, rtol=2e-3, atol=2e-3)
    attributions, delta = ox.IntegratedGradients(net).attribute(
        x, target=1, n_steps=60, return_convergence_delta=True
    )
    np.testing.assert_allclose(delta, 0, atol=1e-3)
    alone = ox.IntegratedGradients(net).attribute(x[2:3], target=1, n_steps=60)
    np.testing.assert_allclose(attributions[2:3], alone, rtol=1e-4, atol=1e-5)


def test_layers_upon_layers() -> None:
    two = (
        HEAD
        + """two (float[3,N,4] x) => (float[1,N,5] y) {
        one = Constant<value_ints=[1]>()
        all = LSTM<hidden_size=5>(x, w, r, b)
        flat = Squeeze(all, one)
        again, y = GRU<hidden_size=5>(flat, gw, gr)
    }"""
    )
    more = {"gw": (1, 15, 5), "gr": (1, 15, 5)}
    added = {k: rng.standard_normal(v).astype(np.float32) for k, v in more.items()}
    graph = load(proto(two, **{k: WEIGHTS[k] for k in "wrb"}, **added))
    feeds = {"x": rng.standard_normal((3, 2, 4)).astype(np.float32)}
    want = evaluate(graph, feeds)["y"]
    for node in [n for n in graph.graph if n.op_type in ("LSTM", "GRU")]:
        assert functions.expand(graph.graph, node)
    np.testing.assert_allclose(evaluate(graph, feeds)["y"], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (CLASSIFIER.replace("STEPS", "T"), "number of steps is not known.*fixed sequence length"),
        (CLASSIFIER.replace("STEPS", "6").replace("size=5", "size=5, clip=1.0"), "clip"),
        (
            CLASSIFIER.replace("STEPS", "6")
            .replace("4] x)", "4] x, int32[N] lengths)")
            .replace("w, r, b)", "w, r, b, lengths)"),
            "lengths of their own",
        ),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    net = model(text, WEIGHTS)
    fed = np.full(2, 6, np.int32) if "lengths" in text else None
    with pytest.raises(NoRuleError, match=f"LSTM.*{why}.*perturbation"):
        ox.Saliency(net).attribute(
            np.zeros((2, 6, 4), np.float32), target=0, additional_forward_args=fed
        )
