"""Where a value has its space: channel axes, token grids, the last layer that an image passes.

Channels are found by what the operators around a value do with it, not assumed to come first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError
from onnxplain.graph.edit import BATCH, downstream, has_rows
from onnxplain.graph.emit import Dim, Emitter, const_array, dims, is_float, rank
from onnxplain.graph.grad import Active
from onnxplain.methods.base import Attribution
from onnxplain.model import Model
from onnxplain.rules.vjp import VJP
from onnxplain.run.feeds import Feeds

log = logging.getLogger("onnxplain")

Transform = Callable[[np.ndarray], np.ndarray]

# Operators that have channels on the second axis of their data and result, by definition.
_SECOND = frozenset(
    "Conv ConvTranspose QLinearConv ConvInteger DeformConv MaxPool AveragePool LpPool "
    "GlobalAveragePool GlobalMaxPool GlobalLpPool BatchNormalization InstanceNormalization "
    "GroupNormalization LRN DepthToSpace SpaceToDepth".split()
)
_NORMS = frozenset("LayerNormalization RMSNormalization SimplifiedLayerNormalization".split())
# Products with a matrix, and where that is among their inputs: it mixes the last axis.
_DENSE = {"MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3}
# Operators that have values of one rank whose axes are not the same.
_REARRANGING = frozenset(
    "Gather GatherND ScatterND Gemm Einsum GridSample LSTM GRU RNN If Loop Scan".split()
)
# What may be between a constant and the operator whose weight it is.
_OF_WEIGHTS = frozenset("DequantizeLinear QuantizeLinear Cast Transpose Reshape".split())
# Values looked at around one: for convolutions that contradict each other, and for any at all.
_NEAR, _FAR = 200, 2000
# Tokens that are no part of the picture (class, distillation, registers): at most one for so many.
_TOKENS_PER_EXTRA = 4
_FOR_TABLES = (
    "this method is for images and series: for tables take integrated-gradients, deep-lift or "
    "lrp, and where there is no gradient, kernel-shap"
)


# An axis that the value which is asked about does not have: one that was put in behind it.
_NEW = -1

Axes = tuple[int | None, ...]
"""For each axis of a value where it is in another one; None where that can't be told."""


def channel_axis(value: ir.Value) -> int | None:
    """Which axis of a value holds its channels, from the operators around it.

    None where none of them tells, where they contradict each other, or where it has none.
    """
    found = _evidence(value)
    return next(iter(found - {_NEW}), None) if len(found) == 1 else None


def _evidence(value: ir.Value) -> set[int]:
    """The axes that operators around a value take for its channels, by the strongest evidence.

    Convolutions and pooling have their channels by definition; a normalization of the last axis
    alone is over channels nearly always; a product with a matrix may mix places instead (tokens of
    an MLP-Mixer, the width of a spectrogram), so it tells only where nothing else does.
    """
    votes: tuple[set[int], ...] = (set(), set(), set())
    if value.shape is None:
        return set()
    queue: list[tuple[ir.Value, Axes]] = [(value, tuple(range(rank(value))))]
    seen = {value}
    for here, axes in queue:  # grows
        producer = here.producer()
        for node in filter(None, (producer, *(n for n, _ in here.uses()))):
            if not node.inputs:
                continue
            strength, axis = _told(node, here)
            if axis is not None and axes[axis]:
                votes[strength].add(axes[axis])  # type: ignore[arg-type]
            if node.op_type in _SECOND:
                continue
            for there, moved in _beside(node, here):
                if there not in seen and len(seen) < (_NEAR if votes[0] else _FAR):
                    seen.add(there)
                    queue.append((there, tuple(a if a in (None, _NEW) else axes[a] for a in moved)))
    found = next(filter(None, votes), set())
    return found - {_NEW} or found


