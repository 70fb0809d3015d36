"""RISE: TorchRay's masks and numbers, closed forms, what it takes and what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain import RISE
from onnxplain.errors import EvaluationError, IncompleteWarning, InputError
from onnxplain.methods.interpolate import MODES
from onnxplain.perturb.grid import Grid, Layout
from tests.helpers import HEAD, model
from tests.test_maps import IMAGES, TEXT, WEIGHTS

# Height, width and cells: divisible and not, as many cells as places, few.
SHAPES = [(12, 12, 4), (13, 9, 4), (10, 10, 10), (24, 31, 7), (8, 7, 2)]
SALIENCY: dict[str, dict[str, Any]] = {
    "plain": {"num_masks": 40, "num_cells": 5, "p": 0.4, "seed": 3},
    "resized": {"num_masks": 30, "num_cells": 4, "p": 0.7, "resize": (9, 14)},
    "bicubic": {
        "num_masks": 9,
        "num_cells": 3,
        "p": 0.5,
        "resize": (7, 7),
        "resize_mode": "bicubic",
    },
}
# The network's weights by their names in PyTorch.
STATE = {
    "c1.weight": "K1", "c1.bias": "b1", "c2.weight": "K2", "n2.weight": "gain",
    "n2.bias": "shift", "n2.running_mean": "mean", "n2.running_var": "variance",
    "c3.weight": "K3", "c3.bias": "b3", "y.weight": "F", "y.bias": "bf",
}  # fmt: skip
RNG = np.random.default_rng(5)


def torchray(name: str) -> np.ndarray:
    return np.load(Path(__file__).parent / "oracle" / "golden" / "rise.npz")[name]


def cnn() -> ox.Model:
    return model(TEXT, WEIGHTS)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def layout(shape: tuple[int, ...], cells: tuple[int, ...], mode: str = "linear") -> Layout:
    return Layout(shape, tuple(range(len(shape))), cells, MODES[mode][0])


def masks_of(form: Grid, block: dict[str, np.ndarray], name: str = "x") -> np.ndarray:
    """The masks on the host, [S, ...]."""
    like = np.zeros((1, *form.layouts[name].shape), np.float32)
    return form.masks(form.rows(block), {}, name, like)[:, 0]


def drawing(cells: np.ndarray, shift: np.ndarray) -> Any:
    """A sampler that gives what was drawn elsewhere."""
    return lambda piece: {"cells.x": cells[piece], "shift.x": shift[piece]}


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "cells"), SHAPES)
def test_masks_are_those_of_torchray(height: int, width: int, cells: int) -> None:
    name = f"{height}x{width}x{cells}"
    form = Grid({"x": layout((height, width), (cells, cells))})
    block = {"cells.x": torchray(f"cells.{name}"), "shift.x": torchray(f"shift.{name}")}
    np.testing.assert_allclose(masks_of(form, block), torchray(f"masks.{name}"), atol=1e-6)


@pytest.mark.parametrize("name", SALIENCY)
def test_saliency_is_that_of_torchray(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every class, and of one."""
    drawn = drawing(torchray(f"cells.{name}"), torchray(f"shift.{name}"))
    monkeypatch.setattr(Grid, "sampler", lambda self, seed, p: drawn)
    want = torchray(f"saliency.{name}")
    got = RISE(cnn()).attribute(IMAGES, **SALIENCY[name])
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-6)
    of_classes = RISE(cnn()).attribute(IMAGES, target=[1, 3], **SALIENCY[name])
    np.testing.assert_allclose(of_classes, want[[0, 1], [1, 3]][:, None], atol=1e-6)


