"""The perturbation family against Captum: the deterministic methods exactly, with random options;
the sampled ones on the same coalitions exactly, and on their own within their standard errors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from hypothesis import given
from hypothesis import strategies as st
from onnxplain.kernels.coalitions import kernel_shap, permutations, unpack
from torch import Tensor, nn

import onnxplain as ox
from tests.oracle.both import Both, flat, parameters, same
from tests.oracle.nets import build, example
from tests.oracle.test_methods import drawn, in_double

# ------------------------------------------------------------------------------------ networks


class Pair(nn.Module):
    """Two inputs that multiply each other: [N, 2, 3], [N, 4] -> [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.left(a.flatten(1)).tanh() * self.right(b))


class Grid(nn.Module):
    """Several output axes: [N, 5] -> [N, 2, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(5, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x).tanh()).unflatten(1, (2, 3))


class Total(nn.Module):
    """One number for the whole batch: [N, 5] -> []."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh().prod(1).sum()


class Tokens(nn.Module):
    """Integers: [N, 6] -> [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mid, self.head = nn.Embedding(9, 4), nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embedding(ids).flatten(1)).tanh())


@dataclass(frozen=True)
class Net:
    """A network of the table: its output's shape without examples, its layers, its tolerance."""

    outputs: tuple[int, ...] | None
    layers: tuple[str, ...] = ()
    within: float = 1e-9
    total: bool = False


NETS = {
    "mlp": Net((10,), ("layers.1", "layers.3")),
    "pair": Net((3,), ("head",)),
    "grid": Net((2, 3), ("linear",)),
    "total": Net((), total=True),
    "tokens": Net((3,), ("head",), within=1e-6),
    # onnxruntime convolves in float32 only
    "small_cnn": Net((10,), ("pool1", "pool2"), within=2e-5),
}
MADE = {"pair": Pair, "grid": Grid, "total": Total, "tokens": Tokens}
SHAPES = {"pair": [(2, 3), (4,)], "grid": [(5,)], "total": [(5,)]}
EXAMPLES = 3


@functools.cache
def network(name: str) -> Both:
    if name == "small_cnn":
        return Both(build(name), example(name, EXAMPLES, seed=4))
    torch.manual_seed(5)
    net = MADE[name]() if name in MADE else build(name)
    if name == "tokens":
        xs: tuple[Tensor, ...] = (torch.randint(0, 9, (EXAMPLES, 6)),)
    elif name in SHAPES:
        xs = tuple(torch.randn(EXAMPLES, *s) for s in SHAPES[name])
    else:
        xs = example(name, EXAMPLES, seed=4)
    xs = tuple(x.double() if x.is_floating_point() else x for x in xs)
    return Both(net.double().eval(), xs)


# ------------------------------------------------------------------------------------- options


