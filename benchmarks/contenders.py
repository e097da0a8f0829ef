"""Who is measured: ways of running a DenseNet, each with the same weights and images, on a CPU or a GPU.

Naive concatenation in stock PyTorch (:mod:`fastdense.reference`), in contiguous and channels-last memory, with
recomputation, with cuDNN's benchmark mode, by ``torch.compile`` in its modes; the DenseNets of timm and MONAI; the
exported network in OpenVINO and ONNX Runtime; fastdense, as it is and frozen. All have PyTorch's number of threads.
PyTorch's compute in bfloat16 under autocast, OpenVINO by its ``INFERENCE_PRECISION_HINT``, ONNX Runtime not at all.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fastdense

from .subjects import DTYPES, Subject

MODES = {
    "forward": "training forward",
    "backward": "training backward",
    "step": "training step",
    "inference": "inference",
}
"""Training's forward; its backward; forward, backward and SGD; forward in evaluation without autograd."""

Output = Callable[[Tensor], Any]
"""[N, C, H, W] -> what the subject makes of it, a tensor or an array."""


@dataclass(frozen=True)
class Contender:
    """One way of running a subject."""

    name: str
    model: Callable[[Subject], nn.Module]
    """The subject as modules, in whatever state."""
    memory_format: torch.memory_format = torch.channels_last
    compile_mode: str | None = None
    """Of ``torch.compile``; eager without."""
    export: Callable[[nn.Module, Tensor, torch.dtype], Output] | None = None
    """What runs in the model's place, given an example of the input: another runtime, which has threads of its own; or
    the model frozen."""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """In which it runs."""
    packages: tuple[str, ...] = ()
    networks: tuple[str, ...] | None = None
    """The only ones it has."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = tuple(MODES)
    first_call_s: float = 1.0
    """About how long building it and the first call take on two cores."""

    def __reduce__(self) -> tuple[Callable[[str], Contender], tuple[str]]:
        return by_name, (self.name,)

    def enters(self, subject: Subject, modes: tuple[str, ...], device: str) -> bool:
        """Whether it is made for this at all."""
        has_it = self.networks is None or subject.name in self.networks
        return has_it and torch.device(device).type in self.devices and set(modes) <= set(self.modes)

    def why_not(self, dtype_name: str) -> str | None:
        """What keeps it from running here, if anything does."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"{', '.join(missing)} missing"
        return None if dtype_name in self.dtypes else f"{dtype_name} not offered"


# -- models and runtimes ----------------------------------------------------------------------------------------------


def _timm(subject: Subject) -> nn.Module:
    return import_module("timm").create_model(subject.name)


def _monai(subject: Subject) -> nn.Module:
    constructor = getattr(import_module("monai.networks.nets"), subject.name.replace("densenet", "DenseNet"))
    return constructor(spatial_dims=2, in_channels=3, out_channels=1000)


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Output:
    openvino = import_module("openvino")
    options = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that torch.jit.trace is deprecated
        graph = openvino.convert_model(model, example_input=x, input=list(x.shape))
    request = openvino.compile_model(graph, "CPU", options).create_infer_request()
    return lambda x: request.infer(x.detach().numpy(), share_inputs=True)[0]


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Output:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None, "it is None only where a file is written"
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: session.run(None, {argument.name: x.detach().numpy()})[0]


def _cudnn_benchmark() -> AbstractContextManager[Any]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


_TRAINING = ("forward", "backward", "step")
_ON_CPU: dict[str, Any] = dict(devices=("cpu",), modes=("inference",), memory_format=torch.contiguous_format)

NAIVE_CONTIGUOUS = Contender("naive contiguous", lambda s: s.naive(), torch.contiguous_format)
NAIVE = Contender("naive", lambda s: s.naive())
NAIVE_RECOMPUTING = Contender("naive, memory_efficient", lambda s: s.naive(memory_efficient=True), modes=_TRAINING)
CUDNN_BENCHMARK = Contender("cuDNN benchmark", lambda s: s.naive(), context=_cudnn_benchmark, devices=("cuda",))
TIMM = Contender(
    "timm",
    _timm,
    packages=("timm",),
    networks=("densenet121", "densenet161", "densenet169", "densenet201"),
)
MONAI = Contender(
    "MONAI",
    _monai,
    packages=("monai",),
    networks=("densenet121", "densenet169", "densenet201", "densenet264"),
)
COMPILE = Contender("torch.compile", lambda s: s.naive(), compile_mode="default", first_call_s=70)
MAX_AUTOTUNE = Contender(
    "torch.compile, max-autotune", lambda s: s.naive(), compile_mode="max-autotune-no-cudagraphs", first_call_s=90
)
CUDA_GRAPHS = Contender(
    "torch.compile, CUDA graphs", lambda s: s.naive(), compile_mode="max-autotune", devices=("cuda",), first_call_s=90
)
OPENVINO = Contender(
    "OpenVINO", lambda s: s.naive(), export=_openvino, packages=("openvino",), first_call_s=5, **_ON_CPU
)
ONNXRUNTIME = Contender(
    "ONNX Runtime",
    lambda s: s.naive(),
    export=_onnxruntime,
    packages=("onnxruntime", "onnx", "onnxscript"),
    dtypes=("fp32",),
    first_call_s=12,
    **_ON_CPU,
)
FAST_RECOMPUTING = Contender("fast, memory_efficient", lambda s: s.fast(memory_efficient=True), modes=_TRAINING)
FAST_FROZEN = Contender(
    "fast, frozen", lambda s: s.fast(), export=lambda model, *_: fastdense.freeze(model), modes=("inference",)
)
FAST = Contender("fast", lambda s: s.fast())

