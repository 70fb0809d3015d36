"""What Captum's own tests expect of the perturbation family, as facts; and its table of test cases.

The networks are those that Captum ships for its tests. Left out: inputs with another number of rows
than the others (its sparse lists), several numbers for a whole batch, and functions whose output is
an integer or a future.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from captum.testing.attr.helpers.test_config import config
from captum.testing.helpers import basic_models as nets
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.both import Both, Fixed, flat, same
from tests.oracle.test_captum_facts import OTHERS, Case, bound, rows, scope
from tests.oracle.test_perturbation import rolled, to_numpy

# ------------------------------------------------------------------------- expected numbers


class Whole(nn.Module):
    """A network's numbers, summed over the batch: of shape [] or [1]."""

    def __init__(self, net: nn.Module, *shape: int) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x1: Tensor, x2: Any = None, x3: Any = None) -> Tensor:
        xs = [x for x in (x1, x2, x3) if x is not None]
        return self.net(*xs, *([1] if len(xs) > 1 else [])).sum().reshape(self.shape)


class Wide(nn.Module):
    """A network's outputs with ones behind them."""

    def __init__(self, ones: int) -> None:
        super().__init__()
        self.net, self.ones = nets.BasicModel_MultiLayer(), ones

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return torch.cat([out, torch.ones_like(out)[:, : self.ones]], 1)


LAYERS, SCALED = nets.BasicModel_MultiLayer, nets.BasicModel_MultiLayer_MultiInput
CONV = nets.BasicModel_ConvNet_One_Conv
NETS: dict[str, Callable[[], nn.Module]] = {
    "relu": nets.BasicModel,
    "difference": nets.BasicModel3,
    "layers": LAYERS,
    "pairs": functools.partial(LAYERS, multi_input_module=True),
    "bool": lambda: Fixed(nets.BasicModelBoolInput(), {}),
    "scaled": lambda: Fixed(SCALED(), {"scale": 1}),
    "conv": CONV,
    "conv inplace": functools.partial(CONV, inplace=True),
    "wide 1": functools.partial(Wide, 1),
    "wide 2": functools.partial(Wide, 2),
    "whole layers": lambda: Whole(LAYERS()),
    "whole layers [1]": lambda: Whole(LAYERS(), 1),
    "whole scaled": lambda: Whole(SCALED()),
    "whole scaled [1]": lambda: Whole(SCALED(), 1),
}


@dataclass
class Fact:
    """A call and its result, a tuple if there are several; `last` arrays are not explained."""

    method: str
    net: str
    inputs: Any
    want: Any
    options: dict[str, Any] = field(default_factory=dict)
    layer: str | None = None
    last: int = 0

    def __str__(self) -> str:
        return f"{self.method}-{self.net}-{self.layer or 'inputs'}"


