"""LIME for images: which segments of a picture hold the prediction up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.emit import dims
from onnxplain.methods.base import Question
from onnxplain.methods.lime_common import (
    EVERY,
    SELECTIONS,
    LimeAttribution,
    LimeExplanation,
    Metric,
    Pace,
    Sampled,
    chosen_labels,
    distinct,
)
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import progress_bar as bar_of
from onnxplain.methods.spatial import channel_axis
from onnxplain.model import Model
from onnxplain.perturb.segments import (
    SEGMENTATIONS,
    Segmentation,
    as_picture,
    as_rgb,
    segment_means,
    segmentation,
    segments_of,
)
from onnxplain.run import memory
from onnxplain.run.feeds import Arrays, Feeds

# Bytes of perturbed pictures that are made on the host at once.
_BATCH_BYTES = 1 << 26
# Samples that are drawn at once.
_DRAWN = 4096
# Segments of which each alone is kept, to try whether pictures are preprocessed pixel by pixel.
_PROBES = 4


class ImageExplanation(LimeExplanation):
    """The local linear models of an image, by label; a feature is a segment.

    Attributes:
        image: [H, W, C], as it was explained.
        segments: int64 [H, W], numbered from 0.
    """

    def __init__(
        self,
        image: np.ndarray,
        segments: np.ndarray,
        predict_proba: np.ndarray,
        top_labels: list[int] | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(predict_proba, top_labels, class_names)
        self.image, self.segments = image, segments

    def get_image_and_mask(
        self,
        label: int,
        positive_only: bool = True,
        negative_only: bool = False,
        hide_rest: bool = False,
        num_features: int = 5,
        min_weight: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The segments that speak for a label, or against it, or both.

        Args:
            label: an explained label.
            positive_only: only segments that speak for it.
            negative_only: only segments that speak against it. With neither, both are shown: the
                green channel of those for it, and the red one of those against it, is at the
                image's maximum.
            hide_rest: black out the rest.
            num_features: the most segments, the weightiest first.
            min_weight: leave out segments that weigh less.

        Returns:
            The image [H, W, 3], and a mask int64 [H, W]: 1 where a shown segment is (-1 where both
            kinds are shown and it speaks against the label), else 0.

        Raises:
            TargetError: the label was not explained.
            InputError: both ``positive_only`` and ``negative_only``.
        """
        weights = self.of(label)
        if positive_only and negative_only:
            raise InputError("positive_only and negative_only can't both be: choose one, or none")
        one_sided = positive_only or negative_only
        if one_sided:
            sign = 1 if positive_only else -1
            weights = [(f, w) for f, w in weights if w * sign > max(min_weight, 0)][:num_features]
        else:
            weights = [(f, w) for f, w in weights[:num_features] if abs(w) >= min_weight]
        image = as_rgb(self.image)
        shown = np.zeros_like(image) if hide_rest else image.copy()
        mask = np.zeros_like(self.segments)
        for feature, weight in weights:
            inside = self.segments == feature
            shown[inside] = image[inside]
            mask[inside] = 1 if one_sided or weight >= 0 else -1
            if not one_sided:
                shown[inside, int(weight >= 0)] = image.max()
        return shown, mask


