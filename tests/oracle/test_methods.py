"""Every deterministic method that Captum has, on whole networks, with random options.

A row is a method's name: what it takes is read from Captum's signature. DeepLIFT, LRP, the CAM
family and the methods that draw samples have tests of their own beside this one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import captum.attr as ca
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import onnxplain as ox
from onnxplain.methods.path import QUADRATURES
from tests.oracle.both import Both, flat, parameters, same
from tests.oracle.nets import build, example
from tests.oracle.test_sharing import Plain


@dataclass(frozen=True)
class Net:
    """A network of the table.

    `layers`: their inputs go nowhere else, because Captum moves what enters the layer and we move
    the value. `modules`: its activations are modules, as Captum's modified backpropagations need.
    `ids`: its inputs are integers, which Captum explains by a layer only. `map`: a layer where the
    mean gradient of a channel does not vanish (it does in front of a layer normalization).
    """

    layers: tuple[str, ...]
    images: bool = False
    modules: bool = False
    ids: bool = False
    double: bool = False
    examples: int = 3
    runs: int = 8
    map: str | None = None


NETS = {
    "mlp": Net(("layers.2", "layers.1"), modules=True, double=True),
    "multi_input": Net(("head",)),
    "small_cnn": Net(("pool1", "pool2"), images=True),
    "plain_cnn": Net(("conv3", "relu4"), images=True, modules=True),
    "resnet18": Net(("layer2", "layer3.0.act1"), images=True, modules=True, examples=2, runs=2),
    "vit_tiny_patch16_224": Net(
        ("blocks.3", "patch_embed.proj"), images=True, examples=2, runs=2, map="patch_embed.proj"
    ),
    "transformer": Net(("embedding", "encoder.layers.0"), ids=True),
}
GRADIENT = (
    *("Saliency", "InputXGradient", "IntegratedGradients"),
    *("LayerActivation", "LayerGradientXActivation", "LayerIntegratedGradients"),
    *("LayerConductance", "InternalInfluence", "LayerGradCam"),
    *("NeuronGradient", "NeuronIntegratedGradients", "NeuronConductance"),
)
MODIFIED = (
    *("GuidedBackprop", "Deconvolution", "GuidedGradCam"),
    *("NeuronGuidedBackprop", "NeuronDeconvolution"),
)
DEEPLIFT = (
    *("DeepLift", "LayerDeepLift", "NeuronDeepLift"),
    *("DeepLiftShap", "LayerDeepLiftShap", "NeuronDeepLiftShap"),
)
# Compared in tests of their own: they draw samples, or Captum's has another meaning on these nets.
ELSEWHERE = {
    "GradientShap": "test_noise.py",
    "LayerGradientShap": "test_noise.py",
    "NeuronGradientShap": "test_noise.py",
    "LRP": "test_lrp.py",
    "LayerLRP": "test_lrp.py",
}
PERTURBATION = (  # compared in test_perturbation.py
    *("FeatureAblation", "FeaturePermutation", "Occlusion", "ShapleyValueSampling"),
    *("ShapleyValues", "Lime", "KernelShap", "LimeBase", "LayerFeatureAblation"),
    *("NeuronFeatureAblation", "LayerFeaturePermutation"),
)


def rows() -> Iterator[tuple[str, str]]:
    for method in (*GRADIENT, *MODIFIED, *DEEPLIFT):
        for name, net in NETS.items():
            by_layer = method in {"LayerActivation", "LayerGradientXActivation"}
            if net.ids and not (by_layer or method == "LayerIntegratedGradients"):
                continue
            if (method in MODIFIED or method in DEEPLIFT) and not net.modules:
                continue
            if method == "GuidedGradCam" and not net.images:
                continue
            # Captum's DeepLIFT does not add up where max pooling follows a ReLU.
            if method in DEEPLIFT and name == "resnet18":
                continue
            yield method, name


@functools.cache
def network(name: str) -> Both:
    net = NETS[name]
    if name == "plain_cnn":
        torch.manual_seed(3)
        return Both(Plain().eval(), (torch.randn(net.examples, 2, 8, 8),))
    # Captum's DeepLIFT by a layer needs parameters with gradients.
    module, xs = build(name).requires_grad_(), example(name, net.examples, seed=4)
    if net.double:
        module, xs = module.double(), tuple(x.double() if x.is_floating_point() else x for x in xs)
    return Both(module, xs)


@functools.cache
def layer_shape(name: str, layer: str, entering: bool) -> tuple[int, ...]:
    found = network(name).ours(
        "LayerActivation", layer, inputs=network(name).xs, attribute_to_layer_input=entering
    )
    return next(flat(found)).shape[1:]


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Captum rounds the weights of its steps to float32; here it doesn't."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def draw_inputs(data: st.DataObject, name: str) -> tuple[torch.Tensor, ...]:
    n = data.draw(st.integers(1, NETS[name].examples), label="examples")
    return tuple(x[:n] for x in network(name).xs)


def draw_baselines(data: st.DataObject, method: str, xs: tuple[torch.Tensor, ...]) -> Any:
    # A constant baseline ties the windows of a max pooling, where any choice is right.
    if xs[0].is_floating_point():
        each = tuple(0.3 * x.flip(0).flip(-1) + 0.05 * x for x in xs)
    else:
        each = tuple(x.flip(0).clamp(min=1) for x in xs)  # 0 is padding
    if "Shap" in method:
        found = tuple(torch.cat([e, 0.1 * e]) for e in each)
    else:
        found = each if data.draw(st.booleans(), label="each its baseline") else first(each)
    return found if len(xs) > 1 else found[0]


def first(xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x[:1] for x in xs)


def draw(data: st.DataObject, method: str, name: str) -> tuple[list[str], dict[str, Any]]:
    """The layer, if it takes one, and its arguments."""
    net, cls = NETS[name], getattr(ca, method)
    xs = draw_inputs(data, name)
    takes = parameters(cls.__init__) | parameters(cls.attribute)
    layers = [net.map] if net.map and method == "LayerGradCam" else net.layers
    made = [data.draw(st.sampled_from(layers), label="layer")] if "layer" in takes else []
    options: dict[str, Any] = {"inputs": xs if len(xs) > 1 else xs[0]}
    switches = {
        *("abs", "attribute_to_layer_input", "attribute_to_neuron_input", "relu_attributions"),
        *("attr_dim_summation", "multiply_by_inputs", "return_convergence_delta"),
    }
    for switch in sorted(switches & takes.keys()):
        options[switch] = data.draw(st.booleans(), label=switch)
    if net.ids:  # what enters an embedding has no gradient
        options["attribute_to_layer_input"] = False
    if "DeepLift" in method and options.get("attribute_to_layer_input"):
        made = [net.layers[0]]  # by what enters an activation, Captum's does not add up
    if "target" in takes:
        one = st.integers(0, 9)
        each = st.lists(one, min_size=len(xs[0]), max_size=len(xs[0]))
        options["target"] = data.draw(st.one_of(one, each), label="target")
    if "neuron_selector" in takes:
        entering = options["attribute_to_neuron_input"]
        shape = layer_shape(name, made[0], entering)
        part = data.draw(st.booleans(), label="several neurons")
        options["neuron_selector"] = tuple(
            slice(s // 3, s // 3 + 2) if part else data.draw(st.integers(0, s - 1)) for s in shape
        )
    if "baselines" in takes:
        options["baselines"] = draw_baselines(data, method, xs)
    if "n_steps" in takes:
        options["n_steps"] = data.draw(st.integers(2, 5), label="n_steps")
        options["method"] = data.draw(st.sampled_from(QUADRATURES), label="method")
        sizes = [None, len(xs[0]), 3 * len(xs[0])]
        options["internal_batch_size"] = data.draw(st.sampled_from(sizes), label="batch")
    if "interpolate_mode" in takes:
        modes = ["nearest", "bilinear", "bicubic", "area"]
        options["interpolate_mode"] = data.draw(st.sampled_from(modes), label="mode")
    return made, options


def compare(method: str, name: str, made: list[str], options: dict[str, Any], **noise: Any) -> None:
    net, both = NETS[name], network(name)
    got = both.ours(method, *made, **options, **noise)
    with in_double() if net.double else contextlib.nullcontext():
        asked = [options]
        if method == "NeuronConductance":
            asked = [{**options, "neuron_selector": one} for one in single(options, name, made[0])]
        found = [both.captums(method, *made, **each, **noise) for each in asked]
    want = found[0] if len(found) == 1 else total(found)
    tolerance = 1e-8 if net.double else 5e-4 if "n_steps" in options else 1e-4
    with_delta = options.get("return_convergence_delta", False)
    same(*((got[0], want[0]) if with_delta else (got, want)), tolerance, kinks=not net.double)
    if with_delta:
        size = max(1.0, float(np.abs(want[1]).max()))
        np.testing.assert_allclose(got[1], want[1], atol=1e-8 if net.double else 2e-3 * size)


def single(options: dict[str, Any], name: str, layer: str) -> Iterator[tuple[int, ...]]:
    """Each neuron of a selector: Captum's conductance of several is a product of their sums."""
    shape = layer_shape(name, layer, options["attribute_to_neuron_input"])
    parts = zip(options["neuron_selector"], shape, strict=True)
    return itertools.product(
        *(range(*p.indices(size)) if isinstance(p, slice) else (p,) for p, size in parts)
    )


