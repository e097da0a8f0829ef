"""Ways of running a network on a CPU, each a function that builds it from a stock PyTorch model.

Inference and training: stock PyTorch in contiguous (``eager``) and in channels-last memory (``channels_last``),
``torch.compile`` of the latter in its default mode (``compile``), and ``fastdense.convert``. Inference alone: OpenVINO
and ONNX Runtime. Training alone: channels-last and fastdense with ``memory_efficient=True``. All with PyTorch's number
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
import torch.nn.functional as F
from torch import Tensor, nn

import fastdense

from .cases import DTYPES

PEER_MODES = {"inference": "Inference", "training": "A training step"}
"""What is timed: its name and its title."""

Run = Callable[[Tensor], Any]
"""[N, 3, H, W] in the runtime's memory format -> logits [N, classes], a tensor or an array. In training, of a step:
forward, cross-entropy, backward and SGD of learning rate 0, so that the weights stay what they were."""


@dataclass(frozen=True)
class Runtime:
    """One way of running a network."""

    name: str
    build: Callable[[nn.Module, Tensor, torch.dtype], Run]
    """Of a model in training or evaluation that it may keep, an example of the input, and the dtype to compute in."""
    memory_format: torch.memory_format = torch.contiguous_format
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = tuple(PEER_MODES)
    first_call_s: float = 1.0
    """About how long building it and the first call take on two cores."""

    def why_not(self, dtype_name: str) -> str | None:
        """What keeps it from running here, if anything does."""
        if dtype_name not in self.dtypes:
            return "not offered"
        missing = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(missing)} missing" if missing else None


def _torch(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    return _run(model, model, x, dtype)


def _run(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Run:
    """Of a model, whose forward may have been compiled."""
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    @torch.inference_mode()
    def infer(x: Tensor) -> Tensor:
        with autocast:
            return forward(x)

    labels = torch.arange(len(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        with autocast:
            logits = forward(x)
            loss = F.cross_entropy(logits, labels % logits.shape[1])
        loss.backward()
        optimizer.step()
        return logits.detach()

    return step if model.training else infer


def _channels_last(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    return _torch(model.to(memory_format=torch.channels_last), x, dtype)


def _fastdense(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    return _channels_last(fastdense.convert(model, inplace=True), x, dtype)


def _memory_efficient(build: Callable[[nn.Module, Tensor, torch.dtype], Run]) -> Callable[..., Run]:
    def built(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
        for module in model.modules():
            if hasattr(module, "memory_efficient"):
                setattr(module, "memory_efficient", True)  # noqa: B010 - modules' attributes are typed as modules
        return build(model, x, dtype)

    return built


def _compile(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    torch.compiler.reset()  # else a second shape would be compiled with symbolic sizes
    model = model.to(memory_format=torch.channels_last)
    run = _run(model, torch.compile(model), x, dtype)
    uncached = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with uncached, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no profile is cached either
        run(x)
    return run


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
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


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None, "it is None only where a file is written"
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: session.run(None, {argument.name: x.numpy()})[0]


_INFERENCE, _TRAINING = ("inference",), ("training",)

EAGER = Runtime("eager", _torch)
CHANNELS_LAST = Runtime("channels_last", _channels_last, torch.channels_last)
RECOMPUTING = Runtime(
    "channels_last, memory_efficient", _memory_efficient(_channels_last), torch.channels_last, modes=_TRAINING
)
COMPILE = Runtime("compile", _compile, torch.channels_last, first_call_s=50)
OPENVINO = Runtime("openvino", _openvino, packages=("openvino",), modes=_INFERENCE, first_call_s=5)
ONNXRUNTIME = Runtime(
    "onnxruntime",
    _onnxruntime,
    packages=("onnxruntime", "onnx", "onnxscript"),
    dtypes=("fp32",),
    modes=_INFERENCE,
    first_call_s=12,
)
FASTDENSE_RECOMPUTING = Runtime(
    "fastdense, memory_efficient", _memory_efficient(_fastdense), torch.channels_last, modes=_TRAINING
)
FASTDENSE = Runtime("fastdense", _fastdense, torch.channels_last)

RUNTIMES = (EAGER, CHANNELS_LAST, RECOMPUTING, COMPILE, OPENVINO, ONNXRUNTIME, FASTDENSE_RECOMPUTING, FASTDENSE)
