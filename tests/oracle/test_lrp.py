"""LRP against zennit and Captum on the same weights: rules, presets, layers.

Both work with modules, so these networks have a module for every step. Batch norms are fused into
their convolutions before zennit sees them: its own canonizer leaves their epsilon behind.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum.attr._utils import lrp_rules as captum_rules
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onnxplain.methods.lrp import LRP, LayerLRP
from onnxplain.rules import lrp
from tests.oracle.both import Both, same
from tests.oracle.nets import IMAGE_NETS, build, example


def zennit(module: str) -> Any:
    """A module of zennit; without zennit, the test that asks for it is skipped."""
    why = "zennit is not installed: pip install --no-deps zennit"
    return pytest.importorskip(f"zennit.{module}", reason=why)


class Vgg(nn.Module):
    """[N, 3, 32, 32] -> [N, classes]"""

    def __init__(self, classes: int = 7, norm: bool = True) -> None:
        steps: list[nn.Module] = []
        for a, b in ((3, 8), (8, 16), (16, 16)):
            steps += [nn.Conv2d(a, b, 3, padding=1, bias=not norm)]
            steps += [nn.BatchNorm2d(b)] if norm else []
            steps += [nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__()
        self.features = nn.Sequential(*steps, nn.AvgPool2d(2))
        self.dense, self.relu, self.drop = nn.Linear(64, 20), nn.ReLU(), nn.Dropout()
        self.head = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)  # Captum has no rule for a module that flattens
        return self.head(self.drop(self.relu(self.dense(x))))


def _resnet(size: int, classes: int) -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(weights=None, num_classes=classes)


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg": lambda _, classes: Vgg(classes),
    "plain_vgg": lambda _, classes: Vgg(classes, norm=False),
    "torchvision_resnet18": _resnet,
}
SIZES = {"vgg": 32, "plain_vgg": 32, "torchvision_resnet18": 64}


@functools.cache
def pair(name: str) -> Both:
    """A network in both libraries; the MLP in float64, which has kernels in onnxruntime."""
    if name == "mlp":
        return Both(build(name).double(), tuple(x.double() for x in example(name, 3)))
    IMAGE_NETS[name] = NETS[name], SIZES[name]
    try:
        return Both(build(name, classes=7), example(name, 3))
    finally:
        del IMAGE_NETS[name]


def exactly(double: bool) -> dict[str, Any]:
    """How close: in float32, denominators near zero and gates by sign are kinks."""
    return {"tolerance": 1e-8, "kinks": False} if double else {"tolerance": 1e-4}


TARGETS = [1, 4, 0]


def fused(net: nn.Module) -> nn.Module:
    """A copy, its batch norms part of the convolutions before them."""
    net = copy.deepcopy(net)
    for parent in net.modules():
        last: tuple[str, nn.Module] | None = None
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and last is not None:
                conv = torch.nn.utils.fusion.fuse_conv_bn_eval(last[1], child)
                setattr(parent, last[0], conv)
                setattr(parent, name, nn.Identity())
            last = (name, child) if isinstance(child, nn.Conv2d) else None
    return net


def zennits(net: nn.Module, x: Tensor, composite: Any) -> np.ndarray:
    """Relevance of the output's values at TARGETS, in float64."""
    net, x = copy.deepcopy(net).double(), x.double().clone().requires_grad_()
    with composite.context(net) as modified:
        y = modified(x)
        seed = torch.zeros_like(y)
        rows = torch.arange(len(x))
        seed[rows, TARGETS] = y[rows, TARGETS].detach()
        (relevance,) = torch.autograd.grad(y, x, seed)
    return relevance.numpy()


BOX = {"low": -3.0, "high": 3.0}
COMPOSITES = {
    "epsilon-plus": "EpsilonPlus",
    "epsilon-plus-flat": "EpsilonPlusFlat",
    "epsilon-alpha2-beta1": "EpsilonAlpha2Beta1",
    "epsilon-alpha2-beta1-flat": "EpsilonAlpha2Beta1Flat",
    "epsilon-gamma-box": "EpsilonGammaBox",
    "excitation-backprop": "ExcitationBackprop",
}


