"""Views: what is on the picture, the page and the terminal is what the numbers say."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import skimage.data
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.datasets import load_breast_cancer

from onnxplain import view
from onnxplain.errors import InputError
from onnxplain.result import Display, Explanation
from onnxplain.view import common

SCORES = np.array([[1.0, 8.0, 3.0, -2.0]])


def explain(
    x: np.ndarray, attributions: np.ndarray, display: Display | None = None, **changes: Any
) -> Explanation:
    values: dict[str, Any] = {
        "method": "integrated-gradients",
        "inputs": {"x": x},
        "arrays": {"x": attributions},
        "prediction": SCORES,
        "target": np.array([1]),
        "labels": ["cat", "dog", "bird", "fish"],
        "display": display,
    }
    return Explanation(**(values | changes))


def draw(figure: Figure) -> Any:
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def text_of(figure: Figure) -> str:
    """All text on a figure, once drawn."""
    draw(figure)
    texts: list[Any] = figure.findobj(Text)
    return "\n".join(t.get_text() for t in texts if t.get_visible()).replace("\xa0", " ")


def panel(figure: Figure, axes: int) -> np.ndarray:
    """The drawn pixels of one panel, RGB."""
    pixels = np.asarray(draw(figure).buffer_rgba())[..., :3].astype(int)
    box = figure.axes[axes].get_window_extent()
    height = pixels.shape[0]
    return pixels[
        height - int(box.y1) : height - int(np.ceil(box.y0)), int(box.x0) + 1 : int(box.x1)
    ]


def quarters(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Mean color of the inner part of each quarter."""
    h, w = pixels.shape[:2]
    return {
        f"{row}{column}": pixels[
            h * (4 * i + 1) // 8 : h * (4 * i + 3) // 8, w * (4 * j + 1) // 8 : w * (4 * j + 3) // 8
        ].mean((0, 1))
        for i, row in enumerate("TB")
        for j, column in enumerate("LR")
    }


def signed_corners(size: int, channels: int) -> np.ndarray:
    """[1, channels, size, size]: +1 top left, -1 top right, -0.3 bottom left, else 0."""
    values = np.zeros((1, channels, size, size))
    half = size // 2
    values[..., :half, :half], values[..., :half, half:] = 1, -1
    values[..., half:, :half] = -0.3
    return values


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("size", [8, 200])
def test_image_colors_follow_the_sign(layout: Any, channels: int, told: bool, size: int) -> None:
    values = signed_corners(size, channels)
    if layout == "NHWC":
        values = values.transpose(0, 2, 3, 1)
    gray = np.full((1, size, size, 3)[: 4 if channels == 3 else 3], 128, np.uint8)
    display = Display(kind="image", layout=layout, images=gray) if told else None
    figure = view.figure(explain(np.zeros_like(values), values, display))
    overlay = quarters(panel(figure, 1))
    red, blue, faint, none = (overlay[key] for key in ("TL", "TR", "BL", "BR"))
    assert red[0] > red[2] + 100 and blue[2] > blue[0] + 100
    assert 10 < faint[2] - faint[0] < blue[2] - blue[0]
    assert np.ptp(none) < 2
    heat = {key: color.sum() for key, color in quarters(panel(figure, 2)).items()}
    assert abs(heat["TL"] - heat["TR"]) < 2 and heat["TR"] > heat["BL"] > heat["BR"]


def test_small_images_are_drawn_sharp() -> None:
    board = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)
    figure = view.figure(
        explain(
            np.zeros((1, 1, 8, 8)),
            np.zeros((1, 1, 8, 8)),
            Display(kind="image", images=board[None]),
        )
    )
    drawn = panel(figure, 0)[..., 0]
    assert ((drawn < 3) | (drawn > 252)).mean() > 0.98


def test_image_shows_the_picture_as_the_user_knows_it() -> None:
    cat = skimage.data.chelsea()[:, 75:375]
    x = cat.transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    display = Display(kind="image", layout="NCHW", images=cat[None])
    drawn = panel(view.figure(explain(x, x, display)), 0)
    for i in range(3):
        assert abs(drawn[..., i].mean() - cat[..., i].mean()) < 3
    said = text_of(view.figure(explain(x, x)))
    assert "min-max scaled" in said
    assert "min-max scaled" not in text_of(view.figure(explain(x, x, display)))