def _told(node: ir.Node, value: ir.Value) -> tuple[int, int | None]:
    """What an operator says of its data or its result: (rank of the evidence, channel axis)."""
    if value is not node.inputs[0] and value is not node.outputs[0]:
        return 0, None
    if node.op_type in _SECOND:
        return 0, 1
    last = rank(value) - 1
    if node.op_type in _NORMS:
        given = node.attributes.get("axis")
        return 1, last if given is None or given.as_int() in (-1, last) else None
    at = _DENSE.get(node.op_type)
    return 2, last if at is not None and _is_weight(node.inputs[at]) else None


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a constant, be it quantized."""
    while const_array(value) is None:
        node = None if value is None else value.producer()
        if node is None or node.op_type not in _OF_WEIGHTS:
            return False
        value = node.inputs[0]
    return True


def _beside(node: ir.Node, value: ir.Value) -> Iterator[tuple[ir.Value, Axes]]:
    """Other values of a node, with where each of their axes is in ``value``."""
    x, y = node.inputs[0], node.outputs[0]
    if node.op_type in ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        other = y if value is x else x if value is y else None
        if other is not None and other.shape is not None:
            yield other, _moved(node, value, other)
        return
    among: list[ir.Value | None] = [*node.inputs, *node.outputs]
    if "MatMul" in node.op_type:
        operands = [node.inputs[i] for i in (0, _DENSE.get(node.op_type, 0))]
        among = [*operands, y] if sum(map(_is_weight, operands)) == 1 else []
    elif node.op_type in _REARRANGING:
        return
    for other in among:
        if other is None or other is value or other.shape is None or _is_weight(other):
            continue
        if rank(other) == rank(value):
            yield other, tuple(range(rank(value)))


def _moved(node: ir.Node, value: ir.Value, other: ir.Value) -> Axes:
    """Where the axes of ``other`` are in ``value``: data and result of what moves axes."""
    forth = value is node.inputs[0]
    if node.op_type == "Transpose":
        given = node.attributes.get("perm")
        perm = list(given.as_ints()) if given else list(range(rank(value)))[::-1]
        return tuple(perm if forth else np.argsort(perm).tolist())
    axes = const_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type in ("Reshape", "Flatten") or axes is None:
        return _reshaped(dims(value), dims(other))
    count = max(rank(value), rank(other))
    gone = {int(a) % count for a in axes.ravel()}
    kept = [a for a in range(count) if a not in gone]
    if len(kept) == rank(other):
        return tuple(kept)
    return tuple(_NEW if a in gone else kept.index(a) for a in range(count))


def _reshaped(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> Axes:
    """Where the axes of a shape are in another one with as many elements in the same order.

    An axis stays one if as much is in front of it as before, or behind it. Which of several axes of
    size 1 is which can't be told, unless all in front or all behind is the same.
    """

    def stays(a: int, b: int) -> bool:
        sides = ((old[:a], new[:b]), (old[a + 1 :], new[b + 1 :]))
        if old[a] == 1:
            return any(None not in before and before == after for before, after in sides)
        return any(_measure(before) == _measure(after) is not None for before, after in sides)

    inserted = None not in old and tuple(s for s in new if s != 1) == old
    found: list[int | None] = []
    for b, size in enumerate(new):
        same = [a for a, s in enumerate(old) if s is not None and s == size and stays(a, b)]
        found.append(_NEW if inserted and size == 1 else same[0] if len(same) == 1 else None)
    return tuple(found)


def _measure(sizes: Sequence[Dim]) -> tuple[int, list[str]] | None:
    """The product of sizes: of the numbers, and the symbols; None if one is unknown."""
    if None in sizes:
        return None
    numbers = [s for s in sizes if isinstance(s, int)]
    return math.prod(numbers), sorted(str(s) for s in sizes if not isinstance(s, int))


@dataclass(frozen=True)
class Image:
    """An input that has space.

    Attributes:
        name: of the input.
        sizes: its spatial axes, None where they are not fixed.
        channels: its channel axis, None where it has none.
    """

    name: str
    sizes: tuple[int | None, ...]
    channels: int | None

    @property
    def known(self) -> tuple[int, ...]:
        """The sizes of an input that is fed."""
        return tuple(s for s in self.sizes if s is not None)

    def place(self, maps: np.ndarray) -> np.ndarray:
        """Maps [N, 1, *sizes] in the input's layout: the channel axis, of size 1, where it is."""
        if self.channels is None:
            return maps[:, 0]
        return np.moveaxis(maps, 1, self.channels)


