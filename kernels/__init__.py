"""Numba kernels, installed as ``onnxplain.kernels``: loops that numpy can't express fast.

Mask sampling, grids, windows and aggregation of the perturbation methods belong here. Kernels are
compiled on first use and cached on disk; importing this package compiles nothing.
"""