def test_image_states_its_scale() -> None:
    values = np.zeros((1, 1, 10, 10))
    values[0, 0] = np.arange(100).reshape(10, 10)
    said = text_of(view.figure(explain(values, values)))
    assert "clipped at the 99th percentile of |attribution|: 98" in said and "(largest: 99)" in said
    assert "clipped at the 50th percentile of |attribution|: 49.5" in text_of(
        view.figure(explain(values, values), percentile=50)
    )
    assert "not clipped: largest |attribution| 99" in text_of(
        view.figure(explain(values, values), percentile=100)
    )
    assert "-98" in said and "49" in said  # ticks in attribution units, symmetric
    sparse = np.zeros((1, 1, 100, 100))
    sparse[0, 0, 3, 3] = -5
    assert "not clipped: largest |attribution| 5" in text_of(view.figure(explain(sparse, sparse)))
    sparse[0, 0, 3, :50] = np.arange(1, 51)  # 0.5 %: a percentile of all would be 0, or 1 of 50
    said = text_of(view.figure(explain(sparse, sparse), percentile=90))
    assert "clipped at the 90th percentile of nonzero |attribution|: 45.1" in said
    for percentile in (0, 101, -1, float("nan")):
        with pytest.raises(InputError, match="percentile"):
            view.figure(explain(values, values), percentile=percentile)


def test_layer_attributions_are_upsampled_over_the_image() -> None:
    x = np.zeros((1, 64, 64, 3))
    for values in (signed_corners(4, 16), signed_corners(4, 16).transpose(0, 2, 3, 1)):
        explanation = explain(x, values, arrays={"conv": values}, layer="conv")
        figure = view.figure(explanation)
        said = text_of(figure)
        assert "upsampled from 4x4 (bilinear)" in said and "layer conv" in said
        overlay = quarters(panel(figure, 1))
        assert overlay["TL"][0] > overlay["TL"][2] + 100
        assert overlay["TR"][2] > overlay["TR"][0] + 100
        assert "sum over 16 channels" in said
        assert "largest |attribution| 16" in said
    one = signed_corners(4, 1)
    said = text_of(view.figure(explain(x, one, arrays={"conv": one}, layer="conv")))
    assert "sum over" not in said


def test_layers_that_lie_nowhere_on_the_image() -> None:
    x = np.zeros((1, 3, 8, 8))
    dense = explain(x, x, arrays={"fc": np.array([[1.0, -5, 2]])}, layer="fc")
    assert "fc[1]" in text_of(view.figure(dense))
    tokens = explain(x, x, arrays={"block": np.ones((1, 2, 3, 4, 5))}, layer="block")
    with pytest.raises(InputError, match=r"\[2, 3, 4, 5\]"):
        view.figure(tokens)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 6), (1, 9, 2)])
def test_zero_attributions_say_so(shape: tuple[int, ...]) -> None:
    figure = view.figure(explain(np.ones(shape), np.zeros(shape)))
    assert "all attributions are zero" in text_of(figure)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("show", [view.figure, view.html, view.terminal])
def test_nan_attributions_are_refused(bad: float, show: Any) -> None:
    values = np.ones((1, 6))
    values[0, 2] = bad
    with pytest.raises(InputError, match="1 attributions of 'x' for example 0 are NaN or infinite"):
        show(explain(np.ones((1, 6)), values))


@pytest.mark.parametrize("shape", [(1,), (1, 5, 6, 7), (1, 1, 1, 1, 1)])
def test_shapes_that_say_nothing_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="say how to show it"):
        view.figure(explain(np.ones(shape), np.ones(shape)))


def test_empty_attributions_are_refused() -> None:
    with pytest.raises(InputError, match="none to show"):
        view.terminal(explain(np.ones((1, 0)), np.ones((1, 0))))


def test_what_is_asked_for_must_exist() -> None:
    explanation = explain(np.ones((1, 6)), np.ones((1, 6)))
    with pytest.raises(InputError, match="example 1 of 1"):
        view.figure(explanation, 1)
    with pytest.raises(InputError, match="no attributions of 'y': there are x"):
        view.figure(explanation, name="y")


def test_scores_are_called_probabilities_only_if_they_sum_to_one() -> None:
    x = np.ones((1, 6))
    assert "predicted (score): dog: 8, bird: 3, cat: 1" in text_of(view.figure(explain(x, x)))
    softmax = np.exp(SCORES) / np.exp(SCORES).sum()
    said = text_of(view.figure(explain(x, x, prediction=softmax)))
    assert "predicted (probability): dog: 0.99, bird: 0.01, cat: 0.00" in said
    value = explain(x, x, prediction=np.array([2.5]), target=None, labels=None)
    assert "integrated-gradients for the output = 2.5" in text_of(view.figure(value))


