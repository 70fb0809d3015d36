"""Noise tunnel and gradient SHAP against Captum: its formulas sample by sample, and its moments."""

from __future__ import annotations

from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum.testing.helpers import basic_models as nets
from torch import Tensor, nn

import onnxplain as ox
from onnxplain.methods.noise import stream
from tests.oracle.both import Both, Fixed, arrays, flat, same


class Smooth(nn.Module):
    """Two inputs that meet in a product; no kinks, float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * torch.sigmoid(y)).softmax(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


X, Y = normal(3, 6), normal(3, 9, seed=1)
POOL = normal(5, 6, seed=2), normal(5, 9, seed=3)
TARGET = torch.tensor([1, 3, 0])


@pytest.fixture(scope="module")
def smooth() -> Both:
    return Both(Smooth(), (X, Y))


def drawn(
    sample: int, seed: int, stdevs: tuple[float, float]
) -> tuple[float, list[Tensor], list[Tensor]]:
    """The position, baselines and noisy inputs of one sample."""
    random = stream(seed)(sample)
    position = random.random()
    starts = [pool[random.integers(5)].expand(3, -1) for pool in POOL]
    noises = [torch.from_numpy(random.standard_normal(v.shape[1])) for v in (X, Y)]
    ends = [v + s * n for v, s, n in zip((X, Y), stdevs, noises, strict=True)]
    return position, starts, ends


def interpolated(
    net: Smooth, layer: nn.Module | None, sample: tuple, factor: bool
) -> tuple[list[Tensor], Tensor]:
    """One sample by Captum's classes behind its tunnel: attributions and deltas."""
    position, starts, ends = sample
    if layer is None:
        method = ca._core.gradient_shap.InputBaselineXGradient(net, factor)
    else:
        method = ca._core.layer.layer_gradient_shap.LayerInputBaselineXGradient(
            net, layer, multiply_by_inputs=factor
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "uniform", lambda low, high, size: np.full(size, position))
        return method.attribute(
            tuple(ends), tuple(starts), target=TARGET, return_convergence_delta=True
        )


