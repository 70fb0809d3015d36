"""The command line: parses, calls, prints.

Results go to standard output, logs and warnings to standard error. Exit status 0: done; 1: refused,
with one line that says why; 2: wrong usage; 130: interrupted, with what was computed until then.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import difflib
import errno
import json
import logging
import math
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import InputError, OnnxplainError, TargetError

if TYPE_CHECKING:
    from .inputs import Preprocessing, Sample
    from .model import Model
    from .result import Explanation

DEFAULT_METHOD = "integrated-gradients"
# What the messages of the library call by its name in Python.
_IN_PYTHON = {
    "model.layers()": "'onnxplain layers MODEL'",
    "examples_axis={name: None}": "--examples-axis NAME=none",
    "examples_axis=None": "--examples-axis none",
    "set examples_axis for": "give --examples-axis NAME=N (or NAME=none) for",
    "(layer=)": "(--layer)",
    "layer= in ox.explain": "--layer",
    "ox.methods() lists": "'onnxplain methods' lists",
    "neuron_selector": "--neuron",
    "(baselines=)": "(--baseline FILE)",
    "(feature_mask)": "(--option feature_mask=FILE.npy; of pictures: --segments)",
    "a feature_mask": "--option feature_mask=FILE.npy (of pictures: --segments)",
    "as training_data, or in baselines=": "with --baseline FILE.csv",
    ", and strings with LimeText.explain_instance": "",
    "(segmentation='slic')": "(--segments slic)",
    "(segmentation('quickshift', kernel_size=1))": "(--segments grid:7)",
    "(n_samples)": "(--option n_samples=NUMBER)",
    "(n_samples, num_samples, num_masks)": "(--option n_samples=, num_samples= or num_masks=)",
    "(centered=True)": "(--option centered=true)",
    "(hide_color=0)": "(--option hide_color=0)",
    "(ignore_negative=True)": "(--option ignore_negative=true)",
    "(activations='all' takes": "(--option activations=all takes",
}
# Where they advise to take more.
_NUMBERED = r"(?<!--option )\b(n_steps|n_samples|nt_samples|num_samples|num_masks)=(?=\d)"


class _Commands(click.Group):
    """Turns every refusal of ours into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxplainError as error:
            _refuse(str(error))
            ctx.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's own business: `onnxplain layers | head`
                raise
            _refuse(f"can't write the result: {error.strerror or error}")
            # What is left in the buffer would fail once more when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)


def _refuse(message: str) -> None:
    click.echo(f"error: {_in_flags(' '.join(message.split()))}", err=True)


def _in_flags(message: str) -> str:
    for python, flag in _IN_PYTHON.items():
        message = message.replace(python, flag)
    return re.sub(_NUMBERED, r"--option \g<0>", message)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxplain")
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error what is being done.")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Explain what an ONNX model answers."""
    log = logging.getLogger("onnxplain")
    log.handlers[:] = [_ToStandardError()]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    ctx.with_resource(warnings.catch_warnings())
    warnings.showwarning = lambda message, *rest, **more: click.echo(
        f"warning: {_in_flags(str(message))}", err=True
    )


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


# --- what is given on the command line ----------------------------------------------------------


def _converted(convert: Callable[[str], Any], must: str) -> Callable[..., Any]:
    """A click callback for one value, which ``convert`` refuses with ValueError."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            return convert(value)
        except (ValueError, ZeroDivisionError):
            raise click.BadParameter(f"{value!r} is not {must}") from None

    return callback


def _bytes(text: str) -> int:
    """``512MB``, ``2 GiB`` or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    if not match or not float(match[1]):
        raise ValueError(text)
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _examples_axis(text: str) -> Any:
    """``1``, ``none``, or one of these for each input named: ``state=1,rate=none``."""

    def axis(part: str) -> int | None:
        return None if part.strip().lower() == "none" else int(part)

    if "=" not in text:
        return axis(text)
    pairs = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): axis(number) for name, _, number in pairs}


