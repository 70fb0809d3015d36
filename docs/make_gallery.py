"""Make `docs/gallery.md` and its pictures: every method, most on three photographs, by SqueezeNet.

`python docs/make_gallery.py [METHOD...]` from the repository; the model is looked for beside it, in
`../shared/models/squeezenet`, or where `--model` says. The photographs come with scikit-image.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import skimage.data
import sklearn.datasets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage.transform import resize

import onnxplain as ox
from onnxplain.inputs import find_preprocessing, load_inputs
from onnxplain.methods import MethodInfo
from onnxplain.methods.perturbation import PerturbationAttribution
from onnxplain.perturb.segments import segments_of
from onnxplain.result import Display

DOCS = Path(__file__).resolve().parent
MODELS = DOCS.parents[1] / "shared" / "models"
PHOTOS = ("chelsea", "coffee", "astronaut")
SIZE = 227
MEAN = np.array([104, 117, 123], np.float32)  # of BGR, in 0..255
LAYER, NEURONS = "fire9/concat", "fire8/concat"
CELL, COLORS, LIMIT = 108, (192, 128, 96, 64, 48), 40_000  # pixels, palettes, bytes of a sheet

GROUPS = (
    (
        "By replacing parts of the input",
        lambda info: issubclass(info.cls, PerturbationAttribution),
    ),
    ("By inputs", lambda info: info.explains == "inputs" and "neuron" not in info.needs),
    ("By a layer", lambda info: info.explains == "layer" and "layer" in info.needs),
    ("Of a neuron", lambda info: "neuron" in info.needs),
    ("Maps", lambda info: True),
)
# What explains tables or texts: on a row or a text that comes with the project.
TABLES = {"lime-tabular": {"num_samples": 1000}, "lime-base": {"n_samples": 400}}
TEXTS: dict[str, dict[str, Any]] = {"lime-text": {"num_samples": 1000}}
# By segments of the picture (slic), gray where they are off.
_SEGMENTS: dict[str, Any] = {"feature_mask": "about 50 segments of each (slic)"}
_GRAY: dict[str, Any] = {"baselines": "mean"}
# Options that are not a method's defaults: more samples, noise of the size of the pixels.
OPTIONS: dict[str, dict[str, Any]] = {
    "noise-tunnel": {"nt_samples": 20, "stdevs": 20.0},
    "gradient-shap": {"n_samples": 20},
    "layer-gradient-shap": {"n_samples": 20},
    "neuron-gradient-shap": {"n_samples": 20},
    "feature-ablation": {**_SEGMENTS, **_GRAY},
    "feature-permutation": {"feature_mask": "7 x 7 squares"},
    "occlusion": {"sliding_window_shapes": (3, 32, 32), "strides": (3, 16, 16), **_GRAY},
    "layer-feature-ablation": {"layer_mask": "each place"},
    "layer-feature-permutation": {"layer_mask": "each place"},
    "neuron-feature-ablation": {**_SEGMENTS, **_GRAY},
    "shapley-values": {"feature_mask": "3 x 3 squares", **_GRAY},
    "shapley-value-sampling": {**_SEGMENTS, **_GRAY, "n_samples": 10},
    "lime": {**_SEGMENTS, **_GRAY, "n_samples": 500, "interpretable_model": "ridge"},
    "kernel-shap": {**_SEGMENTS, **_GRAY, "n_samples": 500},
    "rise": {"num_masks": 1000, "activation": "none", "centered": True, **_GRAY},
    "lime-image": {"num_samples": 500},
    "lrp": {"rules": "epsilon-alpha2-beta1-flat"},
    "layer-lrp": {"rules": "epsilon-plus"},
    # Their default is the picture itself; by a layer they are told apart from others.
    "grad-cam-map": {"layer": LAYER},
    "excitation-backprop": {"layer": LAYER},
    "contrastive-excitation-backprop": {"layer": NEURONS},
}
_DEAD = (
    "In this network nothing positive is left of the signal on its way back through the ReLUs: the "
    "result is zero, in Captum as well."
)
NOTES = {"deconvolution": _DEAD, "deconvolution-map": _DEAD}


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """The photographs as the model takes them, [3, 3, 227, 227], and as they look, uint8."""
    seen = []
    for name in PHOTOS:
        photo = getattr(skimage.data, name)()
        side = min(photo.shape[:2])
        top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
        square = photo[top : top + side, left : left + side]
        seen.append(resize(square, (SIZE, SIZE), preserve_range=True, anti_aliasing=True))
    pictures = np.stack(seen).round()
    bgr = pictures[..., ::-1] - MEAN
    return bgr.transpose(0, 3, 1, 2).astype(np.float32), pictures.astype(np.uint8)


def explain(
    info: MethodInfo, model: ox.Model, x: np.ndarray, display: Display, labels: list[str]
) -> tuple[ox.Explanation, dict[str, Any]]:
    """A method's explanation of the photographs, and what it was asked beside its defaults."""
    asked = dict(OPTIONS.get(info.name, {}))
    if "layer" in info.needs:
        asked["layer"] = LAYER
    if (
        "neuron" in info.needs
    ):  # all of the channel that speaks most for the class on all photographs
        target = model(x)[model.output.name].argmax(1)
        values = ox.LayerGradientXActivation(model, NEURONS).attribute(x, target=target)
        channel = int(values.mean((2, 3)).min(0).argmax())
        asked["layer"] = NEURONS
        asked["neuron"] = (channel, slice(0, values.shape[2]), slice(0, values.shape[3]))
    sizes = (1, 1)
    if "layer" in asked:
        sizes = ox.LayerActivation(model, asked["layer"]).attribute(x).shape[2:]
    given = masks(asked, display.images, sizes)
    if "baselines" in info.needs:
        asked["baselines"] = "two constant pictures"
        given["baselines"] = np.stack([np.full_like(x[0], v) for v in (-60, 60)])
    if "random" in info.needs:
        given["seed"] = 0
    return ox.explain(model, x, info.name, labels=labels, display=display, **given), asked


