"""Derivatives of matrix products, convolutions, Einsum and Attention."""

from __future__ import annotations

import numpy as np
import pytest

from onnxplain.errors import UnsupportedModelError
from onnxplain.rules.vjp import window
from tests.projection import Case, check, evaluate, gradient, load, make_model

rng = np.random.default_rng(3)
r = rng.standard_normal


def row(op: str, *shapes: tuple[int, ...] | None, name: str = "", **options: object) -> Case:
    """A case on random inputs of these shapes; what is no option of a case is an attribute."""
    known = {"const", "symbolic", "wrt", "dtypes", "second", "opset", "outputs"}
    inputs = [None if s is None else r(s) for s in shapes]
    attrs = {k: v for k, v in options.items() if k not in known}
    kept = {k: v for k, v in options.items() if k in known}
    text = name or "-".join("x".join(map(str, s)) or "scalar" for s in shapes if s is not None)
    return Case(
        op, inputs, attrs, name=text + "".join(f"-{k}{v}" for k, v in options.items()), **kept
    )


MATMUL = [
    row("MatMul", a, b, **options)
    for a, b in [
        ((3,), (3,)),
        ((3,), (3, 2)),
        ((2, 3), (3,)),
        ((2, 3), (3, 4)),
        ((3,), (5, 3, 2)),
        ((5, 2, 3), (3,)),
        ((5, 2, 3), (3, 4)),
        ((2, 3), (5, 3, 4)),
        ((5, 2, 3), (5, 3, 4)),
        ((1, 2, 3), (5, 3, 4)),
        ((5, 1, 2, 3), (1, 4, 3, 2)),
        ((4, 2, 3), (5, 1, 3, 2)),
        ((0, 3), (3, 2)),
        ((0, 2, 3), (3, 4)),
        ((2, 0), (0, 3)),
    ]
    for options in ({}, {"symbolic": (0, 1)})
] + [row("MatMul", (5, 2, 3), (3, 4), const=(1,))]

GEMM = (
    [
        row(
            "Gemm", (3, 2) if ta else (2, 3), (4, 3) if tb else (3, 4), transA=ta, transB=tb, **more
        )
        for ta in (0, 1)
        for tb in (0, 1)
        for more in ({}, {"alpha": 0.5, "const": (1,)})
    ]
    + [
        row("Gemm", (2, 3), (3, 4), c, beta=beta, alpha=2.0, symbolic=symbolic)
        for c in ((2, 4), (4,), (1,), (1, 4), (2, 1), ())
        for beta, symbolic in ((1.0, ()), (-0.5, (0, 1, 2)))
    ]
    + [row("Gemm", (0, 3), (3, 4), (4,))]
)