def draw_mask(data: st.DataObject, xs: tuple[Tensor, ...], features: int, whole: bool) -> Any:
    """Feature ids: per input its own, the same ones in several inputs, or by example.

    Every number below the greatest occurs somewhere; an example may lack some.
    """
    kinds = ["own", "shared"] if whole else ["own", "shared", "each"]
    kind = data.draw(st.sampled_from(kinds), label="mask")
    rng = np.random.default_rng(data.draw(st.integers(0, 999), label="mask seed"))
    drawn_ids = []
    for i, x in enumerate(xs):
        count = max(1, features // len(xs)) if kind == "own" else features
        ids = rng.integers(0, count, (len(x) if kind == "each" else 1, *x.shape[1:]))
        drawn_ids.append(ids + (features * i if kind == "own" else 0))
    together = np.concatenate([ids.ravel() for ids in drawn_ids])
    names = np.unique(together)
    found = tuple(torch.from_numpy(np.searchsorted(names, ids)) for ids in drawn_ids)
    return found if len(xs) > 1 else found[0]


def draw_baselines(data: st.DataObject, xs: tuple[Tensor, ...]) -> Any:
    def one(x: Tensor) -> Any:
        kind = data.draw(st.sampled_from(["none", "number", "first", "each"]), label="baseline")
        if kind in ("none", "number"):
            return 0 if kind == "none" else 2
        rolled = x.flip(0).flip(-1)
        return rolled if kind == "each" else rolled[:1]

    if data.draw(st.booleans(), label="no baselines"):
        return None
    found = tuple(map(one, xs))
    return found if len(xs) > 1 else found[0]


def draw_target(data: st.DataObject, net: Net, count: int, each: bool = True) -> Any:
    if net.total:
        return None
    assert net.outputs is not None
    one = st.tuples(*(st.integers(0, size - 1) for size in net.outputs))
    single = one.map(lambda t: t[0]) if len(net.outputs) == 1 else one
    if each and data.draw(st.booleans(), label="a target each"):
        return [data.draw(single, label="target") for _ in range(count)]
    return data.draw(single, label="target")


def draw_windows(data: st.DataObject, xs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Windows and strides of each input; a stride is no longer than its window."""
    windows, strides = [], []

    def between(lowest: int, highest: int) -> int:
        return data.draw(st.integers(max(1, lowest), highest))

    for x in xs:
        windows.append(tuple(between(size // 4, size) for size in x.shape[1:]))
        strides.append(tuple(between(size // 2, size) for size in windows[-1]))
    steps: Any = tuple(strides) if len(xs) > 1 else strides[0]
    if data.draw(st.booleans(), label="one step"):
        least = tuple(min(w) for w in windows)
        steps = None if sum(x[0].numel() for x in xs) < 20 else least[0]
        if len(xs) > 1 and data.draw(st.booleans(), label="a step each"):
            steps = least
    shapes = tuple(windows) if len(xs) > 1 else windows[0]
    return {"sliding_window_shapes": shapes, "strides": steps}


def rolled(x: Any, mask: Any) -> Any:
    """A permutation that leaves nothing to chance, on tensors and on arrays."""
    return x[[*range(1, len(x)), 0]] * mask + x * ~mask


def draw(data: st.DataObject, method: str, name: str) -> tuple[list[str], dict[str, Any]]:
    """The layer, if it takes one, and the arguments."""
    net, both = NETS[name], network(name)
    least = 2 if "Permutation" in method else 1
    count = data.draw(st.integers(least, EXAMPLES), label="examples")
    xs = tuple(x[:count] for x in both.xs)
    takes = parameters(getattr(ca, method).__init__) | parameters(getattr(ca, method).attribute)
    options: dict[str, Any] = {"inputs": xs if len(xs) > 1 else xs[0]}
    made = [data.draw(st.sampled_from(net.layers), label="layer")] if "layer" in takes else []
    for switch in {"attribute_to_layer_input", "attribute_to_neuron_input"} & takes.keys():
        options[switch] = data.draw(st.booleans(), label=switch)
    if name == "tokens" and made:
        options = {k: v for k, v in options.items() if not k.startswith("attribute_to")}
    size = 4 if method == "ShapleyValues" else 7
    if "feature_mask" in takes:
        features = sum(x[0].numel() for x in xs)
        if features > size or data.draw(st.booleans(), label="grouped"):
            whole = net.total or "Permutation" in method
            options["feature_mask"] = draw_mask(data, xs, size, whole)
    if "layer_mask" in takes or "layer_baselines" in takes:
        values = both.captums("LayerActivation", made[0], inputs=options["inputs"], **{
            k: v for k, v in options.items() if k == "attribute_to_layer_input"
        })  # fmt: skip
        layer = (torch.from_numpy(next(flat(values))),)
        options["layer_mask"] = draw_mask(data, layer, size, net.total)
        if "layer_baselines" in takes:
            options["layer_baselines"] = draw_baselines(data, layer)
    if "baselines" in takes:
        options["baselines"] = draw_baselines(data, xs)
    if "sliding_window_shapes" in takes:
        options |= draw_windows(data, xs)
    if "perm_func" in takes:
        options["perm_func"] = rolled
    if "neuron_selector" in takes:
        options["neuron_selector"] = draw_neuron(data, name, made[0], options)
    elif "target" in takes:
        options["target"] = draw_target(data, net, count, each="layer" not in takes)
    options["perturbations_per_eval"] = data.draw(st.sampled_from([None, 1, 2, 5]), label="at once")
    return made, options


def draw_neuron(data: st.DataObject, name: str, layer: str, options: dict[str, Any]) -> Any:
    entering = options.get("attribute_to_neuron_input", False)
    values = network(name).captums(
        "LayerActivation", layer, inputs=options["inputs"], attribute_to_layer_input=entering
    )
    shape = next(flat(values)).shape[1:]
    kind = data.draw(st.sampled_from(["one", "several", "function"]), label="neurons")
    if kind == "function":
        return total
    if kind == "several":
        return tuple(slice(s // 3, s // 3 + 2) for s in shape)
    found = tuple(data.draw(st.integers(0, s - 1), label="neuron") for s in shape)
    return found[0] if len(found) == 1 else found


def total(values: Any) -> Any:
    """A neuron selector that is a function, on tensors and on arrays."""
    return (values * values).reshape(len(values), -1).sum(1)


# ------------------------------------------------------------------------ deterministic methods

ROWS = [
    *itertools.product(("FeatureAblation", "ShapleyValues", "Occlusion"), NETS),
    *(("FeaturePermutation", name) for name in NETS),
    *itertools.product(
        ("LayerFeatureAblation", "NeuronFeatureAblation"), [k for k, n in NETS.items() if n.layers]
    ),
]


@pytest.mark.parametrize(("method", "name"), ROWS, ids=["-".join(row) for row in ROWS])
def test_random_options(method: str, name: str) -> None:
    @drawn(6 if name == "small_cnn" else 10)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        made, options = draw(data, method, name)
        both, net = network(name), NETS[name]
        got = both.ours(method, *made, **options)
        with in_double():
            want = both.captums(method, *made, **{**options, "perturbations_per_eval": 1})
        # Captum sums Shapley values in float32.
        within = max(net.within, 1e-6 if method == "ShapleyValues" else 0)
        same(got, want, within, kinks=False)

    check()


@pytest.mark.parametrize("method", ["FeatureAblation", "ShapleyValues", "Occlusion"])
@pytest.mark.parametrize("name", ["pair", "grid"])
def test_several_outputs_without_a_target(method: str, name: str) -> None:
    """Output and input shape, one behind the other; Captum's ablation has them flat."""
    both = network(name)
    options: dict[str, Any] = {"inputs": both.xs if len(both.xs) > 1 else both.xs[0]}
    if method == "Occlusion":
        shapes = {"pair": ((1, 2), (2,)), "grid": (2,)}
        options["sliding_window_shapes"] = shapes[name]
    else:
        masks = tuple(torch.arange(x[0].numel()).reshape(1, *x.shape[1:]) % 4 for x in both.xs)
        options["feature_mask"] = masks if len(masks) > 1 else masks[0]
    got = list(flat(both.ours(method, **options)))
    with in_double():
        want = list(flat(both.captums(method, **options)))
    outputs = NETS[name].outputs or ()
    for g, w, x in zip(got, want, both.xs, strict=True):
        assert g.shape == (EXAMPLES, *outputs, *x.shape[1:])
        np.testing.assert_allclose(g, w.reshape(g.shape), rtol=1e-6, atol=1e-6)


def test_layer_permutation() -> None:
    """Captum's takes no target here (it would select it twice): on a net with one output."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    both = Both(net, (torch.randn(EXAMPLES, 4).double(),))
    mask = torch.tensor([[0, 1, 1, 2, 0]])
    made: dict[str, Any] = {"inputs": both.xs[0], "layer_mask": mask}
    got = ox.LayerFeaturePermutation(both.model, "1", rolled).attribute(
        both.xs[0].numpy(), layer_mask=mask.numpy()
    )
    theirs = ca.LayerFeaturePermutation(net, net[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ca.LayerFeaturePermutation, "attributor",
            property(lambda _: functools.partial(ca.FeaturePermutation, perm_func=rolled)),
        )  # fmt: skip
        want = theirs.attribute(**made)
    same(got, want.numpy(), 1e-9, kinks=False)


# ----------------------------------------------------------------------------- sampled methods


class Recorder:
    """An interpretable model that keeps what it is fitted to: our own coalitions, among it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fits: list[tuple[np.ndarray, ...]] = []

    def fit(self, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> Recorder:
        self.fits.append((np.array(x), np.array(y), np.array(sample_weight)))
        self.model.fit(x, y, sample_weight=sample_weight)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model.predict(x)

    @property
    def coef_(self) -> np.ndarray:
        return self.model.coef_

    @property
    def intercept_(self) -> Any:
        return self.model.intercept_


def replay(coalitions: np.ndarray) -> Any:
    """A `perturb_func` of Captum's that gives these coalitions, one after the other."""

    def generate(original: Any, **options: Any) -> Iterator[Tensor]:
        for row in coalitions:
            yield torch.from_numpy(row.astype(np.int64))[None]

    return generate


def surrogates() -> dict[str, tuple[Any, Any]]:
    """Interpretable models of scikit-learn, and Captum's wrappers of the same."""
    from sklearn.linear_model import Lasso, LinearRegression, Ridge

    return {
        "lasso": (Lasso(alpha=0.003), SkLearnLasso(alpha=0.003)),
        "ridge": (Ridge(alpha=0.1), SkLearnRidge(alpha=0.1)),
        "linear": (LinearRegression(), SkLearnLinearRegression()),
    }


@pytest.mark.parametrize("kind", ["lasso", "ridge", "linear"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", ["mlp", "pair", "tokens"])
def test_lime_on_the_same_coalitions(name: str, distance: str, kind: str) -> None:
    """Our coalitions, handed to Captum, give its coefficients: the fit is the same."""
    both = network(name)
    xs = tuple(x[:1] for x in both.xs)
    mask = tuple(torch.arange(x[0].numel()).reshape(x.shape) % 5 + i for i, x in enumerate(xs))
    baselines = tuple(x.flip(-1) if x.is_floating_point() else 1 for x in xs)
    ours, theirs = surrogates()[kind]
    options: dict[str, Any] = {
        "inputs": xs, "target": 1, "n_samples": 60, "feature_mask": mask, "baselines": baselines
    }  # fmt: skip
    if len(xs) == 1:
        options |= {k: options[k][0] for k in ("inputs", "feature_mask", "baselines")}
    recorder = Recorder(ours)
    width = 0.7 if distance == "cosine" else 3.0
    lime = ox.Lime(both.model, recorder, ox.get_exp_kernel_similarity_function(distance, width))
    given = {k: to_numpy(v) for k, v in options.items()}
    got = lime.attribute(**given, return_input_shape=False, seed=1)
    spread = lime.attribute(**given, seed=1)
    coalitions, _, weights = recorder.fits[0]
    assert 0.3 < coalitions.mean() < 0.7 and len(np.unique(weights)) > 7
    with in_double():
        captums = ca.Lime(
            both.net,
            theirs,
            get_exp_kernel_similarity_function(distance, width),
            replay(coalitions),
        )
        want = captums.attribute(**options, return_input_shape=False).numpy()
        wide = captums.attribute(**options)
    assert np.count_nonzero(want) > 2
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    for g, w in zip(flat(spread), flat(wide), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def to_numpy(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(map(to_numpy, given))
    return given.numpy() if isinstance(given, Tensor) else given


COALITIONS = np.random.default_rng(3).integers(0, 2, (40, 1, 8))


def similarity(original: Any, perturbed: Any, sample: Any, **options: Any) -> Any:
    return 1 / (1 + options["scale"] * ((original - perturbed) ** 2).sum())


def off(sample: Any, original: Any, **options: Any) -> Any:
    """What an interpretable sample stands for, on tensors and on arrays."""
    return original * sample + options["scale"] * (1 - sample)


def same_place(perturbed: Any, original: Any, **options: Any) -> Any:
    """The interpretable sample of an input."""
    return (perturbed == original) * 1.0


@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("interpretable", [True, False])
def test_lime_base_with_functions(interpretable: bool, generator: bool) -> None:
    """Samples of the interpretable space, or of the input space; one at a time, or generated."""
    both = network("mlp")
    x = both.xs[0][:1]

    def functions(wrap: Any) -> tuple[Any, ...]:
        rows = iter(COALITIONS)

        def one(original: Any, **options: Any) -> Any:
            sample = wrap(next(rows))
            return sample if interpretable else off(sample, original, **options)

        def every(original: Any, **options: Any) -> Iterator[Any]:
            for _ in COALITIONS:
                yield one(original, **options)

        return similarity, every if generator else one, interpretable, off, same_place

    ours, theirs = surrogates()["ridge"]
    options = {"target": 3, "n_samples": len(COALITIONS), "scale": 0.3}
    got = ox.LimeBase(both.model, ours, *functions(np.asarray)).attribute(x.numpy(), **options)
    with in_double():
        want = ca.LimeBase(both.net, theirs, *functions(torch.from_numpy)).attribute(x, **options)
    np.testing.assert_allclose(got, want.numpy().reshape(1, -1), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:You are providing multiple")
def test_lime_with_functions() -> None:
    """Its own samples and similarity, for several examples, each with its mask."""
    both = network("mlp")
    x, mask = both.xs[0], torch.tensor([[0, 0, 1, 1, 2, 2, 3, 4], [4, 3, 2, 1, 0, 0, 0, 0]] * 2)[:3]
    drawn_rows = COALITIONS[:, 0, :5]

    def numpy_samples(original: Any, **options: Any) -> Iterator[np.ndarray]:
        assert options["num_interp_features"] == 5
        yield from drawn_rows[:, None]

    def weight(original: Any, perturbed: Any, sample: Any, **options: Any) -> Any:
        return 1 / (1 + ((original - perturbed) ** 2).sum()) + sample.sum() * 0.1

    ours, theirs = surrogates()["linear"]
    options = {"target": [3, 1, 4], "n_samples": 30}
    got = ox.Lime(both.model, ours, weight, numpy_samples).attribute(
        x.numpy(), feature_mask=mask.numpy(), **options
    )
    with in_double():
        captums = ca.Lime(both.net, theirs, weight, replay(drawn_rows))
        want = captums.attribute(x, feature_mask=mask, **options)
    same(got, want.numpy(), 1e-6, kinks=False)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("ShapleyValueSampling", name) for name in ("mlp", "pair", "tokens", "total")),
        ("KernelShap", "mlp"),  # the others have few features: it takes all their coalitions
        ("KernelShap", "pair"),
    ],
)
def test_standard_errors_are_those_of_the_exact_values(method: str, name: str) -> None:
    """Over many seeds, what is off divided by what was told is a number of variance 1."""
    both = network(name)
    inputs = tuple(x.numpy() for x in both.xs)
    base = tuple(np.roll(x, 1, 0) for x in inputs)
    options: dict[str, Any] = {
        "inputs": inputs if len(inputs) > 1 else inputs[0],
        "baselines": base if len(base) > 1 else base[0],
        "target": None if name == "total" else 2,
    }
    exact = np.concatenate([
        a.reshape(len(a), -1) for a in flat(ox.ShapleyValues(both.model).attribute(**options))
    ], axis=1)  # fmt: skip
    scores = []
    for seed in range(30):
        found = getattr(ox, method)(both.model).attribute(
            **options, n_samples=120, seed=seed, return_standard_error=True
        )
        got, error = (
            np.concatenate([a.reshape(len(a), -1) for a in flat(part)], axis=1) for part in found
        )
        # A feature that is the same in the baseline adds nothing, which is no matter of chance.
        known = error < 1e-9
        np.testing.assert_allclose(got[known], exact[known], atol=1e-6)
        scores.append(np.where(known, np.nan, (got - exact) / np.where(known, 1, error)))
    z = np.array(scores)
    z = z[:, ~np.isnan(z).any(0)]
    assert z.shape[1] > exact.size / 2
    assert 0.7 < (z**2).mean() < 1.4, (z**2).mean()
    assert np.abs(z).max() < 6, np.abs(z).max()
    # No bias: the mean over 30 seeds has a thirtieth of the variance.
    assert 0.3 < 30 * (z.mean(0) ** 2).mean() < 2.5


@pytest.mark.parametrize("sampling", ["random", "antithetic", "stratified"])
@pytest.mark.parametrize("name", ["mlp", "pair", "total"])
def test_shapley_sampling_on_the_same_orders(name: str, sampling: str) -> None:
    """Our orders, handed to Captum, give its numbers (which it adds up in float32)."""
    both = network(name)
    xs = both.xs if len(both.xs) > 1 else both.xs[0]
    options = {"inputs": xs, "target": None if name == "total" else 1}
    features = sum(x[0].numel() for x in both.xs)
    seed, count = 7, 4 * features
    got = both.ours(
        "ShapleyValueSampling", **options, n_samples=count, seed=seed, sampling=sampling
    )
    orders = permutations(seed, 0, count, features, sampling)
    assert len(np.unique(orders, axis=0)) > 2 * features
    theirs = ca.ShapleyValueSampling(both.net)
    theirs.permutation_generator = lambda features, samples: iter(orders.tolist())
    want = theirs.attribute(**options)
    for g, w in zip(flat(got), flat(to_numpy(want)), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "pair"])
def test_kernel_shap_on_the_same_coalitions(name: str) -> None:
    """Captum weighs the full and the empty coalition so much that they are nearly met."""
    both = network(name)
    xs = tuple(x[:1] for x in both.xs)
    options = {"inputs": xs if len(xs) > 1 else xs[0], "target": 2, "n_samples": 90}
    features = sum(x[0].numel() for x in xs)
    seed = 11
    got = both.ours("KernelShap", **options, return_input_shape=False, seed=seed)
    inner = unpack(kernel_shap(seed, 0, 88, features), features)
    theirs = ca.KernelShap(both.net)
    theirs.perturb_func = replay(np.stack([np.ones(features), np.zeros(features), *inner]))
    theirs.inf_weight = 1e9
    with in_double():
        want = theirs.attribute(**options, return_input_shape=False).numpy()
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
