"""One compiled onnxruntime session for a graph."""

from __future__ import annotations

import functools
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import (
    InputError,
    ModelError,
    OnnxplainError,
    OutOfMemoryError,
    RuntimeMissingError,
    UnsupportedModelError,
)
from onnxplain.graph import shapes

log = logging.getLogger("onnxplain")

Feed = Any
"""An array, or an onnxruntime value on the device."""

Provider = str | tuple[str, Mapping[str, Any]]

# Weights above this size are handed to onnxruntime beside the graph, never inside its protobuf,
# which may not exceed 2 GiB.
_INLINE_BYTES = 1024

_SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# The memory that feeds and results of a provider can be bound in; the processor needs none.
_DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "ROCMExecutionProvider": "cuda",
}
# Providers worth taking without being asked, best first.
_PREFERRED = ("CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")

_MEMORY_WORDS = (
    "failed to allocate memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "cublas_status_alloc_failed",
    "available memory of",
)


@functools.cache
def runtime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        RuntimeMissingError: it is not installed; the message says what to install.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            "onnxruntime is not installed, and onnxplain runs models on it: install "
            'pip install "onnxplain[cpu]" (or "onnxplain[gpu]" for CUDA, never both)'
        ) from error
    return onnxruntime


def choose_providers(providers: Sequence[Provider] | None) -> list[Provider]:
    """onnxruntime's execution providers for a request, short names understood.

    Raises:
        InputError: a provider is not available in the installed onnxruntime.
    """
    available = runtime().get_available_providers()
    if providers is None:
        chosen: list[Provider] = [p for p in _PREFERRED if p in available] or list(available[:1])
        _say_once(chosen[0] if isinstance(chosen[0], str) else chosen[0][0])
        return chosen
    if isinstance(providers, str):
        providers = [providers]
    resolved: list[Provider] = []
    for provider in providers:
        given, options = (provider, None) if isinstance(provider, str) else provider
        name = _SHORT_NAMES.get(given.lower(), given)
        if name not in available:
            raise InputError(
                f"provider '{given}' is not available in the installed onnxruntime "
                f"(available: {', '.join(available)}); install the build that has it or choose "
                "another"
            )
        resolved.append(name if options is None else (name, options))
    if not resolved:
        raise InputError("providers is empty: name at least one, or leave it out for the best")
    return resolved


@functools.cache
def _say_once(provider: str) -> None:
    log.info("onnxplain runs on %s", provider)


class Session:
    """A graph compiled for onnxruntime; runs named arrays to named arrays.

    ``planned``: let the runtime plan all of a run's memory as one block. That is a few percent
    faster, and holds up to twice the memory: the block is kept beside the arena that the first run
    filled.
    """

    def __init__(
        self,
        model: ir.Model,
        providers: Sequence[Provider] | None = None,
        options: Any = None,
        *,
        planned: bool = True,
    ) -> None:
        chosen = choose_providers(providers)
        try:
            self._session = _compile(model, chosen, options, planned)
        except OnnxplainError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own for each status
            if _is_memory_error(error):
                raise OutOfMemoryError(f"onnxruntime could not load the graph: {error}") from error
            raise UnsupportedModelError(
                f"onnxruntime can't run this graph: {_first_line(error)}"
            ) from error
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]
        self.providers = self._session.get_providers()
        self.device = _DEVICES.get(self.providers[0])

    @property
    def on_cpu(self) -> bool:
        """Whether the graph runs on the processor, in the memory of this process."""
        return bool(self.providers[0] == "CPUExecutionProvider")

    def place(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Feed]:
        """Feeds that several runs share, copied to the device once where there is one."""
        if self.device is None:
            return dict(feeds)
        make = runtime().OrtValue.ortvalue_from_numpy
        return {
            name: make(np.ascontiguousarray(array), self.device, 0)
            for name, array in feeds.items()
            if name in self.inputs
        }

    def __call__(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str] | None = None,
        *,
        give_back: bool = False,
    ) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: arrays by input name, or what :meth:`place` made of them; others are ignored.
            outputs: names of the wanted outputs; None: all.
            give_back: return the memory that the runtime would keep for the next run.

        Raises:
            OutOfMemoryError: the device's memory does not suffice for these rows.
            ModelError: onnxruntime failed for another reason.
        """
        names = list(outputs or self.outputs)
        known = {k: v for k, v in feeds.items() if k in self.inputs}
        try:
            if self.device is None:
                options = _giving_back() if give_back else None
                results = self._session.run(names, known, options)
            else:
                results = self._run_bound(names, known)
        except Exception as error:
            if _is_memory_error(error):
                raise OutOfMemoryError(
                    f"onnxruntime ran out of memory: {_first_line(error)}"
                ) from error
            raise ModelError(f"onnxruntime failed while running: {_first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def _run_bound(self, names: Sequence[str], feeds: Mapping[str, Feed]) -> list[np.ndarray]:
        """Run with inputs and outputs on the device; only the outputs come back."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self.device, 0)
        self._session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())


def _giving_back() -> Any:
    options = runtime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_memory_error(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in _MEMORY_WORDS)


def _compile(model: ir.Model, providers: Sequence[Provider], options: Any, planned: bool) -> Any:
    ort = runtime()
    if options is not None:
        # Weights can only be handed over through session options, and the user's are not ours to
        # write on; so the model goes by a file, which may be of any size.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            unplanned = model.clone()
            for node in unplanned.graph:
                for value in node.outputs:
                    if not value.is_graph_output():
                        value.shape = None
            ir.save(unplanned, path, external_data="weights")
            return ort.InferenceSession(str(path), options, providers=providers)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what fails is raised as an error of ours
    settings.enable_mem_pattern = planned
    # The threads of a session spin for a while after a run and would slow down the next session's
    # (measured: the gradient of a ResNet-18 right after its forward pass, 170 instead of 140 ms).
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    proto, weights = _split_weights(model)
    if weights:
        settings.add_external_initializers(list(weights), list(weights.values()))
    return ort.InferenceSession(proto.SerializeToString(), settings, providers=providers)


def _split_weights(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph as a small protobuf, and its large weights as onnxruntime values."""
    proto, large = shapes.without(model, _movable)
    # A rewritten graph may use one symbol for two sizes (examples, and rows of all their steps):
    # onnxruntime infers shapes itself and must not plan its buffers by ours.
    del proto.graph.value_info[:]
    weights = {}
    make = runtime().OrtValue.ortvalue_from_numpy
    for name, value in large.items():
        tensor = value.const_value
        assert tensor is not None
        stub = proto.graph.initializer.add()
        stub.name, stub.data_type = name, int(tensor.dtype)
        stub.dims.extend(tensor.shape.numpy())
        stub.data_location = onnx.TensorProto.EXTERNAL
        stub.external_data.add(key="location", value="memory")
        weights[name] = make(np.ascontiguousarray(tensor.numpy()))
    return proto, weights


def _movable(tensor: ir.TensorProtocol) -> bool:
    plain = tensor.dtype.numpy().kind in "fiub" and tensor.dtype.numpy().isbuiltin == 1
    return bool(plain and math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize > _INLINE_BYTES)
