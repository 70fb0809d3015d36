"""Sessions, chunks and memory."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import onnxplain as ox
from onnxplain.run import memory, program, session
from tests.helpers import BUNDLED, HEAD, model, proto

rng = np.random.default_rng(0)
W = rng.standard_normal((4, 3)).astype(np.float32)
NET = HEAD + "net (float[N,4] x) => (float[N,3] y) { h = Mul(x, x)  y = MatMul(h, w) }"
X = rng.standard_normal((50, 4)).astype(np.float32)


def test_chunks_follow_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of this net holds about 100 bytes at once; the results don't know of chunks."""
    whole = ox.IntegratedGradients(model(NET, {"w": W})).attribute(X, target=1)
    seen: list[int] = []
    run = session.Session.__call__

    def spy(self: session.Session, feeds: dict, *rest: object, **options: object) -> dict:
        seen.append(len(feeds["x"]) * len(feeds.get("positions", [0])))
        return run(self, feeds, *rest, **options)

    monkeypatch.setattr(session.Session, "__call__", spy)
    monkeypatch.setattr(memory, "budget", lambda limit: 2000)
    m = model(NET, {"w": W})
    np.testing.assert_allclose(ox.IntegratedGradients(m).attribute(X, target=1), whole, rtol=1e-4)
    assert 1 <= max(seen) <= 30
    seen.clear()
    np.testing.assert_allclose(m(X)["y"], (X * X) @ W, rtol=1e-4, atol=1e-5)
    assert len(seen) > 1


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = session.Session.__call__

    def tight(self: session.Session, feeds: dict, *rest: object, **options: object) -> dict:
        sizes.append(len(feeds["x"]))
        if len(feeds["x"]) > 8:
            raise ox.OutOfMemoryError("pretended")
        return run(self, feeds, *rest, **options)

    monkeypatch.setattr(session.Session, "__call__", tight)
    got = model(NET, {"w": W})(X)["y"]
    np.testing.assert_allclose(got, (X * X) @ W, rtol=1e-4, atol=1e-5)
    assert sizes[:4] == [50, 25, 12, 6]
    monkeypatch.setattr(
        session.Session,
        "__call__",
        lambda *a, **k: (_ for _ in ()).throw(ox.OutOfMemoryError("no")),
    )
    with pytest.raises(ox.OutOfMemoryError, match="one example"):
        model(NET, {"w": W})(X)


def test_a_limit_that_can_not_hold_is_said(caplog: pytest.LogCaptureFixture) -> None:
    m = model(NET, {"w": W}, memory_limit=1)
    np.testing.assert_allclose(m(X)["y"], (X * X) @ W, rtol=1e-4, atol=1e-5)
    assert "beyond the limit" in caplog.text


def test_live_bytes_of_a_chain() -> None:
    """A chain holds two values at a time: 2 x 4 floats a row, and nothing for the weights."""
    chain = model(
        HEAD
        + """c (float[N,4] x) => (float[N,4] y) {
        a = Exp(x)
        b = Sin(a)
        y = Cos(b)
    }"""
    )
    assert memory.live_bytes(chain.graph, {"x": (1, 4)}) == 2 * 4 * 4
    assert memory.live_bytes(chain.graph, {"x": (100, 4)}) == 100 * 2 * 4 * 4


def test_live_bytes_of_unknown_shapes() -> None:
    """A value of unknown shape counts as the largest that its node reads, not as a weight."""
    chain = model(
        HEAD
        + """c (float[N,4] x, int64[2] s) => (float[a,b] y) {
        big = MatMul(x, w)
        small = ReduceSum<keepdims=1>(big, one)
        a = Reshape(small, s)
        b = Exp(a)
        y = Sin(b)
    }""",
        {"w": np.ones((4, 100), np.float32), "one": np.asarray([1])},
        examples_axis={"s": None},
    )
    # At most: x, s and big; small, a, b and y are one float a row each.
    assert memory.live_bytes(chain.graph, {"x": (10, 4), "s": (2,)}) == 10 * 104 * 4 + 16


