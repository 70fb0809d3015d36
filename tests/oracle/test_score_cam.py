"""Score-CAM and Ablation-CAM against pytorch-grad-cam on the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxplain.methods.interpolate import aligned
from onnxplain.methods.score_cam import AblationCAM, ScoreCAM
from tests.oracle.test_cam import LAYERS, TARGET, error, network, patches, theirs

layers = pytest.importorskip("pytorch_grad_cam.ablation_layer")
cams = pytest.importorskip("pytorch_grad_cam")


def maps(method: str, net: str, layer: str, **options: Any) -> np.ndarray:
    """Their maps, at a batch of one: what channels go to depends on the batch there."""
    both = network(net)
    if method == "ScoreCAM":
        return np.asarray(theirs(method, both.net, [both.module(layer)], both.xs[0], **options))
    vit = hasattr(both.net, "patch_embed")
    made = {"ablation_layer": layers.AblationLayerVit() if vit else layers.AblationLayer()}
    transform = {"reshape_transform": patches} if vit else {}
    asked = [cams.utils.model_targets.ClassifierOutputTarget(k) for k in TARGET]
    with cams.AblationCAM(both.net, [both.module(layer)], batch_size=1, **made, **transform) as cam:
        return np.asarray(cam(both.xs[0].clone(), asked, **options)[:, None])


@pytest.mark.parametrize("cls", [ScoreCAM, AblationCAM])
@pytest.mark.parametrize("net", LAYERS)
def test_maps(cls: Any, net: str) -> None:
    both = network(net)
    for layer in LAYERS[net]:
        got = cls(both.model, layer).attribute(both.xs[0].numpy(), TARGET, normalize=True)
        assert error(got, maps(cls.__name__, net, layer)).max() < 1e-4, layer


@pytest.mark.parametrize("cls", [ScoreCAM, AblationCAM])
def test_eigen_smoothing(cls: Any) -> None:
    both = network("small_cnn")
    got = cls(both.model, "pool1").attribute(
        both.xs[0].numpy(), TARGET, normalize=True, eigen_smooth=True
    )
    assert error(got, maps(cls.__name__, "small_cnn", "pool1", eigen_smooth=True)).max() < 1e-4


@pytest.mark.parametrize("cls", [ScoreCAM, AblationCAM])
def test_a_reshape_transform(cls: Any) -> None:
    """The class token, which is in no map, belongs to the channels that go."""
    both, layer = network("vit_tiny_patch16_224"), "blocks.11.norm1"
    got = cls(both.model, layer, patches).attribute(both.xs[0].numpy(), TARGET, normalize=True)
    assert error(got, maps(cls.__name__, "vit_tiny_patch16_224", layer)).max() < 1e-4


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60))
def test_aligned_corners(size: int, out: int) -> None:
    x = torch.rand(1, 1, size, dtype=torch.float64)
    want = torch.nn.functional.interpolate(x, out, mode="linear", align_corners=True)
    np.testing.assert_allclose(aligned(size, out) @ x[0, 0].numpy(), want[0, 0].numpy(), atol=1e-12)
