"""How many rows fit: live activation bytes of a graph, and the memory there is."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxplain.graph import shapes
from onnxplain.graph.edit import reads

# onnxruntime's arena rounds sizes up and keeps freed blocks, and its blocked layouts pad channels:
# the memory of most networks stays under this multiple of the live bytes.
ARENA_FACTOR = 2.0
# The part of the estimated room that a first chunk takes, when its cost is to be measured.
FIRST_SHARE = 4
# The part of the room that a chunk of measured cost takes; the runtime's blocks only fit roughly.
MEASURED_SHARE = 0.75
# The share of free memory that is used when the user names no limit.
DEFAULT_SHARE = 0.5
# Beyond this a larger chunk only falls out of the processor's caches.
CPU_SWEET_SPOT = 1 << 27


def available_bytes() -> int:
    """Memory this process may still take: what is free, or what its control group leaves.

    Looked up at most once a second: that is ten files to read.
    """
    return _available(int(time.monotonic()))


@functools.lru_cache(maxsize=1)
def _available(second: int) -> int:
    free = _meminfo("MemAvailable:")
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and usage is not None and limit < 1 << 60:
            free = min(free, max(limit - usage, 0)) if free else max(limit - usage, 0)
    if free:
        return free
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 32  # the system does not say; every machine that runs models has this much


def resident_bytes() -> int:
    """Memory this process holds now (0 where the system does not say)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def budget(limit: int | None) -> int:
    """Bytes that activations may take.

    ``limit`` bounds the whole process, so what it holds already is subtracted.
    """
    if limit is None:
        return int(available_bytes() * DEFAULT_SHARE)
    return max(limit - resident_bytes(), 0)


def live_bytes(model: ir.Model, input_shapes: Mapping[str, Sequence[int]]) -> int:
    """Peak bytes of values alive at once when the graph runs in order (weights not counted).

    A value of unknown shape counts as the largest value that its node reads.
    """
    found = shapes.concrete(model, input_shapes)
    sizes = {
        name: item * math.prod(shape) for name, (item, shape) in found.items() if shape is not None
    }

    def size(value: ir.Value) -> int:
        return sizes.get(value.name or "", 0)

    graph = model.graph
    last: dict[ir.Value, int] = {}
    nodes = list(graph)
    for i, node in enumerate(nodes):
        read = list(reads(node))
        last |= dict.fromkeys(read, i)
        estimate = max((size(v) for v in read if not v.is_initializer()), default=0)
        for value in node.outputs:
            sizes.setdefault(value.name or "", estimate)
    for value in graph.outputs:
        last[value] = len(nodes)

    dying: dict[int, list[ir.Value]] = {}
    for value, i in last.items():
        if not value.is_initializer():
            dying.setdefault(i, []).append(value)
    live = sum(size(v) for v in graph.inputs)
    peak = live
    for i, node in enumerate(nodes):
        live += sum(size(v) for v in node.outputs if v.name)
        peak = max(peak, live)
        live -= sum(size(v) for v in dying.get(i, ()))
        live -= sum(size(v) for v in node.outputs if v.name and v not in last)
    return peak
