"""The compiled library: finding it, what it exports, and the instruction set it runs on.

It knows nothing of Python or torch: tensors go in as pointers, torch's thread pool as a function. The structs
mirror ``src/abi.h``.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    PYFUNCTYPE,
    Array,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
    py_object,
)
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels compute in, and the number that C++ knows it by."""

_VARIABLE = "FASTDENSE_CPU_ISA"
"""Environment variable: the instruction set to use, instead of the best."""


def _fields(*groups: tuple[Any, str]) -> Any:
    """A struct's fields, from types and the names of those that have them."""
    return [(name, kind) for kind, names in groups for name in names.split()]


Share = CFUNCTYPE(None, POINTER(c_float), POINTER(c_float), c_int64)
"""As in ``src/abi.h``."""


class NormArgs(Structure):
    """``Norm`` of ``src/abi.h``."""

    _fields_ = _fields((c_void_p, "weight bias mean var"), (c_double, "eps"))


class WeightArgs(Structure):
    """``Weight`` of ``src/abi.h``."""

    _fields_ = _fields(
        (c_void_p, "data"),
        (c_int64, "out in_ depth height width stride_out stride_in stride_d stride_h stride_w"),
        (c_int32, "dtype"),
    )


class FeaturesArgs(Structure):
    """``Features`` of ``src/abi.h``."""

    _fields_ = _fields((c_int64, "input_channels growth_rate layers new_first"))


class DenseBlockArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images depth height width"),
        (FeaturesArgs, "features"),
        (c_int64, "bottleneck_channels"),
        (c_void_p, "x out"),
        (POINTER(NormArgs), "norm1 norm2"),
        (POINTER(c_void_p), "conv1 conv3"),
        (c_int64, "conv3_depth conv3_height"),
        (c_int32, "store compute norm_dtype threads"),
    )


class TransitionArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images depth height width channels out_channels"),
        (c_void_p, "x out"),
        (NormArgs, "norm"),
        (c_void_p, "conv"),
        (c_int32, "store compute norm_dtype threads"),
    )


class PoolArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images depth height width channels"),
        (c_void_p, "x out"),
        (NormArgs, "norm"),
        (c_int32, "store norm_dtype threads"),
    )


class StemArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images depth height width channels out_channels"),
        (c_int64, "kernel_d kernel_h kernel_w stride_d stride_h stride_w padding_d padding_h padding_w"),
        (c_void_p, "x out"),
        (NormArgs, "norm"),
        (c_void_p, "conv"),
        (c_int32, "planar store compute norm_dtype threads"),
    )


class StageArgs(Structure):
    """``Stage`` of ``src/abi.h``."""

    _fields_ = _fields((c_int32, "kind"), (c_void_p, "args"), (c_int64, "out_bytes"))


class ChainArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images group even odd stages x_bytes"),
        (c_void_p, "x out"),
        (POINTER(StageArgs), "stage"),
        (c_int32, "threads"),
    )


class TensorFunctions(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_void_p, "get_device_type get_dtype get_dim get_sizes get_strides get_data_ptr delete_tensor_object")
    )


class SeenTensor(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (POINTER(c_int64), "shape"),
        (c_int64, "dim"),
        (c_int32, "device_type dtype"),
        (c_void_p, "data"),
        (c_int64, "bytes"),
        (c_uint64, "fingerprint"),
    )


class TrainingLayerArgs(Structure):
    """``TrainingLayer`` of ``src/abi.h``."""

    _fields_ = _fields(
        (NormArgs, "norm1 norm2"),
        (WeightArgs, "conv1 conv3"),
        (c_void_p, "bottleneck bottleneck_mask growth_mask"),
        (c_void_p, "norm1_weight norm1_bias conv1_weight norm2_weight norm2_bias conv3_weight"),
        (c_int32, "batch1 batch2"),
    )


class TrainingArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images depth height width"),
        (FeaturesArgs, "features"),
        (c_int64, "bottleneck_channels"),
        (c_void_p, "x out"),
        (POINTER(TrainingLayerArgs), "layer"),
        (c_void_p, "mean var bottleneck_mean bottleneck_var grad_out grad dx"),
        (c_int64, "first_layer"),
        (c_double, "keep_scale"),
        (Share, "merge add_up"),
        (c_int32, "keeps_bottlenecks dx_dtype store compute threads"),
    )


class PointwiseGradArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields(
        (c_int64, "images depth height width channels out_channels"),
        (c_void_p, "grad_out x dx"),
        (NormArgs, "norm"),
        (WeightArgs, "conv"),
        (c_void_p, "norm_weight norm_bias conv_weight"),
        (Share, "add_up"),
        (c_int32, "batch store compute threads"),
    )


