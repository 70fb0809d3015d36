"""`ox.explain`: one call from an input to an explanation with its checks."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import onnxplain as ox
from tests.helpers import BUNDLED, HEAD, model
from tests.test_methods import TOKENS

rng = np.random.default_rng(0)
W = rng.standard_normal((4, 3)).astype(np.float32)
X = rng.standard_normal((5, 4)).astype(np.float32)
NET = HEAD + "net (float[N,4] x) => (float[N,3] y) { h = Mul(x, x)  y = MatMul(h, w) }"
MIXED = (
    HEAD
    + """mixed (int64[N,T] ids, float[N,4] x) => (float[N,3] y) {
    e = Gather(table, ids)
    axes = Constant<value_ints=[1]>()
    s = ReduceSum<keepdims=0>(e, axes)
    t = Mul(s, x)
    y = MatMul(t, w)
}"""
)


OF_IMAGES = [n for n, info in ox.methods().items() if "image" in info.needs] + ["layer-grad-cam"]


OF_OTHERS = ("lime-base", "lime-text")  # one example, texts


@pytest.fixture(scope="module")
def net() -> ox.Model:
    return model(NET, {"w": W})


@pytest.fixture(scope="module")
def digits() -> ox.Model:
    return ox.Model(BUNDLED / "digits/digits.onnx")


@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_method_for_images_explains(digits: ox.Model, tmp_path: Path, name: str) -> None:
    x = load_digits().images[[3, 40], None].astype(np.float32) / 16
    info = ox.methods()[name]
    layer = "block2.relu" if "layer" in info.needs else None
    neuron = 5 if "neuron" in info.needs else None
    explanation = ox.explain(digits, x, name, layer=layer, neuron=neuron)
    found = explanation.attributions
    assert found.shape[:2] == (2, 1)
    assert np.isfinite(found).all()
    assert (np.ptp(found.reshape(2, -1), axis=1) > 0).all()
    if "layer" not in info.needs and name.endswith("cam"):
        assert explanation.layer in [each.name for each in digits.layers()] + [None]
        assert found.shape == x.shape
    explanation.plot(tmp_path / "why.png")
    explanation.save(tmp_path / "why.npz")
    again = ox.load_explanation(tmp_path / "why.npz")
    np.testing.assert_array_equal(again.attributions, found)


@pytest.mark.parametrize("name", [n for n in OF_IMAGES if n != "layer-grad-cam"])
def test_methods_for_images_refuse_tables(net: ox.Model, name: str) -> None:
    info = ox.methods()[name]
    layer = "h" if "layer" in info.needs else None
    with pytest.raises(ox.InputError, match=r"spatial axes|no picture"):
        ox.explain(net, X, name, layer=layer, neuron=0 if "neuron" in info.needs else None)


@pytest.mark.parametrize("name", [n for n in ox.methods() if n not in {*OF_IMAGES, *OF_OTHERS}])
def test_every_method_explains(net: ox.Model, name: str) -> None:
    info = ox.methods()[name]
    layer = "h" if "layer" in info.needs else None
    neuron = 2 if "neuron" in info.needs else None
    needy = name.endswith("-shap") or name == "lime-tabular"  # of a distribution
    baselines = X[::-1] if needy else None
    options = {"sliding_window_shapes": (1,)} if info.required else {}
    explanation = ox.explain(
        net, X, name, layer=layer, neuron=neuron, baselines=baselines, method_options=options
    )
    assert explanation.attributions.shape == (5, 4)
    assert explanation.method == name
    assert info.summary
    np.testing.assert_allclose(explanation.prediction, (X * X) @ W, rtol=1e-4, atol=1e-5)
    if "convergence_delta" in info.check:
        delta = "relative_" * (name == "layer-conductance") + "convergence_delta"
        # Conductance multiplies slopes by differences between steps: exact for no finite number.
        assert np.abs(explanation.checks[delta]).max() < (0.01 if "relative" in delta else 1e-4)


def test_lime_base_explains_one_example(net: ox.Model) -> None:
    found = ox.explain(net, X[:1], "lime-base", n_samples=200, interpretable_model="linear", seed=0)
    worth = (X[:1] ** 2 * W[:, found.target[0]]).ravel()  # of the default's samples: 0 or x
    np.testing.assert_allclose(found.attributions[0], worth, rtol=1e-3, atol=1e-4)
    assert found.checks["fit"] > 0.999
    with pytest.raises(ox.InputError, match="one example at a time"):
        ox.explain(net, X, "lime-base")


def test_predicted_target_and_labels(net: ox.Model) -> None:
    labels = ["ant", "bee", "cat"]
    explanation = ox.explain(net, X, labels=labels)
    np.testing.assert_array_equal(explanation.target, ((X * X) @ W).argmax(axis=1))
    by_label = ox.explain(net, X, target="bee", labels=labels)
    np.testing.assert_array_equal(by_label.target, [1] * 5)
    with pytest.raises(ox.InputError, match="ant, bee, cat"):
        ox.explain(net, X, target="dog", labels=labels)


def test_a_layer_and_a_neuron(net: ox.Model) -> None:
    by_layer = ox.explain(net, X, layer="h", target=1)
    np.testing.assert_allclose(by_layer.attributions, X * X * W[:, 1], rtol=1e-3, atol=1e-5)
    assert list(by_layer.arrays) == ["h"]
    of_neuron = ox.explain(net, X, layer="h", neuron=2)
    np.testing.assert_allclose(of_neuron.attributions, X * X * np.eye(4)[2], rtol=1e-3, atol=1e-5)
    with pytest.raises(ox.InputError, match="layer too"):
        ox.explain(net, X, neuron=2)
    with pytest.raises(ox.InputError, match="needs a layer"):
        ox.explain(net, X, method="layer-activation")


def test_token_and_number_inputs_together() -> None:
    table = rng.standard_normal((7, 4)).astype(np.float32)
    m = model(MIXED, {"table": table, "w": W})
    ids = np.array([[1, 2, 3]] * 5)
    explanation = ox.explain(m, (ids, X), method="input-x-gradient", target=0)
    assert list(explanation.arrays) == ["ids", "x"]
    np.testing.assert_allclose(
        explanation.arrays["ids"],
        (table[ids] * (X * W[:, 0])[:, None]).sum(-1),
        rtol=1e-3,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        explanation.arrays["x"], X * table[ids].sum(1) * W[:, 0], rtol=1e-3, atol=1e-5
    )
    neuron = ox.explain(m, {"ids": ids, "x": X}, method="saliency", layer="t", neuron=1)
    assert set(neuron.attributions) == {"ids", "x"}


def test_bad_calls(net: ox.Model) -> None:
    with pytest.raises(ox.InputError, match="integrated-gradients"):
        ox.explain(net, X, method="integrated")
    with pytest.raises(ox.InputError, match="n_steps"):
        ox.explain(net, X, steps=3)
    with pytest.raises(ox.InputError, match="wrap it"):
        ox.explain("model.onnx", X)
    with pytest.raises(ox.InputError, match="no example"):
        ox.explain(net, X[:0])
    with pytest.raises(ox.InputError, match="no baseline"):
        ox.explain(net, X, method="saliency", baselines=0)


def test_poor_completeness_warns(net: ox.Model) -> None:
    with pytest.warns(UserWarning, match="n_steps"):
        explanation = ox.explain(net, X, method_options={"method": "riemann_left"}, n_steps=3)
    assert explanation.checks["relative_convergence_delta"].max() > 0.05


def test_warnings_name_the_examples() -> None:
    step = model(HEAD + "m (float[N,4] x) => (float[N,4] y) { s = Sqrt(x)  y = Mul(s, x) }", {})
    x = np.ones((3, 4), np.float32)
    x[1] = -1  # the root of a negative number is no number
    with pytest.warns(UserWarning, match=r"example\(s\) 1 are NaN"):
        ox.explain(step, x, target=0)
    ceil = """m (float[N,4] x) => (float[N,4] y) {
        s = Constant<value_float=1.0>()  z = Constant<value=int8 {0}>()
        q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)
    }"""
    display = ox.Display(kind="table", names=["a.csv", "b.csv", "c.csv"])
    x = np.array([[1, 0], [0.6, 0], [2, 0]], np.float32).repeat(2, axis=1)
    with pytest.warns(UserWarning, match=r"index 1 b.csv.*quantized, and more steps won't help"):
        ox.explain(model(HEAD + ceil, {}), x, target=0, display=display)


def test_what_was_done_is_on_record(net: ox.Model) -> None:
    explanation = ox.explain(net, X, baselines=X[:1], n_steps=30, provenance={"inputs": "x.csv"})
    assert explanation.options["n_steps"] == 30
    assert explanation.options["method"] == "gausslegendre"
    assert explanation.provenance["baselines"] == "array [1, 4]"
    assert explanation.provenance["inputs"] == "x.csv"
    assert ox.explain(net, X).provenance["baselines"] == "zeros"


def test_an_explanation_round_trips(tmp_path) -> None:
    m = ox.Model(BUNDLED / "digits" / "digits.onnx")
    x = rng.random((2, 1, 8, 8), dtype=np.float32) * 16
    explanation = ox.explain(m, x)
    explanation.save(tmp_path / "why.npz")
    again = ox.load_explanation(tmp_path / "why.npz")
    np.testing.assert_array_equal(again.attributions, explanation.attributions)
    assert again.provenance["sha256"] == m.digest
    explanation.plot(tmp_path / "why.png")
    assert (tmp_path / "why.png").stat().st_size > 1000


def test_one_number_for_the_batch() -> None:
    total = (
        HEAD
        + """total (float[N,4] x) => (float y) {
        q = Mul(x, x)
        y = ReduceSum<keepdims=0>(q)
    }"""
    )
    explanation = ox.explain(model(total), X)
    np.testing.assert_allclose(explanation.attributions, X * X, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(explanation.prediction, np.full(5, (X * X).sum()), rtol=1e-4)


def test_more_steps_while_the_gap_is_not_small() -> None:
    """A steep sigmoid far from the baseline: the default number of steps misses its rise."""
    steep = model(
        HEAD
        + """steep (float[N,4] x) => (float[N,4] y) {
        k = Constant<value_float = 300.0>()
        half = Constant<value_float = 0.513>()
        c = Sub(x, half)
        d = Mul(c, k)
        y = Sigmoid(d)
    }"""
    )
    x = np.ones((2, 4), np.float32)
    once = ox.explain(steep, x, target=1, n_steps=50)
    gap = once.checks["relative_convergence_delta"].max()
    assert gap > 0.01
    better = ox.explain(steep, x, target=1)
    assert better.options["n_steps"] in (100, 200)
    assert better.checks["relative_convergence_delta"].max() < gap
    assert ox.explain(model(NET, {"w": W}), X).options["n_steps"] == 50


def test_few_samples_are_told(net: ox.Model) -> None:
    with pytest.warns(UserWarning, match=r"up to \d+%; take more samples \(nt_samples=\d") as told:
        ox.explain(net, X, "noise-tunnel", abs=False, stdevs=20.0, nt_samples=3, seed=0)
    found = re.search(r"up to (\d+)%.*nt_samples=(\d+)", str(told[0].message))
    assert found and int(found[2]) == pytest.approx(3 * (int(found[1]) / 50) ** 2, rel=0.1)
    checks = ox.explain(net, X, "noise-tunnel", stdevs=1e-6, nt_samples=3, seed=0).checks
    assert (checks["standard_error"] < 1e-3).all()


def test_what_few_samples_leave_unknown_is_told() -> None:
    box = ox.BlackBox(lambda x: x.prod(1))
    with pytest.warns(UserWarning, match=r"few samples can't tell; .*\(n_samples=40\)"):
        ox.explain(box, np.ones((1, 6)), "kernel-shap", n_samples=10, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all coalitions: nothing is unknown
        ox.explain(box, np.ones((1, 6)), "kernel-shap", n_samples=64, seed=0)


@pytest.mark.parametrize("method", ["shapley-value-sampling", "lime-tabular"])
def test_a_tolerance_that_is_not_met_is_told(method: str) -> None:
    box, x = ox.BlackBox(lambda x: np.tanh(x).prod(1)), np.arange(0.5, 1, 0.1)[None]
    key = "num_samples" if "lime" in method else "n_samples"
    asked = {"baselines": rng.random((30, 5)) + 0.3} if "lime" in method else {}
    with pytest.warns(UserWarning, match=r"not the tolerance 0.1: take \d+ times as many") as told:
        ox.explain(box, x, method, seed=0, tolerance=0.1, **asked, **{key: 25})
    (found,) = (m[1] for w in told if (m := re.search(r"take (\d+) times", str(w.message))))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*tolerance")
        ox.explain(box, x, method, seed=0, tolerance=0.1, **asked, **{key: 50 * int(found)})


@pytest.mark.parametrize(
    ("method", "advice"),
    [("feature-ablation", "another baseline"), ("lime-image", r"\(hide_color=0\)")],
)
def test_perturbations_without_effect_are_told(method: str, advice: str) -> None:
    box = ox.BlackBox(lambda x: np.ones(len(x)))
    options = {"segmentation": np.arange(16).reshape(4, 4) // 8} if "image" in method else {}
    with pytest.warns(UserWarning, match=f"all zero: nothing that was switched off .*{advice}"):
        ox.explain(box, np.ones((1, 3, 4, 4)), method, method_options=options)


def test_a_function_needs_a_method_that_looks_at_answers() -> None:
    with pytest.raises(ox.InputError, match="method='kernel-shap'"):
        ox.explain(ox.BlackBox(lambda x: x.sum(1)), X)


def test_methods_that_take_no_layer_or_no_integers_say_so(digits: ox.Model) -> None:
    x = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(ox.InputError, match="leave out the layer"):
        ox.explain(digits, x, "full-grad", layer="block1.relu")
    tokens = model(TOKENS, {"table": rng.standard_normal((7, 4)).astype(np.float32), "w": W})
    with pytest.raises(ox.InputError, match="holds integers"):
        ox.explain(tokens, np.array([[1, 2, 3]]), "guided-grad-cam", layer="s")


def test_attributions_of_nothing_are_told(net: ox.Model) -> None:
    with pytest.warns(UserWarning, match=r"1 example\(s\) \(index 1\) are all zero"):
        ox.explain(net, np.stack([X[0], 0 * X[0]]), "saliency", 0)


@pytest.mark.parametrize("name", ["DeepLift", "deep_lift", "DEEP-LIFT"])
def test_methods_are_found_by_other_names(net: ox.Model, name: str) -> None:
    assert ox.explain(net, X, name, 0).method == "deep-lift"


def test_methods_that_are_not_there(net: ox.Model) -> None:
    with pytest.raises(ox.InputError, match="did you mean guided-backprop"):
        ox.explain(net, X, "guided-backdrop")


def test_an_example_takes_its_own_steps(net: ox.Model) -> None:
    """Whatever else is in the batch: only examples with a poor gap take more steps."""
    text = """g (float[N,4] x, float[N,4] z) => (float[N,4] y) {
        k = Constant<value_float=40.0>()  h = Mul(x, k)  s = Sigmoid(h)  y = Add(s, z) }"""
    steep = model(HEAD + text)
    x = np.array([[3.0, 0, 0, 0], [0.001, 0, 0, 0], [2.0, 0, 0, 0]], np.float32)
    z = np.arange(12, dtype=np.float32).reshape(3, 4)
    both = {
        "target": [0, 0, 0],
        "baselines": np.float32([[-1, 0, 0, 0], [0, 0, 0, 0], [-2, 0, 0, 0]]),
        "additional_forward_args": z,
    }
    together = ox.explain(steep, x, **both)
    assert together.options["n_steps"] > 50
    for i in range(3):
        alone = ox.explain(
            steep, x[[i]], target=0, baselines=both["baselines"][[i]],
            additional_forward_args=z[[i]],
        )  # fmt: skip
        np.testing.assert_allclose(alone.attributions[0], together.attributions[i], rtol=1e-6)
        for name, figure in alone.checks.items():
            np.testing.assert_allclose(figure, together.checks[name][[i]], rtol=1e-4, atol=1e-7)


# --- methods that look at answers only ----------------------------------------------------------


def test_token_numbers_are_explained_as_they_are() -> None:
    table = rng.standard_normal((7, 4)).astype(np.float32)
    tokens = model(TOKENS, {"table": table, "w": W})
    ids = np.array([[1, 2, 3], [4, 4, 6]])
    found = ox.explain(tokens, ids, "feature-ablation", 1)
    assert list(found.arrays) == ["ids"]
    assert found.inputs["ids"].dtype == np.int64
    for place in range(3):
        off = ids.copy()
        off[:, place] = 0
        worth = tokens(ids)["y"][:, 1] - tokens(off)["y"][:, 1]
        np.testing.assert_allclose(found.attributions[:, place], worth, rtol=1e-4, atol=1e-5)


def test_standard_errors_and_features_are_kept(net: ox.Model, tmp_path: Path) -> None:
    mask = np.array([0, 0, 1, 2])
    found = ox.explain(net, X, "shapley-value-sampling", 0, feature_mask=mask, seed=0)
    errors = found.standard_errors["x"]
    assert errors.shape == X.shape
    np.testing.assert_array_equal(found.feature_row("x"), mask)
    assert (found.attributions[:, 0] == found.attributions[:, 1]).all()
    found.save(tmp_path / "why.npz")
    again = ox.load_explanation(tmp_path / "why.npz")
    np.testing.assert_array_equal(again.standard_errors["x"], errors)
    np.testing.assert_array_equal(again.features["x"], found.features["x"])
    alone = ox.explain(net, X, "feature-ablation", feature_mask=np.arange(4))
    assert (alone.standard_errors, alone.features) == ({}, {})


def test_features_that_a_method_makes_are_kept(digits: ox.Model) -> None:
    x = load_digits().images[[3, 40], None].astype(np.float32) / 16
    halves = np.indices((8, 8))[1] // 4
    found = ox.explain(digits, x, "lime-image", segmentation=halves, num_samples=20, seed=0)
    np.testing.assert_array_equal(found.features["image"][1, 0], halves)
    top = found.summary()["examples"][0]["attributions"]["image"]["top"]
    assert sorted(each["feature"] for each in top) == [0, 1]


def test_a_surrogate_of_what_interacts_is_told() -> None:
    parity = ox.BlackBox(lambda x: np.prod(2 * x - 1, axis=1))
    with pytest.warns(UserWarning, match=r"surrogate that leaves unexplained.*up to \d+%"):
        found = ox.explain(parity, np.ones((1, 4)), "lime", n_samples=500, seed=0)
    assert found.checks["fit"][0] < 0.5


def test_long_options_are_on_record_by_their_digest(digits: ox.Model) -> None:
    x = load_digits().images[[3], None].astype(np.float32) / 16
    masks = [np.arange(64).reshape(1, 1, 8, 8) // n for n in (1, 1, 2)]
    wide = [np.broadcast_to(m, (5, 1, 8, 8)) for m in masks]
    x = np.repeat(x, 5, axis=0)
    said = [
        ox.explain(digits, x, "feature-ablation", feature_mask=m).options["feature_mask"]
        for m in wide
    ]
    assert said[0].startswith("int64 [5, 1, 8, 8], sha256 ")
    assert said[0] == said[1] != said[2]


def test_options_without_a_default_are_asked_for(net: ox.Model) -> None:
    with pytest.raises(ox.InputError, match=r"'occlusion' needs .* sliding_window_shapes"):
        ox.explain(net, X, "occlusion")


def test_baselines_of_other_kinds_are_on_record(net: ox.Model) -> None:
    rows = ox.explain(net, X, "feature-ablation", baselines=ox.Background(X[:3]))
    assert rows.provenance["baselines"] == "mean over rows: array [3, 4]"