def image(
    value: ir.Value,
    layer: ir.Value,
    shape: Sequence[int] | None = None,
    *,
    integers: bool = False,
) -> Image | None:
    """An input as an image for a layer; None where it has no spatial axes.

    ``shape`` is the input's without the examples axis, where it is known; ``integers``: an input
    that holds no floating-point numbers may be one too.
    """
    if not (integers or is_float(value)) or value.shape is None or rank(value) < 3:
        return None
    known = shape if shape is not None else dims(value)[1:]
    sizes = [d if isinstance(d, int) else None for d in known]
    axis = channel_axis(value)
    if axis is None and layer.shape is not None and rank(layer) == rank(value) + 1 < 5:
        return Image(value.name or "", tuple(sizes), None)
    if axis is None:
        axis = len(sizes) if sizes[-1] in (1, 3, 4) and sizes[0] not in (1, 3, 4) else 1
    return Image(value.name or "", tuple(s for i, s in enumerate(sizes, 1) if i != axis), axis)


def first_wider(model: Model, value: ir.Value) -> ir.Value:
    """The first value behind an image without a channel axis that has one; itself if none."""
    behind = (v for n in downstream(model.graph.graph, [value]) for v in n.outputs)
    wider = (v for v in behind if v.shape is not None and rank(v) == rank(value) + 1)
    return next((v for v in wider if channel_axis(v) is not None), value)


