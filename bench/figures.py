"""The measurements: each compares the numbers first, then times them, then writes its figures."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import onnxplain as ox
from bench import networks, perturbation
from bench.measure import Disagreement, Report, Times, agree, fresh_result, interleave, seconds
from bench.methods import LAYERS, ROWS, captum_call, onnxplain_call
from bench.networks import Skip
from bench.tasks import captum_ig, onnxplain_ig

NETWORKS = ("resnet18", "mobilenetv3_large_100", "vit_tiny_patch16_224")
TARGET = 3
MEGA = 1e6
# Along 50 steps every example meets kinks; Captum's own float32 and float64 differ by 1.3e-3.
IG_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int = 15
    long_rounds: int = 5
    size: int = 224
    batches: tuple[int, ...] = (1, 8)
    n_steps: int = 50
    ig_images: tuple[int, ...] = (1, 4)
    internal_batch_sizes: tuple[int, ...] = (4, 8, 16, 25, 50, 100)
    processes: int = 5
    method_steps: int = 25
    method_batches: tuple[int | None, ...] = (2, 4, 10, 25, 50)
    noise_batches: tuple[int | None, ...] = (1, 2, 5, None)
    growth: tuple[int, ...] = (8, 32)
    growth_limit: int = 1000 * 10**6
    rows: int = 10_000
    memory_limit: int = 512 * 10**6
    exporter: str = "torchscript"
    perturb_rounds: int = 3
    masks: int = 2000
    coalitions: int = 1000
    many: int = 100_000
    evaluation_batches: tuple[int, ...] = (4, 8, 16, 32)
    captum_batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    tool_batches: tuple[int, ...] = (10, 100)
    quick: bool = False


QUICK = Scale(
    rounds=1, long_rounds=1, size=64, batches=(1, 2), n_steps=4, ig_images=(1, 2),
    internal_batch_sizes=(2, 4), processes=1, rows=300, method_steps=3, method_batches=(6,),
    noise_batches=(2,), growth=(3,), perturb_rounds=1, masks=20, coalitions=120, many=2000,
    evaluation_batches=(8,), captum_batches=(4,), tool_batches=(10,), quick=True,
)  # fmt: skip


def both_passes(name: str, batch: int, report: Report, scale: Scale) -> None:
    """Forward, and forward + input gradient, against PyTorch eager and bare onnxruntime."""
    prefix = f"network/{name}/{batch}"
    onnx_file, torch_file = networks.network(name, scale.size, scale.exporter)
    import torch

    model, module = networks.model(onnx_file), networks.torch_module(torch_file)
    session, saliency = networks.bare(onnx_file), ox.Saliency(model)

    def torch_forward(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(x)).numpy()

    def torch_gradient(x: np.ndarray) -> np.ndarray:
        leaf = torch.from_numpy(x).requires_grad_()
        (gradient,) = torch.autograd.grad(module(leaf)[:, TARGET].sum(), leaf)
        return gradient.numpy()

    contenders: dict[str, Callable[[np.ndarray], Any]] = {
        "forward": lambda x: model(x)["logits"],
        "gradient": lambda x: saliency.attribute(x, target=TARGET, abs=False),
        "torch forward": torch_forward,
        "torch gradient": torch_gradient,
        "bare forward": lambda x: session.run(None, {"x": x}),
    }
    # One example alone can't be told from one whose ReLU fell on its other side.
    batches = networks.images(max(batch, 4), scale.size).reshape(-1, batch, 3, *[scale.size] * 2)
    errors = {
        what: agree(
            f"{prefix}/{what}",
            np.concatenate([contenders[what](x) for x in batches]),
            np.concatenate([contenders[f"torch {what}"](x) for x in batches]),
        )
        for what in ("forward", "gradient")
    }
    times = interleave(
        {name: partial(call, batches[0]) for name, call in contenders.items()}, scale.rounds
    )
    for what, target in (("forward", None), ("gradient", "ratio < 1")):
        report.figure(
            f"{prefix}/{what}",
            **times.milliseconds(what, f"torch {what}"),
            baseline="PyTorch eager, 2 threads",
            target=target,
            relative_error=errors[what],
        )
    _gradient_over_forward(
        report, prefix, times, "ratio <= 2.6" if (name, batch) == ("resnet18", 8) else None
    )


def _gradient_over_forward(report: Report, prefix: str, times: Times, target: str | None) -> None:
    """Against the faster of the two forward passes: our own, and bare onnxruntime's."""
    faster = min("forward", "bare forward", key=lambda name: times.median(name))
    report.figure(
        f"{prefix}/gradient-over-forward",
        **times.milliseconds("gradient", faster),
        baseline="onnxruntime alone" if faster == "bare forward" else "onnxplain's forward pass",
        target=target,
        ratio_to_own_forward=times.ratio("gradient", "forward"),
        ratio_to_onnxruntime_forward=times.ratio("gradient", "bare forward"),
    )


