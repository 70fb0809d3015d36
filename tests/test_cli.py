"""The command line on the bundled models: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result

import onnxplain as ox
from onnxplain.cli import main
from onnxplain.inputs import find_preprocessing, load_input
from onnxplain.run.session import runtime

MODELS = Path(__file__).resolve().parents[1] / "models"
DIGITS = str(MODELS / "digits" / "digits.onnx")
THREE = str(MODELS / "digits" / "samples" / "digit_3.png")
CANCER = str(MODELS / "breast_cancer" / "breast_cancer.onnx")
PATIENTS = str(MODELS / "breast_cancer" / "samples" / "patients.csv")
SENTIMENT = str(MODELS / "sentiment" / "sentiment.onnx")


def run(*arguments: str) -> Result:
    """The command line in this process; anything but a clean exit is a failure of the test."""
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


# --- inspect, layers, methods -------------------------------------------------------------------


def test_inspect_says_what_the_model_is() -> None:
    facts = json.loads(done("inspect", DIGITS, "--json"))
    assert facts["inputs"] == [{"name": "image", "dtype": "float", "shape": ["examples", 1, 8, 8]}]
    assert facts["explained output"] == "logits"
    assert facts["operators"]["Conv"] == 2
    assert facts["differentiable"] == {"image": "yes"}
    # two convolutions without bias, two batch norms of four vectors, a linear head
    assert facts["parameters"] == 16 * 9 + 32 * 16 * 9 + 4 * (16 + 32) + 10 * 128 + 10
    assert facts["providers"]
    text = done("inspect", DIGITS)
    assert re.search(r"inputs +image  float \[examples, 1, 8, 8\]", text)
    assert "Conv 2" in text


def test_inspect_names_the_embedding_of_token_numbers() -> None:
    (reached,) = json.loads(done("inspect", SENTIMENT, "--json"))["differentiable"].values()
    assert reached.startswith("yes, at its embedding")


def test_layers_can_be_filtered_by_scope() -> None:
    found = json.loads(done("layers", DIGITS, "--filter", "BLOCK1.", "--json"))
    assert [layer["scope"] for layer in found] == [
        f"block1.{name}" for name in ("conv", "bn", "relu", "pool")
    ]
    assert found[-1]["operator"] == "MaxPool"
    assert found[-1]["shape"][1:] == [16, 4, 4]
    lines = done("layers", DIGITS).splitlines()
    assert lines[0].split() == ["NAME", "OPERATOR", "SHAPE", "SCOPE"]
    assert len(lines) == 1 + len(ox.Model(DIGITS).layers())


def test_methods_lists_all_and_details_one() -> None:
    listed = [line.split()[0] for line in done("methods").splitlines()]
    assert listed == list(ox.methods())
    text = done("methods", "integrated_gradients")
    assert re.search(r"--option n_steps +50", text)
    assert "arXiv:1703.01365" in text
    (facts,) = json.loads(done("methods", "integrated-gradients", "--json"))
    assert facts["options"]["n_steps"] == 50


# --- explain ------------------------------------------------------------------------------------


def test_explain_draws_saves_and_prints(tmp_path: Path) -> None:
    picture, archive = tmp_path / "why.png", tmp_path / "why.npz"
    text = done("explain", DIGITS, THREE, "--output", str(picture), "--save", str(archive))
    assert text.startswith("integrated-gradients for 3")
    with PIL.Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
    saved = ox.load_explanation(archive)
    sample = load_input(THREE, ox.Model(DIGITS).inputs[0], find_preprocessing(DIGITS))
    wanted = ox.IntegratedGradients(ox.Model(DIGITS)).attribute(sample.arrays["image"], target=3)
    np.testing.assert_allclose(saved.arrays["image"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(saved.display.images, sample.display.images)
    assert saved.labels == [str(i) for i in range(10)]


def test_explain_prints_json_and_nothing_else() -> None:
    found = json.loads(done("explain", DIGITS, THREE, "--json", "--method", "saliency"))
    assert found["method"] == "saliency"
    (example,) = found["examples"]
    assert example["label"] == "3"
    assert example["target"] == 3


def test_options_reach_the_method() -> None:
    arguments = ("explain", DIGITS, THREE, "--json", "--option")
    few = json.loads(done(*arguments, "n_steps=4", "--option", "method=riemann_left"))
    assert few["options"] == {"n_steps": 4, "method": "riemann_left"}
    delta = abs(few["examples"][0]["checks"]["convergence_delta"])
    many = json.loads(done(*arguments, "n_steps=400"))
    assert abs(many["examples"][0]["checks"]["convergence_delta"]) < delta / 10


@pytest.mark.parametrize("target", ["1", "benign", "BENIGN"])
def test_a_target_is_a_number_or_a_label(target: str) -> None:
    found = json.loads(done("explain", CANCER, PATIENTS, "--json", "--target", target))
    assert [example["label"] for example in found["examples"]] == ["benign"] * 6


def test_a_table_is_ranked_by_feature() -> None:
    text = done("explain", CANCER, PATIENTS)
    assert text.count("integrated-gradients for malignant") == 3
    assert re.search(r"^example 6$", text, re.MULTILINE)
    assert re.search(r"worst radius = \d+\.\d+ +[-+]\d\.\d+e[-+]\d+", text)


def test_several_examples_are_drawn_into_numbered_files(tmp_path: Path) -> None:
    done("explain", DIGITS, THREE, THREE, "--output", str(tmp_path / "why.html"), "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["why-1.html", "why-2.html"]


def test_text_is_explained_through_its_embedding() -> None:
    text = done("explain", SENTIMENT, "The acting was not bad at all.", "--method", "saliency")
    assert "for positive" in text
    assert re.search(r"the\([-+].*\) acting\(.*\) not\(.*\) bad\(.*\) \.\(", text)


def test_baselines_change_what_is_explained() -> None:
    def total(*baseline: str) -> float:
        found = json.loads(done("explain", DIGITS, THREE, "--json", "--target", "3", *baseline))
        return float(found["examples"][0]["attributions"]["image"]["sum"])

    def score(x: np.ndarray) -> float:
        return float(model(x)["logits"][0, 3])

    model = ox.Model(DIGITS)
    x = load_input(THREE, model.inputs[0], find_preprocessing(DIGITS)).arrays["image"]
    values = {"zero": 0.0, "16": 16.0, "mean": x.mean()}
    for name, value in values.items():
        wanted = score(x) - score(np.full_like(x, value))
        assert total("--baseline", name) == pytest.approx(wanted, rel=0.05), name
    assert total("--baseline", THREE) == pytest.approx(0, abs=1e-6)
    assert total() == total("--baseline", "zero") != total("--baseline", "blur")


def test_a_layer_and_a_neuron() -> None:
    arguments = ("explain", DIGITS, THREE, "--json", "--layer", "block1.pool")
    layer = json.loads(done(*arguments, "--method", "layer-activation"))
    assert layer["layer"] == "block1.pool"
    neuron = json.loads(done(*arguments, "--method", "neuron-gradient", "--neuron", "3,1,2"))
    assert neuron["options"]["neuron"] == [3, 1, 2]
    assert "image" in neuron["examples"][0]["attributions"]


def test_flags_replace_the_settings_beside_the_model(tmp_path: Path) -> None:
    archives = [tmp_path / "a.npz", tmp_path / "b.npz"]
    flags = ("--scale", "2/255", "--mean", "-1", "--std", "0.5")
    for archive, extra in zip(archives, ((), flags), strict=True):
        done("explain", DIGITS, THREE, "--save", str(archive), *extra)
    toml, flagged = (ox.load_explanation(path).inputs["image"] for path in archives)
    np.testing.assert_allclose(flagged, (toml / 8 + 1) / 0.5, rtol=1e-5)


def test_labels_from_a_file(tmp_path: Path) -> None:
    names = tmp_path / "labels.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)))
    text = done("explain", DIGITS, THREE, "--labels", str(names), "--target", "Digit 7")
    assert text.startswith("integrated-gradients for digit 7")


def test_logs_go_to_standard_error() -> None:
    result = run(
        "--verbose", "explain", SENTIMENT, "it was good", "--json", "--option", "n_steps=1"
    )
    assert json.loads(result.stdout)
    assert all(line.startswith(("info: ", "warning: ")) for line in result.stderr.splitlines())


# --- refusals -----------------------------------------------------------------------------------


def _write(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "none.onnx"), "none.onnx"),
        (("layers", "none.onnx"), "none.onnx"),
        (("explain", DIGITS, "none.png"), "none.png does not exist"),
        (("explain", DIGITS, DIGITS), "can't be read as an image"),
        (("explain", DIGITS, PATIENTS), r"shape \[6, 30\], but input 'image' takes \[N, 1, 8, 8\]"),
        (("explain", DIGITS, THREE, "--size", "9,9"), r"shape \[1, 1, 9, 9\]"),
        (("explain", DIGITS, THREE, "--target", "10"), "10"),
        (("explain", DIGITS, THREE, "--target", "-1"), "-1"),
        (("explain", CANCER, PATIENTS, "--target", "begnin"), r"nearest are 'benign' \(1\)"),
        (("explain", DIGITS, THREE, "--layer", "block1.poool"), "block1.pool"),
        (
            ("explain", DIGITS, THREE, "--method", "neuron-gradient", "--layer", "head",
             "--neuron", "10"), "10",
        ),
        (("explain", CANCER, PATIENTS, "--baseline", "blur"), "--baseline blur is for pictures"),
        (("explain", DIGITS, THREE, "--baseline", "none.png"), "none.png does not exist"),
        (("explain", DIGITS, THREE, "--provider", "abacus"), "'abacus' is not available"),
        (("explain", DIGITS, THREE, "--output-name", "logit"), "logits"),
        (("explain", DIGITS, THREE, "--config", "none.toml"), "none.toml does not exist"),
        (("explain", DIGITS, THREE, "--labels", "none.txt"), "none.txt does not exist"),
    ],
)  # fmt: skip
def test_refused_with_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr), result.stderr


@pytest.mark.parametrize("values", [[1, np.nan, 3], [np.inf, 2, 3]])
def test_values_that_are_no_numbers(values: list[float], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",".join(map(str, values * 10)))
    result = run("explain", CANCER, str(path))
    assert result.exit_code == 1
    assert re.fullmatch("error: .*NaN or infinite.*\n", result.stderr)


@pytest.mark.parametrize(
    "make",
    [
        _write("empty.onnx", b""),
        _write("truncated.onnx", Path(DIGITS).read_bytes()[:3000]),
        _write("foreign.onnx", b"hello, this is no model"),
        lambda folder: str(folder),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "layers", "explain"])
def test_models_that_are_wrong(make: Callable[[Path], str], command: str, tmp_path: Path) -> None:
    result = run(command, make(tmp_path), *([THREE] if command == "explain" else []))
    assert result.exit_code == 1
    assert re.fullmatch("error: .+\n", result.stderr), result.stderr


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    try:
        result = run("explain", DIGITS, THREE)
    finally:
        runtime.cache_clear()
    assert result.exit_code == 1
    assert re.fullmatch(r'error: .*pip install "onnxplain\[cpu\]".*\n', result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", DIGITS), "Missing argument 'INPUT...'"),
        (("explain", DIGITS, THREE, "--method", "integrated-gradient"), "integrated-gradients"),
        (("explain", DIGITS, THREE, "--option", "steps=3"), "no option 'steps'.*n_steps"),
        (("explain", DIGITS, THREE, "--option", "n_steps"), "'n_steps' is not KEY=VALUE"),
        (("explain", DIGITS, THREE, "--method", "saliency", "--baseline", "zero"), "has none"),
        (("explain", DIGITS, THREE, "--neuron", "a"), "whole numbers"),
        (("explain", DIGITS, THREE, "--size", "8"), "height and width"),
        (("explain", DIGITS, THREE, "--size", "8,a"), "numbers, not '8,a'"),
        (("explain", DIGITS, THREE, "--scale", "1/0"), "numbers, not '1/0'"),
        (("explain", DIGITS, THREE, "--scale", "0"), "other than 0"),
        (("explain", DIGITS, THREE, "--std", "1,0,1"), "none of them 0"),
        (("explain", DIGITS, THREE, "--memory-limit", "lots"), "such as 512MB"),
        (("explain", DIGITS, THREE, "--output", "why.doc"), "must end in one of .png"),
        (("explain", DIGITS, THREE, "--save", "nowhere/why.npz"), "'nowhere' does not exist"),
        (("methods", "magic"), "there is no method 'magic'"),
        (("frobnicate",), "No such command"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split())), result.stderr


@pytest.mark.parametrize(
    ("text", "count"), [("512MB", 512_000_000), ("1.5 GiB", 3 << 29), ("100000000", 10**8)]
)
def test_memory_limit_is_read(text: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "onnxplain.model.Model", lambda *_, memory_limit, **__: seen.append(memory_limit) or _stop()
    )
    assert run("layers", DIGITS, "--memory-limit", text).exit_code == 1
    assert seen == [count]


def _stop() -> None:
    raise ox.InputError("stop here")


def test_help_is_quick_and_needs_nothing_heavy() -> None:
    code = (
        "import sys; from onnxplain.cli import main\n"
        "try: main(['explain', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'onnxruntime', 'matplotlib', 'skimage', 'scipy', 'numba', 'torch'}\n"
        "sys.exit(repr(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--baseline" in result.stdout