def _setting(key: str) -> Callable[..., Any]:
    """A click callback for a preprocessing flag, checked like the same key of an onnxplain.toml."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        from .inputs import INPUT_KEYS

        number = int if key in ("size", "crop") else lambda part: float(Fraction(part))
        try:
            numbers = [number(part.strip()) for part in value.split(",")]
            return INPUT_KEYS[key](numbers[0] if key == "scale" and len(numbers) == 1 else numbers)
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            reason = error if str(error).startswith("must be") else "must be numbers"
            raise click.BadParameter(f"{reason}, not {value!r}") from None

    return callback


def _figure_path(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    if value is None:
        return None
    from .result import _FIGURE_SUFFIXES

    path = Path(value)
    if path.suffix.lower() not in _FIGURE_SUFFIXES:
        raise click.BadParameter(f"{value!r} must end in one of {', '.join(_FIGURE_SUFFIXES)}")
    return _writable(ctx, param, value)


def _archive(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    if value is not None and Path(value).suffix.lower() != ".npz":
        raise click.BadParameter(f"{value!r} must end in .npz; --output draws")
    return _writable(ctx, param, value)


def _writable(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """A path to write: a mistyped folder should not cost the computation."""
    if value is not None and not Path(value).parent.is_dir():
        raise click.BadParameter(f"the folder {str(Path(value).parent)!r} does not exist")
    return None if value is None else Path(value)


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model_options = _options(
    click.argument("model"),
    click.option("--output-name", metavar="NAME", help="Output to explain [first floating-point]."),
    click.option(
        "--provider", metavar="NAME", help="cpu, cuda, tensorrt, ... [the best there is]."
    ),
    click.option(
        "--memory-limit",
        metavar="SIZE",
        callback=_converted(_bytes, "a size such as 512MB or 2GiB"),
        help="Memory that may be held, such as 512MB [half of what is free].",
    ),
    click.option(
        "--examples-axis",
        metavar="N|NAME=N,...|none",
        callback=_converted(_examples_axis, "an axis, 'none', or NAME=AXIS,..."),
        default="0",
        help="Axis that counts examples, for all inputs or by name; none: shared by all.",
    ),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_preprocessing_options = _options(
    click.option("--config", metavar="FILE", help="Settings [onnxplain.toml beside the model]."),
    click.option("--labels", metavar="FILE", help="Class names, one a line."),
    click.option("--kind", type=click.Choice(["image", "table", "text", "series"])),
    click.option(
        "--size", metavar="H,W", callback=_setting("size"), help="Resize pictures to this."
    ),
    click.option("--resize", type=click.Choice(["exact", "shortest"]), help="How [exact]."),
    click.option("--crop", metavar="H,W", callback=_setting("crop"), help="Then keep the center."),
    click.option(
        "--scale",
        metavar="S",
        callback=_setting("scale"),
        help="Times 0..255 [1/255; 1 if mean > 1 or std > 2: these are of 0..255].",
    ),
    click.option("--mean", metavar="A,B,C", callback=_setting("mean"), help="Then subtract [0]."),
    click.option("--std", metavar="A,B,C", callback=_setting("std"), help="Then divide by [1]."),
    click.option("--channels", type=click.Choice(["L", "RGB", "BGR"]), help="Order of channels."),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC", "NCL", "NLC"]), help="Axes."),
)


def _load(
    path: str,
    output_name: str | None,
    provider: str | None,
    memory_limit: int | None,
    examples_axis: Any,
) -> Model:
    from .model import Model
    from .run.session import runtime

    if not path:
        raise click.UsageError("MODEL is empty: give the path of an .onnx file")
    runtime()  # without it, say so before anything else
    return Model(
        path,
        output=output_name,
        providers=None if provider is None else [provider],
        memory_limit=memory_limit,
        examples_axis=examples_axis,
    )


_WIDEST = 44


def _columns(rows: Iterable[Sequence[object]]) -> str:
    """Rows as text columns of equal width; a long cell pushes its own row, nothing is cut."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _shape(shape: Iterable[Any] | None) -> str:
    return "?" if shape is None else f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


# --- inspect, layers, methods -------------------------------------------------------------------


