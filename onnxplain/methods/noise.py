"""Noise tunnel: any method, averaged over noisy copies of the input.

Also what sampling methods share: streams of random numbers, samples in blocks of bounded memory,
and moments of what comes out of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.edit import has_rows
from onnxplain.graph.emit import is_float, rank
from onnxplain.methods.base import Attribution, Layers, input_values
from onnxplain.methods.baselines import distributions
from onnxplain.model import Model
from onnxplain.run import memory
from onnxplain.run.feeds import Arrays, Feeds, by_name, in_form

NT_TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")

# Bytes that one block of samples may take besides the model's own memory.
_BLOCK_BYTES = 1 << 26

Stream = Callable[[int], np.random.Generator]
"""The random numbers of a sample: they depend on the seed and the sample's number alone."""


class Moments:
    """Mean and variance of arrays that come one after the other, in float64.

    Source: Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products",
    1962; nothing large is subtracted from anything large.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray = np.zeros(())
        self._squares: np.ndarray = np.zeros(())

    def add(self, array: np.ndarray) -> None:
        """Take in one more array."""
        self.count += 1
        gap = array - self.mean
        self.mean = self.mean + gap / self.count
        self._squares = self._squares + gap * (array - self.mean)

    @property
    def variance(self) -> np.ndarray:
        """The mean square minus the square of the mean, as Captum's vargrad."""
        return self._squares / self.count

    @property
    def standard_error(self) -> np.ndarray:
        """How far the mean of so many samples is off, typically (two samples at least)."""
        return np.sqrt(self._squares / (self.count - 1) / self.count)


