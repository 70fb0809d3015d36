"""Train a convolutional net on scikit-learn's 8x8 digits: digits.onnx and digits_dynamo.onnx.

Input ``image`` float32 [N, 1, 8, 8] with values 0..16, output ``logits`` [N, 10]. The two files
hold the same weights, written by PyTorch's TorchScript-based and by its dynamo-based exporter.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.common import accuracy, export, fit, seed_everything  # noqa: E402


def block(inputs: int, channels: int) -> nn.Sequential:
    """Conv, BatchNorm, ReLU, MaxPool: [N, inputs, H, W] -> [N, channels, H/2, W/2]."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
        )
    )


def shift(x: Tensor) -> Tensor:
    """Move each image [N, 1, 8, 8] by -1, 0 or 1 pixel down and right, filling with zeros."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    rows, columns = (torch.randint(3, (len(x), 1)) + torch.arange(8) for _ in range(2))
    n = torch.arange(len(x))[:, None, None]
    return padded[n, 0, rows[:, :, None], columns[:, None, :]][:, None]


def save_samples(x: np.ndarray, y: np.ndarray, folder: Path) -> None:
    """Write the first held-out image of each class as 8x8 grayscale PNG, and a 3 also enlarged."""
    folder.mkdir(exist_ok=True)
    for digit in range(10):
        pixels = np.round(x[y == digit][0, 0] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels)
        image.save(folder / f"digit_{digit}.png")
        if digit == 3:
            image.resize((256, 256), Image.Resampling.NEAREST).save(folder / "digit_3_large.png")


def main() -> None:
    seed_everything(0)
    data = load_digits()
    images = data.images[:, None].astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        images, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    net = nn.Sequential(
        OrderedDict(
            block1=block(1, 16),
            block2=block(16, 32),
            flatten=nn.Flatten(),
            head=nn.Linear(32 * 2 * 2, 10),
        )
    )
    fit(net, torch.from_numpy(x), torch.from_numpy(y), epochs=60, lr=1e-2, augment=shift)
    held_out = torch.from_numpy(x_test)
    score = accuracy(net, held_out, torch.from_numpy(y_test))
    print(f"digits: accuracy {score:.4f} on {len(y_test)} held-out images")
    for name, dynamo in (("digits.onnx", False), ("digits_dynamo.onnx", True)):
        export(net, held_out[:5], HERE / name, input_name="image", dynamic={0: "N"}, dynamo=dynamo)
    save_samples(x_test, y_test, HERE / "samples")


if __name__ == "__main__":
    main()