OTHERS = {"set_bias_to_zero": True, "stabilizer": 1e-3}
# zennit's box is for convolutions only, and its excitation takes the slope of Tanh.
CASES = [
    *(
        ("mlp", p, o)
        for p in COMPOSITES
        if p[:4] == "epsi" and "box" not in p
        for o in ({}, OTHERS)
    ),
    *(("vgg", p, o) for p in COMPOSITES for o in ({}, OTHERS)),
    *(("torchvision_resnet18", p, {}) for p in ("epsilon-gamma-box", "epsilon-alpha2-beta1-flat")),
]


@pytest.mark.parametrize(("name", "preset", "options"), CASES, ids=str)
def test_presets_are_zennits_composites(name: str, preset: str, options: dict[str, Any]) -> None:
    both, box = pair(name), BOX if "box" in preset else {}
    canonizers = [zennit("torchvision").ResNetBasicBlockCanonizer()]
    chosen = lrp.preset(preset, **options, **box)
    got = LRP(both.model, chosen).attribute(both.xs[0].numpy(), target=TARGETS)
    theirs = {"stabilizer": options["stabilizer"], "zero_params": "bias"} if options else {}
    make = getattr(zennit("composites"), COMPOSITES[preset])
    composite = make(canonizers=canonizers, **theirs, **box)
    same(got, zennits(fused(both.net), both.xs[0], composite), **exactly(name == "mlp"))


RULES: list[tuple[lrp.PropagationRule, tuple[Any, ...]]] = [
    (lrp.Epsilon(0.25), (0.25,)),
    (lrp.Epsilon(0.25, set_bias_to_zero=True), (0.25, "bias")),
    (lrp.Gamma(), ()),
    (lrp.Gamma(3, 1e-2, True), (3.0, 1e-2, "bias")),
    (lrp.ZPlus(), ()),
    (lrp.ZPlus(1e-2, True), (1e-2, "bias")),
    (lrp.AlphaBeta(), ()),
    (lrp.AlphaBeta(3, 2, 1e-2, True), (3.0, 2.0, 1e-2, "bias")),
    (lrp.AlphaBeta(1, 0), (1.0, 0.0)),
    (lrp.ZBox(-4, 3.5), (-4.0, 3.5)),
    (lrp.ZBox(-4, 3.5, 1e-2, True), (-4.0, 3.5, 1e-2, "bias")),
    (lrp.WSquare(), ()),
    (lrp.WSquare(1e-2, True), (1e-2, "bias")),
    (lrp.Flat(), ()),
    (lrp.Norm(1e-3), (1e-3,)),
]


@pytest.mark.parametrize(("ours", "options"), RULES, ids=[repr(r) for r, _ in RULES])
def test_rules_are_zennits(ours: lrp.PropagationRule, options: tuple[Any, ...]) -> None:
    """Every linear layer by one rule, with inputs of both signs everywhere."""
    composites, rules = zennit("composites"), zennit("rules")
    theirs = getattr(rules, type(ours).__name__)(*options)
    linear = (nn.Linear, nn.Conv2d, nn.Conv1d, nn.ConvTranspose1d)
    for both, exact in ((dense(), True), (signed(), False)):
        x = both.xs[0]
        composite = composites.LayerMapComposite([(nn.Tanh, rules.Pass()), (linear, theirs)])
        got = LRP(both.model, [(lrp.LINEAR, ours)]).attribute(x.numpy(), target=TARGETS)
        same(got, zennits(both.net, x, composite), **exactly(exact))


