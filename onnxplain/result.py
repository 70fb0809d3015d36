"""Explanation: what a method found, under which names, and where it came from. Computes nothing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from onnxplain.errors import FileFormatError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Form = Literal["array", "tuple", "dict"]
Kind = Literal["image", "table", "text", "series", "array"]
Layout = Literal["NCHW", "NHWC", "NCL", "NLC"]

_FORMAT, _VERSION = "onnxplain-explanation", 2  # 2: standard errors, features
_FIGURE_SUFFIXES = (".png", ".svg", ".pdf", ".html")


@dataclass(kw_only=True, eq=False)
class Display:
    """What it takes to show an input to a person.

    kind: how to draw; "array" leaves it to the shape.
    layout: NCHW or NHWC for images, NCL or NLC (channels, length) for series; None: by the shape.
    images: uint8 [N, H, W, 3] or [N, H, W], the user's picture cut and sized as the model saw it.
    feature_names: one per column of a table, or per channel of a series.
    values: [N, ...] as the user knows them, before preprocessing.
    tokens: one list per example.
    names: what to call each example, such as its file; "" where it has no name.
    input_name: the model input that all this is about.
    """

    kind: Kind
    layout: Layout | None = None
    images: np.ndarray | None = None
    feature_names: list[str] | None = None
    values: np.ndarray | None = None
    tokens: list[list[str]] | None = None
    names: list[str] | None = None
    input_name: str | None = None

    def __post_init__(self) -> None:
        if self.images is not None and (
            self.images.dtype != np.uint8
            or not (self.images.ndim == 3 or (self.images.ndim == 4 and self.images.shape[3] == 3))
        ):
            raise InputError(
                f"display.images is {self.images.dtype} {list(self.images.shape)}: pictures to"
                " show are uint8 [N, H, W, 3] or [N, H, W]"
            )
        if self.values is not None and self.values.dtype.hasobject:  # a table of mixed columns
            self.values = self.values.astype(str)


@dataclass(kw_only=True, eq=False)
class Explanation:
    """The attributions of N examples, with what it takes to read, check and show them.

    method: e.g. "integrated-gradients".
    inputs: model-ready inputs by name, first axis examples.
    arrays: attributions by input or layer name, [N, ...] ([1, ...] for a batch-wide output).
    form: how the user passed the inputs; `attributions` comes in the same form.
    prediction: [N, ...], the explained output.
    target: int [N], or [N, k] to index the k non-example axes of `prediction`; None: it has none.
    labels: class names, as many as one non-example axis of `prediction` is long.
    layer: the layer that was explained, None for the inputs.
    options: the method's options, JSON-able.
    checks: by name, one row per example (or per example and sample).
    standard_errors: of attributions that are estimates, by their names and of their shapes.
    features: which values are one feature, where they were switched off together: integers by the
        names of attributions, [1|N, ...] that broadcast to these.
    provenance: model path, digest, versions, providers, baselines; what the caller added.
    display: how to show the inputs; None: by their shape.

    Raises InputError where these do not fit together.
    """

    method: str
    inputs: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    form: Form = "array"
    prediction: np.ndarray
    target: np.ndarray | None = None
    labels: list[str] | None = None
    layer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, np.ndarray] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    display: Display | None = None
    standard_errors: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = _plain(self.options)
        shape = self.prediction.shape
        if self.form not in ("array", "tuple", "dict"):
            raise InputError(f"form {self.form!r} is none of 'array', 'tuple', 'dict'")
        if not self.arrays or (self.form == "array" and len(self.arrays) > 1):
            raise InputError(f"{len(self.arrays)} attribution arrays do not make form {self.form}")
        if not shape:
            raise InputError("prediction is a scalar: its first axis must count the examples")
        for name, array in self.arrays.items():
            if array.ndim == 0 or array.shape[0] not in (1, len(self)):
                raise InputError(
                    f"attributions of {name!r} have shape {list(array.shape)} for {len(self)}"
                    f" examples: their first axis must be {len(self)} or 1"
                )
        for name, array in self.standard_errors.items():
            if name not in self.arrays or array.shape != self.arrays[name].shape:
                raise InputError(
                    f"standard errors of {name!r} have shape {list(array.shape)}, and there are no"
                    " attributions of that name and shape"
                )
        for name, array in self.features.items():
            shape_of = self.arrays[name].shape if name in self.arrays else ()
            fits = [m in (1, n) for m, n in zip(array.shape, shape_of, strict=False)]
            if array.ndim != len(shape_of) or not all(fits):
                raise InputError(
                    f"features of {name!r} have shape {list(array.shape)}, and there are no"
                    " attributions of that name that they broadcast to"
                )
        if self.target is not None:
            index = self.target if self.target.ndim == 2 else self.target[..., None]
            expected = (len(self), len(shape) - 1)
            if (
                index.dtype.kind not in "iu"
                or index.shape != expected
                or not ((index >= 0) & (index < shape[1:])).all()
            ):
                raise InputError(
                    f"target is {index.dtype} {list(self.target.shape)}: an output of shape"
                    f" {list(shape)} takes integers {list(expected)} within its non-example axes"
                )
        names = self.display.names if self.display else None
        if names is not None and len(names) != len(self):
            raise InputError(f"{len(names)} display.names for {len(self)} examples: give one each")
        if self.labels is not None and len(self.labels) not in shape[1:]:
            raise InputError(
                f"{len(self.labels)} labels do not fit an output of shape {list(shape)}:"
                " pass one per class"
            )

    def __len__(self) -> int:
        """How many examples are explained."""
        return int(self.prediction.shape[0])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(a.shape)}" for name, a in self.arrays.items())
        return f"Explanation({self.method}, {len(self)} examples, attributions {{{shapes}}})"

    @property
    def attributions(self) -> np.ndarray | tuple[np.ndarray, ...] | dict[str, np.ndarray]:
        """The attributions in the form in which the inputs were given."""
        if self.form == "dict":
            return self.arrays
        values = tuple(self.arrays.values())
        return values[0] if self.form == "array" else values

    def target_index(self, example: int = 0) -> tuple[int, ...] | None:
        """The explained position in `prediction[example]`; None if the target is None."""
        if self.target is None:
            return None
        return tuple(int(i) for i in np.atleast_1d(self.target[example]))

    def value(self, example: int = 0) -> float | None:
        """The explained output; None if the target is None and there are several."""
        row, index = self.prediction[example], self.target_index(example)
        if index is not None:
            return float(row[index])
        return float(row.item()) if row.size == 1 else None

    def label(self, index: tuple[int, ...] | None) -> str | None:
        """The class name of a position in one example's prediction, where there is one."""
        if self.labels is None or index is None:
            return None
        return self.labels[index[self.prediction.shape[1:].index(len(self.labels))]]

    def name(self, example: int = 0) -> str:
        """What the example is called, such as its file; "" where that is not known."""
        return self.display.names[example] if self.display and self.display.names else ""

    def top(self, example: int = 0, k: int = 5) -> list[tuple[tuple[int, ...], float]]:
        """The k highest values of one example's prediction as (index, value), highest first."""
        row = self.prediction[example]
        order = np.argsort(-row.ravel().astype(np.float64), kind="stable")[:k]
        indices = (tuple(int(i) for i in np.unravel_index(flat, row.shape)) for flat in order)
        return [(index, float(row[index])) for index in indices]

    def row(self, name: str, example: int = 0) -> np.ndarray:
        """One example's attributions, without the examples axis."""
        return self._row(self.arrays[name], example)

    def error_row(self, name: str, example: int = 0) -> np.ndarray | None:
        """One example's standard errors, as `row`; None where the attributions are no estimates."""
        found = self.standard_errors.get(name)
        return None if found is None else self._row(found, example)

    def feature_row(self, name: str, example: int = 0) -> np.ndarray | None:
        """The feature of each of one example's values; None where each is a feature of its own."""
        row, found = self.row(name, example), self.features.get(name)
        if found is None:
            return None
        return np.broadcast_to(found[example if len(found) == len(self) else 0], row.shape)

    def _row(self, array: np.ndarray, example: int) -> np.ndarray:
        return np.asarray(array[example if array.shape[0] == len(self) else 0])

    def check_row(self, name: str, example: int = 0) -> np.ndarray:
        """One example's values of a check: one, or one per sample; empty if it has no examples."""
        value = np.asarray(self.checks[name])
        per_example = value.size % len(self) == 0 and value.ndim > 0
        return value.reshape(len(self), -1)[example] if per_example else value[:0]

    def summary(self, top: int = 5) -> dict[str, Any]:
        """What was found, as a JSON-able dict without the full arrays.

        For each example: target, label and explained value, the `top` highest predictions, the
        checks, and per array the `top` largest attributions by absolute value, with their standard
        errors where they are estimates, and the sum of all. Values that are one feature count once.
        Non-finite numbers are the strings "nan", "inf", "-inf".
        """
        found: dict[str, Any] = _plain(
            {
                "method": self.method,
                "layer": self.layer,
                "options": self.options,
                "provenance": self.provenance,
                "inputs": {name: list(x.shape) for name, x in self.inputs.items()},
                "examples": [self._example(i, top) for i in range(len(self))],
            }
        )
        return found

    def _example(self, example: int, top: int) -> dict[str, Any]:
        index = self.target_index(example)
        return {
            "name": self.name(example),
            "target": _one_or_all(index),
            "label": self.label(index),
            "value": self.value(example),
            "prediction": [
                {"index": _one_or_all(i), "label": self.label(i), "value": value}
                for i, value in self.top(example, top)
            ],
            "checks": {name: _one_or_all(self.check_row(name, example)) for name in self.checks},
            "attributions": {name: self._ranking(name, example, top) for name in self.arrays},
        }

    def _ranking(self, name: str, example: int, top: int) -> dict[str, Any]:
        row, errors = self.row(name, example), self.error_row(name, example)
        ids = self.feature_row(name, example)
        if ids is not None:
            numbers, first, sizes = np.unique(ids, return_index=True, return_counts=True)
            row, errors = row.ravel()[first], None if errors is None else errors.ravel()[first]

        def entry(i: tuple[int, ...]) -> dict[str, Any]:
            place = {"index": _one_or_all(i)}
            if ids is not None:
                place = {"feature": numbers[i], "size": sizes[i]}
            error = {} if errors is None else {"standard_error": errors[i]}
            return {**place, "value": row[i], **error}

        found = [entry(i) for i in strongest(row, top)]
        return {"sum": row.sum(dtype=np.float64), "top": found}

    def to_json(self, top: int = 5, indent: int | None = 2) -> str:
        """`summary` as JSON text."""
        return json.dumps(self.summary(top), indent=indent, ensure_ascii=False, allow_nan=False)

    def plot(
        self, path: str | os.PathLike[str] | None = None, example: int = 0, **options: Any
    ) -> Figure:
        """Draw one example and, given a path, save it as PNG, SVG, PDF or HTML by its suffix.

        options go to the view of this kind of input, e.g. `percentile=99` for images.
        Raises InputError for an unknown suffix, example or option value, or NaN attributions.
        """
        from onnxplain import view  # views read results, not the other way round

        suffix = Path(path).suffix.lower() if path is not None else None
        if suffix is not None and suffix not in _FIGURE_SUFFIXES:
            raise InputError(
                f"can't draw to {os.fspath(path or '')!r}: the suffix must be one of"
                f" {', '.join(_FIGURE_SUFFIXES)}"
            )
        figure = view.figure(self, example, **options)
        if path is not None and suffix == ".html":
            page = view.html(self, example, **options).encode()
            _write_atomically(path, lambda file: file.write(page))
        elif path is not None and suffix is not None:
            _write_atomically(path, lambda file: figure.savefig(file, format=suffix[1:]))
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one .npz file, without pickle; a file already there is replaced
        only once the new one is complete. Raises InputError where that can't be done."""
        members = dict(self._members())
        for name, array in members.items():
            if array.dtype.kind not in "biufcSU":
                raise InputError(
                    f"{name} has dtype {array.dtype}, which .npz can't hold without pickle:"
                    " convert it to numbers or fixed-width strings"
                )
        members["metadata"] = np.frombuffer(json.dumps(self._metadata()).encode(), np.uint8)
        _write_atomically(path, lambda file: np.savez(file, **members))  # type: ignore[arg-type]

    def _members(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every array under its name in the file: numbered, as layer names are not file names."""
        for group in _GROUPS:
            for i, array in enumerate(getattr(self, group).values()):
                yield f"{group}/{i}", np.asarray(array)
        for owner, prefix in ((self, ""), (self.display, "display/")):
            for name in _ARRAYS[type(owner)] if owner is not None else ():
                if getattr(owner, name) is not None:
                    yield prefix + name, getattr(owner, name)

    def _metadata(self) -> dict[str, Any]:
        def texts(owner: Explanation | Display) -> dict[str, Any]:
            skip = (*_GROUPS, *_ARRAYS[type(owner)], "display")
            return {f.name: getattr(owner, f.name) for f in fields(owner) if f.name not in skip}

        return {
            "format": _FORMAT,
            "version": _VERSION,
            "names": {group: list(getattr(self, group)) for group in _GROUPS},
            "explanation": texts(self),
            "display": texts(self.display) if self.display else None,
        }


_GROUPS = ("inputs", "arrays", "checks", "standard_errors", "features")
_ARRAYS: dict[type, tuple[str, ...]] = {
    Explanation: ("prediction", "target"),
    Display: ("images", "values"),
}


def load_explanation(path: str | os.PathLike[str]) -> Explanation:
    """Read what `Explanation.save` wrote; the arrays come back bit by bit.

    Raises FileFormatError if the file is missing, truncated, damaged, not an explanation, or
    written in a newer format. Nothing in the file is executed.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileFormatError(f"no explanation file at {name!r}: check the path")
    try:
        if not zipfile.is_zipfile(name):
            raise FileFormatError(
                f"{name!r} is not a complete .npz file: it was cut short or is something else;"
                " save the explanation again"
            )
        with np.load(name, allow_pickle=False) as file:
            if "metadata" not in file:
                raise FileFormatError(
                    f"{name!r} is an .npz file, but not an explanation: pass a file that"
                    " Explanation.save wrote"
                )
            metadata = json.loads(file["metadata"].tobytes())
            if metadata["format"] != _FORMAT or metadata["version"] > _VERSION:
                raise FileFormatError(
                    f"{name!r} has format {metadata['format']!r} version {metadata['version']};"
                    f" this onnxplain reads {_FORMAT!r} up to version {_VERSION}: upgrade onnxplain"
                )
            return _from_file(metadata, {key: file[key] for key in file.files})
    except FileFormatError:
        raise
    except (
        *(OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError),
        *(ValueError, KeyError, TypeError, AttributeError),  # pickles; metadata of another shape
    ) as error:
        raise FileFormatError(
            f"{name!r} can't be read as an explanation ({type(error).__name__}: {error}):"
            " it is damaged or was not written by Explanation.save"
        ) from error


def _from_file(metadata: dict[str, Any], members: dict[str, np.ndarray]) -> Explanation:
    groups: dict[str, Any] = {
        group: {name: members[f"{group}/{i}"] for i, name in enumerate(names)}
        for group, names in metadata["names"].items()
    }
    display = None
    if metadata["display"]:
        pictures: dict[str, Any] = {
            name: members.get(f"display/{name}") for name in _ARRAYS[Display]
        }
        display = Display(**metadata["display"], **pictures)
    return Explanation(
        **metadata["explanation"],
        **groups,
        prediction=members["prediction"],
        target=members.get("target"),
        display=display,
    )


def strongest(array: np.ndarray, k: int) -> list[tuple[int, ...]]:
    """Where the k largest absolute values are, largest first; of equals, the first. NaN is inf."""
    size = np.abs(array.ravel().astype(np.float64))
    size[np.isnan(size)] = np.inf
    least = np.partition(size, size.size - k)[size.size - k] if 0 < k < size.size else 0.0
    chosen = np.flatnonzero(size >= least)
    order = chosen[np.argsort(-size[chosen], kind="stable")][:k]
    return [tuple(int(i) for i in np.unravel_index(flat, array.shape)) for flat in order]


def _one_or_all(values: Any) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _plain(value: Any) -> Any:
    """The same in JSON's own types: tuples and arrays as lists, non-finite numbers as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)  # a callback, say: what it was is on record, and no result is lost for it


def _write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the file and rename, so that an error leaves what was there before."""
    final = Path(os.path.realpath(path))
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"can't write {os.fspath(path)!r}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
