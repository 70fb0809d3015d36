"""What Captum's own tests expect of the gradient family, as facts; and its table of test cases.

The networks are those that Captum ships for its tests. DeepLIFT, LRP and the CAM family's facts are
with their own tests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from captum.testing.attr.helpers.test_config import config
from captum.testing.helpers import basic_models as nets
from torch import nn

from tests.oracle.both import Both, Fixed, flat, same

# ------------------------------------------------------------------------- expected numbers

NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (nets.BasicModel, {}),
    "first": (nets.BasicModel2, {}),
    "second": (nets.BasicModel3, {}),
    "listed": (nets.BasicModel5_MultiArgs, {"additional_input1": [2, 3], "additional_input2": 1}),
    "layers": (nets.BasicModel_MultiLayer, {}),
    "inplace": (functools.partial(nets.BasicModel_MultiLayer, inplace=True), {}),
    "pairs": (functools.partial(nets.BasicModel_MultiLayer, multi_input_module=True), {}),
    **{
        f"scaled {k}": (nets.BasicModel_MultiLayer_MultiInput, {"scale": k}) for k in (0.5, 3, 4, 5)
    },
    "conv": (nets.BasicModel_ConvNet_One_Conv, {}),
    "conv inplace": (functools.partial(nets.BasicModel_ConvNet_One_Conv, inplace=True), {}),
}


@dataclass
class Fact:
    """A call and its result; one list of numbers for an array, a tuple of them for several."""

    method: str
    net: str
    inputs: Any
    want: Any
    layer: str | list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    within: float = 0.01

    def __str__(self) -> str:
        return f"{self.method}-{self.net}-{self.layer or 'inputs'}"


def facts(
    cls: str, /, *rows: tuple[Any, ...], within: float = 0.01, **common: Any
) -> Iterator[Fact]:
    """Facts of one method: rows of net, inputs, wanted numbers, layer, further options."""
    for net, inputs, want, *rest in rows:
        layer = rest[0] if rest else None
        options = {**common, **(rest[1] if len(rest) > 1 else {})}
        yield Fact(cls, net, inputs, want, layer, options, within)


UP, A, B, C = [[0.0, 100, 0]], [[0.0, 10, 0]], [[0.0, 10, 0]], [[0.0, 5, 0]]
UNEVEN = ([[0.0, 10, 1]], [[0.0, 4, 5]], [[0.0, 0, 0]])
UNEVEN2 = ([[0.0, 10, 1], [0, 0, 10]], [[0.0, 4, 5], [0, 0, 10]], [[0.0, 0, 0], [0, 0, 5]])
STEEP = ([[0.0, 6, 14], [0, 80, 0]], [[0.0, 6, 14], [0, 20, 0]], [[0.0, 0, 0], [0, 20, 0]])
HUNDREDS = ([[0.0, 100, 0]],) * 3
PICTURE = [np.arange(16.0).reshape(1, 4, 4).tolist()]
DENTED = [[[[0, 1, 2, 3], [4, -4, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15.0]]]]
ONES = np.ones((1, 1, 4, 4)).tolist()
LIFTED = [[90.0, 100, 100, 100]]
ACTIVE = [[90.0, 101, 101, 101]]
LEAKY = [[0.9, 1, 1, 1]]
LAST = {"fed": 1}  # the last array is an additional forward argument
INTO = {"attribute_to_layer_input": True}
DENT = (0.5625 * np.array(DENTED)).tolist()
FLOOR = np.maximum(DENT, 0).tolist()
TWO_INPUT_CAM = [[[[14.5, 29, 38, 19], [29, 58, 76, 38], [65, 130, 148, 74], [32.5, 65, 74, 37]]]]
GUIDED = [[[[0.0, 1, 1, 1], [1, 3, 3, 2], [1, 3, 3, 2], [1, 2, 2, 1]]]]
GUIDED2 = [[[[1.0, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]]]]
DECONV = [[[[2.0, 3, 3, 1], [3, 5, 5, 2], [3, 5, 5, 2], [1, 2, 2, 1]]]]

FACTS = [
    *facts("Saliency", ("relu", [1.0, 2, 3, 0, -1, 7], [0.0, 0, 0, 1, 1, 0])),
    *facts("InputXGradient", ("relu", [1.0, 2, 3, 0, -1, 7], [0.0, 0, 0, 0, -1, 0])),
    *facts(
        "InputXGradient",
        (
            "listed",
            ([[1.5, 2, 34.3], [3.4, 1.2, 2]], [[3, 3.5, 23.2], [2.3, 1.2, 0.3]]),
            ([[0.0, 0, 0], [0, 0, 0]], [[0.0, 0, 0], [0, 0, 0]]),
        ),
    ),
    *(  # both networks of the paper are the same function
        fact
        for net in ("first", "second")
        for fact in facts(
            "IntegratedGradients",
            (net, ([3.0], [1.0]), ([1.5], [-0.5])),
            (net, ([3.0], [1.0]), ([0.5], [-0.5]), None, {"multiply_by_inputs": False}),
            method="riemann_right",
            n_steps=500,
            within=0.05,
        )
    ),
    *facts(
        "LayerActivation",
        ("layers", UP, UP, "linear0"),
        ("layers", UP, ACTIVE, "linear1"),
        ("layers", UP, [ACTIVE, UP], ["linear1", "linear0"]),
        ("inplace", [[2.0, -5, 4]], [[-9.0, 2, 2, 2]], "relu", INTO),
        ("inplace", [[2.0, -5, 4]], [[-9.0, 2, 2, 2]], "linear1"),
        ("layers", [[3.0, 4, 0]], [[0.0, 8, 8, 8]], "relu"),
        ("layers", UP, [[392.0, 394]], "linear2"),
        ("pairs", [[0.0, 6, 0]], ([[0.0, 7, 7, 7]], [[0.0, 7, 7, 7]]), "multi_relu"),
        (
            "pairs",
            [[0.0, 6, 0]],
            [([[0.0, 7, 7, 7]], [[0.0, 7, 7, 7]]), [[0.0, 6, 0]], [[-4.0, 7, 7, 7]]],
            ["multi_relu", "linear0", "linear1"],
        ),
        ("pairs", [[0.0, 6, 0]], ([[-4.0, 7, 7, 7]], [[-4.0, 7, 7, 7]]), "multi_relu", INTO),
        ("scaled 4", (A, B, C), [[392.0, 394]], "model.linear2"),
        ("scaled 5", UNEVEN, ACTIVE, "model.relu", LAST),
    ),
    *facts(
        "LayerGradientXActivation",
        ("layers", UP, [[0.0, 400, 0]], "linear0"),
        ("layers", UP, ACTIVE, "linear1"),
        ("layers", UP, [[[0.0, 400, 0]], ACTIVE], ["linear0", "linear1"]),
        ("pairs", [[3.0, 4, 0]], ([[0.0, 8, 8, 8]], [[0.0, 8, 8, 8]]), "multi_relu"),
        ("layers", [[3.0, 4, 0]], [[0.0, 8, 8, 8]], "relu"),
        (
            "pairs",
            [[3.0, 4, 0]],
            [([[0.0, 8, 8, 8]], [[0.0, 8, 8, 8]]), [[9.0, 12, 0]]],
            ["multi_relu", "linear0"],
        ),
        ("layers", UP, [[392.0, 0]], "linear2"),
        ("scaled 4", (A, B, C), [[392.0, 0]], "model.linear2"),
        ("scaled 5", UNEVEN, ACTIVE, "model.relu", LAST),
        target=0,
    ),
    *facts(
        "LayerIntegratedGradients",
        ("pairs", UP, (LIFTED, LIFTED), "multi_relu"),
        target=0,
    ),
    *facts(
        "LayerConductance",
        ("layers", UP, [[0.0, 390, 0]], "linear0"),
        ("layers", UP, [[0.0, 390, 0]], "linear0", {"baselines": 0.0}),
        ("layers", UP, [[0.0, 390, 0]], "linear0", {"internal_batch_size": 4}),
        ("pairs", UP, (LIFTED, LIFTED), "multi_relu"),
        ("layers", UP, LIFTED, "linear1"),
        ("layers", UP, LIFTED, "relu"),
        ("layers", UP, [[390.0, 0]], "linear2"),
        ("scaled 4", (A, B, C), [[390.0, 0]], "model.linear2"),
        ("scaled 5", UNEVEN, LIFTED, "model.relu", LAST),
        ("scaled 5", UNEVEN2, [*LIFTED, [100.0, 100, 100, 100]], "model.relu", LAST),
        ("scaled 5", UNEVEN2, [*LIFTED, [100.0, 100, 100, 100]], "model.relu",
         {**LAST, "internal_batch_size": 20}),
        target=0,
        n_steps=500,
        gap=0.01,
        within=0.1,
    ),
    *facts(
        "InternalInfluence",
        ("layers", UP, [[3.9, 3.9, 3.9]], "linear0"),
        ("pairs", UP, (LEAKY, LEAKY), "multi_relu", INTO),
        ("layers", UP, LEAKY, "linear1"),
        ("layers", UP, LEAKY, "linear1", {"internal_batch_size": 5}),
        ("inplace", UP, LEAKY, "relu", INTO),
        ("inplace", UP, LEAKY, "linear1"),
        ("layers", [[3.0, 4, 0]], [[1.0, 1, 1, 1]], "relu"),
        ("layers", UP, [[1.0, 0]], "linear2"),
        ("layers", [[0.0, 80, 0]], [[0.7, 0.8, 0.8, 0.8]], "linear1",
         {"baselines": [[0.0, -20, 0]]}),
        ("scaled 4", (A, B, C), [[1.0, 0]], "model.linear2"),
        ("scaled 5", UNEVEN, [[1.0, 1, 1, 1]], "model.relu", LAST),
        ("scaled 5", STEEP, [[0.95, 1, 1, 1], [1, 1, 1, 1]], "model.linear1", LAST),
        ("layers", UP * 4, LEAKY * 4, "linear1", {"internal_batch_size": 20}),
        ("layers", [[0.0, 80, 0], [30, 30, 0]], [[0.7, 0.8, 0.8, 0.8], [0.5, 0.6, 0.6, 0.6]],
         "linear1", {"baselines": [[0.0, -20, 0], [-20, -20, 0]]}),
        target=0,
        n_steps=500,
        method="riemann_trapezoid",
    ),
    *facts(
        "LayerGradCam",
        ("layers", UP, [[400.0]], "linear0"),
        ("pairs", [[0.0, 6, 0]], ([[21.0]], [[21.0]]), "multi_relu"),
        ("conv", PICTURE, [[[[11.25, 13.5], [20.25, 22.5]]]], "conv1"),
        ("conv", PICTURE, [[[[-3.75, 3], [23.25, 30]], [[15, 10.5], [-3, -7.5]]]], "conv1",
         {"attr_dim_summation": False}),
        ("conv", PICTURE, [[[[0.0, 4], [28, 32.5]]]], "relu1"),
        ("conv", DENTED, DENT, "conv1", INTO),
        ("conv", DENTED, FLOOR, "conv1", {**INTO, "relu_attributions": True}),
        ("conv", (PICTURE, ONES), [[[[14.5, 19], [32.5, 37]]]], "conv1"),
        target=0,
    ),
    *facts(
        "GuidedGradCam",
        ("conv", PICTURE,
         [[[[0.0, 0, 4, 4], [0, 0, 12, 8], [28, 84, 97.5, 65], [28, 56, 65, 32.5]]]], "relu1"),
        ("conv", (PICTURE, ONES), (TWO_INPUT_CAM,) * 2, "conv1"),
        ("conv inplace", (PICTURE, ONES), (TWO_INPUT_CAM,) * 2, "relu1", INTO),
        ("conv inplace", (PICTURE, ONES), (TWO_INPUT_CAM,) * 2, "conv1"),
        target=0,
    ),
    *facts(
        "GuidedBackprop",
        ("conv", PICTURE, GUIDED),
        ("conv", (PICTURE, ONES), (GUIDED2,) * 2),
        target=0,
    ),
    *facts(
        "NeuronGuidedBackprop",
        ("conv", PICTURE, GUIDED, "fc1", {"neuron_selector": (0,)}),
        ("conv", PICTURE, GUIDED, "fc1", {"neuron_selector": (slice(0, 1),)}),
        ("conv", (PICTURE, ONES), (GUIDED2,) * 2, "fc1", {"neuron_selector": (3,)}),
    ),
    *facts(
        "Deconvolution",
        ("conv", PICTURE, DECONV),
        ("conv", (PICTURE, ONES), (DECONV,) * 2),
        target=0,
    ),
    *facts(
        "NeuronDeconvolution",
        ("conv", PICTURE, DECONV, "fc1", {"neuron_selector": (0,)}),
        ("conv", PICTURE, DECONV, "fc1", {"neuron_selector": (slice(0, 1),)}),
        ("conv", (PICTURE, ONES), (DECONV,) * 2, "fc1", {"neuron_selector": (3,)}),
    ),
    *facts(
        "NeuronGradient",
        ("layers", UP, [[4.0, 4, 4]], "linear2", {"neuron_selector": (0,)}),
        ("layers", UP, [[1.0, 1, 1]], "linear1", {"neuron_selector": (0,)}),
        ("inplace", [[0.0, 5, 4]], [[1.0, 1, 1]], "relu",
         {"neuron_selector": (0,), "attribute_to_neuron_input": True}),
        ("inplace", [[0.0, 5, 4]], [[1.0, 1, 1]], "linear1", {"neuron_selector": (0,)}),
        ("layers", [[0.0, 5, 4]], [[0.0, 0, 0]], "relu", {"neuron_selector": 0}),
        ("layers", [[0.0, 5, 4]], [[1.0, 1, 1]], "relu", {"neuron_selector": 1}),
        ("layers", [[0.0, 5, 4]], [[3.0, 3, 3]], "relu", {"neuron_selector": (slice(None),)}),
        ("layers", [[0.0, 5, 4]], [[1.0, 1, 1]], "relu", {"neuron_selector": (slice(0, 2),)}),
        ("scaled 3", HUNDREDS, ([[12.0, 12, 12]],) * 3, "model.linear2", {"neuron_selector": (0,)}),
        ("scaled 5", HUNDREDS, ([[5.0, 5, 5]],) * 2, "model.linear1",
         {"neuron_selector": (0,), **LAST}),
        within=1e-4,
    ),
    *facts(
        "NeuronIntegratedGradients",
        ("layers", UP, [[0.0, 390, 0]], "linear2", {"neuron_selector": 0}),
        ("layers", [[100.0, 100, 100]], [[3.96, 3.96, 3.96]], "linear2",
         {"neuron_selector": 0, "multiply_by_inputs": False}),
        ("layers", UP, [[0.0, 100, 0]], "linear1", {"neuron_selector": (0,)}),
        ("layers", [[0.0, 6, 14]], [[0.0, 3, 7]], "relu", {"neuron_selector": (0,)}),
        ("layers", [[0.0, 5, 4]], [[0.0, 5, 4]], "relu", {"neuron_selector": 1}),
        ("layers", [[0.0, 5, 4]], [[0.0, 10, 8]], "relu", {"neuron_selector": (slice(2, None),)}),
        ("layers", [[0.0, 5, 4]], [[0.0, 5, 4]], "relu", {"neuron_selector": (slice(0, 2),)}),
        ("scaled 4", (A, B, C), ([[0.0, 156, 0]], [[0.0, 156, 0]], [[0.0, 78, 0]]),
         "model.linear2", {"neuron_selector": (0,), "internal_batch_size": 5}),
        ("scaled 0.5", tuple(x[:1] for x in STEEP), ([[0.0, 1.5, 3.5]],) * 2, "model.relu",
         {"neuron_selector": (0,), **LAST}),
        ("scaled 0.5", STEEP,
         ([[0.0, 1.5, 3.5], [0, 40, 0]], [[0.0, 1.5, 3.5], [0, 10, 0]]), "model.relu",
         {"neuron_selector": (0,), **LAST}),
        ("scaled 0.5", STEEP,
         ([[0.0, 10.5, 24.5], [0, 160, 0]], [[0.0, 10.5, 24.5], [0, 40, 0]]), "model.relu",
         {"neuron_selector": (slice(None),), **LAST}),
        n_steps=200,
        within=0.1,
    ),
    *facts(
        "NeuronConductance",
        ("layers", UP, [[0.0, 390, 0]], "linear2", {"neuron_selector": (0,)}),
        ("layers", [[100.0, 100, 100]], [[3.96, 3.96, 3.96]], "linear2",
         {"neuron_selector": (0,), "multiply_by_inputs": False}),
        ("layers", UP, [[0.0, 90, 0]], "linear1", {"neuron_selector": 0}),
        ("layers", [[0.0, 70, 30]], [[0.0, 70, 30]], "relu", {"neuron_selector": (3,)}),
        ("pairs", [[0.0, 6, 0]], [[0.0, 6, 0]], "multi_relu.relu1", {"neuron_selector": 1}),
        ("scaled 4", (A, B, C), ([[0.0, 156, 0]], [[0.0, 156, 0]], [[0.0, 78, 0]]),
         "model.linear2", {"neuron_selector": (0,), "internal_batch_size": 5}),
        ("scaled 5", UNEVEN, ([[0.0, 50, 5]], [[0.0, 20, 25]]), "model.relu",
         {"neuron_selector": (3,), **LAST}),
        ("scaled 5", UNEVEN2, ([[0.0, 50, 5], [0, 0, 50]], [[0.0, 20, 25], [0, 0, 50]]),
         "model.relu", {"neuron_selector": (3,), "internal_batch_size": 20, **LAST}),
        target=0,
        n_steps=500,
        method="gausslegendre",
        within=0.1,
    ),
    # Where all baselines are equal and the net is affine between them, no chance is left.
    *facts(
        "NeuronGradientShap",
        ("inplace", [[1.0, 20, 10]], [[1.0, 1, 1]], "linear1",
         {"neuron_selector": 0, "baselines": [[0.0, 0, 0]] * 2, "multiply_by_inputs": False}),
        stdevs=0.0,
    ),
    *facts(
        "LayerGradientShap",
        ("inplace", [[1.0, -20, 10]], [[1.0, 0]], "linear2",
         {"baselines": [[0.0, 0, 0]] * 3, "multiply_by_inputs": False, "stdevs": 0.0}),
        # the expected value; Captum's -8.4 is that of five samples
        ("inplace", [[1.0, -20, 10]], [[-12.0, 0]], "linear2",
         {"baselines": [[0.0, 0, 0], [1, 1, 1], [2, 2, 2]], "n_samples": 3000, "within": 0.5,
          "seed": 0}),
        ("pairs", UP, (LIFTED, LIFTED), "multi_relu", {"baselines": [[0.0, 0, 0]] * 2}),
        target=0,
        stdevs=0.0009,
    ),
]  # fmt: skip


@functools.cache
def shipped(name: str, inputs: int, ndim: int) -> Both:
    """One of Captum's networks for so many inputs."""
    make, fixed = NETS[name]
    torch.manual_seed(0)
    net = Fixed(make(), fixed)
    shape = {1: (2,), 2: (2, 3), 4: (2, 1, 4, 4)}[ndim]
    return Both(net, tuple(torch.randn(shape) for _ in range(inputs)))