@main.command()
@_model_options
@_json_option
def inspect(model: str, as_json: bool, **how: Any) -> None:
    """Say what MODEL is and what of it can be explained."""
    facts = _facts(_load(model, **how))
    if as_json:
        return _print_json(facts)
    rows = []
    for key, fact in facts.items():
        if key in ("inputs", "outputs"):
            lines = [f"{port['name']}  {port['dtype']} {_shape(port['shape'])}" for port in fact]
        elif key == "operators":
            lines = [", ".join(f"{name} {count}" for name, count in fact.items())]
        elif isinstance(fact, Mapping):
            lines = [f"{name}: {value}" for name, value in fact.items()]
        else:
            lines = [", ".join(fact) if isinstance(fact, list) else fact]
        rows += [("" if i else key, line) for i, line in enumerate(lines) if line is not None]
    click.echo(_columns(rows))


def _facts(model: Model) -> dict[str, Any]:
    from .run.session import choose_providers

    graph = model.graph.graph
    operators = Counter(node.op_type for node in graph)
    weights = [value.const_value for value in graph.initializers.values()]
    report = model.batch_report
    return {
        "model": model.path,
        "opset": model.source_opset,
        "working_opset": model.opset,
        "inputs": [_port(port) for port in model.inputs],
        "outputs": [_port(port) for port in model.outputs],
        "explained output": model.output.name,
        "labels": model.labels,
        "differentiable": {port.name: _differentiable(model, port.name) for port in model.inputs},
        "batch": None if report is None else _batch(report),
        "weights (elements)": sum(weight.size for weight in weights if weight is not None),
        "operators": dict(operators.most_common()),
        "providers": [
            p if isinstance(p, str) else p[0] for p in choose_providers(model.settings.providers)
        ],
    }


def _port(port: Any) -> dict[str, Any]:
    return {
        "name": port.name,
        "dtype": port.dtype,
        "shape": None if port.shape is None else list(port.shape),
    }


def _batch(report: Any) -> str:
    return f"{report.mode}{f' ({report.reason})' if report.reason else ''}"


def _differentiable(model: Model, name: str) -> str:
    """Whether gradient methods reach this input, through what, or why not."""
    from .model import differentiate

    try:
        embedding = model.embedding_layer(name)
        differentiate(model, None, [embedding or name])
    except OnnxplainError as error:
        return f"no: {_in_flags(str(error))}"
    return "yes" if embedding is None else f"yes, at its embedding {embedding}"


@main.command()
@_model_options
@click.option("--filter", "pattern", metavar="TEXT", help="Only names and scopes that contain it.")
@_json_option
def layers(model: str, pattern: str | None, as_json: bool, **how: Any) -> None:
    """List what can be named as a layer of MODEL."""
    found = [
        {
            "name": layer.name,
            "operator": layer.operator,
            "shape": None if layer.shape is None else list(layer.shape),
            "scope": layer.scope,
        }
        for layer in _load(model, **how).layers()
        if not pattern or pattern.lower() in f"{layer.name}\n{layer.scope or ''}".lower()
    ]
    if as_json:
        return _print_json(found)
    rows = [(f["name"], f["operator"], _shape(f["shape"]), f["scope"] or "") for f in found]
    click.echo(_columns([("NAME", "OPERATOR", "SHAPE", "SCOPE"), *rows]))


def _method(name: str, options: Mapping[str, Any]) -> Any:
    """What is known of a method with such options; unknown names are wrong usage."""
    from .methods import chosen

    try:
        return chosen(name, options)
    except InputError as error:
        raise click.UsageError(_in_flags(str(error))) from None


