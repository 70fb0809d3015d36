"""Excitation backpropagation by autograd, layer by layer; saliency maps by Captum."""

from __future__ import annotations

from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onnxplain import (
    ContrastiveExcitationBackprop,
    DeconvolutionMap,
    ExcitationBackprop,
    GradCAMMap,
    GradientMap,
    GuidedBackpropMap,
    LinearApproximation,
)
from tests.oracle.both import Both, arrays, same
from tests.oracle.nets import build, example

pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks")


class Net(nn.Module):
    """A plain chain of layers, its ReLUs functional, in place or one reused module."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, stride=2)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2, groups=2)
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 5)
        reused = nn.ReLU()
        kinds = {"functional": torch.relu, "inplace": nn.ReLU(inplace=True), "reused": reused}
        self.relu: Any = kinds[style]

    def steps(self) -> list[tuple[str, Any]]:
        """The layers in order; those that are linear by a name of their own."""
        return [
            ("conv1", self.conv1),
            ("", self.relu),
            ("", lambda x: nn.functional.max_pool2d(x, 2)),
            ("conv2", self.conv2),
            ("", self.relu),
            ("up", self.up),
            ("", self.relu),
            ("mean", lambda x: nn.functional.adaptive_avg_pool2d(x, 1)),
            ("", lambda x: x.flatten(1)),
            ("fc1", self.fc1),
            ("", self.relu),
            ("fc2", self.fc2),
        ]

    def forward(self, image: Tensor) -> Tensor:
        for _, step in self.steps():
            image = step(image)
        return image


def positive(layer: Any, sign: int) -> Any:
    """A linear layer with the positive part of its weights (times a sign) and without bias."""
    if not isinstance(layer, nn.Module):
        return layer

    def run(x: Tensor) -> Tensor:
        weight = (sign * layer.weight).clamp(min=0)
        return torch.func.functional_call(
            layer, {"weight": weight, "bias": torch.zeros_like(layer.bias)}, x
        )

    return run


def visited(net: Net, image: Tensor, target: int, sign: int = 1) -> dict[str, Tensor]:
    """The probability of what enters each linear layer."""
    entering = [image]
    with torch.no_grad():
        for _, step in net.steps():
            entering.append(step(entering[-1].clone()))
    p = torch.zeros_like(entering[-1])
    p[:, target] = 1
    found = {}
    for (name, step), x in list(zip(net.steps(), entering[:-1], strict=True))[::-1]:
        x = x.clone().requires_grad_()
        y = positive(step, sign if name == "fc2" else 1)(x.clone()) if name else step(x.clone())
        p = p / torch.where(y == 0, torch.inf, y.detach()) if name else p
        (p,) = torch.autograd.grad(y, x, p)
        p = p * x.detach() if name else p
        found[name] = p
    return found


@pytest.mark.parametrize("style", ["functional", "inplace", "reused"])
def test_layer_by_layer(style: str) -> None:
    torch.manual_seed(2)
    net = Net(style).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5, mean=0.3 * (p.ndim == 1))
    image = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = Both(net, (image,)).model
    towards, against = visited(net, image, 3), visited(net, image, 3, sign=-1)
    for layer, name in ((None, "conv1"), ("conv2", "up")):  # a ReLU lets through what it gets
        want = towards[name].sum(1, keepdim=True)
        assert (want.sum((1, 2, 3)) > 0.99).all()  # a bias alone may open a neuron
        got = ExcitationBackprop(model, layer).attribute(image.numpy(), target=3)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-3, atol=1e-7)
        got = ContrastiveExcitationBackprop(model, layer).attribute(image.numpy(), target=3)
        want = (towards[name] - against[name]).sum(1, keepdim=True).clamp(min=0)
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "small_cnn"])
def test_maps(name: str) -> None:
    pair = Both(build(name), example(name, 3, seed=4))
    (x,) = pair.xs
    layer = {"resnet18": "layer2", "small_cnn": "pool1"}[name]
    target = [1, 4, 2]
    inner = {"inputs": pair.xs, "target": target}

    def ours(method: Any, *layers: str) -> np.ndarray:
        return method(pair.model, *layers).attribute(arrays(x), target=target)

    gradient = np.abs(pair.captums("Saliency", **inner)[0])
    same(ours(GradientMap), gradient.max(1, keepdims=True), 1e-4)
    product = pair.captums("LayerGradientXActivation", layer, **inner)
    same(ours(LinearApproximation, layer), product.sum(1, keepdims=True), 1e-4)
    cam = pair.captums("LayerGradCam", layer, relu_attributions=True, **inner)
    same(ours(GradCAMMap, layer), cam, 1e-4)
    if name == "resnet18":  # its ReLUs are modules
        for method, theirs in (
            (GuidedBackpropMap, ca.GuidedBackprop),
            (DeconvolutionMap, ca.Deconvolution),
        ):
            want = np.abs(arrays(theirs(pair.net).attribute(x, target=target)))
            same(ours(method), want.max(1, keepdims=True), 1e-4)
    seen = np.abs(arrays(x))
    result, checks = ExcitationBackprop(pair.model, layer).explain(inputs=seen, target=target)
    assert result.min() > -1e-6
    np.testing.assert_allclose(checks["probability"], 1, rtol=1e-5)
