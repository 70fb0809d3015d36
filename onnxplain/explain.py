"""One call from a model and an input to an :class:`Explanation` with its checks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain._version import VERSION
from onnxplain.blackbox import BlackBox
from onnxplain.errors import InputError, OnnxplainError
from onnxplain.graph.emit import is_float
from onnxplain.graph.grad import check_path
from onnxplain.methods import MethodInfo, chosen
from onnxplain.methods.base import Answer, Attribution
from onnxplain.methods.baselines import named_baselines
from onnxplain.methods.perturbation import PerturbationAttribution
from onnxplain.methods.target import target_indices
from onnxplain.model import Model, single
from onnxplain.perturb.maskers import Background
from onnxplain.result import Display, Explanation
from onnxplain.run.feeds import Arrays, Feeds, by_name, in_form
from onnxplain.run.session import runtime

# A completeness gap above this share of the explained difference makes the numbers doubtful.
POOR_DELTA = 0.05
# A standard error above this share of what was sampled makes the picture that of the samples.
POOR_STANDARD_ERROR = 0.5
# Above this share, what a map leaves out may be what matters.
POOR_COMPLETENESS = 0.5
# Above this share of the scores' variance unexplained, a surrogate is of another model.
POOR_FIT = 0.5
# Up to this share, no more steps are taken.
GOOD_DELTA = 0.01
# How many times the steps to advise, and the samples, where it can't be told from their error.
_MORE = 4
_SAMPLES = ("n_samples", "nt_samples", "num_masks", "num_samples")
# Shares above this are of next to nothing: how many times does not matter.
_TOO_MUCH = 100
# Options of more elements are on record by their shape and digest.
_LONG_OPTION = 256


def explain(
    model: Model | BlackBox,
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
    provenance: Mapping[str, str] | None = None,
    **options: Any,
) -> Explanation:
    """Explain predictions.

    Args:
        model: the model, or a function as :class:`BlackBox`.
        inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name). To methods that
            take gradients, integer inputs (token ids) are explained through their embedding layer,
            summed over its last axis; to others, as they are.
        method: a name from ``ox.methods()``.
        target: int, tuple, one per example, a label, "predicted" (the class with the highest
            score), or None for one value per example.
        layer: explain by this layer instead of the inputs; with ``neuron``, of this layer.
        neuron: explain this neuron of ``layer`` instead of the output.
        baselines: for methods that have one: a number, arrays, or the name of a masker ("blur").
        additional_forward_args: the remaining inputs, fed and not attributed.
        seed: for random methods.
        labels: class names.
        display: how to show the input to a person.
        method_options: options of the method, as a dict: for those called like an argument here
            (integrated gradients have one called ``method``).
        provenance: what else is to be on record in the explanation: files, preprocessing.
        options: options of the method.

    Raises:
        InputError and the errors of the method.
    """
    if not isinstance(model, Model | BlackBox):
        raise InputError(
            f"model is {type(model).__name__}, not an onnxplain.Model; wrap it: ox.Model(path), "
            "or ox.BlackBox(function)"
        )
    options = {**(method_options or {}), **options}
    info = chosen(method, options)
    info.cls._check_model(model)
    _check_options(info, options, baselines)
    feeds = model.feeds(inputs, additional_forward_args)
    if not feeds.count or not feeds.explained:
        raise InputError(f"there is no {'input' if feeds.count else 'example'} to explain")
    labels = labels if labels is not None else model.labels
    prediction = _prediction(model, feeds)

    by_inputs = _by_inputs(info, layer, neuron)
    embedded = _embeddings(model, feeds) if by_inputs and "gradient" in info.needs else {}
    made = _make(info, model, layer, neuron, feeds, embedded, options)
    call = {k: v for k, v in options.items() if k not in info.made_with}
    index = None
    if neuron is not None:
        call["neuron_selector" if "neuron" in info.needs else "target"] = neuron
    if neuron is None or ("neuron" in info.needs and info.takes_target):
        index = _target(target, prediction, labels, feeds.count)
        if info.takes_target:
            call["target"] = _as_target(index)
    if info.takes_baselines:
        call["baselines"] = baselines
    if "random" in info.needs:
        call["seed"] = seed
    asked = {"inputs": inputs, "additional_forward_args": additional_forward_args, **call}
    answer, taken = _answered(made, asked, _steps(info, options, model), feeds)
    used = layer if layer is not None else getattr(made, "layer", None)
    over = made.laid_over(feeds)
    errors: dict[str, np.ndarray] = {}
    features: dict[str, np.ndarray] = {}
    if by_inputs and over is None:
        arrays, form = _by_input(answer.result, feeds, embedded, model.axes), feeds.form
        if answer.standard_errors is not None:
            errors = _by_input(answer.standard_errors, feeds, {}, model.axes)
        features = _feature_mask(options.get("feature_mask"), arrays)
        if answer.features is not None:
            features = _by_input(answer.features, feeds, {}, model.axes)
    else:
        names = over or [used or made.wrt[0]]
        arrays, form = _by_name(answer.result, names)
        if answer.standard_errors is not None:
            errors, _ = _by_name(answer.standard_errors, names)
    given = {"neuron": neuron} if neuron is not None else {}
    given |= {"seed": seed} if "random" in info.needs else {}
    record = {"baselines": _described(baselines)} if info.takes_baselines else {}
    explanation = Explanation(
        method=info.name,
        inputs={k: _without_objects(feeds.arrays[k]) for k in feeds.explained},
        arrays=arrays,
        form=form,  # type: ignore[arg-type]
        prediction=prediction if prediction.ndim else np.broadcast_to(prediction, feeds.count),
        target=index,
        labels=labels,
        layer=used,
        options={
            k: _recorded(v)
            for k, v in {**info.options, **options, **taken, **given}.items()
            if k != "show_progress"
        },
        checks=answer.checks,
        standard_errors=errors,
        features={k: v for k, v in features.items() if _shared(v, arrays[k].shape)},
        provenance={**_provenance(model), **record, **(provenance or {})},
        display=display,
    )
    _warn_when_poor(explanation, info, model)
    return explanation


def _prediction(model: Model | BlackBox, feeds: Feeds) -> np.ndarray:
    """The explained output, [N, ...], or [] where there is one number for all."""
    if isinstance(model, BlackBox):
        return model.evaluate(feeds.arrays)
    name = model.output.name or ""
    return model.run(model.forward([name]), feeds)[name]


def explainable_inputs(model: Model, of: str | None = None) -> tuple[str, ...]:
    """The inputs that a differentiable path joins with ``of`` (default: the output).

    Token numbers count through their embedding; inputs that all examples share don't count.
    """
    explained = model.output if of is None else single(model, of)

    def reached(value: ir.Value) -> bool:
        try:
            source = value if is_float(value) else model.embedding(value.name or "") or value
            check_path(model.graph.graph, [explained], [source])
        except OnnxplainError:
            return False
        return model.axes[value.name or ""] is not None

    return tuple(v.name or "" for v in model.graph.graph.inputs if reached(v))


def _feature_mask(mask: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The features of attributions, of their rank."""
    if mask is None:
        return {}
    named = {k: np.asarray(v) for k, v in by_name(mask, list(arrays), "feature_mask")[0].items()}
    full = {k: v.reshape((1,) * (arrays[k].ndim - v.ndim) + v.shape) for k, v in named.items()}
    # Where several outputs are explained, the values of an input come after them.
    return {k: v for k, v in full.items() if _broadcasts(v.shape, arrays[k].shape)}


