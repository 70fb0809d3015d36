"""Every gradient method that Captum has: one row each, the same call in both libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TARGET = 3
# A layer in the middle, one that is a map of channels, a neuron of the first.
LAYERS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer": "layer3", "map": "layer3", "neuron": (5, 3, 3)},
    "vit_tiny_patch16_224": {"layer": "blocks.6", "map": "patch_embed.proj", "neuron": (5, 7)},
}
VIT = "vit_tiny_patch16_224"


@dataclass(frozen=True)
class Row:
    """A method's call.

    Attributes:
        cls: the class, in either library.
        layer: which of a network's layers it is made with.
        options: arguments of the class and of `attribute`; functions are called with the images.
        noise: inside a noise tunnel.
        images: how many are explained.
        grows: the option that Captum's memory grows with.
        batch: Captum's option that bounds a batch, searched for its fastest value.
        check: other options for comparing results: those that leave nothing to chance.
        apart: why the results are not compared.
        skip: networks on which Captum can't, and why.
    """

    cls: str
    layer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    noise: bool = False
    images: int = 4
    grows: str | None = None
    batch: str | None = None
    check: Mapping[str, Any] = field(default_factory=dict)
    apart: str | None = None
    skip: Mapping[str, str] = field(default_factory=dict)

    @property
    def random(self) -> bool:
        return self.noise or "GradientShap" in self.cls


def _twice(x: np.ndarray) -> np.ndarray:
    return np.stack([0 * x[0], 0.5 * x[-1]])


def _of_x(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:1], x[:1]])


_PATH: dict[str, Any] = {"images": 2, "grows": "n_steps", "batch": "internal_batch_size"}
_SHAP: dict[str, Any] = {"images": 2, "grows": "n_samples"}
# Between a point and itself no sample differs; of one image, since baselines are not by example.
_NO_CHANCE = {"baselines": _of_x, "stdevs": 0.0, "multiply_by_inputs": False}
_NO_RULES = {VIT: "Captum's DeepLIFT has no rule for GELU, attention and layer normalization"}
_POOLING = "Captum's DeepLIFT does not add up where max pooling follows a ReLU"
_FUNCTIONS = "Captum's LRP multiplies relevance at sums and at what is no module"
_NO_LRP = {VIT: "Captum's LRP has no rule for layer normalization, GELU and attention"}
_NEURON = {"neuron_selector": None, "target": None}
_DISTRIBUTION = {"baselines": _twice}

ROWS: dict[str, Row] = {
    "saliency": Row("Saliency"),
    "input-x-gradient": Row("InputXGradient"),
    "integrated-gradients": Row("IntegratedGradients", **_PATH),
    "gradient-shap": Row(
        "GradientShap", options={**_DISTRIBUTION, "n_samples": 10}, check=_NO_CHANCE, **_SHAP
    ),
    "deep-lift": Row("DeepLift", apart=_POOLING, skip=_NO_RULES),
    "deep-lift-shap": Row(
        "DeepLiftShap", options=_DISTRIBUTION, images=2, apart=_POOLING, skip=_NO_RULES
    ),
    "guided-backprop": Row("GuidedBackprop"),
    "deconvolution": Row("Deconvolution"),
    "guided-grad-cam": Row("GuidedGradCam", "map"),
    "lrp": Row("LRP", apart=_FUNCTIONS, skip=_NO_LRP),
    "layer-activation": Row("LayerActivation", "layer", {"target": None}),
    "layer-gradient-x-activation": Row("LayerGradientXActivation", "layer"),
    "layer-integrated-gradients": Row("LayerIntegratedGradients", "layer", **_PATH),
    "layer-conductance": Row("LayerConductance", "layer", **_PATH),
    "internal-influence": Row("InternalInfluence", "layer", **_PATH),
    "layer-grad-cam": Row("LayerGradCam", "map"),
    "layer-gradient-shap": Row(
        "LayerGradientShap", "layer", {**_DISTRIBUTION, "n_samples": 10}, check=_NO_CHANCE, **_SHAP
    ),
    "layer-deep-lift": Row("LayerDeepLift", "layer", skip=_NO_RULES),
    "layer-deep-lift-shap": Row(
        "LayerDeepLiftShap", "layer", _DISTRIBUTION, images=2, skip=_NO_RULES
    ),
    "layer-lrp": Row("LayerLRP", "layer", apart=_FUNCTIONS, skip=_NO_LRP),
    "neuron-gradient": Row("NeuronGradient", "layer", _NEURON),
    "neuron-integrated-gradients": Row("NeuronIntegratedGradients", "layer", _NEURON, **_PATH),
    "neuron-conductance": Row("NeuronConductance", "layer", {"neuron_selector": None}, **_PATH),
    "neuron-guided-backprop": Row("NeuronGuidedBackprop", "layer", _NEURON),
    "neuron-deconvolution": Row("NeuronDeconvolution", "layer", _NEURON),
    "neuron-gradient-shap": Row(
        "NeuronGradientShap", "layer", {**_DISTRIBUTION, **_NEURON, "n_samples": 10},
        check=_NO_CHANCE, **_SHAP,
    ),
    "neuron-deep-lift": Row("NeuronDeepLift", "layer", _NEURON, apart=_POOLING, skip=_NO_RULES),
    "neuron-deep-lift-shap": Row(
        "NeuronDeepLiftShap", "layer", {**_DISTRIBUTION, **_NEURON}, images=2, apart=_POOLING,
        skip=_NO_RULES,
    ),
    "noise-tunnel": Row(
        "Saliency", options={"nt_samples": 10, "stdevs": 0.1}, noise=True, images=2,
        grows="nt_samples", batch="nt_samples_batch_size", check={"stdevs": 0.0},
    ),
}  # fmt: skip


def arguments(row: Row, network: str, x: np.ndarray, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's class and its `attribute` are called with."""
    found = {"target": TARGET, **row.options, **changed}
    if found.get("neuron_selector", ()) is None:
        found["neuron_selector"] = LAYERS[network]["neuron"]
    if found["target"] is None:
        del found["target"]
    return {k: v(x) if callable(v) else v for k, v in found.items()}


