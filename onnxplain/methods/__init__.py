"""Explanation methods, and the registry that the command line and the docs read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxplain.errors import InputError
from onnxplain.methods.base import Attribution, Layers
from onnxplain.methods.gradient import (
    InputXGradient,
    LayerActivation,
    LayerGradientXActivation,
    NeuronGradient,
    Saliency,
)
from onnxplain.methods.modified import (
    Deconvolution,
    GuidedBackprop,
    NeuronDeconvolution,
    NeuronGuidedBackprop,
)
from onnxplain.methods.path import (
    IntegratedGradients,
    InternalInfluence,
    LayerConductance,
    LayerIntegratedGradients,
    NeuronConductance,
    NeuronIntegratedGradients,
)
from onnxplain.model import Model

__all__ = [
    "Attribution",
    "Deconvolution",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "MethodInfo",
    "NeuronConductance",
    "NeuronDeconvolution",
    "NeuronGradient",
    "NeuronGuidedBackprop",
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
    GuidedBackprop,
    Deconvolution,
    NeuronGuidedBackprop,
    NeuronDeconvolution,
)

# Parameters that are part of the question, not options of a method.
_NO_OPTIONS = {
    "self",
    "inputs",
    "target",
    "baselines",
    "additional_forward_args",
    "neuron_selector",
    "return_convergence_delta",
    "model",
    "layer",
    "of",
    "wrt",
    "seed",
}


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, as `ox.methods()` and `onnxplain methods` tell.

    Attributes:
        name, title, summary, paper: what it is.
        cls: its class.
        options: its options and their defaults.
        needs: "gradient", "layer", "neuron", "image", "random".
        explains: what the result has the shape of: "inputs" or "layer".
        check: what its check figure means.
        takes_target, takes_baselines, takes_layer: what else it can be asked with.
        made_with: the options that the constructor takes; the others are those of ``attribute``.
    """

    name: str
    title: str
    cls: type[Attribution]
    summary: str
    options: dict[str, Any]
    paper: str
    needs: tuple[str, ...]
    explains: str
    check: str
    takes_target: bool
    takes_baselines: bool
    takes_layer: bool
    made_with: frozenset[str]

    def make(
        self,
        model: Model,
        options: Mapping[str, Any],
        *,
        layer: Layers | None = None,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> Attribution:
        """The method for a question, with those of the options that its constructor takes."""
        asked = {"layer": layer, "of": of, "wrt": wrt}
        made: dict[str, Any] = {k: v for k, v in options.items() if k in self.made_with}
        made |= {k: v for k, v in asked.items() if v is not None}
        if wrt is not None and "wrt" not in inspect.signature(self.cls.__init__).parameters:
            raise InputError(
                f"method '{self.name}' explains by numbers, and an input here holds integers: "
                "use a method that can explain by the embedding, such as integrated-gradients"
            )
        return self.cls(model, **made)


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
        if name not in _NO_OPTIONS and p.default is not p.empty
    }
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return MethodInfo(
        name=cls.name,
        title=cls.title,
        cls=cls,
        summary=summary,
        options=options,
        paper=cls.paper,
        needs=cls.needs,
        explains=cls.explains,
        check=cls.check,
        takes_target="target" in call,
        takes_baselines="baselines" in call,
        takes_layer="layer" in made,
        made_with=frozenset(made) & frozenset(options),
    )