def relative_error(moments: Sequence[Moments]) -> dict[str, np.ndarray]:
    """The check figure of sampled means, [N]: their standard errors over their sizes, summed."""
    if moments[0].count < 2:
        return {}

    def total(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.sum([np.abs(a).reshape(len(a), -1).sum(axis=1) for a in arrays], axis=0)

    size = np.maximum(total([m.mean for m in moments]), np.finfo(np.float32).tiny)
    return {"standard_error": total([m.standard_error for m in moments]) / size}


def stream(seed: int | None) -> Stream:
    """The random numbers of each sample.

    Raises:
        InputError: the seed is not an integer of at least 0.
    """
    if seed is not None:
        positive(seed, "seed", 0)
    entropy = np.random.SeedSequence(None if seed is None else int(seed)).entropy
    return lambda sample: np.random.default_rng((entropy, sample))  # type: ignore[arg-type]


def positive(number: Any, name: str, least: int = 1) -> int:
    """An integer option of at least ``least``; refuses anything else."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
        raise InputError(f"{name} must be an integer of at least {least}, not {number!r}")
    return int(number)


def deviations(model: Model, feeds: Feeds, stdevs: Any) -> dict[str, float]:
    """The standard deviation of the noise on each explained input.

    Raises:
        InputError: negative, not a number, none for an input, or noise on integers.
    """
    names = feeds.explained
    if isinstance(stdevs, Mapping | tuple):
        given, _ = by_name(stdevs, names, "stdevs")
    else:
        given = dict.fromkeys(names, stdevs)
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"stdevs: none was given for input '{missing[0]}'; give one number for all, or one for "
            f"each of {', '.join(names)}"
        )
    values = input_values(model, feeds)
    for name, stdev in given.items():
        number = isinstance(stdev, int | float | np.number) and not isinstance(stdev, bool)
        if not number or not np.isfinite(stdev) or stdev < 0:
            raise InputError(f"stdevs must be numbers of at least 0, not {stdev!r}")
        if stdev and not is_float(values[name]):
            raise InputError(
                f"input '{name}' holds {feeds.arrays[name].dtype} values, which take no noise: "
                "give it the standard deviation 0 (stdevs as a dict), pass it in "
                "additional_forward_args, or use the method without noise"
            )
    return {name: float(stdev) for name, stdev in given.items()}


def noisy(
    x: np.ndarray, stdev: float, random: np.random.Generator, by_rows: bool = True
) -> np.ndarray:
    """``x`` with Gaussian noise, the same for every row."""
    if not stdev:
        return x
    wide = np.float64 if x.dtype == np.float64 else np.float32
    noise = random.standard_normal(x.shape[1:] if by_rows else x.shape, wide) * wide(stdev)
    return np.asarray(x + noise).astype(x.dtype)


def in_blocks(
    count: int, size: int | None, fed: int, run: Callable[[range], list[np.ndarray]], model: Model
) -> Iterator[list[np.ndarray]]:
    """The results of each sample, computed in blocks whose memory is bounded.

    Args:
        count: how many samples.
        size: the most in one block; None: as many as fit.
        fed: bytes that a sample is fed.
        run: computes the samples of a range; arrays in which they follow one another.
        model: bounds the memory.
    """
    room = _BLOCK_BYTES
    if model.settings.memory_limit is not None:
        room = min(room, memory.budget(model.settings.memory_limit) // 8)
    start, at_once = 0, 1  # the first sample tells how large the results are
    while start < count:
        block = range(start, min(start + at_once, count))
        arrays = run(block)
        yield from map(list, zip(*(np.split(a, len(block)) for a in arrays), strict=True))
        needs = fed + sum(a.nbytes for a in arrays) // len(block)
        at_once = max(1, min(room // max(needs, 1), size or count))
        start = block.stop


class NoiseTunnel(Attribution):
    """A method's attributions of noisy copies of the input: their mean, mean square or variance.

    The noise of a sample is the same for every example. Mean (smoothgrad): Smilkov et al.,
    "SmoothGrad: removing noise by adding noise", 2017, arXiv:1706.03825, section 3; mean square
    (smoothgrad_sq): Hooker et al., 2018, arXiv:1806.10758; variance (vargrad): Adebayo et al.,
    2018, arXiv:1810.03307. Unit: that of the method, or its square.

    Args:
        attribution_method: the method; its model, layer and neuron are those explained.
    """

    name = "noise-tunnel"
    title = "Noise Tunnel"
    paper = (
        "Smilkov et al. 2017, arXiv:1706.03825 (smoothgrad); Hooker et al. 2018, arXiv:1806.10758 "
        "(smoothgrad_sq); Adebayo et al. 2018, arXiv:1810.03307 (vargrad)"
    )
    needs = ("random",)
    choices: ClassVar = {"nt_type": NT_TYPES}
    check = "standard_error: of the mean over the samples (smoothgrad), as a share of its size"

    def __init__(self, attribution_method: Attribution) -> None:
        if not isinstance(attribution_method, Attribution):
            raise InputError(
                f"a noise tunnel goes around a method, such as ox.Saliency(model), not "
                f"{type(attribution_method).__name__}"
            )
        if isinstance(attribution_method, NoiseTunnel):
            raise InputError(
                "a noise tunnel around a noise tunnel only adds the noise of both: use one, with "
                "stdevs the root of the sum of squares"
            )
        inner = attribution_method
        super().__init__(inner.model, of=inner._of, wrt=inner._wrt)
        self.attribution_method = inner
        self.multiplies_by_inputs = inner.multiplies_by_inputs

    @staticmethod
    def _check_model(model: Any) -> None:
        """The method has checked it."""

    @property
    def layer(self) -> Layers | None:
        """The layer that the method explains by, where it chose or was given one."""
        return getattr(self.attribution_method, "layer", None)

    def has_convergence_delta(self) -> bool:
        """Whether the method has one."""
        return self.attribution_method.has_convergence_delta()

    def laid_over(self, feeds: Feeds) -> list[str] | None:
        """The inputs in whose coordinates the method's result is."""
        return self.attribution_method.laid_over(feeds)

    def attribute(
        self,
        inputs: Arrays,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] | Mapping[str, float] = 1.0,
        draw_baseline_from_distrib: bool = False,
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name).
            nt_type: "smoothgrad" (mean of the attributions), "smoothgrad_sq" (mean of their
                squares) or "vargrad" (variance, the mean square minus the square of the mean).
            nt_samples: noisy copies of each example.
            nt_samples_batch_size: the most of them computed at once; None: as many as fit the
                memory. The result does not depend on it.
            stdevs: standard deviation of the Gaussian noise: a number, or a tuple or dict with one
                for each input.
            draw_baseline_from_distrib: ``baselines`` are a distribution [B, ...], of which each
                sample draws one (for each input by itself).
            seed: the samples depend on it alone; None draws one. A method that draws samples
                itself gets another seed for each noisy copy.
            kwargs: arguments of the method's own ``attribute``: target, baselines, ... Rows of
                examples among them are repeated; ``additional_forward_args`` get no noise.

        Returns:
            As the method returns it. With ``return_convergence_delta`` the deltas too, one for each
            noisy copy, [N * nt_samples], those of an example next to each other.

        Raises:
            InputError: an option is out of range or not the method's; and its errors.
        """
        return self._tunnel(
            inputs,
            nt_type,
            nt_samples,
            nt_samples_batch_size,
            stdevs,
            draw_baseline_from_distrib,
            seed,
            kwargs,
        )[0]

    def explain(self, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """As :meth:`attribute`, with the standard error of the mean."""
        bound = inspect.signature(self.attribute).bind(**arguments)
        bound.apply_defaults()
        result, moments, by_rows = self._tunnel(*bound.arguments.values())
        smooth = bound.arguments["nt_type"] == "smoothgrad"
        return result, relative_error(moments) if smooth and by_rows else {}

    def _tunnel(
        self,
        inputs: Arrays,
        nt_type: str,
        nt_samples: int,
        nt_samples_batch_size: int | None,
        stdevs: Any,
        draw_baseline_from_distrib: bool,
        seed: int | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Moments], bool]:
        """The result, the moments of its arrays, and whether their first axis counts examples."""
        if nt_type not in NT_TYPES:
            raise InputError(f"nt_type is one of {', '.join(NT_TYPES)}, not {nt_type!r}")
        samples = positive(nt_samples, "nt_samples")
        if nt_samples_batch_size is not None:
            positive(nt_samples_batch_size, "nt_samples_batch_size")
        calls = _Calls(self.attribution_method, inputs, kwargs, stdevs, stream(seed))
        if draw_baseline_from_distrib:
            calls.baselines = distributions(self.model, calls.feeds, kwargs.get("baselines"))
        size = nt_samples_batch_size if calls.several else 1
        fed = 2 * sum(calls.feeds.arrays[name].nbytes for name in calls.feeds.explained)
        moments: list[Moments] = []
        deltas = []
        for arrays in in_blocks(samples, size, fed, calls, self.model):
            if calls.with_delta:
                deltas.append(arrays.pop())
            moments = moments or [Moments() for _ in arrays]
            for moment, array in zip(moments, arrays, strict=True):
                wide = array.astype(np.float64)
                moment.add(wide * wide if nt_type == "smoothgrad_sq" else wide)
        result = calls.answer([m.variance if nt_type == "vargrad" else m.mean for m in moments])
        if calls.with_delta:
            rows = calls.feeds.count if calls.per_example else 1
            result = result, np.stack(deltas).reshape(samples, rows, -1).swapaxes(0, 1).ravel()
        return result, moments, calls.by_rows


# Arguments of a method that may hold a row per example: of its inputs, or of what explains.
_BY_INPUT = ("baselines", "feature_mask")
_BY_SOURCE = ("layer_baselines", "layer_mask")


class _Calls:
    """Calls a method with noisy copies, those of a range of samples one after the other."""

    def __init__(
        self,
        method: Attribution,
        inputs: Arrays,
        kwargs: dict[str, Any],
        stdevs: Any,
        random: Stream,
    ) -> None:
        self.method, self.kwargs, self.random = method, kwargs, random
        self.parameters = _parameters(method, kwargs)
        self.model, axes = method.model, method.model.axes
        self.with_delta = bool(kwargs.get("return_convergence_delta"))
        self.feeds = self.model.feeds(inputs, kwargs.get("additional_forward_args"))
        self.stdevs = deviations(self.model, self.feeds, stdevs)
        self.baselines: dict[str, np.ndarray] = {}
        self.result: Any = None

        values = input_values(self.model, self.feeds)
        self.inputs = {name: values[name] for name in self.feeds.explained}
        of, groups = method._resolve(
            kwargs.get("attribute_to_neuron_input", False),
            kwargs.get("attribute_to_layer_input", False),
        )
        self.sources = (
            list(self.inputs.values()) if groups is None else [v for g in groups for v in g]
        )
        # What a callable answers to all examples at once is only known when it is called.
        self.per_example = method._per_example(of) and isinstance(self.model, Model)
        self.by_rows = not any(axes[name] for name in self.inputs) and all(
            has_rows(v) for v in (*self.inputs.values(), *self.sources)
        )
        # Copies of all examples follow one another where nothing but the examples is counted there.
        # A method that draws samples needs a seed for each copy, and so a call.
        self.several = self.by_rows and self.per_example and "seed" not in self.parameters

    def __call__(self, samples: range) -> list[np.ndarray]:
        """The method's arrays, and behind them its deltas where they are wanted."""
        streams = [self.random(sample) for sample in samples]
        call = dict(self.kwargs) if len(samples) == 1 else self._repeated(len(samples))
        if "seed" in self.parameters:
            call["seed"] = int(streams[0].integers(1 << 62))
        if self.baselines:
            drawn = {
                name: np.stack([array[random.integers(len(array))] for random in streams])
                for name, array in self.baselines.items()
            }
            rows = {name: array.repeat(self.feeds.count, 0) for name, array in drawn.items()}
            call["baselines"] = self._given(rows)
        axes, arrays = self.model.axes, self.feeds.arrays
        copies = {
            name: np.concatenate(
                [noisy(arrays[name], stdev, random, axes[name] is not None) for random in streams]
            )
            for name, stdev in self.stdevs.items()
        }
        given = in_form(self._given(copies), self.feeds.form)
        result = self.method.attribute(given, **call)  # type: ignore[attr-defined]
        deltas = []
        if self.with_delta:
            result, delta = result
            deltas.append(delta)
        self.result = result
        return [*_arrays(result), *deltas]

    def answer(self, arrays: Sequence[np.ndarray]) -> Any:
        """Arrays in the method's form and of its dtypes."""
        return _in_form_of(self.result, iter(arrays))

    def _given(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays with the examples where the user has them."""
        axes = self.model.axes
        return {k: np.moveaxis(a, 0, axes[k] or 0) for k, a in arrays.items()}

    def _repeated(self, times: int) -> dict[str, Any]:
        """The method's arguments, what they hold by example repeated."""
        call, feeds = dict(self.kwargs), self.feeds
        rest = {k: a for k, a in feeds.arrays.items() if k not in feeds.explained}
        call["additional_forward_args"] = self._given(
            {
                k: a if self.model.axes[k] is None else np.concatenate([a] * times)
                for k, a in rest.items()
            }
        )

        def rows(value: Any, like: ir.Value) -> Any:
            mine = np.ndim(value) == rank(like) and np.shape(value)[0] == feeds.count > 1
            return np.concatenate([np.asarray(value)] * times) if mine else value

        sources = {v.name or "": v for v in self.sources}
        by_value = dict.fromkeys(_BY_INPUT, self.inputs) | dict.fromkeys(_BY_SOURCE, sources)
        for name, values in by_value.items():
            # A distribution of baselines, which has no default, is not of the examples.
            if name in call and self.parameters[name].default is not inspect.Parameter.empty:
                value = call[name]
                if isinstance(value, Mapping):
                    call[name] = {k: rows(v, values[k]) for k, v in value.items()}
                elif isinstance(value, tuple):
                    call[name] = tuple(map(rows, value, values.values()))
                else:
                    call[name] = rows(value, next(iter(values.values())))
        target = call.get("target")
        given = np.asarray(target)
        for_all = given.ndim == isinstance(target, tuple)  # an index, or one for each axis
        if not for_all and len(given) > 1:
            call["target"] = np.concatenate([given] * times)
        return call


def _parameters(method: Attribution, kwargs: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a method's ``attribute``; refuses arguments that do not fit them."""
    found = dict(inspect.signature(method.attribute).parameters)  # type: ignore[attr-defined]
    del found["inputs"]
    known = [name for name in found if name != "seed"]
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise InputError(
            f"method '{method.name}' has no argument '{unknown[0]}' (it has: {', '.join(known)})"
        )
    missing = [k for k in known if found[k].default is inspect.Parameter.empty and k not in kwargs]
    if missing:
        raise InputError(f"method '{method.name}' needs the argument '{missing[0]}'")
    return found


def _arrays(result: Any) -> Iterator[np.ndarray]:
    """The arrays in a method's result, in order."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, tuple | list):
        for part in result:
            yield from _arrays(part)
    else:
        yield result


def _in_form_of(result: Any, arrays: Iterator[np.ndarray]) -> Any:
    """Arrays in the form of a result, and each of the dtype there."""
    if isinstance(result, Mapping):
        return {k: _in_form_of(v, arrays) for k, v in result.items()}
    if isinstance(result, tuple | list):
        return type(result)(_in_form_of(v, arrays) for v in result)
    return next(arrays).astype(result.dtype, copy=False)
