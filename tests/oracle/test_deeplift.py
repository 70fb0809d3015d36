"""DeepLIFT against Captum where Captum keeps its own sum, and the sum on every network.

Captum 0.9 loses part of it in three ways, which `mended` takes out of the networks: a hook on a
tensor between two activations (ReLU, then max pooling) hands the second's ordinary gradient to the
first; unpooling keeps one of several windows that share their maximum; and its softmax subtracts a
mean over the whole batch (compared for one example, with `softmax="centered"`). Activations that
are functions get ordinary gradients there, so the networks here have modules. Random options on
networks without pooling are in test_methods.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
from captum.testing.helpers import basic_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.both import Both, arrays, flat, same
from tests.oracle.nets import IMAGE_NETS, SMALL_NETS, SmallCNN, build, example


class Copied(nn.Module):
    """A new tensor with the same values: hooks on it are not those of the layer before."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def mended(net: nn.Module) -> nn.Module:
    """A copy of a network whose activations read tensors of their own."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in SUPPORTED_NON_LINEAR:
                if isinstance(child, nn.ReLU):
                    child.inplace = False
                setattr(parent, name, nn.Sequential(Copied(), child))
    return net.requires_grad_(True)  # Captum wants a gradient at every activation


def unpool(
    values: Tensor, indices: Tensor, kernel: Any, stride: Any, padding: Any, size: list[int]
) -> Tensor:
    """Windows that share their maximum add up."""
    out = torch.zeros(size, dtype=values.dtype).flatten(2)
    return out.scatter_add(2, indices.flatten(2), values.flatten(2)).reshape(size)


@pytest.fixture(autouse=True)
def summing() -> Iterator[None]:
    names = ("max_unpool1d", "max_unpool2d", "max_unpool3d")
    with mock.patch.multiple(torch.nn.functional, **dict.fromkeys(names, unpool)):
        yield


class Modular(SmallCNN):
    """The small CNN with its activations as modules: batch norm, two poolings, one overlapping."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        return self.head(x.flatten(1))