@dataclass(frozen=True)
class Grid:
    """How a layer's values become feature maps [N, C, *sizes].

    Attributes:
        channels: the axis of the channels.
        start: how many tokens in front are no part of the grid.
        shape: (C, *sizes).
        order: for each element of the maps the position of its value in the layer's.
    """

    channels: int
    start: int
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The spatial sizes."""
        return self.shape[1:]

    def maps(self, op: Emitter, value: ir.Value) -> ir.Value:
        """``value`` (or its gradient) as feature maps, in single precision at least."""
        count = rank(value)
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            value = op.Cast(value, to=ir.DataType.FLOAT)
        if self.order is not None:
            value = op.Gather(op.Flatten(value), list(self.order), axis=1)
        elif self.start:
            tokens = 2 if self.channels == 1 else 1
            value = op.Slice(value, [self.start], [np.iinfo(np.int64).max], [tokens])
        if self.order is None and self.channels != 1:
            value = op.Transpose(value, perm=_channels_first(count, self.channels))
        if self.order is not None or count != len(self.shape) + 1:
            value = op.Reshape(value, [-1, *self.shape])
        return value


def _channels_first(count: int, channels: int) -> list[int]:
    return [0, channels, *(a for a in range(1, count) if a != channels)]


def grid(
    layer: ir.Value,
    shape: Sequence[int],
    sizes: Sequence[int | None],
    transform: Transform | None = None,
) -> Grid | None:
    """The feature maps in a layer's values; None where it has no spatial axes.

    Args:
        layer: the value.
        shape: its shape without the examples axis.
        sizes: the image's spatial sizes.
        transform: what makes maps [N, C, *spatial] of the values, by selecting and rearranging.

    Raises:
        LayerError: channels, or the grid of the tokens, can't be inferred.
        InputError: ``transform`` does something else.
    """
    if transform is not None:
        return _transformed(shape, len(sizes), transform)
    name = layer.name
    unclear = LayerError(
        f"which axis of layer '{name}' (shape [N, {', '.join(map(str, shape))}]) counts its "
        "channels can't be told from the operators around it: pass reshape_transform, which "
        "makes maps [N, channels, *spatial] of its values"
    )
    axis = channel_axis(layer)
    if len(shape) == 2 and len(sizes) > 1:
        if axis is None and len(_evidence(layer)) > 1:
            raise unclear
        axis = axis or 2
        count = shape[2 - axis]
        tokens = token_grid(count, sizes)
        if tokens is None:
            raise LayerError(
                f"layer '{name}' has shape [N, {shape[0]}, {shape[1]}], and {count} tokens are "
                f"no grid over an image of {_times(sizes)}, not even without class tokens: pass "
                "reshape_transform, which makes maps [N, channels, height, width] of its values"
            )
        return Grid(axis, tokens[0], (shape[axis - 1], *tokens[1]))
    if len(shape) <= len(sizes) or len(shape) < 2:
        return None
    if axis is None:
        axis = _by_shape(shape, sizes)
    if axis is None:
        raise unclear
    spatial = [d for i, d in enumerate(shape, 1) if i != axis]
    while len(spatial) > len(sizes) and 1 in spatial:
        spatial.remove(1)  # one dimension, computed as two
    if len(spatial) != len(sizes) or math.prod(spatial) == 1:
        return None
    return Grid(axis, 0, (shape[axis - 1], *spatial))


def token_grid(count: int, sizes: Sequence[int | None]) -> tuple[int, tuple[int, ...]] | None:
    """(tokens in front that are no part of it, (height, width)) of a grid of tokens.

    The fewest tokens are left out with which the rest has the image's aspect (at most a fifth);
    where the image's size is not known, with which it is a square.
    """
    if len(sizes) != 2:
        return None
    height, width = (s or 1 for s in sizes) if None not in sizes else (1, 1)
    for extra in range(count // (_TOKENS_PER_EXTRA + 1) + 1):
        rows = math.isqrt((count - extra) * height // width)
        fits = rows and (count - extra) % rows == 0
        if fits and rows * width == (count - extra) // rows * height:
            return extra, (rows, (count - extra) // rows)
    return None


def _by_shape(shape: Sequence[int], sizes: Sequence[int | None]) -> int | None:
    """The channel axis, first or last, that leaves the image's aspect; None if both or neither."""
    if len(shape) != len(sizes) + 1 or None in sizes:
        return None

    def fits(spatial: Sequence[int]) -> bool:
        scaled = [s * spatial[0] / sizes[0] for s in sizes]  # type: ignore[operator]
        return all(abs(d - s) < 1 for d, s in zip(spatial, scaled, strict=True))

    found = [a for a, rest in ((1, shape[1:]), (len(shape), shape[:-1])) if fits(rest)]
    return found[0] if len(found) == 1 else None


def checked(transform: Transform | None) -> Transform | None:
    """A user's ``reshape_transform``.

    Raises:
        InputError: it can't be called.
    """
    if transform is not None and not callable(transform):
        raise InputError(
            "reshape_transform is a function that makes maps [N, channels, *spatial] of a layer's "
            f"values, not {transform!r}"
        )
    return transform


def _transformed(shape: Sequence[int], spatial: int, transform: Transform) -> Grid:
    """What a user's function does to the positions of a layer's values."""
    numbers = np.arange(math.prod(shape)).reshape(1, *shape)
    made = np.asarray(transform(numbers))
    if made.ndim != spatial + 2 or made.shape[0] != 1:
        raise InputError(
            f"reshape_transform makes {list(made.shape)} of {list(numbers.shape)}; it has to give "
            f"[N, channels, {', '.join(('depth', 'height', 'width')[-spatial:])}]"
        )
    if made.dtype.kind not in "iuf" or not np.isin(made, numbers).all():
        raise InputError(
            "reshape_transform computes new values; it may only select and rearrange those of the "
            "layer"
        )
    return Grid(1, 0, made.shape[1:], tuple(made.astype(np.int64).ravel().tolist()))


