"""Rewrites that make the way back cheaper change no number."""

from __future__ import annotations

import numpy as np

import onnxplain as ox
from tests.helpers import HEAD, model

NET = (
    HEAD
    + """net (float[N,2,6,6] x) => (float[N,2,3,3] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, k)
    r = Relu(c)
    p = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(r)
    y = Mul(p, p)
}"""
)
rng = np.random.default_rng(0)
K = rng.standard_normal((2, 2, 3, 3)).astype(np.float32)


def test_a_relu_sinks_behind_its_max_pool() -> None:
    m = model(NET, {"k": K})
    x = rng.standard_normal((3, 2, 6, 6)).astype(np.float32)
    x[0] = 0  # ties everywhere
    saliency = ox.Saliency(m)
    got = saliency.attribute(x, target=(1, 1, 1), abs=False)
    (program,) = m._programs.values()
    order = [n.op_type for n in program.model.graph]
    assert order.index("MaxPool") < order.index("Relu")
    # Naming the Relu keeps it where it is, and the chain rule through it gives the same.
    kept = ox.differentiate(m, of="y", wrt=["x", "r"])
    seed = np.zeros((3, 2, 3, 3), np.float32)
    seed[:, 1, 1, 1] = 1
    found = kept({"x": x, "cotangent": seed})
    np.testing.assert_allclose(got, found["x.grad"], rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(got[1:]) > 0


def test_an_addressed_or_shared_relu_stays() -> None:
    m = model(NET, {"k": K})
    x = rng.standard_normal((2, 2, 6, 6)).astype(np.float32)
    got = ox.LayerGradientXActivation(m, "r").attribute(x, target=(0, 0, 0))
    assert (ox.LayerActivation(m, "r").attribute(x) >= 0).all()
    assert got.shape == (2, 2, 6, 6)
    # Every gradient through the pooling lands on one maximum of its window.
    assert np.count_nonzero(got.reshape(2, -1), axis=1).max() <= 1
