"""Numba kernels, installed as ``onnxplain.kernels``: loops that numpy can't express fast.

Mask sampling, coalition tables and aggregation of the perturbation methods. Kernels are compiled on
first use and cached on disk; importing this package, or any module of it, compiles nothing. Random
numbers come from a counter (seed, stream, sample number), so no result depends on the number of
threads or on how a run is cut into pieces.
"""

from threading import Lock

#: Held while a parallel kernel runs: numba's last-resort threading layer allows one at a time.
LOCK = Lock()
