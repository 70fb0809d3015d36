"""`python -m bench`: run the measurements, one JSON line a figure."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import platform
import subprocess
import sys
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.figures import QUICK, Scale, units
from bench.measure import ROOT, Report
from bench.networks import THREADS, Skip

PACKAGES = (
    *("numpy", "numba", "onnx", "onnxruntime", "torch", "timm", "captum", "onnx2torch", "dianna"),
    *("shap", "lime"),
)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when everything ran and agreed (or was skipped), else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--output", metavar="FILE", help="also append the lines to this file")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="measurements to run, e.g. 'network/*/8'"
    )
    parser.add_argument(
        "--quick", action="store_true", help="check every code path on small settings; no targets"
    )
    parser.add_argument("--rounds", type=int, help="how often each contender is timed")
    parser.add_argument("--exporter", choices=("torchscript", "dynamo"), default="torchscript")
    parser.add_argument("--list", action="store_true", help="list the measurements and stop")
    given = parser.parse_args(arguments)

    scale = replace(QUICK if given.quick else Scale(), exporter=given.exporter)
    if given.rounds:
        counts = dict.fromkeys(("rounds", "long_rounds", "perturb_rounds"), given.rounds)
        scale = replace(scale, **counts)
    chosen = {k: v for k, v in units(scale).items() if fnmatch.fnmatchcase(k, given.only)}
    if not chosen:
        parser.error(f"--only {given.only!r} matches none of: {', '.join(units(scale))}")
    if given.list:
        print("\n".join(chosen))
        return 0
    failed = False
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(given.output, "a")) if given.output else None
        report = Report(file, quick=given.quick)
        report.line("machine", **machine(), quick=given.quick, exporter=given.exporter)
        for name, measure in chosen.items():
            try:
                measure(report, scale)
            except Skip as reason:
                report.skip(name, str(reason))
            except Exception as error:  # the other measurements still count
                traceback.print_exc(file=sys.stderr)
                report.line(name, error=f"{type(error).__name__}: {error}")
                failed = True
        report.line("end", load=_load(), failed=failed)
    return int(failed)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": THREADS,
        "load": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _load() -> float | None:
    """Busy processors, averaged over the last minute: above ours, the figures are not to trust."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((k.split(":")[1].strip() for k in lines if k.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
