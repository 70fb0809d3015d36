"""Whole networks: gradients against PyTorch's autograd in float64, from both exporters."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import onnxplain as ox
from tests.oracle.nets import NETS, build, example, export

FLOAT_NETS = [n for n in NETS if n != "transformer"]
_FILES = tempfile.TemporaryDirectory()


@functools.cache
def exported(name: str, exporter: str, dynamic: bool = True) -> ox.Model:
    path = Path(_FILES.name) / f"{name}-{exporter}-{dynamic}.onnx"
    export(build(name), example(name, 2 if dynamic else 1), path, exporter, dynamic=dynamic)
    return ox.Model(path)


def autograd(net: torch.nn.Module, xs: tuple[torch.Tensor, ...], target: int) -> list[np.ndarray]:
    """Gradients of one score per example, in float64."""
    net = net.double()
    xs = tuple(x.double().requires_grad_() for x in xs)
    net(*xs)[:, target].sum().backward()
    return [x.grad.numpy() for x in xs]


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The relative error of each example, in the Euclidean norm."""
    axes = tuple(range(1, want.ndim))
    size = np.sqrt((want**2).sum(axis=axes))
    return np.sqrt(((got - want) ** 2).sum(axis=axes)) / size


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", FLOAT_NETS)
def test_gradient_is_autograds(name: str, exporter: str) -> None:
    xs = example(name, 5, seed=1)
    want = autograd(build(name), xs, 3)
    model = exported(name, exporter)
    got = ox.Saliency(model).attribute(tuple(x.numpy() for x in xs), target=3, abs=False)
    for g, w in zip(got, want, strict=True):
        error = relative(g, w)
        # Where float32 rounds across the kink of a ReLU or a maximum, a whole path flips. PyTorch's
        # own float32 gradients miss its float64 ones in the same way: by up to 4e-3 on VGG-11 and
        # 9e-3 on DenseNet-121 for these inputs. The next test removes the kinks and is tight.
        assert np.median(error) < (1e-2 if name in ("vgg11", "densenet121") else 1e-4), error
        assert error.max() < 5e-2, error


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "mobilenetv3_large_100"])
def test_gradient_without_kinks(name: str) -> None:
    net = without_kinks(build(name))
    xs = example(name, 2, seed=1)
    path = Path(_FILES.name) / f"{name}-smooth.onnx"
    export(net, xs, path)
    got = ox.Saliency(ox.Model(path)).attribute(xs[0].numpy(), target=3, abs=False)
    x = xs[0].requires_grad_()
    net(x)[:, 3].sum().backward()
    single = x.grad.numpy()
    (want,) = autograd(net, (xs[0].detach(),), 3)
    # As close to float64 as PyTorch's own float32 (MobileNet's random weights amplify rounding).
    own = np.maximum(relative(single, want), 1e-6)
    assert (relative(got, want) < 4 * own).all(), (relative(got, want), own)


def without_kinks(net: torch.nn.Module) -> torch.nn.Module:
    """The network with smooth activations and average pooling."""
    nn = torch.nn
    smooth = {"relu": nn.Softplus, "hardswish": nn.SiLU, "hardsigmoid": nn.Sigmoid}
    for name, child in net.named_children():
        kind = type(child).__name__.lower()  # timm has classes of its own for some
        if kind in smooth:
            setattr(net, name, smooth[kind]())
        elif isinstance(child, nn.MaxPool2d):
            setattr(net, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        else:
            without_kinks(child)
    return net


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_large_100", "transformer", "small_cnn"],
)
def test_a_fixed_batch_is_made_dynamic(name: str, exporter: str) -> None:
    model = exported(name, exporter, dynamic=False)
    assert model.batch_report is not None
    assert model.batch_report.mode == "rewritten", model.batch_report
    xs = example(name, 5, seed=2)
    want = build(name)(*xs).detach().numpy()
    got = model(tuple(x.numpy() for x in xs))["logits"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_transformer_encoder_by_its_embedding(exporter: str) -> None:
    net = build("transformer").double()
    (ids,) = example("transformer", 4, seed=1)
    caught: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        caught.append(output.requires_grad_())
        output.retain_grad()
        return output

    handle = net.embedding.register_forward_hook(keep)
    net(ids)[:, 1].sum().backward()
    handle.remove()
    model = exported("transformer", exporter)
    layer = model.embedding("ids")
    assert layer is not None
    method = ox.LayerGradientXActivation(model, layer.name, multiply_by_inputs=False)
    got = method.attribute(ids.numpy(), target=1)
    assert relative(got, caught[0].grad.numpy()).max() < 1e-4


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("resnet18", "layer1.1.act2"),
        ("resnet18", "layer3"),
        ("small_cnn", "pool1"),
        ("vit_tiny_patch16_224", "blocks.3.mlp.fc1"),
        ("vit_tiny_patch16_224", "blocks.5"),
        ("densenet121", "features.transition2.pool"),
        ("mlp", "layers.2"),
        ("transformer", "encoder.layers.0.linear1"),
    ],
)
def test_scopes_are_modules(name: str, scope: str, exporter: str) -> None:
    """A scope names the value that leaves the module, as a forward hook sees it."""
    net, xs = build(name), example(name, 2, seed=3)
    seen: list[torch.Tensor] = []
    handle = net.get_submodule(scope).register_forward_hook(lambda m, i, o: seen.append(o))
    net(*xs)
    handle.remove()
    model = exported(name, exporter)
    got = ox.LayerActivation(model, scope).attribute(tuple(x.numpy() for x in xs))
    want = seen[-1].detach().numpy()
    assert got.shape == want.shape
    assert relative(got, want).max() < 1e-4