def _split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the class, and of `attribute`."""
    made = {k: given.pop(k) for k in ("multiply_by_inputs",) if k in given}
    return made, given


def onnxplain_call(
    row: Row, network: str, model: Any, x: np.ndarray, **changed: Any
) -> Callable[[], Any]:
    """A call that computes a row by onnxplain."""
    import onnxplain as ox

    made, given = _split(arguments(row, network, x, changed))
    layer = () if row.layer is None else (LAYERS[network][row.layer],)
    method = getattr(ox, row.cls)(model, *layer, **made)
    if row.noise:
        method = ox.NoiseTunnel(method)
    if row.random:
        given["seed"] = 0
    return lambda: method.attribute(x, **given)


def captum_call(
    row: Row, network: str, module: Any, x: np.ndarray, **changed: Any
) -> Callable[[], Any]:
    """The same by Captum."""
    import captum.attr as ca
    import torch

    def tensors(value: Any) -> Any:
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    _prepare(row, module)
    made, given = _split(arguments(row, network, x, changed))
    layer = () if row.layer is None else (module.get_submodule(LAYERS[network][row.layer]),)
    method = getattr(ca, row.cls)(module, *layer, **made)
    if row.noise:
        method = ca.NoiseTunnel(method)
    given = {k: tensors(v) for k, v in given.items()}
    inputs = torch.from_numpy(x)

    def call() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = method.attribute(inputs, **given)
        return (found[0] if isinstance(found, tuple) else found).detach().numpy()

    return call


def _prepare(row: Row, module: Any) -> None:
    """What Captum needs of a module: gradients for hooks by a layer, a rule for each LRP module."""
    from captum.attr._utils.lrp_rules import IdentityRule
    from torch import nn

    if "DeepLift" in row.cls:
        module.requires_grad_()
    if "LRP" in row.cls:
        for part in module.modules():
            if isinstance(part, nn.Identity | nn.Flatten):
                part.rule = IdentityRule()
