"""Files to arrays: what is read, what is refused, and where the settings come from."""

from __future__ import annotations

import contextlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest

from onnxplain.errors import FileFormatError, InputError
from onnxplain.inputs import (
    Preprocessing,
    Sample,
    default_windows,
    find_preprocessing,
    load_baselines,
    load_input,
    load_inputs,
    load_segments,
    token_features,
)
from onnxplain.inputs import image as image_module
from onnxplain.inputs.files import read_csv, read_npy, read_npz
from onnxplain.inputs.image import read_image
from onnxplain.result import Display

MODELS = Path(__file__).resolve().parents[1] / "models"


class Spec(NamedTuple):
    name: str
    dtype: str
    shape: tuple[Any, ...] | None


PICTURE = Spec("image", "float", ("N", 3, 4, 6))
GREY = Spec("image", "float", ("N", 1, 4, 6))
TABLE = Spec("x", "float", ("N", 3))
TOKENS = Spec("tokens", "int64", ("N", "T"))
SERIES = Spec("series", "float", ("N", 5, 2))


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.fixture
def png(tmp_path: Path, rgb: np.ndarray) -> Path:
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(rgb).save(path)
    return path


# --- pictures -----------------------------------------------------------------------------------


def test_a_picture_becomes_normalized_channels_first(png: Path, rgb: np.ndarray) -> None:
    setting = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    sample = load_input(png, PICTURE, setting)
    wanted = (rgb / 255 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    assert sample.arrays["image"].dtype == np.float32
    np.testing.assert_allclose(sample.arrays["image"][0], wanted.transpose(2, 0, 1), atol=1e-6)
    assert sample.display.kind == "image"
    assert sample.display.layout == "NCHW"
    np.testing.assert_array_equal(sample.display.images, rgb[None])


def test_bgr_channels_last_and_0_to_255(png: Path, rgb: np.ndarray) -> None:
    setting = Preprocessing(channels="BGR", scale=1.0, mean=(104.0, 117.0, 123.0))
    sample = load_input(png, Spec("image", "float", ("N", 4, 6, 3)), setting)
    np.testing.assert_allclose(sample.arrays["image"][0], rgb[..., ::-1] - [104.0, 117.0, 123.0])
    np.testing.assert_array_equal(sample.display.images, rgb[None])


def test_an_integer_input_takes_0_to_255(png: Path, rgb: np.ndarray) -> None:
    sample = load_input(png, Spec("image", "uint8", (1, 3, 4, 6)))
    np.testing.assert_array_equal(sample.arrays["image"][0], rgb.transpose(2, 0, 1))


def test_grey_is_pillows_luma(png: Path, rgb: np.ndarray) -> None:
    grey = load_input(png, GREY, Preprocessing(scale=1.0)).arrays["image"][0, 0]
    pillow = np.asarray(PIL.Image.fromarray(rgb).convert("L"), np.float32)
    assert np.abs(grey - pillow).max() <= 0.51  # Pillow rounds


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_pixel_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 24).reshape(4, 6).astype(np.uint8)
    path = tmp_path / "picture.png"
    if mode == "I;16":
        PIL.Image.fromarray(ramp.astype(np.uint16) * 257).save(path)
    else:
        PIL.Image.fromarray(ramp).convert(mode).save(path)
    values = read_image(path)
    assert values.shape == (4, 6, 3)
    assert values.dtype == np.float32
    assert (values == values[..., :1]).all()
    if mode == "1":
        assert set(np.unique(values)) == {0.0, 255.0}
    else:
        np.testing.assert_allclose(values[..., 0], ramp, atol=0.01)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    wanted = [[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]
    np.testing.assert_allclose(read_image(path), wanted, atol=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_orientation_is_obeyed(
    orientation: int, tmp_path: Path, rgb: np.ndarray
) -> None:
    from PIL import ImageOps

    path = tmp_path / "picture.png"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(rgb).save(path, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(PIL.Image.open(path)))
    np.testing.assert_array_equal(read_image(path), upright)


def test_shortest_covers_and_crop_keeps_the_center(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    PIL.Image.fromarray(pixels).save(path)
    setting = Preprocessing(size=(4, 4), resize="shortest", scale=1.0)
    spec = Spec("image", "float", ("N", 3, 4, 4))
    inner = load_input(path, spec, setting).arrays["image"]
    assert inner.shape == (1, 3, 4, 4)
    assert inner[0, 0, :, 1:3].min() > 190
    squeezed = load_input(path, spec, Preprocessing(scale=1.0)).arrays["image"]
    assert squeezed[0, 0, :, 0].max() < 20  # "exact" shows the dark sides too


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    path = tmp_path / "stripes.png"
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    PIL.Image.fromarray(stripes).save(path)
    small = load_input(path, Spec("image", "float", ("N", 1, 8, 8))).arrays["image"]
    assert np.abs(small - 0.5).max() < 0.1


def test_pictures_of_one_size_are_one_batch_and_others_are_refused(
    png: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    PIL.Image.new("RGB", (3, 3)).save(other)
    free = Spec("image", "float", ("N", 3, "H", "W"))
    assert load_inputs([png, png], [free]).arrays["image"].shape == (2, 3, 4, 6)
    assert load_inputs([png, other], [PICTURE]).arrays["image"].shape == (2, 3, 4, 6)
    with pytest.raises(InputError, match=r"\[1, 3, 4, 6\], \[1, 3, 3, 3\].*--size"):
        load_inputs([png, other], [free])


def test_too_many_pixels_are_refused_before_decoding(
    png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "MAX_PIXELS", 20)
    monkeypatch.setattr("skimage.io.imread", lambda *_: pytest.fail("decoded"))
    with pytest.raises(FileFormatError, match="6 x 4 pixels; shrink it to at most 20"):
        read_image(png)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Preprocessing(channels="L"), "has 3 channels .* are L"),
        (Preprocessing(mean=(0.5,), std=(1.0, 1.0, 1.0), size=(4, 4)), r"shape \[1, 3, 4, 4\]"),
        (Preprocessing(size=(2, 2), crop=(4, 6)), "crop 4 x 6 is larger"),
        (Preprocessing(layout="NLC"), "can't take a picture as it is"),
    ],
)
def test_settings_that_contradict_the_model(
    setting: Preprocessing, message: str, png: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load_input(png, PICTURE, setting)


def test_three_means_for_one_channel(png: Path) -> None:
    with pytest.raises(InputError, match="don't fit the channels L"):
        load_input(png, GREY, Preprocessing(mean=(0.1, 0.2, 0.3)))


def test_a_mean_of_0_to_255_means_scale_1(png: Path, rgb: np.ndarray, caplog: Any) -> None:
    mean = (104.0, 117.0, 123.0)
    sample = load_input(png, PICTURE, Preprocessing(mean=mean, channels="BGR"))
    wanted = rgb[..., ::-1].transpose(2, 0, 1) - np.array(mean)[:, None, None]
    np.testing.assert_allclose(sample.arrays["image"][0], wanted, atol=1e-4)
    np.testing.assert_array_equal(sample.display.images[0], rgb)
    assert sample.setting.scale == 1
    assert not caplog.records
    load_input(png, PICTURE, Preprocessing(mean=mean, scale=1 / 255))
    assert "goes with scale 1" in caplog.text


# --- arrays and tables --------------------------------------------------------------------------


def test_an_array_gets_its_examples_axis_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(72, dtype=np.float64).reshape(3, 4, 6))
    sample = load_input(path, PICTURE)
    assert sample.arrays["image"].shape == (1, 3, 4, 6)
    assert sample.arrays["image"].dtype == np.float32
    assert sample.display.images is None  # what its values look like, nobody said


def test_an_array_is_shown_through_the_preprocessing(png: Path, tmp_path: Path) -> None:
    setting = Preprocessing(scale=1 / 255, mean=(0.4,), std=(0.3,), channels="BGR")
    from_picture = load_input(png, PICTURE, setting)
    path = tmp_path / "x.npy"
    np.save(path, from_picture.arrays["image"])
    from_array = load_input(path, PICTURE, setting)
    np.testing.assert_array_equal(from_array.arrays["image"], from_picture.arrays["image"])
    np.testing.assert_array_equal(from_array.display.images, from_picture.display.images)


@pytest.mark.parametrize(
    ("array", "spec", "message"),
    [
        (np.zeros((2, 4)), TABLE, r"shape \[2, 4\], but input 'x' takes \[N, 3\]"),
        (np.zeros((0, 3)), TABLE, r"is empty \(shape \[0, 3\]\)"),
        (np.zeros(()), TABLE, r"shape \[\]"),
        (np.full((1, 3), 0.5), Spec("x", "int64", ("N", 3)), "value 0.5.*int64"),
        (np.full((1, 3), 300), Spec("x", "uint8", ("N", 3)), "value 300.*uint8"),
        (np.full((1, 3), 1e39), TABLE, r"value 1e\+39.*float32"),
        (np.zeros((1, 3)), Spec("x", "string", ("N", 3)), "takes string"),
    ],
)
def test_arrays_that_do_not_fit(
    array: np.ndarray, spec: Spec, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.npy"
    np.save(path, array)
    with pytest.raises(InputError, match=message):
        load_input(path, spec)


def test_an_input_of_unknown_rank_takes_any_array(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2, 3, 4, 5, 6)))
    sample = load_input(path, Spec("x", "float", None))
    assert sample.arrays["x"].shape == (2, 3, 4, 5, 6)
    assert sample.display.kind == "array"