def test_activations_pass_where_zennit_takes_their_slope() -> None:
    """As the docstring of `preset` says; with its slope replaced, zennit's composite is ours."""
    composites, rules = zennit("composites"), zennit("rules")
    both, tanh = dense(), [((nn.Tanh,), rules.Pass())]
    got = LRP(both.model, "excitation-backprop").attribute(both.xs[0].numpy(), target=TARGETS)
    passing = composites.ExcitationBackprop(layer_map=tanh)
    same(got, zennits(both.net, both.xs[0], passing), **exactly(True))
    theirs = zennits(both.net, both.xs[0], composites.ExcitationBackprop())
    assert np.abs(got - theirs).max() > 0.1 * np.abs(theirs).max()


@functools.cache
def dense() -> Both:
    """Matrix products with biases behind them, in float64."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Flatten(), nn.Linear(12, 5))
    return Both(net.double(), (torch.randn(3, 3, 6).double(),))


@functools.cache
def signed() -> Both:
    """Grouped, strided, dilated and transposed convolutions, without ReLU."""
    torch.manual_seed(6)
    net = nn.Sequential(
        *(nn.Conv1d(4, 6, 3, groups=2, stride=2, padding=1), nn.Tanh()),
        *(nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), nn.Tanh()),
        *(nn.Conv1d(4, 3, 2, dilation=2), nn.Flatten(), nn.Linear(30, 5)),
    )
    return Both(net, (torch.randn(3, 4, 10),))


# ---- Captum -------------------------------------------------------------------------------------


def captums(
    both: Both,
    chosen: dict[str, Any],
    layers: Sequence[str] = (),
    **options: Any,
) -> tuple[Any, Any]:
    """Captum's relevance and delta in float64, with its rules by module."""
    net = copy.deepcopy(both.net).double()
    for name, rule in chosen.items():
        net.get_submodule(name).rule = rule
    modules = [net.get_submodule(name) for name in layers]
    method = ca.LayerLRP(net, modules) if layers else ca.LRP(net)
    x = both.xs[0].double().clone()
    found, delta = method.attribute(
        x, target=torch.tensor(TARGETS), return_convergence_delta=True, **options
    )
    if layers:
        found = [f[0] if isinstance(f, tuple) else f for f in found]
        return [f.detach().numpy() for f in found], [d.detach().numpy() for d in delta]
    return found.detach().numpy(), delta.detach().numpy()


@pytest.mark.parametrize("name", ["mlp", "plain_vgg", "vgg"])
def test_default_is_captums(name: str) -> None:
    both = pair(name)
    got, delta = LRP(both.model).attribute(
        both.xs[0].numpy(), target=TARGETS, return_convergence_delta=True
    )
    want, theirs = captums(both, {})
    same(got, want, **exactly(name == "mlp"))
    bound = 1e-8 if name == "mlp" else 1e-4
    assert (np.abs(delta - theirs) < bound * np.abs(got).reshape(3, -1).sum(1)).all()


LAYERS = {
    "mlp": ["layers.0", "layers.2", "layers.4"],
    "plain_vgg": ["features.0", "features.3", "features.6", "dense", "head"],
}


def captum_rule(ours: lrp.PropagationRule) -> Any:
    """The rule of Captum that one of ours is."""
    match ours:
        case lrp.Epsilon(epsilon, _):
            return captum_rules.EpsilonRule(epsilon)
        case lrp.Gamma(gamma, _, bias, _):
            return captum_rules.GammaRule(gamma, bias)
        case lrp.ZPlus(_, bias, _):
            return captum_rules.Alpha1_Beta0_Rule(bias)
    raise AssertionError(ours)


