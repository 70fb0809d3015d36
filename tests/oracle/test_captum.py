"""Methods against Captum on the same weights, in float64 where onnxruntime has the kernels."""

from __future__ import annotations

import tempfile
from pathlib import Path

import captum.attr as ca
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnxplain as ox
from onnxplain.methods.path import QUADRATURES, quadrature
from tests.oracle.nets import build, example, export

FOLDER = tempfile.TemporaryDirectory()
NETS = ("mlp", "small_cnn", "multi_input", "resnet18")


@pytest.fixture(scope="module", params=NETS)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, ox.Model, tuple]:
    name = request.param
    net, xs = build(name), example(name, 3, seed=4)
    path = Path(FOLDER.name) / f"{name}.onnx"
    export(net, xs, path)
    return net, ox.Model(path), xs


def arrays(xs: object) -> object:
    """Tensors as arrays, in the same form."""
    if isinstance(xs, tuple | list):
        return tuple(arrays(x) for x in xs)
    return xs.detach().numpy()


def same(got: object, want: object, tolerance: float = 1e-4) -> None:
    """Agreement of each example's vector, relative to its length.

    Either side may take the other branch of a ReLU or a maximum where float32 rounds across its
    kink. Such a flip moves one example (measured: Captum's float32 differs from its float64 by
    4e-4 on one of three), so one may miss the tolerance, by a bounded amount; most may not.
    """
    got = got if isinstance(got, tuple | list) else (got,)
    want = want if isinstance(want, tuple | list) else (want,)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        w = w.detach().numpy() if isinstance(w, torch.Tensor) else w
        assert g.shape == w.shape
        flat_g, flat_w = g.reshape(len(g), -1), w.reshape(len(w), -1)
        size = np.maximum(np.linalg.norm(flat_w, axis=1), 1e-12)
        error = np.linalg.norm(flat_g - flat_w, axis=1) / size
        assert np.median(error) < tolerance, error
        assert error.max() < 3e-2, error


def test_saliency_and_input_x_gradient(pair: tuple) -> None:
    net, model, xs = pair
    target = [1, 4, 2]
    for absolute in (True, False):
        want = ca.Saliency(net).attribute(xs, target=target, abs=absolute)
        same(ox.Saliency(model).attribute(arrays(xs), target=target, abs=absolute), want)
    want = ca.InputXGradient(net).attribute(xs, target=target)
    same(ox.InputXGradient(model).attribute(arrays(xs), target=target), want)


@pytest.mark.parametrize("method", QUADRATURES)
def test_integrated_gradients(pair: tuple, method: str) -> None:
    net, model, xs = pair
    options = {"target": 2, "n_steps": 7, "method": method, "return_convergence_delta": True}
    # A constant baseline would tie every window of a max pooling.
    baselines = tuple(0.3 * x.flip(0).flip(-1) for x in xs)
    want, delta = ca.IntegratedGradients(net).attribute(xs, baselines, **options)
    got, ours = ox.IntegratedGradients(model).attribute(arrays(xs), arrays(baselines), **options)
    same(got, want, 5e-4)
    np.testing.assert_allclose(ours, delta.numpy(), atol=1e-3 * max(1, float(delta.abs().max())))


LAYERS = {"mlp": "layers.2", "small_cnn": "pool1", "multi_input": "conv", "resnet18": "layer2"}


def layer_of(net: torch.nn.Module) -> str:
    return next(v for v in LAYERS.values() if v in dict(net.named_modules()))


@pytest.mark.parametrize("entering", [False, True])
def test_layers(pair: tuple, entering: bool) -> None:
    net, model, xs = pair
    name = layer_of(net)
    module = net.get_submodule(name)
    side = {"attribute_to_layer_input": entering}
    want = ca.LayerActivation(net, module).attribute(xs, **side)
    same(ox.LayerActivation(model, name).attribute(arrays(xs), **side), want)
    for factor in (True, False):
        want = ca.LayerGradientXActivation(net, module, multiply_by_inputs=factor).attribute(
            xs, target=3, **side
        )
        ours = ox.LayerGradientXActivation(model, name, multiply_by_inputs=factor)
        same(ours.attribute(arrays(xs), target=3, **side), want)
        want, delta = ca.LayerIntegratedGradients(net, module, multiply_by_inputs=factor).attribute(
            xs, target=3, n_steps=6, return_convergence_delta=True, **side
        )
        got, gap = ox.LayerIntegratedGradients(model, name, multiply_by_inputs=factor).attribute(
            arrays(xs), target=3, n_steps=6, return_convergence_delta=True, **side
        )
        same(got, want, 5e-4)
        np.testing.assert_allclose(gap, delta.numpy(), atol=1e-3 * max(1, float(delta.abs().max())))


