"""Class activation maps without gradients: channels weighted by what they do to the score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import EvaluationError, InputError, LayerError
from onnxplain.graph.emit import Emitter, dims, is_float
from onnxplain.methods.base import Attribution, Question
from onnxplain.methods.cam import ClassActivationMap, first_component, unit
from onnxplain.methods.interpolate import aligned, chosen_mode, interpolate
from onnxplain.methods.perturbation import Found, PerturbationAttribution, Plan, without_each
from onnxplain.methods.spatial import Grid, Image
from onnxplain.perturb.aggregate import Differences
from onnxplain.perturb.features import Features
from onnxplain.perturb.forms import Block, Coalitions
from onnxplain.perturb.game import Off
from onnxplain.perturb.grid import Maps
from onnxplain.run.feeds import Arrays

# How far below a layer's least value a channel is put that goes (pytorch-grad-cam).
_BELOW = 1e7


class _ChannelMap(PerturbationAttribution, ClassActivationMap):  # type: ignore[misc]
    """A layer's maps, each times a weight that is found by changing inputs or the layer."""

    needs: ClassVar = ("image",)
    _check_model = staticmethod(Attribution._check_model)

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        attribute_to_layer_input: bool = False,
        relu: bool = True,
        eigen_smooth: bool = False,
        interpolate_mode: str | None = None,
        normalize: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args, attribute_to_layer_input, relu, eigen_smooth,
                interpolate_mode, normalize: as :meth:`GradCAM.attribute`.
            perturbations_per_eval: the most channels in one run; None: as many as fit the memory.
                The result does not depend on it.
            show_progress: show a progress bar on standard error.

        Returns:
            As :meth:`GradCAM.attribute`.

        Raises:
            InputError, TargetError, LayerError; EvaluationError: a score is not finite.
        """
        return self._call(locals())

    def _find(
        self,
        question: Question,
        relu: bool,
        eigen_smooth: bool,
        interpolate_mode: str | None,
        normalize: bool,
        perturbations_per_eval: int | None,
        show_progress: bool,
        **options: Any,
    ) -> Found:
        places = [self._place(question, layer) for layer in question.wrt]
        modes = [chosen_mode(interpolate_mode, len(seen.sizes)) for seen, _ in places]
        count = len(places)

        def write(op: Emitter, of: ir.Value, seed: ir.Value, wrt: list[ir.Value]) -> list[ir.Value]:
            maps = [where.maps(op, v) for v, (_, where) in zip(wrt, places, strict=True)]
            least = [op.ReduceMin(op.Flatten(v), [1], keepdims=1) for v in wrt]
            for value, found, low, (_, where) in zip(wrt, maps, least, places, strict=True):
                found.shape = ir.Shape([dims(value)[0], *where.shape])
                low.shape = ir.Shape([dims(value)[0], 1])
            return [*maps, *least]

        made = self._pass(question, ("channels", *places), write)
        found = Found([])
        for layer, maps, least, (seen, where), mode in zip(
            question.wrt, made[:count], made[count:], places, modes, strict=True
        ):
            if (found.figures.get("completed", np.ones(1)) < 1).any():  # interrupted before it
                weights = np.full((len(maps), where.shape[0]), np.nan)
            else:
                one = dataclasses.replace(question, wrt=(layer,))
                asked, plan = self._game(one, seen, where, maps, least, **options)
                part = self._played(asked, plan, perturbations_per_eval, show_progress)
                weights = part.values[0][:, 0]
                found.figures |= part.figures
            weighted = maps * weights.reshape(*weights.shape, *[1] * (maps.ndim - 2))
            map_ = first_component(weighted) if eigen_smooth else weighted.sum(1, keepdims=True)
            map_ = interpolate(np.maximum(map_, 0) if relu else map_, seen.known, mode)
            found.values.append(seen.place(unit(map_) if normalize else map_)[:, None])
        return found

    def _played(
        self, question: Question, plan: Plan, at_most: int | None, show_progress: bool
    ) -> Found:
        """What a plan finds for all examples."""
        examples = np.arange(question.feeds.count)
        everyone = Features({}, {}, 1, np.zeros((1, 1), np.int64), examples)
        try:
            return self._evaluated(
                question,
                [everyone],
                lambda features: plan,
                at_most=at_most,
                show_progress=show_progress,
                by_feature=False,
            )
        except EvaluationError as error:
            error.partial = None  # weights of some channels are no map
            raise

    def _game(
        self,
        question: Question,
        seen: Image,
        where: Grid,
        maps: np.ndarray,
        least: np.ndarray,
        **options: Any,
    ) -> tuple[Question, Plan]:
        """What is evaluated to find the weights of a layer's maps."""
        raise NotImplementedError


class ScoreCAM(_ChannelMap):
    """Score-CAM: channels weighted by the score of the input seen through their maps.

    Each channel's map is stretched to the input's size, scaled to 0..1 and multiplied with the
    input; the weights are the softmax of the scores over channels, as in pytorch-grad-cam. Source:
    Wang et al., "Score-CAM", 2019, arXiv:1910.01279, algorithm 1. Unit: the layer's.
    """

    name = "score-cam"
    title = "Score-CAM"
    paper = "Wang et al. 2019, arXiv:1910.01279"

    def _game(
        self,
        question: Question,
        seen: Image,
        where: Grid,
        maps: np.ndarray,
        least: np.ndarray,
        **options: Any,
    ) -> tuple[Question, Plan]:
        (value,) = (v for v in self.model.graph.graph.inputs if v.name == seen.name)
        shape = question.feeds.arrays[seen.name].shape[1:]
        matrices = [aligned(*s) for s in zip(where.sizes, seen.known, strict=True)]
        assert value.dtype is not None
        zeros = np.zeros((1, 1, *shape), value.dtype.numpy())
        plan = Plan(
            Maps(maps, seen.channels, matrices),
            _numbered,
            maps.shape[1],
            lambda game: _Softmax(maps.shape[1]),
            Off({seen.name: zeros}),
        )
        return dataclasses.replace(question, wrt=(value,), groups=None), plan