@main.command()
@click.argument("name", required=False)
@_json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, or the options of the one called NAME."""
    from .methods import registry

    infos = [_method(name, {})] if name else list(registry().values())
    if as_json:
        return _print_json([_method_facts(info) for info in infos])
    if not name:
        return click.echo(_columns((info.name, info.summary) for info in infos))
    (info,) = infos
    click.echo(f"{info.title} ({info.name})\n{info.summary}\n")
    rows = [("paper", info.paper), ("needs", ", ".join(info.needs)), ("check", info.check)]
    typed = [
        f"--option {key}={'...  (needed)' if key in info.required else _typed(value)}"
        + (f"  (one of {', '.join(info.choices[key])})" if key in info.choices else "")
        + ("  (true on a terminal)" if key == "show_progress" else "")
        for key, value in info.options.items()
        if not _in_python_alone(info, key)
    ]
    typed += [f"{flag}  (as {key})" for key, flag in _ELSEWHERE.items() if key in info.options]
    rows += [("" if i else "defaults", option) for i, option in enumerate(typed)]
    click.echo(_columns(row for row in rows if row[1]))


def _method_facts(info: Any) -> dict[str, Any]:
    keys = ("name", "title", "summary", "paper", "needs", "check")
    options = {key: _plain(value) for key, value in info.options.items()}
    facts = {key: _plain(getattr(info, key)) for key in keys}
    return {**facts, "options": options, "choices": _plain(info.choices)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


# --- explain ------------------------------------------------------------------------------------


@main.command()
@_model_options
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--method", default=DEFAULT_METHOD, show_default=True, help="See 'methods'.")
@click.option("--target", default="predicted", show_default=True, metavar="N|LABEL|predicted")
@click.option("--layer", metavar="NAME", help="Explain this layer's values; see 'layers'.")
@click.option(
    "--neuron",
    metavar="I,J,K",
    callback=_converted(_whole_numbers, "whole numbers with commas between them"),
    help="Explain this neuron of the layer.",
)
@click.option(
    "--baseline",
    metavar="zero|mean|blur|noise|inpaint|segment-mean|mask|FILE|background:FILE|NUMBER",
    help="What absence looks like (mask: the tokenizer's token for it; background: the mean over"
    " rows); for methods that take a distribution, a .npy or .csv with a row for each baseline, in"
    " the model's units.",
)
@click.option(
    "--segments",
    metavar="slic|quickshift|felzenszwalb|watershed|grid:N|FILE|none",
    help="What of a picture is switched off together: slic:50 makes about 50 segments, grid:7 has"
    " 7 x 7, a .npy their numbers; none takes each value by itself.",
)
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the method.")
@click.option("--seed", type=int, help="For methods that sample.")
@click.option("--output", callback=_figure_path, metavar="FILE", help="why.png, .svg, .pdf, .html")
@click.option("--save", callback=_archive, metavar="FILE", help="Everything, as .npz.")
@_json_option
@_preprocessing_options
def explain(
    model: str,
    inputs: tuple[str, ...],
    method: str,
    target: str,
    layer: str | None,
    neuron: tuple[int, ...] | None,
    baseline: str | None,
    segments: str | None,
    options: tuple[str, ...],
    seed: int | None,
    output: Path | None,
    save: Path | None,
    as_json: bool,
    config: str | None,
    labels: str | None,
    output_name: str | None,
    provider: str | None,
    memory_limit: int | None,
    examples_axis: Any,
    **flags: Any,
) -> None:
    """Explain what MODEL answers to INPUT.

    INPUT is an image, .npy, .npz or .csv, or, for a text model, a .txt or the text itself; several
    are explained together. NAME=INPUT is for the model's input of that name. Where a method takes
    gradients, inputs that none reaches, such as a mask, are fed and not explained.

    Methods that switch parts of a picture off take segments of it (slic:50) unless --segments or
    an option says which. Ctrl-C ends a method that takes samples early and keeps what there is.
    """
    info = _method(method, {k: v for k, _, v in (o.partition("=") for o in options)})
    chosen = _method_options(options, info)
    if baseline is not None and not info.takes_baselines:
        more = "layer_baselines" in info.options
        own = "; the layer has: --option layer_baselines=NUMBER or FILE.npy" if more else ""
        raise click.UsageError(f"--baseline: method {info.name!r} has none{own}")
    if segments is not None and (twice := _GROUPED & chosen.keys()):
        raise click.UsageError(f"--segments and --option {twice.pop()} say the same: leave out one")
    if segments is not None and not _GROUPED & info.options.keys():
        raise click.UsageError(f"--segments: method {info.name!r} takes none")

    from .inputs import Preprocessing, find_preprocessing, load_baselines, load_inputs, read_labels

    given = Preprocessing(**flags, labels=read_labels(Path(labels)) if labels else None)
    setting = find_preprocessing(model, given, config)
    output_name = output_name or setting.output
    loaded = _load(model, output_name, provider, memory_limit, examples_axis)
    sample = load_inputs(inputs, loaded.inputs, setting)
    names = list(setting.labels or loaded.labels or ()) or None
    shown = str(sample.display.input_name)
    pictorial = [f"--{key}" for key in _PICTORIAL if flags.get(key)]
    if pictorial and sample.display.kind != "image":
        raise click.UsageError(
            f"{', '.join(pictorial)}: for pictures, and input {shown!r} takes {sample.display.kind}"
        )
    explained = _explained(info, loaded, sample, None if neuron is None else layer)
    rest = {name: x for name, x in sample.arrays.items() if name not in explained}
    baselines = None
    if baseline is not None:
        baselines = load_baselines(baseline, sample, loaded.inputs, setting, seed)
        if isinstance(baselines, dict):
            baselines = {name: x for name, x in baselines.items() if name in explained}
    about = _target(target, names)
    chosen |= _enough(info, chosen)
    chosen |= _grouping(info, sample, explained, segments, chosen)
    if "show_progress" in info.options:
        chosen.setdefault("show_progress", sys.stderr.isatty())

    from . import explain as explain_model

    explanation = explain_model(
        loaded,
        {name: sample.arrays[name] for name in explained},
        info.name,
        about,
        additional_forward_args=rest or None,
        layer=layer,
        neuron=neuron,
        baselines=baselines,
        seed=seed,
        labels=names,
        # What the files hold is shown by example, so only where these come first.
        display=sample.display if loaded.axes[shown] == 0 else None,
        method_options=chosen,
        provenance=_provenance(inputs, sample, setting, baseline),
    )
    _deliver(explanation, output, save, as_json)


_GROUPED = {"feature_mask", "segmentation"}
# Up to so many values of a picture are each a feature, where the user does not say; none is for
# methods in _SEGMENTS.
_FEW_PIXELS = 256
_SEGMENTS = {"shapley-values": "grid:3"}  # it takes every subset of them
_SEGMENTS_OF_OTHERS = "slic:50"
# Samples at most, where a tolerance says how many are enough.
_UNTIL = 10_000
# Samples of a surrogate for each of its features.
_SAMPLES = 20


def _explained(info: Any, model: Model, sample: Sample, of: str | None) -> list[str]:
    """The inputs that get attributions, the others being fed only."""
    from .explain import explainable_inputs

    shown = str(sample.display.input_name)
    if sample.display.kind == "text":  # of whose arrays only the tokens mean anything
        return [shown]
    if "gradient" not in info.needs and "layer" not in info.needs:
        return [name for name in sample.arrays if model.axes[name] is not None]
    # With none it is refused with the reason, or explained by a layer.
    return list(explainable_inputs(model, of)) or list(sample.arrays)


def _enough(info: Any, chosen: Mapping[str, Any]) -> dict[str, int]:
    """As many samples as a tolerance may take, where the user does not say."""
    made = {
        key: max(_UNTIL, info.options[key])
        for key in ("n_samples", "num_samples", "num_masks")
        if key in info.options and key not in chosen and chosen.get("tolerance") is not None
    }
    for key, most in made.items():
        click.echo(f"until the tolerance is met, at most: --option {key}={most}", err=True)
    return made


def _grouping(
    info: Any,
    sample: Sample,
    explained: list[str],
    segments: str | None,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """Options that say what is switched off together; tells of those that were not asked for."""
    from .inputs import default_windows, load_segmentation
    from .methods import LimeBase

    if "centered" in info.options:  # of a network's scores, RISE's own way shows little else
        told = {"centered": True, "activation": "none"}
        told = {k: v for k, v in told.items() if k not in chosen}
        typed = [f"--option {k}={str(v).lower()}" for k, v in told.items()]
        if typed:
            click.echo(f"weights: {' '.join(typed)}", err=True)
        return told
    if "sliding_window_shapes" in info.options:
        if chosen.keys() & {"sliding_window_shapes", "strides"}:
            return {}
        windows, strides = default_windows(sample, explained)
        told = {"sliding_window_shapes": windows, "strides": strides}
        typed = [f"--option {k}={json.dumps(v).replace(' ', '')}" for k, v in told.items()]
        click.echo(f"windows: {' '.join(typed)}", err=True)
        return told
    if segments is not None and "segmentation" in info.options:
        return {"segmentation": load_segmentation(segments)}
    made, count = _masked(info, sample, explained, segments, chosen.get("feature_mask"))
    if not issubclass(info.cls, LimeBase):
        return made
    if "feature_mask" not in info.options and count > _FEW_PIXELS:
        raise InputError(
            f"method {info.name!r} takes each of {count} values as a feature, and others can be "
            "made in Python alone: take lime, and --segments of pictures"
        )
    if "n_samples" not in chosen:
        enough = _SAMPLES * count
        if enough > info.options["n_samples"]:
            click.echo(f"{count} features: --option n_samples={enough}", err=True)
            made["n_samples"] = enough
    return made


def _masked(
    info: Any, sample: Sample, explained: list[str], segments: str | None, given: Any = None
) -> tuple[dict[str, Any], int]:
    """The ``feature_mask`` of an input, where each value is no feature, and how many there are.

    What the user gave is not made again.
    """
    import numpy as np

    from .inputs import load_segments, token_features

    if given is not None:
        masks = given.values() if isinstance(given, Mapping) else [given]
        return {}, len(set().union(*(np.unique(mask).tolist() for mask in masks)))
    name, kind = str(sample.display.input_name), sample.display.kind
    sizes = {each: math.prod(sample.arrays[each].shape[1:]) for each in (name, *explained)}
    mask = None
    if "feature_mask" not in info.options:
        pass
    elif kind == "text" and segments is None:
        mask = token_features(sample)
    elif segments != "none" and (
        segments
        or (
            (kind == "image" and name in explained)
            and (sizes[name] > _FEW_PIXELS or info.name in _SEGMENTS)
        )
    ):
        how = segments or _SEGMENTS.get(info.name, _SEGMENTS_OF_OTHERS)
        mask = load_segments(how, sample)
        if segments is None:
            click.echo(f"segments, not pixels: --segments {how} (--segments none)", err=True)
    if mask is None:
        return {}, sum(sizes[each] for each in explained)
    count = int(mask[name].max()) + 1
    for other in explained:  # whose values are each a feature
        if other != name:
            values = sample.arrays[other][:1]
            mask[other] = count + np.arange(values.size).reshape(values.shape)
            count += values.size
    return {"feature_mask": mask}, count


_PICTORIAL = ("size", "resize", "crop", "scale", "mean", "std", "channels")


def _provenance(
    inputs: Sequence[str], sample: Sample, setting: Preprocessing, baseline: str | None
) -> dict[str, str]:
    """Where the arrays came from: files, and the settings that they were made with."""
    used = {
        field.name: value
        for field in fields(sample.setting)
        if field.name not in ("labels", "sources")
        and (value := getattr(sample.setting, field.name)) is not None
    }
    return {
        "inputs": " ".join(map(shlex.quote, inputs)),
        "preprocessing": json.dumps(used, ensure_ascii=False),
        **({"settings": ", ".join(setting.sources)} if setting.sources else {}),
        **({"baselines": baseline} if baseline is not None else {}),
    }


def _method_options(given: Sequence[str], info: Any) -> dict[str, Any]:
    """``key=value`` pairs as the method's defaults and annotations have them."""
    known, found = info.options, {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals or key not in known:
            problem = f"there is no option {key!r}" if equals else f"{pair!r} is not KEY=VALUE"
            typed = ", ".join(k for k in known if not _in_python_alone(info, k))
            raise click.UsageError(f"{problem}; this method has {typed or 'none'}")
        if key in _ELSEWHERE:
            raise click.UsageError(f"--option {key}: give {_ELSEWHERE[key]} instead")
        if _in_python_alone(info, key):
            raise click.UsageError(f"--option {key}: it can't be typed, only given in Python")
        found[key] = _option_value(key, text, _option_types(info, key))
    return found


_TYPES: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "a text"),
    "tuple": (tuple, "numbers with commas between them"),
    "Sequence": (tuple, "numbers with commas between them"),
    "None": (type(None), "none"),
}
_FILES = (".npy", ".npz", ".csv")
_ELSEWHERE = {"training_data": "--baseline FILE.csv"}


