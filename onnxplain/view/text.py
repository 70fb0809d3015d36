"""Text: tokens on the color of their attribution, in the terminal, in HTML and as a picture."""

from __future__ import annotations

import textwrap
import unicodedata
from html import escape

import numpy as np
from matplotlib.figure import Figure

from onnxplain.errors import InputError
from onnxplain.view import common
from onnxplain.view.common import Frame, Scale

_COLUMNS, _MOST_LINES = 84, 120


def colored(frame: Frame, percentile: float = 100.0) -> tuple[list[tuple[str, float]], Scale]:
    """Tokens with their attributions (embedding axes summed), and the scale of the colors.

    Positions after the last token, such as padding, are summed in one last entry unless all are 0.
    """
    tokens = frame.display.tokens[frame.example] if frame.display.tokens is not None else None
    values = frame.values.reshape(len(frame.values), -1).sum(axis=1) if frame.values.ndim else None
    if tokens is None or values is None or len(values) < len(tokens):
        raise InputError(
            f"attributions of {frame.names[0]!r} have shape {list(frame.values.shape)} per example"
            f" for {'no' if tokens is None else len(tokens)} tokens: give display.tokens, and"
            " explain the token input or a layer with one position per token"
        )
    pairs = [(common.printable(t), float(v)) for t, v in zip(tokens, values, strict=False)]
    rest = values[len(tokens) :]
    if rest.any():
        ids = frame.explanation.feature_row(frame.names[0], frame.example)
        once = np.unique(ids[len(tokens) :], return_index=True)[1] if ids is not None else ...
        pairs.append((f"(+{len(rest)} positions)", float(rest[once].sum())))
    return pairs, common.scale(values, percentile)


def _amounts(frame: Frame, pairs: list[tuple[str, float]], form: str) -> list[str]:
    """The attribution of each token, with its standard error where it is an estimate."""
    tokens = frame.display.tokens[frame.example] if frame.display.tokens else []
    errors: list[str] = []
    if frame.errors is not None and frame.errors.ndim == 1:
        errors = [f"±{error:.1g}" for error in frame.errors[: len(tokens)]]
    errors = (errors + [""] * len(pairs))[: len(pairs)]
    return [f"{value:{form}}{e}" for (_, value), e in zip(pairs, errors, strict=True)]


def figure(frame: Frame, *, percentile: float = 100.0) -> Figure:
    """The tokens, wrapped, each on its color, with a color bar."""
    pairs, scale = colored(frame, percentile)
    rows: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for token, value in pairs:
        for piece in textwrap.wrap(token, _COLUMNS, drop_whitespace=False) or [""]:
            if column and column + _width(piece) > _COLUMNS:
                rows.append([])
                column = 0
            rows[-1].append((column, piece, value))
            column += _width(piece) + 1
    hidden = sum(len(row) for row in rows[_MOST_LINES:])
    rows = rows[:_MOST_LINES]

    size = 10  # points; a DejaVu Sans Mono character is 0.602 of that wide, up to 0.63 hinted
    fig = Figure(figsize=((_COLUMNS + 2) * 0.63 * size / 72, 1), dpi=common.DPI)
    head = 0.2 * common.title(fig, frame, common.verdict(frame)) + 0.2  # inches, as all below
    body, foot = 0.27 * len(rows), 0.8
    height = head + body + foot
    fig.set_figheight(height)
    axes = fig.add_axes((0, foot / height, 1, body / height))
    axes.set(xlim=(-1, _COLUMNS + 1), ylim=(len(rows) - 0.5, -0.5))
    axes.set_axis_off()
    for y, row in enumerate(rows):
        for x, piece, value in row:
            background = common.tint(scale.unit(value))
            axes.text(
                x,
                y,
                piece,
                family="DejaVu Sans Mono",
                fontsize=size,
                color=common.ink(background),
                verticalalignment="center_baseline",
                bbox={"facecolor": background, "edgecolor": "none", "boxstyle": "square,pad=0.15"},
                parse_math=False,
            )
    strip = fig.add_axes((0.2, 0.56 / height, 0.6, 0.11 / height))
    common.color_bar(fig, scale, cax=strip, orientation="horizontal")
    note = scale.note + (f" · {hidden} more tokens not shown" if hidden else "")
    fig.text(0.5, 0.04 / height, note, fontsize=8, horizontalalignment="center")
    return fig


def fragment(frame: Frame, *, percentile: float = 100.0) -> str:
    """HTML: colored spans, the value on hover, and a legend; every text escaped."""
    pairs, scale = colored(frame, percentile)
    spans = []
    for (token, value), amount in zip(pairs, _amounts(frame, pairs, "+.3e"), strict=True):
        background = common.tint(scale.unit(value))
        spans.append(
            f'<span title="{amount}" style="background:{_css(background)};'
            f'color:{common.ink(background)}">{escape(token)}</span>'
        )
    stops = ", ".join(_css(common.tint(t)) for t in (-1, -0.5, 0, 0.5, 1))
    return (
        f'<p class="tokens">{" ".join(spans)}</p>\n'
        f'<p class="legend">{common.number(-scale.limit)}'
        f'<span class="bar" style="background:linear-gradient(to right, {stops})"></span>'
        f"{common.number(scale.limit)} ({escape(scale.note)})</p>"
    )


def lines(frame: Frame, color: bool, *, percentile: float = 100.0) -> list[str]:
    """Colored tokens and a legend; without color, each token followed by its attribution."""
    pairs, scale = colored(frame, percentile)
    if not color:
        amounts = _amounts(frame, pairs, "+.2g")
        told = (f"{token}({amount})" for (token, _), amount in zip(pairs, amounts, strict=True))
        return [" ".join(told), scale.note]
    steps = (-1.0, -0.5, 0.0, 0.5, 1.0)
    legend = " ".join(_ansi(common.number(step * scale.limit), step) for step in steps)
    tokens = " ".join(_ansi(token, scale.unit(value)) for token, value in pairs)
    return [tokens, f"{legend}  {scale.note}"]


def _ansi(text: str, unit: float) -> str:
    background = common.tint(unit)
    red, green, blue = (round(255 * c) for c in background)
    ink = 30 if common.ink(background) == "black" else 97
    return f"\x1b[{ink};48;2;{red};{green};{blue}m{text}\x1b[0m"


def _css(color: tuple[float, float, float]) -> str:
    return f"rgb({', '.join(str(round(255 * c)) for c in color)})"


def _width(text: str) -> int:
    """Columns in a fixed-width font: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