RULE = st.one_of(
    st.builds(lrp.Epsilon, st.sampled_from([1e-9, 1e-4, 0.5])),
    st.builds(lrp.Gamma, st.floats(0, 4), st.just(1e-9), st.booleans(), st.just(False)),
    st.builds(lrp.ZPlus, st.just(1e-9), st.booleans(), st.just(False)),
)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_rules_by_layer_are_captums(name: str, data: st.DataObject) -> None:
    both, layers = pair(name), LAYERS[name]
    chosen = {layer: data.draw(RULE, layer) for layer in layers}
    x = both.xs[0].numpy()
    made = list(chosen.items())
    theirs = {layer: captum_rule(rule) for layer, rule in made}
    got = LRP(both.model, made).attribute(x, target=TARGETS)
    same(got, captums(both, theirs)[0], **exactly(name == "mlp"))
    into = data.draw(st.booleans(), "attribute_to_layer_input")
    got, gaps = LayerLRP(both.model, layers[1:], made).attribute(
        x, target=TARGETS, return_convergence_delta=True, attribute_to_layer_input=into
    )
    want, deltas = captums(both, theirs, layers[1:], attribute_to_layer_input=into)
    same(got, want, **exactly(name == "mlp"))
    for gap, delta, relevance in zip(gaps, deltas, got, strict=True):
        size = np.abs(relevance).reshape(3, -1).sum(1)
        assert (np.abs(gap - delta) <= (1e-8 if name == "mlp" else 1e-3) * size).all()


def test_identity_is_pass() -> None:
    """Of a first layer: behind an activation, Captum multiplies by the activation all the same."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    both = Both(net.double(), (torch.randn(3, 5).double(),))
    got = LRP(both.model, [("0", lrp.Pass())]).attribute(both.xs[0].numpy(), target=TARGETS)
    same(got, captums(both, {"0": captum_rules.IdentityRule()})[0], **exactly(True))


# ---- what neither has ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "transformer"])
def test_transformers_without_biases_conserve(name: str) -> None:
    """Nothing else absorbs relevance: attention weights and scales are constants."""
    net = build(name)
    with torch.no_grad():
        for path, p in net.named_parameters():
            if path.endswith(("bias", "pos_embed", "position", "cls_token")):
                p.zero_()
    both = Both(net, example(name, 2))
    x = both.xs[0].numpy()
    if name == "transformer":
        method: LRP = LayerLRP(both.model, "embedding")
    else:
        method = LRP(both.model)
    relevance, delta = method.attribute(x, target=[3, 5], return_convergence_delta=True)
    assert np.isfinite(relevance).all()
    size = np.abs(relevance).reshape(2, -1).sum(1)
    assert (np.abs(delta) < 1e-5 * size).all()
    assert (np.abs(delta) < 1e-3 * np.abs(relevance.reshape(2, -1).sum(1))).all()


def test_a_transformer_is_input_times_gradient_with_constant_gates() -> None:
    """The default rules of a transformer written as a gradient (Ali et al. 2022, section 4)."""
    torch.manual_seed(2)
    both = Both(Attention().double(), (torch.randn(2, 5, 8).double(),))
    got = LRP(both.model).attribute(both.xs[0].numpy(), target=[1, 2])
    x = both.xs[0].clone().requires_grad_()
    y = both.net(x, constant=True)[torch.arange(2), [1, 2]]
    (slope,) = torch.autograd.grad(y.sum(), x)
    same(got, (x * slope).detach().numpy(), 1e-7, kinks=False)


class Attention(nn.Module):
    """One block; `constant` detaches attention weights, scales, gates and slopes of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, constant: bool = False) -> Tensor:
        still = Tensor.detach if constant else lambda v: v
        weights = still(((self.q(x) @ self.k(x).transpose(1, 2)) / 8**0.5).softmax(-1))
        x = x + self.o(weights @ self.v(x))
        mean = x.mean(-1, keepdim=True)
        scale = still(((x - mean).square().mean(-1, keepdim=True) + self.norm.eps).sqrt())
        h = (x - mean) / scale * self.norm.weight + self.norm.bias if constant else self.norm(x)
        h = self.up(h)
        h = h * still(nn.functional.silu(h) / h) if constant else nn.functional.silu(h)
        return self.head((x + self.down(h)).mean(1))