def mnist8(report: Report, scale: Scale) -> None:
    """One row of a small convolutional net from ONNX's model zoo."""
    file = networks.MNIST8 / "mnist-8.onnx"
    if not file.exists():
        raise Skip("the file ../shared/models/mnist8/mnist-8.onnx is not there")
    x = np.load(networks.MNIST8 / "test_data_0.npz")["inputs"].reshape(1, 1, 28, 28)
    # On a flat background the maxima of pooling tie: no finite difference is the derivative there.
    x = x + np.random.default_rng(0).random(x.shape, np.float32)
    _small_model("mnist8", file, x, report, scale, limit=4)


def overhead(report: Report, scale: Scale) -> None:
    """One row of a net so small that what is left is onnxplain's own time."""
    x = np.loadtxt(networks.PATIENTS, np.float32, delimiter=",", skiprows=1)[:1]
    _small_model("overhead", networks.TINY, x, report, scale, limit=None)


def _small_model(
    name: str, file: Path, x: np.ndarray, report: Report, scale: Scale, limit: float | None
) -> None:
    """One row: gradient over forward, and both against onnxruntime running the same graphs."""
    target = 1
    model, session = networks.model(file), networks.bare(file)
    saliency = ox.Saliency(model)
    explained = model.output.name or ""
    (given,) = (i.name for i in session.get_inputs())
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "gradient.onnx"
        ox.differentiate(model, explained, [given]).save(written)
        backward = networks.bare(written)
    cotangent = np.zeros_like(model(x)[explained])
    cotangent[:, target] = 1
    feeds = {given: x, "cotangent": cotangent}

    gradient = saliency.attribute(x, target=target, abs=False)
    agree(f"{name}/forward", model(x)[explained], session.run([explained], {given: x})[0])
    agree(f"{name}/gradient", gradient, backward.run([f"{given}.grad"], feeds)[0])
    error = networks.directional_error(file, x, target, gradient)
    if not error < 1e-2:
        raise Disagreement(f"{name}: gradient and finite difference differ by {error}")
    times = interleave(
        {
            "forward": lambda: model(x),
            "gradient": lambda: saliency.attribute(x, target=target, abs=False),
            "bare forward": lambda: session.run(None, {given: x}),
            "bare gradient": lambda: backward.run(None, feeds),
        },
        scale.rounds,
    )
    for what in ("forward", "gradient"):
        fields = times.milliseconds(what, f"bare {what}")
        report.figure(
            f"{name}/{what}",
            **fields,
            baseline="onnxruntime alone, same graph",
            own_ms=fields["value"] - fields["baseline_value"],
        )
    for figure, prefix, baseline in (
        ("gradient-over-forward", "", "onnxplain's forward pass"),
        ("gradient-over-forward/graphs", "bare ", "the forward graph, onnxruntime alone for both"),
    ):
        report.figure(
            f"{name}/{figure}",
            **times.milliseconds(f"{prefix}gradient", f"{prefix}forward"),
            baseline=baseline,
            target=None if limit is None else f"ratio <= {limit:g}",
        )