def test_a_mask_in_closed_form() -> None:
    """The middle cell of three, and its reflections behind the other two, fall linearly to 0."""
    form = Grid({"x": layout((9,), (3,))})
    cells = np.array([[False, True, False]] * 3)
    got = masks_of(form, {"cells.x": cells, "shift.x": np.arange(3)[:, None]})
    # 9 places and 3 shifts need 4 places a cell: its center lies at 5.5, those next to it 8 away.
    places = np.arange(9) + np.arange(3)[:, None]
    want = sum(np.clip(1 - abs(places - at) / 4, 0, 1) for at in (-2.5, 5.5, 13.5))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_hard_masks_are_0_and_1() -> None:
    form = Grid({"x": layout((10, 7), (3, 2), "nearest")})
    assert form.layouts["x"].shifts == (4, 4)
    block = form.sampler(0, 0.5)(slice(0, 50))
    got = masks_of(form, block)
    assert set(np.unique(got)) == {0, 1}
    wide = masks_of(Grid({"x": layout((10, 7), (3, 2))}), block)
    np.testing.assert_array_equal(
        got[(wide < 0.1) | (wide > 0.9)] > 0.5, wide[(wide < 0.1) | (wide > 0.9)] > 0.5
    )


def test_samples_are_a_function_of_their_numbers() -> None:
    form = Grid({"x": layout((20, 30), (4, 5)), "y": layout((9,), (2,))})
    draw = form.sampler(11, 0.3)
    whole = draw(slice(0, 3000))
    for name, array in draw(slice(1000, 1100)).items():
        np.testing.assert_array_equal(array, whole[name][1000:1100])
    assert not np.array_equal(form.sampler(12, 0.3)(slice(0, 3000))["cells.x"], whole["cells.x"])
    kept = whole["cells.x"].mean(0)
    assert kept.shape == (4, 5) and abs(kept - 0.3).max() < 0.04
    for axis, bound in enumerate((5, 6)):
        counts = np.bincount(whole["shift.x"][:, axis], minlength=bound)
        assert len(counts) == bound and abs(counts / 3000 - 1 / bound).max() < 0.03
    assert abs(np.corrcoef(whole["cells.x"][:, 0, 0], whole["cells.y"][:, 0])[0, 1]) < 0.06


# --- numbers ------------------------------------------------------------------------------------


def test_given_masks_by_the_formula() -> None:
    masks = RNG.random((25, 12, 12)).astype(np.float32)
    net = cnn()
    want = np.zeros((2, 5, 12, 12))
    for m in masks:
        want += sigmoid(net(IMAGES * m)["y"])[:, :, None, None] * m / 25
    for given in (masks, masks[:, None]):
        for size in (None, 7):
            got = RISE(net).attribute(IMAGES, num_masks=25, filter_masks=given, batch_size=size)
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_baselines_and_plain_scores_by_the_formula() -> None:
    masks = RNG.random((25, 12, 12)).astype(np.float32)
    net, base = cnn(), RNG.random((1, 3, 12, 12)).astype(np.float32)
    want = np.zeros((2, 1, 12, 12))
    for m in masks:
        want[:, 0] += net(IMAGES * m + base * (1 - m))["y"][:, 2, None, None] * m / 25
    got, error = RISE(net).attribute(
        IMAGES, 2, 25, filter_masks=masks, baselines=base, activation="none",
        return_standard_error=True,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-6)
    each = [net(IMAGES * m + base * (1 - m))["y"][:, 2, None, None] * m for m in masks]
    np.testing.assert_allclose(error[:, 0], np.std(each, 0, ddof=1) / 5, rtol=1e-4)


def test_standard_errors_of_grids_are_those_of_their_masks() -> None:
    """The sums over cells give what the masks themselves do."""
    net = cnn()
    got, error = RISE(net).attribute(
        IMAGES, 3, 50, num_cells=(4, 3), p=0.6, seed=2, return_standard_error=True
    )
    form = Grid({"x": layout((12, 12), (4, 3))})
    masks = masks_of(form, form.sampler(2, 0.6)(slice(0, 50)))
    each = np.stack([sigmoid(net(IMAGES * m)["y"])[:, 3, None, None, None] * m for m in masks])
    np.testing.assert_allclose(got, each.mean(0), atol=1e-6)
    np.testing.assert_allclose(error, each.std(0, ddof=1) / np.sqrt(50), rtol=1e-4, atol=1e-9)
    answer = RISE(net).answer(
        inputs=IMAGES, target=3, num_masks=50, num_cells=(4, 3), p=0.6, seed=2
    )
    np.testing.assert_array_equal(answer.standard_errors, error)
    gaps = np.abs(got - got.mean((1, 2, 3), keepdims=True))
    share = error.sum((1, 2, 3)) / gaps.sum((1, 2, 3))
    np.testing.assert_allclose(answer.checks["standard_error"], share, rtol=1e-5)
    np.testing.assert_array_equal(answer.checks["samples"], [50, 50])


