"""Interpolation against torch's, the CAM family against pytorch-grad-cam on the same weights.

Captum's Grad-CAM is compared in test_methods.py and test_captum_facts.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onnxplain.methods import cam
from onnxplain.methods.fullgrad import FullGrad
from onnxplain.methods.interpolate import MODES, interpolate
from tests.oracle.both import Both
from tests.oracle.nets import build, example
from tests.oracle.test_sharing import Plain

reference = pytest.importorskip(
    "pytorch_grad_cam", reason="needs grad-cam: pip install --no-deps grad-cam ttach opencv-python"
)
targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

METHODS = (
    *("GradCAM", "GradCAMPlusPlus", "HiResCAM", "XGradCAM", "LayerCAM"),
    *("EigenCAM", "EigenGradCAM"),
)
TARGET = [1, 4, 2]
LAYERS = {
    "plain_cnn": ("conv2", "relu4"),
    "small_cnn": ("pool1", "pool2"),
    "resnet18": ("layer2",),
    "vit_tiny_patch16_224": ("blocks.11.norm1",),
}


@functools.cache
def network(name: str) -> Both:
    if name == "plain_cnn":
        torch.manual_seed(3)
        return Both(Plain().eval(), (torch.randn(3, 2, 8, 8),))
    return Both(build(name), example(name, 3, seed=4))


def patches(tokens: Any) -> Any:
    """Tokens [N, 17, dim] as maps [N, dim, 4, 4], of tensors and of arrays."""
    grid = tokens[:, 1:].reshape(len(tokens), 4, 4, -1)
    return grid.permute(0, 3, 1, 2) if isinstance(grid, Tensor) else grid.transpose(0, 3, 1, 2)


def theirs(method: str, net: torch.nn.Module, layers: list, x: Tensor, **options: Any) -> Any:
    transform = {"reshape_transform": patches} if hasattr(net, "patch_embed") else {}
    with getattr(reference, method)(net, layers, **transform) as made:
        asked = [targets.ClassifierOutputTarget(k) for k in TARGET]
        return made(x.clone().requires_grad_(), asked, **options)[:, None]


def error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    assert got.shape == want.shape
    rows = [np.asarray(a, np.float64).reshape(len(a), -1) for a in (got, want)]
    return np.linalg.norm(rows[0] - rows[1], axis=1) / np.linalg.norm(rows[1], axis=1).clip(1e-9)


def compare(method: str, net: str, smooth: bool, transform: Any = None) -> None:
    both = network(net)
    x = both.xs[0]
    for layer in LAYERS[net]:
        want = theirs(method, both.net, [both.module(layer)], x, eigen_smooth=smooth)
        made = getattr(cam, method)(both.model, layer, transform)
        got = made.attribute(x.numpy(), TARGET, normalize=True, eigen_smooth=smooth)
        # The sum of a channel, by which XGrad-CAM divides, cancels in tokens that are normalized.
        cancels = method == "XGradCAM" and net.startswith("vit")
        assert error(got, want).max() < (2e-3 if cancels else 1e-4), layer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", LAYERS)
def test_maps(method: str, net: str) -> None:
    """The final maps: scaled, resized (by OpenCV there) and scaled again."""
    compare(method, net, False)


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("Eigen")])
def test_eigen_smoothing(method: str) -> None:
    compare(method, "small_cnn", True)


def test_a_reshape_transform() -> None:
    compare("GradCAM", "vit_tiny_patch16_224", False, patches)


def test_the_chosen_layer_is_the_one_they_recommend() -> None:
    """ "layer4" of a ResNet; a transformer's last tokens that its class token still looks at."""
    both = network("resnet18")
    chosen = both.model.resolve(cam.GradCAM(both.model).layer)
    assert chosen == both.model.resolve("layer4")
    both = network("vit_tiny_patch16_224")
    chosen = both.model.resolve(cam.GradCAM(both.model).layer)
    assert chosen == both.model.resolve("blocks.10")


def test_full_grad() -> None:
    """On a ResNet, whose convolutions have no bias: folding batch norm moves none there."""
    both = network("resnet18")
    got = FullGrad(both.model).attribute(both.xs[0].numpy(), TARGET, normalize=True)
    assert error(got, theirs("FullGrad", both.net, [], both.xs[0])).max() < 1e-4


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_interpolation(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(sorted(MODES)))
    axes = MODES[mode][1] or data.draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 40), min_size=axes, max_size=axes)
    shape, new = data.draw(sizes), tuple(data.draw(sizes))
    x = np.random.default_rng(0).standard_normal((2, 2, *shape)).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(x).double(), new, mode=mode).numpy()
    got = interpolate(x.astype(np.float64), new, mode)
    if mode == "nearest":  # of single precision, which may round across a pixel's border
        want = torch.nn.functional.interpolate(torch.from_numpy(x), new, mode=mode).numpy()
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_nearest_rounds_as_torch_does() -> None:
    for old in (2, 3, 7, 13, 28):
        x = torch.arange(float(old))[None, None]
        for new in range(1, 260):
            want = torch.nn.functional.interpolate(x, new, mode="nearest")
            np.testing.assert_array_equal(interpolate(x.numpy(), new), want.numpy())