def test_several_inputs_by_name_and_from_one_archive(tmp_path: Path) -> None:
    specs = [TABLE, Spec("rate", "float", ("N", 1))]
    x, rate = np.ones((2, 3)), np.zeros((2, 1))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "rate.npy", rate)
    np.savez(tmp_path / "both.npz", rate=rate, x=x, expected=x)
    named = load_inputs([f"rate={tmp_path / 'rate.npy'}", tmp_path / "x.npy"], specs)
    packed = load_inputs([tmp_path / "both.npz"], specs)
    for sample in (named, packed):
        assert list(sample.arrays) == ["x", "rate"]
        assert sample.display.input_name == "x"
        np.testing.assert_array_equal(sample.arrays["x"], x)
        np.testing.assert_array_equal(sample.arrays["rate"], rate)
    with pytest.raises(InputError, match="no value for rate"):
        load_inputs([tmp_path / "x.npy"], specs)
    with pytest.raises(FileFormatError, match="holds rate, x, expected, none of the inputs y, z"):
        load_inputs([tmp_path / "both.npz"], [Spec("y", "float", None), Spec("z", "float", None)])


def test_csv_with_and_without_header(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\ufeffage,mass , size\n1,2,3\n\n4,5e1,-6\n", encoding="utf-8")
    sample = load_input(path, TABLE)
    np.testing.assert_array_equal(sample.arrays["x"], [[1, 2, 3], [4, 50, -6]])
    assert sample.display.feature_names == ["age", "mass", "size"]
    path.write_text("1;2;3\r\n4;5;6\r\n")
    assert read_csv(path)[1] is None
    np.testing.assert_array_equal(read_csv(path)[0], [[1, 2, 3], [4, 5, 6]])


def test_csv_columns_are_taken_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("label,c,a,b\n9,3,1,2\n")
    sample = load_input(path, TABLE, Preprocessing(feature_names=("a", "b", "c")))
    np.testing.assert_array_equal(sample.arrays["x"], [[1, 2, 3]])
    with pytest.raises(FileFormatError, match="no column 'd'; its header is label, c, a, b"):
        load_input(path, TABLE, Preprocessing(feature_names=("a", "b", "d")))


def test_feature_names_must_be_as_many_as_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("1,2,3\n")
    with pytest.raises(InputError, match=r"2 feature names .* \[1, 3\]"):
        load_input(path, TABLE, Preprocessing(feature_names=("a", "b")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,x2\n", r"line 2, column 2 \(b\): 'x2' is not a number"),
        ("a,b\n1,\n", r"line 2, column 2 \(b\): '' is not a number"),
        ("1,two\n", r"line 1, column 2: 'two' is not a number"),
        ("a,b\n1,2\n3\n", "line 3: 1 cells, but 2 columns"),
        ("a,b\n", "no rows of numbers"),
        ("a\x00b\n", "no rows of numbers"),
    ],
)
def test_csv_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_csv(path)


def test_a_csv_is_one_series(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("warm,wet\n" + "".join(f"{t},{-t}\n" for t in range(5)))
    sample = load_input(path, SERIES)
    assert sample.arrays["series"].shape == (1, 5, 2)
    assert sample.display.kind == "series"
    assert sample.display.layout == "NLC"
    assert sample.display.feature_names == ["warm", "wet"]
    first = load_input(path, Spec("s", "float", ("N", 2, 5)), Preprocessing(layout="NCL"))
    np.testing.assert_array_equal(first.arrays["s"][0], sample.arrays["series"][0].T)


# --- text ---------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> Preprocessing:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n!\ndidn't\nlike\ni\nit\n")
    return Preprocessing(
        tokenizer="words", vocabulary=str(path), lowercase=True, pad="[PAD]", unknown="[UNK]"
    )


def test_words_become_numbers(words: Preprocessing, tmp_path: Path) -> None:
    path = tmp_path / "review.txt"
    path.write_text("I didn't like it!\n")
    sample = load_inputs([path, "Like what?"], [TOKENS], words)
    np.testing.assert_array_equal(sample.arrays["tokens"], [[5, 3, 4, 6, 2], [4, 1, 1, 0, 0]])
    assert sample.arrays["tokens"].dtype == np.int64
    assert sample.display.tokens == [["i", "didn't", "like", "it", "!"], ["like", "what", "?"]]


def test_a_fixed_length_pads_and_cuts(
    words: Preprocessing, caplog: pytest.LogCaptureFixture
) -> None:
    spec = Spec("tokens", "int32", (1, 3))
    sample = load_inputs(["it", "i like it !"], [spec], words)
    np.testing.assert_array_equal(sample.arrays["tokens"], [[6, 0, 0], [5, 4, 6]])
    assert "4 tokens is cut to the model's 3" in caplog.text


def test_text_fills_the_mask_too(words: Preprocessing) -> None:
    specs = [Spec(name, "int64", ("N", "T")) for name in ("attention_mask", "input_ids")]
    sample = load_inputs(["it", "i like it"], specs, words)
    np.testing.assert_array_equal(sample.arrays["input_ids"], [[6, 0, 0], [5, 4, 6]])
    np.testing.assert_array_equal(sample.arrays["attention_mask"], [[1, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("change", "text", "message"),
    [
        ({"unknown": None}, "what", "'what' needs 'unknown'"),
        ({"unknown": "<unk>"}, "what", "'<unk>' is not in"),
        ({"pad": None, "length": 9}, "it", "need 'pad'"),
        ({}, " \n", "has no words"),
        ({"vocabulary": None}, "it", "needs a vocabulary"),
        ({"tokenizer": None}, "it", "no tokenizer is known"),
    ],
)
def test_text_that_cannot_be_encoded(
    change: dict[str, Any], text: str, message: str, words: Preprocessing
) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=message):
        load_input(text, TOKENS, replace(words, **change))


def test_a_tokenizer_file_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    setting = find_preprocessing(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r'pip install "onnxplain\[text\]"'):
        load_input("hello", TOKENS, setting)


def test_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    numbers = {"[UNK]": 0, "[PAD]": 1, "hello": 2, "world": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=64)  # would be explained for nothing
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    specs = [Spec(name, "int64", ("N", "T")) for name in ("input_ids", "attention_mask")]
    sample = load_inputs(
        ["hello world again", "world"], specs, find_preprocessing(tmp_path / "model.onnx")
    )
    np.testing.assert_array_equal(sample.arrays["input_ids"], [[2, 3, 0], [3, 1, 1]])
    np.testing.assert_array_equal(sample.arrays["attention_mask"], [[1, 1, 1], [1, 0, 0]])
    assert sample.display.tokens == [["hello", "world", "[UNK]"], ["world"]]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match="is not a tokenizer"):
        load_inputs(["hello"], specs, find_preprocessing(tmp_path / "model.onnx"))


# --- files that are not what they should be -----------------------------------------------------


def _truncated_png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def _gif_of_two_frames(path: Path) -> None:
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def _truncated_npy(path: Path) -> None:
    np.save(path, np.ones((100, 3)))
    path.write_bytes(path.read_bytes()[:1000])


def _huge_npy(path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def _huge_npz(path: Path) -> None:
    _huge_npy(path)
    data = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data)


def _damaged_npz(path: Path) -> None:
    np.savez(path, x=np.ones((100, 3)))
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)


class _Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("the pickle was loaded",)


def _pickled_npy(path: Path) -> None:
    np.save(path, np.array([_Trap()], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.png", None, "does not exist"),
        ("x.png", lambda path: path.write_bytes(b""), "is empty"),
        ("x.png", lambda path: path.mkdir(), "is a folder"),
        ("x.png", lambda path: path.write_bytes(b"hello"), "no known format"),
        ("x.png", _truncated_png, "can't be decoded"),
        ("x.gif", _gif_of_two_frames, "several frames"),
        ("x.jpg", lambda path: PIL.Image.new("CMYK", (4, 4)).save(path), "CMYK"),
        ("x.txt", lambda path: path.write_text("hello"), "no known format"),
        ("x.npy", None, "does not exist"),
        ("x.npy", lambda path: path.write_bytes(b"hello"), "as a NumPy array: EOF"),
        ("x.npy", _truncated_npy, "is truncated"),
        ("x.npy", _huge_npy, "is truncated"),
        ("x.npy", _pickled_npy, "it holds object"),
        ("x.npy", lambda path: np.save(path, np.array(["a"])), "it holds <U1"),
        ("x.npz", lambda path: path.write_bytes(b"hello"), r"as \.npz: File is not a zip"),
        ("x.npz", _huge_npz, "'x' .* truncated"),
        ("x.npz", _damaged_npz, "'x' .* Bad CRC"),
        ("x.csv", lambda path: path.write_bytes(b"\xff\xfe1,2"), "not UTF-8"),
    ],
)
def test_files_that_are_wrong(
    name: str, make: Callable[[Path], object] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if make is not None:
        make(path)
    with pytest.raises(FileFormatError, match=message) as caught:
        load_input(path, PICTURE)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".bmp", ".npy", ".npz"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about the damage
def test_damaged_files_are_refused_or_read_but_never_crash(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "MAX_PIXELS", 10_000)
    rng = np.random.default_rng(0)
    path = tmp_path / f"x{suffix}"
    pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    values = rng.random((1, 3, 4, 6), np.float32)
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".npz":
        np.savez_compressed(path, image=values)
    else:
        PIL.Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    read = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        with contextlib.suppress(InputError):
            read += load_input(path, PICTURE).arrays["image"].shape == (1, 3, 4, 6)
    assert read < 150


def test_archives_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(10_000))
    monkeypatch.setattr("onnxplain.inputs.files.MAX_ARCHIVE_BYTES", 10_000)
    with pytest.raises(FileFormatError, match="unpacks to more than 10000 bytes"):
        read_npz(tmp_path / "x.npz")


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    array = np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4)))
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", a=array, b=array.astype(np.float16))
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy"), array)
    assert read_npz(tmp_path / "x.npz")["b"].dtype == np.float16