def _shared(features: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether any feature has several values."""
    return features.shape[1:] != shape[1:] or any(len(np.unique(f)) < f.size for f in features)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) == len(to) and all(m in (1, n) for m, n in zip(shape, to, strict=True))


def _described(baselines: Any) -> str:
    """Baselines in a few words; arrays by their shape."""
    if isinstance(baselines, Background):
        return f"mean over rows: {_described(baselines.rows)}"
    if isinstance(baselines, Mapping):
        return ", ".join(f"{name}: {_described(b)}" for name, b in baselines.items())
    if isinstance(baselines, tuple):
        return ", ".join(map(_described, baselines))
    shape = list(np.shape(baselines))
    return f"array {shape}" if shape else "zeros" if baselines is None else str(baselines)


def _without_objects(array: np.ndarray) -> np.ndarray:
    """Text as fixed-width strings, which can be saved."""
    return array.astype(str) if array.dtype.hasobject else array


def _recorded(option: Any) -> Any:
    """An option as it is put on record: long arrays by what tells whether another is the same."""
    if isinstance(option, Mapping):
        return {k: _recorded(v) for k, v in option.items()}
    if isinstance(option, tuple):
        return tuple(map(_recorded, option))
    if not isinstance(option, np.ndarray) or option.size <= _LONG_OPTION:
        return option
    digest = hashlib.sha256(np.ascontiguousarray(option).tobytes()).hexdigest()
    return f"{option.dtype} {list(option.shape)}, sha256 {digest}"


def _check_options(info: MethodInfo, options: Mapping[str, Any], baselines: Any) -> None:
    for name in options:
        if name not in info.options:
            known = ", ".join(info.options) or "none"
            raise InputError(f"method '{info.name}' has no option '{name}' (its options: {known})")
    if missing := sorted(info.required - options.keys()):
        raise InputError(f"method '{info.name}' needs the option(s) {', '.join(missing)}")
    if baselines is not None and not info.takes_baselines:
        raise InputError(f"method '{info.name}' has no baseline")


def _embeddings(model: Model | BlackBox, feeds: Feeds) -> dict[str, str]:
    """The embedding layer of each explained input that is no floating-point array."""
    assert isinstance(model, Model)  # methods that take gradients refuse the rest
    found = {}
    for value in model.graph.graph.inputs:
        name = value.name or ""
        if name in feeds.explained and not is_float(value):
            layer = model.embedding_layer(name)
            if layer is None:
                raise InputError(
                    f"input '{name}' holds integers and feeds no embedding, so no gradient reaches "
                    "it; name a layer (layer=), pass it in additional_forward_args, or use a "
                    "method without gradients, such as feature-ablation or kernel-shap"
                )
            found[name] = layer
    return found


def _by_inputs(info: MethodInfo, layer: str | None, neuron: Any) -> bool:
    """Whether the inputs get the attributions, and not a layer."""
    if info.takes_layer:
        return info.explains == "inputs"
    return layer is None or neuron is not None


def _make(
    info: MethodInfo,
    model: Any,
    layer: str | None,
    neuron: Any,
    feeds: Feeds,
    embedded: Mapping[str, str],
    options: Mapping[str, Any],
) -> Attribution:
    """The method for a question."""
    if neuron is not None and layer is None:
        raise InputError("a neuron was given without its layer: name the layer too")
    if "layer" in info.needs and layer is None:
        raise InputError(f"method '{info.name}' needs a layer; model.layers() lists them")
    if "neuron" in info.needs and neuron is None:
        raise InputError(f"method '{info.name}' explains a neuron: give layer and neuron")
    if info.takes_layer and "neuron" not in info.needs and neuron is not None:
        raise InputError(f"method '{info.name}' explains the output: leave out the neuron")
    if layer is not None and not info.takes_layer and not info.takes_any_layer:
        raise InputError(f"method '{info.name}' explains by the inputs: leave out the layer")
    if embedded and not info.takes_any_layer:
        raise InputError(
            f"method '{info.name}' explains by numbers, and '{next(iter(embedded))}' holds "
            "integers: use a method that can explain by the embedding, such as integrated-gradients"
        )
    sources = [embedded.get(name, name) for name in feeds.explained] if embedded else None
    if info.takes_layer:
        return info.make(model, options, layer=layer, wrt=sources)
    if layer is not None and neuron is None:
        return info.make(model, options, wrt=layer)
    return info.make(model, options, of=layer, wrt=sources)


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


def _by_input(
    result: Any, feeds: Feeds, embedded: Mapping[str, str], axes: Mapping[str, int | None]
) -> dict[str, np.ndarray]:
    """Attributions by input name, examples first; of embeddings summed over their last axis."""
    named = result
    if not isinstance(result, Mapping):
        named = dict(zip(feeds.explained, _parts(result), strict=True))
        named = {k: v.sum(axis=-1) if k in embedded else v for k, v in named.items()}
    return {k: np.moveaxis(v, axes[k] or 0, 0) for k, v in named.items()}


def _by_name(result: Any, names: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
    """Attributions by the name of a layer, or of what they are laid over, and their form."""
    parts = _parts(result)
    names = list(names) if len(names) == len(parts) else [names[0]] * len(parts)
    if len(parts) == 1:
        return {names[0]: parts[0]}, "array"
    return {f"{n}.{i}": p for i, (n, p) in enumerate(zip(names, parts, strict=True))}, "tuple"


def _steps(
    info: MethodInfo, options: Mapping[str, Any], model: Model | BlackBox
) -> tuple[int | None, ...]:
    """The numbers of steps to try: the user's, or more and more while the gap is not small.

    None leaves it to the method.
    """
    default = info.options.get("n_steps")
    if default is None or "n_steps" in options or _rounds(model):
        return (None,)
    return tuple(default * factor for factor in (1, 2, 4))


def _answered(
    made: Attribution, asked: Mapping[str, Any], steps: Sequence[int | None], feeds: Feeds
) -> tuple[Answer, dict[str, int]]:
    """The answer, and the number of steps taken: more of them for the examples that need it.

    Each example alone decides about its steps, so it gets the same numbers in any batch.
    """
    first, *more = steps
    taken = {} if first is None else {"n_steps": first}
    answer = made.answer(**asked, **taken)
    for n_steps in more:
        gap = answer.checks.get("relative_convergence_delta", np.zeros(0))
        poor = np.flatnonzero(gap > GOOD_DELTA)
        if not poor.size:
            break
        assert n_steps is not None
        taken = {"n_steps": n_steps}
        parts = _parts(answer.result)
        if any(made.model.axes.values()) or any(len(a) != feeds.count for a in parts):
            # Examples lie elsewhere than on the first axis: all are asked again.
            answer = made.answer(**asked, **taken)
            continue
        again = made.answer(**_some(asked, poor, made.model, feeds), **taken)
        for array, rows in zip(parts, _parts(again.result), strict=True):
            array[poor] = rows
        for name, rows in again.checks.items():
            answer.checks[name][poor] = rows
    return answer, taken


def _parts(result: Any) -> list[np.ndarray]:
    """The arrays of a result in any form."""
    if isinstance(result, Mapping):
        return list(result.values())
    return list(result) if isinstance(result, tuple | list) else [result]


def _some(
    asked: Mapping[str, Any], index: np.ndarray, model: Model, feeds: Feeds
) -> dict[str, Any]:
    """The same question about some of the examples."""

    def rows(name: str) -> np.ndarray:
        array = feeds.arrays[name]
        return array if model.axes[name] is None else array[index]

    rest = [name for name in feeds.arrays if name not in feeds.explained]
    target = asked.get("target")
    some = {
        "inputs": in_form({name: rows(name) for name in feeds.explained}, feeds.form),
        "additional_forward_args": {name: rows(name) for name in rest} if rest else None,
    }
    if isinstance(target, np.ndarray | list):
        some["target"] = [target[i] for i in index]
    if asked.get("baselines") is not None:
        named = named_baselines(model, feeds, asked["baselines"])
        some["baselines"] = {k: b if len(b) == 1 else b[index] for k, b in named.items()}
    return {**asked, **some}


def _rounds(model: Model | BlackBox) -> bool:
    """Whether the model is quantized: through rounding no number of steps closes the gap."""
    if isinstance(model, BlackBox):
        return False
    operators = {node.op_type for node in model.graph.graph}
    return any("QuantizeLinear" in name or "QLinear" in name for name in operators)


def _warn_when_poor(explanation: Explanation, info: MethodInfo, model: Model | BlackBox) -> None:
    """Say which examples have attributions that don't add up, or hardly agree between samples."""
    rows = [a.reshape(len(a), -1) for a in explanation.arrays.values() if a.size]
    finite = [np.isfinite(a).all(axis=1) for a in rows]
    bad = {int(i) for row in finite for i in np.flatnonzero(~row)}  # the method warned of these
    told = {
        "relative_convergence_delta": (
            POOR_DELTA,
            "miss the difference they should add up to by up to",
            "the model is quantized, and more steps won't help: compare with the model before "
            "quantization, or try another baseline"
            if _rounds(model)
            else "use more steps ({steps}) or another baseline"
            if "n_steps" in info.options
            else "try another baseline, or a method that takes steps (integrated-gradients)",
        ),
        "standard_error": (
            POOR_STANDARD_ERROR,
            "are means of samples with a standard error of up to",
            "take more samples ({samples})"
            + (
                ", or weigh them around their mean (centered=True)"
                if explanation.options.get("centered") is False
                else ""
            ),
        ),
        "completeness_gap": (
            POOR_COMPLETENESS,
            "are made of parts that miss the output by up to",
            "the model is not piecewise linear there: compare with another method",
        ),
        "unexplained": (
            POOR_FIT,
            "add up to a surrogate that leaves unexplained, of what the scores vary by, up to",
            "the features interact, and no sum over them is close to the model: take other "
            "features (feature_mask), or ask about them together",
        ),
        "lost": (
            POOR_COMPLETENESS,
            "leave out a share of the probability of up to",
            "it ends in places that nothing excites: compare with another method",
        ),
    }
    figures = dict(explanation.checks)
    if "probability" in figures:
        figures["lost"] = 1 - figures["probability"]
    if "fit" in figures:
        figures["unexplained"] = 1 - figures["fit"]
    alike = len({len(a) for a in rows}) == 1  # else some count something else than examples
    if alike and (zero := np.flatnonzero(~np.any([a.any(axis=1) for a in rows], axis=0)).tolist()):
        why = "nothing comes back to what it is explained by; try another method, layer or target"
        if issubclass(info.cls, PerturbationAttribution):
            why = "nothing that was switched off changed the score; try larger parts, or another "
            own = explanation.options.get("hide_color", 0) is None  # flat segments stay as they are
            why += "color for what is off (hide_color=0)" if own else "baseline or target"
        warnings.warn(
            f"the attributions of {_listed(zero, explanation)} are all zero: {why}", stacklevel=3
        )
    for check, (limit, problem, advice) in told.items():
        found = figures.get(check)
        if found is None:
            continue
        poor = [int(i) for i in np.flatnonzero(~(found <= limit)) if i not in bad]
        if poor:
            worst = float(np.nan_to_num(found[poor], nan=np.inf).max())
            much = f"{worst:.0%}" if worst < _TOO_MUCH else f"more than {_TOO_MUCH:.0%}"
            much = "what too few samples can't tell" if np.isnan(found[poor]).any() else much
            times = (worst / limit) ** 2 if worst < _TOO_MUCH else _MORE
            advice = advice.format(
                steps=_more(explanation.options, ("n_steps",), _MORE),
                samples=_more(explanation.options, _SAMPLES, max(times, 2)),
            )
            warnings.warn(
                f"the attributions of {_listed(poor, explanation)} {problem} {much}; {advice}",
                stacklevel=3,
            )


def _more(options: Mapping[str, Any], names: Sequence[str], times: float) -> str:
    """So many times the steps or samples that were taken, to two digits."""
    wanted = {name: times * options[name] for name in names if name in options}
    return " or ".join(f"{k}={int(float(f'{v:.1e}'))}" for k, v in wanted.items())


def _listed(examples: list[int], explanation: Explanation) -> str:
    """Examples by their indices, and names where they have some."""
    words = [f"{i} {explanation.name(i)}".strip() for i in examples[:10]]
    return f"{len(examples)} example(s) (index {', '.join(words)}{', ...' * (len(examples) > 10)})"


def _provenance(model: Model | BlackBox) -> dict[str, str]:
    if isinstance(model, BlackBox):
        return {"model": repr(model), "onnxplain": VERSION}
    session = model.forward([model.output.name or ""]).session
    return {
        "model": model.path or "",
        "sha256": model.digest,
        "output": model.output.name or "",
        "onnxplain": VERSION,
        "onnxruntime": runtime().__version__,
        "providers": ",".join(session.providers),
    }
