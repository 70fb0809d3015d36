"""What is measured: timm networks with random weights and small models, as files and in torch."""

from __future__ import annotations

import functools
import hashlib
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# The processes whose memory is measured import from here: each loads only what it runs.
if TYPE_CHECKING:
    import onnxruntime
    from torch import nn

    from onnxplain import Model

THREADS = 2
ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "models" / "digits" / "digits.onnx"
TINY = ROOT / "models" / "breast_cancer" / "breast_cancer.onnx"
PATIENTS = TINY.parent / "samples" / "patients.csv"
MNIST8 = ROOT.parent / "shared" / "models" / "mnist8"
CLASSES = 1000
_CPU = ["CPUExecutionProvider"]


class Skip(Exception):
    """Something that a measurement needs is not on this machine."""


def require(*modules: str) -> None:
    """Skip what needs a package that is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise Skip(f"needs {', '.join(missing)}: see bench/README.md")


@functools.cache
def folder() -> Path:
    """Where exported networks are kept: one folder for each version of what makes them."""
    nets = ROOT / "tests" / "oracle" / "nets.py"
    made_by = nets.read_bytes() + f"{version('torch')} {version('timm')}".encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "onnxplain-bench" / hashlib.sha256(made_by).hexdigest()[:12]
    path.mkdir(parents=True, exist_ok=True)
    return path


def network(
    name: str, size: int, exporter: str = "torchscript", classes: int = CLASSES
) -> tuple[Path, Path]:
    """The network's ONNX file and its pickled torch module (made on first use)."""
    require("torch", "timm", "torchvision")
    import torch

    from tests.oracle import nets

    onnx_file = folder() / f"{name}_{size}_{classes}_{exporter}.onnx"
    torch_file = onnx_file.with_suffix(".pt")
    if not (onnx_file.exists() and torch_file.exists()):
        module = nets.build(name, size=size, classes=classes)
        part = onnx_file.with_suffix(".part")
        torch.save(module, torch_file)
        nets.export(module, nets.example(name, size=size), part, exporter)  # type: ignore[arg-type]
        part.replace(onnx_file)
    return onnx_file, torch_file


def torch_module(file: Path) -> nn.Module:
    """Load a module that `network` saved; torch runs on two threads from now on."""
    import torch

    from tests.oracle import nets

    nets.import_torchvision()
    torch.set_num_threads(THREADS)
    return torch.load(file, weights_only=False)


def converted_module(file: Path) -> nn.Module:
    """An ONNX file as a torch module by onnx2torch, its parameters frozen as those of others."""
    require("onnx2torch")
    import torch

    from tests.oracle import nets

    nets.import_torchvision()
    import onnx2torch

    torch.set_num_threads(THREADS)
    try:
        return onnx2torch.convert(str(file)).eval().requires_grad_(False)
    except NotImplementedError as error:
        raise Skip(f"onnx2torch can't convert {file.name}: {error}") from error


def _session_options() -> onnxruntime.SessionOptions | None:
    """Two threads as for torch; nothing where the default is two anyway."""
    if os.cpu_count() == THREADS:
        return None
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    return options


def model(file: Path, memory_limit: int | None = None) -> Model:
    """The model as onnxplain takes it, on the CPU with two threads."""
    import onnxplain as ox

    return ox.Model(
        file, providers=_CPU, session_options=_session_options(), memory_limit=memory_limit
    )


def bare(file: Path) -> onnxruntime.InferenceSession:
    """The same file in stock onnxruntime, nothing of onnxplain around it."""
    import onnxruntime as ort

    return ort.InferenceSession(str(file), _session_options(), providers=_CPU)


def images(n: int, size: int) -> np.ndarray:
    """Random images [n, 3, size, size], always the same."""
    return np.random.default_rng(1).standard_normal((n, 3, size, size), np.float32)


def digits(n: int) -> np.ndarray:
    """`n` images [n, 1, 8, 8] of values 0..16: scikit-learn's digits, again from the start when
    they run out."""
    require("sklearn")
    from sklearn.datasets import load_digits

    data = load_digits().images.astype(np.float32)[:, None]
    return data[np.arange(n) % len(data)]


def directional_error(file: Path, x: np.ndarray, target: int, gradient: np.ndarray) -> float:
    """How far a gradient is from a central difference of bare onnxruntime, as a share of it.

    Each value of `x` moves by a share of itself (features differ in scale), uphill.
    """
    session = bare(file)
    name = session.get_inputs()[0].name
    step = 3e-4 * np.abs(x) * np.sign(gradient)

    def output(at: np.ndarray) -> float:
        return float(session.run(None, {name: at})[0][:, target].astype(np.float64).sum())

    return abs(2 * float((gradient * step).sum()) / (output(x + step) - output(x - step)) - 1)
