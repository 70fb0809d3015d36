"""What is measured in a fresh process: `python -m bench.tasks TASK JSON-OPTIONS`.

A task reports one JSON object and writes what it computed to `result`, to be compared by the
process that started it. Nothing heavy is imported before the task itself asks for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import peak_bytes


def first_gradient(file: str, x: str, target: int, result: str) -> dict[str, float]:
    """Seconds to import onnxplain, and from there to the first gradient."""
    inputs = np.load(x)
    start = time.perf_counter()
    import onnxplain as ox

    imported = time.perf_counter()
    gradient = ox.Saliency(ox.Model(file)).attribute(inputs, target=target, abs=False)
    end = time.perf_counter()
    np.save(result, gradient)
    return {"import": imported - start, "gradient": end - imported}


def integrated_gradients(
    tool: str, file: str, x: str, target: int, n_steps: int, internal_batch_size: int | None,
    result: str,
) -> dict[str, float]:  # fmt: skip
    """Peak memory, and how much of it the loaded model and its libraries took before."""
    from bench import networks

    inputs = np.load(x)
    if tool == "onnxplain":
        run = onnxplain_ig(networks.model(Path(file)), inputs, target, n_steps)
    else:
        load = networks.torch_module if tool == "captum" else networks.converted_module
        run = captum_ig(load(Path(file)), inputs, target, n_steps, internal_batch_size)
    before = peak_bytes()
    attributions = run()
    after = peak_bytes()
    np.save(result, attributions)
    return {"before": before, "peak": after}


def onnxplain_ig(model: Any, x: np.ndarray, target: int, n_steps: int) -> Any:
    """A call that computes integrated gradients of `x` from zeros by onnxplain."""
    import onnxplain as ox

    method = ox.IntegratedGradients(model)
    return lambda: method.attribute(x, baselines=0, target=target, n_steps=n_steps)


def captum_ig(
    module: Any, x: np.ndarray, target: int, n_steps: int, internal_batch_size: int | None
) -> Any:
    """The same by Captum."""
    import torch
    from captum.attr import IntegratedGradients

    method, inputs = IntegratedGradients(module), torch.from_numpy(x)
    return lambda: (
        method.attribute(
            inputs,
            baselines=0,
            target=target,
            n_steps=n_steps,
            internal_batch_size=internal_batch_size,
        )
        .detach()
        .numpy()
    )


def method_memory(
    tool: str, file: str, x: str, row: str, count: int, memory_limit: int, result: str
) -> dict[str, float]:
    """Peak memory of a row of the table of methods on ResNet-18."""
    from bench import networks
    from bench.methods import ROWS, captum_call, onnxplain_call

    inputs, asked = np.load(x), ROWS[row]
    assert asked.grows is not None
    if tool == "onnxplain":
        model = networks.model(Path(file), memory_limit)
        run = onnxplain_call(asked, "resnet18", model, inputs, **{asked.grows: count})
    else:
        module = networks.torch_module(Path(file))
        run = captum_call(asked, "resnet18", module, inputs, **{asked.grows: count})
    attributions = run()
    peak = peak_bytes()
    np.save(result, attributions)
    return {"peak": peak}


def explain_many(
    method: str, file: str, x: str, target: int, memory_limit: int, result: str
) -> dict[str, float]:
    """Peak memory and seconds of explaining many rows under a memory limit."""
    inputs = np.load(x)
    import onnxplain as ox

    explainer = getattr(ox, method)(ox.Model(file, memory_limit=memory_limit))
    start = time.perf_counter()
    attributions = explainer.attribute(inputs, target=target)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    np.save(result, attributions)
    return {"seconds": seconds, "peak": peak}


def first_perturbation(file: str, x: str, cache: str, result: str) -> dict[str, float]:
    """Seconds to import onnxplain, and from there to the first sampled attribution.

    Compiled kernels are kept in `cache`.
    """
    os.environ["NUMBA_CACHE_DIR"] = cache
    inputs = np.load(x)
    start = time.perf_counter()
    import onnxplain as ox

    imported = time.perf_counter()
    found = ox.KernelShap(ox.Model(file)).attribute(inputs, target=1, n_samples=100, seed=0)
    end = time.perf_counter()
    np.save(result, found)
    return {"import": imported - start, "attribution": end - imported}


def perturb_memory(
    method: str, file: str, x: str, samples: int, memory_limit: int, result: str
) -> dict[str, float]:
    """Peak memory and seconds of many samples of one image under a memory limit."""
    inputs = np.load(x)
    import onnxplain as ox

    explainer = getattr(ox, method)(ox.Model(file, memory_limit=memory_limit))
    options: dict[str, Any] = {"num_masks": samples}
    if method == "KernelShap":
        line = np.arange(inputs.shape[-1]) * 7 // inputs.shape[-1]
        options = {"n_samples": samples, "feature_mask": (7 * line[:, None] + line)[None, None]}
    before = peak_bytes()
    start = time.perf_counter()
    found = explainer.attribute(inputs, target=3, seed=0, **options)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    np.save(result, found)
    return {"before": before, "seconds": seconds, "peak": peak}


if __name__ == "__main__":
    tasks = {
        f.__name__: f
        for f in (
            first_gradient, integrated_gradients, method_memory, explain_many, first_perturbation,
            perturb_memory,
        )
    }  # fmt: skip
    print(json.dumps(tasks[sys.argv[1]](**json.loads(sys.argv[2]))))