def test_a_picture_for_a_table(png: Path) -> None:
    with pytest.raises(FileFormatError, match=r"takes table; give \.npy"):
        load_input(png, TABLE)
    with pytest.raises(FileFormatError, match="say --layout"):
        load_input(png, Spec("x", "float", ("N", "C", "H", "W")))


# --- settings -----------------------------------------------------------------------------------


def _write_toml(folder: Path, text: str) -> Path:
    (folder / "onnxplain.toml").write_text(text)
    return folder / "model.onnx"


def test_a_toml_beside_the_model(tmp_path: Path) -> None:
    model = _write_toml(
        tmp_path,
        """
        [input]
        name = "image"
        size = [4, 6]
        scale = 1
        mean = [1, 2, 3]
        [output]
        name = "logits"
        labels_file = "labels.txt"
        """,
    )
    (tmp_path / "labels.txt").write_text("cat\n dog \r\n")
    found = find_preprocessing(model)
    assert (found.name, found.size, found.scale, found.mean) == ("image", (4, 6), 1, (1, 2, 3))
    assert (found.output, found.labels) == ("logits", ("cat", "dog"))
    assert found.sources == (str(tmp_path / "onnxplain.toml"),)


def test_a_toml_for_another_model_is_left_alone_unless_named(tmp_path: Path) -> None:
    model = _write_toml(tmp_path, 'model = "other.onnx"\n[output]\nlabels = ["a"]\n')
    assert find_preprocessing(model).labels is None
    assert find_preprocessing(model, config=tmp_path / "onnxplain.toml").labels == ("a",)


