"""The settings that turn a file into what the model was trained on.

They come, the first that says it wins, from flags, from an ``onnxplain.toml`` beside the model,
from Hugging Face's ``preprocessor_config.json`` and ``config.json`` beside it, and from a guess by
the shape of the model's input.
"""

from __future__ import annotations

import json
import logging
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import FileFormatError, InputError
from .files import read_lines, read_text

log = logging.getLogger("onnxplain")

CONFIG_NAME = "onnxplain.toml"
MAX_PIXELS = 100_000_000  # of a picture, decoded or resized: 1.2 GB of float32 RGB
KINDS = ("image", "table", "text", "series")


class InputSpec(Protocol):
    """What is known of a model input: the entries of ``Model.inputs`` have this form."""

    @property
    def name(self) -> str:
        """What the model calls it."""

    @property
    def dtype(self) -> Any:
        """NumPy's or ONNX's name of its type, or a NumPy type."""

    @property
    def shape(self) -> Sequence[Any] | None:
        """Numbers where an axis is fixed; None: even the rank is unknown."""


def shape_of(spec: InputSpec) -> tuple[Any, ...]:
    """The shape of a model input, numbers where it is fixed; empty where nothing is known."""
    return tuple(spec.shape or ())


def dtype_of(spec: InputSpec) -> np.dtype[Any]:
    """What an array for a model input is cast to; ONNX's names for types are understood."""
    name = str(spec.dtype)
    try:
        return np.dtype(_DTYPES.get(name, name))
    except TypeError:
        raise InputError(f"input {spec.name!r} takes {name}, which no file here holds") from None


