"""onnxplain explains any model that exports to ONNX, on onnxruntime."""

from onnxplain import _version
from onnxplain.errors import (
    ExternalDataError,
    FileFormatError,
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
from onnxplain.methods import (
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    MethodInfo,
    NeuronGradient,
    NeuronIntegratedGradients,
    Saliency,
)
from onnxplain.methods import registry as methods
from onnxplain.model import Model, differentiate
from onnxplain.result import Display, Explanation, load_explanation

__version__ = _version.VERSION

__all__ = [
    "Display",
    "Explanation",
    "ExternalDataError",
    "FileFormatError",
    "InputError",
    "InputXGradient",
    "IntegratedGradients",
    "LayerActivation",
    "LayerError",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "MethodInfo",
    "Model",
    "ModelError",
    "NeuronError",
    "NeuronGradient",
    "NeuronIntegratedGradients",
    "NoRuleError",
    "NotDifferentiableError",
    "OnnxplainError",
    "OutOfMemoryError",
    "RuntimeMissingError",
    "Saliency",
    "TargetError",
    "UnsupportedModelError",
    "differentiate",
    "explain",
    "load_explanation",
    "methods",
]
