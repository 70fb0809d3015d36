"""What the views share: one example ready to draw, honest scales, colors and words."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from onnxplain.errors import InputError
from onnxplain.result import Display, Explanation, Layout

# Far apart in hue and lightness for every common kind of color vision.
RED, BLUE = np.array([0.80, 0.07, 0.12]), np.array([0.04, 0.30, 0.78])
DPI = 150
OFFSET = 0.5  # above this share of the largest, the least leaves nothing to see but differences
SPARSE = 0.1  # below this share of nonzero attributions, percentiles are of these alone


@dataclass(frozen=True)
class Frame:
    """One example of an explanation, its attributions finite.

    names: the arrays to draw: one, or all where each is a column (or more) of one table.
    values: float64, the attributions of the first.
    errors: their standard errors, where they are estimates.
    input: the model input that is shown, if any.
    display: what to show, of a kind other than "array".
    """

    explanation: Explanation
    example: int
    names: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray | None
    input: np.ndarray | None
    display: Display

    @property
    def of_input(self) -> bool:
        """Whether the attributions lie on the shown input value by value."""
        return self.input is not None and self.values.shape == self.input.shape


@dataclass(frozen=True)
class Scale:
    """Colors run over [-limit, limit]; `note` says how the limit came about."""

    limit: float  # 0: all attributions are zero
    note: str
    clipped: bool

    def norm(self, signed: bool = True) -> Normalize:
        """The color scale: around zero if signed, else from zero."""
        top = self.limit or 1.0
        return Normalize(-top if signed else 0.0, top)

    def unit(self, value: float) -> float:
        """The value in [-1, 1]."""
        return max(-1.0, min(1.0, value / (self.limit or 1.0)))


def frame(explanation: Explanation, example: int = 0, name: str | None = None) -> Frame:
    """One example of one attribution array (default: the shown input's, else the first).

    Raises InputError for an unknown example or name, and for NaN or infinite attributions.
    """
    arrays, inputs, given = explanation.arrays, explanation.inputs, explanation.display
    if not 0 <= example < len(explanation):
        raise InputError(
            f"example {example} of {len(explanation)}: choose 0 to {len(explanation) - 1}"
        )
    shown = given.input_name if given else None
    key = name or (shown if shown in arrays else next(iter(arrays)))
    if key not in arrays:
        raise InputError(f"no attributions of {key!r}: there are {', '.join(arrays)}")
    sole = next(iter(inputs)) if len(inputs) == 1 else None
    source = next((i for i in (key, shown, sole) if i in inputs), None)
    if shown is not None and source != shown:
        given = None  # it is about another input
    drawn = inputs[source] if source is not None else None
    display = _display(given, arrays[key] if drawn is None else drawn)

    columns = display.kind == "table" and all(array.ndim <= 2 for array in arrays.values())
    names = tuple(arrays) if columns and name is None else (key,)
    if not known(explanation, example):
        raise InputError(
            f"example {example} was not computed, as the computation was interrupted before: "
            "explain it again"
        )
    for array in names:
        row = attributions(explanation, array, example)
        if not row.size:
            raise InputError(
                f"attributions of {array!r} have shape {list(row.shape)}: none to show"
            )
        if bad := np.count_nonzero(~np.isfinite(row)):
            raise InputError(
                f"{bad} attributions of {array!r} for example {example} are NaN or infinite, so"
                " they can't be shown: look for overflow in the model or its input"
            )
    return Frame(
        explanation=explanation,
        example=example,
        names=names,
        values=attributions(explanation, key, example),
        errors=explanation.error_row(key, example),
        input=None if drawn is None else drawn[example if len(drawn) == len(explanation) else 0],
        display=display,
    )


def attributions(explanation: Explanation, name: str, example: int) -> np.ndarray:
    """One example's attributions, float64; what an interrupt left uncomputed (NaN) is 0."""
    row = explanation.row(name, example).astype(np.float64)
    return np.where(np.isnan(row), 0, row) if completed(explanation, example) < 1 else row


def _display(given: Display | None, array: np.ndarray) -> Display:
    if given is not None and given.kind != "array":
        return given
    guess: dict[str, Any] = {}
    if array.ndim == 4 and {1, 3} & {array.shape[1], array.shape[3]}:
        guess = {"kind": "image", "layout": image_layout(array.shape[1:])}
    elif array.ndim in (2, 3):
        guess = {"kind": "table" if array.ndim == 2 else "series"}
    else:
        raise InputError(
            f"shape {list(array.shape)} is no table [N, features], series [N, time, channels] or"
            " image with 1 or 3 channels: say how to show it in explanation.display, or use"
            " explanation.arrays"
        )
    return replace(given, **guess) if given is not None else Display(**guess)


def image_layout(shape: tuple[int, ...]) -> Layout:
    """NCHW or NHWC for one image's three axes; NCHW where both could be."""
    return "NCHW" if shape[0] in (1, 3) else "NHWC"


def scale(values: np.ndarray, percentile: float = 100.0) -> Scale:
    """A limit symmetric around zero: the percentile of |values|, or the largest if that is 0.

    Where most attributions are zero, the percentile is of the others: else it would clip nearly all
    of them.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"percentile {percentile} is outside (0, 100]")
    size = np.abs(values)
    largest = float(size.max(initial=0.0))
    if largest == 0:
        return Scale(0.0, "all attributions are zero", False)
    few = np.count_nonzero(size) < SPARSE * size.size
    limit = float(np.percentile(size[size > 0] if few else size, percentile))
    if 0 < limit < largest:
        of = "nonzero |attribution|" if few else "|attribution|"
        which = f"{percentile:g}{_ordinal(percentile)} percentile of {of}: {number(limit)}"
        return Scale(limit, f"colors clipped at the {which} (largest: {number(largest)})", True)
    return Scale(largest, f"colors not clipped: largest |attribution| {number(largest)}", False)


def offset(values: np.ndarray) -> tuple[float, float]:
    """The mean of values and the least of their sizes, where all are far from zero; else 0, 0.

    Maps of scores under masks (RISE) lie around a mean score: beside that, what differs is small.
    """
    size = np.abs(values)
    least, same = float(size.min(initial=np.inf)), (values > 0).all() or (values < 0).all()
    if not same or least < OFFSET * size.max(initial=0.0) or not np.ptp(values):
        return 0.0, 0.0
    return float(values.mean()), least


def _ordinal(number: float) -> str:
    last = {1: "st", 2: "nd", 3: "rd"}.get(int(number) % 10, "th")
    return last if number == int(number) and int(number) // 10 != 1 else "th"


def signed_colors() -> ListedColormap:
    """Blue to transparent to red: transparency by magnitude, the color bar shows it too."""
    t = np.linspace(-1, 1, 513)
    colors = np.where(t[:, None] < 0, BLUE, RED)
    return ListedColormap(np.column_stack([colors, 0.9 * np.abs(t)]), "signed")


def tint(unit: float) -> tuple[float, float, float]:
    """The color of a value in [-1, 1] over white: what `signed_colors` gives on paper."""
    color = 1 - 0.9 * abs(unit) * (1 - (RED if unit > 0 else BLUE))
    return (float(color[0]), float(color[1]), float(color[2]))


def ink(background: tuple[float, float, float]) -> str:
    """Black or white, whichever reads better on this background (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def color_bar(figure: Figure, scale: Scale, *, signed: bool = True, **where: Any) -> Colorbar:
    """A bar in attribution units, in `cax` or beside `ax`; arrows at its ends mean clipping."""
    steps = (-1, -0.5, 0, 0.5, 1) if signed else (0, 0.25, 0.5, 0.75, 1)
    ticks = [step * (scale.limit or 1.0) for step in steps]
    bar = figure.colorbar(
        ScalarMappable(scale.norm(signed), signed_colors() if signed else "inferno"),
        extend=("both" if signed else "max") if scale.clipped else "neither",
        ticks=ticks,
        **where,
    )
    axis = bar.ax.xaxis if where.get("orientation") == "horizontal" else bar.ax.yaxis
    bar.set_label("attribution" if signed else "|attribution|", fontsize=9)
    axis.set_ticklabels([number(tick) for tick in ticks], fontsize=8)
    return bar


def number(value: float) -> str:
    """A number with three digits; zero has no sign."""
    return f"{value + 0.0:.3g}"


def estimate(value: float, error: float | None) -> str:
    """A number with three digits; with its standard error both to the second digit of that."""
    if error is None:
        return number(value)
    if not abs(value) * 1e-6 < error < math.inf:
        return f"{number(value)} ± {number(error)}"
    power = math.floor(math.log10(max(abs(value), error)))
    shown = 0 if -4 <= power < 6 else power  # as %g has it
    places = max(1 - math.floor(math.log10(error)) + shown, 0)
    value, error = (x / 10.0**shown for x in (value, error))
    text = f"{value:.{places}f} ± {error:.{places}f}"
    return text if not shown else f"({text})e{shown:+03d}"


def printable(text: str) -> str:
    """Control characters spelled out: labels and tokens must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, length: int) -> str:
    """Printable text of at most ``length`` characters."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def predictions(frame: Frame, k: int = 3) -> tuple[str, list[str]]:
    """What the numbers are ("probability" where they sum to one, else "score") and the top k."""
    explanation, row = frame.explanation, frame.explanation.prediction[frame.example]
    if row.size == 1:
        return "output", [number(float(row.item()))]
    total = float(row.sum(dtype=np.float64))
    sums_to_one = row.ndim == 1 and row.min() >= 0 and abs(total - 1) < 5e-3
    return "probability" if sums_to_one else "score", [
        f"{position(explanation, index)}: {f'{value:.2f}' if sums_to_one else number(value)}"
        for index, value in explanation.top(frame.example, k)
    ]


def position(explanation: Explanation, index: tuple[int, ...]) -> str:
    """An output position by its label, or by its index."""
    label = explanation.label(index)
    return shorten(label, 32) if label is not None else f"output[{', '.join(map(str, index))}]"


def headline(frame: Frame) -> str:
    """Method, what it explains, of which array and file, and the convergence delta if any."""
    return " · ".join(_facts(frame))


def title(figure: Figure, frame: Frame, more: str = "") -> int:
    """Write the headline, and more below, wrapped to the figure's width; how many lines it is."""
    width = int(figure.get_figwidth() * 10.5)
    facts = "\xa0· ".join(fact.replace(" ", "\xa0") for fact in _facts(frame))  # break between them
    lines = textwrap.wrap(facts, width) + textwrap.wrap(more, width)
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    return len(lines)


def verdict(frame: Frame) -> str:
    """The top predictions in one line."""
    unit, best = predictions(frame)
    return f"predicted ({unit}): {', '.join(best)}"


def _facts(frame: Frame) -> list[str]:
    explanation, example = frame.explanation, frame.example
    index, value = explanation.target_index(example), explanation.value(example)
    neuron = explanation.options.get("neuron")
    target = "the output" if index is None else position(explanation, index)
    if index is not None and explanation.label(index) not in (None, str(index[-1])):
        target += f" ({', '.join(map(str, index))})"
    if value is not None:
        target += f" = {value:.4g}"
    if neuron is not None:
        target = f"neuron {neuron} of layer {explanation.layer}"
    inner = explanation.options.get("attribution_method")
    kind = explanation.options.get("nt_type")
    method = f"{explanation.method} of {inner} ({kind})" if inner else explanation.method
    method += " (centered)" * bool(explanation.options.get("centered"))
    parts = [f"{method} for {target}"]
    if (baseline := explanation.provenance.get("baselines")) is not None:
        parts.append(f"baseline {shorten(baseline, 40)}")
    if explanation.layer is not None and neuron is None:
        parts.append(f"layer {explanation.layer}")
    elif len(explanation.arrays) > len(frame.names):
        parts.append(f"input {frame.names[0]}")
    if name := explanation.name(example):
        parts.append(name)
    if frame.errors is not None and frame.display.kind not in ("table", "text"):  # told one by one
        parts.append(f"± {number(float(np.abs(frame.errors).mean()))} (mean standard error)")
    for key, words in _CHECKS:
        rows = explanation.check_row(key, example) if key in explanation.checks else np.zeros(0)
        if rows.size:
            mean = float(np.abs(rows, dtype=np.float64).mean() if rows.size > 1 else rows[0])
            shown = f"{mean:.0f}" if key == "samples" else number(mean)
            parts.append(
                f"{words} {shown}" + (f" (mean size of {rows.size})" if rows.size > 1 else "")
            )
    if (share := completed(explanation, example)) < 1:
        missing = any(np.isnan(explanation.row(name, example)).any() for name in frame.names)
        parts.append(
            f"INCOMPLETE: interrupted after {number(100 * share)}%"
            + ", what is missing is 0" * missing
        )
    return [printable(part) for part in parts]


def known(explanation: Explanation, example: int) -> bool:
    """Whether an interrupt left anything of an example to show."""
    return completed(explanation, example) == 1 or any(
        np.isfinite(explanation.row(name, example)).any() for name in explanation.arrays
    )


def completed(explanation: Explanation, example: int = 0) -> float:
    """The share of the samples that were computed; 1 where nothing was interrupted."""
    if "completed" not in explanation.checks:
        return 1.0
    return float(explanation.check_row("completed", example).min(initial=1.0))


_CHECKS = (
    ("convergence_delta", "convergence delta"),
    ("relative_convergence_delta", "relative delta"),
    ("absorbed", "absorbed by biases"),
    ("completeness_gap", "completeness gap"),
    ("probability", "probability"),
    ("fit", "fit R²"),
    ("r_squared", "R² of the sum"),
    ("samples", "samples"),
    ("standard_error", "relative standard error"),
)
