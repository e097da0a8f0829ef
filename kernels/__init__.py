"""Kernels of fastdense, installed as ``fastdense.kernels``: tensors in, tensors out, no ``nn.Module``.

One package a backend, each implementing the functions of :mod:`fastdense.kernels.contract`.
"""