def test_flags_and_integers_stand_for_each_other() -> None:
    masked = model(
        HEAD
        + """c (float[N,4] x, bool[N,4] on, int64[N,4] k) => (float[N,4] y) {
        a = Cast<to=1>(on)
        b = Cast<to=1>(k)
        c = Mul(a, b)
        y = Mul(x, c)
    }"""
    )
    x, on = np.ones((2, 4), np.float32), np.tile([1, 0], (2, 2))
    np.testing.assert_array_equal(masked((x, on, on.astype(bool)))["y"], on)
    with pytest.raises(ox.InputError, match="'on': some values do not fit"):
        masked((x, 2 * on, on))
    method = ox.LayerIntegratedGradients(masked, "a")
    assert method.attribute((x, on.astype(bool), on), target=0).shape == (2, 4)


def test_a_model_that_takes_only_its_own_batch() -> None:
    """Rows are run in groups of the fixed size; the last group is filled up and cut off."""
    mixed = HEAD + "mixed (float[2,4] x) => (float[2,4] y) { z = MatMul(m, x)  y = Mul(z, z) }"
    m = model(mixed, {"m": np.array([[1, 2], [3, 4]], np.float32)})
    assert m.fixed_batch == 2
    got = m(X[:4])["y"]
    M = np.array([[1, 2], [3, 4]], np.float32)
    want = np.concatenate([(M @ X[0:2]) ** 2, (M @ X[2:4]) ** 2])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_user_session_options_are_used_and_left_alone() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    m = model(NET, {"w": W}, session_options=options)
    np.testing.assert_allclose(m(X)["y"], (X * X) @ W, rtol=1e-4, atol=1e-5)
    ox.Saliency(m).attribute(X, target=0)
    assert options.get_session_config_entry("session.disable_prepacking") == "1"


def test_providers() -> None:
    m = model(NET, {"w": W}, providers=["cpu"])
    m(X)
    assert m.forward(["y"]).session.providers == ["CPUExecutionProvider"]
    with pytest.raises(ox.InputError, match="not available"):
        model(NET, {"w": W}, providers=["warp"])(X)
    with pytest.raises(ox.InputError, match="empty"):
        model(NET, {"w": W}, providers=[])(X)


def test_models_are_not_changed() -> None:
    original = proto(NET, w=W)
    before = original.SerializeToString()
    m = ox.Model(original)
    ox.IntegratedGradients(m).attribute(X, target=0)
    assert original.SerializeToString() == before


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    session.runtime.cache_clear()
    try:
        with pytest.raises(ox.RuntimeMissingError, match=r"onnxplain\[cpu\]"):
            model(NET, {"w": W})(X)
    finally:
        monkeypatch.undo()
        session.runtime.cache_clear()


def test_many_rows_stay_under_the_limit() -> None:
    """10,000 digits in a fresh process: its peak stays under 512 MB."""
    script = f"""
import numpy as np, onnxplain as ox
model = ox.Model({str(BUNDLED / "digits" / "digits.onnx")!r}, memory_limit=512 * 10**6)
x = np.random.default_rng(0).random((10_000, 1, 8, 8), dtype=np.float32) * 16
ox.IntegratedGradients(model).attribute(x, target=3, n_steps=10)
ox.Saliency(model).attribute(x, target=3)
peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
print(int(peak.split()[1]) // 1000)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell a process's peak memory")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 512


def test_program_takes_functions_as_feeds() -> None:
    feed = lambda piece: X[piece]  # noqa: E731
    assert program.take(feed, slice(3, 5)).shape == (2, 4)


def test_binding_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a device, walked on the processor: shared feeds placed once, outputs bound."""
    want = ox.IntegratedGradients(model(NET, {"w": W})).attribute(X, 0.5, target=1)
    monkeypatch.setitem(session._DEVICES, "CPUExecutionProvider", "cpu")
    m = model(NET, {"w": W}, providers=["cpu"])
    placed: list[str] = []
    place = session.Session.place

    def spy(self: session.Session, feeds: dict) -> dict:
        placed.extend(feeds)
        return place(self, feeds)

    monkeypatch.setattr(session.Session, "place", spy)
    got = ox.IntegratedGradients(m).attribute(X, 0.5, target=1, internal_batch_size=100)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert placed.count("x.baseline") == 1
