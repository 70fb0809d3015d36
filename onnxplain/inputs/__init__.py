"""Files to arrays: images, tables, text and series, with the preprocessing that a model expects."""

from .baselines import load_baselines
from .features import default_windows, load_segmentation, load_segments, token_features
from .preprocessing import (
    CONFIG_NAME,
    INPUT_KEYS,
    InputSpec,
    Preprocessing,
    find_preprocessing,
    read_labels,
)
from .sample import Sample, load_input, load_inputs

__all__ = [
    "CONFIG_NAME",
    "INPUT_KEYS",
    "InputSpec",
    "Preprocessing",
    "Sample",
    "default_windows",
    "find_preprocessing",
    "load_baselines",
    "load_input",
    "load_inputs",
    "load_segmentation",
    "load_segments",
    "read_labels",
    "token_features",
]