def test_neurons(pair: tuple) -> None:
    net, model, xs = pair
    name = layer_of(net)
    module = net.get_submodule(name)
    shape = ox.LayerActivation(model, name).attribute(arrays(xs)).shape[1:]
    selectors = [tuple(s // 2 for s in shape), tuple(slice(0, 2) for _ in shape)]
    # The layer need not depend on every input: the first is explained, the others are fed.
    x, fed = xs[0], {"additional_forward_args": xs[1:] or None}
    a, given = arrays(x), {"additional_forward_args": arrays(xs[1:]) or None}
    for selector in selectors:
        want = ca.NeuronGradient(net, module).attribute(x, selector, **fed)
        same(ox.NeuronGradient(model, name).attribute(a, selector, **given), want)
        want = ca.NeuronIntegratedGradients(net, module).attribute(x, selector, n_steps=5, **fed)
        got = ox.NeuronIntegratedGradients(model, name).attribute(a, selector, n_steps=5, **given)
        same(got, want, 5e-4)


class Smooth(torch.nn.Module):
    """No kinks and operators that onnxruntime has in float64: agreement to 1e-8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = torch.nn.Linear(6, 9), torch.nn.Linear(9, 4)
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)) * torch.sigmoid(y)).softmax(1)


@pytest.fixture(scope="module")
def smooth() -> tuple[Smooth, ox.Model]:
    net = Smooth()
    path = Path(FOLDER.name) / "smooth.onnx"
    export(net, (torch.zeros(2, 6).double(), torch.zeros(2, 9).double()), path)
    return net, ox.Model(path)


def integral(net, xs, starts, target, options, factor) -> tuple[np.ndarray, ...]:
    """Integrated gradients by autograd, one step at a time."""
    positions, weights = quadrature(options["method"], options["n_steps"])
    n = len(xs[0])
    starts = starts or (0, 0)
    starts = [torch.as_tensor(s, dtype=torch.float64).expand_as(x) for s, x in zip(starts, xs)]
    index = torch.as_tensor(target).expand(n)
    totals = [torch.zeros_like(x) for x in xs]
    for position, weight in zip(positions, weights):
        points = [(s + position * (x - s)).requires_grad_() for s, x in zip(starts, xs)]
        net(*points)[torch.arange(n), index].sum().backward()
        for total, point in zip(totals, points):
            total += weight * point.grad
    return tuple((t * (x - s) if factor else t).numpy() for t, x, s in zip(totals, xs, starts))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_options_in_float64(smooth: tuple, data: st.DataObject) -> None:
    net, model = smooth
    n = data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(n, 6, generator=generator).double()
    y = torch.randn(n, 9, generator=generator).double()
    target = data.draw(
        st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=n, max_size=n))
    )
    baseline = data.draw(st.sampled_from([None, "number", "one", "each"]))
    start = {
        None: None,
        "number": (0.25, -0.5),
        "one": (x[:1] * 0.5, y[:1] * 0.5),
        "each": (x * 0.3, y - 1),
    }[baseline]
    options = {
        "target": target,
        "n_steps": data.draw(st.integers(2, 20)),
        "method": data.draw(st.sampled_from(QUADRATURES)),
        "internal_batch_size": data.draw(st.sampled_from([None, n, 3 * n])),
    }
    factor = data.draw(st.booleans())
    ours = start if baseline in (None, "number") else arrays(start)
    want, delta = ca.IntegratedGradients(net, multiply_by_inputs=factor).attribute(
        (x, y), start, return_convergence_delta=True, **options
    )
    got, gap = ox.IntegratedGradients(model, multiply_by_inputs=factor).attribute(
        (x.numpy(), y.numpy()), ours, return_convergence_delta=True, **options
    )
    # Captum rounds its step sizes to float32; the float64 oracle is autograd itself.
    same(got, want, 1e-6)
    np.testing.assert_allclose(gap, delta.numpy(), atol=1e-6)
    same(got, integral(net, (x, y), start, target, options, factor), 1e-10)
    # y alone fed, x alone explained
    want = ca.IntegratedGradients(net).attribute(x, None, additional_forward_args=(y,), **options)
    got = ox.IntegratedGradients(model).attribute(
        x.numpy(), additional_forward_args=(y.numpy(),), **options
    )
    same(got, want, 1e-6)