def test_standard_errors_tell_how_far_seeds_differ() -> None:
    found = [
        RISE(cnn()).attribute(IMAGES, 0, 200, 4, seed=seed, return_standard_error=True)
        for seed in range(20)
    ]
    spread = np.std([a for a, _ in found], axis=0, ddof=1)
    ratio = spread.mean() / np.mean([e for _, e in found])
    assert 0.8 < ratio < 1.25


def test_same_numbers_alone_in_any_batch_and_chunk() -> None:
    net = cnn()
    options: dict[str, Any] = {"target": 1, "num_masks": 70, "num_cells": 4, "seed": 0}
    together = RISE(net).attribute(IMAGES, **options)
    np.testing.assert_array_equal(RISE(net).attribute(IMAGES[1:], **options), together[1:])
    small = RISE(net).attribute(IMAGES, batch_size=3, **options)
    np.testing.assert_allclose(small, together, atol=1e-6)
    function = ox.BlackBox(lambda x: net(x)["y"])
    np.testing.assert_allclose(RISE(function).attribute(IMAGES, **options), together, atol=1e-6)


def test_tolerance_is_met_by_each_example_for_itself() -> None:
    net = cnn()
    options: dict[str, Any] = {"num_masks": 4000, "num_cells": 4, "seed": 1, "tolerance": 0.3}
    options["centered"] = True
    targets = [0, 3]
    both = RISE(net).answer(inputs=IMAGES, target=targets, **options)
    assert (both.checks["standard_error"] <= 0.3).all()
    assert (both.checks["samples"] < 4000).all()
    for i in range(2):
        alone = RISE(net).answer(inputs=IMAGES[i : i + 1], target=targets[i], **options)
        np.testing.assert_array_equal(alone.result, both.result[i : i + 1])
        assert alone.checks["samples"] == both.checks["samples"][i]


# --- inputs of other kinds ------------------------------------------------------------------------


def test_channels_last() -> None:
    last = model(
        f"""{HEAD} net (float[N, 9, 8, 3] x) => (float[N, 5] y) {{
            t = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(t, K) m = GlobalAveragePool(c)
            y = Flatten(m) }}""",
        {"K": RNG.standard_normal((5, 3, 3, 3)).astype(np.float32)},
    )
    first = model(
        f"""{HEAD} net (float[N, 3, 9, 8] x) => (float[N, 5] y) {{
            c = Conv(x, K) m = GlobalAveragePool(c) y = Flatten(m) }}""",
        {"K": last.graph.graph.initializers["K"].const_value.numpy()},  # type: ignore[union-attr]
    )
    x = RNG.standard_normal((2, 3, 9, 8)).astype(np.float32)
    options: dict[str, Any] = {"num_masks": 30, "num_cells": 3, "seed": 0}
    want = RISE(first).attribute(x, **options)
    got = RISE(last).attribute(x.transpose(0, 2, 3, 1), **options)
    assert got.shape == (2, 9, 8, 5)
    np.testing.assert_allclose(got, want.transpose(0, 2, 3, 1), atol=1e-6)
    one = RISE(last).attribute(x.transpose(0, 2, 3, 1), target=4, **options)
    np.testing.assert_allclose(one, got[..., 4:], atol=1e-6)


