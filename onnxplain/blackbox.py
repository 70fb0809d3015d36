"""A Python function in place of a model: a remote endpoint, say, or a whole pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from onnxplain.errors import EvaluationError, InputError, LayerError
from onnxplain.graph.names import Layer
from onnxplain.run.feeds import Arrays, Feeds, InputInfo, all_finite, by_name
from onnxplain.run.program import Settings

OUTPUT = "output"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class BlackBox:
    """Any Python callable, explained by methods that only look at its answers.

    It stands where a :class:`Model` stands for the perturbation methods and ``ox.explain``; it has
    no layers and no gradient.

    Args:
        fn: takes arrays whose first axis counts rows (numbers, or text as object arrays), and
            returns an array [N] or [N, ...], or one number for the whole batch. Nothing else may
            depend on which rows are together in one call.
        names: names of its positional parameters, in order; default those of its signature. What
            is passed in a dict under another name reaches it as a keyword.
        batch_size: the most rows of one call; default as many as fit.
        labels: class names.
        memory_limit: bytes that this process may hold while it computes.

    Raises:
        InputError: ``fn`` is no callable, or an option does not fit.
    """

    has_examples = True
    fixed_batch = None
    path = None
    digest = ""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        names: Sequence[str] | None = None,
        batch_size: int | None = None,
        labels: Sequence[str] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if not callable(fn):
            raise InputError(f"a BlackBox is made of a function, not of {type(fn).__name__}")
        if isinstance(names, str) or (names is not None and len(set(names)) < len(names)):
            raise InputError(f"names is {names!r}: give one name for each positional parameter")
        for option, value in (("batch_size", batch_size), ("memory_limit", memory_limit)):
            if value is not None and value < 1:
                raise InputError(f"{option} must be positive, not {value}")
        self.fn = fn
        self.batch_size = batch_size
        self.labels = None if labels is None else list(labels)
        self.settings = Settings(memory_limit=memory_limit)
        self.axes: Mapping[str, int | None] = _FirstOfAll()
        self._names, self._needed, self._open = _parameters(fn, names)

    def __repr__(self) -> str:
        return f"BlackBox({self.name})"

    @property
    def name(self) -> str:
        """What the function calls itself."""
        return str(getattr(self.fn, "__qualname__", type(self.fn).__name__))

    # ---- what methods ask of a model ----------------------------------------------------------

    @property
    def inputs(self) -> tuple[InputInfo, ...]:
        """The positional parameters without a default; what they hold is not known."""
        return tuple(InputInfo(name, "unknown", None) for name in self._needed)

    @property
    def outputs(self) -> tuple[InputInfo, ...]:
        """The only output."""
        return (InputInfo(OUTPUT, "unknown", None),)

    @property
    def output(self) -> ir.Value:
        """The explained output: a value of unknown shape."""
        return ir.Value(name=OUTPUT, type=ir.TensorType(ir.DataType.DOUBLE))

    def layers(self) -> list[Layer]:
        """None: what happens inside is not known."""
        return []

    def resolve(self, layer: str, *, entering: bool = False) -> NoReturn:
        """Refuses: there are no layers.

        Raises:
            LayerError: always.
        """
        raise LayerError(
            f"{self!r} has no layer '{layer}': it is a Python function, of which only the answers "
            "are known; explain by the inputs, or export the model to ONNX and use ox.Model"
        )

    def feeds(self, inputs: Arrays, additional: Arrays = None) -> Feeds:
        """Check and name what the function is fed.

        Args:
            inputs: what is explained: an array or a tuple (its positional parameters), or a dict.
            additional: what it is fed besides.

        Raises:
            InputError: no arrays of the same number of rows, or NaN or infinity among them.
        """
        arrays, form = by_name(inputs, self._known(inputs), "inputs")
        explained = tuple(arrays)
        if additional is not None:
            if not isinstance(additional, Mapping | tuple):
                additional = (additional,)
            given = len(arrays) + len(additional)
            rest = [n for n in self._known(additional, given) if n not in arrays]
            arrays = arrays | by_name(additional, rest, "additional_forward_args")[0]
        checked = {name: _checked(name, array) for name, array in arrays.items()}
        counts = {name: len(array) for name, array in checked.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{k}: {v}" for k, v in counts.items())
            raise InputError(
                f"the inputs have different numbers of rows ({listed}); give the same number for "
                "each, and bind what all rows share to the function (functools.partial)"
            )
        return Feeds(checked, explained, form, next(iter(counts.values()), 0))

    def _known(self, given: Arrays, count: int | None = None) -> list[str]:
        """The names that arrays may have: the parameters', and those of a dict."""
        if count is None:
            count = len(given) if isinstance(given, tuple) else 1
        more = [f"input.{i}" for i in range(len(self._names), count)] if self._open else []
        keys = list(given) if isinstance(given, Mapping) else []
        return list(dict.fromkeys([*self._names, *more, *keys]))

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Call the function on any number of rows; {"output": array}."""
        return {OUTPUT: self.evaluate(self.feeds(inputs).arrays)}

    def evaluate(
        self,
        arrays: Mapping[str, np.ndarray],
        expected: tuple[int, ...] | None = None,
        at_once: bool | None = None,
    ) -> np.ndarray:
        """What the function answers to arrays by name, in pieces of ``batch_size`` rows.

        Args:
            arrays: [N, ...] each.
            expected: the shape of one row's answer, where that is known already.
            at_once: whether it answers one number for the whole batch, where that is known.

        Returns:
            Floating-point [N, ...], or [] for one number for the whole batch.

        Raises:
            EvaluationError: the function raised (chained), or answered something else.
        """
        count = len(next(iter(arrays.values())))
        size = self.batch_size or max(count, 1)
        at_once = False if count > size else at_once
        answers: list[np.ndarray] = []
        for start in range(0, max(count, 1), size):
            rows = slice(start, min(start + size, count))
            answer = self._one(arrays, rows, count)
            if at_once not in (None, not answer.ndim):
                raise EvaluationError(
                    f"{self!r} answered {'an array' if at_once else 'one number'} to rows "
                    f"{rows.start} to {rows.stop - 1} of {count}: return an answer for each row, "
                    "or always one number for the whole batch (and leave out batch_size)"
                )
            if expected not in (None, answer.shape[1:]):
                raise EvaluationError(
                    f"{self!r} answered {_listed(answer.shape[1:])} a row to rows {rows.start} to "
                    f"{rows.stop - 1} of {count}, and {_listed(expected)} before: each row's "
                    "answer must have the same shape"
                )
            expected = answer.shape[1:]
            answers.append(answer)
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def _one(self, arrays: Mapping[str, np.ndarray], rows: slice, count: int) -> np.ndarray:
        """One checked call."""
        # Copies, as functions may write on what they get, and use what they return again.
        part = {name: array[rows].copy() for name, array in arrays.items()}
        first = list(takewhile(part.__contains__, self._names))
        first += [name for name in part if name.startswith("input.")] if self._open else []
        where = f"rows {rows.start} to {rows.stop - 1} of {count}"
        try:
            answer = self.fn(
                *(part[name] for name in first),
                **{name: array for name, array in part.items() if name not in first},
            )
            found = np.array(answer)
        except Exception as error:
            shapes = ", ".join(f"{k}: {a.dtype} {list(a.shape)}" for k, a in part.items())
            raise EvaluationError(
                f"{self!r} raised {type(error).__name__} for {where} ({shapes}): {error}"
            ) from error
        if found.dtype.kind not in "biuf":
            raise EvaluationError(
                f"{self!r} answered {type(answer).__name__} of {found.dtype} to {where}: return "
                "an array of numbers, [N] or [N, ...]"
            )
        if found.ndim and len(found) != rows.stop - rows.start:
            raise EvaluationError(
                f"{self!r} answered shape {list(found.shape)} to {where}: its first axis must "
                f"count these {rows.stop - rows.start} rows; for one number for the whole batch, "
                "return a plain number"
            )
        found = found.astype(np.float64) if found.dtype.kind in "biu" else found
        # Some numbers of a row may be infinite (a class ruled out): those explained are looked at.
        bad = ~np.isfinite(found).reshape(len(found) if found.ndim else 1, -1).any(axis=1)
        if found.size and bad.any():
            places = rows.start + np.flatnonzero(bad)
            shown = ", ".join(map(str, places[:8])) + (", ..." if len(places) > 8 else "")
            raise EvaluationError(
                f"{self!r} answered NaN or infinity to row(s) {shown} of {count}: it must have a "
                "finite score for perturbed inputs too; catch it there, or take another baseline"
            )
        return found


class _FirstOfAll(dict[str, int | None]):
    """The examples axis of any input: the first."""

    def __missing__(self, name: str) -> int:
        return 0

    def get(self, name: str, default: Any = None) -> int:
        return 0


def _parameters(
    fn: Callable[..., Any], names: Sequence[str] | None
) -> tuple[list[str], list[str], bool]:
    """Names of positional parameters, of those without a default, and whether more are taken."""
    if names is not None:
        return list(names), list(names), False
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # written in C
        return [], [], True
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    return (
        [p.name for p in positional],
        [p.name for p in positional if p.default is p.empty],
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
    )


def _checked(name: str, given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise InputError(f"input '{name}' can't be made an array: {error}") from error
    if array.dtype.kind in "US":
        array = array.astype(object)
    if array.ndim == 0:
        raise InputError(
            f"input '{name}' is {given!r}, not an array with a row for each example; bind what all "
            "rows share to the function (functools.partial)"
        )
    if array.dtype.kind == "f" and not all_finite(array):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise InputError(
            f"input '{name}': {bad} of its {array.size} values are NaN or infinite; an explanation "
            "of them would mean nothing, so clean or impute them"
        )
    return array


def _listed(shape: tuple[int, ...]) -> str:
    return f"values of shape {list(shape)}" if shape else "one value"