def total(found: list[Any]) -> Any:
    """The sum of results, input by input."""
    if isinstance(found[0], tuple):
        return tuple(map(sum, zip(*found, strict=True)))
    return sum(found)


def drawn(runs: int) -> settings:
    """The same draws every time (among float32 draws without end some end on a kink), unshrunk."""
    return settings(
        max_examples=runs, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


TABLE = list(rows())


@pytest.mark.parametrize(("method", "name"), TABLE, ids=["-".join(row) for row in TABLE])
def test_random_options(method: str, name: str) -> None:
    @drawn(NETS[name].runs)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        compare(method, name, *draw(data, method, name))

    check()


NOISY = [
    (method, name)
    for method, name in TABLE
    if name in {"mlp", "plain_cnn"}
    and not method.startswith(("Layer", "Neuron", "Internal"))
    and "Shap" not in method
]


@pytest.mark.parametrize(("method", "name"), NOISY, ids=["-".join(row) for row in NOISY])
@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel_without_noise(method: str, name: str, nt_type: str) -> None:
    """With a deviation of zero, noise tunnels draw nothing: the same moments as Captum's."""

    @drawn(2)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        made, options = draw(data, method, name)
        options.pop("return_convergence_delta", None)
        samples = data.draw(st.integers(2, 4), label="nt_samples")
        at_once = data.draw(st.sampled_from([None, 1, samples]), label="nt_samples_batch_size")
        options |= {"nt_type": nt_type, "nt_samples": samples, "stdevs": 0.0}
        if nt_type == "vargrad":  # Captum's is zero up to rounding
            got = network(name).ours(method, *made, noise=True, **options)
            assert max(np.abs(a).max() for a in flat(got)) < 1e-6
        else:
            compare(method, name, made, options | {"nt_samples_batch_size": at_once}, noise=True)

    check()


# ------------------------------------------------------------------------- what can be asked

# Our default is as much as fits the memory; Captum's own is a batch of one, or everything. What
# Captum requires of LimeBase has defaults here, and ours is drawn inside of feature permutation.
DEFAULTS = {
    *("internal_batch_size", "nt_samples_batch_size", "perturbations_per_eval", "perm_func"),
    *("interpretable_model", "similarity_func", "perturb_func", "perturb_interpretable_space"),
    *("from_interp_rep_transform", "to_interp_rep_transform"),
}
# Of the differentiator that Captum runs on, and what an `ox.Model` knows itself.
TORCH_ONLY = {
    *("grad_kwargs", "device_ids", "show_progress", "forward_func", "model", "verbose"),
    *("attribution_method", "gradient_func", "memory_efficient"),
}


@pytest.mark.parametrize(
    "method", [*GRADIENT, *MODIFIED, *DEEPLIFT, *ELSEWHERE, *PERTURBATION, "NoiseTunnel"]
)
@pytest.mark.parametrize("function", ["__init__", "attribute"])
def test_parameters_have_captums_names_order_and_defaults(method: str, function: str) -> None:
    theirs = parameters(getattr(getattr(ca, method), function))
    ours = parameters(getattr(getattr(ox, method), function))
    positional = [
        k for k, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY and k in theirs
    ]
    wanted = [k for k in theirs if k not in TORCH_ONLY or k in positional]
    assert positional == wanted
    for name in set(wanted) - DEFAULTS - TORCH_ONLY:
        assert ours[name].default == theirs[name].default, name


def test_every_method_of_captum_is_compared_somewhere() -> None:
    classes = {
        name for name, cls in vars(ca).items()
        if inspect.isclass(cls) and issubclass(cls, ca.Attribution) and hasattr(cls, "attribute")
    }  # fmt: skip
    bases = {"Attribution", "GradientAttribution", "PerturbationAttribution", "InternalAttribution"}
    bases |= {"LayerAttribution", "NeuronAttribution", "NoiseTunnel", "LLMAttribution"}
    bases |= {"LLMGradientAttribution", "RemoteLLMAttribution", "DataLoaderAttribution"}
    compared = {*GRADIENT, *MODIFIED, *DEEPLIFT, *ELSEWHERE, *PERTURBATION}
    others = {c for c in classes - compared - bases if not c.startswith("_")}
    assert not others, others