def _in_python_alone(info: Any, key: str) -> bool:
    """Whether an option takes nothing that can be typed, such as a function."""
    return key in _ELSEWHERE or _option_types(info, key) == ["None"]


def _option_types(info: Any, key: str) -> list[str]:
    """The names of the types that an option takes; empty: any."""
    outer, inner = info.annotations[key], ""
    while outer != inner:  # what is in brackets are the types of elements
        outer, inner = re.sub(r"\[[^][]*\]", "", outer), outer
    return (
        []
        if re.search("Any|^np.ndarray", outer)
        else re.findall(rf"\b({'|'.join(_TYPES)})\b", outer)
    )


def _option_value(key: str, text: str, types: Sequence[str]) -> Any:
    """One value as typed: none, true, false in any case, numbers, a file where any, else text."""
    if not types and text.endswith(_FILES):
        return _array(text)
    word = {"none": "null"}.get(text.lower(), text.lower())
    value: Any = text
    for reading in (word if word in ("true", "false", "null") else text, f"[{text}]"):
        with suppress(json.JSONDecodeError):
            value = _tuples(json.loads(reading))
            break
    if type(value) is int and "float" in types and "int" not in types:
        value = float(value)
    if not types and isinstance(value, tuple):
        import numpy as np

        try:
            value = np.array(value)
        except ValueError:
            raise click.UsageError(f"--option {key}={text}: rows must be of equal length") from None
    taken = [_TYPES[name][0] for name in types]
    if tuple in taken and type(value) in (int, float) and type(value) not in taken:
        value = (value,)
    if "str" in types and type(value) not in taken:
        value = text
    if types and type(value) not in taken:
        wanted = " or ".join(dict.fromkeys(_TYPES[name][1] for name in types))
        raise click.UsageError(f"--option {key}={text}: must be {wanted}")
    return value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _array(file: str) -> Any:
    """The array in a file; a dict of them by name for .npz."""
    from .inputs.files import read_csv, read_npy, read_npz

    path = Path(file)
    return {".npy": read_npy, ".npz": read_npz}.get(path.suffix, lambda p: read_csv(p)[0])(path)


