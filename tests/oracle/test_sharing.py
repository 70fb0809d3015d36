"""What breaks tools that hook modules: modules used twice, functions, in-place operations.

A network made of modules of their own and the same network written in such a way give the same
attributions, and those are Captum's on the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.both import Both, same


class Plain(nn.Module):
    """Every operation a module of its own; conv3 and conv4 have the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv4.load_state_dict(self.conv3.state_dict())
        self.relu1, self.relu2, self.relu3, self.relu4, self.relu5 = (nn.ReLU() for _ in range(5))
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.pool1(x + self.relu2(self.conv2(x)))
        x = self.relu4(self.conv4(self.relu3(self.conv3(x))))
        x = self.pool2(x * 0.5 + 0.1)
        return self.fc2(self.relu5(self.fc1(x.flatten(1))))


class Reused(Plain):
    """One ReLU and one pooling for all places."""

    def forward(self, x: Tensor) -> Tensor:
        relu, pool = self.relu1, self.pool1
        x = relu(self.conv1(x))
        x = pool(x + relu(self.conv2(x)))
        x = relu(self.conv4(relu(self.conv3(x))))
        x = pool(x * 0.5 + 0.1)
        return self.fc2(relu(self.fc1(x.flatten(1))))


class Functional(Plain):
    """Functions and methods instead of modules."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(x + torch.relu(self.conv2(x)), 2)
        x = self.conv4(self.conv3(x).relu()).clamp(min=0)
        x = F.max_pool2d(x * 0.5 + 0.1, 2)
        return F.linear(torch.relu(self.fc1(x.flatten(1))), self.fc2.weight, self.fc2.bias)


class InPlace(Plain):
    """Every activation and sum overwrites what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu_()
        y = F.relu(self.conv2(x), inplace=True)
        y += x
        x = self.conv3(self.pool1(y))
        x = torch.relu_(self.conv4(torch.relu_(x)))
        x.mul_(0.5)
        x += 0.1
        return self.fc2(self.fc1(self.pool2(x).flatten(1)).relu_())


