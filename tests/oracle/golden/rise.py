"""Makes rise.npz: masks and saliency of TorchRay's RISE, with the grids and shifts it drew.

From the repository, with a clone of https://github.com/facebookresearch/TorchRay (commit 6a198ee):

    PYTHONPATH=.:path/to/TorchRay python -m tests.oracle.golden.rise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torchray.attribution.rise import rise

from tests.oracle.golden.torchray import Net
from tests.test_maps import IMAGES, WEIGHTS
from tests.test_rise import SALIENCY, SHAPES, STATE


@contextmanager
def drawn() -> Iterator[dict[str, list[np.ndarray]]]:
    """What is drawn within: grids, and shifts along the rows and along the columns in turn."""
    found: dict[str, list[np.ndarray]] = {"rand": [], "randint": []}

    def recording(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(*args: Any, **options: Any) -> Tensor:
            found[name].append(draw(*args, **options).numpy())
            return torch.from_numpy(found[name][-1])

        return recorded

    with (
        mock.patch("torch.rand", recording("rand", torch.rand)),
        mock.patch("torch.randint", recording("randint", torch.randint)),
    ):
        yield found


def called(model: Callable[[Tensor], Tensor], x: Tensor, p: float, **options: Any) -> Any:
    """Saliency, cells [masks, h, w] and shifts [masks, 2]."""
    with drawn() as found:
        saliency = rise(model, x, p=p, batch_size=10_000, **options)
    (grid,) = found["rand"]
    return saliency.numpy(), grid[:, 0] < p, np.stack(found["randint"], axis=1)


def main() -> None:
    found = {}
    for height, width, cells in SHAPES:
        seen: list[np.ndarray] = []

        def model(x: Tensor, seen: list[np.ndarray] = seen) -> Tensor:
            seen.append(x.numpy()[:, 0])
            return torch.zeros(len(x), 1)

        x = torch.ones(1, 1, height, width)
        _, grid, shift = called(model, x, 0.5, num_masks=6, num_cells=cells)
        name = f"{height}x{width}x{cells}"
        found |= {f"cells.{name}": grid, f"shift.{name}": shift, f"masks.{name}": seen[-1]}
    net = Net().eval()
    net.load_state_dict({k: torch.from_numpy(WEIGHTS[v]) for k, v in STATE.items()}, strict=False)
    for name, options in SALIENCY.items():
        saliency, grid, shift = called(net, torch.from_numpy(IMAGES), **options)
        found |= {f"saliency.{name}": saliency, f"cells.{name}": grid, f"shift.{name}": shift}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