# What ONNX calls by another name than NumPy; the model's runner narrows float32 to bfloat16.
_DTYPES = {"float": "float32", "double": "float64", "bfloat16": "float32"}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How files become model inputs; ``None`` means "not said".

    An image is read as RGB in 0..255, brought to ``size`` (``"exact"``, or ``"shortest"``: the
    smallest picture of the same aspect that covers it) by splines of ``order``, cut to the central
    ``crop``, taken to ``channels``, and becomes ``(v * scale - mean) / std`` in ``layout``.
    """

    name: str | None = None
    kind: str | None = None
    layout: str | None = None
    channels: str | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resize: str | None = None
    order: int | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    tokenizer: str | None = None  # "words", or the path of a tokenizer.json
    vocabulary: str | None = None
    lowercase: bool | None = None
    length: int | None = None
    pad: str | None = None
    unknown: str | None = None
    output: str | None = None
    labels: tuple[str, ...] | None = None
    sources: tuple[str, ...] = ()

    def over(self, other: Preprocessing) -> Preprocessing:
        """``other`` with everything that this one says put in its place."""
        said = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(other, **{**said, "sources": self.sources + other.sources})


# --- values -------------------------------------------------------------------------------------
# A parser takes a value as TOML or JSON gives it, and returns the field's value or raises
# ValueError with what it must be.


Parser = Callable[[Any], Any]


def _is(
    kind: type | tuple[type, ...], must: str, check: Callable[[Any], bool] = lambda v: True
) -> Parser:
    def parse(value: Any) -> Any:
        # bool is an int to Python, not to the person who wrote the file
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"must be {must}")
        if not check(value):
            raise ValueError(f"must be {must}")
        return value

    return parse


def _one_of(*allowed: Any) -> Parser:
    return _is(type(allowed[0]), f"one of {', '.join(map(str, allowed))}", allowed.__contains__)


def _tuple_of(parse: Parser, must: str, check: Callable[[tuple[Any, ...]], bool]) -> Parser:
    def parse_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not check(tuple(value)):
            raise ValueError(f"must be {must}")
        try:
            return tuple(parse(item) for item in value)
        except ValueError:
            raise ValueError(f"must be {must}") from None

    return parse_all


_string = _is(str, "a string", bool)
_bool = _is(bool, "true or false")
_positive = _is(int, "a whole number from 1", lambda v: v > 0)
_number = _is((int, float), "a finite number", math.isfinite)
_strings = _tuple_of(_string, "a list of strings", bool)
_shape = "two whole numbers from 1, height and width, of at most 100 million pixels together"
_pair = _tuple_of(_positive, _shape, lambda v: len(v) == 2 and v[0] * v[1] <= MAX_PIXELS)
_per_channel = "1 or 3 finite numbers, one a channel"
_numbers = _tuple_of(_number, _per_channel, lambda v: len(v) in (1, 3))
_nonzero = _is((int, float), "a finite number other than 0", lambda v: bool(v) and math.isfinite(v))
_divisors = _tuple_of(_nonzero, f"{_per_channel}, none of them 0", lambda v: len(v) in (1, 3))

INPUT_KEYS: Mapping[str, Parser] = {
    "name": _string,
    "kind": _one_of(*KINDS),
    "layout": _one_of("NCHW", "NHWC", "NLC", "NCL"),
    "channels": _one_of("L", "RGB", "BGR"),
    "size": _pair,
    "crop": _pair,
    "resize": _one_of("exact", "shortest"),
    "order": _one_of(0, 1, 2, 3),
    "scale": _nonzero,
    "mean": _numbers,
    "std": _divisors,
    "feature_names": _strings,
    "tokenizer": _string,
    "vocabulary": _string,
    "lowercase": _bool,
    "length": _positive,
    "pad": _string,
    "unknown": _string,
}
OUTPUT_KEYS: Mapping[str, Parser] = {
    "name": _string,
    "labels": _strings,
    "labels_file": _string,
}
TOP_KEYS: Mapping[str, Parser] = {
    "model": _string,
    "input": _is(dict, "a table"),
    "output": _is(dict, "a table"),
}


def _parsed(path: Path, key: str, value: Any, parse: Parser, where: str = "") -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise FileFormatError(f"{path}: {key!r}{where} {error}, not {value!r}") from None


def _parse_all(
    path: Path, where: str, table: Mapping[str, Any], keys: Mapping[str, Parser]
) -> dict[str, Any]:
    for key in table:
        if key not in keys:
            raise FileFormatError(f"{path}: unknown key {key!r}{where}; allowed: {', '.join(keys)}")
    return {key: _parsed(path, key, value, keys[key], where) for key, value in table.items()}


# --- readers ------------------------------------------------------------------------------------


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names in a text file, one a line, in the order of the model's output."""
    return tuple(line.strip() for line in read_lines(path))


def from_toml(path: Path, model: Path | None = None) -> Preprocessing:
    """What an ``onnxplain.toml`` says; nothing if it names another model than ``model``.

    Paths in it (``vocabulary``, ``labels_file``, a ``tokenizer.json``) count from its folder.
    FileFormatError names the file, the key, and what is allowed.
    """
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"{path} is not valid TOML: {error}") from None
    top = _parse_all(path, "", content, TOP_KEYS)
    given = _parse_all(path, " in [input]", top.get("input", {}), INPUT_KEYS)
    output = _parse_all(path, " in [output]", top.get("output", {}), OUTPUT_KEYS)
    if model is not None and top.get("model", model.name) != model.name:
        return Preprocessing()
    if given.get("tokenizer", "words") != "words":
        given["tokenizer"] = str(path.parent / given["tokenizer"])
    if "vocabulary" in given:
        given["vocabulary"] = str(path.parent / given["vocabulary"])
    if "labels" in output and "labels_file" in output:
        raise FileFormatError(f"{path}: [output] has both 'labels' and 'labels_file'; keep one")
    labels = output.get("labels")
    if "labels_file" in output:
        labels = read_labels(path.parent / output["labels_file"])
    return Preprocessing(**given, output=output.get("name"), labels=labels, sources=(str(path),))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _hf_size(path: Path, key: str, value: Any, *, shortest: bool) -> tuple[tuple[int, int], str]:
    """A size in one of Hugging Face's forms, as height, width and way of resizing."""
    if isinstance(value, int):
        value = {"shortest_edge": value} if shortest else {"height": value, "width": value}
    match value:
        case {"height": height, "width": width, **rest} if not rest:
            pair, resize = [height, width], "exact"
        case {"shortest_edge": edge, **rest} if not rest:
            pair, resize = [edge, edge], "shortest"
        case _:
            raise FileFormatError(
                f"{path}: {key} {value!r} is not height and width, nor shortest_edge; "
                f"write the preprocessing into an {CONFIG_NAME} beside the model"
            )
    return _parsed(path, key, pair, _pair), resize


