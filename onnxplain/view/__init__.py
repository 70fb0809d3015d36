"""Explanation -> figure, HTML page or terminal text. Computes nothing but display scales."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from html import escape
from typing import Any

from matplotlib.figure import Figure

from onnxplain.result import Explanation
from onnxplain.view import common, image, series, table, text

_VIEWS = {"image": image, "table": table, "text": text, "series": series}


def figure(
    explanation: Explanation, example: int = 0, name: str | None = None, **options: Any
) -> Figure:
    """One example as a matplotlib figure, without pyplot.

    name: which attribution array, where there are several; options: those of the view.
    """
    frame = common.frame(explanation, example, name)
    drawn: Figure = _view(frame).figure(frame, **options)
    return drawn


def html(
    explanation: Explanation, example: int = 0, name: str | None = None, **options: Any
) -> str:
    """One example as one self-contained HTML page, with the explanation's provenance."""
    frame = common.frame(explanation, example, name)
    title = common.headline(frame)
    drawn = _view(frame)
    if hasattr(drawn, "fragment"):
        body = drawn.fragment(frame, **options)
    else:
        png = io.BytesIO()
        drawn.figure(frame, **options).savefig(png, format="png")
        data = base64.b64encode(png.getvalue()).decode()
        body = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    unit, best = common.predictions(frame)
    facts = {
        f"predicted ({unit})": ", ".join(best),
        "options": json.dumps(explanation.options, ensure_ascii=False),
        **explanation.provenance,
    }
    rows = "\n".join(
        f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return _PAGE.format(title=escape(title), body=body, rows=rows)


def terminal(
    explanation: Explanation,
    example: int = 0,
    name: str | None = None,
    *,
    color: bool | None = None,
    **options: Any,
) -> str:
    """One example as text. color None: where standard output is a terminal and NO_COLOR unset.

    Tokens are colored; everything else is a ranking by absolute value.
    """
    if color is None:
        color = not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    frame = common.frame(explanation, example, name)
    lines = getattr(_view(frame), "lines", table.lines)
    return "\n".join(
        [common.headline(frame), common.verdict(frame), *lines(frame, color, **options)]
    )


def _view(frame: common.Frame) -> Any:
    """The module that draws this; units that lie nowhere on the input are ranked as a table."""
    tokens = frame.display.tokens[frame.example] if frame.display.tokens else None
    per_token = tokens is not None and frame.values.shape == (len(tokens),)
    placed = frame.values.ndim > 1 or frame.of_input or per_token
    return _VIEWS[frame.display.kind] if placed else table


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em;
  color: #111; background: #fff }}
h1 {{ font-size: 1.15em }}
img {{ max-width: 100% }}
.tokens {{ font: 16px/2 ui-monospace, monospace; overflow-wrap: anywhere }}
.tokens span {{ padding: .15em .25em; border-radius: .2em }}
.legend, table {{ font-size: 13px }}
.bar {{ display: inline-block; width: 14em; height: 1em; margin: 0 .6em; vertical-align: middle }}
th {{ text-align: left; padding-right: 1.5em; vertical-align: top; font-weight: 600 }}
td {{ overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<table>
{rows}
</table>
</body>
</html>
"""
