"""A model's scores on perturbed copies of its inputs, made in its graph.

What travels for each sample is what its form says (a few bits or a small grid); masks are expanded
and inputs mixed next to the model. Samples, backgrounds and examples are the first three axes of
what is mixed; stacked, they are the rows of one run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import LayerError, UnsupportedModelError
from onnxplain.graph import edit
from onnxplain.graph.edit import BATCH, has_rows
from onnxplain.graph.emit import HALVES, Emitter, dims, is_float
from onnxplain.model import Model
from onnxplain.perturb.game import Game, Given, Off, Permuted, Play
from onnxplain.run.feeds import Feeds
from onnxplain.run.program import Program, Rows, take
from onnxplain.run.session import Feed

# Integers for which onnxruntime's Where has a kernel.
_WHERE = (ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64)
# Samples between two backgrounds, where these don't fit into one run.
_PIECE = 64


class GraphGame(Game):
    """A model's scores; ``graph`` is shared by the games of one play."""

    def __init__(self, graph: Graph, index: np.ndarray, place: np.ndarray) -> None:
        super().__init__(graph.play, index, place)
        self._graph = graph
        self._set()

    def _set(self) -> None:
        """Make ready what is fed once for the examples."""
        size = self._graph.examples
        short = size is not None and size - len(self.index)
        index, where = (np.append(a, a[-1:].repeat(short or 0)) for a in (self.index, self.place))
        self._rows = index
        self._shared = self._graph.shared(index, where)
        self._held: dict[str, tuple[np.ndarray, Feed]] = {}

    def keep(self, kept: np.ndarray) -> None:
        super().keep(kept)
        self._set()

    def _evaluate(self, rows: Mapping[str, Rows], count: int) -> Iterator[tuple[slice, np.ndarray]]:
        off, at_once = self.play.off, self._graph.backgrounds_at_once(len(self._rows))
        ours = [k for k in rows if k == "order" or k.startswith("given.")]
        rows = {**rows, **{k: _columns(rows[k], self._rows) for k in ours}}
        if off.count <= at_once:
            yield from self._run(rows, self._shared, count)
            return
        for low in range(0, count, _PIECE):
            piece = slice(low, min(low + _PIECE, count))
            mine = {k: _from(v, low) for k, v in rows.items()}
            total: Any = 0.0
            for start in range(0, off.count, at_once):
                stop = min(start + at_once, off.count)
                part = {
                    k: v[start:stop] if k.startswith("off.") else v for k, v in self._shared.items()
                }
                found = [scores for _, scores in self._run(mine, part, piece.stop - low)]
                total = total + np.concatenate(found) * ((stop - start) / off.count)
            yield piece, total

    def _run(
        self, rows: Mapping[str, Rows], shared: Mapping[str, np.ndarray], count: int
    ) -> Iterator[tuple[slice, np.ndarray]]:
        graph = self._graph
        fed, used = {graph.names[k]: v for k, v in rows.items()}, graph.used(shared)
        placed, most = self._placed(used), self.play.at_most
        chunks = graph.program.chunks(fed, used, count, at_most=most, placed=placed)
        for piece, results in chunks:
            (scores,) = results.values()
            yield piece, graph.finished(scores)[:, : self.count]

    def _placed(self, shared: Mapping[str, np.ndarray]) -> dict[str, Feed]:
        """What is fed once, on the device: each array goes over once for all rounds of the game."""
        new = {k: v for k, v in shared.items() if k not in self._held or self._held[k][0] is not v}
        placed = self._graph.program.session.place(new)
        self._held |= {k: (shared[k], v) for k, v in placed.items()}
        return {k: v for k, (_, v) in self._held.items() if k in shared}


def _from(feed: Rows, start: int) -> Rows:
    """A feed without its first rows."""
    return lambda piece: take(feed, slice(start + piece.start, start + piece.stop))


def _columns(feed: Rows, index: np.ndarray) -> Rows:
    """Of a feed [S, N, ...], the part of some examples."""
    return lambda piece: take(feed, piece)[:, index]