def _hf_image(path: Path) -> dict[str, Any]:
    config = _json(path)
    if not config.keys() & {"size", "crop_size", "image_mean", "do_rescale"}:
        return {}  # a feature extractor for audio, not for pictures
    setting: dict[str, Any] = {"kind": "image", "sources": (str(path),)}
    crops = config.get("do_center_crop", False)
    if "size" in config and config.get("do_resize", True):
        fraction = config.get("crop_pct")  # ConvNeXT's
        shortest = bool(crops or fraction)  # what a bare number means
        size, resize = _hf_size(path, "size", config["size"], shortest=shortest)
        if fraction and resize == "shortest":
            if size[0] < 384:  # below this, it resizes to more than it cuts out
                setting["crop"] = size
                size = (int(size[0] / _parsed(path, "crop_pct", fraction, _nonzero)),) * 2
            else:
                resize = "exact"
        setting |= {"size": size, "resize": resize}
        filters = (0, 3, 1, 3, 1, 1)  # Pillow's nearest, Lanczos, bilinear, bicubic, box, Hamming
        resample = _one_of(*range(len(filters)))
        setting["order"] = filters[_parsed(path, "resample", config.get("resample", 2), resample)]
    if crops:
        setting["crop"], _ = _hf_size(path, "crop_size", config.get("crop_size"), shortest=False)
    numbers = {"scale": "rescale_factor"} if config.get("do_rescale", True) else {}
    if config.get("do_normalize", "image_mean" in config):
        numbers |= {"mean": "image_mean", "std": "image_std"}
    for key, named in numbers.items():
        value = config.get(named, 1 / 255 if key == "scale" else None)
        setting[key] = _parsed(path, named, value, INPUT_KEYS[key])
    if config.get("do_flip_channel_order"):
        setting["channels"] = "BGR"
    return {"scale": 1.0, **setting}


def _hf_labels(path: Path) -> tuple[str, ...] | None:
    names = _json(path).get("id2label")
    if names is None:
        return None
    try:
        return tuple(str(names[str(i)]) for i in range(len(names)))
    except (KeyError, TypeError):
        raise FileFormatError(f"{path}: id2label {names!r} must map 0, 1, ... to names") from None


def from_huggingface(folder: Path) -> Preprocessing:
    """What Hugging Face's sidecar files in ``folder`` say; nothing where there are none.

    Reads ``preprocessor_config.json`` (pictures), ``id2label`` in ``config.json``, and notes a
    ``tokenizer.json``. Pillow's filters become splines of the nearest order with antialiasing:
    pixels differ by a few grey values from Hugging Face's own.
    """
    image, config, tokenizer = (
        folder / name for name in ("preprocessor_config.json", "config.json", "tokenizer.json")
    )
    found = Preprocessing(**_hf_image(image)) if image.is_file() else Preprocessing()
    if config.is_file() and (labels := _hf_labels(config)):
        found = replace(found, labels=labels, sources=(*found.sources, str(config)))
    if tokenizer.is_file():
        found = replace(found, tokenizer=str(tokenizer), sources=(*found.sources, str(tokenizer)))
    return found


