"""Trained models that nobody here made: they load, run, and their gradients are true."""

from __future__ import annotations

import numpy as np
import pytest

import onnxplain as ox
from tests.helpers import BUNDLED, shared

# file -> (shape of one example, scale of its values, target)
MODELS = {
    "squeezenet/squeezenet1.0-dc.onnx": ((3, 227, 227), 60.0),
    "mnist8/mnist-8.onnx": ((1, 28, 28), 255.0),
    "dianna/mnist_model.onnx": ((1, 28, 28), 255.0),
    "dianna/geometric_shapes_model.onnx": ((1, 64, 64), 1.0),
    "dianna/season_prediction_model_temp_max_binary.onnx": ((28, 1), 20.0),
    "dianna/penguin_model.onnx": ((4,), 1.0),
    "resnet8_cifar10_nhwc/pretrainedResnet.onnx": ((32, 32, 3), 255.0),
    "vww_nhwc/vww_96_float.onnx": ((96, 96, 3), 1.0),
    "attention_mnist/self-attention-mnist-pgd-medium-sim.onnx": ((28, 28, 1), 1.0),
}
QUANTIZED = "squeezenet/squeezenet1.0-dc-qdq-int8.onnx"
TREES = "wine_xgboost/xgboost_classifier_tree.onnx"
EVERY = [*MODELS, QUANTIZED, TREES]


def examples(name: str, rows: int, seed: int = 0) -> np.ndarray:
    shape, scale = MODELS.get(name, ((13,), 10.0) if name == TREES else ((3, 227, 227), 60.0))
    rng = np.random.default_rng(seed)
    return (rng.random((rows, *shape)) * scale).astype(np.float32)


@pytest.mark.parametrize("name", EVERY)
def test_seven_rows_are_one_and_one(name: str) -> None:
    model = ox.Model(shared(name))
    x = examples(name, 7)
    together = model(x)
    for i in (0, 6):
        alone = model(x[i : i + 1])
        for output, values in alone.items():
            assert values.shape[0] == 1
            np.testing.assert_allclose(together[output][i], values[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_the_slope(name: str) -> None:
    """The gradient against a central difference along random directions.

    The scores before a final softmax or log-softmax are explained, where they exist, since a
    saturated probability has no slope to measure.
    """
    path = shared(name)
    model = ox.Model(path)
    last = model.output.producer()
    layer = model.output.name
    if last is not None and last.op_type in ("Softmax", "LogSoftmax"):
        layer = last.inputs[0].name
    x = examples(name, 2, seed=3)
    neuron = ox.NeuronGradient(model, layer)
    value = ox.LayerActivation(model, layer)
    gradient = neuron.attribute(x, 1).astype(np.float64)
    norms = np.linalg.norm(gradient.reshape(2, -1), axis=1)
    assert (norms > 0).all()
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(8):
        u = rng.standard_normal(x.shape)
        u /= np.linalg.norm(u.reshape(2, -1), axis=1).reshape(-1, *[1] * (x.ndim - 1))
        step = 1e-3 * np.linalg.norm(x.reshape(2, -1), axis=1).max()
        plus = value.attribute((x + step * u).astype(np.float32))[:, 1].astype(np.float64)
        minus = value.attribute((x - step * u).astype(np.float32))[:, 1].astype(np.float64)
        slope = (plus - minus) / (2 * step)
        errors.append(slope - (gradient * u).reshape(2, -1).sum(axis=1))
    # A random direction of d dimensions sees a slope of |gradient| / sqrt(d).
    typical = norms / np.sqrt(np.prod(x.shape[1:]))
    assert (np.median(np.abs(errors), axis=0) < 0.1 * typical).all(), (errors, typical)


def test_quantized_gradient_is_a_smoothed_slope() -> None:
    """Straight through the rounding: steps far above a quantum see the slope of the line."""
    model = ox.Model(shared(QUANTIZED))
    parent = ox.Model(shared("squeezenet/squeezenet1.0-dc.onnx"))
    from skimage.data import chelsea
    from skimage.transform import resize

    picture = resize(chelsea(), (227, 227), anti_aliasing=True)[..., ::-1] * 255
    x = (picture - [104, 117, 123]).transpose(2, 0, 1)[None].astype(np.float32)
    ours = ox.Saliency(model).attribute(x, target=285, abs=False).ravel()
    theirs = ox.Saliency(parent).attribute(x, target=285, abs=False).ravel()
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.5
    u = (theirs / np.linalg.norm(theirs)).reshape(x.shape)
    step = 30.0
    slope = (model(x + step * u)["logits"] - model(x - step * u)["logits"])[0, 285] / (2 * step)
    assert slope == pytest.approx(float(ours @ u.ravel()), rel=0.5)


def test_trees_are_refused_by_gradient_methods() -> None:
    model = ox.Model(shared(TREES))
    assert model.output.name == "probabilities"
    with pytest.raises(ox.NotDifferentiableError, match="TreeEnsembleClassifier"):
        ox.Saliency(model).attribute(examples(TREES, 2), target=1)


def test_known_answers() -> None:
    for i, digit in enumerate((5, 0, 4)):
        model = ox.Model(shared("mnist8/mnist-8.onnx"))
        data = np.load(shared(f"mnist8/test_data_{i}.npz"))
        x = data["inputs"].reshape(1, 1, 28, 28)
        scores = model(x)["Plus214_Output_0"]
        assert scores.argmax() == digit
        np.testing.assert_allclose(scores, data["outputs"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["digits/digits.onnx", "digits/digits_dynamo.onnx"])
def test_bundled_digits(name: str) -> None:
    """The bundled model reads held-out digits, and both exports have the same scopes."""
    from sklearn.datasets import load_digits

    model = ox.Model(BUNDLED / name)
    digits = load_digits()
    x = digits.images[:, None].astype(np.float32)
    accuracy = (model(x)["logits"].argmax(axis=1) == digits.target).mean()
    assert accuracy > 0.97
    got = ox.LayerActivation(model, "block1.pool").attribute(x[:2])
    assert got.ndim == 4


def test_keras_layers_of_a_converted_model() -> None:
    """TensorFlow Lite fuses names: a layer is the node that does its work, or is refused."""
    model = ox.Model(shared("resnet8_cifar10_nhwc/pretrainedResnet.onnx"))
    x = examples("resnet8_cifar10_nhwc/pretrainedResnet.onnx", 2)
    relu = next(layer for layer in model.layers() if layer.operator == "Relu")
    before = ox.LayerActivation(model, "conv2d").attribute(x)
    after = ox.LayerActivation(model, relu.name).attribute(x)
    np.testing.assert_allclose(np.maximum(before, 0), after)
    assert ox.LayerActivation(model, "add").attribute(x).shape == (2, 16, 32, 32)
    with pytest.raises(ox.LayerError):
        ox.LayerActivation(model, "activation")  # its Relu has lost its name