def test_flags_go_first_setting_by_setting(tmp_path: Path) -> None:
    model = _write_toml(tmp_path, "[input]\nscale = 2.0\nmean = [0.5]\n")
    found = find_preprocessing(model, Preprocessing(scale=3.0))
    assert (found.scale, found.mean) == (3.0, (0.5,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[input]\nsise = [8, 8]\n", r"unknown key 'sise' in \[input\]; allowed: name, kind"),
        ("inptu = 3\n", "unknown key 'inptu'; allowed: model, input, output"),
        ("[output]\nname = 3\n", r"'name' in \[output\] must be a string, not 3"),
        ("input = 3\n", "'input' must be a table, not 3"),
        ("[input]\nsize = [8]\n", "'size' .* height and width"),
        ("[input]\nsize = [8, 8.5]\n", "'size' .* height and width"),
        ("[input]\nsize = [100000, 100000]\n", "'size' .* 100 million pixels"),
        ("[input]\nscale = true\n", "'scale' .* finite number"),
        ("[input]\nscale = 0\n", "'scale' .* other than 0"),
        ("[input]\nmean = [nan]\n", "'mean' .* finite"),
        ("[input]\nstd = [1.0, 0.0, 1.0]\n", "'std' .* none of them 0"),
        ("[input]\nlayout = 'NWHC'\n", "'layout' .* one of NCHW, NHWC, NLC, NCL, not 'NWHC'"),
        ("[input]\norder = 1.0\n", "'order' .* one of 0, 1, 2, 3"),
        ("[input]\nlowercase = 1\n", "'lowercase' .* true or false"),
        ("[output]\nlabels = ['a', 2]\n", "'labels' .* list of strings"),
        ("[output]\nlabels = ['a']\nlabels_file = 'b'\n", "keep one"),
        ("[output]\nlabels_file = 'none.txt'\n", "none.txt does not exist"),
        ("[input\n", "not valid TOML"),
        ("", "is empty"),
    ],
)
def test_toml_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    model = _write_toml(tmp_path, text)
    with pytest.raises(FileFormatError, match=message) as caught:
        find_preprocessing(model)
    assert str(tmp_path) in str(caught.value)