class AblationCAM(_ChannelMap):
    """Ablation-CAM: channels weighted by the share of the score that goes with them.

    What comes before the layer runs once. Source: Desai and Ramaswamy, "Ablation-CAM", WACV 2020,
    section 3. Unit: the layer's. As in pytorch-grad-cam, a channel goes to 0 where the least value
    of an example's layer is 0 (behind a ReLU), else to 1e7 below that, and every channel is tried.
    Where the score is 0, the weight is the drop itself. A saturated probability drops with no
    channel, and the map is empty: explain the scores before the softmax (``ox.Model(output=...)``).
    """

    name = "ablation-cam"
    title = "Ablation-CAM"
    paper = "Desai and Ramaswamy, WACV 2020"

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        attribute_to_layer_input: bool = False,
        relu: bool = True,
        eigen_smooth: bool = False,
        interpolate_mode: str | None = None,
        normalize: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        ablation_value: float | None = None,
    ) -> Any:
        """Explain examples.

        Arguments, result and errors as :meth:`ScoreCAM.attribute`. ``ablation_value``: what
        channels go to; None: as pytorch-grad-cam (see the class).
        """
        return self._call(locals())

    def _game(
        self,
        question: Question,
        seen: Image,
        where: Grid,
        maps: np.ndarray,
        least: np.ndarray,
        ablation_value: float | None = None,
        **options: Any,
    ) -> tuple[Question, Plan]:
        (layer,) = question.wrt
        shape = self._shapes(question)[layer.name or ""]
        assert layer.dtype is not None
        dtype = layer.dtype.numpy()
        if not is_float(layer):
            raise LayerError(
                f"layer '{layer.name}' holds {dtype} values (quantized), below whose least a "
                "channel can't be taken: name the DequantizeLinear behind it"
            )
        if ablation_value is None:
            low = least.reshape(-1).astype(np.float64)
            value = np.maximum(np.where(low == 0, 0, low - _BELOW), np.finfo(dtype).min)
        elif isinstance(ablation_value, int | float) and math.isfinite(ablation_value):
            value = np.full(1, ablation_value)
        else:
            raise InputError(f"ablation_value is a finite number, not {ablation_value!r}")
        full = value.astype(dtype).reshape(-1, *[1] * (len(shape) - 1))
        off = Off({layer.name or "": np.broadcast_to(full, (len(full), *shape[1:]))[None]})
        features = Features(
            {layer.name or "": shape},
            {layer.name or "": _channels(where, shape[1:])},
            where.shape[0] + 1,
            np.arange(where.shape[0] + 1)[None],
            np.arange(shape[0]),
        )
        plan = Plan(
            Coalitions(features, distinct=True),
            without_each(where.shape[0] + 1),
            where.shape[0] + 1,
            lambda game: _Shares(where.shape[0]),
            off,
        )
        return dataclasses.replace(question, groups=(1,)), plan


def _numbered(piece: slice) -> Block:
    """Sample n is the map of channel n."""
    return {"map": np.arange(piece.start, piece.stop)}


def _channels(where: Grid, shape: Sequence[int]) -> np.ndarray:
    """The channel of each of a layer's values, [1, ...]; where a value is in no map, one more.

    Values beside the maps that lie along the same axis (the class token of a transformer) belong to
    its channels.
    """
    if where.order is None:
        ids = np.arange(where.shape[0])
        return ids.reshape([-1 if a == where.channels else 1 for a in range(len(shape) + 1)])
    order = np.asarray(where.order).reshape(where.shape[0], -1)
    for axis, at in enumerate(np.unravel_index(order, shape)):
        if (at == at[:, :1]).all() and len(np.unique(at[:, 0])) == len(order):
            found = np.full(shape[axis], where.shape[0])
            found[at[:, 0]] = np.arange(where.shape[0])
            return found.reshape([-1 if a == axis + 1 else 1 for a in range(len(shape) + 1)])
    ids = np.full(math.prod(shape), where.shape[0])
    ids[order] = np.arange(where.shape[0])[:, None]
    return ids.reshape(1, *shape)


class _Softmax:
    """The softmax over samples of their scores.

    Args:
        samples: how many there are.
    """

    drawn = None

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._scores: np.ndarray = np.empty((0, 0, 0))

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in samples and their scores [S, E, K]."""
        if piece.start == 0:
            self._scores = np.full((*scores.shape[1:], self._samples), np.nan)
        self._scores[:, :, piece] = np.moveaxis(scores, 0, -1)

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        self._scores = self._scores[kept]

    def result(self) -> np.ndarray:
        """[E, K, samples]."""
        share = np.exp(self._scores - self._scores.max(axis=2, keepdims=True))
        return np.asarray(share / share.sum(axis=2, keepdims=True))

    def standard_error(self) -> None:
        """Nothing is random."""


class _Shares(Differences):
    """The share of the score that is lost with each feature; where that is 0, what is lost."""

    def result(self) -> np.ndarray:
        """[E, K, F]."""
        full = self._full[:, :, None]
        return np.asarray(self._values / np.where(full == 0, 1, full))
