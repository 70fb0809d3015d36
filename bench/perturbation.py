"""The perturbation family: what masks cost beside the model, and other tools doing the same."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import onnxplain as ox
from bench import networks
from bench.measure import Report, agree, fresh_result, interleave, seconds
from bench.networks import Skip

if TYPE_CHECKING:
    from bench.figures import Scale

TARGET = 3
MEGA = 1e6
CELLS, KEEP = 7, 0.5
FEW = 250  # samples in quick mode: as many as a regression on 100 features needs
DRAWN = "other samples are drawn; tests/oracle compares the two on the same ones"
Call = Callable[[], Any]


def squares(size: int, across: int, channels: int = 1) -> np.ndarray:
    """Segments of a picture: int64 [1, channels, size, size], `across` squares along each side."""
    line = np.arange(size) * across // size
    return np.broadcast_to(line[:, None] * across + line, (1, channels, size, size)).copy()


def counted(call: Callable[[Any], Any], outputs: int = 1000) -> int:
    """How many evaluations a call takes (equal coalitions are evaluated once)."""
    rows = 0

    def count(x: np.ndarray) -> np.ndarray:
        nonlocal rows
        rows += len(x)
        return np.zeros((len(x), outputs), np.float32)

    call(ox.BlackBox(count))
    return rows


# --------------------------------------------------------------- beside bare evaluations


def _rise(model: Any, x: np.ndarray, scale: Scale) -> Any:
    return ox.RISE(model).attribute(
        x, target=TARGET, num_masks=scale.masks, num_cells=CELLS, seed=0
    )


def _kernel_shap(model: Any, x: np.ndarray, scale: Scale) -> Any:
    mask = squares(x.shape[-1], 7)
    return ox.KernelShap(model).attribute(
        x, target=TARGET, feature_mask=mask, n_samples=scale.coalitions, seed=0
    )


def _occlusion(model: Any, x: np.ndarray, scale: Scale) -> Any:
    return ox.Occlusion(model).attribute(
        x, target=TARGET, sliding_window_shapes=(x.shape[1], 16, 16), strides=(x.shape[1], 8, 8)
    )


OVERHEAD: dict[str, Callable[[Any, np.ndarray, Any], Any]] = {
    "rise": _rise, "kernel-shap": _kernel_shap, "occlusion": _occlusion
}  # fmt: skip


def overhead(name: str, report: Report, scale: Scale) -> None:
    """A method on ResNet-18 beside as many evaluations of it alone, at the best batch size."""
    onnx_file, _ = networks.network("resnet18", scale.size, scale.exporter)
    model, x = networks.model(onnx_file), networks.images(1, scale.size)
    call = partial(OVERHEAD[name], model, x, scale)
    count = scale.masks
    if name != "rise":  # of which no two masks are equal
        count = counted(lambda box: OVERHEAD[name](box, x, scale))
    bare, batch = bare_evaluations(onnx_file, x, count, scale)
    times = interleave({"onnxplain": call, "bare": bare}, scale.perturb_rounds)
    report.figure(
        f"perturb/overhead/{name}",
        **times.milliseconds("onnxplain", "bare"),
        baseline=f"onnxruntime alone, {count} evaluations, batches of {batch}",
        target="ratio <= 1.05",
        evaluations=count,
    )


def bare_evaluations(file: Path, x: np.ndarray, count: int, scale: Scale) -> tuple[Call, int]:
    """That many evaluations by onnxruntime alone, in the batches that it is fastest with."""
    session = networks.bare(file)
    (given,) = (i.name for i in session.get_inputs())

    def evaluate(batch: int, rows: int) -> None:
        full = np.repeat(x[:1], batch, axis=0)
        for start in range(0, rows, batch):
            session.run(None, {given: full[: rows - start]})

    found = {}
    for batch in scale.evaluation_batches:
        rows = min(count, 2 * max(scale.evaluation_batches))
        evaluate(batch, batch)
        found[batch] = min(seconds(partial(evaluate, batch, rows)) for _ in range(3))
    best = min(found, key=found.__getitem__)
    return partial(evaluate, best, count), best


# ------------------------------------------------------------------------------- Captum

# By network: a layer and a neuron of it, segments along a side, samples, classes, examples.
LAYERS = {"resnet18": "layer3", "small_cnn": "pool2", "table": "layers.2"}
NEURONS = {"resnet18": (5, 3, 3), "small_cnn": (5, 2, 2), "table": (5,)}
SEGMENTS = {"resnet18": 7, "small_cnn": 8}
SAMPLES = {"resnet18": 200, "small_cnn": 500, "table": 500}
CLASSES = {"resnet18": 1000, "small_cnn": 10, "table": 10}
IMAGES = {"resnet18": 1, "small_cnn": 8, "table": 20}


@dataclass(frozen=True)
class Row:
    """A method's call, the same in either library.

    Attributes:
        cls: the class.
        options: arguments of `attribute`; functions are called with the network's name and inputs.
        layer: whether it is made with a layer.
        images: how many are explained, at least.
        drawn: whether it draws samples, so that results are not compared.
    """

    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layer: bool = False
    images: int = 1
    drawn: bool = False


def _segments(network: str, x: np.ndarray) -> np.ndarray | None:
    return squares(x.shape[-1], SEGMENTS[network]) if network in SEGMENTS else None


def _few(network: str, x: np.ndarray) -> np.ndarray:
    """Four groups where an evaluation takes long, else five: Captum takes every permutation."""
    if network in SEGMENTS:
        return np.minimum(squares(x.shape[-1], 2 if network == "resnet18" else 3), 4)
    return np.arange(x.shape[1])[None] % 5


def _channels(network: str, x: np.ndarray) -> np.ndarray | None:
    """Channels of the layer in groups; single units of a table's layer."""
    count = {"resnet18": 256, "small_cnn": 16}.get(network)
    return None if count is None else (np.arange(count) // 8).reshape(1, -1, 1, 1)


def _window(network: str, x: np.ndarray) -> tuple[int, ...]:
    if x.ndim == 2:
        return (2,)
    return (x.shape[1], *[x.shape[-1] // SEGMENTS[network]] * 2)


def _samples(share: float) -> Callable[[str, np.ndarray], int]:
    return lambda network, x: max(2, round(SAMPLES[network] * share))


_MASK = {"feature_mask": _segments}
ROWS: dict[str, Row] = {
    "feature-ablation": Row("FeatureAblation", _MASK),
    "feature-permutation": Row("FeaturePermutation", _MASK, images=4, drawn=True),
    "occlusion": Row(
        "Occlusion", {"sliding_window_shapes": _window, "strides": lambda n, x: _window(n, x)}
    ),
    "shapley-values": Row("ShapleyValues", {"feature_mask": _few}),
    "shapley-value-sampling": Row(
        "ShapleyValueSampling", {**_MASK, "n_samples": _samples(0.02)}, drawn=True
    ),
    "lime": Row("Lime", {**_MASK, "n_samples": _samples(1)}, drawn=True),
    "kernel-shap": Row("KernelShap", {**_MASK, "n_samples": _samples(1)}, drawn=True),
    "layer-feature-ablation": Row(
        "LayerFeatureAblation", {"layer_mask": _channels}, layer=True, images=2
    ),
    "neuron-feature-ablation": Row(
        "NeuronFeatureAblation", {**_MASK, "neuron_selector": lambda n, x: NEURONS[n]}, layer=True
    ),
}


def arguments(row: Row, network: str, x: np.ndarray) -> dict[str, Any]:
    """What a row's `attribute` is called with."""
    found: dict[str, Any] = {"target": TARGET, **row.options}
    if "neuron_selector" in found:
        del found["target"]
    found = {k: v(network, x) if callable(v) else v for k, v in found.items()}
    return {k: v for k, v in found.items() if v is not None}


def inputs(network: str, images: int, size: int) -> np.ndarray:
    """Random inputs of a network, always the same."""
    if network == "resnet18":
        return networks.images(images, size)
    from tests.oracle import nets

    return nets.example(network, images, seed=1)[0].numpy()


def fastest(calls: Mapping[Any, Call], tries: int) -> dict[Any, float]:
    """Seconds of each call, the least of some tries; a single one is not tried."""
    if len(calls) == 1:
        return dict.fromkeys(calls, 0.0)
    return {key: min(seconds(call) for _ in range(tries)) for key, call in calls.items()}


def searched(found: Mapping[Any, float]) -> dict[str, float] | None:
    """What was found by :func:`fastest`, as a field of a figure."""
    return {str(k): v for k, v in found.items()} if len(found) > 1 else None


def against_captum(name: str, network: str, report: Report, scale: Scale) -> None:
    """A method beside Captum at its fastest `perturbations_per_eval`."""
    networks.require("captum")
    import captum.attr as ca
    import torch

    prefix, row = f"perturb/captum/{network}/{name}", ROWS[name]
    if not hasattr(ox, row.cls):
        raise Skip(f"onnxplain has no {row.cls} yet")
    onnx_file, torch_file = networks.network(
        network, scale.size, scale.exporter, classes=CLASSES[network]
    )
    count = max(row.images, 1 if scale.quick else IMAGES[network])
    x = inputs(network, count, scale.size)
    given = arguments(row, network, x)
    if scale.quick and "n_samples" in given:
        given["n_samples"] = min(given["n_samples"], FEW)
    layers = (LAYERS[network],) if row.layer else ()
    explainer = getattr(ox, row.cls)(networks.model(onnx_file), *layers)
    seed = {"seed": 0} if row.drawn else {}
    ours = partial(explainer.attribute, x, **given, **seed)

    module = networks.torch_module(torch_file)
    theirs = getattr(ca, row.cls)(module, *(module.get_submodule(k) for k in layers))
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}

    def captum(at_once: int) -> np.ndarray:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = theirs.attribute(torch.from_numpy(x), **tensors, perturbations_per_eval=at_once)
        return found.numpy()

    error = None if row.drawn else agree(prefix, ours(), captum(scale.captum_batches[0]))
    found = fastest({size: partial(captum, size) for size in scale.captum_batches}, 2)
    best = min(found, key=found.__getitem__)
    times = interleave({"onnxplain": ours, "captum": partial(captum, best)}, scale.perturb_rounds)
    report.figure(
        prefix,
        **times.milliseconds("onnxplain", "captum"),
        baseline=f"captum, perturbations_per_eval={best}",
        target=f"speedup >= {1.5 if network == 'resnet18' else 3}",
        speedup=1 / times.ratio("onnxplain", "captum"),
        relative_error=error,
        not_compared=DRAWN if row.drawn else None,
        examples=len(x),
        searched_seconds=searched(found),
    )


# ------------------------------------------------------------------ DIANNA, shap and lime


def _beside(
    name: str, tool: str, ours: Call, theirs: Mapping[int | None, Call], report: Report,
    scale: Scale, **details: Any,
) -> None:  # fmt: skip
    """One figure against another tool, at the batch size that it is fastest with."""
    found = fastest(theirs, 1)
    best = min(found, key=found.__getitem__)
    times = interleave({"onnxplain": ours, tool: theirs[best]}, scale.perturb_rounds)
    report.figure(
        name,
        **times.milliseconds("onnxplain", tool),
        baseline=tool if best is None else f"{tool}, batch_size={best}",
        target="speedup >= 2",
        speedup=1 / times.ratio("onnxplain", tool),
        searched_seconds=searched(found),
        **details,
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Tools that print or show progress bars don't."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def quietly(call: Callable[..., Any], *given: Any, **options: Any) -> Any:
    with silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*given, **options)


# network -> file, shape of an image, how many masks or samples
PICTURES: dict[str, tuple[str, tuple[int, int, int], int]] = {
    "mnist": ("dianna/mnist_model.onnx", (1, 28, 28), 1000),
    "geometric-shapes": ("dianna/geometric_shapes_model.onnx", (1, 64, 64), 1000),
    "resnet18": ("", (3, 0, 0), 200),
    "resnet8": ("resnet8_cifar10_nhwc/pretrainedResnet.onnx", (32, 32, 3), 1000),
}
SHARED = networks.ROOT.parent / "shared" / "models"
WINE = "wine_xgboost/xgboost_classifier_tree.onnx"


def picture(network: str, scale: Scale) -> tuple[Path, np.ndarray, int]:
    """A network's file, one image [1, ...] of values 0 to 1, and how many samples to take."""
    name, shape, samples = PICTURES[network]
    if network == "resnet18":
        file, _ = networks.network(network, scale.size, scale.exporter)
        shape = (3, scale.size, scale.size)
    elif not (file := SHARED / name).exists():
        raise Skip(f"the file ../shared/models/{name} is not there")
    x = np.random.default_rng(1).random((1, *shape)).astype(np.float32)
    return file, x, min(samples, FEW) if scale.quick else samples


def dianna_rise(network: str, report: Report, scale: Scale) -> None:
    """RISE beside DIANNA's on the same file."""
    networks.require("dianna", "shap", "lime", "xarray")
    from dianna.methods.rise_image import RISEImage

    file, x, masks = picture(network, scale)
    model = networks.model(file)

    def theirs(batch: int) -> Any:
        method = RISEImage(n_masks=masks, feature_res=8, p_keep=KEEP, axis_labels={0: "channels"})
        return quietly(method.explain, str(file), x[0], [0], batch_size=batch)

    _beside(
        f"perturb/dianna/rise/{network}", "dianna",
        lambda: ox.RISE(model).attribute(
            x, target=0, num_masks=masks, num_cells=8, p=KEEP, seed=0
        ),
        {batch: partial(theirs, batch) for batch in scale.tool_batches}, report, scale,
        masks=masks, not_compared=DRAWN,
    )  # fmt: skip


def dianna_kernel_shap(network: str, report: Report, scale: Scale) -> None:
    """KernelSHAP beside DIANNA's on the same file and segments.

    Not on ResNet-18: DIANNA paints each of its 1,000 classes pixel by pixel, for hours.
    """
    networks.require("dianna", "shap", "lime", "xarray")
    from dianna.methods.kernelshap_image import KERNELSHAPImage

    file, x, samples = picture(network, scale)
    model = networks.model(file)
    shown = np.moveaxis(x[0], 0, -1)
    segments = KERNELSHAPImage._segment_image(shown, 50, 10.0, 0)
    mask = np.unique(segments, return_inverse=True)[1].reshape(1, 1, *segments.shape)
    mean = np.broadcast_to(x.mean((2, 3), keepdims=True), x.shape)

    def theirs() -> Any:
        return quietly(
            KERNELSHAPImage(axis_labels={0: "channels"}).explain,
            str(file), x[0], [0], nsamples=samples, n_segments=50,
        )  # fmt: skip

    _beside(
        f"perturb/dianna/kernel-shap/{network}", "dianna",
        lambda: ox.KernelShap(model).attribute(
            x, target=0, baselines=mean, feature_mask=mask, n_samples=samples, seed=0
        ),
        {None: theirs}, report, scale, samples=samples, segments=int(mask.max()) + 1,
        not_compared=DRAWN,
    )  # fmt: skip


def shap_kernel(table: str, report: Report, scale: Scale) -> None:
    """Rows of a table beside shap.KernelExplainer around an onnxruntime session."""
    networks.require("shap")
    import shap

    file, x = tables(table)
    session, model = networks.bare(file), networks.model(file)
    (given,) = (i.name for i in session.get_inputs())
    output = model.output.name or ""
    samples = FEW if scale.quick else 2048
    base, rows = x.mean(0, keepdims=True), x[: 2 if scale.quick else 10]

    def score(z: np.ndarray) -> np.ndarray:
        return session.run([output], {given: z.astype(np.float32)})[0][:, 1]

    def theirs() -> np.ndarray:
        explainer = shap.KernelExplainer(score, base)
        return quietly(explainer.shap_values, rows, nsamples=samples, l1_reg=0, silent=True)

    def ours() -> np.ndarray:
        return ox.KernelShap(model).attribute(
            rows, target=1, baselines=base, n_samples=samples, seed=0
        )

    _beside(
        f"perturb/shap/{table}", "shap.KernelExplainer", ours, {None: theirs}, report, scale,
        rows=len(rows), samples=samples, not_compared=DRAWN,
    )  # fmt: skip


def tables(name: str) -> tuple[Path, np.ndarray]:
    """A file, and rows of the table that its model is about."""
    if name == "breast-cancer":
        return networks.TINY, np.loadtxt(networks.PATIENTS, np.float32, delimiter=",", skiprows=1)
    file = SHARED / WINE
    if not file.exists():
        raise Skip(f"the file ../shared/models/{WINE} is not there")
    networks.require("sklearn")
    from sklearn.datasets import load_wine

    return file, load_wine().data[::15].astype(np.float32)


def lime_picture(network: str, report: Report, scale: Scale) -> None:
    """LIME for images beside the lime package around an onnxruntime session."""
    networks.require("lime")
    from lime.lime_image import LimeImageExplainer

    file, x, samples = picture(network, scale)
    session, model = networks.bare(file), networks.model(file)
    (given,) = (i.name for i in session.get_inputs())
    channels_last = x.shape[-1] == 3
    image = (x[0] if channels_last else np.moveaxis(x[0], 0, -1)).astype(np.float64)
    segments = squares(image.shape[0], 7)[0, 0]

    def classifier(pictures: np.ndarray) -> np.ndarray:
        fed = pictures if channels_last else np.moveaxis(pictures, -1, 1)
        return session.run(None, {given: np.ascontiguousarray(fed, np.float32)})[0]

    def theirs(batch: int) -> Any:
        return quietly(
            LimeImageExplainer(random_state=0, verbose=False).explain_instance,
            image, classifier, top_labels=1, hide_color=0, num_samples=samples,
            batch_size=batch, segmentation_fn=lambda _: segments,
        )  # fmt: skip

    def ours() -> Any:
        return ox.LimeImage(model).explain_instance(
            image, top_labels=1, hide_color=0, num_samples=samples, random_seed=0,
            segmentation_fn=lambda _: segments,
        )  # fmt: skip

    _beside(
        f"perturb/lime-image/{network}", "lime", ours,
        {batch: partial(theirs, batch) for batch in scale.tool_batches}, report, scale,
        samples=samples,
    )  # fmt: skip


# ------------------------------------------------------------------------ kernels, memory


def rise_kernels(report: Report, scale: Scale) -> None:
    """RISE masks drawn, and summed with their squares, beside ResNet-18 evaluating as many.

    The model's time is that of fewer evaluations, times their share.
    """
    from onnxplain.methods.interpolate import MODES
    from onnxplain.perturb.grid import Grid, Layout, MapMeans

    count, size = 4 * scale.masks, scale.size
    layout = Layout((3, size, size), (1, 2), (CELLS, CELLS), MODES["linear"][0])
    form = Grid({"x": layout})
    sampler = form.sampler(0, KEEP)
    scores = np.random.default_rng(0).random((count, 1, 1))

    def ours() -> Any:
        means = MapMeans(form, lambda s: s, True)
        for start in range(0, count, 256):
            piece = slice(start, min(start + 256, count))
            means.add(piece, sampler(piece), scores[piece])
        return means.result(), means.standard_error()

    onnx_file, _ = networks.network("resnet18", size, scale.exporter)
    part = max(1, scale.masks // 8)
    bare, batch = bare_evaluations(onnx_file, networks.images(1, size), part, scale)
    times = interleave({"kernels": ours, "model": bare}, scale.perturb_rounds)
    report.figure(
        "perturb/kernels/rise",
        times.median("kernels") * 1e3,
        "ms",
        min=times.minimum("kernels") * 1e3,
        ratio=times.ratio("kernels", "model") * part / count,
        baseline=f"ResNet-18 on {count} images, from {part} of them in batches of {batch}",
        baseline_value=times.median("model") * 1e3 * count / part,
        target="ratio < 0.1",
        masks=count,
    )


def coalition_kernels(kind: str, report: Report, scale: Scale) -> None:
    """A million coalitions of 64 features (or their permutations), once compiled."""
    from onnxplain.kernels import coalitions

    count = 10**4 if scale.quick else 10**6
    draw = {
        "bernoulli": lambda: coalitions.bernoulli(0, 0, count, 64),
        "kernel-shap": lambda: coalitions.kernel_shap(0, 0, count, 64),
        "prefixes": lambda: coalitions.prefixes(
            coalitions.permutations(0, 0, -(-count // 63), 64), 0, count
        ),
    }[kind]
    draw()
    spent = [seconds(draw) for _ in range(scale.long_rounds)]
    report.figure(
        f"perturb/kernels/{kind}", float(np.median(spent)) * 1e3, "ms", min=min(spent) * 1e3,
        target="value < 500", coalitions=count, features=64,
    )  # fmt: skip


def first_call(report: Report, scale: Scale) -> None:
    """Import and first attribution in a fresh process, kernels compiled (once) and cached."""
    x = np.loadtxt(networks.PATIENTS, np.float32, delimiter=",", skiprows=1)[:1]
    with tempfile.TemporaryDirectory() as cache:
        compiled, cached = (
            fresh_result("first_perturbation", x, file=str(networks.TINY), cache=cache)[0]
            for _ in range(2)
        )
    report.figure(
        "perturb/first-call", cached["attribution"], "s",
        ratio=cached["attribution"] / compiled["attribution"],
        baseline="the first process after install, which compiles",
        baseline_value=compiled["attribution"],
        import_seconds=cached["import"],
    )  # fmt: skip


def memory(name: str, report: Report, scale: Scale) -> None:
    """Peak memory of a process that takes 100,000 samples of one 224x224 image."""
    x = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pooled.onnx"
        pooled(file)
        reported, _ = fresh_result(
            "perturb_memory", x, method=name, file=str(file), samples=scale.many,
            memory_limit=scale.memory_limit,
        )  # fmt: skip
    report.figure(
        f"perturb/memory/{name}",
        reported["peak"] / MEGA,
        "MB",
        target=f"value <= {scale.memory_limit / MEGA + 100:g}",
        samples=scale.many,
        before=reported["before"] / MEGA,
        rows_per_second=scale.many / reported["seconds"],
    )


def pooled(file: Path) -> None:
    """A model that costs next to nothing: means of 32x32 pixels, then a linear layer."""
    import onnx

    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        pooled (float[N, 3, 224, 224] x) => (float[N, 10] y) {
            means = AveragePool <kernel_shape = [32, 32], strides = [32, 32]> (x)
            flat = Flatten (means)
            y = MatMul (flat, weights)
        }"""
    )
    weights = np.random.default_rng(0).standard_normal((147, 10)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "weights"))
    onnx.save(model, file)


def units(scale: Scale) -> dict[str, Callable[[Report, Scale], None]]:
    """Every measurement by name."""
    return {
        **{f"perturb/overhead/{name}": partial(overhead, name) for name in OVERHEAD},
        **{
            f"perturb/captum/{network}/{name}": partial(against_captum, name, network)
            for network in LAYERS
            for name in ROWS
        },
        **{
            f"perturb/dianna/rise/{network}": partial(dianna_rise, network)
            for network in ("mnist", "geometric-shapes", "resnet18")
        },
        **{
            f"perturb/dianna/kernel-shap/{network}": partial(dianna_kernel_shap, network)
            for network in ("mnist", "geometric-shapes")
        },
        **{f"perturb/shap/{k}": partial(shap_kernel, k) for k in ("breast-cancer", "wine")},
        **{f"perturb/lime-image/{k}": partial(lime_picture, k) for k in ("resnet8", "resnet18")},
        "perturb/kernels/rise": rise_kernels,
        **{
            f"perturb/kernels/{k}": partial(coalition_kernels, k)
            for k in ("bernoulli", "kernel-shap", "prefixes")
        },
        "perturb/first-call": first_call,
        **{f"perturb/memory/{k}": partial(memory, k) for k in ("KernelShap", "RISE")},
    }
