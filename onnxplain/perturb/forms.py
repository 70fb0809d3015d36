"""How samples become masks: in the graph, next to the model, and on the host, for a callable.

A form says what little of a sample travels, and how a mask over each source is made of it. A mask
is 1 where the input is kept and 0 where it is replaced; anything between mixes the two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import Emitter, is_float, rank
from onnxplain.perturb.features import Features

Block = dict[str, np.ndarray]
"""What a sampler says of some samples: small arrays [S, ...] by name."""

_ENDS = ("lo", "hi")

Sampler = Callable[[slice], Block]
"""The samples of a slice, a pure function of their numbers (and a seed)."""


class Form:
    """The interface of a form; ``Coalitions`` is the plainest."""

    distinct: bool = True
    """Whether no two samples are equal; else equal ones are evaluated once."""

    @property
    def key(self) -> Hashable:
        """What the graph depends on."""
        raise NotImplementedError

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """What is fed of each sample: dtype and shape without the samples axis, by name."""
        raise NotImplementedError

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        """What is fed of a block."""
        raise NotImplementedError

    def shared(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """What is fed once for some examples (by their places in the form), such as feature ids."""
        return {}

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        """The mask over a source, [S, 1 or E, ...].

        Args:
            op: writes nodes.
            fed: the graph inputs for :meth:`fed` and :meth:`shared`.
            name: of the source.
            like: the source; the mask has its dtype, or is boolean where that is no float.
        """
        raise NotImplementedError

    def masks(
        self,
        rows: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        name: str,
        like: np.ndarray,
    ) -> np.ndarray:
        """As :meth:`emit`, on the host: float or boolean, of as many axes as ``like`` and one."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Coalitions(Form):
    """Features present or absent. A block holds ``z``: packed bits, uint64 [S, ceil(count/64)]."""

    features: Features
    distinct: bool = False

    key = ("coalitions",)

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {"present": (np.bool_, (self.features.count,))}

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        from onnxplain.kernels.coalitions import unpack

        return {"present": unpack(block["z"], self.features.count)}

    def shared(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        return {f"feature.{k}": v for k, v in self.features.of(examples).items()}

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        present = fed["present"]
        if is_float(like):
            present = op.Cast(present, to=like.dtype)
        return op.Gather(present, fed[f"feature.{name}"], axis=1)

    def masks(
        self,
        rows: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        name: str,
        like: np.ndarray,
    ) -> np.ndarray:
        return rows["present"][:, shared[f"feature.{name}"]]


@dataclass(frozen=True, eq=False)
class Windows(Form):
    """Boxes that are switched off. A block holds ``lo.NAME`` and ``hi.NAME``: int64 [S, axes].

    Args:
        shapes: the shape of each source without the examples axis.
        whole: for each source, the axes that every box covers from end to end.
    """

    shapes: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, Sequence[bool]]

    @property
    def key(self) -> Hashable:
        return ("windows", tuple(self.shapes.items()), tuple(map(tuple, self.whole.values())))

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        corners = ((f"{end}.{k}", (len(s),)) for k, s in self.shapes.items() for end in _ENDS)
        return {name: (np.int64, size) for name, size in corners}

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        return block

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        # Kept is what lies outside along any axis: one Max makes the mask of the axes' own.
        shape, outside = self.shapes[name], []
        dtype = like.dtype if is_float(like) else ir.DataType.FLOAT
        for axis, size in enumerate(shape):
            lo, hi = (op.Slice(fed[f"{end}.{name}"], [axis], [axis + 1], [1]) for end in _ENDS)
            place = np.zeros(1, np.int64) if self.whole[name][axis] else np.arange(size)
            beyond = op.Or(op.Less(place[None], lo), op.GreaterOrEqual(place[None], hi))
            spread = [0] + [1] * (len(shape) + 1)
            spread[2 + axis] = len(place)
            outside.append(op.Reshape(op.Cast(beyond, to=dtype), spread))
        kept = op.Max(*outside)
        return kept if is_float(like) else op.Cast(kept, to=ir.DataType.BOOL)

    def masks(
        self,
        rows: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        name: str,
        like: np.ndarray,
    ) -> np.ndarray:
        inside: Any = True
        for axis, size in enumerate(self.shapes[name]):
            place = np.arange(1 if self.whole[name][axis] else size)
            lo, hi = (rows[f"{end}.{name}"][:, axis, None] for end in _ENDS)
            spread = [-1] + [1] * (len(self.shapes[name]) + 1)
            spread[2 + axis] = len(place)
            inside = inside & ((place >= lo) & (place < hi)).reshape(spread)
        return ~inside


@dataclass(frozen=True, eq=False)
class Whole(Form):
    """Nothing is kept: each sample brings whole inputs (``game.Given``)."""

    key = ("whole",)

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {"kept": (np.bool_, ())}

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        return {"kept": np.zeros(len(next(iter(block.values()))), np.bool_)}

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        kept = op.Cast(fed["kept"], to=like.dtype) if is_float(like) else fed["kept"]
        return op.Reshape(kept, [-1] + [1] * rank(like))

    def masks(
        self,
        rows: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        name: str,
        like: np.ndarray,
    ) -> np.ndarray:
        return rows["kept"].reshape(-1, *[1] * like.ndim)
