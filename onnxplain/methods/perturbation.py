"""Methods that replace parts of the input and look at what happens to the score.

They need no gradient: trees, lookups, integer inputs and Python callables (``BlackBox``) are
explained alike.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from onnxplain.blackbox import BlackBox
from onnxplain.errors import EvaluationError, InputError, LayerError, failing
from onnxplain.graph.emit import HALVES, is_float
from onnxplain.methods import target as targets
from onnxplain.methods.base import Answer, Attribution, Layers, Question, input_values
from onnxplain.methods.baselines import masked_baselines
from onnxplain.methods.noise import positive
from onnxplain.model import Model
from onnxplain.perturb import engine
from onnxplain.perturb.aggregate import Differences, WindowMeans
from onnxplain.perturb.features import Features, features_of
from onnxplain.perturb.forms import Block, Coalitions, Form, Sampler, Whole, Windows
from onnxplain.perturb.game import Game, Given, Off, Permuted, Play, Scores
from onnxplain.perturb.windows import SlidingWindows, sliding_windows
from onnxplain.run.feeds import Arrays, as_dtype, by_name

Baselines = Any
"""None (zeros), a number, an array, a tuple or dict of these, the name of a masker ("blur", "mean",
"noise", "inpaint", "segment-mean"), or ``Background(rows)``, over which scores are averaged."""

NO_EXAMPLE = "there is no example to explain: the inputs have no rows"
TOO_FEW = "there are too few samples for standard errors, which are NaN: take more (n_samples)"


@dataclass(frozen=True)
class Plan:
    """How the examples of a group are evaluated.

    Attributes:
        form, sampler, samples: who is off, in how many samples at most.
        aggregator: makes attributions of the scores of a game.
        off: what "off" means; None: as the baselines say.
        unit: how many samples belong together.
        tolerance: see :func:`engine.run`.
    """

    form: Form
    sampler: Sampler
    samples: int
    aggregator: Callable[[Game], engine.Aggregator]
    off: Off | Permuted | Given | None = None
    unit: int = 1
    tolerance: float | None = None


@dataclass
class Found:
    """What was computed, of all examples: one array [N, K, ...] per source.

    Attributes:
        values, errors: attributions and their standard errors (none where nothing is random).
        columns, column_errors: the same by feature [N, K, features], for the user's feature numbers
            in order.
        figures: figures by name, [N].
        features: which values are one feature that the method made itself, [N, ...] per source.
    """

    values: list[np.ndarray]
    errors: list[np.ndarray] = field(default_factory=list)
    columns: np.ndarray | None = None
    column_errors: np.ndarray | None = None
    figures: dict[str, np.ndarray] = field(default_factory=dict)
    features: list[np.ndarray] = field(default_factory=list)


class PerturbationAttribution(Attribution):
    """Base of the methods that only look at scores.

    A method is :meth:`_find`; the rest (attributions in the user's form, figures, standard errors)
    follows from what it returns.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    multiplies_by_inputs = True
    around: ClassVar[bool] = False
    """Whether its maps are told by what differs from place to place, not by their sizes."""
    every_output: ClassVar[bool] = False
    """Whether target None explains every output value, where there are several."""

    @staticmethod
    def _check_model(model: Any) -> None:
        if not isinstance(model, BlackBox):
            Attribution._check_model(model)

    def _find(self, question: Question, *args: Any, **options: Any) -> Found:
        """The attributions: what a method computes."""
        raise NotImplementedError

    # ---- from what was found to an answer ----------------------------------------------------

    def _attribute(
        self, question: Question, *, return_standard_error: bool = False, **options: Any
    ) -> Any:
        with self._partial(question):
            found = self._find(question, **options)
        answer = self._said(question, found)
        if not return_standard_error:
            return answer.result
        return answer.result, self._known(answer.standard_errors, answer.result)

    @staticmethod
    def _known(errors: Any, result: Any) -> Any:
        """Standard errors; NaN, with a warning, where samples are too few to tell."""
        if errors is not None:
            return errors
        warnings.warn(TOO_FEW, stacklevel=5)
        if isinstance(result, Mapping):
            return {k: np.full_like(v, np.nan) for k, v in result.items()}
        if isinstance(result, tuple | list):
            return type(result)(np.full_like(v, np.nan) for v in result)
        return np.full_like(result, np.nan)

    def answer(self, **arguments: Any) -> Answer:
        """Attributions, figures that tell how far to trust them, standard errors."""
        bound = inspect.signature(self.attribute).bind(**arguments)  # type: ignore[attr-defined]
        bound.apply_defaults()
        question, options, _ = self._parse(bound.arguments)
        options.pop("return_standard_error", None)
        with self._partial(question):
            return self._said(question, self._find(question, **options))

    def explain(self, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """Attributions, and figures that tell how far to trust them."""
        answer = self.answer(**arguments)
        return answer.result, answer.checks

    def _said(self, question: Question, found: Found) -> Answer:
        figures = dict(found.figures)
        completed = figures.pop("completed", np.ones(1))
        if (completed < 1).any():
            figures["completed"] = completed
        errors = None
        if found.errors:
            errors = question.in_form(self._shaped(question, found.errors))
            figures["standard_error"] = engine.relative(found.values, found.errors, self.around)
        elif "samples" in figures:  # too few to tell
            figures["standard_error"] = np.full(len(figures["samples"]), np.nan)
        arrays = self._shaped(question, found.values)
        said = question.in_form if "completed" in figures else question.answer
        features = question.in_form(found.features) if found.features else None
        return Answer(said(arrays), figures, errors, features)

    def _shaped(self, question: Question, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays [N, K, ...] as [N, ...], or [N, outputs..., ...], of the dtype of each source."""
        out = []
        for array, value in zip(arrays, question.wrt, strict=True):
            lead: tuple[int, ...] = array.shape[:1]
            if array.shape[1] != 1:
                lead = question.shape if question.at_once else (*lead, *question.shape)
            plain = is_float(value) and value.dtype not in HALVES
            dtype = value.dtype.numpy() if plain and value.dtype else np.float32
            out.append(array.reshape(*lead, *array.shape[2:]).astype(dtype))
        return out

    @contextmanager
    def _partial(self, question: Question) -> Iterator[None]:
        """What was found before an evaluation failed, in the user's form."""
        try:
            yield
        except EvaluationError as error:
            if isinstance(error.partial, Found):
                error.partial = question.in_form(self._shaped(question, error.partial.values))
            raise

    # ---- the question ------------------------------------------------------------------------

    def _check_source(self, value: ir.Value) -> None:
        if value.dtype == ir.DataType.STRING:
            raise InputError(
                f"input '{value.name}' holds text, which can't be mixed with a baseline in the "
                "graph: wrap the model in ox.BlackBox and use lime-text, or explain what follows"
            )

    def _ask(
        self,
        inputs: Arrays,
        selector: Any,
        additional: Arrays,
        *,
        of_entering: bool = False,
        wrt_entering: bool = False,
    ) -> Question:
        model: Any = self.model
        if not isinstance(model, BlackBox):
            question = super()._ask(
                inputs, selector, additional, of_entering=of_entering, wrt_entering=wrt_entering
            )
            if not question.feeds.count:
                raise InputError(NO_EXAMPLE)
            shared = [k for k in question.feeds.explained if self.model.axes[k] is None]
            if shared and question.groups is None:
                raise InputError(
                    f"input '{shared[0]}' is shared by all examples (examples_axis), so it can't "
                    "be explained for each of them; pass it in additional_forward_args"
                )
            return question
        feeds = model.feeds(inputs, additional)
        if not feeds.count:
            raise InputError(NO_EXAMPLE)
        # All of them: a function of the whole batch may know how many they are.
        answer = model.evaluate(feeds.arrays)
        at_once = not answer.ndim
        shape = answer.shape[1:]
        values = input_values(model, feeds)
        wrt = tuple(values[name] for name in feeds.explained)
        of = ir.Value(name=model.output.name, type=ir.TensorType(ir.DataType.DOUBLE))
        seeds, indices = self._select(of, selector, shape, feeds.count, at_once)
        return Question(
            feeds, of, wrt, shape, seeds, indices, at_once, feeds.form, None, model.axes
        )

    def _select(
        self, of: ir.Value, selector: Any, shape: tuple[int, ...], count: int, at_once: bool
    ) -> tuple[targets.Seeds, np.ndarray | None]:
        several = at_once or self._of is not None or int(np.prod(shape)) != 1
        if selector is None and self.every_output and several:
            return targets.mask_seeds(np.ones((1, *shape))), None
        return super()._select(of, selector, shape, count, at_once)

    def _scores(self, question: Question) -> Scores:
        """The numbers that a question is about."""
        if question.indices is not None and question.shape:
            flat = np.ravel_multi_index(tuple(question.indices.T), question.shape)
            same = flat[:1] if (flat == flat[:1]).all() else flat
            return Scores(same[:, None].astype(np.int64))
        if self._of is None:
            return Scores()
        chosen = np.flatnonzero(np.asarray(question.seeds(slice(0, 1)))[0])
        return Scores(chosen[None].astype(np.int64), summed=True)

    # ---- evaluation --------------------------------------------------------------------------

    def _shapes(self, question: Question) -> dict[str, tuple[int, ...]]:
        """The shape [N, ...] of each source."""
        count = question.feeds.count
        known = {}
        for value in question.wrt:
            array = question.feeds.arrays.get(value.name or "")
            rest = (
                self._trailing(value, question.feeds, False) if array is None else array.shape[1:]
            )
            known[value.name or ""] = (count, *rest)
        return known

    def _features(
        self, question: Question, mask: Any, *, across: bool = True, together: bool = False
    ) -> list[Features]:
        """The features of the sources (see :func:`features_of`)."""
        what = "feature_mask" if question.groups is None else "layer_mask"
        if isinstance(mask, tuple | list) and len(question.wrt) == 1 and len(mask) == 1:
            mask = mask[0]
        shapes = self._shapes(question)
        if mask is not None and question.groups is None:
            mask = {
                k: np.moveaxis(np.asarray(v), question.axes[k] or 0, 0)
                if np.ndim(v) == len(shapes[k])
                else v
                for k, v in by_name(mask, list(shapes), what)[0].items()
            }
        groups = features_of(shapes, mask, across=across, together=together, what=what)
        if question.at_once and any(len(ids) > 1 for g in groups for ids in g.ids.values()):
            raise InputError(
                f"{what}: the model gives one number for all examples together, so they must share "
                "one mask; leave out its examples axis"
            )
        return groups

    def _baselines(
        self, question: Question, given: Baselines, groups: Sequence[Features], seed: int | None
    ) -> Off:
        """What the sources are replaced with."""
        if question.groups is None:
            return Off(masked_baselines(self.model, question.feeds, given, groups, seed))
        shapes = self._shapes(question)
        named, _ = by_name(_spread(given, list(shapes)), list(shapes), "layer_baselines")
        found = {}
        for value in question.wrt:
            name, shape = value.name or "", shapes[value.name or ""]
            array = np.asarray(0 if named.get(name) is None else named[name])
            array = as_dtype(value, array, f"layer_baselines of '{name}'")
            if array.ndim and array.shape not in (shape, (1, *shape[1:]), shape[1:]):
                raise InputError(
                    f"layer_baselines of '{name}': shape {list(array.shape)} was given for a layer "
                    f"of shape {list(shape)}; give that, the same with first dimension 1, or a "
                    "number"
                )
            rows = array.shape[0] if array.shape == shape else 1
            full = np.broadcast_to(
                array.reshape(array.shape or (1,) * len(shape)), (rows, *shape[1:])
            )
            found[name] = full[None]
        return Off(found)

    def _by_layer(self, question: Question, find: Callable[..., Found], **given: Any) -> Found:
        """What is found of each layer of a list by itself: the others stay what they follow from.

        Args:
            question: a question about several layers.
            find: finds the attributions of a question, with the part of ``given`` that is its own.
            given: by name, what the user gave for each layer (a tuple, a dict, or one for all).
        """
        shapes = self._shapes(question)
        names, whole, start = list(shapes), Found([]), 0
        for size in question.groups or ():
            part = question.wrt[start : start + size]
            mine = {k: _part(v, names, start, size, k) for k, v in given.items()}
            start += size
            try:
                found = find(replace(question, wrt=part, groups=(size,), form="array"), **mine)
            except EvaluationError as error:
                if isinstance(error.partial, Found):
                    whole.values += error.partial.values
                error.partial = _filled(whole, shapes) if whole.values else None
                raise
            except KeyboardInterrupt:
                if not whole.values:
                    raise
                whole.figures["completed"] = np.zeros(len(whole.values[0]))
                engine.warn_interrupted(whole.figures["completed"])
                break
            whole.values += found.values
            share = found.figures["completed"]
            whole.figures["completed"] = np.minimum(whole.figures.get("completed", 1), share)
            if (share < 1).any():
                break
        return _filled(whole, shapes)

    def _evaluated(
        self,
        question: Question,
        groups: Sequence[Features],
        plan: Callable[[Features], Plan],
        *,
        baselines: Baselines = None,
        scores: Scores | None = None,
        at_most: int | None = None,
        show_progress: bool = False,
        seed: int | None = None,
        by_feature: bool = True,
        columns: bool = False,
    ) -> Found:
        """Play the game of each group of examples and put what comes out together.

        Args:
            question: the question.
            groups: features, by groups of examples that have equally many.
            plan: how a group is evaluated.
            baselines: what "off" means, where the plan does not say.
            scores: which numbers are explained; default those of the question.
            at_most: the most samples in one run.
            show_progress: whether to show a progress bar on standard error.
            seed: for baselines that are drawn.
            by_feature: whether attributions are numbers of features, which are spread.
            columns: whether the numbers themselves are wanted too.
        """
        if at_most is not None:
            positive(at_most, "perturbations_per_eval")
        wanted = self._scores(question) if scores is None else scores
        rows = 1 if question.at_once else question.feeds.count
        numbers = None
        if columns:
            numbers = np.unique(np.concatenate([g.given.ravel() for g in groups]))
        whole: Found | None = None

        plans = [plan(group) for group in groups]
        total = sum(
            p.samples * (1 if question.at_once else len(g.examples))
            for p, g in zip(plans, groups, strict=True)
        )
        drawn = plans[0].off or self._baselines(question, baselines, groups, seed)
        failed: EvaluationError | None = None
        with progress_bar(f"{self.title} attribution", total, show_progress) as bar:
            for made, group in zip(plans, groups, strict=True):
                play = Play(
                    self.model,
                    question.feeds,
                    question.of,
                    question.wrt,
                    made.form,
                    drawn,
                    wanted,
                    question.at_once,
                    question.shape,
                    at_most,
                )
                try:
                    outcome = engine.run(
                        play,
                        made.sampler,
                        made.samples,
                        made.aggregator,
                        group.examples,
                        unit=made.unit,
                        tolerance=made.tolerance,
                        progress=bar,
                    )
                except EvaluationError as error:
                    failed, outcome = error, error.partial
                except KeyboardInterrupt:  # nothing of this group is known yet
                    if whole is None:
                        raise
                    break
                if outcome.values is not None:
                    whole = _merged(
                        whole, outcome, group, rows, question.at_once, numbers, by_feature
                    )
                if failed is not None or (outcome.completed < 1).any():
                    break
        if failed is not None:
            failed.partial = whole
            raise failed
        assert whole is not None
        if (whole.figures["completed"] == 1).all():
            self._check_met(whole, plans[0].tolerance)
        else:
            engine.warn_interrupted(whole.figures["completed"])
        return whole

    def _check_met(self, found: Found, tolerance: float | None) -> None:
        """Warn of examples that took all their samples and still miss a tolerance."""
        if tolerance is None or not found.errors:
            return
        errors = np.nan_to_num(engine.relative(found.values, found.errors, self.around), nan=np.inf)
        if (missed := errors > tolerance).any():
            worst = float(errors.max())
            more = (
                f"{1 + int((worst / tolerance) ** 2)} times as many" if worst < np.inf else "more"
            )
            warnings.warn(
                f"{int(missed.sum())} of {len(errors)} example(s) have used up their samples with "
                f"standard errors of up to {worst:.2g}, not the tolerance {tolerance:g}: take "
                f"{more} (n_samples, num_samples, num_masks)",
                stacklevel=7,
            )


_COLUMNS = {"values": "columns", "errors": "column_errors"}


def _merged(
    whole: Found | None,
    outcome: engine.Outcome,
    group: Features,
    rows: int,
    at_once: bool,
    numbers: np.ndarray | None,
    by_feature: bool,
) -> Found:
    """The outcome of a group among those of all examples; what is not computed yet is NaN."""
    assert outcome.values is not None
    index = np.zeros(1, np.int64) if at_once else group.examples
    outputs = outcome.values.shape[1]
    whole = whole or Found([])
    found = {"values": outcome.values, "errors": outcome.errors}
    for kind, part in found.items():
        if part is None:
            continue
        spread = group.spread(part) if by_feature else [part]
        if not getattr(whole, kind):
            setattr(whole, kind, [np.full((rows, *a.shape[1:]), np.nan) for a in spread])
        for full, one in zip(getattr(whole, kind), spread, strict=True):
            full[index] = one
        if numbers is not None:
            columns = np.zeros((len(index), outputs, len(numbers)))
            at = np.searchsorted(numbers, group.given)
            wide = np.broadcast_to(at[:, None], part.shape)
            np.put_along_axis(columns, wide, part, axis=2)
            if getattr(whole, _COLUMNS[kind]) is None:
                empty = np.full((rows, *columns.shape[1:]), np.nan)
                setattr(whole, _COLUMNS[kind], empty)
            getattr(whole, _COLUMNS[kind])[index] = columns
    named = {"completed": outcome.completed, **outcome.extra}
    if outcome.samples.any():
        named["samples"] = outcome.samples
    for name, figure in named.items():
        if name not in whole.figures:
            start = 0 if name in ("samples", "completed") else np.nan
            whole.figures[name] = np.full((rows, *figure.shape[1:]), start, figure.dtype)
        whole.figures[name][index] = figure
    return whole


@contextmanager
def progress_bar(name: str, total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar on standard error that counts evaluated rows."""
    with tqdm(desc=name, total=total, disable=not show, unit="row", unit_scale=True) as bar:
        yield bar.update


def _filled(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> Found:
    """What was found of the first sources, and NaN for the others."""
    lead = found.values[0].shape[:2]
    rest = list(shapes.values())[len(found.values) :]
    return replace(found, values=[*found.values, *(np.full((*lead, *s[1:]), np.nan) for s in rest)])


def _part(given: Any, names: Sequence[str], start: int, size: int, what: str) -> Any:
    """What was given for some of the layers."""
    if given is not None and not isinstance(given, Mapping | tuple | list) and np.ndim(given):
        raise InputError(
            f"{what}: one array was given for {len(names)} layers ({', '.join(names)}); give a "
            "tuple or dict with one for each"
        )
    named, _ = by_name(_spread(given, names), names, what)
    if not named:
        return None
    mine = tuple(named.get(name) for name in names[start : start + size])
    return mine if size > 1 else mine[0]


def _spread(given: Any, names: Sequence[str]) -> Any:
    """One baseline for all sources, where a number was given."""
    if given is None or isinstance(given, Mapping | tuple):
        return given or {}
    if isinstance(given, list):
        return tuple(given)
    if len(names) > 1 and np.ndim(given) > 0:
        raise InputError(
            f"one array can't be the baseline of {len(names)} values ({', '.join(names)}); give a "
            "number, or a tuple with one for each"
        )
    return dict.fromkeys(names, given)


# --- methods ------------------------------------------------------------------------------------


class FeatureAblation(PerturbationAttribution):
    """What the score loses when a feature is replaced by its baseline, feature by feature.

    Attribution of feature f: score(x) - score(x with f at the baseline), in the unit of the score;
    each element gets that of its feature. Source: Zeiler and Fergus 2014, arXiv:1311.2901, section
    4.2, for single features and groups.

    Args:
        model: an ox.Model or ox.BlackBox.
    """

    name = "feature-ablation"
    title = "Feature Ablation"
    paper = "Zeiler and Fergus 2014, arXiv:1311.2901"
    every_output = True

    def attribute(
        self,
        inputs: Arrays,
        baselines: Baselines = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        enable_cross_tensor_attribution: bool = True,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name), of numbers.
            baselines: what a feature is replaced with: None (zeros), a number, an array of the
                input's shape or with first dimension 1, a tuple or dict of these, the name of a
                masker ("mean", "blur", "noise", "inpaint", "segment-mean"), or
                ``Background(rows)``, over which scores are averaged.
            target: see :class:`Saliency`; None with several output values explains all of them.
            additional_forward_args: the remaining inputs, fed and not attributed.
            feature_mask: integers of at least 0 that number the features, of the input's shape
                (without the examples axis, or with it where each example has its own) or
                broadcastable to it; a tuple or dict with one for each input. None: each element is
                a feature.
            perturbations_per_eval: the most perturbations in one run; None: as many as fit the
                memory. The result does not depend on it.
            show_progress: show a progress bar on standard error.
            enable_cross_tensor_attribution: a number in the masks of several inputs is one feature;
                False: one in each of them.

        Returns:
            Of the inputs' shape, in their form. With target None and several output values, of
            shape output + input; with one number for the whole batch, with first dimension 1.

        Raises:
            InputError: an argument does not fit; EvaluationError: the model failed part-way.
        """
        return self._call(locals())

    def _find(
        self,
        question: Question,
        baselines: Baselines = None,
        feature_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        enable_cross_tensor_attribution: bool = True,
        scores: Scores | None = None,
    ) -> Found:
        if question.form == "list" and len(question.groups or ()) > 1:
            shared: dict[str, Any] = {
                "perturbations_per_eval": perturbations_per_eval,
                "show_progress": show_progress,
                "scores": scores,
            }
            find = functools.partial(self._find, **shared)
            return self._by_layer(question, find, baselines=baselines, feature_mask=feature_mask)

        def plan(features: Features) -> Plan:
            form = Coalitions(features, distinct=True)
            count = features.count
            return Plan(form, without_each(count), count + 1, lambda game: Differences(count))

        groups = self._features(question, feature_mask, across=enable_cross_tensor_attribution)
        return self._evaluated(
            question,
            groups,
            plan,
            baselines=baselines,
            scores=scores,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
        )


def without_each(features: int) -> Sampler:
    """Sample 0 has all features, sample f + 1 lacks feature f."""
    from onnxplain.kernels.coalitions import pack

    full = pack(np.ones((1, features), bool))

    def sampler(piece: slice) -> Block:
        z = np.repeat(full, piece.stop - piece.start, axis=0)
        lacking = np.arange(max(piece.start - 1, 0), piece.stop - 1)
        rows = np.arange(len(z) - len(lacking), len(z))
        z[rows, lacking // 64] ^= np.uint64(1) << (lacking % 64).astype(np.uint64)
        return {"z": z}

    return sampler


class LayerFeatureAblation(FeatureAblation):
    """Feature ablation of a layer's values; what comes before the layer runs once.

    Args:
        model: the model.
        layer: the layer, or a list of layers.
    """

    name = "layer-feature-ablation"
    title = "Layer Feature Ablation"
    needs = ("layer",)
    explains = "layer"

    def __init__(self, model: Model, layer: Layers) -> None:
        if layer is None:
            raise LayerError("no layer was given: name one; model.layers() lists them")
        super().__init__(model, wrt=layer)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        layer_baselines: Any = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        layer_mask: Any = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain examples by a layer.

        ``layer_baselines`` and ``layer_mask`` are those of :meth:`FeatureAblation.attribute`, for
        the layer's values (of a quantized layer its stored integers: name the DequantizeLinear
        behind it for real units); ``attribute_to_layer_input``: explain by what enters the layer.
        Other arguments and errors as there.

        Returns:
            An array of the layer's shape; a tuple where several values leave the scope; a list for
            a list of layers.
        """
        return self._call(locals())

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Question, dict[str, Any], bool]:
        return super()._parse(_of_layer(arguments))


def _of_layer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's form by the names that they have for inputs."""
    names = {"layer_baselines": "baselines", "layer_mask": "feature_mask"}
    return {names.get(k, k): v for k, v in arguments.items()}


class NeuronFeatureAblation(FeatureAblation):
    """Feature ablation that explains a neuron of a layer.

    Args:
        model: the model.
        layer: the neuron's layer.
    """

    name = "neuron-feature-ablation"
    title = "Neuron Feature Ablation"
    needs = ("layer", "neuron")

    def __init__(self, model: Model, layer: str) -> None:
        if layer is None:
            raise LayerError("no layer was given: name one; model.layers() lists them")
        super().__init__(model, of=layer)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        neuron_selector: Any,
        baselines: Baselines = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        attribute_to_neuron_input: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain a neuron of the layer.

        ``neuron_selector``: int, or tuple of ints and slices (summed), without the examples axis;
        or a function that makes one number for each row of the layer's values, [rows, ...] ->
        [rows]. ``attribute_to_neuron_input``: of what enters the layer. Other arguments, result and
        errors as :meth:`FeatureAblation.attribute`.
        """
        return self._call(locals())

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Question, dict[str, Any], bool]:
        selector = arguments["neuron_selector"]
        if not callable(selector):
            if selector is None:
                raise InputError(
                    "neuron_selector is None: say which neuron of the layer to explain"
                )
            return super()._parse(arguments)
        question, options, delta = super()._parse({**arguments, "neuron_selector": None})
        return question, {**options, "scores": Scores(finish=_finished(selector))}, delta


def _finished(function: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A user's function of a layer's values, checked."""

    def finish(values: np.ndarray) -> np.ndarray:
        with failing("neuron_selector"):
            found = np.asarray(function(values))
        if found.shape not in ((len(values),), (len(values), 1)) or found.dtype.kind not in "fiub":
            raise EvaluationError(
                f"neuron_selector answered {found.dtype} {list(found.shape)} to layer values "
                f"{list(values.shape)}: return one number for each row, [{len(values)}]"
            )
        return found.reshape(len(values))

    return finish


class FeaturePermutation(PerturbationAttribution):
    """What the score loses when a feature takes its values from other examples of the batch.

    Attribution of feature f: score(x) - score(x with f permuted among the examples). Source:
    Fisher, Rudin and Dominici 2019, arXiv:1801.01489, for single examples.

    Args:
        model: an ox.Model or ox.BlackBox.
        perm_func: a function of an input [N, ...] and a boolean mask [1 or N, ...] of the feature
            (True: of the feature) that returns the permuted input; None permutes the examples at
            random, never leaving all in place.
    """

    name = "feature-permutation"
    title = "Feature Permutation"
    paper = "Fisher et al. 2019, arXiv:1801.01489"
    needs: ClassVar[tuple[str, ...]] = ("random",)
    every_output = True

    def __init__(
        self,
        model: Model,
        perm_func: Callable[[np.ndarray, np.ndarray], Any] | None = None,
        *,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, wrt=wrt)
        if perm_func is not None and not callable(perm_func):
            raise InputError(f"perm_func must be a function, not {type(perm_func).__name__}")
        self.perm_func = perm_func

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        enable_cross_tensor_attribution: bool = True,
        seed: int | None = None,
    ) -> Any:
        """Explain a batch of at least two examples.

        Arguments, result and errors as :meth:`FeatureAblation.attribute`; the other examples take
        the place of a baseline, so the result depends on the batch.

        ``seed``: the permutations depend on it alone; None draws one.
        """
        return self._call(locals())

    def _find(
        self,
        question: Question,
        feature_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        enable_cross_tensor_attribution: bool = True,
        seed: int | None = None,
    ) -> Found:
        rows = question.feeds.count
        if rows < 2:
            raise InputError(
                "feature permutation takes a feature's values from the other examples, and one "
                "example was given: give two or more"
            )
        if question.form == "list" and len(question.groups or ()) > 1:
            shared: dict[str, Any] = {
                "perturbations_per_eval": perturbations_per_eval,
                "show_progress": show_progress,
                "seed": drawn_seed(seed),
            }
            find = functools.partial(self._find, **shared)
            return self._by_layer(question, find, feature_mask=feature_mask)
        across = enable_cross_tensor_attribution
        groups = self._features(question, feature_mask, across=across, together=True)
        base = drawn_seed(seed)

        def plan(features: Features) -> Plan:
            count = features.count
            lacking = without_each(count)
            if self.perm_func is not None:
                sampler = self._by_user(question, features)
                form: Form = Whole()
                off: Given | Permuted = Given()
            else:

                def sampler(piece: slice) -> Block:
                    return {**lacking(piece), "order": derangements(base, piece, rows)}

                form, off = Coalitions(features, distinct=True), Permuted()
            return Plan(form, sampler, count + 1, lambda game: Differences(count), off)

        return self._evaluated(
            question,
            groups,
            plan,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
        )

    def _by_user(self, question: Question, features: Features) -> Sampler:
        """Samples that the user's function permutes, feature by feature."""
        assert self.perm_func is not None
        permute = self.perm_func
        values = self._values(question)

        def one(name: str, number: int) -> np.ndarray:
            x, mask = values[name], features.ids[name] == number - 1
            if number == 0 or not mask.any():
                return x
            with failing("perm_func"):
                found = np.asarray(permute(x.copy(), mask))
            if found.shape != x.shape:
                raise EvaluationError(
                    f"perm_func returned shape {list(found.shape)} for '{name}' of shape "
                    f"{list(x.shape)}: it must return the input with the feature permuted"
                )
            return found.astype(x.dtype, copy=False)

        def sampler(piece: slice) -> Block:
            numbers = range(piece.start, piece.stop)
            return {f"given.{k}": np.stack([one(k, n) for n in numbers]) for k in values}

        return sampler

    def _values(self, question: Question) -> dict[str, np.ndarray]:
        """The sources of all examples."""
        names = [v.name or "" for v in question.wrt]
        if question.groups is None:
            return {name: question.feeds.arrays[name] for name in names}
        return self.model.run(self.model.forward(names), question.feeds)


def drawn_seed(seed: int | None) -> int:
    """A seed for counter-based random numbers: the user's, or a fresh one.

    Raises:
        InputError: it is not an integer of at least 0.
    """
    if seed is not None:
        return positive(seed, "seed", 0) % (1 << 64)
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])


def derangements(seed: int, piece: slice, rows: int) -> np.ndarray:
    """Permutations of ``rows`` examples that don't leave all in place, int64 [S, rows].

    Uniform among these: one that does is drawn again from the next stream.
    """
    from onnxplain.kernels.coalitions import permutations

    found = permutations(seed, piece.start, piece.stop, rows).astype(np.int64)
    stay = np.arange(rows)
    stream = seed
    while (same := (found == stay).all(axis=1)).any():
        stream = (stream + 0x9E3779B97F4A7C15) % (1 << 64)
        found[same] = permutations(stream, piece.start, piece.stop, rows)[same]
    return found


class LayerFeaturePermutation(FeaturePermutation):
    """Feature permutation of a layer's values; what comes before the layer runs once.

    Args:
        model: the model.
        layer: the layer, or a list of layers.
        perm_func: see :class:`FeaturePermutation`.
    """

    name = "layer-feature-permutation"
    title = "Layer Feature Permutation"
    needs = ("random", "layer")
    explains = "layer"

    def __init__(
        self,
        model: Model,
        layer: Layers,
        perm_func: Callable[[np.ndarray, np.ndarray], Any] | None = None,
    ) -> None:
        if layer is None:
            raise LayerError("no layer was given: name one; model.layers() lists them")
        super().__init__(model, perm_func, wrt=layer)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        layer_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        seed: int | None = None,
    ) -> Any:
        """Explain a batch by a layer.

        ``layer_mask`` numbers the features of the layer's values. Other arguments and errors as
        :meth:`FeaturePermutation.attribute`; result as :meth:`LayerFeatureAblation.attribute`.
        """
        return self._call(locals())

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Question, dict[str, Any], bool]:
        return super()._parse(_of_layer(arguments))


