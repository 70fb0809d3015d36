"""Images: the input, the signed attributions over it, and their size as a heat map."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from skimage.color import rgb2gray
from skimage.transform import resize

from onnxplain.errors import InputError
from onnxplain.view import common
from onnxplain.view.common import Frame


def figure(frame: Frame, *, percentile: float = 99.0) -> Figure:
    """Input with the top predictions, diverging overlay, heat map of the absolute values.

    Attributions are summed over channels, unless these share them, as titles say; colors are
    clipped at `percentile` of their size.
    """
    picture, note = _picture(frame)
    values, sizing = _spatial(frame, picture.shape[:2])
    # Where nothing is near zero, what differs is what the picture can show.
    level, least = common.offset(values)
    signed, size = values - level, np.abs(values) - least
    scale, sizes = common.scale(signed, percentile), common.scale(size, percentile)
    gray = picture if picture.ndim == 2 else (rgb2gray(picture) * 255).round()

    height, width = picture.shape[:2]
    panel = float(np.clip(3.4 * width / height, 2.4, 5.0))  # inches
    fig = Figure(
        figsize=(3 * panel + (2.2 if scale.limit else 0.6), min(panel * height / width, 8.0) + 1.4),
        dpi=common.DPI,
        layout="compressed",
    )
    left, middle, right = fig.subplots(1, 3)
    # "auto" is nearest where pixels are enlarged and smooth where they are shrunk
    sampling = "nearest" if max(height, width) <= 128 else "auto"
    left.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=sampling)
    middle.imshow(gray, cmap="gray", vmin=0, vmax=255, interpolation=sampling, alpha=0.75)
    if scale.limit:
        middle.imshow(
            signed, cmap=common.signed_colors(), norm=scale.norm(), interpolation=sampling
        )
        beside = (1.03, 0, 0.15 / panel, 1)
        common.color_bar(fig, scale, cax=middle.inset_axes(beside))
        common.color_bar(fig, sizes, cax=right.inset_axes(beside), signed=False)
    right.imshow(size, cmap="inferno", norm=sizes.norm(signed=False), interpolation=sampling)
    unit, top = common.predictions(frame)
    less = (
        f"\nless their mean, {common.number(level)}",
        f"\nless the least, {common.number(least)}",
    )
    below, above = less if level else ("", "")
    zero = "all attributions are zero" if not scale.limit else None
    titles = (
        (left, "\n".join([f"input{note}, predicted ({unit}):", *top])),
        (middle, zero or f"signed: red positive, blue negative{below}{sizing}"),
        (right, zero or f"absolute value{above}{sizing}"),
    )
    for axes, title in titles:
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_axis_off()
    fig.set_figheight(fig.get_figheight() + 0.18 * common.title(fig, frame))
    fig.supxlabel(scale.note, fontsize=8)
    return fig


def _picture(frame: Frame) -> tuple[np.ndarray, str]:
    """The picture as uint8 [H, W] or [H, W, 3], and what has to be said about it."""
    if frame.display.images is not None:
        return frame.display.images[frame.example], ""
    x = frame.input
    if x is None or x.ndim not in (2, 3) or (x.ndim == 3 and not {1, 3} & {x.shape[0], x.shape[2]}):
        raise InputError(
            f"{'no input' if x is None else f'an input of shape {list(x.shape)}'} is there to draw"
            " as an image: name it in display.input_name, or give display.images"
        )
    x = x.astype(np.float64)
    if x.ndim == 3:
        channels_first = (frame.display.layout or common.image_layout(x.shape)) == "NCHW"
        x = np.moveaxis(x, 0, -1) if channels_first else x
        x = x[..., 0] if x.shape[-1] == 1 else x
    low, span = x.min(), np.ptp(x)
    return ((x - low) / (span or 1.0) * 255).round().astype(np.uint8), " (min-max scaled)"


def _spatial(frame: Frame, size: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Attributions summed over channels [H, W], at the picture's size, and words on both."""
    values, layout, words = frame.values, frame.display.layout, ""
    if values.ndim not in (2, 3):
        raise InputError(
            f"attributions of {frame.names[0]!r} have shape {list(values.shape)} per example, which"
            " can't be laid over an image: choose a layer whose values are [N, channels, h, w]"
        )
    if values.ndim == 3:
        if not (frame.of_input and layout):
            # A model that takes NHWC may work in NCHW inside: the aspect ratio tells
            stretch = [abs(np.log(h / w * size[1] / size[0])) for h, w in _sides(values.shape)]
            layout = "NHWC" if stretch[1] < stretch[0] else "NCHW"
        axis = 0 if layout == "NCHW" else 2
        count, first = values.shape[axis], values.take([0], axis)
        if frame.of_input and count > 1 and values.any() and (values == first).all():
            values, words = first, f"\n(the same in all {count} channels)"
        elif count > 1:
            words = f"\nsum over {count} channels"
        values = values.sum(axis=axis)
    if values.shape == size:
        return values, words
    words += f"\nupsampled from {values.shape[0]}x{values.shape[1]} (bilinear)"
    resized = resize(  # type: ignore[no-untyped-call]
        values, size, order=1, mode="edge", anti_aliasing=False
    )
    return np.asarray(resized), words


def _sides(shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width if channels come first, and if they come last."""
    return (shape[1], shape[2]), (shape[0], shape[1])
