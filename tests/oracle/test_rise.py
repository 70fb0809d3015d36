"""RISE's tables of masks against what TorchRay does in PyTorch: pad, interpolate, cut out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from onnxplain.methods.interpolate import MODES
from onnxplain.perturb.grid import Layout


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.integers(2, 70)) for _ in range(2))
    cells = tuple(data.draw(st.integers(2, min(size, 9))) for size in sizes)
    rows, columns = Layout(sizes, (0, 1), cells, MODES["bilinear"][0]).tables
    grid = torch.rand(3, 1, *cells, dtype=torch.float64)
    shifts = [-(-size // n) for size, n in zip(sizes, cells, strict=True)]
    assert (len(rows), len(columns)) == tuple(shifts)
    # Masks that are longer by the shifts lie a cell away from the padding's end.
    scale = [-(-(s + c) // n) for s, c, n in zip(sizes, shifts, cells, strict=True)]
    padded = functional.pad(grid, (1, 1, 1, 1), mode="reflect")
    whole = [k * (n + 2) for k, n in zip(scale, cells, strict=True)]
    stretched = functional.interpolate(padded, whole, mode="bilinear")[:, 0].numpy()
    y, x = (data.draw(st.integers(0, n - 1)) for n in shifts)
    top, left = scale[0] + y, scale[1] + x
    want = stretched[:, top : top + sizes[0], left : left + sizes[1]]
    np.testing.assert_allclose(rows[y] @ grid[:, 0].numpy() @ columns[x].T, want, atol=1e-9)