ONE, TWO = [[20.0, 50, 30]], [[2.0, 10, 3], [20, 50, 30]]
THREE = (
    [[23.0, 100, 0], [20, 50, 30]],
    [[20.0, 50, 30], [0, 100, 0]],
    [[0.0, 100, 10], [2, 10, 3]],
)
WHOLE = (*THREE[:2], [[0.0, 100, 10], [20, 10, 13]])
SPARSE = ([[23.0, 0, 0]], [[20.0, 0, 50]], [[0.0, 100, 10]])
SPARSE2 = (
    [[23.0, 0, 0], [20, 50, 30]],
    [[20.0, 0, 50], [0, 100, 0]],
    [[0.0, 100, 10], [0, 10, 0]],
)
PAIR = {"feature_mask": [[0, 0, 1]]}
CROSSED = {"feature_mask": [[0, 0, 1], [1, 1, 0]]}
MASKS = {"feature_mask": ([[1, 1, 1], [0, 1, 0]], [[3, 4, 2]], [[5, 6, 7], [5, 5, 5]])}
DOUBLE = {"feature_mask": ([[1, 1, 1], [0, 1, 0]], [[0, 1, 2]], [[0, 1, 2], [0, 0, 0]])}
WHOLE_MASKS = {"feature_mask": ([[1, 1, 1]], [[0, 1, 2]], [[0, 1, 2]])}
UNITS = {"feature_mask": ([[0, 1, 0]], [[0, 1, 2]], [[0, 0, 0]])}
SINGLE = ([[20.0, 50, 30]], [[0.0, 100, 0]], [[2.0, 10, 3]])
BASES = {"baselines": (2, 3.0, 4)}
PICTURE = [np.arange(16.0).reshape(1, 4, 4).tolist()]
WHITE = np.ones((1, 1, 4, 4)).tolist()
COLUMN = np.ones((1, 1, 4, 1)).tolist()
SPLIT = {"feature_mask": (0, 1)}
TRUTH = [[True, False, True]]
ABLATED = (
    [[492.0, 492, 492], [200, 200, 200]],
    [[80.0, 200, 120], [0, 400, 0]],
    [[0.0, 400, 40], [60, 60, 60]],
)
ABLATED_BASES = (
    [[468.0, 468, 468], [184, 192, 184]],
    [[68.0, 188, 108], [-12, 388, -12]],
    [[-16.0, 384, 24], [12, 12, 12]],
)
FIRST_BASES = {"baselines": ([[3.0, 0, 0]], [[0.0, 1, 0]], [[1.0, 2, 3]])}
FROM_FIRST = (
    [[80.0, 400, 0], [68, 200, 120]],
    [[80.0, 196, 120], [0, 396, 0]],
    [[-4.0, 392, 28], [4, 32, 0]],
)
EACH_BASES = {
    "baselines": (
        [[3.0, 0, 0], [3, 0, 2]],
        [[0.0, 1, 0], [0, 1, 4]],
        [[3.0, 2, 4], [1, 2, 3]],
    )
}
FROM_EACH = (
    [[80.0, 400, 0], [68, 200, 112]],
    [[80.0, 196, 120], [0, 396, -16]],
    [[-12.0, 392, 24], [4, 32, 0]],
)
PIXELS = (
    [[[[0.0, 2, 4, 3], [4, 9, 10, 7], [4, 13, 14, 11], [0, 0, 0, 0]]]],
    [[[[1.0, 2, 2, 1], [1, 2, 2, 1], [1, 2, 2, 1], [0, 0, 0, 0]]]],
)
CORNER = (
    [[[[0.0, 1, 2, 0], [4, 5, 6, 0], [8, 9, 10, 0], [0, 0, 0, 0]]]],
    [[[[1.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]]],
)


def picture(*numbers: float) -> Any:
    found = tuple(np.full((1, 1, 4, 4), n).tolist() for n in numbers)
    return found if len(found) > 1 else found[0]


def facts(method: str, /, *given: tuple[Any, ...], **common: Any) -> Iterator[Fact]:
    """Facts of one method: rows of net, inputs, wanted numbers, options, layer, `last`."""
    for net, inputs, want, *rest in given:
        options = {**common, **(rest[0] if rest else {})}
        yield Fact(method, net, inputs, want, options, *rest[1:])


ABLATION = (
    ("layers", ONE, [[80.0, 200, 120]]),
    ("layers", ONE, [[280.0, 280, 120]], PAIR),
    ("layers", ONE, [[248.0, 248, 104]], {**PAIR, "baselines": 4}),
    ("layers", TWO, [[8.0, 35, 12], [80, 200, 120]]),
    ("layers", TWO, [[41.0, 41, 12], [280, 280, 120]], CROSSED),
    ("scaled", THREE, ABLATED, MASKS),
    ("scaled", THREE, ABLATED[:2], {"feature_mask": MASKS["feature_mask"][:2]}, None, 1),
    ("scaled", THREE, ABLATED_BASES, {**MASKS, **BASES}),
    ("scaled", THREE, FROM_FIRST, FIRST_BASES),
    ("scaled", THREE, FROM_EACH, EACH_BASES),
    ("conv", (PICTURE, WHITE), picture(67.0, 13.0), SPLIT),
    ("conv", (PICTURE, WHITE), PIXELS),
)
NO_TARGET = {"target": None}
DETERMINISTIC = [
    *facts("FeatureAblation", *ABLATION, target=0),
    *facts(
        "FeatureAblation",
        ("relu", [[-3.0, 1, 2]], [[-3.0, 0, 0]]),
        ("bool", TRUTH, [[40.0, 40, 40]], PAIR),
        ("bool", TRUTH, [[-40.0, -40, 0]], {**PAIR, "baselines": True}),
        (  # a number is a feature of all inputs together
            "scaled", THREE,
            (
                [[1092.0, 1092, 1092], [260, 600, 260]],
                [[80.0, 1092, 160], [260, 600, 0]],
                [[80.0, 1092, 160], [260, 260, 260]],
            ),
            DOUBLE,
        ),
        (
            "scaled", THREE,
            (
                [[1040.0, 1040, 1040], [184, 580, 184]],
                [[52.0, 1040, 132], [184, 580, -12]],
                [[52.0, 1040, 132], [184, 184, 184]],
            ),
            {**DOUBLE, **BASES},
        ),
        ("whole layers", [[2.0, 10, 3]], [[82.0, 82, 24]], {**PAIR, **NO_TARGET}),
        ("whole layers [1]", [[2.0, 10, 3]], [[82.0, 82, 24]], {**PAIR, **NO_TARGET}),
        ("whole layers", TWO, [[642.0, 642, 264]], {**PAIR, **NO_TARGET}),
        ("whole layers [1]", TWO, [[642.0, 642, 264]], {**PAIR, **NO_TARGET}),
        *(
            (
                net, THREE, ([[1784.0] * 3], [[160.0, 1200, 240]], [[16.0, 880, 104]]),
                {"feature_mask": ([[1, 1, 1]], [[0, 3, 2]], [[4, 5, 6]]), **NO_TARGET},
            )
            for net in ("whole scaled", "whole scaled [1]")
        ),
        target=0,
    ),
    *facts(
        "Occlusion",
        ("layers", ONE, [[80.0, 200, 120]], {"sliding_window_shapes": (1,)}),
        ("layers", ONE, [[200.0, 220, 240]],
         {"sliding_window_shapes": (2,), "baselines": [10.0, 10, 10]}),
        ("layers", ONE, [[280.0, 280, 120]], {"sliding_window_shapes": (2,), "strides": 2}),
        ("layers", TWO, [[8.0, 35, 12], [80, 200, 120]], {"sliding_window_shapes": ((1,),)}),
        ("difference", ([[-10.0], [3]], [[-5.0], [1]]), ([[0.0], [1]], [[0.0], [-1]]),
         {"sliding_window_shapes": ((1,), (1,))}),
        (
            "scaled", THREE,
            (
                [[492.0, 492, 492], [400, 400, 400]],
                [[80.0, 200, 120], [0, 400, 0]],
                [[400.0, 420, 440], [48, 50, 52]],
            ),
            {"sliding_window_shapes": ((3,), (1,), (2,))},
        ),
        (
            "scaled", THREE,
            ([[492.0, 492, 492], [400, 400, 400]], [[80.0, 200, 120], [0, 400, 0]]),
            {"sliding_window_shapes": ((3,), (1,))}, None, 1,
        ),
        (  # baselines: Captum takes [[4], [6]] for the last one, ours has the input's shape
            "scaled", THREE,
            (
                [[444.0, 444, 444], [328, 328, 328]],
                [[68.0, 188, 108], [-12, 388, -12]],
                [[368.0, 368, 24], [0, 0, -12]],
            ),
            {
                "sliding_window_shapes": ((3,), (1,), (2,)), "strides": (2, 1, 2),
                "baselines": ([[1.0, 4, 7], [3, 6, 9]], 3.0, [[4.0] * 3, [6.0] * 3]),
            },
        ),
        ("conv", (PICTURE, WHITE), picture(67.0, 13.0),
         {"sliding_window_shapes": ((1, 4, 4), (1, 4, 4))}),
        (
            "conv", (PICTURE, WHITE),
            (
                [[[[17.0] * 4, [17.0] * 4, [64, 65.5, 65.5, 67], [64, 65.5, 65.5, 67]]]],
                [[[[3.0] * 4, [3.0] * 4, [3.0] * 4, [0.0] * 4]]],
            ),
            {"sliding_window_shapes": ((1, 2, 3), (1, 1, 2)), "strides": ((1, 2, 1), (1, 1, 2))},
        ),
        (
            "conv", (PICTURE, COLUMN),
            (
                [[[[17.0] * 4, [17.0] * 4, [67.0] * 4, [67.0] * 4]]],
                [[[[10.0], [10], [8], [6]]]],
            ),
            {"sliding_window_shapes": ((1, 2, 4), (1, 2, 1)), "strides": ((1, 2, 1), (1, 1, 1))},
        ),
        target=0,
    ),
    *facts(
        "LayerFeatureAblation",
        ("layers", ONE, [[280.0, 280, 120]],
         {"layer_mask": [[0, 0, 1]], "attribute_to_layer_input": True}, "linear0"),
        *(
            row
            for layer, entering in (("linear1", True), ("linear0", False))
            for row in (
                (
                    "scaled", THREE, [[168.0, 992, 148], [84, 632, 120]],
                    {"layer_baselines": [[1.0, 2, 3]], "attribute_to_layer_input": entering},
                    f"net.model.{layer}",
                ),
                (
                    "scaled", THREE, [[316.0, 992, 316], [84, 632, 120]],
                    {
                        "layer_baselines": [[1.0, 2, 3]], "attribute_to_layer_input": entering,
                        "layer_mask": [[0, 1, 0], [0, 1, 2]],
                    },
                    f"net.model.{layer}",
                ),
            )
        ),
        ("conv inplace", (PICTURE, WHITE), [[[[4.0, 13], [40, 49]], [[0, 0], [-15, -24]]]], {},
         "relu1"),
        (
            "conv inplace", (PICTURE, WHITE), [[[[4.0, 13], [40, 49]], [[0, 0], [-15, -24]]]],
            {
                "layer_baselines": [[[[-4.0, -13], [-2, -2]], [[0, 0], [0, 0]]]],
                "attribute_to_layer_input": True,
            },
            "relu1",
        ),
        (
            "conv inplace", (PICTURE, WHITE), [[[[17.0, 17], [67, 67]], [[0, 0], [-39, -39]]]],
            {"layer_mask": [[[[0, 0], [1, 1]], [[2, 2], [3, 3]]]]}, "relu1",
        ),
        *(
            ("pairs", [[0.0, 6, 0]], ([[0.0, 7, 7, 7]],) * 2, {"attribute_to_layer_input": into},
             "multi_relu")
            for into in (False, True)
        ),
        target=0,
    ),
    *(
        Fact(
            "NeuronFeatureAblation", net, inputs, want,
            {"neuron_selector": 0, **(rest[0] if rest else {})},
            {"layers": "linear2", "scaled": "net.model.linear2", "conv": "relu2"}[net], *rest[2:],
        )
        for net, inputs, want, *rest in ABLATION
    ),
    *facts(
        "NeuronFeatureAblation",
        *(
            ("layers", TWO, [[82.0, 82, 24], [560, 560, 240]],
             {**CROSSED, "neuron_selector": neurons}, "linear2")
            for neurons in (lambda v: v.sum(1), (slice(0, 2, 1),))
        ),
        ("conv inplace", (PICTURE, WHITE), picture(0.0, 0.0),
         {**SPLIT, "neuron_selector": (1, 0, 0)}, "relu1"),
        ("conv inplace", (PICTURE, WHITE), picture(45.0, 9.0),
         {**SPLIT, "neuron_selector": (1, 0, 0), "attribute_to_neuron_input": True}, "relu1"),
        ("conv inplace", (PICTURE, WHITE), CORNER,
         {"neuron_selector": (1, 0, 0), "attribute_to_neuron_input": True}, "relu1"),
    ),
]  # fmt: skip

SHAPLEY = [
    ("layers", ONE, [[76.66666, 196.66666, 116.66666]]),
    ("layers", ONE, [[275.0, 275, 115]], PAIR),
    ("layers", ONE, [[248.0, 248, 104]], {**PAIR, "baselines": 4}),
    ("bool", TRUTH, [[35.0, 35, 35]], PAIR),
    ("bool", TRUTH, [[-40.0, -40, 0]], {**PAIR, "baselines": True}),
    ("layers", TWO, [[7.0, 32.5, 10.5], [76.66666, 196.66666, 116.66666]]),
    ("layers", TWO, [[39.5, 39.5, 10.5], [275, 275, 115]], CROSSED),
    (
        "scaled", SPARSE2,
        (
            [[90.0, 0, 0], [78, 198, 118]],
            [[78.0, 0, 198], [0, 398, 0]],
            [[0.0, 398, 38], [0, 38, 0]],
        ),
    ),
    (
        "scaled", THREE,
        (
            [[1088.6666, 1088.6666, 1088.6666], [255, 595, 255]],
            [[76.6666, 1088.6666, 156.6666], [255, 595, 0]],
            [[76.6666, 1088.6666, 156.6666], [255, 255, 255]],
        ),
        DOUBLE,
    ),
    (
        "scaled", THREE,
        (
            [[1040.0, 1040, 1040], [184, 580, 184]],
            [[52.0, 1040, 132], [184, 580, -12]],
            [[52.0, 1040, 132], [184, 184, 184]],
        ),
        {**DOUBLE, **BASES},
    ),
    ("scaled", SPARSE, ([[90.0, 0, 0]], [[78.0, 0, 198]], [[0.0, 398, 38]])),
    ("scaled", SINGLE, ([[255.0, 595, 255]], [[255.0, 595, 0]], [[255.0, 255, 255]]), UNITS),
    ("scaled", SINGLE, ([[184.0, 580, 184]], [[184.0, 580, -12]], [[184.0, 184, 184]]),
     {**UNITS, **BASES}),
    ("layers", ONE, [[40.0, 120, 80]], {"baselines": [[10.0, 20, 10]]}),
    ("whole layers", [[2.0, 10, 3]], [[79.0, 79, 21]], {**PAIR, **NO_TARGET}),
    ("whole layers [1]", TWO, [[629.0, 629, 251]], {**PAIR, **NO_TARGET}),
    *(
        (
            net, WHOLE,
            (
                [[3850.6666, 3850.6666, 3850.6666]],
                [[306.6666, 3850.6666, 410.6666]],
                [[306.6666, 3850.6666, 410.6666]],
            ),
            {**WHOLE_MASKS, **NO_TARGET},
        )
        for net in ("whole scaled", "whole scaled [1]")
    ),
]  # fmt: skip
# Several outputs: of the exact and the sampled Shapley values alone.
OUTPUTS = [
    ("wide 2", ONE, [[[76.66666, 196.66666, 116.66666]] * 2 + [[0.0, 0, 0]] * 2], NO_TARGET),
    (
        "wide 1", [ONE[0], ONE[0]],
        [[[275.0, 275, 115]] * 2 + [[0.0, 0, 0]], [[75.0, 315, 315]] * 2 + [[0.0, 0, 0]]],
        {"feature_mask": [[1, 1, 0], [0, 1, 1]], **NO_TARGET},
    ),
]  # fmt: skip
LIME = [
    ("layers", ONE, [[73.3716, 193.3349, 113.3349]]),
    ("layers", ONE, [[271.0, 271, 111]], PAIR),
    ("layers", ONE, [[244.0, 244, 100]], {**PAIR, "baselines": 4}),
    ("bool", TRUTH, [[31.42, 31.42, 30.90]], PAIR),
    ("bool", TRUTH, [[-36.0, -36, 0]], {**PAIR, "baselines": True}),
    ("layers", [[20.0, 50, 30], [10, 14, 4]],
     [[73.4450, 193.5979, 113.4363], [32.11, 48, 11]]),
    ("layers", [[20.0, 50, 30], [10, 14, 4]], [[271.0, 271, 111], [32.11, 48, 11]],
     {"feature_mask": [[0, 0, 1], [0, 1, 2]]}),
    ("scaled", SPARSE, ([[87.0, 0, 0]], [[75.0, 0, 195]], [[0.0, 395, 35]])),
    ("scaled", SINGLE, ([[251.0, 591, 251]], [[251.0, 591, 0]], [[251.0, 251, 251]]), UNITS),
    ("scaled", SINGLE, ([[180.0, 576, 180]], [[180.0, 576, -8]], [[180.0, 180, 180]]),
     {**UNITS, **BASES}),
    (
        "scaled", THREE,
        (
            [[1086.2802, 1086.2802, 1086.2802], [250.8907, 590.9789, 250.8907]],
            [[73.2166, 1086.2802, 152.6888], [250.8907, 590.9789, 0]],
            [[73.2166, 1086.2802, 152.6888], [250.8907, 250.8907, 250.8907]],
        ),
        DOUBLE,
    ),
    ("whole layers", [[2.0, 10, 3]], [[75.0, 75, 17]], {**PAIR, **NO_TARGET}),
    *(
        (
            net, WHOLE,
            ([[3850.6666] * 3], [[305.5, 3850.6666, 410.1]], [[305.5, 3850.6666, 410.1]]),
            {**WHOLE_MASKS, **NO_TARGET},
        )
        for net in ("whole scaled", "whole scaled [1]")
    ),
]  # fmt: skip
SAMPLED = [
    *facts("ShapleyValues", *(r for r in SHAPLEY if r[1] not in (SPARSE, SPARSE2)), target=0),
    *facts("ShapleyValues", *OUTPUTS),
    *facts("ShapleyValueSampling", *SHAPLEY, *OUTPUTS, target=0, n_samples=1000),
    *facts("KernelShap", *SHAPLEY, target=0, n_samples=2000),
    *facts("Lime", *LIME, target=0, n_samples=2000),
]


@functools.cache
def shipped(name: str, shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> Both:
    """One of the networks for inputs of these shapes (without examples) and dtypes."""
    torch.manual_seed(0)
    zeros = tuple(torch.zeros((2, *shape), dtype=dtype) for shape, dtype in shapes)
    return Both(NETS[name]().eval(), zeros)


def tensors(given: Any) -> Any:
    """Lists as tensors, in tuples of them."""
    if isinstance(given, tuple):
        return tuple(map(tensors, given))
    return torch.tensor(given) if isinstance(given, list) else given


def call(fact: Fact, **more: Any) -> Any:
    several = isinstance(fact.inputs, tuple)
    xs = tensors(fact.inputs) if several else (tensors(fact.inputs),)
    both = shipped(fact.net, tuple((tuple(x.shape[1:]), x.dtype) for x in xs))
    explained = xs[: len(xs) - fact.last]
    literal = ("sliding_window_shapes", "strides", "neuron_selector", "target")
    options = {k: v if k in literal else to_numpy(tensors(v)) for k, v in fact.options.items()}
    if fact.last:
        options["additional_forward_args"] = to_numpy(xs[-fact.last :])
    options |= more
    if fact.method == "Lime":
        from sklearn.linear_model import Lasso

        kernel = ox.get_exp_kernel_similarity_function("cosine", 10.0)
        made: tuple[Any, ...] = (Lasso(alpha=1.0), kernel)
    else:
        made = () if fact.layer is None else (fact.layer,)
    explainer = getattr(ox, fact.method)(both.model, *made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several examples, each with a model of its own
        return explainer.attribute(to_numpy(explained) if several else to_numpy(xs[0]), **options)


def check(got: Any, want: Any, within: float) -> None:
    assert isinstance(got, tuple) == isinstance(want, tuple)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for g, w in pairs:
        assert g.shape == np.shape(w)
        np.testing.assert_allclose(g, w, atol=within, rtol=0)


@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("fact", DETERMINISTIC, ids=str)
def test_expected_numbers(fact: Fact, at_once: int | None) -> None:
    check(call(fact, perturbations_per_eval=at_once), fact.want, 1e-3)


@pytest.mark.parametrize("fact", SAMPLED, ids=str)
def test_expected_values(fact: Fact) -> None:
    """Of the sampled methods; Captum's own tests allow a difference of 1, too."""
    exact = fact.method == "ShapleyValues"
    got = call(fact, **({} if exact else {"seed": 0}))
    check(got, fact.want, 1e-3 if exact else 1.5 if fact.method == "Lime" else 1.0)


# ----------------------------------------------------------------------------- what else they say


def test_permuting_two_examples_swaps_them() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    model = ox.BlackBox(lambda x: 1 - x)
    got = ox.FeaturePermutation(model).attribute(x, target=1, perturbations_per_eval=4, seed=0)
    want = np.zeros_like(x)
    want[:, 1] = x[::-1, 1] - x[:, 1]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    "mask", [[0], [[0, 1, 2, 3]], [[[0, 1, 2, 3], [3, 3, 4, 5], [6, 6, 4, 6], [7, 8, 9, 10]]]]
)
def test_permuting_parts_of_two_examples(mask: Any) -> None:
    """What one example loses the other wins, feature by feature, for masks of any rank."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    model = ox.BlackBox(lambda x: x.reshape(len(x), -1).sum(1))
    ids = np.asarray(mask)
    got = ox.FeaturePermutation(model).attribute(x, feature_mask=ids, seed=0)
    np.testing.assert_allclose(got[0], -got[1], atol=1e-5)
    for one in np.unique(ids):
        part = np.broadcast_to(ids == one, x.shape[1:])
        want = (x[0][part] - x[1][part]).sum()
        np.testing.assert_allclose(got[0][part], want, atol=1e-5)


def test_permuting_across_inputs() -> None:
    """A loss of the whole batch; what all inputs share is one feature, what is constant tells
    nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 5, 2)), rng.normal(size=(20, 5, 3))
    labels = rng.normal(size=20)
    b[:, :, 1] = 4

    def loss(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        y = (a[:, :, 0] * a[:, :, 1] + b[:, :, 0] * b[:, :, 1]).sum(-1)
        return ((y - labels) ** 2).mean()

    permutation = ox.FeaturePermutation(ox.BlackBox(loss))
    mask = (np.arange(10).reshape(1, 5, 2), np.arange(10, 25).reshape(1, 5, 3))
    first, second = permutation.attribute((a, b), feature_mask=mask, seed=0)
    assert first.shape == (1, 5, 2) and second.shape == (1, 5, 3)
    assert (first != 0).all() and (second[:, :, 0] != 0).all()
    assert (second[:, :, 1:] == 0).all()
    zeros = (np.zeros((1, 5, 2), int), np.zeros((1, 5, 3), int))
    first, second = permutation.attribute((a, b), feature_mask=zeros, seed=0)
    assert (first == first.flat[0]).all() and (second == first.flat[0]).all()


def test_one_example_has_nothing_to_permute_with() -> None:
    """Captum answers with zeros, which look like a result."""
    model = ox.BlackBox(lambda x: x.sum(1))
    with pytest.raises(ox.OnnxplainError, match="one example"):
        ox.FeaturePermutation(model).attribute(np.array([[1.0, 2.0]]))


@pytest.mark.parametrize("method", ["KernelShap", "ShapleyValueSampling", "FeatureAblation"])
def test_an_input_without_elements(method: str) -> None:
    """Beside a full one: the net is linear, so each feature has its weight times its value."""
    x = np.array([[23.0, 0, 0, 23, 0, 0, 23]], np.float32)
    weights = np.array([-0.35, 0.2, 0.1, -0.09, 0.3, -0.2, -0.35], np.float32)
    model = ox.BlackBox(lambda a, b: np.concatenate([a, b], 1) @ weights)
    options = {} if method == "FeatureAblation" else {"n_samples": 300, "seed": 0}
    empty = np.zeros((1, 0), np.float32)
    got = getattr(ox, method)(model).attribute((x, empty), **options)
    np.testing.assert_allclose(got[0], x * weights, atol=1e-3)
    assert got[1].shape == (1, 0)


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ("FeatureAblation", "Feature Ablation"), ("Occlusion", "Occlusion"),
        ("FeaturePermutation", "Feature Permutation"), ("ShapleyValues", "Shapley Values"),
        ("ShapleyValueSampling", "Shapley Value Sampling"), ("Lime", "Lime"),
        ("KernelShap", "Kernel Shap"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_progress_reaches_its_end(
    method: str, title: str, at_once: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"sliding_window_shapes": (1,)} if method == "Occlusion" else {}
    fact = Fact(method, "layers", TWO, None, {**options, "target": 0})
    call(fact, perturbations_per_eval=at_once, show_progress=True)
    assert f"{title} attribution: 100%" in capsys.readouterr().err


WINDOWS = [
    {"sliding_window_shapes": ((1, 2),)},
    {"sliding_window_shapes": (1, 2, 2), "strides": (1, 2)},
    {"sliding_window_shapes": ((1, 1, 2),), "strides": 2},
    {"sliding_window_shapes": ((2, 1, 2),), "strides": 2},
    {"sliding_window_shapes": (1, 5, 2)},
]
WINDOWS2 = [
    {"sliding_window_shapes": ((1, 1, 2), (1, 1, 1, 2))},
    {"sliding_window_shapes": ((1, 1, 2), (1, 1, 2), (1, 1, 2))},
    {"sliding_window_shapes": ((1, 1, 2), (1, 2, 2)), "strides": ((1, 1, 2), (2, 1, 2, 2))},
    {"sliding_window_shapes": ((1, 1, 2), (1, 2, 2)), "strides": ((1, 1, 2),) * 3},
    {"sliding_window_shapes": ((1, 1, 2), (1, 4, 2)), "strides": (2, (1, 2, 3))},
]


@pytest.mark.parametrize(
    ("inputs", "options"),
    [*((PICTURE, w) for w in WINDOWS), *(((PICTURE, WHITE), w) for w in WINDOWS2)],
)
def test_windows_that_do_not_fit(inputs: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ox.OnnxplainError):
        call(Fact("Occlusion", "conv", inputs, None, {**options, "target": 0}))


def test_what_multiplies_by_inputs() -> None:
    model = shipped("layers", (((3,), torch.float32),)).model
    for method in ("FeatureAblation", "Occlusion", "ShapleyValues", "ShapleyValueSampling"):
        assert getattr(ox, method)(model).multiplies_by_inputs
    for method in ("Lime", "KernelShap"):
        explainer = getattr(ox, method)(model)
        assert not explainer.multiplies_by_inputs and not explainer.has_convergence_delta()


# ------------------------------------------------------------------------- Captum's test cases

EXACT = {"FeatureAblation", "Occlusion", "LayerFeatureAblation", "NeuronFeatureAblation"}


def cases() -> Iterator[Case]:
    for row in config:
        for algorithm in row["algorithms"]:
            if (method := algorithm.__name__) in OTHERS:
                yield Case(
                    row["name"], method, row["model"], row.get("layer"), row["attribute_args"],
                    row.get("noise_tunnel", False), None,
                )  # fmt: skip


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_test_cases(case: Case) -> None:
    """The same as Captum; where a method draws, each example alone is the same as in the batch."""
    both, args = bound(case)
    made = () if case.layer is None else (scope(case.layer),)
    if case.method == "FeaturePermutation":
        args["perm_func"] = rolled
    selector = args.get("neuron_selector")
    ours = dict(args)
    if callable(selector):
        ours["neuron_selector"] = lambda v: selector(torch.from_numpy(v)).numpy()
    if case.noise:
        ours["seed"] = 0
    if case.method in EXACT | {"FeaturePermutation"}:
        got = both.ours(case.method, *made, noise=case.noise, **ours)
        want = both.captums(case.method, *made, noise=case.noise, **args)
        return same(got, want, 1e-4, kinks=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several examples, each with a model of its own
        got = both.ours(case.method, **ours, seed=3)
        count = len(next(flat(got)))
        for i in range(count):
            alone = both.ours(case.method, **example(ours, i, count), seed=3)
            for a, g in zip(flat(alone), flat(got), strict=True):
                np.testing.assert_allclose(a, g[i : i + 1], rtol=1e-4, atol=1e-5)
        if case.method == "Lime" or "conv" in case.name:
            return None
        got = both.ours(case.method, **{**ours, "n_samples": 2000}, seed=3)
        exact = {k: v for k, v in args.items() if k != "perturbations_per_eval"}
        explained = args["inputs"] if isinstance(args["inputs"], tuple) else (args["inputs"],)
        want = (
            both.captums("ShapleyValues", **exact, perturbations_per_eval=9)
            if sum(x[0].numel() for x in explained) < 5
            else both.ours("ShapleyValues", **exact)
        )
        for g, w in zip(flat(got), flat(want), strict=True):
            np.testing.assert_allclose(g, w, atol=0.05 * np.abs(w).max())


def example(args: dict[str, Any], i: int, count: int) -> dict[str, Any]:
    """A call's arguments for one of its examples."""
    names = {"inputs", "baselines", "additional_forward_args"} & args.keys()
    found = {**args, **{k: rows(args[k], i) for k in names}}
    targets = args.get("target")
    if isinstance(targets, list | Tensor) and len(targets) == count:
        found["target"] = targets[i]
    return found