def scope(layer: Any) -> Any:
    return [scope(name) for name in layer] if isinstance(layer, list) else f"net.{layer}"


@pytest.mark.parametrize("fact", FACTS, ids=str)
def test_expected_numbers(fact: Fact) -> None:
    several = isinstance(fact.inputs, tuple)
    xs = tuple(torch.tensor(x) for x in (fact.inputs if several else (fact.inputs,)))
    options = dict(fact.options)
    fed, gap = options.pop("fed", 0), options.pop("gap", None)
    within = options.pop("within", fact.within)
    both = shipped(fact.net, len(xs), xs[0].ndim)
    explained = xs[: len(xs) - fed]
    options["inputs"] = explained if several else explained[0]
    if fed:
        options["additional_forward_args"] = xs[-fed:]
    if isinstance(options.get("baselines"), list):
        options["baselines"] = torch.tensor(options["baselines"])
    made = () if fact.layer is None else (scope(fact.layer),)
    if gap is not None:
        options["return_convergence_delta"] = True
    got = both.ours(fact.method, *made, **options)
    if gap is not None:
        got, delta = got
        assert np.abs(delta).max() < gap
    if isinstance(fact.layer, list):
        assert isinstance(got, list)
        wanted = list(fact.want)
    else:
        assert isinstance(got, tuple) == isinstance(fact.want, tuple)
        wanted = [fact.want]
        got = [got]
    parts = [(g, w) for a, b in zip(got, wanted, strict=True) for g, w in pieces(a, b)]
    assert parts
    for g, w in parts:
        assert g.shape == np.shape(w)
        np.testing.assert_allclose(g, w, atol=within)


