"""Inputs as the user names them (files, texts) to arrays as the model takes them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError, InputError
from ..result import Display
from .files import check_file, read_csv, read_npy, read_npz, read_text
from .image import picture, prepare
from .preprocessing import InputSpec, Preprocessing, dtype_of, resolve, shape_of
from .text import encode, token_names

_ARRAYS = (".npy", ".npz", ".csv")


@dataclass(frozen=True, slots=True)
class Sample:
    """Model-ready ``arrays`` by input name, first axis examples, and how to show the main one.

    ``setting`` is what the main one was made with, every default filled in.
    """

    arrays: dict[str, np.ndarray]
    display: Display
    setting: Preprocessing


def load_input(
    source: str | Path, model_input: InputSpec, preprocessing: Preprocessing | None = None
) -> Sample:
    """``load_inputs`` for one source and a model with one input."""
    return load_inputs([source], [model_input], preprocessing)


def load_inputs(
    sources: Sequence[str | Path],
    model_inputs: Sequence[InputSpec],
    preprocessing: Preprocessing | None = None,
) -> Sample:
    """Read every input of a model.

    A source is an image, a ``.npy``, ``.npz`` or ``.csv`` file, or, for an input of kind text, a
    ``.txt`` file or the text itself. ``name=source`` says which input it is for; without a name it
    is for the main one (``preprocessing.name``, or the first). Several sources for one input are
    one batch. A ``.npz`` fills the inputs that its arrays are named after. Text fills
    ``attention_mask`` and ``token_type_ids`` too, where the model has them.

    Images are preprocessed; arrays and tables are taken as the model takes them. An array without
    the examples axis (one axis short) gets it in front. Numbers are cast to the input's dtype if
    it can hold them.

    Raises FileFormatError (a file is missing, damaged or of another kind) or InputError (values
    that don't fit the input), naming both.
    """
    given = preprocessing or Preprocessing()
    specs = {spec.name: spec for spec in model_inputs}
    if not specs:
        raise InputError("the model has no inputs, so there is nothing to explain its output by")
    main = given.name or ("input_ids" if "input_ids" in specs else next(iter(specs)))
    if main not in specs:
        where = f" (in {given.sources[0]})" if given.sources else ""
        raise FileFormatError(
            f"the preprocessing{where} is for an input {main!r}; the model has {', '.join(specs)}"
        )
    settings = {
        name: resolve(given if name == main else Preprocessing(), spec)
        for name, spec in specs.items()
    }
    wanted: dict[str, list[Any]] = {}
    for source in sources:
        name, _, rest = str(source).partition("=")
        stray = name not in specs and re.fullmatch(r"[^\s/]+", name) and not os.path.exists(source)
        if stray and (os.path.isfile(rest) or (rest and settings[main].kind != "text")):
            raise InputError(f"{name} is no input of the model (inputs: {', '.join(specs)})")
        if name in specs and rest:
            item = _from_npz(rest, [name])[name] if _is_npz(rest) else rest
            wanted.setdefault(name, []).append(item)
        elif _is_npz(source):
            for name, array in _from_npz(source, list(specs)).items():
                wanted.setdefault(name, []).append(array)
        else:
            wanted.setdefault(main, []).append(source)

    arrays: dict[str, np.ndarray] = {}
    displays: dict[str, Display] = {}
    for name, items in wanted.items():
        said = given if name == main else Preprocessing()
        loaded, displays[name] = _load(items, specs[name], settings[name], said)
        for key in loaded.keys() & (specs.keys() - (wanted.keys() - {name})):
            arrays[key] = fit(loaded[key], specs[key], f"the {key} of the text")
    if missing := specs.keys() - arrays.keys():
        raise InputError(
            f"no value for {', '.join(sorted(missing))}: the model takes {', '.join(specs)}; "
            "give each as name=file, or all in one .npz"
        )
    shown = main if main in displays else next(iter(displays))
    return Sample({name: arrays[name] for name in specs}, displays[shown], settings[shown])


def _is_npz(source: str | Path) -> bool:
    return Path(source).suffix.lower() == ".npz"


def _from_npz(source: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_npz(Path(source))
    if found := {name: arrays[name] for name in names if name in arrays}:
        return found
    if len(names) == len(arrays) == 1:
        return {names[0]: next(iter(arrays.values()))}
    raise FileFormatError(
        f"{source} holds {', '.join(arrays)}, none of the inputs {', '.join(names)}; "
        "name its arrays after the inputs"
    )


def _load(
    items: Sequence[Any], spec: InputSpec, setting: Preprocessing, said: Preprocessing
) -> tuple[dict[str, np.ndarray], Display]:
    """The arrays that ``items`` give (text: its mask and segments too), and how to show them."""
    name = spec.name
    display = Display(kind=setting.kind or "array", input_name=name)  # type: ignore[arg-type]
    if setting.kind == "text" and all(_is_text(item) for item in items):
        encoded = encode([_text(item) for item in items], setting, setting.length or _fixed(spec))
        display.tokens = encoded.tokens
        display.names = [Path(i).name if str(i).endswith(".txt") else "" for i in items]
        arrays = {"attention_mask": encoded.mask, "token_type_ids": encoded.types}
        return {**arrays, name: encoded.ids}, display

    parts, names = [], setting.feature_names
    for item in items:
        array, header = _read(item, spec, setting)
        names = names or header
        parts.append(fit(array, spec, str(item) if isinstance(item, str | Path) else "the array"))
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise InputError(f"inputs of shapes {shapes} can't be one batch; say --size")
    array = np.concatenate(parts) if len(parts) > 1 else parts[0]
    display.names = [row for pair in zip(items, parts, strict=True) for row in _rows(*pair)]
    if setting.kind == "text" and array.ndim == 2:
        display.tokens = token_names(array, setting)
    if setting.kind == "image":
        display.layout = setting.layout  # type: ignore[assignment]
        # Without a word on the preprocessing, nobody knows what an array's values look like.
        if said.scale or said.mean or said.std or not any(map(_is_array, items)):
            display.images = picture(array, setting)
    elif setting.kind in ("table", "series"):
        display.layout = setting.layout if setting.kind == "series" else None  # type: ignore[assignment]
        if names and setting.kind == "table" and array.shape[1:] != (len(names),):
            raise InputError(
                f"{len(names)} feature names for input {name!r} of shape {list(array.shape)}"
            )
        display.values = array
        display.feature_names = list(names) if names else None
    return {name: array}, display


def _rows(item: Any, part: np.ndarray) -> list[str]:
    """What to call each example of one source: the file, and the row where it has several."""
    name = "" if isinstance(item, np.ndarray) else Path(item).name
    if part.ndim == 0 or len(part) == 1:
        return [name]
    return [f"{name} row {i + 1}".strip() for i in range(len(part))]


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray) or Path(item).suffix.lower() in _ARRAYS


def _is_text(item: Any) -> bool:
    return isinstance(item, str | Path) and not _is_array(item)


def _text(item: str | Path) -> str:
    if str(item).endswith(".txt"):
        return read_text(Path(item)).strip()
    if os.path.isfile(item):
        raise FileFormatError(
            f"{item} is a file, and not one for a text model, which takes a .txt, token numbers "
            "as .npy, .npz or .csv, or the text itself"
        )
    return str(item)


def _fixed(spec: InputSpec) -> int | None:
    shape = shape_of(spec)
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None


def _read(
    item: Any, spec: InputSpec, setting: Preprocessing
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The values of one source, and the column names that it has."""
    if isinstance(item, np.ndarray):
        return item, None
    path = Path(item)
    if path.suffix.lower() == ".npy":
        return read_npy(path), None
    if path.suffix.lower() == ".csv":
        table, header = read_csv(path)
        if setting.feature_names and header:
            table = _select(table, header, setting.feature_names, path)
        if setting.kind == "series":  # a row is a time step of the one example
            table = (table.T if setting.layout == "NCL" else table)[None]
        return table, header
    if setting.kind == "image":
        values = prepare(path, setting)
        return (values if dtype_of(spec).kind == "f" else np.rint(values)), None
    check_file(path)
    raise FileFormatError(
        f"{path}: input {spec.name!r} of shape {list(shape_of(spec))} takes "
        f"{setting.kind or 'an array'}; give {', '.join(_ARRAYS)}"
        + (" or say --layout NCHW or NHWC for pictures" if len(shape_of(spec)) == 4 else "")
    )


def _select(
    table: np.ndarray, header: tuple[str, ...], names: tuple[str, ...], path: Path
) -> np.ndarray:
    """The columns called ``names``, in that order; others, such as a label, are left out."""
    if missing := [name for name in names if name not in header]:
        raise FileFormatError(
            f"{path} has no column {', '.join(map(repr, missing))}; its header is "
            f"{', '.join(header)}"
        )
    return table[:, [header.index(name) for name in names]]


def fit(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """``array`` with the rank and dtype of ``spec``: an examples axis in front if one is short.

    InputError where the shape differs, nothing is left, or the dtype can't hold the values.
    """
    shape, dtype = shape_of(spec), dtype_of(spec)
    if spec.shape is None:
        shape = tuple(None for _ in array.shape)
    if array.ndim == len(shape) - 1:
        array = array[None]
    fixed = zip(shape[1:], array.shape[1:], strict=False)
    if not array.size:
        raise InputError(f"{where} is empty (shape {list(array.shape)}): it holds no example")
    if array.ndim != len(shape) or any(isinstance(n, int) and n != m for n, m in fixed):
        wanted = ", ".join(["N", *map(str, shape[1:])])
        raise InputError(
            f"{where} has shape {list(array.shape)}, but input {spec.name!r} takes [{wanted}]"
        )
    if array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
    # Rounding to a narrower float is what every exporter does; a changed integer is a wrong input.
    exact = dtype.kind in "biu"
    lost = cast != array if exact else ~np.isfinite(cast) & np.isfinite(array)
    if lost.any():
        value = array[tuple(np.argwhere(lost)[0])]
        raise InputError(
            f"{where} has the value {value}, which input {spec.name!r} of {dtype} can't hold"
        )
    return cast