class SharedWeights(Plain):
    """One convolution called twice; one weight that two functions read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.pool1(x + self.relu2(F.conv2d(x, self.conv2.weight, self.conv2.bias, padding=1)))
        x = self.relu4(self.conv3(self.relu3(self.conv3(x))))
        x = self.pool2(x * 0.5 + 0.1)
        return self.fc2(self.relu5(self.fc1(x.flatten(1))))


VARIANTS = (Reused, Functional, InPlace, SharedWeights)
SEEDED = torch.Generator().manual_seed(4)
X, OTHERS = (torch.randn(n, 2, 8, 8, generator=SEEDED) for n in (3, 2))


@functools.cache
def network(cls: type[Plain]) -> Both:
    torch.manual_seed(3)
    net = cls().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)  # signals of size one all the way
    return Both(net, (X,))


START = {"baselines": 0.3 * X.flip(0)}
INTO = {"attribute_to_layer_input": True}
NEURON = {"neuron_selector": (1, 2, 3)}
# method, layer, options
ROWS: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("Saliency", None, {"target": 1}),
    ("InputXGradient", None, {"target": 1}),
    ("IntegratedGradients", None, {"target": 1, "n_steps": 9, **START}),
    ("GradientShap", None, {"target": 1, "baselines": OTHERS, "seed": 1}),
    ("DeepLift", None, {"target": 1, **START}),
    ("DeepLiftShap", None, {"target": 1, "baselines": OTHERS}),
    ("GuidedBackprop", None, {"target": 1}),
    ("Deconvolution", None, {"target": 1}),
    ("LRP", None, {"target": 1}),
    ("GuidedGradCam", "conv2", {"target": 1}),
    ("LayerActivation", "conv2", {}),
    ("LayerGradientXActivation", "conv2", {"target": 1, **INTO}),
    ("LayerIntegratedGradients", "conv2", {"target": 1, "n_steps": 9, **START}),
    ("LayerConductance", "conv2", {"target": 1, "n_steps": 9, **START}),
    ("InternalInfluence", "conv2", {"target": 1, "n_steps": 9, **START}),
    ("LayerGradCam", "conv2", {"target": 1}),
    ("LayerGradientShap", "conv2", {"target": 1, "baselines": OTHERS, "seed": 1}),
    ("LayerDeepLift", "conv2", {"target": 1, **START}),
    ("LayerDeepLiftShap", "conv2", {"target": 1, "baselines": OTHERS}),
    ("LayerLRP", "conv2", {"target": 1}),
    ("NeuronGradient", "conv2", NEURON),
    ("NeuronIntegratedGradients", "conv2", {"n_steps": 9, **NEURON, **START}),
    ("NeuronConductance", "conv2", {"target": 1, "n_steps": 9, **NEURON, **START}),
    ("NeuronGuidedBackprop", "conv2", NEURON),
    ("NeuronDeconvolution", "conv2", NEURON),
    ("NeuronGradientShap", "conv2", {"baselines": OTHERS, "seed": 1, **NEURON}),
    ("NeuronDeepLift", "conv2", {**NEURON, **START}),
    ("NeuronDeepLiftShap", "conv2", {"baselines": OTHERS, **NEURON}),
)
NOT_CAPTUM = {
    "LRP": "Captum gives both terms of a sum all relevance",
    "LayerLRP": "Captum gives both terms of a sum all relevance",
    **dict.fromkeys(("GradientShap", "LayerGradientShap", "NeuronGradientShap"), "other chances"),
}


def applies(variant: type[Plain], layer: str | None) -> bool:
    """`conv2` of the last variant is a function, so no layer."""
    return not (variant is SharedWeights and layer == "conv2")


def captum_does(method: str) -> bool:
    return method not in NOT_CAPTUM and hasattr(ca, method)


@pytest.mark.parametrize(("method", "layer", "options"), ROWS, ids=[r[0] for r in ROWS])
def test_variants(method: str, layer: str | None, options: dict[str, Any]) -> None:
    made = () if layer is None else (layer,)
    plain = network(Plain)
    want = plain.ours(method, *made, inputs=X, **options)
    if captum_does(method):
        same(want, plain.captums(method, *made, inputs=X, **options), 1e-4)
    for variant in VARIANTS:
        if applies(variant, layer):
            same(network(variant).ours(method, *made, inputs=X, **options), want, 1e-5)


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("method", ["Saliency", "GuidedBackprop", "DeepLift"])
def test_noise_on_variants(method: str, nt_type: str) -> None:
    options = {"nt_type": nt_type, "nt_samples": 4, "stdevs": 0.01, "target": 1, "seed": 2}
    want = network(Plain).ours(method, noise=True, inputs=X, **options)
    for variant in VARIANTS:
        # The variance is a difference of large numbers.
        same(network(variant).ours(method, noise=True, inputs=X, **options), want, 1e-3)


CALLS: tuple[tuple[str, Callable[[ox.Model, str], Any]], ...] = (
    ("activation", lambda m, name: ox.LayerActivation(m, name).attribute(X.numpy())),
    (
        "gradient",
        lambda m, name: ox.LayerGradientXActivation(m, name).attribute(X.numpy(), target=2),
    ),
    (
        "neuron",
        lambda m, name: ox.NeuronGradient(m, name).attribute(X.numpy(), neuron_selector=(0, 1, 1)),
    ),
)


@pytest.mark.parametrize(("what", "call"), CALLS, ids=[c[0] for c in CALLS])
def test_each_call_of_a_module_is_a_layer(what: str, call: Callable[..., Any]) -> None:
    """A module that is called twice: `#0` is its first call, its bare name the last one."""
    plain, shared = network(Plain).model, network(SharedWeights).model
    same(call(shared, "conv3#0"), call(plain, "conv3"), 1e-5)
    with pytest.warns(UserWarning, match="conv3#0"):
        last = call(shared, "conv3")
    same(last, call(plain, "conv4"), 1e-5)