def pieces(got: Any, want: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """The arrays of a result beside their numbers."""
    if isinstance(want, tuple):
        yield from zip(got, want, strict=True)
    else:
        yield got, want


# ------------------------------------------------------------------------- Captum's test cases

# Not of the gradient family, or refused by design (a function as neuron selector).
OTHERS = {
    *("FeatureAblation", "FeaturePermutation", "ShapleyValueSampling", "Lime", "KernelShap"),
    *("Occlusion", "LayerFeatureAblation", "NeuronFeatureAblation"),
}


def comparable(name: str, method: str, net: nn.Module, args: dict[str, Any]) -> bool:
    """Whether Captum's result is the method's.

    Its LRP lets functions multiply relevance: what 5 * (a + b) gets is 5 times too much. Its
    DeepLIFT does not add up where max pooling follows a ReLU (by its own convergence delta).
    """
    if method in OTHERS or callable(args.get("neuron_selector")):
        return False
    if "LRP" in method and "lrp" not in name:
        return isinstance(net, nets.BasicModel_MultiLayer) and "tuple" not in name
    if "DeepLift" in method:
        return not isinstance(net, nets.BasicModel_ConvNet)
    return True


@dataclass
class Case:
    """One row of Captum's table of test cases, for one of its algorithms."""

    name: str
    method: str
    net: nn.Module
    layer: Any
    args: dict[str, Any]
    noise: bool
    random: float | None

    def __str__(self) -> str:
        return f"{self.name}-{self.method}"


def cases() -> Iterator[Case]:
    for row in config:
        for algorithm in row["algorithms"]:
            name = algorithm.__name__
            args = row["attribute_args"]
            if not comparable(row["name"], name, row["model"], args):
                continue
            random = row.get("target_delta", 0.6) if "GradientShap" in name else None
            yield Case(
                row["name"], name, row["model"], row.get("layer"), args,
                row.get("noise_tunnel", False), random,
            )  # fmt: skip


@functools.cache
def exported(net: nn.Module, fixed: tuple, xs: int, shapes: tuple) -> Both:
    return Both(Fixed(net, dict(fixed)), tuple(torch.randn(2, *s) for s in shapes))


def bound(case: Case) -> tuple[Both, dict[str, Any]]:
    """The case's network with what is no tensor set, and the call's arguments without that."""
    args = dict(case.args)
    if isinstance(case.net, nets.BasicModel_ConvNet):
        # All its logits are the same but for a constant: their softmax has no gradient but noise.
        case.net.softmax = nn.Identity()
    if "GradientShap" in case.method:  # one baseline is no distribution: Captum's is there twice
        args["baselines"] = doubled(args["baselines"])
    inputs = args["inputs"] if isinstance(args["inputs"], tuple) else (args["inputs"],)
    extra = args.pop("additional_forward_args", ())
    names = list(inspect.signature(case.net.forward).parameters)[len(inputs) :]
    given = dict(zip(names, extra, strict=False))
    fed = tuple(v for v in given.values() if isinstance(v, torch.Tensor))
    fixed = tuple((k, v) for k, v in given.items() if not isinstance(v, torch.Tensor))
    if fed:
        args["additional_forward_args"] = fed
    shapes = tuple(tuple(x.shape[1:]) for x in (*inputs, *fed))
    return exported(case.net, fixed, len(shapes), shapes), args


def doubled(given: Any) -> Any:
    return tuple(map(doubled, given)) if isinstance(given, tuple) else torch.cat([given, given])


def rows(given: Any, i: int) -> Any:
    """Row `i` of every array with a row per example."""
    return (
        type(given)(v[i : i + 1] for v in given) if isinstance(given, tuple) else given[i : i + 1]
    )


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_test_cases(case: Case) -> None:
    """The same as Captum; and each example alone, with its own target, the same as in the batch."""
    both, args = bound(case)
    made = () if case.layer is None else (scope(case.layer),)
    if case.random is not None:
        args["n_samples"] = 2000
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  (Captum draws by numpy's global generator)
    got = both.ours(case.method, *made, noise=case.noise, **args, **seeded(case))
    want = both.captums(case.method, *made, noise=case.noise, **args)
    if case.random is None:
        same(got, want, 1e-4)
    else:
        for g, w in zip(flat(got), flat(want), strict=True):
            np.testing.assert_allclose(g, w, atol=case.random * max(1, np.abs(w).max() / 10))
    targets = args.get("target")
    inputs = args["inputs"]
    count = len(inputs if isinstance(inputs, torch.Tensor) else inputs[0])
    if not isinstance(targets, list | torch.Tensor) or len(targets) != count:
        return
    for i in range(count):
        single = {**args, "inputs": rows(inputs, i), "target": targets[i]}
        if "additional_forward_args" in args:
            single["additional_forward_args"] = rows(args["additional_forward_args"], i)
        if "baselines" in args and "shap" not in case.method.lower():
            single["baselines"] = rows(args["baselines"], i)
        alone = both.ours(case.method, *made, noise=case.noise, **single, **seeded(case))
        for a, g in zip(flat(alone), flat(got), strict=True):
            np.testing.assert_allclose(a, g[i : i + 1], rtol=1e-4, atol=1e-5 * np.abs(g).max())


def seeded(case: Case) -> dict[str, int]:
    return {"seed": 0} if case.noise or case.random is not None else {}
