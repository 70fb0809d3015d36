"""Explanation methods, and the registry that the command line and the docs read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from onnxplain.methods.base import Attribution
from onnxplain.methods.gradient import (
    InputXGradient,
    LayerActivation,
    LayerGradientXActivation,
    NeuronGradient,
    Saliency,
)
from onnxplain.methods.path import (
    IntegratedGradients,
    InternalInfluence,
    LayerConductance,
    LayerIntegratedGradients,
    NeuronConductance,
    NeuronIntegratedGradients,
)

__all__ = [
    "Attribution",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "MethodInfo",
    "NeuronConductance",
    "NeuronGradient",
    "NeuronIntegratedGradients",
    "Saliency",
]

METHODS: tuple[type[Attribution], ...] = (
    Saliency,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NeuronGradient,
    NeuronIntegratedGradients,
    InternalInfluence,
    LayerConductance,
    NeuronConductance,
)

# Arguments of `attribute` that are not options of a method.
_QUESTION = {
    "self",
    "inputs",
    "target",
    "baselines",
    "additional_forward_args",
    "neuron_selector",
    "return_convergence_delta",
}


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, as `ox.methods()` and `onnxplain methods` tell."""

    name: str
    title: str
    cls: type[Attribution]
    summary: str
    options: dict[str, Any]
    paper: str
    needs: tuple[str, ...]
    check: str
    takes_target: bool
    takes_baselines: bool


def registry() -> dict[str, MethodInfo]:
    """Every method by name."""
    return {cls.name: _info(cls) for cls in METHODS}


def _info(cls: type[Attribution]) -> MethodInfo:
    attribute: Any = cls.attribute  # type: ignore[attr-defined]
    call = inspect.signature(attribute).parameters
    made = inspect.signature(cls.__init__).parameters
    options = {
        name: p.default
        for parameters in (made, call)
        for name, p in parameters.items()
        if name not in _QUESTION and p.default is not p.empty and p.kind is not p.KEYWORD_ONLY
    }
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return MethodInfo(
        cls.name,
        cls.title,
        cls,
        summary,
        options,
        cls.paper,
        cls.needs,
        cls.check,
        "target" in call,
        "baselines" in call,
    )
