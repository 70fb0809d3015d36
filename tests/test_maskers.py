"""What "off" means: maskers by name, against their definitions; and where they make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

import onnxplain as ox
from onnxplain.perturb import maskers
from onnxplain.perturb.maskers import baseline
from tests.helpers import HEAD, model

rng = np.random.default_rng(0)
PICTURES = (rng.random((2, 3, 12, 16)) * [[[[1]], [[10]], [[100]]]]).astype(np.float32)
BLOCKS = (np.arange(12)[:, None] // 4 * 4 + np.arange(16) // 4)[None, None]  # 3 x 4 of 4 x 4


def of(kind: str, x: np.ndarray = PICTURES, channel: int | None = 1, **options: Any) -> np.ndarray:
    found = baseline(kind, x, channel, **options)
    assert found.dtype == x.dtype
    assert found.shape[1:] == x.shape[1:]
    return found


# --- each against its definition ----------------------------------------------------------------


def test_mean_is_of_each_channel_and_example() -> None:
    found = of("mean")
    np.testing.assert_allclose(found[:, :, 0, 0], PICTURES.mean(axis=(2, 3)), rtol=1e-6)
    assert (np.ptp(found, axis=(2, 3)) == 0).all()


def test_blur_is_a_gaussian_along_the_places() -> None:
    wanted = ndimage.gaussian_filter(
        PICTURES.astype(np.float64), (0, 0, 1.2, 1.2), mode="nearest", truncate=4
    )
    np.testing.assert_allclose(of("blur"), wanted, rtol=1e-5)
    narrow = maskers.blur(PICTURES.astype(np.float64), [2, 3], sigma=1e-3)
    np.testing.assert_allclose(narrow, PICTURES)


def test_noise_has_the_range_of_its_channel_and_depends_on_the_seed_alone() -> None:
    found = of("noise", seed=5)
    for place, channel in np.ndindex(2, 3):
        x, noise = PICTURES[place, channel], found[place, channel]
        assert x.min() <= noise.min() < noise.max() <= x.max()
        assert np.ptp(noise) > 0.8 * np.ptp(x)
    np.testing.assert_array_equal(found[1:], of("noise", PICTURES[1:], seed=5))
    assert (found != of("noise", seed=6)).any()
    np.testing.assert_array_equal(of("noise"), of("noise"))


def test_gaussian_noise_has_the_moments_of_its_channel() -> None:
    x = (rng.standard_normal((1, 2, 100, 100)) * 3 + [[[[5]], [[-50]]]]).astype(np.float32)
    found = of("gaussian-noise", x, seed=1)
    np.testing.assert_allclose(found.mean(axis=(2, 3)), x.mean(axis=(2, 3)), atol=0.15)
    np.testing.assert_allclose(found.std(axis=(2, 3)), x.std(axis=(2, 3)), rtol=0.05)


@pytest.mark.parametrize("channel", [1, 3])
def test_segment_mean(channel: int) -> None:
    x, ids = (np.moveaxis(a, 1, channel) for a in (PICTURES, BLOCKS))
    found = np.moveaxis(of("segment-mean", x, channel, ids=ids), channel, 1)
    blocks = PICTURES.reshape(2, 3, 3, 4, 4, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(found[:, :, ::4, ::4], blocks, rtol=1e-5)
    np.testing.assert_allclose(found[:, :, 3::4, 3::4], blocks, rtol=1e-5)


def test_segment_mean_of_features_that_differ_by_channel_and_example() -> None:
    ids = rng.integers(0, 3, PICTURES.shape)
    found = of("segment-mean", ids=ids)
    for n, c, f in np.ndindex(2, 3, 3):
        mask = ids[n, c] == f
        np.testing.assert_allclose(found[n, c][mask], PICTURES[n, c][mask].mean(), rtol=1e-5)


def test_inpainting_continues_what_is_smooth() -> None:
    """Biharmonic equations continue a plane exactly, where its values surround the region."""
    y, x = np.mgrid[:12, :16]
    plane = np.stack([2 * x + 3 * y, x - y, 0 * x + 7])[None].astype(np.float32)
    found = of("inpaint", plane, ids=BLOCKS)
    inner = BLOCKS[0, 0] == 5
    np.testing.assert_allclose(found[0][:, inner], plane[0][:, inner], atol=1e-3)
    other = PICTURES[:1].copy()
    other[0][:, inner] = 1e3  # what is there is not looked at
    np.testing.assert_allclose(
        of("inpaint", other, ids=BLOCKS)[0][:, inner],
        of("inpaint", PICTURES[:1], ids=BLOCKS)[0][:, inner],
        rtol=1e-4,
    )


def test_inpainting_one_channel_sees_that_channel_alone() -> None:
    ids = np.zeros((1, 3, 12, 16), np.int64)
    ids[0, 1, 4:8, 4:8] = 1  # of one channel only
    with pytest.raises(ox.InputError, match=r"feature 0 .* has all of a channel"):
        of("inpaint", ids=ids)
    ids += 2 * (np.arange(16) < 8)
    x = PICTURES.copy()
    x[:, [0, 2]] = 0
    np.testing.assert_array_equal(of("inpaint", x, ids=ids)[:, 1], of("inpaint", ids=ids)[:, 1])


def test_integers_are_rounded() -> None:
    x = rng.integers(0, 256, (2, 8, 8, 1), np.uint8)
    wanted = np.rint(x.mean(axis=(1, 2, 3)))
    np.testing.assert_array_equal(of("mean", x, 3)[:, 0, 0, 0], wanted)
    assert of("gaussian-noise", x, 3, seed=0).dtype == np.uint8


def test_pictures_without_a_channel_axis() -> None:
    grey = PICTURES[:, 0]
    for kind in maskers.MASKERS:
        found = of(kind, grey, None, ids=BLOCKS[:, 0], seed=2)
        np.testing.assert_allclose(found, of(kind, grey[:, None], ids=BLOCKS, seed=2)[:, 0])


# --- where they make no sense -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "x", "ids", "message"),
    [
        ("median", PICTURES, None, "no baseline 'median'; the named ones are zero, mean, blur"),
        ("blur", PICTURES[:, :, 0, 0], None, r"shape \[2, 3\] .* no picture and no series"),
        ("mean", np.array([[["a"]]], object), None, "no picture and no series"),
        ("inpaint", PICTURES, None, "this method has no feature mask: take mean or blur"),
        ("segment-mean", PICTURES, 0 * BLOCKS, "one feature as a whole"),
        ("segment-mean", PICTURES, np.arange(576).reshape(1, 3, 12, 16), "is its own value"),
        ("inpaint", PICTURES[:, :, :1].repeat(1600, 2), "each", "76800 features.*one by one"),
    ],
)
def test_maskers_that_make_no_sense(kind: str, x: np.ndarray, ids: Any, message: str) -> None:
    if isinstance(ids, str):
        ids = np.arange(x[0].size).reshape(1, *x.shape[1:])
    with pytest.raises(ox.InputError, match=message):
        baseline(kind, x, 1, ids=ids, name="image")


# --- as methods take them -----------------------------------------------------------------------

K = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
CONV = (
    HEAD
    + """conv (float[N,3,12,16] x) => (float[N,2] y) {
    c = Conv<pads=[1,1,1,1]>(x, k)
    r = Relu(c)
    y = ReduceMean<keepdims=0>(r, axes)
}"""
)


@pytest.fixture(scope="module")
def conv() -> ox.Model:
    return model(CONV, {"k": K, "axes": np.array([2, 3])})


@pytest.mark.parametrize("kind", maskers.MASKERS)
def test_every_masker_by_its_name(conv: ox.Model, kind: str) -> None:
    found = ox.FeatureAblation(conv).attribute(
        PICTURES, target=1, baselines=kind, feature_mask=BLOCKS
    )
    b = np.broadcast_to(of(kind, ids=BLOCKS), PICTURES.shape)
    for feature in (0, 5, 11):
        off = np.where(feature == BLOCKS, b, PICTURES)
        worth = conv(PICTURES)["y"][:, 1] - conv(off)["y"][:, 1]
        at = np.broadcast_to(feature == BLOCKS, PICTURES.shape)
        np.testing.assert_allclose(found[at].reshape(2, -1).T, worth[None].repeat(48, 0), atol=1e-4)


def test_masks_per_example_with_different_numbers_of_features(conv: ox.Model) -> None:
    masks = np.concatenate([BLOCKS, BLOCKS // 2])
    found = ox.FeatureAblation(conv).attribute(
        PICTURES, target=1, baselines="inpaint", feature_mask=masks
    )
    for i in range(2):
        alone = ox.FeatureAblation(conv).attribute(
            PICTURES[[i]], target=1, baselines="inpaint", feature_mask=masks[[i]]
        )
        np.testing.assert_allclose(found[[i]], alone, rtol=1e-4, atol=1e-5)


def test_scores_are_averaged_over_a_background(conv: ox.Model) -> None:
    rows = rng.random((5, 3, 12, 16)).astype(np.float32)
    method = ox.FeatureAblation(conv)
    asked: dict[str, Any] = {"target": 0, "feature_mask": BLOCKS}
    found = method.attribute(PICTURES, baselines=ox.Background(rows), **asked)
    each = [method.attribute(PICTURES, baselines=row[None], **asked) for row in rows]
    np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-3, atol=1e-4)
    with pytest.raises(ox.InputError, match=r"'x': shape \[5, 3, 12, 15\]"):
        method.attribute(PICTURES, baselines=ox.Background(rows[..., 1:]), **asked)


def test_gradient_methods_take_names_too(conv: ox.Model) -> None:
    method = ox.IntegratedGradients(conv)
    by_name = method.attribute(PICTURES, "blur", target=0)
    np.testing.assert_array_equal(by_name, method.attribute(PICTURES, of("blur"), target=0))
    with pytest.raises(ox.InputError, match="has no feature mask"):
        method.attribute(PICTURES, "inpaint", target=0)
    with pytest.raises(ox.InputError, match="one baseline for each example; rows of them"):
        ox.GradientShap(conv).attribute(PICTURES, "blur", target=0)


def test_the_channels_of_functions_are_told_by_shape() -> None:
    box = ox.BlackBox(lambda x: x.reshape(len(x), -1).std(axis=1))
    first = ox.FeatureAblation(box).attribute(PICTURES, "mean", feature_mask=BLOCKS)
    last = ox.FeatureAblation(box).attribute(
        np.moveaxis(PICTURES, 1, 3).copy(), "mean", feature_mask=np.moveaxis(BLOCKS, 1, 3)
    )
    np.testing.assert_allclose(np.moveaxis(last, 3, 1), first, rtol=1e-4, atol=1e-5)
    with pytest.raises(ox.InputError, match="which of its axes are places can't be told"):
        ox.FeatureAblation(box).attribute(PICTURES[:, 0], "blur")