def _times(sizes: Sequence[int | None]) -> str:
    return "x".join("?" if s is None else str(s) for s in sizes)


def layer_image(model: Model, layer: ir.Value, feeds: dict[str, np.ndarray]) -> Image:
    """The explained input that a map of a layer is laid over, at the size that is fed.

    Raises:
        LayerError: no input with spatial axes reaches the layer.
    """
    found = [
        made
        for v in model.graph.graph.inputs
        if v.name in feeds
        and any(layer in node.outputs for node in downstream(model.graph.graph, [v]))
        and (made := image(v, layer, feeds[v.name or ""].shape[1:])) is not None
    ]
    if not found:
        raise LayerError(
            f"no explained input with spatial axes ([N, channels, height, width], say) reaches "
            f"layer '{layer.name}', so its map can't be laid over one; LayerGradCam gives it at "
            "the layer's own size" + (f"; {_FOR_TABLES}" if not _takes_images(model) else "")
        )
    return found[0]


def images(method: Attribution, feeds: Feeds) -> list[str]:
    """Names of the inputs that the maps of a method's layers are laid over."""
    _, groups = method._resolve(False, False)
    return [
        (v if v.is_graph_input() else layer_image(method.model, v, feeds.arrays)).name or ""
        for group in groups or ()
        for v in group
    ]


def instead(feeds: Feeds) -> str:
    """What to do with an explained input without spatial axes, for an error message."""
    return "pass it in additional_forward_args" if len(feeds.explained) > 1 else _FOR_TABLES


def example_shape(method: Attribution, layer: ir.Value, feeds: Feeds) -> tuple[int, ...]:
    """A layer's shape without its first axis, the examples.

    Raises:
        LayerError: its first axis counts something else (windows, time).
    """
    if not layer.is_graph_input() and not _counts_examples(method, layer, feeds):
        shape = "?" if layer.shape is None else ", ".join(str(d or "?") for d in dims(layer))
        graph = method.model.graph.graph
        among = [v for n in graph for v in n.outputs if is_float(v) and has_rows(v) and rank(v) > 1]
        near = _listed(method.model, layer, [v for v in among if v is not method.model.output])
        raise LayerError(
            f"the first axis of layer '{layer.name}' (shape [{shape}]) does not count the examples,"
            " so its channels can't be told from them; "
            + (f"layers of which it does are {near}; " if near else "")
            + "LayerGradientXActivation takes any layer"
        )
    return method._trailing(layer, feeds, False)


def _counts_examples(method: Attribution, layer: ir.Value, feeds: Feeds) -> bool:
    """Whether a layer's first axis counts the examples; where shapes don't tell, one is run."""
    known = (None,) if layer.shape is None else dims(layer)
    if BATCH in known or not known:
        return has_rows(layer)
    if isinstance(known[0], int):
        return known[0] == method.model.fixed_batch
    return method._trailing(layer, feeds, True)[:1] == (1,)


def spatial_layers(model: Model, of: ir.Value | None = None) -> list[ir.Value]:
    """Values with spatial axes that everything passes which ``of`` learns from the images.

    ``of`` is the output if not given. In the order of computation. Values of which only one
    position is read later (all but the class token are idle behind the last attention of a
    transformer) are not among them.
    """
    graph, of = model.graph.graph, of or model.output
    active = Active(graph, [of], [v for v in graph.inputs if image(v, v) is not None], VJP)
    live = {v for v in graph.inputs if v in active.values}
    images = list(live)
    left = dict.fromkeys(active.values, 0)
    for node in active.nodes:
        for v in set(active.ends[node][0]) & active.values:
            left[v] += 1
    passed: list[tuple[ir.Value, list[ir.Node]]] = []  # a cut, and the nodes that lead there
    segment: list[ir.Node] = []
    for node in active.nodes:
        segment.append(node)
        for v in set(active.ends[node][0]) & active.values:
            left[v] -= 1
            if not left[v]:
                live.discard(v)
        live |= set(active.ends[node][1]) & active.values
        if len(live) == 1:
            passed.append((next(iter(live)), segment))
            segment = []
    found, picked = [], False
    for value, nodes in reversed(passed):
        if value is not of and not picked and any(_has_space(value, v) for v in images):
            found.append(value)
        for node in reversed(nodes):
            picked = _picks_token(node) or (picked and not _mixes(node, active))
    return found[::-1]


