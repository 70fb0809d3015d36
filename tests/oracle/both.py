"""The same call in both libraries: classes, arguments and their order are Captum's in ours."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import captum.attr as ca
import numpy as np
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.nets import export

_FOLDER = tempfile.TemporaryDirectory()


class Fixed(nn.Module):
    """A net with some of its arguments set, since what is no tensor can't be an ONNX input.

    Its layers are called `net.NAME`.
    """

    def __init__(self, net: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.net, self.fixed = net.eval(), dict(fixed)

    def forward(
        self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None
    ) -> Tensor:
        return self.net(*(x for x in (a, b, c, d) if x is not None), **self.fixed)


@dataclass
class Both:
    """A network in PyTorch and as an ONNX file, which is exported when it is needed."""

    net: nn.Module
    xs: tuple[Tensor, ...]
    memory: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> ox.Model:
        with tempfile.NamedTemporaryFile(dir=_FOLDER.name, suffix=".onnx", delete=False) as file:
            path = Path(file.name)
        # What one example would fix stays open with two.
        xs = tuple(x.repeat(2, *[1] * (x.ndim - 1)) if len(x) == 1 else x for x in self.xs)
        export(self.net, xs, path)
        return ox.Model(path, **self.memory)

    def ours(self, cls: str, /, *made: Any, noise: bool = False, **options: Any) -> Any:
        """Our result; `made` is what the class `cls` takes after the model, layers by name."""
        call, attribute = split(getattr(ca, cls), options)
        explainer = getattr(ox, cls)(self.model, *made, **call)
        if noise:
            explainer = ox.NoiseTunnel(explainer)
        return explainer.attribute(**arrays(attribute))

    def captums(self, cls: str, /, *made: Any, noise: bool = False, **options: Any) -> Any:
        """Captum's, with the modules of these names."""
        call, attribute = split(getattr(ca, cls), options)
        explainer = getattr(ca, cls)(self.net, *map(self.module, made), **call)
        if noise:
            explainer = ca.NoiseTunnel(explainer)
        return arrays(explainer.attribute(**attribute))

    def module(self, name: Any) -> Any:
        if isinstance(name, list):
            return [self.module(n) for n in name]
        return self.net.get_submodule(name) if isinstance(name, str) else name


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters by name, without those that collect others."""
    found = inspect.signature(function).parameters
    return {k: p for k, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def split(cls: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a class's `__init__`, and those of its `attribute`."""
    made = parameters(cls.__init__)
    return (
        {k: v for k, v in options.items() if k in made},
        {k: v for k, v in options.items() if k not in made},
    )


def arrays(given: Any) -> Any:
    """Tensors as arrays, in the same form."""
    if isinstance(given, Tensor):
        return given.detach().numpy()
    if isinstance(given, Mapping):
        return {k: arrays(v) for k, v in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(arrays(v) for v in given)
    return given


def flat(given: Any) -> Iterator[np.ndarray]:
    """The arrays in lists and tuples."""
    if isinstance(given, list | tuple):
        for part in given:
            yield from flat(part)
    else:
        yield np.asarray(given)


def same(got: Any, want: Any, tolerance: float, kinks: bool = True) -> None:
    """Agreement of each example's vector, relative to its length.

    Where a net has kinks, float32 may round across one, which moves a single example by a bounded
    amount (measured: Captum's float32 differs from its float64 by 4e-4 on one of three).
    """
    assert isinstance(got, list | tuple) == isinstance(want, list | tuple)
    for g, w in zip(flat(got), flat(want), strict=True):
        assert g.shape == w.shape
        rows = [np.asarray(a, np.float64).reshape(len(w), -1) for a in (g, w)]
        # An example whose attributions vanish is measured by what the others have.
        norms = np.linalg.norm(rows[1], axis=1)
        size = np.maximum(norms, max(1e-3 * norms.max(), 1e-30))
        error = np.linalg.norm(rows[0] - rows[1], axis=1) / size
        if norms.max() == 0:
            np.testing.assert_allclose(rows[0], 0, atol=tolerance)
        elif kinks:
            assert np.median(error) < tolerance, error
            assert error.max() < 3e-2, error
        else:
            assert error.max() < tolerance, error
