"""Recurrent layers, written out step by step, against PyTorch's autograd and Captum."""

from __future__ import annotations

import functools
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.both import Both, same

KINDS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Sequence(nn.Module):
    """Two recurrent layers and a head on the last step: [N, 7, 5] -> [N, 4]."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = KINDS[kind](5, 6, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(2)  # gates that are neither open nor shut

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))


@functools.cache
def both(kind: str, bidirectional: bool, nonlinearity: str = "tanh") -> Both:
    options = {"nonlinearity": nonlinearity} if kind == "rnn" else {}
    return Both(Sequence(kind, bidirectional=bidirectional, **options), (X,))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("kind", "nonlinearity"), [("lstm", "tanh"), ("gru", "tanh"), ("rnn", "tanh"), ("rnn", "relu")]
)
def test_gradients(kind: str, nonlinearity: str, bidirectional: bool) -> None:
    pair = both(kind, bidirectional, nonlinearity)
    assert {n.op_type for n in pair.model.graph.graph} & {"LSTM", "GRU", "RNN"}
    x = X.clone().requires_grad_()
    pair.net(x)[torch.arange(3), torch.tensor([0, 3, 1])].sum().backward()
    got = pair.ours("Saliency", inputs=X, target=[0, 3, 1], abs=False)
    same(got, x.grad.numpy(), 1e-4)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_integrated_gradients(kind: str) -> None:
    pair = both(kind, False)
    options: dict[str, Any] = {"inputs": X, "baselines": 0.3 * X.flip(0), "target": 2, "n_steps": 9}
    want = ca.IntegratedGradients(pair.net).attribute(**options).detach().numpy()
    same(pair.ours("IntegratedGradients", **options), want, 1e-4)
    # By the layer's values, too: all steps of the first layer's output.
    name = next(v.name for v in pair.model.layers() if v.operator in ("LSTM", "GRU", "RNN"))
    got = ox.LayerGradientXActivation(pair.model, name).attribute(X.numpy(), target=2)
    assert np.isfinite(got).all() and got.any()