NAIVE_AND_FAST = (NAIVE_CONTIGUOUS, NAIVE, FAST)
MEMORY_CONTENDERS = (NAIVE, NAIVE_RECOMPUTING, FAST, FAST_RECOMPUTING)
ALL = (
    NAIVE_CONTIGUOUS, NAIVE, NAIVE_RECOMPUTING, CUDNN_BENCHMARK, TIMM, MONAI, COMPILE, MAX_AUTOTUNE, CUDA_GRAPHS,
    OPENVINO, ONNXRUNTIME, FAST_RECOMPUTING, FAST_FROZEN, FAST,
)  # fmt: skip


def by_name(name: str) -> Contender:
    """As which contenders travel between processes."""
    return next(contender for contender in ALL if contender.name == name)


# -- running ----------------------------------------------------------------------------------------------------------


class Workload:
    """A contender with its input on a device, ready to run in any mode. Nothing it does changes the parameters."""

    def __init__(
        self,
        subject: Subject,
        contender: Contender,
        batch: int,
        device: str,
        dtype: torch.dtype,
        weights: nn.Module | None = None,
    ) -> None:
        """With the state of ``weights``, the naive subject, if given."""
        self.device, self.dtype, self.context = torch.device(device), dtype, contender.context
        torch.manual_seed(0)
        self.model = contender.model(subject)
        if weights is not None:
            _copy_state(weights, self.model)
        self.model.to(device).to(memory_format=contender.memory_format)
        self.inputs = [self._placed(x, contender.memory_format) for x in subject.inputs(batch, dtype)]
        self.x = self.inputs[0]
        self._forward: Output = self.model
        if contender.compile_mode is not None:
            torch.compiler.reset()  # else a second shape would be compiled with symbolic sizes
            self._forward = torch.compile(self.model, mode=contender.compile_mode)
        if contender.export is not None:
            self._forward = contender.export(self.model.eval(), self.x, dtype)
            self.model = nn.Identity()  # the other runtime has the weights now
        self._gradient: Tensor | None = None

    def prepare(self, mode: str) -> tuple[Any, ...]:
        """What precedes ``mode`` and is not timed; the arguments of :meth:`run`."""
        self.model.train(mode != "inference")
        self._zero_grad()
        arguments = (self.forward(),) if mode == "backward" else ()
        self._synchronize()
        return (mode, *arguments)

    def run(self, mode: str, *arguments: Any) -> Any:
        """What is timed: one of :data:`MODES`, to its end on the device."""
        with self.context():
            result = getattr(self, mode)(*arguments)
            self._synchronize()
        return result

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """With the work of SGD, and a learning rate that leaves the weights of the first round."""
        return torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

    def clock(self, mode: str) -> float:
        """Seconds of one run, prepared before."""
        arguments = self.prepare(mode)
        start = time.perf_counter()
        self.run(*arguments)
        return time.perf_counter() - start

    def forward(self) -> Any:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._forward(self.x)

    def backward(self, out: Tensor) -> None:
        if self._gradient is None:
            self._gradient = torch.randn_like(out)
        out.backward(self._gradient)

    def step(self) -> None:
        self._zero_grad()
        self.backward(self.forward())
        self.optimizer.step()

    def inference(self) -> Any:
        with torch.inference_mode():
            return self.forward()

    def outputs(self) -> list[Tensor]:
        """Of each input in evaluation, float64 on the CPU."""
        found = []
        for x in self.inputs:
            self.x = x
            found.append(torch.as_tensor(self.run(*self.prepare("inference"))).double().cpu())
        self.x = self.inputs[0]
        return found

    def _placed(self, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        placed = x.detach().to(device=self.device, memory_format=memory_format)
        return placed.requires_grad_(x.requires_grad)

    def _zero_grad(self) -> None:
        self.model.zero_grad()
        for x in self.inputs:
            x.grad = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _copy_state(weights: nn.Module, model: nn.Module) -> None:
    """Other libraries name the tensors of a DenseNet otherwise, and have them in the same order."""
    model.load_state_dict(dict(zip(model.state_dict(), weights.state_dict().values(), strict=True)))