class LimeImage(LimeAttribution):
    """LIME for images: a linear model of the score, by which segments of the picture are there.

    The picture is divided into segments; each sample keeps each of them with probability 1/2 and
    puts its mean color (or ``hide_color``) in the place of the others. Ribeiro, Singh, Guestrin,
    2016, arXiv:1602.04938. The same seed gives the segments, samples and weights of the lime
    package. Unit: that of the output, per segment; all elements of a segment get its weight.

    Args:
        model: a model of images, or a ``BlackBox`` of batches of them.
        preprocess: for :meth:`explain_instance`; makes the model's input of images [N, H, W, 3].
            Where it works pixel by pixel (which is tried on a few samples) it is called for the
            image alone, and samples are made next to the model; else it is called for each sample.
        kernel_width: width of the exponential kernel, in units of the distance.
        kernel: weights of samples, by distances [S] and ``kernel_width``.
        feature_selection: "auto", "highest_weights", "forward_selection", "lasso_path" (needs
            scikit-learn) or "none".
        random_state: seed (or numpy's RandomState) of :meth:`explain_instance`.
    """

    name = "lime-image"
    title = "LIME for Images"
    needs = ("image", "random")
    choices: ClassVar = {"feature_selection": SELECTIONS, "segmentation": SEGMENTATIONS}

    def __init__(
        self,
        model: Model,
        preprocess: Callable[[np.ndarray], Arrays] | None = None,
        kernel_width: float = 0.25,
        kernel: Callable[[np.ndarray, float], np.ndarray] | None = None,
        feature_selection: str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        super().__init__(model, kernel_width, kernel, feature_selection, random_state)
        if preprocess is not None and not callable(preprocess):
            raise InputError(f"preprocess is a function of images, not {preprocess!r}")
        self.preprocess = preprocess

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        segmentation: str | Segmentation = "quickshift",
        hide_color: float | np.ndarray | None = None,
        num_samples: int = 1000,
        num_features: int | None = None,
        batch_size: int | None = None,
        distance_metric: str | Metric = "cosine",
        model_regressor: Any = None,
        additional_forward_args: Arrays = None,
        *,
        seed: int | None = None,
        tolerance: float | None = None,
        return_standard_error: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Explain examples that are what the model takes: [N, C, H, W], [N, H, W, C] or [N, H, W].

        Args:
            inputs: the pictures.
            target: the explained value of the output (see ``Saliency``).
            segmentation: "quickshift", "slic", "felzenszwalb", "watershed" (see
                ``ox.segmentation``), a function of a picture [H, W, 3] in 0..1 that returns
                segment numbers [H, W], or these themselves.
            hide_color: what takes the place of segments that are off, in the model's units: a
                number, or one for each channel; None: the mean of the segment.
            num_samples: how many samples, the picture itself among them.
            num_features: the most segments that get a weight; None: all.
            batch_size: the most samples evaluated at once; None: as many as fit the memory. The
                result does not depend on it.
            distance_metric: of a sample from the picture: "cosine", "euclidean", another of
                ``scipy.spatial.distance.cdist``, or a function of two.
            model_regressor: anything with scikit-learn's ``fit(X, y, sample_weight)``, ``coef_``
                and ``predict``; None: ridge regression.
            additional_forward_args: the model's other inputs.
            seed: the samples depend on it alone; None draws one.
            tolerance: an example gets no more samples once the standard errors of its attributions
                are, summed, at most this share of their sizes.
            return_standard_error: also return how far the weights are off, typically.
            show_progress: show a progress bar on standard error.

        Returns:
            An array of the inputs' shape (in their form); with ``return_standard_error`` a pair of
            these.

        Raises:
            InputError: a segmentation with one segment, of another shape or dtype; an option out of
                range.
            EvaluationError: the model answers NaN.
        """
        return self._call(locals())

    def explain_instance(
        self,
        image: np.ndarray,
        labels: Iterable[int] = (1,),
        hide_color: Any = None,
        top_labels: int | None = 5,
        num_features: int | None = 100000,
        num_samples: int = 1000,
        batch_size: int | None = None,
        segmentation_fn: Segmentation | None = None,
        distance_metric: Metric = "cosine",
        model_regressor: Any = None,
        random_seed: int | None = None,
        progress_bar: bool = False,
    ) -> ImageExplanation:
        """Explain an image as the explainer of images of the lime package does.

        Args:
            image: [H, W, 3], or grey [H, W], as ``preprocess`` takes it; without ``preprocess``,
                the values that the model takes, channels last or first.
            labels: what is explained where ``top_labels`` is None.
            hide_color: what takes the place of segments that are off; None: their mean color.
            top_labels: explain so many labels with the highest scores instead.
            num_features, num_samples, batch_size, distance_metric, model_regressor: see
                :meth:`attribute`.
            segmentation_fn: as ``segmentation`` of :meth:`attribute`, of the image as it is; None:
                quickshift with kernel_size=4, max_dist=200, ratio=0.2 whatever its size.
            random_seed: None draws a number first, as the lime package does. Today's scikit-image
                takes no such seed, so that the segments don't depend on it.
            progress_bar: show one on standard error.

        Raises:
            InputError, EvaluationError: as :meth:`attribute`.
            TargetError: a label is out of range.
        """
        picture, axis = self._image(image)
        fit = self._surrogate(num_features, distance_metric, model_regressor)
        if random_seed is None:
            self._random.randint(0, high=1000)
        if segmentation_fn is None:
            segmentation_fn = segmentation("quickshift", kernel_size=4, max_dist=200)
        segments = segments_of(as_rgb(picture), segmentation_fn)
        z = _coalitions(self._random, num_samples, segments)
        hidden = _hidden(picture, segments, hide_color)
        make = self.preprocess or (lambda batch: _laid_out(batch, axis))
        question = self._ask(make(picture[None]), EVERY, None)
        off = self._hidden_feeds(make(hidden[None]))

        rows, numbers = distinct(z)

        def perturbed(z: np.ndarray) -> Feeds:
            return self.model.feeds(make(np.where(z[:, segments][..., None], picture, hidden)))

        def render(piece: slice) -> Feeds:
            return perturbed(rows[piece])

        ids = None if off is None else _ids(segments, perturbed, question.feeds, off)
        with bar_of(f"{self.title} attribution", num_samples, progress_bar) as tick:
            pace = Pace(tick)
            if ids is not None and off is not None:
                gone = off.arrays[off.explained[0]][0]
                parts = self._present(question, 0, z, ids, gone, pace, batch_size)
            else:
                size = self._at_once(picture, batch_size)
                parts = self._answers(numbers, render, size, pace)
            taken = pace.take(z, parts).complete()
        scores = taken.scores
        wanted, top = chosen_labels(scores[0], labels, top_labels)
        explanation = ImageExplanation(picture, segments, scores[0], top, self.class_names)
        fit.explain(explanation, taken.samples, scores, wanted)
        return explanation

    def _sampled(
        self,
        question: Question,
        example: int,
        random: np.random.RandomState,
        count: int,
        pace: Pace,
        **options: Any,
    ) -> Sampled:
        (value,) = question.wrt
        x = question.feeds.arrays[value.name or ""][example]
        axis = self._channels(value, x.shape)
        picture = x[:, :, None] if axis is None else np.moveaxis(x, axis, -1)
        random.randint(0, high=1000)  # as explain_instance
        segments = segments_of(as_picture(picture), options["segmentation"])
        z = _coalitions(random, count, segments)
        off = _laid_out(_hidden(picture, segments, options["hide_color"])[None], axis)[0]
        ids = _spread(segments, axis)
        size = options["batch_size"]
        parts = self._present(question, example, z, ids, off, pace, size)
        return pace.take(z, parts, np.broadcast_to(ids, x.shape))

    def _at_once(self, picture: np.ndarray, batch_size: int | None) -> int:
        """How many perturbed pictures are made on the host at once."""
        if batch_size is not None:
            return positive(batch_size, "batch_size")
        limit = self.model.settings.memory_limit
        room = _BATCH_BYTES if limit is None else min(_BATCH_BYTES, memory.budget(limit) // 8)
        return int(max(room // (4 * picture.size), 1))  # preprocessed to float32, most likely

    def _hidden_feeds(self, made: Any) -> Feeds | None:
        """What is made of the wholly hidden picture; None where that is no number.

        Samples hardly ever hide all of it: a division by its spread need not fail theirs.
        """
        try:
            return self.model.feeds(made)
        except InputError:
            return None

    def _image(self, given: Any) -> tuple[np.ndarray, int | None]:
        """An image [H, W, C], and which axis the model has its channels on."""
        image = np.asarray(given)
        if image.ndim == 3 and image.shape[2] not in (1, 3) and image.shape[0] in (1, 3):
            image = np.moveaxis(image, 0, -1)
        grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
        if image.dtype.kind not in "uif" or not image.size or image.ndim not in (2, 3):
            raise InputError(
                f"an image of {image.dtype} of shape {list(image.shape)} was given: give numbers "
                "[H, W, 3] or grey [H, W], one image at a time"
            )
        if self.preprocess is not None or not isinstance(self.model, Model):
            if image.ndim == 3 and image.shape[2] not in (1, 3):
                raise InputError(
                    f"the image has {image.shape[2]} channels: give 3, or 1 for grey (of RGBA, "
                    "image[..., :3])"
                )
            return as_rgb(image), 2
        value = self.model.graph.graph.inputs[0]
        if value.shape is None:
            raise InputError(
                f"the shape of '{value.name}' is not known, so neither is where its channels are: "
                "give preprocess, which makes the model's input of images [N, H, W, 3]"
            )
        shape = dims(value)[1:]
        axis = self._channels(value, shape)
        image = image[:, :, None] if image.ndim == 2 else image
        return as_rgb(image) if grey and axis is not None and shape[axis] == 3 else image, axis

    def _channels(self, value: ir.Value, shape: tuple[Any, ...]) -> int | None:
        """The axis of the channels of one example of such a shape; None where it has none.

        Raises:
            InputError: it is no picture.
        """
        if len(shape) == 2:
            return None
        known = channel_axis(value) if isinstance(self.model, Model) else None
        likely = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in (1, 3)]
        if len(shape) != 3 or (known is None and not likely):
            raise InputError(
                f"'{value.name}' takes {list(shape)} for one example, which is no picture "
                "[channels, height, width] or [height, width, channels]: for tables take "
                "lime-tabular, for text lime-text, for anything else lime with a feature_mask"
            )
        return likely[0] if known is None else known - 1


def _ids(
    segments: np.ndarray, perturbed: Callable[[np.ndarray], Feeds], x: Feeds, off: Feeds
) -> np.ndarray | None:
    """Segments by element of the model's input, where samples can be mixed of those elements.

    What is made of pictures is compared on coalitions of one segment, and of all but one: what
    looks at more than a pixel, or at the whole picture, shows there.
    """
    if len(x.explained) != 1:
        return None
    (name,) = x.explained
    count = int(segments.max()) + 1
    alone = np.eye(count, dtype=bool)[np.linspace(0, count - 1, _PROBES).astype(int)]
    probes = np.concatenate([alone, ~alone])
    made, kept, gone = perturbed(probes).arrays[name], x.arrays[name], off.arrays[name]
    for axis in (None, 0, 2):
        ids = _spread(segments, axis)
        shapes = zip(ids.shape, kept.shape[1:], strict=False)
        if ids.ndim == kept.ndim - 1 and all(a in (1, b) for a, b in shapes):
            mixed = np.where(probes[:, ids], kept, gone)
            tiny = 1e-6 * float(np.abs(kept).max())
            if mixed.shape == made.shape and np.allclose(mixed, made, rtol=1e-6, atol=tiny):
                return ids
    return None


def _spread(segments: np.ndarray, axis: int | None) -> np.ndarray:
    """Segments [H, W] with an axis of channels."""
    return segments if axis is None else np.expand_dims(segments, axis)


def _coalitions(random: np.random.RandomState, count: int, segments: np.ndarray) -> np.ndarray:
    """Which segments are kept in each sample, boolean [count, F]; all of them in the first."""
    positive(count, "num_samples", 2)
    features = int(segments.max()) + 1
    z = np.empty((count, features), bool)
    for start in range(0, count, _DRAWN):  # integers take eight times the memory
        z[start : start + _DRAWN] = random.randint(0, 2, z[start : start + _DRAWN].shape)
    z[0] = True
    return z


def _hidden(image: np.ndarray, segments: np.ndarray, color: Any) -> np.ndarray:
    """The image [H, W, C] with nothing of its segments to be seen."""
    if color is None:
        return segment_means(image, segments)
    try:
        values = np.broadcast_to(np.asarray(color), image.shape)
        limits = np.iinfo(image.dtype) if image.dtype.kind in "iu" else np.finfo(image.dtype)
        fits = bool(((values >= limits.min) & (values <= limits.max)).all())
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(
            f"hide_color {color!r} is neither a number nor one for each of the {image.shape[2]} "
            f"channels that {image.dtype} can hold"
        )
    return values.astype(image.dtype)


def _laid_out(batch: np.ndarray, axis: int | None) -> np.ndarray:
    """Images [N, H, W, C] as a model takes them that has its channels on an axis of an example."""
    return batch[..., 0] if axis is None else np.moveaxis(batch, -1, 1 + axis)