def test_a_toml_for_an_input_that_the_model_lacks(tmp_path: Path, png: Path) -> None:
    model = _write_toml(tmp_path, '[input]\nname = "pixels"\n')
    with pytest.raises(FileFormatError, match=r"onnxplain.toml.* 'pixels'; the model has image"):
        load_input(png, PICTURE, find_preprocessing(model))


VIT = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.5, 1.0],
    "resample": 2,
    "size": 224,
}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (VIT, {"size": (224, 224), "resize": "exact", "order": 1, "std": (0.25, 0.5, 1.0)}),
        (VIT, {"scale": 1 / 255, "mean": (0.5, 0.5, 0.5), "crop": None, "kind": "image"}),
        ({**VIT, "size": {"height": 8, "width": 9}, "resample": 3}, {"size": (8, 9), "order": 3}),
        (
            {**VIT, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224},
            {"size": (256, 256), "resize": "shortest", "crop": (224, 224)},
        ),
        (
            {**VIT, "do_center_crop": True, "crop_size": {"height": 7, "width": 8}},
            {"size": (224, 224), "resize": "shortest", "crop": (7, 8)},
        ),
        (
            {**VIT, "crop_pct": 0.875, "size": {"shortest_edge": 224}},
            {"size": (256, 256), "resize": "shortest", "crop": (224, 224)},
        ),
        ({**VIT, "crop_pct": 0.875, "size": 384}, {"size": (384, 384), "resize": "exact"}),
        ({**VIT, "do_resize": False, "do_normalize": False}, {"size": None, "mean": None}),
        ({**VIT, "do_rescale": False}, {"scale": 1.0}),
        ({**VIT, "rescale_factor": 0.5, "do_flip_channel_order": True}, {"channels": "BGR"}),
        ({"sampling_rate": 16000, "do_normalize": True}, {"kind": None, "scale": None}),
    ],
)
def test_hugging_face_picture_settings(
    config: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = find_preprocessing(tmp_path / "model.onnx")
    assert {key: getattr(found, key) for key in wanted} == wanted


def test_hugging_face_labels_come_in_numeric_order(tmp_path: Path) -> None:
    names = {str(i): f"class {i}" for i in (10, 2, 1, 0, *range(3, 10))}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names}))
    found = find_preprocessing(tmp_path / "model.onnx")
    assert found.labels == tuple(f"class {i}" for i in range(11))


