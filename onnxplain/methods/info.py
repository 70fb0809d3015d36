"""What is known of a method: read from its class, told to people, and used to make one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from onnxplain.methods.base import Attribution, Layers
from onnxplain.methods.noise import NoiseTunnel
from onnxplain.model import Model

# Parameters that are part of the question, not options of a method.
_NO_OPTIONS = {
    "self",
    "inputs",
    "target",
    "baselines",
    "additional_forward_args",
    "neuron_selector",
    "return_convergence_delta",
    "return_standard_error",
    "model",
    "layer",
    "saliency_layer",  # another name of wrt
    "of",
    "wrt",
    "seed",
    "random_state",  # the seed of the lime package's calls
    "attribution_method",  # of a noise tunnel, which is made around it
}


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, as `ox.methods()` and `onnxplain methods` tell.

    Attributes:
        name, title, summary, paper: what it is.
        cls: its class.
        options: its options and their defaults; None for those that are required.
        required: the options that have no default.
        needs: "gradient", "layer", "neuron", "image", "random", "baselines" (a distribution).
        explains: what the result has the shape of: "inputs" or "layer".
        check: what its check figure means.
        takes_target, takes_baselines, takes_layer: what else it can be asked with.
        takes_any_layer: whether it can be asked by other layers than its own (``wrt``).
        made_with: the options that the constructor takes; the others are those of ``attribute``.
        annotations: the type annotation of each option.
        choices: the words that an option takes, where these are few.
        inside: what the method goes around (noise tunnel); the question and its own options are
            those of this one.
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
    takes_any_layer: bool
    made_with: frozenset[str]
    annotations: dict[str, str]
    choices: dict[str, tuple[str, ...]]
    inside: MethodInfo | None = None
    required: frozenset[str] = frozenset()

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
        if self.inside is not None:
            return NoiseTunnel(self.inside.make(model, options, layer=layer, of=of, wrt=wrt))
        asked = {"layer": layer, "of": of, "wrt": wrt}
        made: dict[str, Any] = {k: v for k, v in options.items() if k in self.made_with}
        made |= {k: v for k, v in asked.items() if v is not None}
        return self.cls(model, **made)


def tunnel(inside: MethodInfo) -> MethodInfo:
    """The noise tunnel around a method: asked as that one, with the options of both."""
    own = info_of(NoiseTunnel)
    return replace(
        inside,
        name=own.name,
        title=own.title,
        cls=own.cls,
        summary=own.summary,
        options={"attribution_method": inside.name, **inside.options, **own.options},
        paper=own.paper,
        needs=tuple(dict.fromkeys((*inside.needs, *own.needs))),
        check=own.check,
        made_with=inside.made_with | {"attribution_method"},
        annotations={**inside.annotations, **own.annotations, "attribution_method": "str"},
        choices={**inside.choices, **own.choices},
        inside=inside,
    )


def info_of(cls: type[Attribution]) -> MethodInfo:
    """What a class says of itself."""
    attribute: Any = cls.attribute  # type: ignore[attr-defined]
    call = inspect.signature(attribute).parameters
    made = inspect.signature(cls.__init__).parameters
    chosen = {
        name: p
        for name, p in {**made, **call}.items()
        if name not in _NO_OPTIONS and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    required = frozenset(name for name, p in chosen.items() if p.default is p.empty)
    options = {name: None if name in required else p.default for name, p in chosen.items()}
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    summary = re.sub(r":\w+:`~?\.?([^`]*)`", r"\1", summary)
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
        takes_any_layer="wrt" in made,
        made_with=frozenset(made) & frozenset(options),
        annotations={name: str(p.annotation) for name, p in chosen.items()},
        required=required,
        choices=_literals(chosen) | {name: tuple(words) for name, words in cls.choices.items()},
    )


def _literals(parameters: Mapping[str, inspect.Parameter]) -> dict[str, tuple[str, ...]]:
    """The words of options that are annotated with them."""
    found = {k: re.search(r"Literal\[([^]]*)\]", str(p.annotation)) for k, p in parameters.items()}
    return {k: tuple(re.findall(r"[\"']([^\"']+)[\"']", m[1])) for k, m in found.items() if m}
