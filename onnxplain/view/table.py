"""Tables, and anything that can be listed: attributions ranked by size, beside the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from onnxplain.errors import InputError
from onnxplain.result import strongest
from onnxplain.view import common
from onnxplain.view.common import Frame


@dataclass(frozen=True)
class Row:
    """One bar: a name, its attribution, and the standard error of that where it has one."""

    name: str
    attribution: float
    error: float | None = None

    @property
    def text(self) -> str:
        """The attribution as people read it."""
        return common.estimate(self.attribution, self.error)


def figure(frame: Frame, *, top: int = 15) -> Figure:
    """Bars of the `top` largest attributions, 'feature = value', and of the sum of the rest.

    A larger sum is cut, and labelled so, as it would dwarf them. Estimates have whiskers of one
    standard error.
    """
    rows = ranked(frame, top)
    fig = Figure(figsize=(8, 0.3 * len(rows) + 1.5), dpi=common.DPI, layout="constrained")
    axes = fig.subplots()
    amounts = [row.attribution for row in rows]
    colors = [common.RED if amount > 0 else common.BLUE for amount in amounts]
    whiskers = (
        [math.nan if row.error is None else row.error for row in rows]
        if frame.errors is not None
        else None
    )
    limit = _largest(rows, top)
    bars = axes.barh(
        range(len(rows)),
        np.clip(amounts, -limit, limit),
        xerr=whiskers,
        color=colors,
        height=0.72,
        error_kw={"elinewidth": 1, "capsize": 2.5},
    )
    for bar in bars[top:]:  # the sum of the others is no feature
        bar.set_alpha(0.45)
    texts = [row.text + " (bar cut)" * (abs(row.attribution) > limit) for row in rows]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.16 if whiskers is None else 0.24)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    words = "attribution (red positive, blue negative)"
    words += "" if whiskers is None else "; whiskers: one standard error"
    axes.set_xlabel(words if any(amounts) else "all attributions are zero", fontsize=9)
    common.title(fig, frame, common.verdict(frame))
    return fig


def lines(frame: Frame, color: bool, *, top: int = 15) -> list[str]:
    """One terminal line a row: name, attribution (± standard error), bar (… where it is cut)."""
    rows = ranked(frame, top)
    limit = _largest(rows, top) or 1.0
    width = max(len(row.name) for row in rows)
    shown = [f"{row.attribution:+.3e}" if row.error is None else row.text for row in rows]
    column = max(map(len, shown))
    text = []
    for row, amount in zip(rows, shown, strict=True):
        size = abs(row.attribution) / limit
        bar = "█" * round(24 * min(size, 1)) + "…" * (size > 1)
        if color and bar:
            bar = f"\x1b[{31 if row.attribution > 0 else 34}m{bar}\x1b[0m"
        text.append(f"{row.name:>{width}}  {amount:>{column}}  {bar}".rstrip())
    return text


def _largest(rows: list[Row], top: int) -> float:
    """The longest bar: that of a feature, whatever the others come to."""
    return max(abs(row.attribution) for row in rows[:top])


def ranked(frame: Frame, top: int) -> list[Row]:
    """The `top` largest attributions by absolute value, largest first, then the sum of the rest.

    Models with one input per column have one array each; these are ranked together. Values that
    are one feature count once.
    """
    if top < 1:
        raise InputError(f"top is {top}: ask for at least one row")
    explanation, example, names = frame.explanation, frame.example, frame.names
    arrays = [common.attributions(explanation, name, example) for name in names]
    flat = np.concatenate([array.ravel() for array in arrays])
    spread: list[float | None] = []
    for name, array in zip(names, arrays, strict=True):
        found = explanation.error_row(name, example)
        spread += [None] * array.size if found is None else map(_finite, found.ravel().tolist())
    starts = np.cumsum([0, *(array.size for array in arrays)])
    features, raw = frame.display.feature_names, frame.display.values
    if not set(names) <= set(explanation.inputs):
        features = raw = None  # a layer has units, not features
    if features is not None and frame.display.kind == "table" and len(features) != flat.size:
        raise InputError(f"{len(features)} feature names for {flat.size} attributions")
    raw = raw[example].ravel() if raw is not None and raw[example].size == flat.size else None

    def row(at: int) -> Row:
        owner = int(np.searchsorted(starts, at, side="right")) - 1
        name, array = names[owner], arrays[owner]
        index = tuple(int(i) for i in np.unravel_index(at - starts[owner], array.shape))
        text = name if array.size == 1 else f"{name}[{', '.join(map(str, index))}]"
        if features is not None and len(features) == flat.size:
            text = features[at]
        text = common.shorten(text, 36)
        x = explanation.inputs.get(name)
        if raw is not None:
            text += f" = {_value(raw[at])}"
        elif x is not None and x.shape[1:] == array.shape:
            text += f" = {_value(x[example if len(x) == len(explanation) else 0][index])}"
        return Row(text, float(flat[at]), spread[at])

    members = _features(frame, starts)
    once = np.array([group[0] for group in members])
    chosen = [index[0] for index in strongest(flat[once], top)]
    rows = [_together(frame, members[i], [row(at) for at in members[i][:4]]) for i in chosen]
    if len(members) > len(chosen):
        rest = float(np.delete(flat[once], chosen).sum())
        rows.append(Row(f"({len(members) - len(chosen)} others)", rest))
    return rows


def _features(frame: Frame, starts: np.ndarray) -> list[np.ndarray]:
    """The positions of each feature's values among those of all arrays."""
    ids = [frame.explanation.feature_row(name, frame.example) for name in frame.names]
    if any(part is None for part in ids):
        return list(np.arange(starts[-1])[:, None])
    flat = np.concatenate([part.ravel() for part in ids if part is not None])
    order = np.argsort(flat, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(flat[order])) + 1)


def _together(frame: Frame, group: np.ndarray, rows: list[Row]) -> Row:
    """One bar for the values of a feature, of which some have these bars."""
    if len(group) <= 3:
        text = common.shorten(" & ".join(row.name for row in rows), 48)
    else:
        shape, layout = frame.values.shape, frame.display.layout
        text = f"{rows[0].name} & {len(group) - 1} more"
        if frame.display.kind == "image" and layout and group[-1] < frame.values.size:
            places = np.unravel_index(group, shape)[1 if layout == "NCHW" else 0 :]
            row, column = (round(float(place.mean())) for place in places[:2])
            count = len(set(zip(*places[:2], strict=True)))
            text = f"{count} pixels around row {row}, column {column}"
    return replace(rows[0], name=text)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _value(value: np.generic) -> str:
    return f"{value:.4g}" if isinstance(value, np.floating) else common.shorten(str(value), 16)