def test_a_toml_replaces_hugging_face_picture_settings_as_a_whole(tmp_path: Path) -> None:
    config = {**VIT, "do_center_crop": True, "crop_size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "cat"}}))
    found = find_preprocessing(_write_toml(tmp_path, "[input]\nsize = [9, 9]\n"))
    assert (found.size, found.crop, found.mean, found.labels) == ((9, 9), None, None, ("cat",))
    found = find_preprocessing(_write_toml(tmp_path, '[output]\nlabels = ["dog"]\n'))
    assert (found.crop, found.labels) == ((224, 224), ("dog",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("preprocessor_config.json", "{", "not valid JSON"),
        ("preprocessor_config.json", "[" * 100_000, "not valid JSON"),
        ("preprocessor_config.json", "[]", "holds a list"),
        ("preprocessor_config.json", '{"size": {"longest_edge": 9}}', "longest_edge"),
        ("preprocessor_config.json", '{"size": "big"}', "'big' is not height and width"),
        ("preprocessor_config.json", '{"size": 9, "resample": 9}', "'resample' must be one of 0"),
        ("preprocessor_config.json", '{"image_mean": [1, 2]}', "'image_mean' must be 1 or 3"),
        ("config.json", '{"id2label": {"1": "a"}}', "id2label"),
        ("config.json", '{"id2label": 3}', "id2label"),
    ],
)
def test_hugging_face_files_that_are_wrong(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileFormatError, match=message):
        find_preprocessing(tmp_path / "model.onnx")


# --- baselines ----------------------------------------------------------------------------------


def test_zero_and_numbers_are_themselves(png: Path) -> None:
    sample = load_input(png, PICTURE)
    assert load_baselines("zero", sample, [PICTURE], Preprocessing()) is None
    assert load_baselines("-1.5", sample, [PICTURE], Preprocessing()) == -1.5


def test_mean_is_of_each_channel(png: Path, rgb: np.ndarray) -> None:
    sample = load_input(png, PICTURE)
    (mean,) = load_baselines("mean", sample, [PICTURE], Preprocessing()).values()
    assert mean.shape == (1, 3, 4, 6)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean[0, :, 0, 0], rgb.mean((0, 1)) / 255, rtol=1e-6)
    assert (mean == mean[:, :, :1, :1]).all()


