"""The noise tunnel against closed forms of the noise that it draws, and what it refuses."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import onnxplain as ox
from onnxplain.cli import main
from onnxplain.errors import InputError, TargetError
from onnxplain.methods import chosen, noise
from onnxplain.methods.noise import Moments, in_blocks, stream
from tests.helpers import BUNDLED, HEAD, model
from tests.test_methods import PRODUCT, SQUARE, TOKENS, W, X

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def square() -> ox.Model:
    """y = (x * x) w: the gradient is 2 x w."""
    return model(SQUARE, {"w": W})


@pytest.fixture(scope="module")
def product() -> ox.Model:
    """y = sum(a * b) + 3 sum(a)."""
    return model(PRODUCT)


def draws(seed: int, count: int, stdev: float, like: np.ndarray = X) -> np.ndarray:
    """The noise of the samples for a single input, [count, 1, ...]."""
    random = stream(seed)
    rows = [random(s).standard_normal(like.shape[1:], like.dtype) for s in range(count)]
    return np.stack(rows)[:, None] * like.dtype.type(stdev)


def test_moments_of_the_samples(square: ox.Model) -> None:
    tunnel = ox.NoiseTunnel(ox.Saliency(square))
    options: dict[str, Any] = {"stdevs": 0.3, "nt_samples": 7, "seed": 5, "target": 1}
    each = 2 * (X + draws(5, 7, 0.3)) * W[:, 1]
    for nt_type, want in (
        ("smoothgrad", each.mean(0)),
        ("smoothgrad_sq", (each**2).mean(0)),
        ("vargrad", (each**2).mean(0) - each.mean(0) ** 2),
    ):
        got = tunnel.attribute(X, nt_type, abs=False, **options)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [None, 1, 2, 3, 100])
def test_same_alone_in_a_batch_and_in_any_chunk(square: ox.Model, size: int | None) -> None:
    tunnel = ox.NoiseTunnel(ox.IntegratedGradients(square))
    options: dict[str, Any] = {"nt_samples": 6, "seed": 2, "target": 0, "n_steps": 5}
    whole = tunnel.attribute(X, "vargrad", **options)
    chunked = tunnel.attribute(X, "vargrad", nt_samples_batch_size=size, **options)
    alone = tunnel.attribute(X[3:4], "vargrad", nt_samples_batch_size=size, **options)
    np.testing.assert_allclose(chunked, whole, rtol=1e-4)
    np.testing.assert_allclose(alone, whole[3:4], rtol=1e-4)


def test_seeds(square: ox.Model) -> None:
    def mean(seed: int | None) -> np.ndarray:
        return ox.NoiseTunnel(ox.Saliency(square)).attribute(X, seed=seed, target=0)

    np.testing.assert_array_equal(mean(1), mean(1))
    assert not np.allclose(mean(1), mean(2))
    assert not np.allclose(mean(None), mean(None))
    # Two calls of the same seed and other numbers of samples share the first ones.
    tunnel = ox.NoiseTunnel(ox.Saliency(square))
    one = tunnel.attribute(X, nt_samples=1, seed=3, target=0, abs=False)
    np.testing.assert_allclose(one, 2 * (X + draws(3, 1, 1.0)[0]) * W[:, 0], rtol=1e-5)


def test_deltas_of_an_example_are_next_to_each_other(square: ox.Model) -> None:
    ig = ox.IntegratedGradients(square)
    options: dict[str, Any] = {"target": [0, 1, 2, 0, 1], "n_steps": 3, "method": "riemann_left"}
    got, deltas = ox.NoiseTunnel(ig).attribute(
        X, nt_samples=4, stdevs=0.2, seed=8, return_convergence_delta=True, **options
    )
    parts = [
        ig.attribute(X + noise, return_convergence_delta=True, **options)
        for noise in draws(8, 4, 0.2)
    ]
    np.testing.assert_allclose(got, np.mean([a for a, _ in parts], 0), rtol=1e-5, atol=1e-6)
    assert deltas.shape == (5 * 4,)
    want = np.stack([d for _, d in parts], axis=1).ravel()
    np.testing.assert_allclose(deltas, want, atol=1e-5)
    assert ox.NoiseTunnel(ig).has_convergence_delta()
    assert not ox.NoiseTunnel(ox.Saliency(square)).has_convergence_delta()


def test_what_has_rows_is_repeated(square: ox.Model, product: ox.Model) -> None:
    """Targets, baselines and additional arguments stay with their examples."""
    ig = ox.NoiseTunnel(ox.IntegratedGradients(square))
    options: dict[str, Any] = {"nt_samples": 3, "seed": 1, "stdevs": 0.5, "n_steps": 20}
    starts, targets = rng.standard_normal(X.shape).astype(np.float32), [0, 1, 2, 1, 0]
    ends = X + draws(1, 3, 0.5)
    want = ((ends**2 - starts**2) * W[:, targets].T).mean(0)
    for target in (
        targets,
        np.array(targets),
        [(t,) for t in targets],
        tuple((t,) for t in targets),
    ):
        got = ig.attribute(X, target=target, baselines=starts, **options)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # First dimension 1, and no examples axis at all.
    for baseline in (starts[:1], starts[0]):
        got = ig.attribute(X, target=0, baselines=baseline, **options)
        want = ((ends**2 - starts[0] ** 2) * W[:, 0]).mean(0)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    other = rng.standard_normal(X.shape).astype(np.float32)
    saliency = ox.NoiseTunnel(ox.Saliency(product))
    for given in (other, {"b": other}, (other,)):
        got = saliency.attribute(X, additional_forward_args=given, abs=False, seed=0)
        np.testing.assert_allclose(got, other + 3, rtol=1e-6)  # b gets no noise


def test_square_batches_are_not_mistaken(square: ox.Model) -> None:
    """As many examples as features: a baseline without examples axis is not rows."""
    x, start = X[:4], np.arange(4, dtype=np.float32)
    got = ox.NoiseTunnel(ox.IntegratedGradients(square)).attribute(
        x, baselines=start, target=0, nt_samples=2, stdevs=0.1, seed=0
    )
    want = (((x + draws(0, 2, 0.1)) ** 2 - start**2) * W[:, 0]).mean(0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, None])
def test_baselines_drawn_from_a_distribution(square: ox.Model, size: int | None) -> None:
    pool, random = rng.standard_normal((7, 4)).astype(np.float32), stream(4)
    starts = np.stack([pool[random(s).integers(7)] for s in range(5)])[:, None]
    got = ox.NoiseTunnel(ox.IntegratedGradients(square)).attribute(
        X,
        nt_samples=5,
        nt_samples_batch_size=size,
        stdevs=0.0,
        draw_baseline_from_distrib=True,
        baselines=pool,
        target=0,
        seed=4,
    )
    want = ((X**2 - starts**2) * W[:, 0]).mean(0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_results_have_the_methods_form(square: ox.Model, product: ox.Model) -> None:
    calm: dict[str, Any] = {"nt_samples": 2, "stdevs": 0.0}
    a, b = X, X[::-1].copy()
    for inputs in ((a, b), {"a": a, "b": b}, {"b": b}):
        saliency = ox.Saliency(product)
        fed = {"additional_forward_args": a} if len(inputs) == 1 else {}
        want = saliency.attribute(inputs, abs=False, **fed)
        got = ox.NoiseTunnel(saliency).attribute(inputs, abs=False, **calm, **fed)
        assert type(got) is type(want)
        keys = list(want) if isinstance(want, dict) else range(2)
        for key in keys:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-6)
    layers = ox.LayerGradientXActivation(square, ["h", "y"])
    want = layers.attribute(X, target=1)
    got = ox.NoiseTunnel(layers).attribute(X, target=1, **calm)
    assert isinstance(got, list)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    neuron = ox.NeuronGradient(square, "h")
    got = ox.NoiseTunnel(neuron).attribute(X, neuron_selector=2, **calm)
    np.testing.assert_allclose(got, neuron.attribute(X, 2), rtol=1e-6)
    got = ox.NoiseTunnel(ox.LayerActivation(square, "h")).attribute(X, **calm)
    np.testing.assert_allclose(got, X * X, rtol=1e-6)
    assert ox.NoiseTunnel(layers).wrt == ("h", "y")
    assert ox.NoiseTunnel(neuron).of == "h"


def test_standard_deviations_by_input(product: ox.Model) -> None:
    """The gradient by a is b + 3 and by b is a: each shows the noise of the other."""
    tunnel = ox.NoiseTunnel(ox.Saliency(product))
    options: dict[str, Any] = {"nt_type": "vargrad", "nt_samples": 400, "abs": False, "seed": 0}
    by_a, by_b = tunnel.attribute((X, X), stdevs=(0.5, 0.0), **options)
    np.testing.assert_allclose(by_a, 0, atol=1e-9)
    np.testing.assert_allclose(by_b, 0.25, rtol=0.3)
    got = tunnel.attribute({"a": X, "b": X}, stdevs={"b": 2.0, "a": 0}, **options)
    np.testing.assert_allclose(got["b"], 0, atol=1e-9)
    np.testing.assert_allclose(got["a"], 4, rtol=0.3)


def test_a_method_that_draws_gets_a_seed_for_each_copy(square: ox.Model) -> None:
    inner = ox.GradientShap(square)
    options: dict[str, Any] = {"baselines": X[:3], "n_samples": 4, "target": 0}
    seeds = [int(stream(6)(s).integers(1 << 62)) for s in range(3)]
    want = np.mean([inner.attribute(X, seed=seed, **options) for seed in seeds], axis=0)
    for size in (None, 2):
        got = ox.NoiseTunnel(inner).attribute(
            X, nt_samples=3, nt_samples_batch_size=size, stdevs=0.0, seed=6, **options
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    _, deltas = ox.NoiseTunnel(inner).attribute(
        X, nt_samples=3, stdevs=0.1, return_convergence_delta=True, **options
    )
    assert deltas.shape == (5 * 3 * 4,)


def test_one_number_for_the_whole_batch() -> None:
    """Copies of a batch are batches of their own."""
    whole = model(
        HEAD + "mean (float[N,4] x) => (float y) { h = Mul(x, x)  y = ReduceMean<keepdims=0>(h) }"
    )
    got, deltas = ox.NoiseTunnel(ox.IntegratedGradients(whole)).attribute(
        X, nt_samples=3, stdevs=0.5, seed=0, return_convergence_delta=True
    )
    want = (X + draws(0, 3, 0.5)) ** 2 / 20
    np.testing.assert_allclose(got, want.mean(0), rtol=1e-4, atol=1e-6)
    assert deltas.shape == (3,)


def test_examples_elsewhere_than_first() -> None:
    turned = model(
        HEAD
        + "t (float[4,N] x) => (float[N,3] y) { r = Transpose(x) h = Mul(r, r) y = MatMul(h, w) }",
        {"w": W},
        examples_axis=1,
    )
    straight = model(SQUARE, {"w": W})
    options: dict[str, Any] = {"target": [0, 1, 2, 0, 1], "seed": 3, "baselines": 0.5}
    want = ox.NoiseTunnel(ox.IntegratedGradients(straight)).attribute(X, **options)
    got = ox.NoiseTunnel(ox.IntegratedGradients(turned)).attribute(X.T.copy(), **options)
    np.testing.assert_allclose(got, want.T, rtol=1e-4, atol=1e-5)


def test_half_precision() -> None:
    half = model(SQUARE.replace("float[", "float16["), {"w": W.astype(np.float16)})
    got = ox.NoiseTunnel(ox.Saliency(half)).attribute(
        X.astype(np.float16), target=0, stdevs=0.1, seed=0, abs=False
    )
    assert got.dtype == np.float32
    want = 2 * (X + draws(0, 5, 0.1)) * W[:, 0]
    np.testing.assert_allclose(got, want.mean(0), rtol=2e-2, atol=2e-2)


def test_blocks_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch, square: ox.Model) -> None:
    """However many samples: the first block of one shows what a sample takes."""
    monkeypatch.setattr(noise, "_BLOCK_BYTES", 1000)
    sizes = []

    def run(block: range) -> list[np.ndarray]:
        sizes.append(len(block))
        return [np.repeat(np.arange(block.start, block.stop), 10).astype(np.float64)]

    found = [arrays[0] for arrays in in_blocks(57, None, 20, run, square)]
    assert sizes == [1, *[10] * 5, 6]  # 20 bytes fed and 80 of results
    np.testing.assert_array_equal(np.stack(found), np.arange(57)[:, None].repeat(10, 1))
    sizes.clear()
    assert len(list(in_blocks(9, 4, 20, run, square))) == 9
    assert sizes == [1, 4, 4]


def test_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_BLOCK_BYTES", 1 << 20)
    sums = model(
        HEAD
        + """sums (float[N,20000] x) => (float[N] y) {
        one = Constant<value_ints=[1]>()
        h = Mul(x, x)
        y = ReduceSum<keepdims=0>(h, one)
    }"""
    )
    x = rng.standard_normal((2, 20000)).astype(np.float32)
    tunnel, shap = ox.NoiseTunnel(ox.Saliency(sums)), ox.GradientShap(sums)

    def peak(samples: int) -> int:
        tracemalloc.start()
        tunnel.attribute(x, nt_samples=samples, seed=0)
        shap.attribute(x, x[::-1], n_samples=samples, stdevs=0.1, seed=0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(20)
    assert peak(400) < 1.2 * few < 400 * x.nbytes / 2


def test_moments_are_stable() -> None:
    """A large mean, where the difference of mean squares has no digit left."""
    values = 1e9 + rng.standard_normal((1000, 3))
    moments = Moments()
    for value in values:
        moments.add(value)
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-6)
    error = values.std(0, ddof=1) / np.sqrt(1000)
    np.testing.assert_allclose(moments.standard_error, error, rtol=1e-6)


def test_explain(square: ox.Model) -> None:
    options: dict[str, Any] = {"stdevs": 0.4, "nt_samples": 50, "abs": False}
    got = ox.explain(
        square, X, "noise-tunnel", target=1, seed=3, attribution_method="saliency", **options
    )
    tunnel = ox.NoiseTunnel(ox.Saliency(square))
    want = tunnel.attribute(X, target=1, seed=3, **options)
    np.testing.assert_array_equal(got.attributions, want)
    each = 2 * (X + draws(3, 50, 0.4)) * W[:, 1]
    error = (each.std(0, ddof=1) / np.sqrt(50)).sum(1) / np.abs(each.mean(0)).sum(1)
    np.testing.assert_allclose(got.checks["standard_error"], error, rtol=1e-3)
    assert got.options["attribution_method"] == "saliency"
    assert not ox.explain(square, X, "noise-tunnel", nt_type="vargrad", seed=0).checks
    # The method inside is asked as ever: baselines, layers, neurons, its own options.
    got = ox.explain(
        square,
        X,
        "noise-tunnel",
        target=1,
        layer="h",
        baselines=0.5,
        seed=1,
        attribution_method="layer-integrated-gradients",
        n_steps=7,
        multiply_by_inputs=False,
    )
    np.testing.assert_allclose(got.attributions, np.tile(W[:, 1], (5, 1)), rtol=1e-5)
    got = ox.explain(
        square, X, "noise-tunnel", layer="h", neuron=2, attribution_method="neuron-gradient", seed=0
    )
    assert got.attributions.shape == X.shape
    info = chosen("noise-tunnel", {"attribution_method": "integrated-gradients"})
    assert info.takes_baselines
    assert {"n_steps", "nt_type", "attribution_method"} <= set(info.options)
    assert set(info.options) == set(info.annotations)


def test_command_line() -> None:
    """`--option` takes the options of the method inside, with their types."""
    folder = BUNDLED / "breast_cancer"
    call = [
        *("explain", f"{folder / 'breast_cancer.onnx'}", f"{folder / 'samples' / 'patients.csv'}"),
        *("--method", "noise-tunnel", "--seed", "1", "--json", "--baseline", "0"),
        *("--option", "attribution_method=integrated-gradients", "--option", "n_steps=10"),
        *("--option", "nt_samples=3", "--option", "stdevs=1"),
    ]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.output
    options = json.loads(result.stdout)["options"]
    assert options["attribution_method"] == "integrated-gradients"
    assert (options["n_steps"], options["nt_samples"], options["stdevs"]) == (10, 3, 1.0)
    result = CliRunner().invoke(main, [*call, "--option", "abs=true"])
    assert result.exit_code == 2
    assert "no option 'abs'" in result.output


def test_the_layer_that_the_method_inside_chose_is_on_record() -> None:
    text = f"""{HEAD} net (float[N, 3, 6, 6] x) => (float[N, 2] y) {{
        c = Conv(x, k) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, w) }}"""
    kernel, w = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3, 3, 3), (4, 2)))
    made, x = model(text, {"k": kernel, "w": w}), np.ones((2, 3, 6, 6), np.float32)
    for inside in ("grad-cam", "grad-cam-map"):
        options = {"attribution_method": inside, "nt_samples": 2, "seed": 0, "stdevs": 0.1}
        got = ox.explain(made, x, "noise-tunnel", **options)
        assert got.layer == ox.explain(made, x, inside).layer == "r"
        assert list(got.arrays) == list(ox.explain(made, x, inside).arrays) == ["x"]
    assert ox.NoiseTunnel(ox.Saliency(made)).layer is None
    assert ox.explain(made, x, "noise-tunnel", nt_samples=1, stdevs=0.1, seed=0).layer is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"nt_type": "mean"}, "smoothgrad, smoothgrad_sq, vargrad.*'mean'"),
        ({"nt_samples": 0}, "nt_samples must be an integer of at least 1, not 0"),
        ({"nt_samples": 2.5}, "nt_samples"),
        ({"nt_samples_batch_size": 0}, "nt_samples_batch_size"),
        ({"stdevs": -1.0}, "stdevs must be numbers of at least 0"),
        ({"stdevs": "much"}, "stdevs"),
        ({"stdevs": (0.1, 0.2)}, "stdevs: 2"),
        ({"stdevs": {"z": 1.0}}, "no input 'z'"),
        ({"stdevs": {}}, "none was given for input 'x'"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"n_steps": 5}, "'saliency' has no argument 'n_steps'.*target"),
        ({"return_convergence_delta": True}, "no argument 'return_convergence_delta'"),
        ({"draw_baseline_from_distrib": True}, "no baselines"),
    ],
)
def test_refused_options(square: ox.Model, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        ox.NoiseTunnel(ox.Saliency(square)).attribute(X, **{"target": 0, **options})


def test_refused_questions(square: ox.Model) -> None:
    with pytest.raises(InputError, match="root of the sum of squares"):
        ox.NoiseTunnel(ox.NoiseTunnel(ox.Saliency(square)))
    with pytest.raises(InputError, match=r"ox.Saliency\(model\), not Model"):
        ox.NoiseTunnel(square)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs the argument 'neuron_selector'"):
        ox.NoiseTunnel(ox.NeuronGradient(square, "h")).attribute(X)
    with pytest.raises(TargetError, match="2 targets were given for 5 examples"):
        ox.NoiseTunnel(ox.Saliency(square)).attribute(X, target=[0, 1])
    with pytest.raises(InputError, match="there is no method 'lime-tree'"):
        ox.explain(square, X, "noise-tunnel", attribution_method="lime-tree")
    with pytest.raises(InputError, match="can't go around itself"):
        ox.explain(square, X, "noise-tunnel", attribution_method="noise-tunnel")
    table = rng.standard_normal((9, 4)).astype(np.float32)
    tokens = model(TOKENS, {"table": table, "w": W})
    by_layer = ox.NoiseTunnel(ox.LayerIntegratedGradients(tokens, "e"))
    ids = np.array([[1, 2, 3]])
    with pytest.raises(InputError, match="'ids' holds int64 values, which take no noise"):
        by_layer.attribute(ids, target=0)
    got = by_layer.attribute(ids, target=0, stdevs=0.0)
    assert got.shape == (1, 3, 4)