def test_series() -> None:
    """A mask over time: the mean of score * mask, for channels first and last."""
    net = model(
        f"""{HEAD} net (float[N, 2, 20] x) => (float[N, 3] y) {{
            c = Conv(x, K) r = Relu(c) m = GlobalAveragePool(r) y = Flatten(m) }}""",
        {"K": RNG.standard_normal((3, 2, 5)).astype(np.float32)},
    )
    x = RNG.standard_normal((2, 2, 20)).astype(np.float32)
    got = RISE(net).attribute(x, 1, 60, 5, seed=4)
    form = Grid({"x": layout((20,), (5,))})
    masks = masks_of(form, form.sampler(4, 0.5)(slice(0, 60)))
    want = np.mean([sigmoid(net(x * m)["y"])[:, 1, None] * m for m in masks], axis=0)
    assert got.shape == (2, 1, 20)
    np.testing.assert_allclose(got[:, 0], want, atol=1e-6)
    assert RISE(net).attribute(x, 1, 5, 5, resize=(7,), resize_mode="linear").shape == (2, 1, 7)
    function = ox.BlackBox(lambda x: net(x)["y"])
    np.testing.assert_allclose(RISE(function).attribute(x, 1, 60, (5,), seed=4), got, atol=1e-6)
    with pytest.raises(InputError, match=r"give num_cells as a tuple"):
        RISE(function).attribute(x, 1, 60, 5)


def every_mask(columns: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=columns)), np.float32)


def test_tables_have_a_cell_a_column() -> None:
    """In the limit a linear score gives (sum of w_j x_j p + w_i x_i (1 - p)) p."""
    w = np.array([[1.0], [-2.0], [0.5], [3.0]], np.float32)
    net = model(f"{HEAD} net (float[N, 4] x) => (float[N, 1] y) {{ y = MatMul(x, w) }}", {"w": w})
    x = np.array([[1, 2, 3, 4], [4, 0, -1, 2]], np.float32)
    got, error = RISE(net).attribute(
        x, num_masks=4000, p=0.3, seed=0, activation="none", return_standard_error=True
    )
    terms = x * w[:, 0]
    want = (terms.sum(1, keepdims=True) * 0.3 + terms * 0.7) * 0.3
    assert got.shape == x.shape
    assert (abs(got - want) / error < 4.5).all() and error.max() < 0.15
    # All columns kept or not, each as likely: the mean over every mask.
    masks = every_mask(4)
    exact = np.mean([sigmoid(net(x * m)["y"]) * m for m in masks], axis=0)
    given = RISE(net).attribute(x, num_masks=16, filter_masks=masks)
    np.testing.assert_allclose(given, exact, atol=1e-6)
    half, error = RISE(net).attribute(x, num_masks=4000, seed=0, return_standard_error=True)
    assert (abs(half - exact) / error < 4.5).all()


def tokens() -> ox.Model:
    return model(
        f"""{HEAD} net (int64[N, T] x) => (float[N, 2] y) {{
            e = Gather(table, x) y = ReduceMean<keepdims = 0>(e, axes) }}""",
        {"table": RNG.standard_normal((9, 2)).astype(np.float32), "axes": np.array([1])},
    )


def test_tokens_are_kept_or_replaced() -> None:
    net, x = tokens(), np.array([[3, 5, 1, 7, 8, 2]])
    got = RISE(net).attribute(x, num_masks=64, filter_masks=every_mask(6), baselines=4)
    want = np.mean(
        [sigmoid(net(np.where(m == 1, x, 4))["y"])[:, :, None] * m for m in every_mask(6)], axis=0
    )
    assert got.shape == (1, 2, 6) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    drawn, error = RISE(net).attribute(
        x, 1, num_masks=3000, baselines=4, seed=0, return_standard_error=True
    )
    assert drawn.shape == (1, 6) and (abs(drawn - want[:, 1]) / error < 4.5).all()
    stretched = RISE(net).attribute(x, 1, num_masks=20, num_cells=(3,), seed=0)
    assert stretched.shape == (1, 6)


