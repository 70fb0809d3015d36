"""Series: each channel's curve on the color of its attributions over time."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from onnxplain.errors import InputError
from onnxplain.view import common
from onnxplain.view.common import Frame


def figure(frame: Frame, *, percentile: float = 99.0, channels: int = 8) -> Figure:
    """One panel per channel, at most `channels`, those with the largest attributions."""
    curves, channels_last = _curves(frame)
    values, word = _attributions(frame, curves.shape, channels_last)
    scale = common.scale(values, percentile)
    order = np.argsort(-np.abs(values).sum(axis=1), kind="stable")[:channels]
    shown = np.sort(order)

    fig = Figure(
        figsize=(9, max(1.3 * len(shown), 2.0) + 1.7), dpi=common.DPI, layout="constrained"
    )
    panels = list(fig.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0])
    edges = np.arange(curves.shape[1] + 1) - 0.5
    names = frame.display.feature_names
    for axes, channel in zip(panels, shown, strict=True):
        axes.plot(curves[channel], color="black", linewidth=1.2)
        low, high = axes.get_ylim()
        axes.pcolormesh(
            edges,
            [low, high],
            values[channel : channel + 1],
            cmap=common.signed_colors(),
            norm=scale.norm(),
            zorder=0,
            edgecolors="none",
            rasterized=True,
        )
        axes.set(xlim=(edges[0], edges[-1]), ylim=(low, high))
        axes.tick_params(labelsize=8)
        name = names[channel] if names and len(names) == len(curves) else f"channel {channel}"
        axes.set_ylabel(common.shorten(name, 18), fontsize=8, parse_math=False)
    panels[-1].set_xlabel("time step", fontsize=9)
    if scale.limit:
        common.color_bar(fig, scale, ax=panels)
    common.title(fig, frame, common.verdict(frame))
    hidden = len(curves) - len(shown)
    more = f" · {hidden} channels with smaller attributions not shown" if hidden else ""
    fig.supxlabel(scale.note + word + more, fontsize=8)
    return fig


def _curves(frame: Frame) -> tuple[np.ndarray, bool]:
    """The series [channels, time], and whether channels came last."""
    raw, x = frame.display.values, frame.input
    if raw is not None and (x is None or raw[frame.example].size == x.size):
        x = raw[frame.example] if x is None else raw[frame.example].reshape(x.shape)
    if x is None or x.ndim not in (1, 2):
        raise InputError(
            f"{'no input' if x is None else f'an input of shape {list(x.shape)}'} is there to draw"
            " as a series [time, channels]: name it in display.input_name, or give display.values"
        )
    if x.ndim == 1:
        return x[None].astype(np.float64), False
    layout = frame.display.layout or ("NLC" if x.shape[0] >= x.shape[1] else "NCL")
    return (x.T if layout == "NLC" else x).astype(np.float64), layout == "NLC"


def _attributions(
    frame: Frame, shape: tuple[int, ...], channels_last: bool
) -> tuple[np.ndarray, str]:
    """Attributions [channels, time]; a layer's are summed over its channels and stretched."""
    values = frame.values if frame.of_input else np.squeeze(frame.values)
    if values.ndim not in (1, 2):
        raise InputError(
            f"attributions of {frame.names[0]!r} have shape {list(values.shape)} per example, which"
            " can't be laid along a series: choose a layer whose values are [N, channels, time]"
        )
    if frame.of_input:
        return (values.T if channels_last else values).reshape(shape), ""
    if values.ndim == 2:  # inside a model [channels, time], unless the length says otherwise
        values = values.sum(axis=int(values.shape[0] == shape[1] != values.shape[1]))
    at = (np.arange(shape[1]) + 0.5) * len(values) / shape[1] - 0.5
    stretched = np.interp(at, np.arange(len(values)), values)
    word = f" · summed over channels, stretched from {len(values)} steps"
    return np.broadcast_to(stretched, shape), word