class Table(nn.Module):
    """Two inputs, and every elementwise activation that Captum knows and onnxruntime has in
    float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(16, 6)
        self.d, self.e = nn.Linear(6, 6), nn.Linear(6, 4)
        self.tanh, self.relu, self.sigmoid = nn.Tanh(), nn.ReLU(), nn.Sigmoid()
        self.out = nn.Sigmoid()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.cat([self.tanh(self.a(x)), self.relu(self.b(y))], 1)
        return self.out(self.e(self.sigmoid(self.d(self.c(h)))))


@functools.cache
def network(name: str) -> Both:
    torch.manual_seed(7)
    if name == "table":
        net: nn.Module = Table().double()
        xs: tuple[Tensor, ...] = (torch.randn(4, 5).double(), torch.randn(4, 3).double())
    elif name == "small_cnn":
        net = Modular(10)
        net.load_state_dict(build("small_cnn").state_dict())
        xs = example("small_cnn", 3, seed=4)
    elif name == "resnet18":
        net, xs = build(name), example(name, 2, seed=4)
    else:
        net = getattr(basic_models, name)()
        for p in net.parameters():  # Captum's are ones, which its softmax rule maps to zero
            nn.init.normal_(p, std=0.5)
        axes = {"1": 1, "3": 3}.get(name.removesuffix("d")[-1], 2)
        xs = (torch.randn(3, 1, *[10] * axes),)
    both = Both(net.eval().requires_grad_(False), xs)
    assert both.model.outputs  # exported before it is mended
    both.net = mended(net)
    return both


POOLED = {
    "small_cnn": "pool1",
    "resnet18": "layer2",
    "BasicModel_ConvNet_MaxPool1d": "pool1",
    "BasicModel_ConvNet": "conv2",
    "BasicModel_ConvNet_MaxPool3d": "pool2",
}


@pytest.mark.parametrize("name", POOLED)
def test_pooling(name: str) -> None:
    both, layer = network(name), POOLED[name]
    xs = both.xs[0]
    each = [x[None] for x in xs] if "Basic" in name else [xs]  # one softmax at a time
    for x in each:
        given = {"inputs": x, "baselines": 0.5 * x.flip(-1) + 0.1, "target": 1}
        several = {**given, "baselines": torch.cat([x.flip(-1), x.flip(-2) if x.ndim > 3 else -x])}
        middle = tuple(
            s // 2 for s in ox.LayerActivation(both.model, layer).attribute(arrays(x)).shape[1:]
        )
        rows = [
            ("DeepLift", [], {**given, "return_convergence_delta": True}),
            ("DeepLiftShap", [], several),
            ("LayerDeepLift", [layer], given),
            ("LayerDeepLiftShap", [layer], several),
        ]
        neuron = {k: v for k, v in given.items() if k != "target"} | {"neuron_selector": middle}
        rows.append(("NeuronDeepLift", [layer], neuron))
        for cls, made, options in rows:
            if "Basic" in name and "Shap" in cls:
                continue  # Captum's softmax takes the mean over all baselines
            method = getattr(ox, cls)(both.model, *made, softmax="centered")
            got, want = method.attribute(**arrays(options)), both.captums(cls, *made, **options)
            if options.get("return_convergence_delta"):
                (got, gap), (want, delta) = got, want
                np.testing.assert_allclose(gap, delta, atol=1e-4)
            same(got, want, 1e-4)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_options_in_float64(data: st.DataObject) -> None:
    both = network("table")
    n = data.draw(st.integers(1, 4), label="examples")
    xs = tuple(x[:n] for x in both.xs)
    cls = data.draw(
        st.sampled_from(
            [f"{form}DeepLift{shap}" for form in ("", "Layer", "Neuron") for shap in ("", "Shap")]
        ),
        label="method",
    )
    options: dict[str, Any] = {"inputs": xs}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    rows = data.draw(st.integers(2, 4) if "Shap" in cls else st.sampled_from([1, n]), label="rows")
    options["baselines"] = tuple(
        torch.randn(rows, *x.shape[1:], generator=generator).double() for x in xs
    )
    if "Shap" not in cls and data.draw(st.booleans(), label="numbers"):
        options["baselines"] = (0.5, 0)
    made = [] if cls.startswith("Deep") else [data.draw(st.sampled_from(["c", "d"]), label="layer")]
    if cls.startswith("Neuron"):
        options["neuron_selector"] = data.draw(st.sampled_from([3, (2,), (slice(1, 4),)]))
    else:
        one = st.integers(0, 3)
        options["target"] = data.draw(st.one_of(one, st.lists(one, min_size=n, max_size=n)))
        options["return_convergence_delta"] = data.draw(st.booleans(), label="delta")
    options["multiply_by_inputs"] = data.draw(st.booleans(), label="multiply")
    if not made:
        options["eps"] = data.draw(st.sampled_from([1e-10, 1e-2]), label="eps")
    customs = [
        None,
        lambda m: tuple(2 * v for v in m),
        lambda m, x: tuple(v * w for v, w in zip(m, x, strict=True)),
        lambda m, x, b: tuple(v * w - u for v, w, u in zip(m, x, b, strict=True)),
    ]
    options["custom_attribution_func"] = data.draw(st.sampled_from(customs), label="custom")
    if cls == "DeepLiftShap":
        options.pop("eps")  # Captum's has none
    got, want = both.ours(cls, *made, **options), both.captums(cls, *made, **options)
    if options.get("return_convergence_delta"):
        (got, gap), (want, delta) = got, want
        np.testing.assert_allclose(gap, delta, atol=1e-10)
    same(got, want, 1e-8, kinks=False)


def test_a_layer_of_two_values() -> None:
    """Captum's expectation for an activation of two tensors."""
    net = basic_models.BasicModel_MultiLayer(multi_input_module=True).eval()
    both = Both(net, (torch.tensor([[-10.0, 1.0, -5.0]]),))
    got, delta = both.ours(
        "LayerDeepLift", "multi_relu", inputs=both.xs, target=0, return_convergence_delta=True
    )
    want, _ = both.captums(
        "LayerDeepLift", "multi_relu", inputs=both.xs, target=0, return_convergence_delta=True
    )
    for part in (*flat(got), *flat(want)):
        np.testing.assert_allclose(part, [[0, -1, -1, -1]])
    np.testing.assert_allclose(delta, 0, atol=1e-6)


def test_reused_modules() -> None:
    """What Captum refuses: an activation module that is called twice."""
    torch.manual_seed(2)
    net = basic_models.BasicModelWithReusedModules().eval()
    both = Both(net, (torch.rand(3, 3),))
    with pytest.raises(RuntimeError, match="used more than once"):
        ca.DeepLift(net).attribute(both.xs[0], target=0)
    _, delta = both.ours(
        "DeepLift", inputs=both.xs, baselines=-1, target=0, return_convergence_delta=True
    )
    np.testing.assert_allclose(delta, 0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in (*IMAGE_NETS, *SMALL_NETS) if n != "vgg11"])
def test_summation_to_delta(name: str) -> None:
    both = Both(build(name), example(name, 2, seed=4))
    xs, target = arrays(both.xs), [1, 4]
    starts = tuple(0.3 * x[::-1] + x.dtype.type(0.1) for x in xs)
    method: Any = ox.DeepLift
    if name == "transformer":  # padding stays where it is
        starts = tuple(np.where(x == 0, 0, (x + 7) % 49 + 1) for x in xs)
        method = functools.partial(ox.LayerDeepLift, layer="embedding")
    values = both.model(xs)["logits"] - both.model(starts)["logits"]
    size = np.abs(values[range(2), target])
    small = name in (*SMALL_NETS, "resnet18", "vit_tiny_patch16_224")
    for rule in ("rescale", "reveal-cancel") if small else ("rescale",):
        _, delta = method(both.model, rule=rule).attribute(
            xs, starts, target, return_convergence_delta=True
        )
        assert (np.abs(delta) <= 1e-4 * size).all(), (rule, delta, size)