def test_blur_keeps_the_mean_and_loses_the_detail(tmp_path: Path) -> None:
    spec = Spec("image", "float", ("N", 64, 64, 3))
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(1, 64, 64, 3)) + np.arange(0, 15, 5))
    sample = load_input(path, spec)
    (blur,) = load_baselines("blur", sample, [spec], Preprocessing()).values()
    assert blur.shape == (1, 64, 64, 3)
    assert blur.dtype == np.float32
    np.testing.assert_allclose(blur[0].mean((0, 1)), [0, 5, 10], atol=0.1)  # channels apart
    assert blur[..., 0].std() < 0.2


def test_a_file_is_read_like_the_input(png: Path) -> None:
    setting = Preprocessing(mean=(0.5,))
    sample = load_input(png, PICTURE, setting)
    found = load_baselines(str(png), sample, [PICTURE], setting)
    np.testing.assert_array_equal(found["image"], sample.arrays["image"])


def test_baselines_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones(3))
    sample = load_input(path, TABLE)
    for choice in ("mean", "blur"):
        with pytest.raises(InputError, match=f"--baseline {choice} .* is table"):
            load_baselines(choice, sample, [TABLE], Preprocessing())
    with pytest.raises(InputError, match=r"median is no file, and none of .*blur"):
        load_baselines("median", sample, [TABLE], Preprocessing())


@pytest.mark.parametrize("choice", ["noise", "gaussian-noise"])
def test_noise_is_of_the_seed(png: Path, choice: str) -> None:
    sample = load_input(png, PICTURE)
    found = [
        load_baselines(choice, sample, [PICTURE], Preprocessing(), seed)["image"]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_baselines_of_features_are_left_to_the_method(png: Path) -> None:
    sample = load_input(png, PICTURE)
    for choice in ("inpaint", "segment-mean"):
        found = load_baselines(choice, sample, [PICTURE], Preprocessing())
        assert found == {"image": choice}


def test_rows_of_a_background(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12.0).reshape(4, 3))
    sample = load_input(path, TABLE)
    found = load_baselines(f"background:{path}", sample, [TABLE], Preprocessing())
    assert found.rows["x"].shape == (4, 3)


