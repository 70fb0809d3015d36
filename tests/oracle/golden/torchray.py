"""Makes torchray.npz: what TorchRay finds on a small network.

TorchRay is no dependency of the tests, so its numbers are kept here. From the repository,
with a clone of https://github.com/facebookresearch/TorchRay (commit 6a198ee):

    PYTHONPATH=.:path/to/TorchRay python -m tests.oracle.golden.torchray
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracle.nets import import_torchvision
from tests.test_maps import CALLS, IMAGES, TARGETS, WEIGHTS, name_of

import_torchvision()

from torchray.attribution import excitation_backprop as ebp  # noqa: E402
from torchray.attribution.deconvnet import deconvnet  # noqa: E402
from torchray.attribution.grad_cam import grad_cam  # noqa: E402
from torchray.attribution.gradient import gradient  # noqa: E402
from torchray.attribution.guided_backprop import guided_backprop  # noqa: E402
from torchray.attribution.linear_approx import linear_approx  # noqa: E402

FUNCTIONS = {
    "GradientMap": gradient,
    "DeconvolutionMap": deconvnet,
    "GuidedBackpropMap": guided_backprop,
    "GradCAMMap": grad_cam,
    "LinearApproximation": linear_approx,
    "ExcitationBackprop": ebp.excitation_backprop,
    "ContrastiveExcitationBackprop": ebp.contrastive_excitation_backprop,
}


class Net(nn.Module):
    """The network of tests/test_maps.py, its layers named as values are there."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 3, padding=1)
        self.c2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.n2 = nn.BatchNorm2d(6)
        self.s2 = ebp.EltwiseSum()
        self.p2 = nn.AvgPool2d(2)
        self.c3 = nn.Conv2d(6, 8, 3)
        self.y = nn.Linear(8, 5)
        self.r1, self.r2, self.r3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.p1, self.m = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        p1 = self.p1(self.r1(self.c1(x)))
        r2 = self.r2(self.s2(self.n2(self.c2(p1)), p1))
        r3 = self.r3(self.c3(self.p2(r2)))
        return self.y(self.m(r3).flatten(1))


def main() -> None:
    net = Net().eval()
    state = {
        "c1.weight": "K1", "c1.bias": "b1", "c2.weight": "K2", "n2.weight": "gain",
        "n2.bias": "shift", "n2.running_mean": "mean", "n2.running_var": "variance",
        "c3.weight": "K3", "c3.bias": "b3", "y.weight": "F", "y.bias": "bf",
    }  # fmt: skip
    loaded = {k: torch.from_numpy(WEIGHTS[v]) for k, v in state.items()}
    net.load_state_dict(loaded, strict=False)
    found = {}
    for method, layers, options in CALLS:
        x = torch.from_numpy(IMAGES).requires_grad_()
        map_ = FUNCTIONS[method](net, x, TARGETS, **layers, **options)
        found[name_of(method, layers, options)] = map_.detach().numpy()
    found["y"] = net(torch.from_numpy(IMAGES)).detach().numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
