"""Ways of running a network's inference on a CPU, each a function that builds it from a stock PyTorch model.

Stock PyTorch in contiguous (``eager``) and in channels-last memory (``channels_last``), ``torch.compile`` of the
latter in its default mode (``compile``), OpenVINO, ONNX Runtime and ``fastdense.convert``; all with PyTorch's number
of threads. PyTorch's compute in bfloat16 under ``torch.autocast("cpu", torch.bfloat16)``, OpenVINO by its
``INFERENCE_PRECISION_HINT``, ONNX Runtime not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fastdense

from .cases import DTYPES

Infer = Callable[[Tensor], Any]
"""[N, 3, H, W] in the runtime's memory format -> logits [N, classes], a tensor or an array."""


@dataclass(frozen=True)
class Runtime:
    """One way of running a network."""

    name: str
    build: Callable[[nn.Module, Tensor, torch.dtype], Infer]
    """Of a model that it may keep, an example of the input, and the dtype to compute in."""
    memory_format: torch.memory_format = torch.contiguous_format
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    first_call_s: float = 1.0
    """About how long building it and the first call take on two cores."""

    def why_not(self, dtype_name: str) -> str | None:
        """What keeps it from running here, if anything does."""
        if dtype_name not in self.dtypes:
            return "not offered"
        missing = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(missing)} missing" if missing else None


def _torch(model: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Infer:
    @torch.inference_mode()
    def infer(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x)

    return infer


def _channels_last(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Infer:
    return _torch(model.to(memory_format=torch.channels_last), x, dtype)


def _fastdense(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Infer:
    return _channels_last(fastdense.convert(model, inplace=True), x, dtype)


def _compile(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Infer:
    torch.compiler.reset()  # else a second shape would be compiled with symbolic sizes
    infer = _torch(torch.compile(model.to(memory_format=torch.channels_last)), x, dtype)
    uncached = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with uncached, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no profile is cached either
        infer(x)
    return infer


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Infer:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that torch.jit.trace is deprecated
        graph = openvino.convert_model(model, example_input=x, input=list(x.shape))
    request = openvino.compile_model(graph, "CPU", options).create_infer_request()
    return lambda x: request.infer(x.numpy(), share_inputs=True)[0]


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None, "it is None only where a file is written"
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: session.run(None, {argument.name: x.numpy()})[0]


EAGER = Runtime("eager", _torch)
CHANNELS_LAST = Runtime("channels_last", _channels_last, torch.channels_last)
COMPILE = Runtime("compile", _compile, torch.channels_last, first_call_s=50)
OPENVINO = Runtime("openvino", _openvino, packages=("openvino",), first_call_s=5)
ONNXRUNTIME = Runtime(
    "onnxruntime", _onnxruntime, packages=("onnxruntime", "onnx", "onnxscript"), dtypes=("fp32",), first_call_s=12
)
FASTDENSE = Runtime("fastdense", _fastdense, torch.channels_last)

RUNTIMES = (EAGER, CHANNELS_LAST, COMPILE, OPENVINO, ONNXRUNTIME, FASTDENSE)