def _has_space(layer: ir.Value, source: ir.Value) -> bool:
    """Whether a layer surely has spatial axes, as far as shapes are known."""
    if not is_float(layer) or layer.shape is None or dims(layer)[:1] != dims(source)[:1]:
        return False
    seen = image(source, layer)
    known = dims(layer)[1:]
    if seen is None or len(known) < 2:
        return False
    if all(isinstance(d, int) for d in known):
        try:
            return grid(layer, known, seen.sizes) is not None  # type: ignore[arg-type]
        except LayerError:
            return False
    axis = channel_axis(layer)
    spatial = [d for i, d in enumerate(known, 1) if i != axis]
    return axis is not None and len(spatial) == len(seen.sizes) and set(spatial) != {1}


def _picks_token(node: ir.Node) -> bool:
    """Whether a node takes one token out of [N, tokens, dim]."""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    if x is None or x.shape is None or rank(x) != 3 or node.op_type not in ("Gather", "Slice"):
        return False
    if node.op_type == "Slice":
        return y.shape is not None and dims(y)[1] == 1 != dims(x)[1]
    index = const_array(node.inputs[1])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis % 3 == 1 and index is not None and index.size == 1


def _mixes(node: ir.Node, active: Active) -> bool:
    """Whether a node lets tokens look at each other."""
    varying = sum(v in active.values for v in node.inputs)
    return node.op_type.endswith("Attention") or (
        varying > 1 and node.op_type in ("MatMul", "Einsum")
    )


def nearest(model: Model, layer: ir.Value, count: int = 3) -> str:
    """The spatial layers nearest to another one, for an error message."""
    near = _listed(model, layer, spatial_layers(model), count)
    return f"layers that have some are {near}" if near else _no_layer(model, model.output)


def _listed(model: Model, layer: ir.Value, among: Sequence[ir.Value], count: int = 3) -> str:
    """The layers nearest to another one."""
    order = {v: i for i, node in enumerate(model.graph.graph) for v in node.outputs}
    here = order.get(layer, 0)
    found = sorted(among, key=lambda v: abs(order[v] - here))[:count]
    return ", ".join(repr(layer_name(model, v)) for v in found)


def _takes_images(model: Model) -> bool:
    """Whether an input has spatial axes."""
    return any(image(v, v) is not None for v in model.graph.graph.inputs)


def _no_layer(model: Model, of: ir.Value) -> str:
    """Why a model has no spatial layers, and what to do, for an error message."""
    if not _takes_images(model):
        return f"the model has no input with spatial axes; {_FOR_TABLES}"
    return (
        "the model has no layer with spatial axes that all of an image passes on a differentiable "
        f"way to '{of.name}': name one yourself; model.layers() lists them all"
    )


def layer_name(model: Model, value: ir.Value) -> str:
    """A name of a value that means nothing else."""
    return model.names.unique(value) or value.name or ""


def last_spatial_layer(method: Attribution) -> str:
    """Name of the last value with spatial axes that all of the image passes on its way out.

    Raises:
        LayerError: there is none.
    """
    model, of = method.model, method._resolve(False, False)[0]
    found = spatial_layers(model, of)
    if not found:
        raise LayerError(_no_layer(model, of))
    name = layer_name(model, found[-1])
    log.info("%s explains by layer '%s', the last with spatial axes", method.name, name)
    return name
