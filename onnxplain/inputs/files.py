"""Files to arrays and strings: every way in which a file can be wrong becomes one clear error."""

from __future__ import annotations

import csv
import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ..errors import FileFormatError

MAX_TEXT_BYTES = 64 << 20  # configurations, vocabularies, labels, texts
MAX_TABLE_BYTES = 1 << 30
MAX_ARCHIVE_BYTES = 8 << 30  # of arrays in one .npz, unpacked


_BROKEN = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, struct.error)


def check_file(path: Path, limit: int | None = None) -> int:
    """The size of ``path`` in bytes, if it is a file, readable, not empty, and within ``limit``."""
    try:
        if path.is_dir():
            raise FileFormatError(f"{path} is a folder; give a file")
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise FileFormatError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FileFormatError(f"{path} can't be read: {error}") from None
    if not size:
        raise FileFormatError(f"{path} is empty")
    if limit is not None and size > limit:
        raise FileFormatError(f"{path} has {size} bytes, more than the {limit} allowed here")
    return size


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 text file, with or without a byte order mark."""
    check_file(path, limit)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: {error}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file; only line feeds (and CR LF) end one."""
    return [line.rstrip("\r") for line in read_text(path).rstrip("\r\n").split("\n")]


def _read_array(file: IO[bytes], size: int, where: str) -> np.ndarray:
    """One array in .npy form from ``file`` of ``size`` bytes; nothing is allocated on its word."""
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format is for structured arrays")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.kind not in "biuf":
            raise ValueError(f"it holds {dtype}, not numbers; save a plain numeric array")
        needed = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or needed > size:
            raise ValueError(
                f"it is truncated: its header promises shape {list(shape)} of {dtype}, "
                f"{needed} bytes, but it has {size} in all"
            )
        file.seek(0)
        return np.asarray(npy.read_array(file, allow_pickle=False))
    except (*_BROKEN, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise FileFormatError(f"{where} can't be read as a NumPy array: {error}") from None


def read_npy(path: Path) -> np.ndarray:
    """The array in a .npy file; never unpickles."""
    size = check_file(path)
    with path.open("rb") as file:
        return _read_array(file, size, str(path))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a .npz file by name; never unpickles, unpacks at most 8 GiB."""
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if not members:
                raise FileFormatError(f"{path} holds no arrays")
            if sum(info.file_size for info in members) > MAX_ARCHIVE_BYTES:
                raise FileFormatError(f"{path} unpacks to more than {MAX_ARCHIVE_BYTES} bytes")
            arrays = {}
            for info in members:
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as file:
                    arrays[name] = _read_array(file, info.file_size, f"{path}: {name!r}")
            return arrays
    except FileFormatError:
        raise
    except (*_BROKEN, NotImplementedError, RuntimeError) as error:  # the last two: encrypted, ...
        raise FileFormatError(f"{path} can't be read as .npz: {error}") from None


def _parse(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def read_csv(path: Path) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """A table of numbers, float64 [rows, columns], and its column names if it has a header.

    Cells are separated by commas, semicolons or tabs (the first of these in the first line). The
    first line is a header if none of its cells is a number. FileFormatError names the line and the
    column of a cell that is no number, and a line of another length.
    """
    text = read_text(path, MAX_TABLE_BYTES)
    first = text.split("\n", 1)[0]
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names: tuple[str, ...] | None = None
    rows: list[list[float]] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            numbers = [_parse(cell) for cell in cells]
            if names is None and not rows and all(number is None for number in numbers):
                names = tuple(cell.strip() for cell in cells)
                continue
            width = len(names or (rows[0] if rows else cells))
            if len(cells) != width:
                raise FileFormatError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but {width} columns"
                )
            row = []
            for column, (cell, number) in enumerate(zip(cells, numbers, strict=True)):
                if number is None:
                    label = f"{column + 1} ({names[column]})" if names else str(column + 1)
                    raise FileFormatError(
                        f"{path}, line {reader.line_num}, column {label}: "
                        f"{cell.strip()[:40]!r} is not a number"
                    )
                row.append(number)
            rows.append(row)
    except csv.Error as error:
        raise FileFormatError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise FileFormatError(f"{path} has no rows of numbers")
    return np.array(rows), names