def test_integer_images_are_kept_or_replaced() -> None:
    net = model(
        f"""{HEAD} net (uint8[N, 6, 8, 3] x) => (float[N, 4] y) {{
            f = Cast<to = 1>(x) t = Transpose<perm = [0, 3, 1, 2]>(f) c = Conv(t, K)
            m = GlobalAveragePool(c) y = Flatten(m) }}""",
        {"K": (RNG.standard_normal((4, 3, 3, 3)) / 100).astype(np.float32)},
    )
    x = RNG.integers(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    got = RISE(net).attribute(x, 2, 40, (2, 3), seed=6, baselines=7)
    form = Grid({"x": layout((6, 8), (2, 3), "nearest")})
    masks = masks_of(form, form.sampler(6, 0.5)(slice(0, 40)))[..., None]
    want = np.mean(
        [sigmoid(net(np.where(m == 1, x, 7).astype(np.uint8))["y"])[:, 2, None, None, None] * m
         for m in masks], axis=0,
    )  # fmt: skip
    assert got.shape == (2, 6, 8, 1)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_several_inputs_have_grids_of_their_own() -> None:
    net = model(
        f"""{HEAD} net (float[N, 1, 6, 6] a, float[N, 5] b) => (float[N, 1] y) {{
            s = ReduceSum<keepdims = 0>(a, axes) t = MatMul(b, w) u = MatMul(s, v)
            y = Add(t, u) }}""",
        {
            "axes": np.array([2, 3]),
            "w": RNG.standard_normal((5, 1)).astype(np.float32),
            "v": np.ones((1, 1), np.float32),
        },
    )
    a, b = (RNG.standard_normal(s).astype(np.float32) for s in ((2, 1, 6, 6), (2, 5)))
    got = RISE(net).attribute((a, b), num_masks=30, num_cells=3, seed=8)
    form = Grid({"a": layout((6, 6), (3, 3)), "b": Layout((5,), (0,), None, MODES["linear"][0])})
    block = form.sampler(8, 0.5)(slice(0, 30))
    of_a, of_b = masks_of(form, block, "a"), masks_of(form, block, "b").astype(np.float32)
    scores = [sigmoid(net((a * m, b * k))["y"])[:, 0] for m, k in zip(of_a, of_b, strict=True)]
    want_a = np.mean([s[:, None, None, None] * m for s, m in zip(scores, of_a, strict=True)], 0)
    want_b = np.mean([s[:, None] * k for s, k in zip(scores, of_b, strict=True)], 0)
    assert got[0].shape == (2, 1, 6, 6) and got[1].shape == (2, 5)
    np.testing.assert_allclose(got[0], want_a, atol=1e-6)
    np.testing.assert_allclose(got[1], want_b, atol=1e-6)
    alone = RISE(net).attribute(a, num_masks=30, num_cells=3, seed=8, additional_forward_args=b)
    assert alone.shape == (2, 1, 6, 6) and not np.allclose(alone, got[0])


def test_one_cell_and_all_kept() -> None:
    net = cnn()
    flat = RISE(net).attribute(IMAGES, 0, 10, (1, 1), seed=0)
    assert np.ptp(flat.reshape(2, -1), axis=1).max() < 1e-6
    whole = RISE(net).attribute(IMAGES, 0, 4, 3, p=1)
    score = sigmoid(net(IMAGES)["y"])[:, 0, None, None, None]
    np.testing.assert_allclose(whole, np.broadcast_to(score, whole.shape), atol=1e-6)


def test_explain_tells_how_sure_it_is() -> None:
    found = ox.explain(cnn(), IMAGES, method="rise", num_masks=60, num_cells=4, seed=1)
    assert found.attributions.shape == (2, 1, 12, 12)
    assert found.standard_errors["x"].shape == (2, 1, 12, 12)
    assert (found.checks["standard_error"] > 0).all()


# --- bad input ------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_masks": 0}, "num_masks must be an integer of at least 1"),
    ({"num_masks": 2.5}, "num_masks must be an integer"),
    ({"num_cells": 0}, "num_cells must be an integer of at least 1"),
    ({"num_cells": 13}, r"12 places along an axis, too few for 13 cells"),
    ({"num_cells": (3,)}, "2 spatial axes; give one number for each"),
    ({"num_cells": (3, 3, 3, 3)}, "give one number for each"),
    ({"p": 0}, "above 0 and at most 1"),
    ({"p": 1.5}, "above 0 and at most 1"),
    ({"p": True}, "above 0 and at most 1"),
    ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ({"resize": (3, 4, 5)}, "no size of a map with 2 spatial axes"),
    ({"resize": (0, 4)}, "no size of a map"),
    ({"resize_mode": "lanczos"}, "resize_mode is one of"),
    ({"resize": (3, 4), "resize_mode": "linear"}, "there are 2"),
    ({"activation": "softmax"}, "activation is one of sigmoid, none"),
    ({"seed": -1}, "seed must be an integer of at least 0"),
    ({"tolerance": 0}, "tolerance must be a positive number"),
    ({"num_masks": 4, "filter_masks": np.ones((3, 12, 12))}, "give num_masks=3 too"),
    ({"num_masks": 3, "filter_masks": np.ones((3, 12, 11))}, r"\[num_masks, 12, 12\]"),
    ({"num_masks": 3, "filter_masks": np.full((3, 12, 12), np.nan)}, "give finite numbers"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RISE(cnn()).attribute(IMAGES, **{"target": 0, "num_masks": 5, "num_cells": 4, **options})


def test_bad_masks_of_tokens_and_of_several_inputs() -> None:
    x = np.array([[3, 5, 1]])
    with pytest.raises(InputError, match=r"kept \(1\) or not"):
        RISE(tokens()).attribute(x, 0, num_masks=1, filter_masks=np.array([[0.5, 1, 0]]))
    two = ox.BlackBox(lambda a, b: a.sum(1) + b.sum(1))
    with pytest.raises(InputError, match="for one explained input, and there are 2"):
        RISE(two).attribute(
            (np.ones((1, 3)), np.ones((1, 3))), num_masks=1, filter_masks=np.ones((1, 3))
        )


def test_inputs_without_room_for_masks() -> None:
    function = ox.BlackBox(lambda x: x.reshape(len(x), -1).sum(1))
    for shape, axes in (((2,), 0), ((2, 4, 5, 6, 3), 3)):
        with pytest.raises(InputError, match=f"{axes} spatial axes to lay a mask over"):
            RISE(function).attribute(np.ones(shape))


def test_what_was_computed_is_kept() -> None:
    """When the function fails, and when the user interrupts."""
    calls = []

    def failing(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        if len(calls) > 5:
            raise stop
        return x.reshape(len(x), -1).mean(1)

    function, x = ox.BlackBox(failing), np.ones((1, 1, 6, 6), np.float32)
    options: dict[str, Any] = {"num_masks": 40, "num_cells": 3, "seed": 0, "batch_size": 8}
    whole = ox.BlackBox(lambda x: x.reshape(len(x), -1).mean(1))
    stop: BaseException = ValueError("out of quota")
    with pytest.raises(EvaluationError, match="out of quota") as caught:
        RISE(function).attribute(x, **options)
    first = RISE(whole).attribute(x, **{**options, "num_masks": caught.value.samples})
    np.testing.assert_allclose(caught.value.partial, first, atol=1e-6)
    assert 0 < caught.value.samples < 40
    calls.clear()
    stop = KeyboardInterrupt()
    with pytest.warns(IncompleteWarning):
        got = RISE(function).attribute(x, **options)
    np.testing.assert_allclose(got, first, atol=1e-6)


@pytest.mark.parametrize("at_once", [7, 100])
def test_centered_scores_give_the_map_less_a_constant(at_once: int) -> None:
    net = cnn()
    options: dict[str, Any] = {"num_masks": 200, "num_cells": 4, "seed": 3, "batch_size": at_once}
    got = RISE(net).attribute(IMAGES, 3, centered=True, **options)
    form = Grid({"x": layout((12, 12), (4, 4))})
    masks = masks_of(form, form.sampler(3, 0.5)(slice(0, 200)))
    scores = np.stack([sigmoid(net(IMAGES * m)["y"])[:, 3] for m in masks])
    level = scores[:64].mean(0)
    want = np.einsum("sn,shw->nhw", scores - level, masks.reshape(200, 12, 12)) / 200
    want -= 0.5 * (scores.mean(0) - level)[:, None, None]  # the mean of masks is p
    np.testing.assert_allclose(got[:, 0], want, atol=1e-6)
    with pytest.raises(ox.InputError, match="centered is True or False"):
        RISE(net).attribute(IMAGES, 3, centered=1, **options)
