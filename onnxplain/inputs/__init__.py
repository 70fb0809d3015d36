"""Files to arrays: images, tables, text and series, with the preprocessing that a model expects."""

from .baselines import load_baselines
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
    "find_preprocessing",
    "load_baselines",
    "load_input",
    "load_inputs",
    "read_labels",
]
