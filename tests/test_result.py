"""Explanation: the forms it takes, what it says, and that a saved one comes back bit by bit."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxplain.errors import FileFormatError, InputError, OnnxplainError
from onnxplain.result import Display, Explanation, load_explanation, strongest

RNG = np.random.default_rng(0)


def explanation(**changes: Any) -> Explanation:
    values: dict[str, Any] = {
        "method": "integrated-gradients",
        "inputs": {"x": RNG.normal(size=(2, 4)).astype(np.float32)},
        "arrays": {"x": np.array([[0.1, -3, 2, 0], [0, 0, 0, 1]], np.float32)},
        "prediction": np.array([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]], np.float32),
        "target": np.array([1, 2]),
        "labels": ["cat", "dog", "bird"],
        "options": {"n_steps": 50, "shape": (1, 2), "limit": np.float32(0.5)},
        "checks": {"convergence_delta": np.array([1e-3, -2e-3])},
        "provenance": {"model": "m.onnx"},
    }
    return Explanation(**(values | changes))


def full() -> Explanation:
    """Everything set, with awkward names, dtypes, layouts in memory and special values."""
    return explanation(
        inputs={"x": np.asfortranarray(RNG.normal(size=(2, 3))), "ids": np.array([[1], [2]], "i8")},
        arrays={
            "/layer4/Conv_output_0": np.array([[np.nan, -0.0], [np.inf, 5e-324]]),
            "file": RNG.normal(size=(2, 0, 3)).astype(np.float16),
            "métadata\n": np.arange(2)[:, None] > 0,
        },
        form="dict",
        target=np.array([[1], [2]], np.int32),
        layer="/layer4/Conv",
        standard_errors={"/layer4/Conv_output_0": np.array([[np.nan, 0.1], [np.inf, 0]])},
        features={"métadata\n": np.array([[7]])},
        display=Display(
            kind="image",
            layout="NHWC",
            images=RNG.integers(0, 256, (2, 5, 4, 3), np.uint8),
            feature_names=["a", "ü"],
            values=np.array([["1", None], [2.5, "red"]], object),
            tokens=[["<b>", "x"], []],
            names=["a.png", ""],
            input_name="x",
        ),
    )


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, Explanation | Display):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


@pytest.mark.parametrize("make", [explanation, full])
def test_save_and_load_bit_by_bit(tmp_path: Path, make: Any) -> None:
    saved = make()
    saved.save(tmp_path / "why.npz")
    assert_same(load_explanation(str(tmp_path / "why.npz")), saved)
    assert os.listdir(tmp_path) == ["why.npz"]


def test_attributions_come_in_the_form_of_the_inputs() -> None:
    a, b = np.ones((2, 1)), np.zeros((2, 3))
    assert explanation(arrays={"x": a}).attributions is a
    in_tuple = explanation(arrays={"x": a, "y": b}, form="tuple").attributions
    assert isinstance(in_tuple, tuple) and in_tuple[0] is a and in_tuple[1] is b
    assert explanation(arrays={"x": a, "y": b}, form="dict").attributions == {"x": a, "y": b}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"form": "list"}, "'list'"),
        ({"arrays": {}}, "0 attribution arrays"),
        ({"arrays": {"x": np.ones((2, 1)), "y": np.ones((2, 1))}}, "form array"),
        ({"arrays": {"x": np.ones((3, 1))}}, r"\[3, 1\] for 2 examples"),
        ({"arrays": {"x": np.array(1.0)}}, r"shape \[\]"),
        ({"prediction": np.array(1.0)}, "scalar"),
        ({"target": np.array([1.0, 2.0])}, "float64"),
        ({"target": np.array([1, 3])}, "within"),
        ({"target": np.array([-1, 0])}, "within"),
        ({"target": np.array([1, 1, 1])}, r"int64 \[3\]"),
        ({"target": np.array(1)}, r"int64 \[\]"),
        ({"labels": ["cat", "dog"]}, "2 labels"),
        ({"standard_errors": {"x": np.ones((2, 1))}}, r"errors of 'x' have shape \[2, 1\]"),
        ({"standard_errors": {"y": np.ones((2, 4))}}, "no attributions of that name"),
        ({"features": {"x": np.ones((1, 3), int)}}, r"features of 'x' have shape \[1, 3\]"),
        ({"display": Display(kind="table", names=["a"])}, "1 display.names for 2 examples"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        explanation(**changes)


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 3)), np.zeros((1, 3, 4, 4), np.uint8)])
def test_display_wants_pictures(images: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8"):
        Display(kind="image", images=images)


def test_summary_says_what_was_found_without_the_arrays() -> None:
    summary = json.loads(explanation().to_json(top=2))
    assert summary["method"] == "integrated-gradients"
    assert summary["options"] == {"n_steps": 50, "shape": [1, 2], "limit": 0.5}
    first, second = summary["examples"]
    assert (first["target"], first["label"]) == (1, "dog")
    assert first["value"] == pytest.approx(0.7)
    assert [p["label"] for p in first["prediction"]] == ["dog", "cat"]
    assert first["checks"] == {"convergence_delta": 1e-3}
    assert first["attributions"]["x"] == {
        "sum": pytest.approx(-0.9),
        "top": [{"index": 1, "value": -3.0}, {"index": 2, "value": 2.0}],
    }
    assert second["label"] == "bird" and second["checks"] == {"convergence_delta": -2e-3}
    assert "NaN" not in full().to_json() and '"nan"' in full().to_json()


def test_summary_of_one_value_per_example() -> None:
    one = explanation(prediction=np.array([[1.5], [2.5]]), target=None, labels=None)
    assert [e["value"] for e in one.summary()["examples"]] == [1.5, 2.5]
    batch_wide = explanation(arrays={"x": np.array([[1.0, 2.0]])})
    assert [e["attributions"]["x"]["sum"] for e in batch_wide.summary()["examples"]] == [3, 3]


def test_labels_name_the_axis_they_fit() -> None:
    segmentation = explanation(
        prediction=np.zeros((2, 3, 4, 5)), target=np.array([[2, 0, 0], [0, 3, 4]])
    )
    assert [segmentation.label(segmentation.target_index(i)) for i in (0, 1)] == ["bird", "cat"]


def test_samples_of_a_check_stay_with_their_example() -> None:
    sampled = explanation(checks={"convergence_delta": np.arange(6.0), "odd": np.arange(3)})
    assert sampled.check_row("convergence_delta", 1).tolist() == [3, 4, 5]
    assert sampled.check_row("odd").size == 0


@pytest.mark.parametrize("k", [0, 1, 3, 6, 9])
def test_strongest(k: int) -> None:
    values = np.array([[1.0, -7, 0], [7, np.nan, -2]])
    assert strongest(values, k) == [(1, 1), (0, 1), (1, 0), (1, 2), (0, 0), (0, 2)][:k]


def test_an_option_that_is_no_data_is_recorded_by_its_repr(tmp_path: Path) -> None:
    kept = explanation(options={"perm_func": len})
    kept.save(tmp_path / "why.npz")
    assert load_explanation(tmp_path / "why.npz").options == {"perm_func": repr(len)}


class Bomb:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


def metadata(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        members = dict(file)
    text = json.dumps(json.loads(members["metadata"].tobytes()) | changes)
    np.savez(path, **(members | {"metadata": np.frombuffer(text.encode(), np.uint8)}))


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -100])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "why.npz"
    full().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"why\.npz"):
        load_explanation(path)


def test_a_flipped_bit_in_any_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "why.npz"
    full().save(path)
    intact = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        ends = [
            info.header_offset + 30 + len(info.filename.encode()) + info.file_size
            for info in archive.infolist()
        ]
    for end in ends:
        path.write_bytes(intact[: end - 1] + bytes([intact[end - 1] ^ 1]) + intact[end:])
        with pytest.raises(FileFormatError):
            load_explanation(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_text("method,target\n"),
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
        lambda path: np.save(path, np.zeros(3)),
        lambda path: np.savez(path, x=np.zeros(3)),
        lambda path: np.savez(path, metadata=np.frombuffer(b"[1]", np.uint8)),
        lambda path: np.savez(path, metadata=np.frombuffer(b"{", np.uint8)),
        lambda path: np.savez(path, metadata=np.array([Bomb()], object)),
        lambda path: None,
    ],
    ids=[
        "folder",
        "text",
        "pickle",
        "npy",
        "npz",
        "list-metadata",
        "bad-json",
        "pickled-member",
        "missing",
    ],
)
def test_foreign_files_are_refused_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "why.npz")
    with pytest.raises(FileFormatError, match=r"why\.npz"):
        load_explanation("why.npz")
    assert not Path("exploded").exists()


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "why.npz"
    explanation().save(path)
    metadata(path, version=3)
    with pytest.raises(FileFormatError, match="upgrade"):
        load_explanation(path)


@pytest.mark.parametrize(
    "changes", [{"explanation": {}}, {"explanation": {"method": "x", "form": "y"}}, {"names": {}}]
)
def test_inconsistent_metadata_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "why.npz"
    explanation().save(path)
    metadata(path, **changes)
    with pytest.raises(FileFormatError, match="damaged"):
        load_explanation(path)


def test_a_failing_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "why.npz"
    explanation().save(path)
    before = path.read_bytes()

    def full_disk(file: Any, **members: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(InputError, match="No space left"):
        full().save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["why.npz"]


def test_arrays_that_need_pickle_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = explanation(inputs={"x": np.array([["a"], [None]], object)})
    with pytest.raises(InputError, match="object"):
        words.save(tmp_path / "why.npz")
    assert not os.listdir(tmp_path)


def test_saving_where_nothing_can_be_written_is_a_typed_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "such" / "why.npz"):
        with pytest.raises(OnnxplainError, match="can't write"):
            explanation().save(path)


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    explanation().save(tmp_path / "real.npz")
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    full().save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    assert load_explanation(tmp_path / "real.npz").layer == "/layer4/Conv"


@pytest.mark.parametrize(
    ("name", "magic"),
    [
        ("a.png", b"\x89PNG"),
        ("a.html", b"<!doctype html>"),
        ("a.SVG", b"<?xml"),
        ("a.pdf", b"%PDF"),
    ],
)
def test_plot_saves_by_suffix(tmp_path: Path, name: str, magic: bytes) -> None:
    explanation().plot(tmp_path / name, example=1, top=2)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_plot_refuses_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png"):
        explanation().plot(tmp_path / "why.docx")
    assert not os.listdir(tmp_path)


# --- estimates and features ---------------------------------------------------------------------


def test_standard_errors_are_told_beside_the_values() -> None:
    errors = np.array([[0.1, 0.5, 0.3, 0.2], [0.1, 0.1, 0.1, np.nan]])
    made = explanation(standard_errors={"x": errors})
    np.testing.assert_array_equal(made.error_row("x", 1), errors[1])
    assert explanation().error_row("x") is None
    first, second = (e["attributions"]["x"] for e in made.summary(top=2)["examples"])
    assert first["top"] == [
        {"index": 1, "value": -3.0, "standard_error": 0.5},
        {"index": 2, "value": 2.0, "standard_error": 0.3},
    ]
    assert second["top"][0]["standard_error"] == "nan"
    assert json.loads(made.to_json())


def test_values_that_are_one_feature_count_once() -> None:
    values = np.array([[2.0, 2.0, -5.0, 2.0], [1.0, 3.0, 1.0, 1.0]])
    masks = np.array([[4, 4, 9, 4], [0, 1, 0, 0]])
    made = explanation(
        arrays={"x": values}, features={"x": masks}, standard_errors={"x": values / 10}
    )
    first, second = (e["attributions"]["x"] for e in made.summary()["examples"])
    assert first == {
        "sum": -3.0,
        "top": [
            {"feature": 9, "size": 1, "value": -5.0, "standard_error": -0.5},
            {"feature": 4, "size": 3, "value": 2.0, "standard_error": 0.2},
        ],
    }
    assert second["sum"] == 4
    shared = explanation(arrays={"x": values}, features={"x": masks[:1]})
    np.testing.assert_array_equal(shared.feature_row("x", 1), masks[0])


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    path = tmp_path / "why.npz"
    explanation().save(path)
    with np.load(path) as file:
        members = dict(file)
    written = json.loads(members["metadata"].tobytes())
    written["version"] = 1
    for group in ("standard_errors", "features"):
        assert written["names"].pop(group) == []
    members["metadata"] = np.frombuffer(json.dumps(written).encode(), np.uint8)
    np.savez(path, **members)
    assert_same(load_explanation(path), explanation(inputs=load_explanation(path).inputs))
