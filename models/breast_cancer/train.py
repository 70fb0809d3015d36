"""Train a small dense net on scikit-learn's breast cancer data: breast_cancer.onnx.

Input ``features`` float32 [N, 30] in the data's own units (the graph standardizes them), output
``logits`` [N, 2] for malignant and benign.
"""

from __future__ import annotations

import csv
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.common import accuracy, export, fit, seed_everything  # noqa: E402


class Standardize(nn.Module):
    """(x - mean) / std with the training rows' statistics: [N, F] -> [N, F]."""

    mean: Tensor
    std: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def save_table(path: Path, names: list[str], rows: np.ndarray) -> None:
    """Write ``rows`` [N, F] as CSV under a header of feature names."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([[f"{value:.6g}" for value in row] for row in rows])


def main() -> None:
    seed_everything(0)
    data = load_breast_cancer()
    x, x_test, y, y_test = train_test_split(
        data.data.astype(np.float32), data.target, test_size=0.25, stratify=data.target,
        random_state=0,
    )  # fmt: skip
    train, held_out = torch.from_numpy(x), torch.from_numpy(x_test)
    net = nn.Sequential(
        OrderedDict(
            standardize=Standardize(train),
            hidden1=nn.Linear(30, 32), relu1=nn.ReLU(), dropout=nn.Dropout(0.3),
            hidden2=nn.Linear(32, 16), relu2=nn.ReLU(),
            head=nn.Linear(16, 2),
        )
    )  # fmt: skip
    # Chosen by cross-validation on the training rows. Smoothed labels keep the logits moderate,
    # so that probabilities still tell rows apart.
    fit(
        net, train, torch.from_numpy(y),
        epochs=40, lr=1e-2, batch=32, weight_decay=1.0, label_smoothing=0.05,
    )  # fmt: skip
    score = accuracy(net, held_out, torch.from_numpy(y_test))
    print(f"breast cancer: accuracy {score:.4f} on {len(y_test)} held-out rows")
    export(net, held_out[:5], HERE / "breast_cancer.onnx", input_name="features", dynamic={0: "N"})
    names = [str(name) for name in data.feature_names]
    three_each = np.concatenate([x_test[y_test == label][:3] for label in (0, 1)])
    save_table(HERE / "samples" / "patients.csv", names, three_each)
    save_table(HERE / "samples" / "training_mean.csv", names, x.mean(0, keepdims=True))


if __name__ == "__main__":
    main()
