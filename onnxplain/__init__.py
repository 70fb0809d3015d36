"""onnxplain explains any model that exports to ONNX, on onnxruntime."""

from onnxplain import _version
from onnxplain.blackbox import BlackBox
from onnxplain.errors import (
    EvaluationError,
    ExternalDataError,
    FileFormatError,
    IncompleteWarning,
    InputError,
    LayerError,
    ModelError,
    NeuronError,
    NoRuleError,
    NotDifferentiableError,
    OnnxplainError,
    OutOfMemoryError,
    RuntimeMissingError,
    TargetError,
    UnsupportedModelError,
)
from onnxplain.explain import explain
from onnxplain.methods import *  # noqa: F403
from onnxplain.methods import __all__ as _methods
from onnxplain.methods import registry as methods
from onnxplain.model import Model, differentiate
from onnxplain.perturb.maskers import Background
from onnxplain.result import Display, Explanation, load_explanation
from onnxplain.rules import lrp

__version__ = _version.VERSION

__all__ = [
    "Background",
    "BlackBox",
    "Display",
    "EvaluationError",
    "Explanation",
    "ExternalDataError",
    "FileFormatError",
    "IncompleteWarning",
    "InputError",
    "LayerError",
    "Model",
    "ModelError",
    "NeuronError",
    "NoRuleError",
    "NotDifferentiableError",
    "OnnxplainError",
    "OutOfMemoryError",
    "RuntimeMissingError",
    "TargetError",
    "UnsupportedModelError",
    "differentiate",
    "explain",
    "load_explanation",
    "lrp",
    "methods",
]
__all__ += _methods