def _typed(value: Any) -> str:
    """A default as one types it."""
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain).replace("null", "none")


def _target(text: str, labels: Sequence[str] | None) -> Any:
    """``predicted``, a position in the output (``3`` or ``1,0``), or the position of a label."""
    if text == "predicted":
        return text
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        position = _whole_numbers(text)
        return position if len(position) > 1 else position[0]
    if not labels:
        raise TargetError(
            f"target {text!r} is a name, but the model's labels are not known: give a number, "
            "or the names with --labels FILE"
        )
    low = [label.lower() for label in labels]
    places = [i for i, label in enumerate(low) if label == text.lower()]
    if len(places) == 1:
        return places[0]
    if places:
        raise TargetError(f"target {text!r} is the label of {places}: give one of these numbers")
    near = [label for label in low if text.lower() in label][:5]
    near = near or difflib.get_close_matches(text.lower(), low, 5, 0.5) or low[:5]
    shown = ", ".join(f"{labels[i]!r} ({i})" for i in sorted({low.index(label) for label in near}))
    raise TargetError(f"there is no label {text!r} among {len(labels)}; the nearest are {shown}")


def _deliver(
    explanation: Explanation, output: Path | None, save: Path | None, as_json: bool
) -> None:
    from . import view

    shown = [i for i in range(len(explanation)) if view.common.known(explanation, i)]
    written = []
    if output is not None:
        for example in shown:
            number = f"-{example + 1}" if len(explanation) > 1 else ""
            written.append(output.with_stem(output.stem + number))
            explanation.plot(written[-1], example)
    if save is not None:
        explanation.save(save)
        written.append(save)
    if as_json:
        click.echo(explanation.to_json())
    for example in () if as_json else shown:
        if len(explanation) > 1:
            click.echo(f"{'' if example == shown[0] else chr(10)}example {example + 1}")
        click.echo(view.terminal(explanation, example))
    if "completed" in explanation.checks:
        where = f"in {', '.join(map(str, written))}" if written else "above"
        missing = ", ".join(str(i + 1) for i in range(len(explanation)) if i not in shown)
        told = [f"what was computed is {where}"] if shown else []
        told += [f"nothing is known yet of example {missing}"] if missing else []
        click.echo(f"interrupted: {'; '.join(told)}", err=True)
        click.get_current_context().exit(_INTERRUPTED)


_INTERRUPTED = 130  # as shells have it