def find_preprocessing(
    model: str | Path, flags: Preprocessing | None = None, config: str | Path | None = None
) -> Preprocessing:
    """Everything that is said about the inputs and labels of the model file ``model``.

    Flags go before an ``onnxplain.toml`` (``config``, or the one beside the model), setting by
    setting. A toml's [input] replaces Hugging Face's picture settings as a whole, so that a crop
    of theirs is never mixed into it; its labels replace theirs.
    """
    model = Path(model)
    beside = model.parent / CONFIG_NAME
    if config is not None:
        toml = from_toml(Path(config))
    else:
        toml = from_toml(beside, model) if beside.is_file() else Preprocessing()
    found = from_huggingface(model.parent)
    if any(getattr(toml, key) is not None for key in INPUT_KEYS):
        found = Preprocessing(labels=found.labels)
    return (flags or Preprocessing()).over(toml).over(found)


# --- guess --------------------------------------------------------------------------------------


def guess(spec: InputSpec) -> Preprocessing:
    """What the shape and dtype of a model input suggest.

    Four axes, one of them 1 or 3 channels: a picture, NCHW before NHWC. Three axes: a series, time
    before channels. Two: a table, or token ids where they are integers. Anything else: nothing.
    """
    shape = shape_of(spec)
    if len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3)):
        return Preprocessing(kind="image", layout="NCHW" if shape[1] in (1, 3) else "NHWC")
    if len(shape) == 3:
        return Preprocessing(kind="series", layout="NLC")
    if len(shape) == 2:
        return Preprocessing(kind="text" if _whole(spec) else "table")
    return Preprocessing()


def _whole(spec: InputSpec) -> bool:
    return dtype_of(spec).kind in "iu"


def resolve(given: Preprocessing, spec: InputSpec) -> Preprocessing:
    """``given`` completed for the model input ``spec``, and checked against it.

    A picture gets the size that the model fixes, and values of 0..1 (0..255 for an integer input,
    or where a mean above 1 or a std above 2 can only be of such values). InputError where
    settings contradict each other or the model.
    """
    done = given.over(guess(spec))
    if done.kind != "image":
        return done
    shape = shape_of(spec)
    if done.layout not in ("NCHW", "NHWC") or len(shape) != 4:
        raise InputError(
            f"input {spec.name!r} of shape {list(shape)} can't take a picture as it is: "
            "say --layout NCHW or NHWC, or another --kind"
        )
    count = shape[done.layout.index("C")]
    channels = done.channels or ("L" if count == 1 else "RGB")
    if isinstance(count, int) and count != len(channels):
        raise InputError(
            f"input {spec.name!r} has {count} channels in layout {done.layout}, but channels are "
            f"{channels}: say --layout or --channels"
        )
    mean, std = done.mean or (0.0,), done.std or (1.0,)
    if {len(mean), len(std)} - {1, len(channels)}:
        raise InputError(f"mean {list(mean)} and std {list(std)} don't fit the channels {channels}")
    most, widest = max(map(abs, mean)), max(map(abs, std))
    bytewise = _whole(spec) or most > 1 or widest > 2
    scale = done.scale or (1.0 if bytewise else 1 / 255)
    if most > 255 * abs(scale):
        log.warning(
            "a mean of %g lies outside the picture's values, which the scale %g takes to 0..%g; "
            "a mean of 0..255 goes with scale 1",
            *(most, scale, 255 * scale),
        )
    fixed = tuple(shape[done.layout.index(axis)] for axis in "HW")
    known = fixed if all(isinstance(n, int) for n in fixed) else None
    resize = done.resize or "exact"
    return replace(
        done,
        channels=channels,
        size=done.size or known,
        crop=done.crop or (known if resize == "shortest" else None),
        resize=resize,
        order=1 if done.order is None else done.order,
        scale=scale,
        mean=mean,
        std=std,
    )