def integrated_gradients(images: int, report: Report, scale: Scale) -> None:
    """Against Captum, on the module itself and on what onnx2torch makes of the file."""
    prefix = f"integrated-gradients/{images}"
    networks.require("captum")
    onnx_file, torch_file = networks.network("resnet18", scale.size, scale.exporter)
    x = networks.images(images, scale.size)
    run = onnxplain_ig(networks.model(onnx_file), x, TARGET, scale.n_steps)
    attributions = run()

    modules = {"captum": networks.torch_module(torch_file)}
    try:
        modules["onnx2torch+captum"] = networks.converted_module(onnx_file)
    except Skip as reason:
        report.skip(f"{prefix}/onnx2torch+captum", str(reason))
    contenders = {"onnxplain": run}
    sizes: dict[str, int | None] = {"onnxplain": None}
    searched: dict[str, dict[str, float]] = {}
    for tool, module in modules.items():
        calls = {
            size: captum_ig(module, x, TARGET, scale.n_steps, size)
            for size in scale.internal_batch_sizes
        }
        agree(f"{prefix}/{tool}", attributions, calls[min(calls)](), IG_TOLERANCE)
        found = {size: min(seconds(call) for _ in range(2)) for size, call in calls.items()}
        sizes[tool] = best = min(found, key=found.__getitem__)
        contenders[tool] = calls[best]
        searched[tool] = {str(k): v for k, v in found.items()}

    times = interleave(contenders, scale.long_rounds)
    memory = {
        tool: _ig_memory(tool, torch_file if tool == "captum" else onnx_file, x, size, scale)
        for tool, size in sizes.items()
    }
    for tool, (_, got) in memory.items():
        agree(f"{prefix}/{tool}/memory", attributions, got, IG_TOLERANCE)
    for tool in modules:
        baseline = f"{tool}, internal_batch_size={sizes[tool]}"
        report.figure(
            f"{prefix}/time/{tool}",
            **times.milliseconds("onnxplain", tool),
            baseline=baseline,
            target="ratio <= 0.6667" if tool == "captum" else None,
            speedup=1 / times.ratio("onnxplain", tool),
            searched_seconds=searched[tool],
        )
        ours, theirs = memory["onnxplain"][0], memory[tool][0]
        report.figure(
            f"{prefix}/memory/{tool}",
            ours["peak"] / MEGA,
            "MB",
            ratio=ours["peak"] / theirs["peak"],
            baseline=baseline,
            baseline_value=theirs["peak"] / MEGA,
            above_loaded=(ours["peak"] - ours["before"]) / MEGA,
            baseline_above_loaded=(theirs["peak"] - theirs["before"]) / MEGA,
        )


def _ig_memory(
    tool: str, file: Path, x: np.ndarray, internal_batch_size: int | None, scale: Scale
) -> tuple[dict[str, float], np.ndarray]:
    return fresh_result(
        "integrated_gradients", x, tool=tool, file=str(file), target=TARGET,
        n_steps=scale.n_steps, internal_batch_size=internal_batch_size,
    )  # fmt: skip


def method(name: str, network: str, report: Report, scale: Scale) -> None:
    """One row of the table of methods against Captum at its fastest batch size."""
    prefix, row = f"method/{network}/{name}", ROWS[name]
    networks.require("captum")
    if network in row.skip:
        raise Skip(row.skip[network])
    if not hasattr(ox, row.cls):
        raise Skip(f"onnxplain has no {row.cls} yet")
    onnx_file, torch_file = networks.network(network, scale.size, scale.exporter)
    model, module = networks.model(onnx_file), networks.torch_module(torch_file)
    x = networks.images(row.images, scale.size)
    sized: dict[str, Any] = {"n_steps": scale.method_steps} if row.grows == "n_steps" else {}
    if "neuron_selector" in row.options:
        sized["neuron_selector"] = _active_neuron(model, LAYERS[network]["layer"], x)
    ours = partial(onnxplain_call, row, network, model)
    theirs = partial(captum_call, row, network, module)

    compared = {**sized, **row.check}
    at = x[:1] if "baselines" in row.check else x
    run = onnxplain_call(row, network, model, at, **compared)
    try:
        want = captum_call(row, network, module, at, **compared)()
    except (AssertionError, TypeError, RuntimeError, NotImplementedError) as error:
        raise Skip(f"Captum's {row.cls} can't on {network}: {str(error)[:200]}") from error
    error = None if row.apart else agree(prefix, run(), want, IG_TOLERANCE)

    tried: dict[int | None, Callable[[], Any]] = {None: theirs(x, **sized)}
    if row.batch:
        sizes = scale.method_batches if row.grows == "n_steps" else scale.noise_batches
        tried = {size: theirs(x, **sized, **{row.batch: size}) for size in sizes}
    found = {}
    if len(tried) > 1:
        found = {size: min(seconds(call) for _ in range(2)) for size, call in tried.items()}
    best = min(found, key=found.__getitem__) if found else next(iter(tried))
    contenders = {"onnxplain": ours(x, **sized), "captum": tried[best]}
    times = interleave(contenders, scale.long_rounds)
    report.figure(
        prefix,
        **times.milliseconds("onnxplain", "captum"),
        baseline="captum" + (f", {row.batch}={best}" if row.batch else ""),
        target="speedup >= 1.5",
        speedup=1 / times.ratio("onnxplain", "captum"),
        images=row.images,
        relative_error=error,
        not_compared=row.apart,
        searched_seconds={str(k): v for k, v in found.items()} or None,
    )


def _active_neuron(model: ox.Model, layer: str, x: np.ndarray) -> tuple[int, ...]:
    """A neuron that is active for every image: a dead one has no gradient to compare."""
    least = ox.LayerActivation(model, layer).attribute(x).min(axis=0)
    return tuple(int(k) for k in np.unravel_index(least.argmax(), least.shape))