CONV = [
    row("Conv", *shapes, **options)
    for shapes, options in [
        (((2, 3, 7), (4, 3, 3), (4,)), {}),
        (((2, 3, 7), (4, 3, 3)), {"pads": [2, 0], "strides": [2], "dilations": [2]}),
        (((2, 3, 5, 6), (4, 3, 3, 2), (4,)), {"pads": [1, 0, 2, 1]}),
        (((2, 3, 5, 6), (4, 3, 3, 3)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (((2, 3, 6, 6), (4, 3, 3, 3)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (((2, 3, 9, 8), (2, 3, 3, 3)), {"strides": [3, 2], "dilations": [2, 1]}),
        (((2, 3, 9, 8), (2, 3, 2, 2)), {"strides": [3, 4], "pads": [0, 1, 1, 0]}),
        (((2, 2, 8, 9), (3, 2, 7, 7)), {"strides": [2, 2], "pads": [3, 3, 3, 3]}),
        (((2, 3, 5, 6), (4, 3, 1, 1)), {}),
        (((2, 3, 5, 6), (4, 3, 1, 1)), {"strides": [2, 2]}),
        (((2, 3, 4, 4), (4, 3, 1, 1)), {"pads": [2, 1, 0, 1]}),
        (((2, 4, 5, 5), (6, 2, 3, 3), (6,)), {"group": 2, "pads": [1, 1, 1, 1]}),
        (((2, 4, 5, 5), (6, 2, 3, 3)), {"group": 2, "strides": [2, 2]}),
        (((2, 4, 5, 5), (4, 1, 3, 3), (4,)), {"group": 4, "pads": [1, 1, 1, 1]}),
        (((2, 4, 6, 6), (4, 1, 3, 3)), {"group": 4, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (((2, 4, 6, 6), (4, 1, 5, 5)), {"group": 4, "pads": [2, 2, 2, 2], "strides": [2, 2]}),
        (((2, 3, 5, 5), (6, 1, 2, 2)), {"group": 3}),
        (((1, 2, 4, 3, 5), (3, 2, 2, 3, 2), (3,)), {"pads": [0, 1, 0, 1, 1, 0]}),
        (((1, 2, 4, 5, 5), (3, 2, 2, 2, 2)), {"strides": [2, 1, 3], "dilations": [1, 2, 1]}),
        (((2, 3, 5, 6), (4, 3, 3, 2)), {"auto_pad": "SAME_UPPER"}),
        (((2, 3, 5, 6), (4, 3, 2, 3)), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
        (((2, 3, 6, 7), (4, 3, 4, 3)), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
        (((2, 3, 5, 6), (4, 3, 1, 1)), {"auto_pad": "SAME_UPPER", "strides": [3, 2]}),
        (((2, 3, 5, 6), (4, 3, 3, 2)), {"auto_pad": "VALID", "strides": [1, 2]}),
        (((0, 3, 5, 6), (4, 3, 3, 2)), {"wrt": (0,)}),
        # Enough channels for one convolution for each phase of the strides.
        (((1, 16, 6, 6), (2, 16, 3, 3)), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        (((1, 16, 7, 5), (2, 16, 3, 2)), {"strides": [2, 1], "pads": [1, 1, 1, 0]}),
        (((1, 32, 7, 5), (4, 16, 4, 3)), {"strides": [2, 3], "group": 2}),
        (((1, 16, 3, 4, 5), (2, 16, 2, 2, 3)), {"strides": [2, 2, 2], "pads": [0, 0, 1, 1, 0, 1]}),
    ]
    for options in (options, options | {"symbolic": (0,)}, options | {"const": (1,), "wrt": (0,)})
]

CONV_TRANSPOSE = [
    row("ConvTranspose", *shapes, **options)
    for shapes, options in [
        (((2, 3, 4), (3, 2, 3), (2,)), {}),
        (((2, 3, 4, 5), (3, 2, 3, 2), (2,)), {"pads": [1, 0, 2, 1]}),
        (((2, 3, 4, 5), (3, 2, 3, 3)), {"strides": [2, 3], "pads": [1, 1, 0, 1]}),
        (((2, 3, 4, 5), (3, 2, 3, 3)), {"strides": [2, 3], "output_padding": [1, 2]}),
        # onnxruntime takes no output padding as large as the stride.
        (
            ((2, 3, 4, 5), (3, 2, 2, 2)),
            {"dilations": [2, 3], "output_padding": [1, 2], "dtypes": ()},
        ),
        (((2, 3, 4, 5), (3, 2, 1, 1)), {"strides": [2, 2], "output_padding": [1, 0]}),
        (((2, 4, 4, 5), (4, 3, 3, 2), (6,)), {"group": 2, "strides": [2, 1]}),
        (((2, 4, 4, 5), (4, 1, 3, 3)), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        (((2, 3, 4, 5), (3, 2, 3, 3)), {"strides": [2, 2], "output_shape": [8, 10]}),
        (((2, 3, 4, 5), (3, 2, 3, 2)), {"strides": [2, 2], "output_shape": [9, 11]}),
        (((2, 3, 4, 5), (3, 2, 4, 4)), {"strides": [2, 3], "auto_pad": "SAME_UPPER"}),
        (((2, 3, 4, 5), (3, 2, 4, 3)), {"strides": [1, 2], "auto_pad": "SAME_LOWER"}),
        (((2, 3, 4, 5), (3, 2, 2, 3)), {"strides": [3, 2], "auto_pad": "VALID"}),
        (
            ((1, 2, 3, 2, 3), (2, 3, 2, 2, 2), (3,)),
            {"strides": [2, 1, 2], "pads": [0, 1, 0, 1, 0, 1]},
        ),
        (((0, 3, 4, 5), (3, 2, 3, 2)), {"wrt": (0,)}),
    ]
    for options in (options, options | {"const": (1,), "wrt": (0,)})
] + [
    row("ConvTranspose", (2, 3, 4, 5), (3, 2, 3, 3), symbolic=(0,), **options)
    for options in (
        {"strides": [2, 3], "pads": [1, 1, 0, 1], "output_padding": [1, 0]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    )
]

# Empty tensors are left out: onnxruntime 1.31 divides by zero in Einsum itself.
EINSUM = [
    row("Einsum", *shapes, equation=equation, **options)
    for equation, shapes in [
        ("ij,jk->ik", ((2, 3), (3, 4))),
        ("ij,jk", ((2, 3), (3, 4))),
        ("b i d , b j d -> b i j", ((2, 3, 4), (2, 5, 4))),
        ("bhid,bhjd->bhij", ((2, 2, 3, 4), (2, 2, 5, 4))),
        ("ij->ji", ((2, 3),)),
        ("ij->", ((2, 3),)),
        ("ij->i", ((2, 3),)),
        ("ba", ((2, 3),)),
        ("ii->i", ((3, 3),)),
        ("ii", ((3, 3),)),
        ("iij,j->i", ((2, 2, 3), (3,))),
        ("iii->i", ((2, 2, 2),)),
        ("i,j->ij", ((2,), (3,))),
        (",ij->ij", ((), (2, 3))),
        ("ij,jk,kl->il", ((2, 3), (3, 2), (2, 4))),
        ("ij,kl->i", ((2, 3), (3, 4))),
        ("...ij,...jk->...ik", ((4, 1, 2, 3), (1, 5, 3, 2))),
        ("...ij,jk->...ik", ((4, 5, 2, 3), (3, 2))),
        ("...i,...i", ((2, 1, 3), (1, 4, 3))),
        ("i...->...", ((2, 3, 4),)),
        ("...,...->...", ((1, 3), (2, 3))),
    ]
    for options in ({}, {"symbolic": tuple(range(len(shapes)))})
]
# Where ellipses broadcast axes of unknown size, ONNX infers the size of one operand for the result,
# so that a second derivative is misled.
for case in EINSUM:
    if "..." in case.attrs["equation"] and case.symbolic:
        case.second = False

HEADS = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))
ATTENTION = [
    row("Attention", *shapes, opset=opset, **options)
    for opset, shapes, options in [
        (23, HEADS, {}),
        (24, HEADS, {"is_causal": 1}),
        (23, HEADS, {"scale": 0.3}),
        (23, HEADS, {"softcap": 2.0}),
        (23, (*HEADS, (3, 5)), {}),
        (23, (*HEADS, (2, 1, 3, 5)), {"is_causal": 1, "softcap": 3.0}),
        (23, ((2, 4, 3, 4), *HEADS[1:]), {}),
        (23, ((2, 3, 8), (2, 5, 8), (2, 5, 6)), {"q_num_heads": 2, "kv_num_heads": 2}),
        (24, ((2, 3, 16), (2, 5, 8), (2, 5, 6)), {"q_num_heads": 4, "kv_num_heads": 2}),
        (23, (*HEADS, None, (2, 2, 2, 4), (2, 2, 2, 3)), {"outputs": 3}),
        (23, HEADS, {"symbolic": (0, 1, 2)}),
        (24, HEADS, {"symbolic": (0, 1, 2), "is_causal": 1}),
    ]
]
ATTENTION.append(
    Case("Attention", [*(r(s) for s in HEADS), r((3, 5)) > -0.5], opset=23, name="boolean mask")
)
CASES = MATMUL + GEMM + CONV + CONV_TRANSPOSE + EINSUM + ATTENTION


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projection(case: Case) -> None:
    check(case)


def test_matmul_closed_form() -> None:
    a, b, g = r((2, 3)), r((3, 4)), r((2, 4))
    back = gradient(load(make_model(Case("MatMul", [a, b]))), "y0", ["x0", "x1"])
    _, ga, gb = evaluate(back, {"x0": a, "x1": b, "cotangent": g})
    np.testing.assert_allclose(ga, g @ b.T, rtol=1e-12)
    np.testing.assert_allclose(gb, a.T @ g, rtol=1e-12)


@pytest.mark.parametrize("case", [c for c in CONV if c.const], ids=str)
def test_conv_by_phases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows above have few channels, which onnxruntime's transposed convolution does faster."""
    monkeypatch.setattr(window, "_BLOCK", 0)
    check(case)


@pytest.mark.parametrize("strides", [[1, 1], [2, 2]])
def test_few_channels_take_a_transposed_convolution(strides: list[int]) -> None:
    def operators(channels: int) -> list[str]:
        shapes = (1, channels, 8, 8), (16, channels, 3, 3)
        case = row("Conv", *shapes, strides=strides, pads=[1, 1, 1, 1], const=(1,))
        return [n.op_type for n in gradient(load(make_model(case)), "y0", ["x0"]).graph]

    assert "ConvTranspose" in operators(8)
    assert "ConvTranspose" not in operators(9)


def test_known_strides_need_no_transposed_convolution() -> None:
    """Plain convolutions are onnxruntime's fast path: a strided layer is split into phases."""
    case = row("Conv", (1, 16, 8, 8), (4, 16, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], const=(1,))
    kinds = [n.op_type for n in gradient(load(make_model(case)), "y0", ["x0"]).graph]
    assert "ConvTranspose" not in kinds
    assert kinds.count("Conv") == 5  # the layer and four phases


def test_weights_are_stored_once() -> None:
    case = row("Conv", (1, 16, 8, 8), (16, 16, 3, 3), pads=[1, 1, 1, 1], const=(1,))
    back = gradient(load(make_model(case)), "y0", ["x0"])
    stored = sum(v.const_value.nbytes for v in back.graph.initializers.values())
    assert stored < 1.5 * 16 * 16 * 9 * 8


def test_output_shape_of_unknown_input_is_refused() -> None:
    case = row(
        "ConvTranspose",
        (2, 3, 4, 5),
        (3, 2, 3, 3),
        strides=[2, 2],
        output_shape=[8, 10],
        symbolic=(0,),
    )
    with pytest.raises(UnsupportedModelError, match=r"output_shape.*unknown"):
        gradient(load(make_model(case)), "y0", ["x0"])