def masks(asked: dict[str, Any], pictures: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What was asked with the masks that its words stand for."""
    given = dict(asked)
    for key in ("feature_mask", "layer_mask"):
        words = str(given.get(key, ""))
        if "segments" in words:
            every = [segments_of(picture, "slic") for picture in pictures]
            given[key] = np.stack(every)[:, None]
        elif "squares" in words:
            count = int(words[0])
            at = np.arange(SIZE) * count // SIZE
            given[key] = (at[:, None] * count + at)[None, None]
        elif "place" in words:
            given[key] = np.arange(np.prod(sizes)).reshape(1, 1, *sizes)
    return given


def bundled(name: str) -> tuple[ox.Explanation, dict[str, Any]]:
    """A method's explanation of a table's row or of a text, by a model of the project's own."""
    asked = {**TABLES, **TEXTS}[name]
    folder = DOCS.parent / "models" / ("sentiment" if name in TEXTS else "breast_cancer")
    (path,) = folder.glob("*.onnx")
    model = ox.Model(path)
    source = folder / "samples" / ("negation.txt" if name in TEXTS else "patients.csv")
    sample = load_inputs([source], model.inputs, find_preprocessing(path))
    given = dict(asked)
    if name == "lime-tabular":
        given["baselines"] = sklearn.datasets.load_breast_cancer().data
        asked = {**asked, "baselines": "scikit-learn's breast cancer data"}
    inputs = {k: v[:1] for k, v in sample.arrays.items()}
    labels = sample.setting.labels
    explained = {k: v for k, v in inputs.items() if k != "attention_mask"}
    rest = {k: v for k, v in inputs.items() if k not in explained} or None
    return ox.explain(
        model,
        explained,
        name,
        display=dataclasses.replace(sample.display, names=None),
        labels=None if labels is None else list(labels),
        additional_forward_args=rest,
        seed=0,
        **given,
    ), asked


def drawing(explanation: ox.Explanation) -> bytes:
    """A PNG of an explanation as it is drawn."""
    file = io.BytesIO()
    explanation.plot().savefig(file, format="png", dpi=50)
    picture = PIL.Image.open(file).convert("RGB").quantize(64, dither=PIL.Image.Dither.NONE)
    reduced = io.BytesIO()
    picture.save(reduced, "PNG", optimize=True)
    return reduced.getvalue()


def panels(figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """The signed overlay and the heat map of an image's view, without their frame."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    cut = []
    for axes in figure.axes[1:3]:
        box = axes.get_window_extent()
        rows = slice(round(len(pixels) - box.y1), round(len(pixels) - box.y0))
        cut.append(pixels[rows, round(box.x0) : round(box.x1)])
    return cut[0], cut[1]


def sheet(explanation: ox.Explanation) -> bytes:
    """A PNG of all photographs: signed attributions above, their size below."""
    grid = PIL.Image.new("RGB", (CELL * len(PHOTOS), CELL * 2), "white")
    for column in range(len(PHOTOS)):
        for row, pixels in enumerate(panels(explanation.plot(example=column))):
            cell = PIL.Image.fromarray(pixels).resize((CELL - 4, CELL - 4), PIL.Image.LANCZOS)
            grid.paste(cell, (column * CELL + 2, row * CELL + 2))
    for colors in COLORS:
        file = io.BytesIO()
        reduced = grid.quantize(colors, kmeans=1, dither=PIL.Image.Dither.NONE)
        reduced.save(file, "PNG", optimize=True)
        if file.tell() <= LIMIT:
            break
    return file.getvalue()


def entry(info: MethodInfo, explanation: ox.Explanation, asked: dict[str, Any]) -> str:
    """A method's part of the page."""
    how = ", ".join(f"{k} = {_written(v)}" for k, v in asked.items()) or "defaults"
    checks = [f"{k.replace('_', ' ')} {np.abs(v).max():.2g}" for k, v in explanation.checks.items()]
    lines = [
        f"### {info.title} (`{info.name}`)",
        info.summary,
        f"Options: {how}." + (f" Largest of {', '.join(checks)}." if checks else ""),
        f"Paper: {info.paper}." if info.paper else "",
        NOTES.get(info.name, ""),
        f"![{info.title}]({_file(info.name)})",
    ]
    return "\n\n".join(line for line in lines if line)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(":" if isinstance(v, slice) else str(v) for v in value) + ")"
    return str(value)


def _file(name: str) -> str:
    return f"gallery/{name.replace('+', 'p')}.png"


PAGE = """# Gallery

Every method of `ox.methods()`, nearly all on three photographs, explained by SqueezeNet 1.0 for the
class that it predicts: {classes}. Those for tables and texts explain a row and a text of the
models that come with the project.
Made by `python docs/make_gallery.py`.

Above, signed attributions over the picture (red speaks for the class, blue against it); below,
their size. Attributions are summed over channels, layers are stretched over the picture, and colors
are cut at the 99th percentile. Where a method needs a layer it is `{layer}`, where it needs a
neuron, all places of the channel of `{neurons}` that speaks most for the class on the three.

{body}
"""


def main() -> int:
    """Exit status 1 where the model is missing or a method failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help="draw these only, and leave the page alone")
    parser.add_argument(
        "--model", type=Path, default=MODELS / "squeezenet" / "squeezenet1.0-dc.onnx"
    )
    parser.add_argument("--labels", type=Path, default=MODELS / "labels" / "synset.txt")
    given = parser.parse_args()
    for path in (given.model, given.labels):
        if not path.exists():
            print(f"{path.name} is not there: give its path ({path} was tried)", file=sys.stderr)
            return 1
    labels = [line.split(" ", 1)[1] for line in given.labels.read_text().splitlines()]
    model = ox.Model(given.model)
    x, pictures = photographs()
    display = Display(kind="image", layout="NCHW", images=pictures, names=list(PHOTOS))
    (DOCS / "gallery").mkdir(exist_ok=True)
    known = ox.methods()
    written: dict[str, str] = {}
    failed = False
    for name in given.methods or known:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                if name in TABLES or name in TEXTS:
                    explanation, asked = bundled(name)
                    drawn = drawing(explanation)
                else:
                    explanation, asked = explain(known[name], model, x, display, labels)
                    drawn = sheet(explanation)
            (DOCS / _file(name)).write_bytes(drawn)
            written[name] = entry(known[name], explanation, asked)
        except ox.OnnxplainError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    if not given.methods:
        targets = model(x)[model.output.name].argmax(1)
        classes = ", ".join(
            f"{photo} ({labels[t].split(',')[0]})" for photo, t in zip(PHOTOS, targets, strict=True)
        )
        parts, left = [], dict(written)
        for title, belongs in GROUPS:
            mine = [name for name in left if belongs(known[name])]
            parts += [f"## {title}", *(left.pop(name) for name in mine)] if mine else []
        page = PAGE.format(classes=classes, layer=LAYER, neurons=NEURONS, body="\n\n".join(parts))
        (DOCS / "gallery.md").write_text(page)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
