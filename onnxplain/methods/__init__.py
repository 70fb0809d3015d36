"""Explanation methods, and the registry that the command line and the docs read."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

from onnxplain.errors import InputError
from onnxplain.methods.base import Attribution
from onnxplain.methods.cam import (
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMPlusPlus,
    GuidedGradCam,
    HiResCAM,
    LayerCAM,
    LayerGradCam,
    XGradCAM,
)
from onnxplain.methods.deeplift import (
    DeepLift,
    DeepLiftShap,
    LayerDeepLift,
    LayerDeepLiftShap,
    NeuronDeepLift,
    NeuronDeepLiftShap,
)
from onnxplain.methods.excitation import (
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
)
from onnxplain.methods.fullgrad import (
    FullGrad,
)
from onnxplain.methods.gradient import (
    InputXGradient,
    LayerActivation,
    LayerGradientXActivation,
    NeuronGradient,
    Saliency,
)
from onnxplain.methods.info import MethodInfo, info_of, tunnel
from onnxplain.methods.interpolate import (
    LayerAttribution,
)
from onnxplain.methods.lime_image import (
    LimeImage,
)
from onnxplain.methods.lime_tabular import (
    LimeTabular,
)
from onnxplain.methods.lime_text import (
    LimeText,
)
from onnxplain.methods.lrp import (
    LRP,
    LayerLRP,
)
from onnxplain.methods.maps import (
    DeconvolutionMap,
    GradCAMMap,
    GradientMap,
    GradientTimesImage,
    GuidedBackpropMap,
    LayerActivationGuidedBackprop,
    LinearApproximation,
    VanillaBackprop,
)
from onnxplain.methods.modified import (
    Deconvolution,
    GuidedBackprop,
    NeuronDeconvolution,
    NeuronGuidedBackprop,
)
from onnxplain.methods.noise import NoiseTunnel
from onnxplain.methods.path import (
    IntegratedGradients,
    InternalInfluence,
    LayerConductance,
    LayerIntegratedGradients,
    NeuronConductance,
    NeuronIntegratedGradients,
)
from onnxplain.methods.perturbation import (
    FeatureAblation,
    FeaturePermutation,
    LayerFeatureAblation,
    LayerFeaturePermutation,
    NeuronFeatureAblation,
    Occlusion,
)
from onnxplain.methods.rise import (
    RISE,
)
from onnxplain.methods.score_cam import (
    AblationCAM,
    ScoreCAM,
)
from onnxplain.methods.shap import GradientShap, LayerGradientShap, NeuronGradientShap
from onnxplain.methods.shapley import (
    ShapleyValues,
    ShapleyValueSampling,
)
from onnxplain.methods.surrogate import (
    KernelShap,
    Lime,
    LimeBase,
    get_exp_kernel_similarity_function,
)
from onnxplain.perturb.maskers import Background
from onnxplain.perturb.segments import segmentation

__all__ = [
    "LRP",
    "RISE",
    "AblationCAM",
    "Attribution",
    "Background",
    "ContrastiveExcitationBackprop",
    "Deconvolution",
    "DeconvolutionMap",
    "DeepLift",
    "DeepLiftShap",
    "EigenCAM",
    "EigenGradCAM",
    "ExcitationBackprop",
    "FeatureAblation",
    "FeaturePermutation",
    "FullGrad",
    "GradCAM",
    "GradCAMMap",
    "GradCAMPlusPlus",
    "GradientMap",
    "GradientShap",
    "GradientTimesImage",
    "GuidedBackprop",
    "GuidedBackpropMap",
    "GuidedGradCam",
    "HiResCAM",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "LayerActivation",
    "LayerActivationGuidedBackprop",
    "LayerAttribution",
    "LayerCAM",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
    "Lime",
    "LimeBase",
    "LimeImage",
    "LimeTabular",
    "LimeText",
    "LinearApproximation",
    "MethodInfo",
    "NeuronConductance",
    "NeuronDeconvolution",
    "NeuronDeepLift",
    "NeuronDeepLiftShap",
    "NeuronFeatureAblation",
    "NeuronGradient",
    "NeuronGradientShap",
    "NeuronGuidedBackprop",
    "NeuronIntegratedGradients",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
    "ScoreCAM",
    "ShapleyValueSampling",
    "ShapleyValues",
    "VanillaBackprop",
    "XGradCAM",
    "get_exp_kernel_similarity_function",
    "segmentation",
]

METHODS: tuple[type[Attribution], ...] = (
    # by inputs
    Saliency,
    InputXGradient,
    IntegratedGradients,
    GradientShap,
    DeepLift,
    DeepLiftShap,
    LRP,
    GuidedBackprop,
    Deconvolution,
    GuidedGradCam,
    NoiseTunnel,
    # by a layer
    LayerActivation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LayerConductance,
    InternalInfluence,
    LayerGradientShap,
    LayerDeepLift,
    LayerDeepLiftShap,
    LayerLRP,
    LayerGradCam,
    # of a neuron
    NeuronGradient,
    NeuronIntegratedGradients,
    NeuronConductance,
    NeuronGradientShap,
    NeuronDeepLift,
    NeuronDeepLiftShap,
    NeuronGuidedBackprop,
    NeuronDeconvolution,
    # maps over an image
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    XGradCAM,
    LayerCAM,
    EigenCAM,
    EigenGradCAM,
    FullGrad,
    ExcitationBackprop,
    ContrastiveExcitationBackprop,
    LinearApproximation,
    GradientMap,
    GradCAMMap,
    GuidedBackpropMap,
    DeconvolutionMap,
    VanillaBackprop,
    GradientTimesImage,
    LayerActivationGuidedBackprop,
    # by replacing parts of the input
    FeatureAblation,
    FeaturePermutation,
    Occlusion,
    LayerFeatureAblation,
    LayerFeaturePermutation,
    NeuronFeatureAblation,
    ShapleyValues,
    ShapleyValueSampling,
    LimeBase,
    Lime,
    KernelShap,
    RISE,
    ScoreCAM,
    AblationCAM,
    LimeImage,
    LimeTabular,
    LimeText,
)


@functools.cache
def _known() -> dict[str, MethodInfo]:
    known = {cls.name: info_of(cls) for cls in METHODS}
    known[NoiseTunnel.name] = tunnel(known[Saliency.name])
    return known


def registry() -> dict[str, MethodInfo]:
    """Every method by name."""
    return dict(_known())


def find(name: str) -> MethodInfo:
    """A method by its name, or by that of its class; case, dashes and underscores don't matter.

    Raises:
        InputError: there is none; names the nearest.
    """
    known = registry()
    if name in known:
        return known[name]
    names = {_plain(info.cls.__name__): info.name for info in known.values()}
    names |= {_plain(k): k for k in known}
    if _plain(name) in names:
        return known[names[_plain(name)]]
    near = difflib.get_close_matches(_plain(name), names, 3, 0.5)
    hint = f"did you mean {', '.join(dict.fromkeys(names[k] for k in near))}? " if near else ""
    raise InputError(f"there is no method {name!r}; {hint}ox.methods() lists all {len(known)}")


def chosen(name: str, options: Mapping[str, Any]) -> MethodInfo:
    """The method for such options: a noise tunnel goes around their ``attribution_method``.

    Raises:
        InputError: there is no such method, or it is the tunnel itself.
    """
    info = find(name)
    if info.inside is None or "attribution_method" not in options:
        return info
    inside = find(options["attribution_method"])
    if inside.inside is not None:
        raise InputError(f"attribution_method: '{info.name}' can't go around itself")
    return tunnel(inside)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", str(name).lower())