class Occlusion(PerturbationAttribution):
    """What the score loses where a sliding window covers the input with a baseline.

    The attribution of an element is the mean of score(x) - score(x under the window) over the
    windows that cover it. Source: Zeiler and Fergus 2014, arXiv:1311.2901, section 4.2.

    Args:
        model: an ox.Model or ox.BlackBox.
    """

    name = "occlusion"
    title = "Occlusion"
    paper = "Zeiler and Fergus 2014, arXiv:1311.2901"
    every_output = True

    def attribute(
        self,
        inputs: Arrays,
        sliding_window_shapes: tuple[int, ...] | tuple[tuple[int, ...], ...],
        strides: int | tuple[int, ...] | tuple[int | tuple[int, ...], ...] | None = None,
        baselines: Baselines = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, baselines, target, additional_forward_args, perturbations_per_eval,
                show_progress: see :meth:`FeatureAblation.attribute`.
            sliding_window_shapes: the window, one length for each axis of the input without the
                examples axis; a tuple of these for several inputs. The windows of one input come
                after those of the other.
            strides: how far a window moves: one number, or one for each axis; a tuple of these for
                several inputs. None: 1. The last window of an axis is cut off at the end.

        Returns:
            As :meth:`FeatureAblation.attribute`.

        Raises:
            InputError: a window larger than the input, a stride larger than the window, or an
                argument of another form; EvaluationError: the model failed part-way.
        """
        return self._call(locals())

    def _find(
        self,
        question: Question,
        sliding_window_shapes: Any,
        strides: Any = None,
        baselines: Baselines = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Found:
        shapes = {name: shape[1:] for name, shape in self._shapes(question).items()}
        windows = sliding_windows(shapes, sliding_window_shapes, strides)
        form = Windows(shapes, windows.whole)

        def plan(features: Features) -> Plan:
            return Plan(form, windows.sampler, windows.count + 1, lambda game: WindowMeans(shapes))

        found = self._evaluated(
            question,
            features_of(self._shapes(question)),
            plan,
            baselines=baselines,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
        )
        found.features = _cells(windows)
        return found


def _cells(windows: SlidingWindows) -> list[np.ndarray]:
    """Which elements the same windows cover, [1, ...] per source: these have one attribution."""
    found: list[np.ndarray] = []
    count = 0
    for name, shape in windows.shapes.items():
        ids = np.zeros((1,) * (len(shape) + 1), np.int64)
        for axis, size in enumerate(shape):
            start = np.arange(windows.steps[name][axis]) * windows.strides[name][axis]
            edges = np.union1d(start, start + windows.sizes[name][axis])
            cell = np.searchsorted(edges, np.arange(size), side="right")
            along = np.expand_dims(cell, [i for i in range(ids.ndim) if i != axis + 1])
            ids = ids * (len(edges) + 1) + along
        found.append(ids + count)
        count += ids.max() + 1
    return found