def test_titles_name_method_target_and_checks() -> None:
    x = np.ones((1, 3, 8, 8))
    checks = {
        "convergence_delta": np.array([1.25e-3]),
        "relative_convergence_delta": np.array([-0.002]),
    }
    said = text_of(view.figure(explain(x, x, checks=checks)))
    for fact in ("integrated-gradients for dog (1) = 8", "delta 0.00125", "relative delta -0.002"):
        assert fact in said
    neuron = explain(x, x, layer="conv", options={"neuron": (3, 1)})
    assert view.terminal(neuron).startswith(
        "integrated-gradients for neuron [3, 1] of layer conv\n"
    )
    sampled = explain(x, x, checks={"convergence_delta": np.array([-1.0, 3.0])})
    assert "convergence delta 2 (mean size of 2)" in view.terminal(sampled)


def table() -> Explanation:
    data = load_breast_cancer()
    values = np.linspace(-1, 0.97, 30)
    np.random.default_rng(0).shuffle(values)
    return explain(
        (data.data[:1] - data.data.mean(0)) / data.data.std(0),
        values[None],
        Display(kind="table", feature_names=list(data.feature_names), values=data.data[:1]),
    )


def test_table_ranks_bars_by_absolute_value() -> None:
    explanation, data = table(), load_breast_cancer()
    values = explanation.arrays["x"][0]
    figure = view.figure(explanation)
    draw(figure)
    axes = figure.axes[0]
    order = np.argsort(-np.abs(values))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:-1] == [f"{data.feature_names[i]} = {data.data[0, i]:.4g}" for i in order[:15]]
    assert names[-1] == "(15 others)"
    bars: list[Any] = sorted(
        axes.patches, key=lambda bar: -bar.get_window_extent().y0
    )  # as seen, from the top
    widths = [bar.get_width() for bar in bars]
    np.testing.assert_allclose(widths[:-1], values[order[:15]])
    np.testing.assert_allclose(widths[-1], values[order[15:]].sum())
    for bar in bars:
        red, _, blue, _ = bar.get_facecolor()
        assert (red > blue) == (bar.get_width() > 0)


def test_table_without_names_or_others() -> None:
    explanation = explain(np.array([[0.5, 7.0]]), np.array([[1.0, -2.0]]))
    assert [row.name for row in view.table.ranked(common.frame(explanation), 15)] == [
        "x[1] = 7",
        "x[0] = 0.5",
    ]
    with pytest.raises(InputError, match="top is 0"):
        view.figure(explanation, top=0)


def test_table_of_wrong_names_is_refused() -> None:
    with pytest.raises(InputError, match="1 feature names for 2"):
        view.figure(
            explain(np.ones((1, 2)), np.ones((1, 2)), Display(kind="table", feature_names=["a"]))
        )


def test_models_with_one_input_per_column_make_one_table() -> None:
    inputs = {"age": np.array([[41.0]]), "sex": np.array([["f"]]), "dose": np.array([2])}
    arrays = {"age": np.array([[1.0]]), "sex": np.array([[-3.0]]), "dose": np.array([2.0])}
    explanation = explain(
        inputs["age"],
        arrays["age"],
        Display(kind="table"),
        inputs=inputs,
        arrays=arrays,
        form="dict",
    )
    rows = view.table.ranked(common.frame(explanation), 15)
    assert [(row.name, row.attribution) for row in rows] == [
        ("sex = f", -3),
        ("dose = 2", 2),
        ("age = 41", 1),
    ]
    alone = view.table.ranked(common.frame(explanation, name="age"), 15)
    assert [row.name for row in alone] == ["age = 41"]


def test_another_input_is_not_drawn_with_the_first_ones_display() -> None:
    picture = np.zeros((1, 1, 8, 8))
    extra = np.array([[3.0, 4.0]])
    explanation = explain(
        picture,
        picture,
        Display(kind="image", layout="NCHW", input_name="x"),
        inputs={"x": picture, "extra": extra},
        arrays={"x": picture, "extra": extra},
        form="tuple",
    )
    assert "extra[1] = 4" in view.terminal(explanation, name="extra")
    assert len(view.figure(explanation).axes) == 3


