"""What the training scripts share: seeding, fitting, exporting, checking."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

SCOPES = "pkg.torch.onnx.name_scopes"
MAX_BYTES = 300_000


def seed_everything(seed: int) -> None:
    """Make training repeatable: fixed seed, deterministic kernels, one thread."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of a parallel sum depends on the thread count


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    lr: float,
    batch: int = 64,
    weight_decay: float = 1e-2,
    label_smoothing: float = 0.0,
    augment: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Train ``net`` on ``x`` [N, ...] and class numbers ``y`` [N], and leave it in eval mode."""
    batches = math.ceil(len(x) / batch)
    steps = epochs * batches
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    net.train()
    for step in range(steps):
        start = step * batch % (batches * batch)
        if start == 0:
            order = torch.randperm(len(x))
        rows = order[start : start + batch]
        optimizer.zero_grad()
        loss(net(augment(x[rows])), y[rows]).backward()
        optimizer.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows of ``x`` whose largest logit is the class in ``y``."""
    return float((net(x).argmax(1) == y).double().mean())


def export(
    net: nn.Module,
    example: Tensor,
    path: Path,
    *,
    input_name: str,
    dynamic: dict[int, str],
    dynamo: bool = False,
) -> None:
    """Write ``net`` as ``path`` and prove that onnxruntime answers as PyTorch does.

    ``example`` needs at least five rows; ``dynamic`` names the input's dynamic axes, 0 among them.
    """
    inputs, outputs = [input_name], ["logits"]
    if dynamo:
        # Unoptimized, so that BatchNormalization stays; weights in the file, not beside it.
        torch.onnx.export(
            net, (example,), path, input_names=inputs, output_names=outputs, opset_version=18,
            dynamo=True, optimize=False, external_data=False, verbose=False,
            dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in dynamic.items()},),
        )  # fmt: skip
    else:
        # PRESERVE: with EVAL the exporter folds BatchNormalization into the convolution, whatever
        # do_constant_folding says. The net is in eval mode, so both mean inference.
        torch.onnx.export(
            net, (example,), path, input_names=inputs, output_names=outputs, opset_version=17,
            dynamo=False, do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE,
            dynamic_axes={input_name: dynamic, "logits": {0: dynamic[0]}},
        )  # fmt: skip
    model = onnx.load(path)
    anonymize(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    _report(net, example, path, input_name)


def anonymize(message: Message) -> None:
    """Drop doc strings and metadata other than layer scopes: exporters put file paths there."""
    if "metadata_props" in message.DESCRIPTOR.fields_by_name:
        kept = [p for p in message.metadata_props if p.key == SCOPES]
        message.ClearField("metadata_props")
        message.metadata_props.extend(kept)
    if "doc_string" in message.DESCRIPTOR.fields_by_name:
        message.ClearField("doc_string")
    for field, value in message.ListFields():
        if field.message_type:
            for child in [value] if isinstance(value, Message) else value:
                anonymize(child)


@torch.no_grad()
def _report(net: nn.Module, example: Tensor, path: Path, input_name: str) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    gaps = []
    for rows in (1, 5):
        x = example[:rows]
        (logits,) = session.run(["logits"], {input_name: x.numpy()})
        np.testing.assert_allclose(logits, net(x).numpy(), rtol=1e-4, atol=1e-4)
        gaps.append(float(np.abs(logits - net(x).numpy()).max()))
    size = path.stat().st_size
    if size >= MAX_BYTES:
        raise RuntimeError(f"{path.name} has {size} bytes; the limit is {MAX_BYTES}")
    print(f"{path.name}: {size} bytes, largest difference from PyTorch {max(gaps):.1e}")