def test_the_token_of_a_missing_word(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_text("<pad>\n<unk>\ngood\n[MASK]\n")

    def setting(**more: Any) -> Preprocessing:
        return Preprocessing(tokenizer="words", vocabulary=path, pad="<pad>", **more)

    sample = load_input("good", TOKENS, setting(unknown="<unk>"))
    assert load_baselines("mask", sample, [TOKENS], setting()) == {"tokens": 3}
    path.write_text("<pad>\n<unk>\ngood\n")
    assert load_baselines("mask", sample, [TOKENS], setting(unknown="<unk>")) == {"tokens": 1}
    assert load_baselines("mask", sample, [TOKENS], setting()) == {"tokens": 0}
    path.write_text("good\nbad\n")
    with pytest.raises(InputError, match=r"has none of '\[MASK\]', '<mask>', '<pad>'"):
        load_baselines("mask", sample, [TOKENS], setting())


# --- what is switched off together --------------------------------------------------------------


@pytest.mark.parametrize("spec", [PICTURE, GREY, Spec("image", "float", ("N", 4, 6, 3))])
def test_segments_lie_on_the_places_of_the_input(spec: Spec, png: Path) -> None:
    sample = load_input(png, spec)
    (found,) = load_segments("grid:2", sample).values()
    last = spec.shape is not None and spec.shape[-1] == 3
    assert found.shape == ((1, 4, 6, 1) if last else (1, 1, 4, 6))
    wanted = [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    np.testing.assert_array_equal(found.reshape(4, 6), wanted)


def test_segments_of_a_file_for_all_or_each(tmp_path: Path) -> None:
    path, masks = tmp_path / "x.npy", tmp_path / "masks.npy"
    np.save(path, np.random.default_rng(0).random((2, 3, 4, 6)))
    sample = load_input(path, PICTURE)
    halves = np.indices((4, 6))[1] // 3
    for given in (halves, np.stack([halves, 1 - halves])):
        np.save(masks, given)
        (found,) = load_segments(str(masks), sample).values()
        np.testing.assert_array_equal(found[:, 0], np.broadcast_to(given, (2, 4, 6)))
    np.save(masks, np.stack([halves] * 3))
    with pytest.raises(InputError, match=r"3 divisions of 2 picture\(s\)"):
        load_segments(str(masks), sample)


def test_padding_is_one_feature(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_text("<pad>\ngood\nbad\n")
    setting = Preprocessing(tokenizer="words", vocabulary=path, pad="<pad>")
    found = token_features(load_inputs(["good bad good", "bad"], [TOKENS], setting))
    assert found is not None
    np.testing.assert_array_equal(found["tokens"], [[0, 1, 2], [0, 1, 1]])
    assert token_features(load_inputs(["good bad"], [TOKENS], setting)) is None


@pytest.mark.parametrize(
    ("shape", "layout", "window", "stride"),
    [
        ((3, 224, 200), "NCHW", (3, 14, 14), (3, 7, 7)),
        ((224, 224, 3), "NHWC", (16, 16, 3), (8, 8, 3)),
        ((1, 8, 8), "NCHW", (1, 2, 2), (1, 1, 1)),
        ((3, 1, 40), "NCHW", (3, 1, 1), (3, 1, 1)),
        ((100, 6), "NLC", (7, 6), (3, 6)),
        ((30,), None, (1,), (1,)),
    ],
)
def test_windows_that_suit_the_input(
    shape: tuple[int, ...], layout: Any, window: Any, stride: Any
) -> None:
    kind: Any = {3: "image", 2: "series", 1: "table"}[len(shape)]
    display = Display(kind=kind, layout=layout, input_name="x")
    arrays = {"x": np.zeros((1, *shape)), "y": np.zeros((1, 4))}
    sample = Sample(arrays, display, Preprocessing())
    assert default_windows(sample, ["x"]) == (window, stride)
    assert default_windows(sample, ["x", "y"]) == ((window, (1,)), (stride, (1,)))


# --- the bundled models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "spec", "source", "shape"),
    [
        ("digits", Spec("image", "float", ("N", 1, 8, 8)), "digit_3.png", (1, 1, 8, 8)),
        ("breast_cancer", Spec("features", "float", ("N", 30)), "patients.csv", (6, 30)),
        ("sentiment", TOKENS, "negation.txt", (1, 8)),
    ],
)
def test_bundled_samples_load(model: str, spec: Spec, source: str, shape: tuple[int, ...]) -> None:
    folder = MODELS / model
    sample = load_input(
        folder / "samples" / source, spec, find_preprocessing(folder / f"{model}.onnx")
    )
    assert sample.arrays[spec.name].shape == shape
