"""Pictures: decoded, resized and normalized as the model was trained, and back again to be seen."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError, InputError
from .files import check_file
from .preprocessing import MAX_PIXELS, Preprocessing

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601: Pillow's and torchvision's grey

# What brings an EXIF orientation upright: quarter turns counter-clockwise, then a left-right flip.
_TURNS: dict[Any, tuple[int, int]] = {
    1: (0, 0),
    2: (0, 1),
    3: (2, 0),
    4: (2, 1),
    5: (3, 1),
    6: (3, 0),
    7: (1, 1),
    8: (1, 0),
}

# What decoders raise on files that are damaged or hostile.
_BROKEN: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, TypeError, SyntaxError, RuntimeError, IndexError, KeyError),
    *(OverflowError, struct.error, zlib.error),
)


def _header(path: Path) -> tuple[str, Any]:
    """Pixel mode and EXIF orientation, read before any pixel is; refuses what is too large."""
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # ours is stricter
            with PIL.Image.open(path) as image:
                (width, height), mode = image.size, image.mode
                if width * height > MAX_PIXELS:
                    raise PIL.Image.DecompressionBombError(f"it has {width} x {height} pixels")
                if getattr(image, "is_animated", False):
                    raise ValueError("it has several frames; give a single one")
                # A PNG's own getexif would decode it in search of a tag behind the pixels.
                orientation = PIL.Image.Image.getexif(image).get(0x0112, 1)
    except PIL.Image.DecompressionBombError as error:
        raise FileFormatError(
            f"{path} is too large an image: {error}; shrink it to at most {MAX_PIXELS} pixels"
        ) from None
    except _BROKEN as error:
        reason = "of no known format" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise FileFormatError(f"{path} can't be read as an image: {reason}") from None
    return mode, orientation


def read_image(path: Path) -> np.ndarray:
    """An image file as float32 RGB [H, W, 3] in 0..255, upright.

    Grey becomes three equal channels, transparency lies over white, 16 bits are scaled down, the
    camera's orientation tag is obeyed.
    """
    import PIL.Image
    from skimage import io

    check_file(path)
    mode, orientation = _header(path)
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise FileFormatError(f"{path} holds {mode} colors; convert it to RGB")
    try:
        if mode == "LA":  # scikit-image takes the rows for channels where there are 3 or 4
            with PIL.Image.open(path) as image:
                pixels = np.asarray(image.convert("RGBA"))
        else:
            pixels = np.asarray(io.imread(path.resolve()))
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(f"{path} can't be decoded: {reason}") from None
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise FileFormatError(
            f"{path} holds values of shape {list(pixels.shape)}, not one picture of 1, 3 or 4 "
            "channels; give such a one, or the values as .npy"
        )
    values = _to_255(pixels, path)
    if pixels.shape[2] == 4:
        alpha = values[:, :, 3:] / 255
        values = values[:, :, :3] * alpha + 255 * (1 - alpha)
    turns, flip = _TURNS.get(orientation, (0, 0))
    values = np.rot90(values, turns)
    return np.repeat(values[:, ::-1] if flip else values, 3 // values.shape[2], axis=2)


def _to_255(pixels: np.ndarray, path: Path) -> np.ndarray:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.float32) * 255
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.astype(np.float32) * np.float32(255 / np.iinfo(pixels.dtype).max)
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
        return pixels.astype(np.float32) * 255
    raise FileFormatError(
        f"{path} holds {pixels.dtype} values from {pixels.min()} to {pixels.max()}: a picture is "
        "of 8 or 16 bits without sign, or floating point in 0..1; give other values as .npy"
    )


def _resize(values: np.ndarray, setting: Preprocessing) -> np.ndarray:
    from skimage import transform

    assert setting.size is not None
    size = setting.size
    height, width = values.shape[:2]
    if setting.resize == "shortest":
        ratio = max(size[0] / height, size[1] / width)
        size = (max(size[0], int(height * ratio)), max(size[1], int(width * ratio)))
        if size[0] * size[1] > MAX_PIXELS:
            raise InputError(f"a picture of {height} x {width} grows to {size[0]} x {size[1]}")
    if size == (height, width):
        return values
    resize: Any = transform.resize  # scikit-image has no types
    smooth = setting.order != 0
    return np.asarray(
        resize(values, size, order=setting.order, anti_aliasing=smooth, preserve_range=True)
    )


def prepare(path: Path, setting: Preprocessing) -> np.ndarray:
    """The model's input [1, ...] for one image file, under a resolved ``setting``."""
    values = read_image(path)
    if setting.channels == "L":
        values = (values @ _LUMA)[:, :, None]
    elif setting.channels == "BGR":
        values = values[:, :, ::-1]
    if setting.size is not None:
        values = _resize(values, setting)
    if setting.crop is not None:
        height, width = setting.crop
        top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
        if top < 0 or left < 0:
            raise InputError(
                f"{path}: crop {height} x {width} is larger than the picture of "
                f"{values.shape[0]} x {values.shape[1]}; set a larger size"
            )
        values = values[top : top + height, left : left + width]
    assert setting.scale is not None
    values = (values * setting.scale - np.array(setting.mean)) / np.array(setting.std)
    axes = (2, 0, 1) if setting.layout == "NCHW" else (0, 1, 2)
    return np.ascontiguousarray(values.transpose(axes)[None], np.float32)


def picture(array: np.ndarray, setting: Preprocessing) -> np.ndarray:
    """What the model saw, uint8 [N, H, W, 3] or grey [N, H, W]: ``prepare`` backwards."""
    values = array.transpose(0, 2, 3, 1) if setting.layout == "NCHW" else array
    assert setting.scale is not None
    values = (values * np.array(setting.std) + np.array(setting.mean)) / setting.scale
    values = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
    if setting.channels == "L":
        return values[..., 0]
    return np.ascontiguousarray(values[..., ::-1] if setting.channels == "BGR" else values)
