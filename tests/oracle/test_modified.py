"""Guided backpropagation and deconvolution against Captum on the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.both import Both, same
from tests.oracle.nets import build, example

METHODS = ("GuidedBackprop", "Deconvolution")
pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:no operator")


class Net(nn.Module):
    """Two convolutions and two linear layers, their ReLUs written in one of four ways.

    Captum's hooks change modules that are called once and out of place ("modules") alone.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 9, 12), nn.Linear(12, 4)
        if style == "functional":
            self.relus: Any = [torch.relu, nn.functional.relu, lambda x: x.clamp(min=0)]
        elif style == "reused":
            self.relu = nn.ReLU()
            self.relus = [self.relu] * 3
        else:
            self.relus = nn.ModuleList(nn.ReLU(inplace=style == "inplace") for _ in range(3))

    def forward(self, image: Tensor) -> Tensor:
        x = self.relus[0](self.conv1(image))
        x = nn.functional.max_pool2d(self.relus[1](self.conv2(x)), 2, stride=1)
        return self.fc2(self.relus[2](self.fc1(x.flatten(1))))


class Joined(nn.Module):
    """Two rows joined behind ReLUs, of operators that onnxruntime has in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(10, 3)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        seen = self.relu1(self.one(first))
        known = self.relu2(self.two(second))
        return self.head(self.relu3(torch.cat([seen * known, seen - known], 1)))


def seeded(net: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net.eval()


def images() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def both(method: str, pair: Both, *made: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and Captum's."""
    asked = {"inputs": pair.xs, **options}
    return pair.ours(method, *made, **asked), pair.captums(method, *made, **asked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "resnet18"])
def test_networks(method: str, name: str) -> None:
    pair = Both(build(name), example(name, 3, seed=4))
    same(*both(method, pair, target=[1, 4, 2]), 1e-4)
    layer, neuron = ("layers.2", (5,)) if name == "mlp" else ("layer2", (3, slice(0, 4), 2))
    same(*both(f"Neuron{method}", pair, layer, neuron_selector=neuron), 1e-4)


@pytest.fixture(scope="module")
def joined() -> Both:
    generator = torch.Generator().manual_seed(0)
    xs = tuple(torch.randn(4, n, generator=generator).double() for n in (6, 4))
    return Both(seeded(Joined()).double(), xs)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_options_in_float64(joined: Both, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    first, second = xs = tuple(x[:n] for x in joined.xs)
    asked: dict[str, Any] = {"inputs": xs}
    if data.draw(st.booleans()):
        asked = {"inputs": first, "additional_forward_args": (second,)}
    method, layer = data.draw(st.sampled_from(METHODS)), ()
    if data.draw(st.booleans()):
        method, layer = f"Neuron{method}", (data.draw(st.sampled_from(["head", "relu3"])),)
        one = st.integers(0, 2)
        asked["neuron_selector"] = data.draw(
            st.one_of(one, st.tuples(one), st.just((slice(1, 3),)))
        )
        asked["attribute_to_neuron_input"] = data.draw(st.booleans())
    else:
        classes = st.integers(0, 2)
        asked["target"] = data.draw(st.one_of(classes, st.lists(classes, min_size=n, max_size=n)))
    ours, want = joined.ours(method, *layer, **asked), joined.captums(method, *layer, **asked)
    same(ours, want, 1e-8, kinks=False)


@pytest.mark.parametrize("style", ["modules", "functional", "inplace", "reused"])
@pytest.mark.parametrize("method", METHODS)
def test_what_breaks_hooks_changes_nothing(style: str, method: str) -> None:
    plain, net = seeded(Net("modules")), seeded(Net(style))
    image = images()
    want = getattr(ca, method)(plain).attribute(image, target=2).numpy()
    got = getattr(ox, method)(Both(net, (image,)).model).attribute(image.numpy(), target=2)
    same(got, want, 1e-5, kinks=False)


def test_hooks_do_break() -> None:
    """Captum leaves functional ReLUs as they are: the reason for the test above."""
    results = []
    for style in ("modules", "functional"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(ca.GuidedBackprop(seeded(Net(style))).attribute(images(), target=2))
    assert not np.allclose(*[r.numpy() for r in results])