def growth(name: str, report: Report, scale: Scale) -> None:
    """Peak memory of a fresh process by the number of steps or samples, ResNet-18, one image.

    Ours under a memory limit; Captum's as it is called by default, all of them at once.
    """
    row = ROWS[name]
    networks.require("captum")
    if not hasattr(ox, row.cls) or (row.noise and not hasattr(ox, "NoiseTunnel")):
        raise Skip(f"onnxplain has no {row.cls} yet")
    onnx_file, torch_file = networks.network("resnet18", scale.size, scale.exporter)
    x = networks.images(1, scale.size)
    for count in scale.growth:
        peaks = {}
        for tool, file in (("onnxplain", onnx_file), ("captum", torch_file)):
            reported, _ = fresh_result(
                "method_memory", x, tool=tool, file=str(file), row=name, count=count,
                memory_limit=scale.growth_limit,
            )  # fmt: skip
            peaks[tool] = reported["peak"]
        report.figure(
            f"memory/{name}/{count}",
            peaks["onnxplain"] / MEGA,
            "MB",
            ratio=peaks["onnxplain"] / peaks["captum"],
            baseline="captum, all at once",
            baseline_value=peaks["captum"] / MEGA,
            target=f"value <= {scale.growth_limit / MEGA:g}",
            **{row.grows or "count": count},
        )


def first_gradient(report: Report, scale: Scale) -> None:
    """From a path to the first gradient of ResNet-18, in a fresh process each time."""
    onnx_file, _ = networks.network("resnet18", scale.size, scale.exporter)
    x = networks.images(1, scale.size)
    want = ox.Saliency(networks.model(onnx_file)).attribute(x, target=TARGET, abs=False)
    spent = []
    for _ in range(scale.processes):
        reported, gradient = fresh_result("first_gradient", x, file=str(onnx_file), target=TARGET)
        agree("first-gradient", gradient, want)
        spent.append(reported)
    for name, target, parts in (
        ("first-gradient", "value < 3", ("gradient",)),
        ("first-gradient/with-import", None, ("import", "gradient")),
    ):
        sums = [sum(s[part] for part in parts) for s in spent]
        report.figure(name, statistics.median(sums), "s", target=target, min=min(sums))


def many_digits(method: str, report: Report, scale: Scale) -> None:
    """Many rows under a memory limit that bounds the whole process."""
    name = f"digits/{method}"
    x = networks.digits(scale.rows)
    reported, attributions = fresh_result(
        "explain_many", x, method=method, file=str(networks.DIGITS), target=TARGET,
        memory_limit=scale.memory_limit,
    )  # fmt: skip
    rows = np.r_[0:20, scale.rows - 20 : scale.rows]
    agree(name, attributions[rows], _by_hand(method, networks.model(networks.DIGITS), x[rows]))
    report.figure(
        name,
        reported["peak"] / MEGA,
        "MB",
        target=f"value <= {scale.memory_limit / MEGA:g}",
        rows=scale.rows,
        rows_per_second=scale.rows / reported["seconds"],
    )


def _by_hand(method: str, model: ox.Model, x: np.ndarray) -> np.ndarray:
    """What a method attributes, put together from plain gradients of one row at a time."""

    def gradient(at: np.ndarray) -> np.ndarray:
        rows = [ox.Saliency(model).attribute(r[None], target=TARGET, abs=False) for r in at]
        return np.concatenate(rows)

    if method == "Saliency":
        return np.abs(gradient(x))
    nodes, weights = np.polynomial.legendre.leggauss(50)  # Captum's default rule and steps
    path = (
        w / 2 * gradient(((1 + t) / 2 * x).astype(x.dtype))
        for t, w in zip(nodes, weights, strict=True)
    )
    return x * sum(path)


def units(scale: Scale) -> dict[str, Callable[[Report, Scale], None]]:
    """Every measurement by name."""
    return {
        **{
            f"network/{name}/{batch}": partial(both_passes, name, batch)
            for name in NETWORKS
            for batch in scale.batches
        },
        "mnist8": mnist8,
        **{f"integrated-gradients/{n}": partial(integrated_gradients, n) for n in scale.ig_images},
        **{
            f"method/{network}/{name}": partial(method, name, network)
            for network in LAYERS
            for name in ROWS
        },
        **{f"memory/{k}": partial(growth, k) for k, row in ROWS.items() if row.grows},
        "first-gradient": first_gradient,
        **{f"digits/{m}": partial(many_digits, m) for m in ("Saliency", "IntegratedGradients")},
        "overhead": overhead,
        **perturbation.units(scale),
    }