TOKENS = ["good", "<script>alert('&')</script>", "bad", "\x1b[2J", "$x_1$", "plain"]
WORTH = np.array([[2.0, 0.0, -2.0, 0.0, -1.0, 0.0]])


def text(**changes: Any) -> Explanation:
    display = Display(kind="text", tokens=[TOKENS])
    return explain(np.arange(6)[None], WORTH, display, **changes)


class Spans(HTMLParser):
    """The tags of a page, and the style and text of each token."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[tuple[str, str]] = []
        self.style: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.style = dict(attrs).get("style") if tag == "span" and "title" in dict(attrs) else None

    def handle_data(self, data: str) -> None:
        if self.style is not None:
            self.tokens.append((data, self.style))
            self.style = None


def test_html_escapes_every_text_and_colors_tokens() -> None:
    nasty = "<img src=x onerror=alert(1)>"
    page = view.html(
        text(
            method=nasty,
            layer=nasty,
            labels=[nasty, nasty, nasty, nasty],
            options={nasty: nasty},
            provenance={nasty: nasty},
        )
    )
    spans = Spans(page)
    assert "script" not in spans.tags and "img" not in spans.tags
    words, styles = zip(*spans.tokens, strict=True)
    assert words == ("good", TOKENS[1], "bad", "\\x1b[2J", "$x_1$", "plain")
    backgrounds = [tuple(map(int, re.findall(r"\d+", style.split(";")[0]))) for style in styles]
    good, script, bad, _, half, _ = backgrounds
    assert good[0] > good[2] + 100 and bad[2] > bad[0] + 100
    assert bad[0] < half[0] < 255 and script == (255, 255, 255)


def test_html_of_a_picture_is_self_contained() -> None:
    page = view.html(explain(np.ones((1, 6)), np.ones((1, 6)), provenance={"model": "m.onnx"}))
    assert re.search(r'<img alt="integrated-gradients[^"]*" src="data:image/png;base64,iVBOR', page)
    assert "m.onnx" in page and not re.search(r"(src|href)=\"(?!data:)", page)


def test_terminal_colors_and_their_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = view.terminal(text(), color=False)
    assert "\x1b" not in plain and "good(+2)" in plain and "bad(-2)" in plain
    colored = view.terminal(text(), color=True)
    red, blue = re.search(r"48;2;(\d+);\d+;(\d+)mgood\x1b\[0m", colored).groups()  # type: ignore[union-attr]
    assert int(red) > int(blue) + 100
    assert "\x1b[2J" not in colored and "\\x1b[2J" in colored
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert view.terminal(text()) == colored
    monkeypatch.setenv("NO_COLOR", "1")
    assert view.terminal(text()) == plain
    assert view.terminal(text(), color=True) == colored
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert view.terminal(text()) == plain


def test_terminal_ranks_what_is_no_text() -> None:
    lines = view.terminal(table(), color=False, top=3).splitlines()
    assert lines[1] == "predicted (score): dog: 8, bird: 3, cat: 1"
    sizes = [abs(float(re.search(r"[+-]\d\.\d+e[+-]\d+", line).group())) for line in lines[2:5]]  # type: ignore[union-attr]
    assert sizes == sorted(sizes, reverse=True) and "(27 others)" in lines[5]
    x = np.zeros((1, 1, 8, 8))
    x[0, 0, 2, 5] = -7
    assert "x[0, 2, 5] = -7  -7.000e+00" in view.terminal(explain(x, x), color=False)


def test_text_figure_colors_its_tokens() -> None:
    figure = view.figure(text())
    assert "largest |attribution| 2" in text_of(figure)
    boxes = {t.get_text(): t for t in figure.axes[0].texts}
    assert list(boxes) == ["good", TOKENS[1], "bad", "\\x1b[2J", "$x_1$", "plain"]
    patches: dict[str, Any] = {word: box.get_bbox_patch() for word, box in boxes.items()}
    colors = {word: patch.get_facecolor() for word, patch in patches.items()}
    assert colors["good"][0] > colors["good"][2] + 0.4
    assert colors["bad"][2] > colors["bad"][0] + 0.4
    assert colors["plain"] == (1, 1, 1, 1)


def test_text_figure_wraps_within_its_width_without_overlap() -> None:
    words = [("w" * (1 + i * 7 % 23)) for i in range(150)] + ["漢字" * 50, ""]
    values = np.random.default_rng(0).normal(size=(1, len(words)))
    display = Display(kind="text", tokens=[words])
    ascii_only = Display(kind="text", tokens=[words[:150]])
    with pytest.warns(UserWarning, match="missing from font"):
        view.figure(explain(values, values, display)).savefig(io.BytesIO(), format="png")
    figure = view.figure(explain(values[:, :150], values[:, :150], ascii_only))
    draw(figure)
    boxes = [t.get_window_extent() for t in figure.axes[0].texts]
    edge = figure.get_window_extent()
    for box, after in pairwise(boxes):
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1
        assert after.x0 >= box.x1 or after.y1 <= box.y0


def test_text_layers_are_summed_over_the_embedding() -> None:
    embedding = np.stack([WORTH, WORTH], -1)
    assert view.terminal(text(arrays={"emb": embedding}, layer="emb"), color=False).count("(+4)")
    padded = explain(
        np.arange(8)[None],
        np.array([[1.0, 2, 3, 4, 5, 6, 10, 20]]),
        Display(kind="text", tokens=[TOKENS]),
    )
    assert "(+2 positions)(+30)" in view.terminal(padded, color=False)
    padded.arrays["x"][0, 6:] = 0
    assert "positions" not in view.terminal(padded, color=False)
    for display in (Display(kind="text", tokens=[TOKENS * 2]), Display(kind="text")):
        with pytest.raises(InputError, match="tokens"):
            view.figure(explain(np.arange(6)[None], WORTH, display))


@pytest.mark.parametrize("last", [True, False])
def test_series_background_follows_the_sign(last: bool) -> None:
    time = np.linspace(0, 6 * np.pi, 200)
    curve = np.stack([np.sin(time), np.cos(time)])[None]
    values = np.zeros((1, 2, 200))
    values[0, 0, :100], values[0, 1, 100:] = 1, -1
    if last:
        curve, values = curve.transpose(0, 2, 1), values.transpose(0, 2, 1)
    names = ["temp $max", "wind"]
    figure = view.figure(explain(curve, values, Display(kind="series", feature_names=names)))
    assert all(name in text_of(figure) for name in names)
    first, second = (quarters(panel(figure, i)) for i in (0, 1))
    assert first["TL"][0] > first["TL"][2] + 80 and np.ptp(first["TR"]) < 2
    assert second["BR"][2] > second["BR"][0] + 80 and np.ptp(second["BL"]) < 2
    for axes, row in zip(figure.axes, curve[0].T if last else curve[0], strict=False):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), row)


def test_series_shows_raw_values_and_says_what_it_hides() -> None:
    x = np.random.default_rng(0).normal(size=(1, 50, 12))
    values = np.zeros_like(x)
    values[..., 3], values[..., 7] = 1, 2
    figure = view.figure(explain(x, values, Display(kind="series", values=x + 100)), channels=2)
    said = text_of(figure)
    assert "channel 3" in said and "channel 7" in said and "10 channels" in said
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), x[0, :, 3] + 100)


@pytest.mark.parametrize("shape", [(1, 16, 5), (1, 16, 1, 5), (1, 5)])
def test_series_layers_are_stretched(shape: tuple[int, ...]) -> None:
    x = np.zeros((1, 100, 1))
    values = np.zeros(shape)
    values[..., 0] = 1
    explanation = explain(
        x, x, arrays={"conv": values}, layer="conv", display=Display(kind="series", input_name="x")
    )
    if values.ndim == 2:  # units without a place in time
        assert "conv[0]" in view.terminal(explanation)
        return
    figure = view.figure(explanation)
    assert "stretched from 5 steps" in text_of(figure)
    background = quarters(panel(figure, 0))
    assert background["TL"][0] > background["TL"][2] + 20 and np.ptp(background["TR"]) < 2


@pytest.mark.parametrize("kind", ["image", "table", "text", "series"])
def test_text_from_the_user_is_never_math(kind: Any) -> None:
    shape = {"image": (1, 3, 4, 4), "series": (1, 6, 1)}.get(kind, (1, 6))
    display = Display(kind=kind, feature_names=["$\\bad{$"] * shape[-1], tokens=[["$\\bad{$"] * 6])
    explanation = explain(np.ones(shape), np.ones(shape), display, labels=["$\\bad{$"] * 4)
    assert "$\\bad{$" in text_of(view.figure(explanation))


@pytest.mark.parametrize(
    "shape", [(1, 3, 227, 227), (1, 3, 60, 600), (1, 3, 600, 60), (1, 1, 1, 9), (1, 40), (1, 90, 3)]
)
def test_nothing_is_cut_off_or_covers_the_title(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape) * 1e-5
    explanation = explain(
        values,
        values,
        labels=["a class with a rather long name, and a second one " * 2] * 4,
        layer="/model/encoder/layers/layers.11/attention/output/dense/MatMul_output_0",
        checks={"convergence_delta": np.array([1e-7])},
    )
    figure = view.figure(explanation)
    draw(figure)
    page = figure.get_window_extent()
    suptitle: Any = figure._suptitle  # type: ignore[attr-defined]
    title = suptitle.get_window_extent()
    assert (
        page.y0 <= title.y0 and title.y1 <= page.y1 and page.x0 <= title.x0 and title.x1 <= page.x1
    )
    for axes in figure.axes:
        box: Any = axes.get_tightbbox()
        assert box.x0 > page.x0 - 1 and box.x1 < page.x1 + 1 and box.y0 > page.y0 - 1
        assert box.y1 <= title.y0


def test_views_use_no_global_matplotlib_state() -> None:
    code = (
        "import sys, numpy as np; from onnxplain import view; from onnxplain.result import *;"
        "x = np.ones((1, 6));"
        "e = Explanation(method='m', inputs={'x': x}, arrays={'x': x}, prediction=x);"
        "view.html(e); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- estimates and features ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.3123, 0.0213, "0.312 ± 0.021"),
        (-0.3123, 0.2, "-0.31 ± 0.20"),
        (12345.6, 12, "12346 ± 12"),
        (1.2e-6, 3e-8, "(1.200 ± 0.030)e-06"),
        (1e7, 2e5, "(1.000 ± 0.020)e+07"),
        (0, 0.01, "0.000 ± 0.010"),
        (3, 0, "3 ± 0"),
        (0.5, 1e-9, "0.5 ± 1e-09"),
        (0.31, float("inf"), "0.31 ± inf"),
        (0.3123, None, "0.312"),
    ],
)
def test_estimates_are_told_to_the_digit_that_means_something(
    value: float, error: float | None, text: str
) -> None:
    assert common.estimate(value, error) == text


def estimates(x: np.ndarray, values: np.ndarray, display: Display, **changes: Any) -> Explanation:
    errors = np.full_like(values, 0.25)
    return explain(x, values, display, standard_errors={"x": errors}, **changes)


def test_tables_have_whiskers_of_one_standard_error() -> None:
    values = np.array([[1.0, -2.0, 0.5, 0.1]])
    display = Display(kind="table", feature_names=list("abcd"))
    made = estimates(values, values, display)
    figure = view.figure(made, top=2)
    assert "-2.00 ± 0.25" in text_of(figure) and "one standard error" in text_of(figure)
    (whiskers,) = figure.axes[0].collections
    ends = [s[:, 0] for s in whiskers.get_segments() if len(s) and np.isfinite(s).all()]
    np.testing.assert_allclose(ends, [[-2.25, -1.75], [0.75, 1.25]])
    lines = view.terminal(made, top=2, color=False).splitlines()[2:]
    assert re.search(r"b = -2 +-2.00 ± 0.25  █+$", lines[0])
    assert re.search(r"\(2 others\) +\+6.000e-01", lines[2])
    assert not view.figure(explain(values, values, display)).axes[0].collections


def test_the_sum_of_the_others_dwarfs_no_bar() -> None:
    values = np.array([[4.0, -2.0, *[1.0] * 20]])
    made = explain(values, values, Display(kind="table"))
    lines = [line.rpartition("  ")[2] for line in view.terminal(made, top=2).splitlines()[2:]]
    assert lines == ["█" * 24, "█" * 12, "█" * 24 + "…"]
    figure = view.figure(made, top=2)
    assert "20 (bar cut)" in text_of(figure)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [4, -2, 4]


def test_tokens_and_pictures_say_how_sure_they_are() -> None:
    display = Display(kind="text", tokens=[["good", "film"]])
    made = estimates(np.array([[5, 6, 0]]), np.array([[1.0, -2.0, 0.0]]), display)
    assert "good(+1±0.2) film(-2±0.2)" in view.terminal(made, color=False)
    assert 'title="+1.000e+00±0.2"' in view.html(made)
    x = np.zeros((1, 1, 8, 8))
    image = Display(kind="image", layout="NCHW")
    assert "± 0.25 (mean standard error)" in text_of(view.figure(estimates(x, x + 1, image)))


def test_checks_of_samples_and_of_what_was_interrupted() -> None:
    checks = {"samples": np.array([1200]), "fit": np.array([0.87]), "completed": np.array([0.4])}
    x = np.ones((1, 4))
    made = explain(x, x, Display(kind="table"), checks=checks)
    title = text_of(view.figure(made))
    assert "samples 1200" in title and "fit R² 0.87" in title
    assert "INCOMPLETE: interrupted after 40%" in title
    assert "INCOMPLETE" in view.html(made) and "INCOMPLETE" in view.terminal(made)
    assert "what is missing" not in title
    whole = explain(x, x, checks={**checks, "completed": np.ones(1)})
    assert "INCOMPLETE" not in view.terminal(whole)


def test_titles_say_what_absence_looks_like() -> None:
    x = np.ones((1, 4))
    told = {"provenance": {"baselines": "blur"}, "options": {"centered": True}}
    made = explain(x, x, Display(kind="table"), method="rise", **told)
    assert "rise (centered) for dog" in text_of(view.figure(made))
    assert "· baseline blur" in text_of(view.figure(made)) and "baseline blur" in view.terminal(
        made
    )
    assert "baseline" not in view.terminal(explain(x, x))


def test_what_was_not_computed_is_drawn_as_nothing() -> None:
    values = np.array([[1.0, np.nan, -3.0, np.nan], [np.nan] * 4])
    made = explain(
        np.ones((2, 4)), values, prediction=np.repeat(SCORES, 2, axis=0), target=np.array([1, 1]),
        checks={"completed": np.array([0.5, 0.0])},
    )  # fmt: skip
    rows = view.table.ranked(common.frame(made), top=4)
    assert [row.attribution for row in rows] == [-3, 1, 0, 0]
    assert "what is missing is 0" in text_of(view.figure(made))
    with pytest.raises(InputError, match="example 1 was not computed"):
        view.figure(made, 1)
    made.checks["completed"][1] = 0.3  # of what is known at its end alone
    with pytest.raises(InputError, match="example 1 was not computed"):
        view.figure(made, 1)


def test_features_are_one_bar_each() -> None:
    values = np.array([[2.0, 2.0, -5.0, 1.0, 1.0, 1.0, 1.0]])
    features = {"x": np.array([[0, 0, 1, 2, 2, 2, 2]])}
    display = Display(kind="table", feature_names=list("abcdefg"))
    made = explain(values, values, display, features=features)
    rows = view.table.ranked(common.frame(made), top=2)
    assert [(row.name, row.attribution) for row in rows] == [
        ("c = -5", -5), ("a = 2 & b = 2", 2), ("(1 others)", 1)
    ]  # fmt: skip
    assert view.table.ranked(common.frame(made), top=3)[2].name == "d = 1 & 3 more"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_segments_of_pictures(layout: Any) -> None:
    mask = np.zeros((1, 1, 8, 8), int)
    mask[..., 2:5, 4:7] = 1
    values = np.where(mask == 1, 3.0, 0.5).repeat(3, axis=1)
    if layout == "NHWC":
        mask, values = mask.transpose(0, 2, 3, 1), values.transpose(0, 2, 3, 1)
    display = Display(kind="image", layout=layout)
    made = explain(np.zeros_like(values), values, display, features={"x": mask})
    assert "9 pixels around row 3, column 5  +3.000e+00" in view.terminal(made)
    text = text_of(view.figure(made))
    assert "the same in all 3 channels" in text and "largest |attribution| 3" in text


def test_padding_of_one_feature_is_counted_once() -> None:
    display = Display(kind="text", tokens=[["good"]])
    values = np.array([[1.0, 2.0, 2.0]])
    made = explain(np.ones((1, 3)), values, display, features={"x": np.array([[0, 1, 1]])})
    assert "(+2 positions)(+2)" in view.terminal(made, color=False)


def test_what_lies_far_from_zero_is_shown_by_its_differences() -> None:
    values = 5 + np.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    words = text_of(explain(values, values).plot())
    assert "less their mean, 5.5" in words and "less the least, 5" in words
    assert common.offset(values - 5) == (0.0, 0.0) == common.offset(np.full(4, 2.0))