@pytest.mark.parametrize("factor", [True, False])
@pytest.mark.parametrize("layer", [None, "a"])
def test_gradient_shap_sample_by_sample(smooth: Both, layer: str | None, factor: bool) -> None:
    """Captum's own classes with our draws in place of its random numbers."""
    stdevs, made = (0.3, 0.1), () if layer is None else (layer,)
    name = "GradientShap" if layer is None else "LayerGradientShap"
    got, deltas = smooth.ours(
        name, *made, inputs=(X, Y), baselines=POOL, n_samples=4, stdevs=stdevs, target=TARGET,
        return_convergence_delta=True, seed=9, multiply_by_inputs=factor,
    )  # fmt: skip
    parts = [
        interpolated(smooth.net, smooth.module(layer), drawn(s, 9, stdevs), factor)
        for s in range(4)
    ]
    by_source = zip(*(a if isinstance(a, tuple) else (a,) for a, _ in parts), strict=True)
    want = tuple(torch.stack(each).mean(0).detach() for each in by_source)
    same(got, arrays(want if layer is None else want[0]), 1e-9, kinks=False)
    ordered = torch.stack([d for _, d in parts], 1).flatten().detach()
    np.testing.assert_allclose(deltas, ordered, atol=1e-9)


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_tunnel_sample_by_sample(smooth: Both, nt_type: str) -> None:
    """Captum's own tunnel with our noise in place of its random numbers."""
    options: dict[str, Any] = {
        "target": TARGET, "baselines": (POOL[0][:3], 0.5), "n_steps": 6, "nt_samples": 5,
        "nt_type": nt_type, "return_convergence_delta": True,
    }  # fmt: skip
    stdevs, draws = (0.2, 0.5), [stream(4)(s) for s in range(5)]
    # Captum's rows are all samples of the first example, then those of the second.
    given = iter(
        [
            stdev * torch.from_numpy(np.stack([r.standard_normal(v.shape[1]) for r in draws] * 3))
            for stdev, v in zip(stdevs, (X, Y), strict=True)
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "normal", lambda mean, std: next(given))
        want, delta = ca.NoiseTunnel(ca.IntegratedGradients(smooth.net)).attribute(
            (X, Y), stdevs=stdevs, **options
        )
    got, gap = ox.NoiseTunnel(ox.IntegratedGradients(smooth.model)).attribute(
        arrays((X, Y)), stdevs=stdevs, seed=4, **arrays(options)
    )
    same(got, arrays(want), 1e-6, kinks=False)  # Captum rounds its step sizes to float32
    np.testing.assert_allclose(gap, delta.numpy(), atol=1e-6)


# ---- moments of independent samples ----

MANY = 4000


def seed_captum() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - Captum draws baselines from it


def close(got: Any, want: Any, moment: float) -> None:
    """Two estimates agree within what their numbers of samples allow."""
    for g, w in zip(flat(got), flat(want), strict=True):
        np.testing.assert_allclose(g, w, atol=moment * np.abs(w).max(), rtol=0.05)


@pytest.mark.parametrize(
    ("nt_type", "moment"), [("smoothgrad", 0.05), ("smoothgrad_sq", 0.1), ("vargrad", 0.1)]
)
def test_moments_are_captums(smooth: Both, nt_type: str, moment: float) -> None:
    seed_captum()
    options = {"nt_type": nt_type, "nt_samples": MANY, "stdevs": (0.4, 0.4), "target": TARGET}
    want = ca.NoiseTunnel(ca.InputXGradient(smooth.net)).attribute((X, Y), **options)
    got = ox.NoiseTunnel(ox.InputXGradient(smooth.model)).attribute(
        arrays((X, Y)), seed=0, **arrays(options)
    )
    close(got, arrays(want), moment)


def test_drawn_baselines_are_captums(smooth: Both) -> None:
    """Each input draws its own baseline: their expectation is over all pairs."""
    seed_captum()
    options: dict[str, Any] = {
        "inputs": (X, Y), "target": TARGET, "baselines": POOL, "n_steps": 8, "nt_samples": MANY,
        "stdevs": 0.0, "draw_baseline_from_distrib": True,
    }  # fmt: skip
    want = ca.NoiseTunnel(ca.IntegratedGradients(smooth.net)).attribute(**options)
    got = ox.NoiseTunnel(ox.IntegratedGradients(smooth.model)).attribute(seed=0, **arrays(options))
    close(got, arrays(want), 0.05)


@pytest.mark.parametrize(
    ("method", "made", "asked"),
    [
        ("GradientShap", (), {"inputs": (X, Y), "baselines": POOL, "target": TARGET}),
        ("LayerGradientShap", ("a",), {"inputs": (X, Y), "baselines": POOL, "target": TARGET}),
        ("NeuronGradientShap", ("a",), {"inputs": X, "baselines": POOL[0], "neuron_selector": 2,
                                        "additional_forward_args": (Y,)}),
    ],
)  # fmt: skip
def test_expected_gradients_are_captums(
    smooth: Both, method: str, made: tuple, asked: dict[str, Any]
) -> None:
    seed_captum()
    options = {**asked, "n_samples": MANY, "stdevs": 0.2}
    got = smooth.ours(method, *made, seed=0, **options)
    close(got, smooth.captums(method, *made, **options), 0.05)


# ---- what Captum's own tests expect ----

CALM: dict[str, Any] = {"nt_samples": 10, "stdevs": 2e-7}
ZERO: dict[str, Any] = {"inputs": (torch.tensor([[3.0]]), torch.tensor([[1.0]]))}


@pytest.mark.parametrize(
    ("method", "nt_type", "want"),
    [
        ("Saliency", "smoothgrad", (1.0, 1.0)),
        ("Saliency", "smoothgrad_sq", (1.0, 1.0)),
        ("Saliency", "vargrad", (0.0, 0.0)),
        ("InputXGradient", "smoothgrad", (3.0, -1.0)),
        ("InputXGradient", "vargrad", (0.0, 0.0)),
        ("IntegratedGradients", "smoothgrad", (1.5, -0.5)),
        ("IntegratedGradients", "smoothgrad_sq", (2.25, 0.25)),
        ("IntegratedGradients", "vargrad", (0.0, 0.0)),
    ],
)
def test_facts(method: str, nt_type: str, want: tuple[float, float]) -> None:
    """relu(relu(a) - 1 - relu(b)) at a = 3, b = 1, with hardly any noise."""
    net = Both(Fixed(nets.BasicModel2(), {}), ZERO["inputs"])
    options = {**ZERO, **CALM, "nt_type": nt_type}
    if method == "IntegratedGradients":
        options["n_steps"] = 400
    got = net.ours(method, noise=True, **options)
    assert [float(g[0, 0]) for g in got] == pytest.approx(want, abs=0.01)


def test_gradient_shap_tends_to_integrated_gradients() -> None:
    """Captum's test: 20000 samples, equal baselines, within 0.05; here 4000, twice the baseline."""
    net = Both(Fixed(nets.BasicModel2(), {}), ZERO["inputs"])
    zeros = (torch.zeros(2, 1), torch.zeros(2, 1))
    got, delta = net.ours(
        "GradientShap", **ZERO, baselines=zeros, n_samples=MANY, return_convergence_delta=True,
        seed=0,
    )  # fmt: skip
    assert [float(g[0, 0]) for g in got] == pytest.approx((1.5, -0.5), abs=0.06)
    assert delta.shape == (MANY,)
    assert abs(delta.mean()) < 0.05
