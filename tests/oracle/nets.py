"""Seeded PyTorch networks, whole and non-degenerate with random weights, and their ONNX files.

The oracle tests and the benchmark share them: :func:`build` makes a network, :func:`example` its
inputs, :func:`export` its file.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Exporter = Literal["torchscript", "dynamo"]

_DECLARED: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, which timm, captum and onnx2torch need, even where its compiled half is
    missing (its wheel was built for another PyTorch): declare the two operators it registers
    shapes for. No network here calls them."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)  # the declarations go when the library object goes
        import torchvision  # noqa: F401


class MLP(nn.Module):
    """Tanh and ReLU layers: [N, features] -> [N, classes]."""

    def __init__(self, classes: int, features: int = 8, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SmallCNN(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and max pooling: [N, 1, 16, 16] -> [N, classes].

    The second pooling has overlapping windows."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1)
        self.head = nn.Linear(16 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.bn1(self.conv1(x)).relu())
        x = self.pool2(self.bn2(self.conv2(x)).relu())
        return self.head(x.flatten(1))


class MultiInput(nn.Module):
    """An image and a table row, joined by a gate: [N, 3, 16, 16], [N, 5] -> [N, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.table = nn.Linear(5, 8)
        self.head = nn.Linear(16, classes)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        seen = nn.functional.gelu(self.conv(image)).mean((2, 3))
        known = self.table(row)
        return self.head(torch.cat([seen * known.sigmoid(), known.tanh()], 1))


class TransformerClassifier(nn.Module):
    """Tokens through torch's TransformerEncoder: ids [N, 12], 0 for padding -> [N, classes]."""

    def __init__(self, classes: int, vocabulary: int = 50, width: int = 32, length: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        x = self.encoder(self.embedding(ids) + self.position, src_key_padding_mask=padding)
        kept = (~padding).to(x.dtype).unsqueeze(-1)
        return self.head((x * kept).sum(1) / kept.sum(1))


def _timm(name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    def make(size: int, classes: int) -> nn.Module:
        import_torchvision()
        import timm

        sized = {k: v(size) if callable(v) else v for k, v in options.items()}
        return timm.create_model(name, pretrained=False, num_classes=classes, **sized)

    return make


# name -> (what makes it of image size and classes, the smallest image size that keeps its shape)
IMAGE_NETS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "resnet18": (_timm("resnet18"), 64),
    # 7x7 features enter its head, so nothing below 224; a narrow head saves 400 MB
    "vgg11": (_timm("vgg11", mlp_ratio=1 / 16), 224),
    "mobilenetv3_large_100": (_timm("mobilenetv3_large_100"), 64),
    "efficientnet_b0": (_timm("efficientnet_b0"), 64),
    "densenet121": (_timm("densenet121"), 64),
    "convnext_tiny": (_timm("convnext_tiny"), 64),
    "vit_tiny_patch16_224": (_timm("vit_tiny_patch16_224", img_size=lambda size: size), 64),
    # windows of 4 keep shifted windows at 64x64; the published 7 comes with 224
    "swin_tiny_patch4_window7_224": (
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=lambda size: size,
            window_size=lambda size: 7 if size % 224 == 0 else 4,
        ),
        64,
    ),
}
SMALL_NETS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": MLP,
    "table": functools.partial(MLP, features=100, width=128),
    "small_cnn": SmallCNN,
    "multi_input": MultiInput,
    "transformer": TransformerClassifier,
}
_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "mlp": [(8,)],
    "table": [(100,)],
    "small_cnn": [(1, 16, 16)],
    "multi_input": [(3, 16, 16), (5,)],
}
NETS = (*IMAGE_NETS, *SMALL_NETS)


def build(name: str, *, size: int | None = None, classes: int = 10, seed: int = 0) -> nn.Module:
    """A network in eval mode, float32, the same for the same seed, its parameters frozen.

    Every parameter is drawn anew, so that no gain is zero or 1e-6 and attention is not uniform,
    and batch-norm statistics are those of random images, so that signals and gradients neither
    vanish nor explode. `size` is the image size (IMAGE_NETS only; default: the smallest sensible).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in IMAGE_NETS:
            make, smallest = IMAGE_NETS[name]
            net = make(size or smallest, classes)
        else:
            net = SMALL_NETS[name](classes)
        net.eval().requires_grad_(False)
        for path, p in net.named_parameters():
            if path.endswith("bias"):
                nn.init.normal_(p, std=0.1)
            elif p.ndim == 1:  # gains of normalizations and layer scales
                nn.init.uniform_(p, 0.5, 1.5)
            else:
                nn.init.normal_(p, std=math.sqrt(2 / p[0].numel()))
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
            norm.momentum = None  # statistics of the one batch that follows, not a running mix
        if norms:
            with torch.no_grad():
                net(*example(name, 8, size=size, seed=seed))
        return net.eval()


def example(name: str, n: int = 2, *, size: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs for a network, `n` examples, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if name == "transformer":
        ids = torch.randint(1, 50, (n, 12), generator=generator)
        ids[::2, 9:] = 0  # every other text is shorter
        return (ids,)
    if name in IMAGE_NETS:
        size = size or IMAGE_NETS[name][1]
        shapes: list[tuple[int, ...]] = [(3, size, size)]
    else:
        shapes = _SHAPES[name]
    return tuple(torch.randn(n, *shape, generator=generator) for shape in shapes)


def export(
    module: nn.Module,
    args: tuple[Tensor, ...],
    path: str | os.PathLike[str],
    exporter: Exporter = "torchscript",
    opset: int | None = None,
    dynamic: bool = True,
) -> None:
    """Write `module` as an ONNX file with inputs named as forward's parameters and output `logits`.

    `dynamic` leaves the number of examples open (then `args` must hold at least two);
    the default opset is 17 (torchscript) or 18 (dynamo, the least it writes without conversion).
    """
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    options: dict[str, Any]
    if exporter == "dynamo":
        batch = torch.export.Dim("N")
        shapes = tuple({0: batch} for _ in args) if dynamic else None
        options = {"dynamic_shapes": shapes, "external_data": False, "verbose": False}
    else:
        axes = {name: {0: "N"} for name in (*names, "logits")} if dynamic else None
        options = {"dynamic_axes": axes}
    # torch's fused encoder kernel has no ONNX form
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                args,
                os.fspath(path),
                input_names=names,
                output_names=["logits"],
                opset_version=opset or (18 if exporter == "dynamo" else 17),
                dynamo=exporter == "dynamo",
                **options,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
