"""One family of typed errors: each says what was given, why it can't be, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OnnxplainError(Exception):
    """Base of every error that onnxplain raises on purpose."""


class ModelError(OnnxplainError):
    """The model file or graph can't be used: missing, empty, truncated, malformed or unsafe."""


class UnsupportedModelError(ModelError):
    """The model is well-formed, but something in it can't be explained."""


class ExternalDataError(ModelError):
    """External weights are missing, too short, or point outside the model's folder."""


class InputError(OnnxplainError, ValueError):
    """An input, baseline or option has the wrong shape, dtype, rank, name or value."""


class TargetError(InputError):
    """The target does not select one output value per example."""


class LayerError(InputError):
    """A layer name is unknown, ambiguous, or not connected to the output."""


class NeuronError(InputError):
    """The neuron selector does not fit the layer's shape."""


class NotDifferentiableError(UnsupportedModelError):
    """No differentiable path joins the explained value and what it is explained by."""


class NoRuleError(UnsupportedModelError):
    """An operator on the path has no derivative rule."""


class RuntimeMissingError(OnnxplainError, ImportError):
    """onnxruntime is not installed."""


class OutOfMemoryError(OnnxplainError, MemoryError):
    """Even one example does not fit the memory allowed."""


class EvaluationError(OnnxplainError, RuntimeError):
    """The explained function failed part-way: it raised, or gave NaN or a wrong shape.

    Attributes:
        partial: the attributions of what was computed until then, in the user's form; None where
            there are none.
        samples: how many samples these are of.
    """

    def __init__(self, message: str, *, partial: Any = None, samples: int = 0) -> None:
        super().__init__(message)
        self.partial = partial
        self.samples = samples


@contextmanager
def failing(name: str) -> Iterator[None]:
    """What a user's function raises inside becomes an EvaluationError that says which it was."""
    try:
        yield
    except OnnxplainError:
        raise
    except Exception as error:
        raise EvaluationError(f"{name} raised {type(error).__name__}: {error}") from error


class IncompleteWarning(UserWarning):
    """The computation was interrupted: the attributions are those of the samples until then."""


class FileFormatError(InputError):
    """An input, configuration or explanation file can't be read as what it should be."""
