"""The command line on the bundled models: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import PIL.Image
import pytest
from click.testing import CliRunner, Result

import onnxplain as ox
from onnxplain.cli import main
from onnxplain.inputs import find_preprocessing, load_input
from onnxplain.run.session import Session, runtime
from tests.helpers import HEAD

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
    assert facts["weights (elements)"] == 16 * 9 + 32 * 16 * 9 + 4 * (16 + 32) + 10 * 128 + 10
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
    assert "--option n_steps=50\n" in text
    assert "--option multiply_by_inputs=true\n" in text
    assert "--option internal_batch_size=none\n" in text
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
    assert few["options"] == {
        "multiply_by_inputs": True,
        "n_steps": 4,
        "method": "riemann_left",
        "internal_batch_size": None,
    }
    delta = abs(few["examples"][0]["checks"]["convergence_delta"])
    many = json.loads(done(*arguments, "n_steps=400"))
    assert abs(many["examples"][0]["checks"]["convergence_delta"]) < delta / 10


@pytest.mark.parametrize("word", ["False", "false"])
def test_an_option_is_true_or_false_in_any_spelling(word: str) -> None:
    arguments = ("explain", DIGITS, THREE, "--json", "--method", "saliency", "--option")
    found = json.loads(done(*arguments, f"abs={word}"))
    assert found["options"] == {"abs": False}
    assert found["examples"][0]["attributions"]["image"]["sum"] < 0
    none = json.loads(
        done("explain", DIGITS, THREE, "--json", "--option", "internal_batch_size=None")
    )
    assert none["options"]["internal_batch_size"] is None


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


def _save(path: Path, graph: str) -> str:
    onnx.save(onnx.parser.parse_model(HEAD + graph), path)
    return str(path)


def _data(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


MASK = """mask (float[N,4] x, bool[N,4] mask, float[N,4] unused) => (float[N,4] y, float[N,4] z) {
    f = Cast<to=1>(mask)  y = Mul(x, f)  z = Relu(unused)
}"""


def test_inputs_without_a_gradient_are_fed_and_not_explained(tmp_path: Path) -> None:
    model = _save(tmp_path / "mask.onnx", MASK)
    x = np.arange(8, dtype=np.float32).reshape(2, 4) + 1
    arrays = _data(tmp_path / "x.npz", x=x, mask=x > 2, unused=x)
    archive = tmp_path / "why.npz"
    done("explain", model, arrays, "--target", "2", "--save", str(archive))
    found = ox.load_explanation(archive).arrays
    assert list(found) == ["x"]
    np.testing.assert_allclose(found["x"], x * [0, 0, 1, 0], rtol=1e-5)
    facts = json.loads(done("inspect", model, "--json"))["differentiable"]
    assert facts["x"] == "yes"
    assert "BOOL" in facts["mask"]
    assert "does not depend on 'unused'" in facts["unused"]


def test_inspect_takes_a_backward_graph(tmp_path: Path) -> None:
    ox.differentiate(ox.Model(DIGITS), None, ["image"]).save(tmp_path / "back.onnx")
    facts = json.loads(done("inspect", str(tmp_path / "back.onnx"), "--json"))
    assert set(facts["differentiable"]) == {"image", "cotangent"}


def test_the_examples_axis_is_said(tmp_path: Path) -> None:
    turned = "turned (float[4,N] x, float s) => (float[N,4] y) { t = Transpose(x)  y = Mul(t, s) }"
    model = _save(tmp_path / "turned.onnx", turned)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    arrays = _data(tmp_path / "x.npz", x=x, s=np.float32(2))
    archive = tmp_path / "why.npz"
    axis = ("--examples-axis", "x=1,s=none")
    done("explain", model, arrays, *axis, "--target", "1", "--save", str(archive))
    found = ox.load_explanation(archive)
    assert list(found.arrays) == ["x"]
    np.testing.assert_allclose(found.arrays["x"], 2 * x.T * [0, 1, 0, 0], rtol=1e-5)
    assert "x  float [4, examples]" in done("inspect", model, *axis)
    refused = run("explain", model, arrays, "--examples-axis", "none")
    assert refused.exit_code == 1
    assert "--examples-axis" in refused.stderr


def test_everything_needed_to_repeat_it_is_on_record(tmp_path: Path) -> None:
    other = str(Path(THREE).with_name("digit_7.png"))
    found = json.loads(done("explain", DIGITS, THREE, other, "--json", "--baseline", "blur"))
    assert [example["name"] for example in found["examples"]] == ["digit_3.png", "digit_7.png"]
    record = found["provenance"]
    assert record["inputs"].split() == [THREE, other]
    assert record["baselines"] == "blur"
    setting = json.loads(record["preprocessing"])
    assert setting["size"] == [8, 8] and setting["channels"] == "L" and setting["order"] == 1
    assert record["settings"].endswith("onnxplain.toml")
    assert "digit_7.png" in done("explain", DIGITS, THREE, other).split("example 2")[1]
    assert "patients.csv row 4" in done("explain", CANCER, PATIENTS)


def test_token_numbers_are_shown_as_words(tmp_path: Path) -> None:
    words = (MODELS / "sentiment" / "vocab.txt").read_text().splitlines()
    ids = [words.index("not"), words.index("bad"), words.index("[PAD]")]
    np.save(tmp_path / "ids.npy", np.array([ids]))
    text = done("explain", SENTIMENT, str(tmp_path / "ids.npy"))
    assert re.search(r"^not\([-+.\de]+\) bad\([-+.\de]+\)$", text, re.MULTILINE)


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "onnxplain", "methods"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert re.fullmatch("error: can't write the result: .*\n", result.stderr)


def test_long_names_do_not_push_the_other_rows(tmp_path: Path) -> None:
    long = "h" * 90
    model = _save(
        tmp_path / "m.onnx",
        f"m (float[N,4] x) => (float[N,4] y) {{ {long} = Exp(x)  y = Neg({long}) }}",
    )
    lines = done("layers", model).splitlines()
    assert any(line.startswith(f"{long}  Exp") for line in lines)
    assert len(lines[-1]) < 80


def test_labels_from_a_file(tmp_path: Path) -> None:
    names = tmp_path / "labels.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)))
    text = done("explain", DIGITS, THREE, "--labels", str(names), "--target", "Digit 7")
    assert text.startswith("integrated-gradients for digit 7")


def test_warnings_speak_of_options() -> None:
    result = run("explain", CANCER, PATIENTS, "--method", "guided-backprop", "--layer", "relu2")
    assert "(--option activations=all takes every one)" in result.stderr


def test_logs_go_to_standard_error() -> None:
    result = run(
        "--verbose", "explain", SENTIMENT, "it was good", "--json", "--option", "n_steps=1"
    )
    assert json.loads(result.stdout)
    assert all(line.startswith(("info: ", "warning: ")) for line in result.stderr.splitlines())


# --- methods that switch parts of the input off -------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> tuple[str, str]:
    """A model of pictures whose first score is the red of the left half, and a picture."""
    proto = onnx.parser.parse_model(
        HEAD
        + """photo (float[N,3,32,32] image) => (float[N,2] scores) {
        left = Slice(image, zero, half, last)
        sums = ReduceMean<keepdims=0>(left, places)
        scores = Slice(sums, zero, two, one)
    }"""
    )
    constants = {"zero": [0], "half": [16], "last": [3], "places": [2, 3], "two": [2], "one": [1]}
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    pixels = np.random.default_rng(0).integers(0, 60, (32, 32, 3), np.uint8)
    pixels[8:24, 4:12] = [250, 120, 0]
    onnx.save(proto, tmp_path / "photo.onnx")
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.onnx"), str(tmp_path / "photo.png")


def top(output: str) -> list[dict[str, float]]:
    (only,) = json.loads(output)["examples"][0]["attributions"].values()
    return list(only["top"])


def test_pictures_are_explained_by_segments(photo: tuple[str, str]) -> None:
    arguments = ("explain", *photo, "--json", "--target", "0", "--seed", "0", "--method")
    for name in ("feature-ablation", "shapley-value-sampling", "kernel-shap", "lime"):
        result = run(*arguments, name)
        assert result.exit_code == 0, result.stderr
        assert "segments, not pixels: --segments slic:50" in result.stderr
        found = top(result.stdout)
        assert found[0]["size"] % 3 == 0 and found[0]["value"] > 0
        assert ("standard_error" in found[0]) == (name != "feature-ablation")
        surrogate = name in ("kernel-shap", "lime")
        assert bool(re.search(r"\d+ features: --option n_samples=\d+", result.stderr)) == surrogate
    result = run(*arguments, "shapley-values")
    assert "--segments grid:3" in result.stderr
    assert top(result.stdout)[0]["size"] in (3 * 10 * 10, 3 * 10 * 11, 3 * 11 * 11)
    small = run("explain", DIGITS, THREE, "--method", "shapley-values")
    assert "--segments grid:3" in small.stderr and "9 pixels around" in small.stdout
    pixels = run(*arguments, "feature-ablation", "--segments", "none")
    assert pixels.stderr == "" and "index" in top(pixels.stdout)[0]


@pytest.mark.parametrize("baseline", ["mean", "blur", "noise", "inpaint", "segment-mean", "0.5"])
@pytest.mark.parametrize("segments", ["slic:20", "watershed:20", "quickshift", "grid:4", "FILE"])
def test_segments_and_baselines(
    photo: tuple[str, str], segments: str, baseline: str, tmp_path: Path
) -> None:
    file = tmp_path / "halves.npy"
    np.save(file, np.indices((32, 32))[1] // 16)
    how = str(file) if segments == "FILE" else segments
    found = top(
        done("explain", *photo, "--json", "--target", "0", "--method", "feature-ablation",
             "--segments", how, "--baseline", baseline)
    )  # fmt: skip
    if segments == "FILE":
        assert [entry["size"] for entry in found] == [1536, 1536]
    assert found[-1]["size"] < 3 * 32 * 32
    if baseline == "segment-mean":  # leaves the sum over a segment as it is
        assert max(abs(entry["value"]) for entry in found) < 0.2


def test_occlusion_has_windows_that_suit_the_input(photo: tuple[str, str]) -> None:
    result = run("explain", *photo, "--json", "--target", "0", "--method", "occlusion")
    assert "--option sliding_window_shapes=[3,2,2] --option strides=[3,1,1]" in result.stderr
    assert json.loads(result.stdout)["options"]["sliding_window_shapes"] == [3, 2, 2]
    arguments = ("explain", *photo, "--json", "--method", "occlusion", "--option")
    mine = run(*arguments, "sliding_window_shapes=3,16,16", "--option", "strides=3,16,16")
    assert mine.stderr == ""
    assert json.loads(mine.stdout)["options"]["strides"] == [3, 16, 16]
    table = ("explain", CANCER, PATIENTS, "--json", "--method", "occlusion")
    assert json.loads(done(*table))["options"]["sliding_window_shapes"] == [1]
    one = ("--option", "sliding_window_shapes=3", "--option", "strides=1")
    assert json.loads(done(*table, *one))["options"]["sliding_window_shapes"] == [3]


def test_a_mask_from_a_file(tmp_path: Path) -> None:
    file, mean = tmp_path / "groups.npy", MODELS / "breast_cancer" / "samples" / "training_mean.csv"
    np.save(file, np.arange(30) // 10)
    found = json.loads(
        done("explain", CANCER, PATIENTS, "--json", "--method", "shapley-values", "--option",
             f"feature_mask={file}", "--baseline", str(mean))
    )  # fmt: skip
    for example in found["examples"]:
        entry = example["attributions"]["features"]
        assert sorted(each["feature"] for each in entry["top"]) == [0, 1, 2]
        assert entry["sum"] == pytest.approx(sum(each["value"] for each in entry["top"]))
    typed = ",".join(str(i // 10) for i in range(30))
    for given in (str(file), typed):
        text = done("explain", CANCER, PATIENTS, "--method", "shapley-values", "--option",
                    f"feature_mask={given}")  # fmt: skip
        assert "mean radius = 19.89 & 9 more" in text


def test_rows_of_a_file_as_a_background() -> None:
    text = done("explain", CANCER, PATIENTS, "--method", "feature-ablation", "--baseline",
                f"background:{PATIENTS}", "--json")  # fmt: skip
    assert json.loads(text)["provenance"]["baselines"] == f"background:{PATIENTS}"
    model = ox.Model(CANCER)
    x = load_input(PATIENTS, model.inputs[0], find_preprocessing(CANCER)).arrays["features"]
    off = np.repeat(x[:1], len(x), axis=0)
    off[:, 20] = x[:, 20]  # worst radius
    worth = float((model(x[:1])["logits"] - model(off)["logits"].mean(axis=0))[0, 0])
    (entry,) = [e for e in top(text) if e["index"] == 20]
    assert entry["value"] == pytest.approx(worth, rel=1e-3)


def test_tokens_are_features_and_padding_is_one() -> None:
    arguments = ("explain", SENTIMENT, "it was not good", "bad", "--method", "shapley-values")
    result = run(*arguments, "--baseline", "mask", "--json")
    first, second = json.loads(result.stdout)["examples"]
    assert [e["size"] for e in second["attributions"]["tokens"]["top"]] == [1, 3]
    assert len(first["attributions"]["tokens"]["top"]) == 4
    assert second["attributions"]["tokens"]["top"][0]["feature"] == 0
    assert "bad(" in done(*arguments)


def test_standard_errors_are_printed(tmp_path: Path) -> None:
    arguments = ("explain", CANCER, PATIENTS, "--method", "shapley-value-sampling", "--seed", "1")
    text = done(*arguments)
    assert re.search(r"worst radius = 23.73 +-?\d.* ± 0\.\d+  █", text)
    rough = json.loads(done(*arguments, "--json"))["examples"][0]["checks"]
    fine = json.loads(
        done(*arguments, "--json", "--option", "n_samples=5000", "--option", "tolerance=0.05")
    )
    checks = fine["examples"][0]["checks"]
    assert checks["standard_error"] <= 0.05 < rough["standard_error"]
    assert 25 < checks["samples"] < 5000
    until = run(*arguments, "--option", "tolerance=0.05")
    assert until.stderr == "until the tolerance is met, at most: --option n_samples=10000\n"


def test_surrogates_of_values_take_enough_samples() -> None:
    result = run("explain", DIGITS, THREE, "--method", "lime-base", "--seed", "0")
    assert result.stderr == "64 features: --option n_samples=1280\n"
    mask = json.dumps((np.arange(64) // 8 * 3).reshape(1, 8, 8).tolist())[1:-1]
    grouped = ("--method", "kernel-shap", "--option", f"feature_mask=[{mask}]")
    assert run("explain", DIGITS, THREE, *grouped).stderr == "8 features: --option n_samples=160\n"
    wrong = run("explain", DIGITS, THREE, *grouped, "--target", "eleven")
    assert wrong.stderr.startswith("error: ")
    few = ("--option", "n_samples=100", "--seed", "0")
    told = run("explain", DIGITS, THREE, "--method", "lime", "--segments", "none", *few).stderr
    number = re.search(r"take more samples \(--option n_samples=(\d+)\)", told)
    assert number and int(number[1]) >= 200


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("explain", DIGITS, THREE, "--method", "feature-ablation")
    assert run(*arguments).stderr == ""
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    assert "Feature Ablation attribution: 100%" in run(*arguments).stderr


SAMPLED = ("shapley-value-sampling", "--option", "n_samples=100")


@pytest.mark.parametrize("method", [SAMPLED, ("shapley-values",)])
def test_an_interrupt_before_anything_is_known(
    method: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(monkeypatch, after=12)
    picture = tmp_path / "why.png"
    result = run("explain", DIGITS, THREE, "--method", *method, "--output", str(picture),
                 "--option", "perturbations_per_eval=4")  # fmt: skip
    assert result.exit_code == 130
    assert result.stdout == "" and not picture.exists()
    assert "interrupted: nothing is known yet of example 1" in result.stderr


@pytest.mark.parametrize(
    ("after", "method"), [(40, SAMPLED), (12, ("occlusion",)), (12, ("feature-ablation",))]
)
def test_an_interrupt_keeps_what_was_computed(
    after: int, method: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(monkeypatch, after)
    picture, archive = tmp_path / "why.png", tmp_path / "why.npz"
    result = run("explain", DIGITS, THREE, "--method", *method, "--save", str(archive), "--output",
                 str(picture), "--option", "perturbations_per_eval=4")  # fmt: skip
    assert result.exit_code == 130
    assert "INCOMPLETE" in result.stdout
    assert f"interrupted: what was computed is in {picture}, {archive}" in result.stderr
    assert picture.stat().st_size > 1000
    assert 0 < ox.load_explanation(archive).checks["completed"][0] < 1


def _interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls = 0
    plain = Session.__call__

    def interrupted(self: Session, *args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return plain(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "__call__", interrupted)


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
        (("explain", SENTIMENT, THREE), "digit_3.png is a file, and not one for a text model"),
        (("explain", DIGITS, f"foo={THREE}"), r"foo is no input of the model \(inputs: image\)"),
        (("explain", SENTIMENT, f"foo={THREE}"), "foo is no input of the model"),
        (("explain", DIGITS, THREE, "--method", "layer-activation"), "'onnxplain layers MODEL'"),
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
        (
            ("explain", CANCER, PATIENTS, "--method", "shapley-values"),
            r"2\^30 = 1,073,741,824 .* give --option feature_mask=FILE.npy "
            r"\(of pictures: --segments\) with at most 24 groups",
        ),
        (
            ("explain", DIGITS, THREE, "--method", "lime-tabular"),
            "give its rows with --baseline FILE.csv",
        ),
        (
            ("explain", DIGITS, THREE, "--method", "lime-text"),
            "explain images with lime-image, tables with lime-tabular",
        ),
        (("explain", CANCER, PATIENTS, "--baseline", "foo"), "no file, and none of .*zero, mean"),
        (("explain", CANCER, PATIENTS, "--baseline", "blur"), "--baseline blur is for pictures"),
        (("explain", DIGITS, THREE, "--baseline", "none.png"), "none.png does not exist"),
        (("explain", CANCER, PATIENTS, "--baseline", "mask"), "mask is for text"),
        (
            ("explain", CANCER, PATIENTS, "--method", "lime", "--segments", "slic"),
            "only pictures have segments",
        ),
        (
            ("explain", DIGITS, THREE, "--method", "lime", "--segments", "voronoi"),
            "give quickshift, slic, felzenszwalb, watershed, grid:N, or a .npy",
        ),
        (
            ("explain", DIGITS, THREE, "--method", "lime", "--segments", "quickshift:9"),
            "a number .* is for slic, watershed and grid",
        ),
        (("explain", DIGITS, THREE, "--baseline", "inpaint"), "this method has no feature mask"),
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


def test_a_picture_array_that_is_no_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 1, 8, 8), np.nan))
    result = run("explain", DIGITS, str(tmp_path / "x.npy"))
    assert re.fullmatch("error: .*NaN or infinite.*\n", result.stderr)


def test_a_model_without_inputs(tmp_path: Path) -> None:
    model = _save(
        tmp_path / "m.onnx", "m () => (float[1,2] y) { y = Constant<value_floats=[1., 2.]>() }"
    )
    result = run("explain", model, PATIENTS)
    assert result.exit_code == 1
    assert re.fullmatch("error: the model has no inputs.*\n", result.stderr)


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
        (("explain", DIGITS, THREE, "--save", "why.txt"), "must end in .npz"),
        (
            ("explain", DIGITS, THREE, "--option", "n_steps=few"),
            "n_steps=few: must be a whole number",
        ),
        (("explain", DIGITS, THREE, "--option", "n_steps=1.5"), "must be a whole number"),
        (("explain", DIGITS, THREE, "--option", "internal_batch_size=a"), "whole number or none"),
        (
            ("explain", DIGITS, THREE, "--method", "saliency", "--option", "abs=1"),
            "must be true or false",
        ),
        (("explain", SENTIMENT, "it was good", "--size", "8,8"), "--size: for pictures"),
        (("explain", DIGITS, THREE, "--segments", "slic"), "--segments: method .* takes none"),
        (
            (
                "explain",
                DIGITS,
                THREE,
                "--method",
                "lime",
                "--segments",
                "slic",
                "--option",
                "feature_mask=3",
            ),
            "say the same",
        ),
        (
            (
                "explain",
                DIGITS,
                THREE,
                "--method",
                "occlusion",
                "--option",
                "sliding_window_shapes=wide",
            ),
            "must be numbers with commas",
        ),
        (
            (
                "explain",
                CANCER,
                PATIENTS,
                "--method",
                "lime-tabular",
                "--option",
                "training_data=x.csv",
            ),
            "training_data: give --baseline FILE.csv instead",
        ),
        (
            ("explain", CANCER, PATIENTS, "--method", "lime", "--option", "perturb_func=f"),
            "perturb_func: .* only given in Python",
        ),
        (
            ("explain", CANCER, PATIENTS, "--method", "layer-feature-ablation", "--baseline", "1"),
            "has none; the layer has: --option layer_baselines=NUMBER",
        ),
        (("explain", DIGITS, THREE, "--examples-axis", "x"), "is not an axis"),
        (
            ("explain", DIGITS, THREE, "--method", "lime", "--option", "feature_mask=[[1,2],[3]]"),
            "rows must be of equal length",
        ),
        (("layers", ""), "MODEL is empty"),
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