class StatsArgs(Structure):
    """As in ``src/abi.h``."""

    _fields_ = _fields((c_int64, "rows channels"), (c_void_p, "x mean var"), (c_int32, "store threads"))


_KERNELS: dict[str, type[Structure]] = {
    "chain": ChainArgs,
    "dense_block": DenseBlockArgs,
    "transition": TransitionArgs,
    "stem": StemArgs,
    "stem_tail": PoolArgs,
    "head": PoolArgs,
    "channel_stats": StatsArgs,
    "training_forward": TrainingArgs,
    "training_backward": TrainingArgs,
    "transition_backward": PointwiseGradArgs,
    "stem_tail_backward": PointwiseGradArgs,
    "head_backward": PointwiseGradArgs,
}


class _OfTorch(NamedTuple):
    """torch's C functions, in the library that the running process has loaded already."""

    library: ctypes.CDLL
    parallel_for: c_void_p
    tensor_functions: TensorFunctions

    @staticmethod
    def load() -> _OfTorch:
        folder = Path(torch.__file__).parent / "lib"
        names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
        library = ctypes.CDLL(str(next((folder / name for name in names if (folder / name).exists()), names[0])))
        functions = [getattr(library, f"aoti_torch_{name}") for name, _ in TensorFunctions._fields_]
        return _OfTorch(
            library,
            ctypes.cast(library.torch_parallel_for, c_void_p),
            TensorFunctions(*(ctypes.cast(function, c_void_p) for function in functions)),
        )


_OF_PYTHON = tuple(
    ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p) for name in ("PyList_GetItem", "PyCapsule_GetPointer")
)
_POINTERS = PYFUNCTYPE(None, c_void_p, c_void_p, py_object, c_int64, POINTER(c_void_p))
_SAME_VALUES = PYFUNCTYPE(c_int32, c_void_p, c_int64, POINTER(c_void_p), POINTER(c_int64), POINTER(c_void_p))


class Library:
    """The library and one of its instruction sets.

    Attributes:
        isa: the instruction set's name.
    """

    def __init__(self, library: ctypes.CDLL, kernels: int, of_torch: _OfTorch):
        self._library, self._kernels, self._of_torch = library, c_void_p(kernels), of_torch
        self._pointers = _POINTERS(("fastdense_pointers", library))
        self.isa: str = library.fastdense_name(self._kernels).decode()

    def fingerprints(self, tensors: Sequence[Tensor]) -> list[int]:
        """A hash of each dense tensor's bytes."""
        count = len(tensors)
        data = (c_void_p * count)(*[t.data_ptr() for t in tensors])
        sizes = (c_int64 * count)(*[t.nbytes for t in tensors])
        out = (c_uint64 * count)()
        self._check(self._library.fastdense_fingerprints(self._kernels, count, data, sizes, out, *self._threads()))
        return list(out)

    def kind_of(self, tensor: Tensor) -> tuple[int, int]:
        """torch's numbers of a tensor's type of device and of its dtype."""
        device_type, dtype = c_int32(), c_int32()
        (handle,) = map(c_void_p, self._handles([tensor]))
        self._of_torch.library.aoti_torch_get_device_type(handle, ctypes.byref(device_type))
        self._of_torch.library.aoti_torch_get_dtype(handle, ctypes.byref(dtype))
        self._of_torch.library.aoti_torch_delete_tensor_object(handle)
        return device_type.value, dtype.value

    def are_as_seen(self, tensors: list[Tensor], seen: Array[SeenTensor]) -> bool:
        """Whether they are what they were."""
        handles = self._handles(tensors)  # for a moment: Python's collector knows nothing of whom they keep alive
        arguments = self._kernels, ctypes.byref(self._of_torch.tensor_functions), len(seen), handles, seen
        return self._library.fastdense_are_as_seen(*arguments, *self._threads()) == 1

    def pack(self, args: Array[WeightArgs], dtype: torch.dtype) -> list[Tensor]:
        """Convolution weights as the kernels read them, for results of ``dtype``."""
        compute = DTYPES[dtype]
        sizes = [self._library.fastdense_packed_bytes(self._kernels, ctypes.byref(arg), compute) for arg in args]
        packed = [aligned(nbytes) for nbytes in sizes]
        targets = (c_void_p * len(packed))(*[p.data_ptr() for p in packed])
        self._check(self._library.fastdense_pack(self._kernels, len(packed), args, compute, targets, *self._threads()))
        return packed

    def run(self, name: str, args: Structure) -> None:
        """Call the kernel ``fastdense_<name>``."""
        args.threads = torch.get_num_threads()  # type: ignore[attr-defined]
        function = getattr(self._library, f"fastdense_{name}")
        self._check(function(self._kernels, ctypes.byref(args), self._of_torch.parallel_for))

    def watch(self, dicts: Sequence[dict[str, Any]]) -> Callable[[], bool]:
        """Whether the dicts still have, in order, the very values that they have now; called under CPython's lock.

        The caller keeps dicts and values alive. Nothing but the dicts is looked at.
        """
        values = [id(value) for each in dicts for value in dict.values(each)]
        arguments = (
            ctypes.cast(ctypes.pythonapi.PyDict_Next, c_void_p),
            len(dicts),
            (c_void_p * len(dicts))(*map(id, dicts)),
            (c_int64 * len(dicts))(*map(len, dicts)),
            (c_void_p * len(values))(*values),
        )
        same_values = _SAME_VALUES(("fastdense_same_values", self._library))
        return lambda: same_values(*arguments) == 1

    def _handles(self, tensors: list[Tensor]) -> Array[c_void_p]:
        """torch's C handles, which the caller deletes."""
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        handles = (c_void_p * len(tensors))()
        self._pointers(*_OF_PYTHON, capsules, len(tensors), handles)
        return handles

    def _threads(self) -> tuple[c_void_p, int]:
        return self._of_torch.parallel_for, torch.get_num_threads()

    def _check(self, failed: int) -> None:
        if failed:
            raise MemoryError("a CPU kernel of fastdense failed, most likely for want of memory")


