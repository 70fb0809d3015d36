"""How times and memory are measured, results compared and figures written."""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# A runtime's worker threads keep spinning for a while after a call; let them fall asleep, or they
# slow down the next contender.
PAUSE = 0.05
# A sample repeats short calls until it takes at least this many seconds.
SAMPLE = 0.1
# A call that takes longer needs no untimed one before it.
LONG = 1.0


class Disagreement(AssertionError):
    """Two contenders computed different results, so that their times mean nothing."""


class Report:
    """Writes figures as JSON lines to standard output and, if asked, to a file."""

    def __init__(self, file: IO[str] | None = None, quick: bool = False) -> None:
        self._file = file
        self._quick = quick

    def line(self, name: str, **fields: Any) -> None:
        """One JSON object; numbers get four significant digits, absent fields are left out."""
        kept = {k: _rounded(v) for k, v in fields.items() if v is not None}
        text = json.dumps({"name": name, **kept})
        for stream in (sys.stdout, self._file):
            if stream is not None:
                print(text, file=stream, flush=True)

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        baseline: str | None = None,
        ratio: float | None = None,
        target: str | None = None,
        **details: Any,
    ) -> None:
        """One measured figure.

        `ratio` is against `baseline`. `target` is an inequality such as "ratio <= 2.6" or
        "value < 3", also on one of the `details`; whether it is met is worked out here, except in
        quick mode.
        """
        met = None
        if target is not None and not self._quick:
            subject, relation, bound = target.split()
            measured = {"value": value, "ratio": ratio, **details}[subject]
            assert measured is not None, f"{name}: a target on the ratio needs a ratio"
            met = _RELATIONS[relation](measured, float(bound))
        self.line(
            name, value=value, unit=unit, ratio=ratio, baseline=baseline, target=target, met=met,
            **details,
        )  # fmt: skip

    def skip(self, name: str, reason: str) -> None:
        self.line(name, skipped=reason)


_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


class Times:
    """Seconds per call of each contender, one entry a round."""

    def __init__(self, samples: Mapping[str, list[float]]) -> None:
        self._samples = samples

    def minimum(self, name: str) -> float:
        return min(self._samples[name])

    def median(self, name: str) -> float:
        return statistics.median(self._samples[name])

    def ratio(self, name: str, baseline: str) -> float:
        """Median over rounds of `name` over `baseline`: both saw the same state of the machine."""
        pairs = zip(self._samples[name], self._samples[baseline], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def milliseconds(self, name: str, baseline: str) -> dict[str, Any]:
        """The fields of a figure that compares two contenders."""
        return {
            "value": self.median(name) * 1e3,
            "unit": "ms",
            "min": self.minimum(name) * 1e3,
            "ratio": self.ratio(name, baseline),
            "baseline_value": self.median(baseline) * 1e3,
            "baseline_min": self.minimum(baseline) * 1e3,
        }


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Time all contenders in turn, `rounds` times, in alternating order (A B, B A, ...).

    Each sample is preceded by a pause and, of short calls, an untimed one; it averages calls over
    `SAMPLE`.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    calls = {name: _calls(call) for name, call in contenders.items()}
    for i in range(rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            call, (count, warm) = contenders[name], calls[name]
            time.sleep(PAUSE)
            if warm:
                call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return Times(samples)


def _calls(call: Callable[[], object]) -> tuple[int, bool]:
    """How many calls make a sample, and whether one goes before it; warms the contender up."""
    spent = seconds(call)
    if spent < LONG:
        spent = seconds(call)
    return max(1, math.ceil(SAMPLE / spent)), spent < LONG


def seconds(call: Callable[[], object]) -> float:
    """One call's time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def agree(
    what: str, got: np.ndarray, want: np.ndarray, tolerance: float = 1e-3
) -> dict[str, float]:
    """Compare two results by |got - want| / |want| of each example; the best and the worst.

    Of millions of ReLUs and maxima at 224x224, rounding in float32 puts a few on their other side,
    which moves that example's gradient by up to a few hundredths; PyTorch's own gradients in
    float32 and float64 differ so. A wrong derivative shows in every example. So the best example
    must agree to `tolerance` and every one to 5e-2. Disagreement otherwise, for another shape, and
    where there is nothing to compare (zeros, NaN).
    """
    if got.shape != want.shape:
        raise Disagreement(f"{what}: shape {got.shape} instead of {want.shape}")
    rows = [np.asarray(a, np.float64).reshape(len(want), -1) for a in (got, want)]
    norms = np.linalg.norm(rows[1], axis=1)
    error = np.linalg.norm(rows[0] - rows[1], axis=1) / norms
    best, worst = float(error.min()), float(error.max())
    if not (norms > 0).all() or not (best <= tolerance and worst <= 5e-2):  # NaN is neither
        raise Disagreement(
            f"{what}: relative error from {best:.2g} to {worst:.2g} (example {error.argmax()} of "
            f"{len(error)}), least norm {norms.min():.2g}"
        )
    return {"best": best, "worst": worst}


def peak_bytes() -> int:
    """The most memory this process has held (resident).

    On Linux `ru_maxrss` starts from the parent's peak, so the kernel's own high-water mark of this
    address space is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(k for k in status.read_text().splitlines() if k.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fresh(task: str, **options: Any) -> dict[str, Any]:
    """Run one task of `bench.tasks` in a process of its own; returns what it reports."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.tasks", task, json.dumps(options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{task} failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    reported: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reported


def fresh_result(task: str, x: np.ndarray, **options: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Run a task in a process of its own; what it reports, and the array that it computed."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "x.npy", Path(folder) / "result.npy"
        np.save(given, x)
        reported = fresh(task, x=str(given), result=str(result), **options)
        return reported, np.load(result)
