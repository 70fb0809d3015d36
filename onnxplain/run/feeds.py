"""What a user passes in, checked and named once, at the edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.emit import Dim, dims

Arrays = Any
"""One array, a tuple of arrays in model order, or a dict of arrays by input name."""


@dataclass(frozen=True)
class InputInfo:
    """An input or output of a model: name, dtype and shape with symbols."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None

    @staticmethod
    def of(value: ir.Value) -> InputInfo:
        """What a value of the graph is called and holds."""
        dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
        return InputInfo(value.name or "", dtype, dims(value) if value.shape is not None else None)

    def __str__(self) -> str:
        shape = (
            "?"
            if self.shape is None
            else ", ".join("?" if d is None else str(d) for d in self.shape)
        )
        return f"{self.name}: {self.dtype}[{shape}]"


@dataclass(frozen=True)
class Feeds:
    """Checked inputs by name; ``explained`` are those that get attributions, in order."""

    arrays: dict[str, np.ndarray]
    explained: tuple[str, ...]
    form: str
    count: int


def in_form(arrays: Mapping[str, Any], form: str) -> Any:
    """``array`` (the only one), ``tuple`` (in order) or ``dict``."""
    if form == "dict":
        return dict(arrays)
    return tuple(arrays.values()) if form == "tuple" else next(iter(arrays.values()))


def by_name(given: Arrays, names: Sequence[str], what: str) -> tuple[dict[str, Any], str]:
    """Name what was given; returns it with its form (array, tuple or dict)."""
    if isinstance(given, Mapping):
        unknown = [k for k in given if k not in names]
        if unknown:
            raise InputError(
                f"{what}: there is no input {unknown[0]!r}; the names are {', '.join(names)}"
            )
        return {name: given[name] for name in names if name in given}, "dict"
    if isinstance(given, tuple):
        if len(given) > len(names):
            raise InputError(
                f"{what}: {len(given)} arrays were given for {len(names)} input(s) "
                f"({', '.join(names)})"
            )
        return dict(zip(names, given, strict=False)), "tuple"
    if not names:
        raise InputError(f"{what}: no input is left to take an array")
    return {names[0]: given}, "array"


def check_inputs(
    infos: Sequence[ir.Value],
    axes: Mapping[str, int | None],
    inputs: Arrays,
    additional: Arrays = None,
) -> Feeds:
    """Name and check everything the model is fed.

    Args:
        infos: the model's inputs.
        axes: the examples axis of each input (None: shared by all examples).
        inputs: what is explained (one array, tuple in model order, dict).
        additional: the remaining inputs, fed and not attributed.

    Raises:
        InputError: a missing or unknown input, wrong dtype, rank or shape, NaN or infinity.
    """
    names = [v.name or "" for v in infos]
    arrays, form = by_name(inputs, names, "inputs")
    explained = tuple(arrays)
    if additional is not None:
        rest = [n for n in names if n not in arrays]
        if not isinstance(additional, Mapping | tuple):
            additional = (additional,)
        arrays = arrays | by_name(additional, rest, "additional_forward_args")[0]
    missing = [str(InputInfo.of(v)) for v in infos if v.name not in arrays]
    if missing:
        raise InputError(
            f"the model also needs {'; '.join(missing)}. Pass all inputs as a tuple or dict, or "
            "those that are not explained as additional_forward_args"
        )
    checked = {
        v.name or "": check_array(v, arrays[v.name or ""], axes.get(v.name or "")) for v in infos
    }
    count = _count(checked, axes)
    return Feeds(checked, explained, form, count)


def _count(arrays: Mapping[str, np.ndarray], axes: Mapping[str, int | None]) -> int:
    counts = {name: array.shape[0] for name, array in arrays.items() if axes.get(name) is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{k}: {v}" for k, v in counts.items())
        raise InputError(
            f"the inputs have different numbers of examples ({listed}); give the same number of "
            "rows for each, or declare a shared input with examples_axis={name: None}"
        )
    return next(iter(counts.values()), 1)


def check_array(
    value: ir.Value, given: Any, axis: int | None = None, what: str = "input"
) -> np.ndarray:
    """One input as an array of the model's dtype and a shape that fits, examples axis first.

    Args:
        value: the model's input.
        given: what the user gave.
        axis: the axis of it that counts examples, of any number; None: it has none.
        what: what it is called in errors.
    """
    info = InputInfo.of(value)
    where = f"{what} '{info.name}'"
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise InputError(
            f"{where}: can't be made an array ({error}); pass a numpy array"
        ) from error
    array = as_dtype(value, array, where)
    if info.shape is None:
        return array
    wanted: list[Dim] = list(info.shape)
    if axis is not None:
        wanted[:1] = []
        wanted.insert(axis, None)
    if array.ndim != len(wanted) or any(
        isinstance(d, int) and d != n for d, n in zip(wanted, array.shape, strict=True)
    ):
        shown = ", ".join(str(d) if isinstance(d, int) else "any" for d in wanted)
        hint = "; add an examples axis in front (x[None])" if array.ndim == len(wanted) - 1 else ""
        raise InputError(
            f"{where}: shape {list(array.shape)} was given, but the model takes [{shown}]{hint}"
        )
    return np.moveaxis(array, axis, 0) if axis else array


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    # A sum is not finite if a term isn't; it takes a fraction of the time of looking at each term.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def as_dtype(value: ir.Value, array: np.ndarray, where: str) -> np.ndarray:
    """An array of the dtype of a value; refuses what that can't hold."""
    assert value.dtype is not None
    wanted = value.dtype.numpy()
    kind = "string" if value.dtype == ir.DataType.STRING else wanted.kind
    if array.dtype == wanted:
        cast = array
    elif kind == "string":
        if array.dtype.kind not in "OUS":
            raise InputError(f"{where}: dtype {array.dtype} was given, but the model takes text")
        return array.astype(object)
    elif value.dtype.is_floating_point() and array.dtype.kind in "fiub":
        with np.errstate(over="ignore"):
            cast = array.astype(wanted)
    elif kind in "iub" and array.dtype.kind in "iub":
        cast = array.astype(wanted)
        if not np.array_equal(cast, array):
            raise InputError(f"{where}: some values do not fit the model's {wanted}")
    else:
        raise InputError(
            f"{where}: dtype {array.dtype} was given, but the model takes {wanted}; convert it"
            " (x.astype) if that is what is meant"
        )
    if value.dtype.is_floating_point() and not all_finite(cast):
        bad = int(np.size(cast) - np.count_nonzero(np.isfinite(cast)))
        cause = (
            f"{bad} of its {np.size(cast)} values are NaN or infinite"
            if not np.isfinite(array).all()
            else f"{bad} of its values overflow the model's {wanted}"
        )
        raise InputError(
            f"{where}: {cause}; an explanation of them would mean nothing, so clean or impute them"
        )
    return cast
