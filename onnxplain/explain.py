"""One call from a model and an input to an :class:`Explanation` with its checks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxplain._version import VERSION
from onnxplain.errors import InputError
from onnxplain.graph.emit import is_float
from onnxplain.methods import MethodInfo, registry
from onnxplain.methods.base import Attribution
from onnxplain.methods.target import target_indices
from onnxplain.model import Model
from onnxplain.result import Display, Explanation
from onnxplain.run.feeds import Arrays, Feeds
from onnxplain.run.session import runtime

# A completeness gap above this share of the explained difference makes the numbers doubtful.
POOR_DELTA = 0.05


def explain(
    model: Model,
    inputs: Arrays,
    method: str = "integrated-gradients",
    target: Any = "predicted",
    *,
    layer: str | None = None,
    neuron: Any = None,
    baselines: Any = None,
    additional_forward_args: Arrays = None,
    seed: int | None = None,
    labels: list[str] | None = None,
    display: Display | None = None,
    method_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """Explain predictions.

    Args:
        model: the model.
        inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name). Integer inputs
            (token ids) are explained through their embedding layer, summed over its last axis.
        method: a name from ``ox.methods()``.
        target: int, tuple, one per example, a label, "predicted" (the class with the highest
            score), or None for one value per example.
        layer: explain by this layer instead of the inputs; with ``neuron``, of this layer.
        neuron: explain this neuron of ``layer`` instead of the output.
        baselines: for methods that have one.
        additional_forward_args: the remaining inputs, fed and not attributed.
        seed: for random methods.
        labels: class names.
        display: how to show the input to a person.
        method_options: options of the method, as a dict: for those called like an argument here
            (integrated gradients have one called ``method``).
        options: options of the method.

    Raises:
        InputError and the errors of the method.
    """
    methods = registry()
    if method not in methods:
        raise InputError(f"there is no method '{method}'; the methods are {', '.join(methods)}")
    info = methods[method]
    options = {**(method_options or {}), **options}
    _check_options(info, options, baselines, seed)
    feeds = model.feeds(inputs, additional_forward_args)
    labels = labels if labels is not None else model.labels
    prediction = model.run(model.forward([model.output.name or ""]), feeds)[model.output.name or ""]

    embedded: dict[str, str] = {}
    if layer is None and "gradient" in info.needs:
        embedded = _embeddings(model, feeds)
    made, attributing, arguments = _assemble(info, model, layer, neuron, embedded, options)
    if neuron is None:
        index = _target(target, prediction, labels, feeds.count)
        if info.name != "layer-activation":
            arguments["target"] = _as_target(index)
    else:
        index = None
        arguments["neuron_selector" if "neuron" in info.needs else "target"] = neuron
    if info.takes_baselines:
        arguments["baselines"] = baselines
    if attributing == "inputs":
        arguments["inputs"] = inputs
        arguments["additional_forward_args"] = additional_forward_args
    else:
        # Everything is fed; the layers, not the inputs, get the attributions.
        arguments["inputs"] = {k: feeds.arrays[k] for k in feeds.explained}
        arguments["additional_forward_args"] = {
            k: v for k, v in feeds.arrays.items() if k not in feeds.explained
        } or None
    result, checks = made.explain(**arguments)
    _warn_when_poor(checks)
    arrays = _named(result, feeds, layer, embedded, attributing)
    return Explanation(
        method=method,
        inputs={k: feeds.arrays[k] for k in feeds.explained},
        arrays=arrays,
        form=_form(feeds, attributing, arrays),
        prediction=prediction,
        target=index,
        labels=labels,
        layer=layer,
        options={**options, **({"neuron": neuron} if neuron is not None else {})},
        checks=checks,
        provenance=_provenance(model),
        display=display,
    )


def _check_options(
    info: MethodInfo, options: Mapping[str, Any], baselines: Any, seed: int | None
) -> None:
    for name in options:
        if name not in info.options:
            known = ", ".join(info.options) or "none"
            raise InputError(f"method '{info.name}' has no option '{name}' (its options: {known})")
    if baselines is not None and not info.takes_baselines:
        raise InputError(f"method '{info.name}' has no baseline")
    if seed is not None and "random" in info.needs:
        raise InputError(f"method '{info.name}' takes no seed")


def _embeddings(model: Model, feeds: Feeds) -> dict[str, str]:
    """The embedding layer of each explained input that is no floating-point array."""
    found = {}
    for value in model.graph.graph.inputs:
        name = value.name or ""
        if name in feeds.explained and not is_float(value):
            layer = model.embedding(name)
            if layer is None:
                raise InputError(
                    f"input '{name}' holds integers and feeds no embedding, so no gradient reaches "
                    "it; name a layer (layer=), or pass it in additional_forward_args"
                )
            found[name] = layer.name or ""
    return found


def _assemble(
    info: MethodInfo,
    model: Model,
    layer: str | None,
    neuron: Any,
    embedded: Mapping[str, str],
    options: Mapping[str, Any],
) -> tuple[Attribution, str, dict[str, Any]]:
    """The method for a question, what it attributes to ("inputs" or "layers"), and its options."""
    cls: Any = info.cls
    call = dict(options)
    needs_layer = "layer" in info.needs
    made_with = {k: call.pop(k) for k in list(call) if k == "multiply_by_inputs"}
    if neuron is not None and layer is None:
        raise InputError("a neuron was given without its layer: name the layer too")
    if "neuron" in info.needs and neuron is None:
        raise InputError(f"method '{info.name}' explains a neuron: give layer and neuron")
    if needs_layer:
        if layer is None:
            raise InputError(f"method '{info.name}' needs a layer; model.layers() lists them")
        if neuron is not None and "neuron" not in info.needs:
            raise InputError(f"method '{info.name}' does not explain neurons")
        return cls(model, layer, **made_with), "inputs" if neuron is not None else "layers", call
    if neuron is not None:
        sources = list(embedded.values()) or None
        return (
            cls(model, of=layer, wrt=sources, **made_with),
            "layers" if sources else "inputs",
            call,
        )
    if layer is not None:
        return cls(model, wrt=layer, **made_with), "layers", call
    if embedded:
        inputs = list(embedded.values())
        return cls(model, wrt=inputs, **made_with), "layers", call
    return cls(model, **made_with), "inputs", call


def _target(
    target: Any, prediction: np.ndarray, labels: list[str] | None, count: int
) -> np.ndarray | None:
    """The explained index of each example, [N] or [N, k]; None where there is only one value."""
    shape = prediction.shape[1:]
    if isinstance(target, str) and target == "predicted":
        if len(shape) == 0 or prediction.ndim == 0:
            return None
        if len(shape) > 1:
            raise InputError(
                f"the output has shape [N, {', '.join(map(str, shape))}]: 'predicted' needs one "
                "score per class; give target as a tuple of indices"
            )
        return prediction.argmax(axis=1)
    if isinstance(target, str):
        if not labels or target not in labels:
            known = f"the labels are {', '.join(labels[:20])}" if labels else "the model has none"
            raise InputError(f"target '{target}' is no label ({known}); give a label or an index")
        target = labels.index(target)
    found = target_indices(target, shape, count)
    if found is None:
        return None
    return found[:, 0] if found.shape[1] == 1 else found


def _as_target(index: np.ndarray | None) -> Any:
    if index is None:
        return None
    return index if index.ndim == 1 else [tuple(row) for row in index.tolist()]


def _named(
    result: Any, feeds: Feeds, layer: str | None, embedded: Mapping[str, str], attributing: str
) -> dict[str, np.ndarray]:
    """Attributions by input or layer name; embeddings summed over their last axis."""
    if attributing == "inputs":
        if feeds.form == "dict":
            return dict(result)
        parts = list(result) if isinstance(result, tuple) else [result]
        return dict(zip(feeds.explained, parts, strict=True))
    if layer is None:
        parts = result if isinstance(result, list) else [result]
        return {name: part.sum(axis=-1) for name, part in zip(embedded, parts, strict=True)}
    parts = list(result) if isinstance(result, tuple | list) else [result]
    names = [layer] if len(parts) == 1 else [f"{layer}.{i}" for i in range(len(parts))]
    return dict(zip(names, parts, strict=True))


def _form(feeds: Feeds, attributing: str, arrays: Mapping[str, np.ndarray]) -> Any:
    if attributing == "inputs":
        return feeds.form
    return "array" if len(arrays) == 1 else "tuple"


def _warn_when_poor(checks: Mapping[str, np.ndarray]) -> None:
    gap = checks.get("relative_convergence_delta")
    if gap is not None and (poor := int((gap > POOR_DELTA).sum())):
        warnings.warn(
            f"the attributions of {poor} example(s) miss the difference they should add up to by "
            f"up to {gap.max():.0%}; use more steps (n_steps) or another baseline",
            stacklevel=3,
        )


def _provenance(model: Model) -> dict[str, str]:
    session = model.forward([model.output.name or ""]).session
    return {
        "model": model.path or "",
        "sha256": model.digest,
        "output": model.output.name or "",
        "onnxplain": VERSION,
        "onnxruntime": runtime().__version__,
        "providers": ",".join(session.providers),
    }