class Graph:
    """The graph that expands samples next to the model, and what it is fed.

    Attributes:
        play: what is evaluated.
        program: compiled once for the model and all that the graph depends on.
        names: of its inputs.
        examples: how many examples a run must have; None: any number.
    """

    def __init__(self, play: Play) -> None:
        self.play = play
        model: Model = play.model
        layers = [v for v in play.wrt if not v.is_graph_input()]
        self._check_rows(layers)
        # Stacked, a run has samples x backgrounds x examples rows: any number, or exactly those of
        # a model of fixed batch, where nothing but the sources has rows.
        rowed = {v for v in model.graph.graph.inputs if model.axes[v.name or ""] is not None}
        direct = rowed <= set(play.wrt)
        self.stacked = not play.at_once and (not model.fixed_batch or direct)
        self.examples: int | None = None
        if model.fixed_batch and not play.at_once:
            self.examples = 1 if self.stacked else model.fixed_batch
        elif coupled(model):  # what a sample is run with besides is part of its score
            self.stacked = False
        elif model.quantizes_batches and not play.at_once:
            self.stacked, self.examples = False, 1
        self.sides = _sides(model.graph.graph, play.of, play.wrt) if layers else []
        kind = "given" if isinstance(play.off, Given) else "off"
        shared = play.form.shared(np.zeros(1, np.int64))
        fed = [*play.form.fed(), *shared, "order", "columns"]
        fed += [f"value.{v.name}" for v in (*play.wrt, *self.sides)]
        fed += [f"{kind}.{v.name}" for v in play.wrt]
        self.names = {k: model.free_name(f"perturb.{k}") for k in fed}
        off = play.off
        key: Hashable = (
            ("perturb", play.of.name, tuple(v.name for v in play.wrt), play.form.key),
            (type(off).__name__, off.zero if isinstance(off, Off) else None, off.count > 1),
            (play.scores.columns is None, play.scores.summed, self.stacked, play.at_once),
            tuple(array.shape[1:] for array in shared.values()),
        )
        batch = model.fixed_batch if self.stacked else 1
        repeat = self.stacked and not direct
        self.program: Program = model.program(key, lambda: self._write(repeat), batch)
        self._inputs = {v.name for v in self.program.model.graph.inputs}
        self._room: int | None = None
        self._everyone: dict[str, np.ndarray] | None = None

    def _check_rows(self, layers: Sequence[ir.Value]) -> None:
        for value in layers:
            if not has_rows(value) and not self.play.at_once and not self.play.model.fixed_batch:
                raise UnsupportedModelError(
                    f"'{value.name}' does not have one row per example, so it can't be perturbed "
                    "for each example by itself; name a layer with the examples first"
                )

    # ---- what is fed -------------------------------------------------------------------------

    def values(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs, sources and what else reaches the explained value, of some examples, by name."""
        model = self.play.model
        feeds = some(self.play.feeds, index, model)
        computed = [v.name or "" for v in (*self.play.wrt, *self.sides) if not v.is_graph_input()]
        if not computed:
            return feeds.arrays
        names = list(dict.fromkeys(computed))
        return {**feeds.arrays, **model.run(model.forward(names), feeds)}

    def shared(self, index: np.ndarray, place: np.ndarray) -> dict[str, np.ndarray]:
        """What is fed once for some examples: sources, what they are replaced with, features."""
        play = self.play
        values = self.values(index)
        fed = {k: values[k] for k in play.feeds.arrays}
        fed |= {f"value.{v.name}": values[v.name or ""] for v in (*play.wrt, *self.sides)}
        if isinstance(play.off, Off):
            for name, array in play.off.arrays.items():
                fed[f"off.{name}"] = array if array.shape[1] == 1 else array[:, index]
        elif isinstance(play.off, Permuted):
            if self._everyone is None:
                self._everyone = self.values(np.arange(play.feeds.count))
            fed |= {f"off.{v.name}": self._everyone[v.name or ""] for v in play.wrt}
        fed |= play.form.shared(place)
        columns = play.scores.columns
        if columns is not None:
            fed["columns"] = columns if len(columns) == 1 else columns[index]
        return fed

    def used(self, fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of it the graph reads, by the names of its inputs."""
        named = {self.names.get(k, k): v for k, v in fed.items()}
        return {k: v for k, v in named.items() if k in self._inputs}

    def fitting(self) -> int:
        """How many rows fit the memory."""
        if self._room is None:
            one = self.shared(np.zeros(1, np.int64), np.zeros(1, np.int64))
            one = {k: v[:1] if k.startswith("off.") else v for k, v in one.items()}
            row = {self.names[k]: (1, *shape) for k, (_, shape) in self.play.form.fed().items()}
            for v in self.play.wrt if isinstance(self.play.off, Given) else ():
                row[self.names[f"given.{v.name}"]] = (1, *one[f"value.{v.name}"].shape)
            if isinstance(self.play.off, Permuted):
                row[self.names["order"]] = (1, 1)
            same = {k: v.shape for k, v in self.used(one).items()}
            self._room = self.program.fitting(row, same, 1 << 20)
        return self._room

    def examples_at_once(self, samples: int) -> int:
        """How many examples are best evaluated together."""
        if self.examples is not None:
            return self.examples
        return max(self.fitting() // (samples * self.play.off.count), 1)

    def backgrounds_at_once(self, examples: int) -> int:
        """How many backgrounds are averaged over in one run."""
        if not self.stacked or self.examples is not None or self.play.off.count == 1:
            return 1
        return max(self.fitting() // examples, 1)

    def finished(self, scores: np.ndarray) -> np.ndarray:
        """Scores [S, E, K] as they are wanted, finished on the host where they have to be."""
        finish = self.play.scores.finish
        if finish is None:
            return scores
        return finish(scores.reshape(-1, *self.play.shape)).reshape(*scores.shape[:2], 1)

    # ---- the graph ---------------------------------------------------------------------------

    def _write(self, repeat: bool) -> ir.Model:
        """The graph; ``repeat``: what else ``of`` depends on is repeated for every copy.

        Raises:
            LayerError: the explained value does not depend on the sources.
        """
        play, n = self.play, len(self.play.wrt)
        copy, values = play.model.rewriting(play.of, *play.wrt, *self.sides, exact=False)
        of, wrt, sides = values[0], values[1 : 1 + n], values[1 + n :]
        graph = copy.graph
        nodes = list(graph)
        behind = {v for n in edit.downstream(graph, wrt) for v in n.outputs} | set(wrt)
        if of not in behind:
            names = ", ".join(f"'{v.name}'" for v in play.wrt)
            raise LayerError(f"'{play.of.name}' does not depend on {names}, so nothing explains it")
        op = Emitter(graph, "perturb")
        for side, named in zip(sides, self.sides, strict=True):
            edit.feed(
                nodes, {side: self._new(graph, f"value.{named.name}", side.dtype, dims(side))}
            )
        fed = {
            k: self._new(graph, k, dtype, ("samples", *_open(k, shape)))
            for k, (dtype, shape) in play.form.fed().items()
        }
        for k, array in play.form.shared(np.zeros(1, np.int64)).items():
            fed[k] = self._new(graph, k, array.dtype, ("some", *_open(k, array.shape[1:])))
        if isinstance(play.off, Permuted):
            fed["order"] = self._new(graph, "order", np.int64, ("samples", BATCH))
        lead = [op.Shape(fed[next(iter(play.form.fed()))], start=0, end=1), [1], [1]]
        mixed = {}
        for value, named in zip(wrt, play.wrt, strict=True):
            name, trailing = named.name or "", dims(value)[1:]
            x = self._new(graph, f"value.{name}", value.dtype, (BATCH, *trailing))
            off = self._off(op, value, name, fed)
            if isinstance(play.off, Off) and play.off.count > 1:
                lead[1] = op.Shape(off, start=1, end=2)
            lead[2] = op.Shape(x, start=0, end=1)
            mixed[value] = _mixed(
                op, play.form.emit(op, fed, name, x), op.Unsqueeze(x, [0, 1]), off
            )
        replaced = {v: edit.stack_rows(op, m, v) for v, m in mixed.items()}
        if repeat:
            (of,) = edit.Rows(op, [of], replaced, op.Mul(lead[0], lead[1])).of
        else:
            edit.feed(nodes, replaced)
            of = replaced.get(of, of)
        out = self._scores(op, of, lead)
        out.name = play.model.free_name("scores")
        graph.outputs[:] = [out]
        graph.sort()
        edit.prune(copy)
        for value in [v for v in graph.inputs if not v.uses()]:
            graph.inputs.remove(value)
        return copy

    def _new(self, graph: ir.Graph, name: str, dtype: Any, shape: Sequence[Any]) -> ir.Value:
        """A graph input."""
        kind = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))
        value = ir.Value(name=self.names[name], type=ir.TensorType(kind), shape=ir.Shape(shape))
        graph.inputs.append(value)
        return value

    def _off(
        self, op: Emitter, value: ir.Value, name: str, fed: Mapping[str, ir.Value]
    ) -> ir.Value | None:
        """What a source is replaced with, [1 or S, 1 or B, 1 or E, ...]; None for zeros."""
        off, trailing = self.play.off, dims(value)[1:]
        if isinstance(off, Given):
            shape = ("samples", BATCH, *trailing)
            return op.Unsqueeze(self._new(op.graph, f"given.{name}", value.dtype, shape), [1])
        if isinstance(off, Permuted):
            rows = self._new(op.graph, f"off.{name}", value.dtype, ("all", *trailing))
            return op.Unsqueeze(op.Gather(rows, fed["order"], axis=0), [1])
        if name in off.zero:
            return None
        shape = ("backgrounds", "baselines", *trailing)
        return op.Unsqueeze(self._new(op.graph, f"off.{name}", value.dtype, shape), [0])

    def _scores(self, op: Emitter, of: ir.Value, lead: Sequence[Any]) -> ir.Value:
        """The scores [S, E, K] of what the model answers to all rows."""
        wanted = self.play.scores
        if of.dtype in HALVES or not is_float(of):
            of = op.Cast(of, to=ir.DataType.FLOAT)
        ends = [[1], [1], [1]] if self.play.at_once else lead
        flat = op.Reshape(of, op.Concat(*ends, [-1], axis=0))
        if wanted.columns is not None:
            columns = self._new(op.graph, "columns", np.int64, ("some", "columns"))
            wide = op.Concat(*ends, op.Shape(columns, start=1, end=2), axis=0)
            flat = op.GatherElements(flat, op.Expand(op.Unsqueeze(columns, [0, 1]), wide), axis=3)
        if wanted.summed:
            flat = op.ReduceSum(flat, [3], keepdims=1)
        return op.ReduceMean(flat, [1], keepdims=0)


def _open(name: str, shape: Sequence[int]) -> list[str]:
    """Dimensions of any size, so that a graph serves any number of features."""
    return [f"{name}.{axis}" for axis in range(len(shape))]


def _mixed(op: Emitter, kept: ir.Value, x: ir.Value, off: ir.Value | None) -> ir.Value:
    """``x`` where it is kept, else ``off``: [S, B, E, ...].

    By products and a sum, exact for masks of 0 and 1 (``off + kept * (x - off)`` is not).
    """
    kept = op.Unsqueeze(kept, [1])
    if not is_float(x):
        other = op.const(0, x.dtype) if off is None else off
        if x.dtype == ir.DataType.BOOL:
            return op.Or(op.And(kept, x), op.And(op.Not(kept), other))
        if x.dtype in _WHERE:
            return op.Where(kept, x, other)
        wide = [op.Cast(v, to=ir.DataType.INT64) for v in (x, other)]
        return op.Cast(op.Where(kept, *wide), to=x.dtype)
    if off is None:
        return op.Mul(kept, x)
    return op.Add(op.Mul(kept, x), op.Mul(op.Sub(1, kept), off))


def _sides(graph: ir.Graph, of: ir.Value, wrt: Sequence[ir.Value]) -> list[ir.Value]:
    """Values with a row per example that reach ``of`` beside ``wrt``, computed once."""
    needed = set(edit.upstream(graph, [of], stop=set(wrt)))
    behind = [n for n in edit.downstream(graph, wrt) if n in needed]
    inside = {v for n in behind for v in n.outputs} | set(wrt)
    found: dict[ir.Value, None] = {}
    dependent, counting = edit.row_values(graph)
    for value in (v for n in behind for v in edit.reads(n)):
        beside = value in dependent and value not in inside and value not in counting
        if beside and value.producer() is not None and has_rows(value):
            found[value] = None
    return list(found)


def coupled(model: Model) -> bool:
    """Whether what the model gives for an example depends on the other examples."""
    return model.batch_report is not None and model.batch_report.mode == "coupled"


def some(feeds: Feeds, index: np.ndarray, model: Any) -> Feeds:
    """The feeds of some of the examples."""
    if len(index) == feeds.count and (index == np.arange(feeds.count)).all():
        return feeds
    arrays = {k: v if model.axes[k] is None else v[index] for k, v in feeds.arrays.items()}
    return Feeds(arrays, feeds.explained, feeds.form, len(index))