def aligned(nbytes: int, alignment: int = 64) -> Tensor:
    """Uninitialised bytes that begin on a cache line."""
    memory = torch.empty(nbytes + alignment, dtype=torch.uint8, device="cpu")  # whatever the default device is
    start = -memory.data_ptr() % alignment
    return memory[start : start + nbytes]


@functools.cache
def load() -> Library | str:
    """The library on the best instruction set here that is allowed, or why there is none."""
    offers = offered()
    if isinstance(offers, str):
        return offers
    wanted = os.environ.get(_VARIABLE) or next(iter(offers))
    return offers.get(wanted) or f"{_VARIABLE} asks for {wanted}, and this CPU offers {', '.join(offers)}"


@functools.cache
def offered(folder: Path = Path(__file__).parent) -> dict[str, Library] | str:
    """The library in ``folder`` on each instruction set of this CPU, best first, or why there is none."""
    files = [path for path in folder.glob("_library*") if path.suffix in (".so", ".dylib")]
    if not files:
        return "its C++ was not compiled: fastdense was installed without a C++ compiler (g++), or not for x86-64"
    try:
        library = ctypes.CDLL(str(files[0]))
        of_torch = _OfTorch.load()
    except (OSError, AttributeError) as error:
        return f"its library cannot be loaded: {error}"
    _declare(library)
    offers: dict[str, Library] = {}
    while kernels := library.fastdense_kernels(len(offers)):
        found = Library(library, kernels, of_torch)
        offers[found.isa] = found
    return offers or "it needs AVX2, FMA and F16C, which this CPU lacks"


def _declare(library: ctypes.CDLL) -> None:
    """Argument and result types, without which ctypes would cut pointers to 32 bits."""
    library.fastdense_kernels.argtypes, library.fastdense_kernels.restype = [c_int32], c_void_p
    library.fastdense_name.argtypes, library.fastdense_name.restype = [c_void_p], c_char_p
    library.fastdense_packed_bytes.argtypes = [c_void_p, POINTER(WeightArgs), c_int32]
    library.fastdense_packed_bytes.restype = c_int64
    library.fastdense_fingerprints.argtypes = [
        c_void_p, c_int64, POINTER(c_void_p), POINTER(c_int64), POINTER(c_uint64), c_void_p, c_int32
    ]  # fmt: skip
    library.fastdense_are_as_seen.argtypes = [
        c_void_p, POINTER(TensorFunctions), c_int64, POINTER(c_void_p), POINTER(SeenTensor), c_void_p, c_int32
    ]  # fmt: skip
    library.fastdense_pack.argtypes = [
        c_void_p, c_int64, POINTER(WeightArgs), c_int32, POINTER(c_void_p), c_void_p, c_int32
    ]  # fmt: skip
    for name, args in _KERNELS.items():
        getattr(library, f"fastdense_{name}").argtypes = [c_void_p, POINTER(args), c_void_p]
