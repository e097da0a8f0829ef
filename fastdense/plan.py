"""How much memory and time a DenseNet needs, before it is run.

**Memory** is found by running one training step, or one inference, on tensors without values: PyTorch's fake tensors
have shapes and storages, and everything that a step allocates, saves and frees happens in its order. What happens
inside an op of fastdense they do not see: :data:`_SCRATCH` says what its kernels allocate there. The numbers are
those of tensors; a process needs its libraries too, a GPU its context and what its allocator cannot reuse, and stock
convolutions on GPUs ask for workspaces.

**Time** is a floor, of :mod:`fastdense.roofline`: what no run can beat.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import backends, models, reference, roofline
from .architectures import CONFIGS
from .kernels.contract import DenseLayers
from .kernels.portable.batch_norm import gemm_dtype
from .kernels.portable.chunks import chunks
from .modules import FastDenseBlock, FastTransition
from .roofline import Ceilings, Exchange, Piece, Stage
from .verify import DTYPES


@dataclass(frozen=True)
class Plan:
    """What one training step, or one inference, needs. All sizes are bytes of the whole batch.

    Attributes:
        network: its name.
        naive: computed by stock modules.
        memory_efficient: recomputes in backward.
        batch, size: images, and their height and width.
        dtype: ``fp32``, or ``bf16`` or ``fp16`` by autocast around float32 parameters.
        train: a training step, with SGD with momentum; else inference.
        device: ``cpu`` or ``cuda``.
        parameters: how many.
        macs: multiply-adds of one image's forward.
        held: what is there before and after: by kind.
        gradients: of the parameters, part of the peak.
        saved: what the forward leaves for the backward, by part of the network; part of the peak, but for the batch.
        peak: the most that is there at a time beside what is held.
        pieces: of the least work.
        ceilings: of the device.
    """

    network: str
    naive: bool
    memory_efficient: bool
    batch: int
    size: int
    dtype: str
    train: bool
    device: str
    parameters: int
    macs: int
    held: dict[str, int]
    gradients: int
    saved: dict[str, int]
    peak: int
    pieces: tuple[Piece, ...]
    ceilings: Ceilings

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.held.values()) + self.peak

    @property
    def seconds(self) -> float:
        """The floor of a step, or of an inference."""
        return sum(piece.seconds(self.ceilings) for piece in self.pieces)

    def floors(self) -> dict[tuple[str, str], tuple[int, int, float]]:
        """(phase, part) -> bytes moved, operations, seconds."""
        found: dict[tuple[str, str], tuple[int, int, float]] = {}
        for piece in self.pieces:
            moved, flops, seconds = found.get((piece.phase, piece.part), (0, 0, 0.0))
            found[piece.phase, piece.part] = (
                moved + piece.bytes,
                flops + piece.flops,
                seconds + piece.seconds(self.ceilings),
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the pieces added up by phase and part."""
        floors = [
            dict(phase=phase, part=part, bytes=moved, flops=flops, seconds=seconds)
            for (phase, part), (moved, flops, seconds) in self.floors().items()
        ]
        sums = dict(saved_bytes=self.saved_bytes, total_bytes=self.total_bytes, seconds=self.seconds, floors=floors)
        return {name: value for name, value in asdict(self).items() if name != "pieces"} | sums


def plan(
    network: str | nn.Module,
    *,
    batch: int,
    size: int,
    dtype: str = "fp32",
    train: bool = True,
    memory_efficient: bool = False,
    naive: bool = False,
    device: str = "cpu",
    ceilings: Ceilings | None = None,
) -> Plan:
    """Predict memory and least time. Computes nothing; takes seconds.

    Args:
        network: a name of :data:`fastdense.architectures.CONFIGS`, or a model of this package or torchvision's,
            which stays as it is.
        batch, size: images, and their height and width in pixels.
        dtype: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast.
        train: a training step; else inference.
        memory_efficient, naive: of a network by name: recompute in backward; the stock modules instead.
        device: ``"cpu"``: the backend chosen here (:func:`fastdense.status`); ``"cuda"``: the Triton kernels'.
        ceilings: by default those of an H100, or measured for ``"cpu"``.

    Raises:
        ValueError: an argument, or a combination, that cannot be.
    """
    model = _build(network, memory_efficient, naive)
    torch_dtype = _checked(batch, dtype, device)
    stages = roofline.stages(model, size)
    needs = _needs(model, stages, batch, size, torch_dtype, train, device)
    if ceilings is None:
        on_cpu = device == "cpu"
        ceilings = roofline.measured_on_cpu(torch_dtype) if on_cpu else roofline.ceilings_of("h100", torch_dtype)
    return Plan(
        network=network if isinstance(network, str) else type(network).__name__,
        naive=not any(stage.fast for stage in stages),
        memory_efficient=any(stage.recomputes for stage in stages),
        batch=batch,
        size=size,
        dtype=dtype,
        train=train,
        device=device,
        parameters=_count(model),
        macs=roofline.macs(stages),
        held=needs.held,
        gradients=_bytes(*model.parameters()) if train else 0,
        saved=needs.saved,
        peak=needs.peak,
        pieces=tuple(_pieces(model, stages, batch, torch_dtype, train)),
        ceilings=ceilings,
    )


def largest_batch(
    network: str | nn.Module,
    memory: float,
    *,
    size: int,
    dtype: str = "fp32",
    train: bool = True,
    memory_efficient: bool = False,
    naive: bool = False,
    device: str = "cpu",
) -> int:
    """The most images whose :attr:`Plan.total_bytes` are at most ``memory`` bytes; arguments as :func:`plan`'s.

    Raises:
        ValueError: the least batch does not fit either.
    """
    model = _build(network, memory_efficient, naive)
    torch_dtype = _checked(1, dtype, device)
    stages = roofline.stages(model, size)

    def total(batch: int) -> int:
        return _needs(model, stages, batch, size, torch_dtype, train, device).total_bytes

    fits = least = 2 if train and stages[-1].pixels[0] == 1 else 1  # a batch norm wants more than one value
    needed = total(least)
    if needed > memory:
        raise ValueError(
            f"{memory / 1e6:.1f} MB are too few: a batch of {least} image{'s'[: least - 1]} of {size}x{size} "
            f"needs {needed / 1e6:.1f} MB"
        )
    # The need grows by as much an image or more, the more images there are: so what the last images needed is taken
    # for the next, and once that is too many, a straight line between the two is never too low.
    each = max(1.0, needed / least)
    too_many: int | None = None
    while too_many is None or too_many - fits > 1:
        guess = fits + max(1, int((memory - needed) / each))
        if too_many is not None:
            guess = min(guess, too_many - 1)
        found = total(guess)
        each = max(1.0, (found - needed) / (guess - fits))
        if found <= memory:
            fits, needed = guess, found
        else:
            too_many = guess
    return fits


IMAGENET_IMAGES, IMAGENET_BYTES = 1_281_167, 147_897_477_120
"""Of the training set of ILSVRC 2012, the bytes being those of its archive."""

DECODED_PER_S = 200
"""Photographs that a CPU core decodes, crops and resizes in a second: an assumption."""

NVLINK_BYTES_PER_S, NETWORK_BYTES_PER_S = 450e9, 50e9
"""That a GPU sends while it receives as many: half of the 900 GB/s of an H100's data sheet; a port of 400 Gb/s each."""


@dataclass(frozen=True)
class Scaling:
    """Data-parallel training by as many GPUs, on paper: floors and bytes, nothing measured.

    Attributes:
        gpus: that train together, each on its part of the batch.
        step_seconds, backward_seconds: floors of one GPU's step, and of its backward alone.
        gradient_bytes: of all parameters, float32.
        reduction_seconds: of a ring's all-reduce of them.
        images_per_s: of all GPUs, where the reduction hides behind the backward.
        statistics, shared_statistics: exchanged by a SyncBatchNorm for each norm, and by one for each channel.
    """

    gpus: int
    step_seconds: float
    backward_seconds: float
    gradient_bytes: int
    reduction_seconds: float
    images_per_s: float
    statistics: Exchange
    shared_statistics: Exchange

    @property
    def file_bytes_per_s(self) -> float:
        """That all GPUs together consume of ImageNet's JPEGs."""
        return self.images_per_s * IMAGENET_BYTES / IMAGENET_IMAGES

    @property
    def decoding_cores(self) -> float:
        """CPU cores that decode, crop and resize as fast as all GPUs together train."""
        return self.images_per_s / DECODED_PER_S

    def imagenet_seconds(self, epochs: int) -> float:
        """To train on ImageNet."""
        return epochs * IMAGENET_IMAGES / self.images_per_s


def scaling(
    network: str | nn.Module = "densenet121",
    *,
    batch: int,
    gpus: int = 8,
    size: int = 224,
    dtype: str = "bf16",
    memory_efficient: bool = False,
    naive: bool = False,
    ceilings: Ceilings | None = None,
    link_bytes_per_s: float = NVLINK_BYTES_PER_S,
) -> Scaling:
    """Predict data-parallel training on GPUs.

    Args:
        batch: images of each GPU.
        gpus: how many.
        ceilings: of each; by default an H100's.
        link_bytes_per_s: that each sends while it receives as many; by default an H100's NVLink.
        network, size, dtype, memory_efficient, naive: as for :func:`plan`.

    Source of the ring: Patarasuk and Yuan 2009; each GPU sends 2 (n-1) / n of the bytes.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    model = _build(network, memory_efficient, naive)
    torch_dtype = _checked(batch, dtype, "cuda")
    stages = roofline.stages(model, size)
    ceilings = ceilings or roofline.ceilings_of("h100", torch_dtype)
    step = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    for piece in _pieces(model, stages, batch, torch_dtype, train=True):
        step[piece.phase] += piece.seconds(ceilings)
    seconds, gradients = sum(step.values()), _count(model) * 4
    reduction = 2 * (gpus - 1) / gpus * gradients / link_bytes_per_s
    return Scaling(
        gpus=gpus,
        step_seconds=seconds,
        backward_seconds=step["backward"],
        gradient_bytes=gradients,
        reduction_seconds=reduction,
        images_per_s=gpus * batch / (seconds + max(0.0, reduction - step["backward"])),
        statistics=roofline.exchange(stages, shared=False),
        shared_statistics=roofline.exchange(stages, shared=True),
    )


# -- memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Needs:
    """The memory part of a :class:`Plan`."""

    held: dict[str, int]
    saved: dict[str, int]
    peak: int

    @property
    def total_bytes(self) -> int:
        return sum(self.held.values()) + self.peak


def _needs(
    model: nn.Module, stages: list[Stage], batch: int, size: int, dtype: torch.dtype, train: bool, device: str
) -> _Needs:
    if train and batch * stages[-1].pixels[0] == 1:
        raise ValueError(f"training needs two images or more of {size}x{size}: the last norm sees one pixel of each")
    on_gpu = device == "cuda"
    # the ops' fakes are the same for every backend; one that runs on any device stands in for Triton's
    with FakeTensorMode(), backends.use_backend("torch") if on_gpu else nullcontext():
        fake = _faked(model).train(train)
        x = torch.empty(batch, stages[0].image[0] // size**2, size, size, memory_format=torch.channels_last)
        ledger = _Ledger(fake, x, "triton" if on_gpu else None)
        with ledger, torch.set_grad_enabled(train):
            with (
                torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
                torch.autograd.graph.saved_tensors_hooks(ledger.save, lambda tensor: tensor),
            ):
                out = fake(x)
            if train:
                out.backward(torch.empty_like(out))
    held = {
        "parameters": _bytes(*model.parameters()),
        "running statistics": _bytes(*model.buffers()),
        "momentum": _bytes(*model.parameters()) if train else 0,
        "packed weights": 0 if on_gpu else _packed_on_cpu(model, dtype, train),
        "batch": _bytes(x),
    }
    order = ["batch", *(stage.part for stage in stages)]
    saved = sorted(ledger.saved.items(), key=lambda item: order.index(item[0].partition(":")[0]))
    return _Needs({kind: size for kind, size in held.items() if size}, dict(saved), ledger.peak)


class _Ledger(TorchDispatchMode):
    """Counts the storages that are made inside, while they live, and knows which part of the network made them.

    An op belongs to the part whose parameter it, or the last op before it, takes; a concatenation to the part that
    reads it.

    Attributes:
        peak: the most bytes alive at a time, kernels' scratch included.
        saved: bytes that autograd keeps, by part.
    """

    def __init__(self, model: nn.Module, x: Tensor, backend: str | None):
        super().__init__()
        self.peak, self.saved = 0, Counter[str]()
        self._backend = backend  # whose scratch to count, if not the one that an op is called with
        self._parameters = {_key(p): _part(name) for name, p in model.named_parameters()}
        self._own = {_key(t) for t in (*model.parameters(), *model.buffers())}
        self._labels = {_key(x): "batch"}  # of what is alive
        self._references: dict[int, weakref.ref[Any]] = {}
        self._bytes = 0
        self._kept: set[int] = set()
        self._part, self._unread = "stem", list[int]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op._schema.name
        keys = [_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        part = next((self._parameters[key] for key in keys if key in self._parameters), None)
        if part is not None:
            self._part = part
            self._labels.update((key, _label(part, "concatenated")) for key in self._unread if key in self._labels)
            self._unread.clear()
        bottlenecks = set(map(id, result[1])) if name == "fastdense::dense_block" else ()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, "bottlenecks" if id(leaf) in bottlenecks else _KINDS.get(name, "other"))
        scratch = 0
        if op.namespace == "fastdense":
            scratch = _scratch(self._backend or kwargs["backend"], name.partition("::")[2], args, kwargs)
        self.peak = max(self.peak, self._bytes + scratch)
        return result

    def save(self, tensor: Tensor) -> Tensor:
        """The hook of autograd's saved tensors: every storage counts once, whole."""
        key = _key(tensor)
        if key not in self._own and key not in self._kept:
            self._kept.add(key)
            self.saved[self._labels[key]] += tensor.untyped_storage().nbytes()
        return tensor

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._labels or key in self._own:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._labels[key], self._references[key]
            self._bytes -= size

        self._references[key] = weakref.ref(storage, gone)
        self._labels[key] = _label(self._part, kind)
        self._bytes += size
        if kind == "concatenated":
            self._unread.append(key)


def _label(part: str, kind: str) -> str:
    return f"{part}: {kind}" if part.startswith("block") else part


_KINDS = {
    "aten::cat": "concatenated",
    "aten::convolution": "convolved",
    "aten::_to_copy": "casts",
    "aten::native_batch_norm": "normalised",
    "fastdense::dense_block": "X",
}
"""What an op of a dense block makes."""


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _part(parameter: str) -> str:
    """The part of the network that a parameter belongs to, as in :class:`fastdense.roofline.Stage`."""
    name = parameter.removeprefix("features.").split(".")[0]
    for kind in ("block", "transition"):
        _, found, number = name.partition(kind)
        if found:
            return f"{kind} {number}"
    return "stem" if name in ("conv0", "norm0") else "head"


def _faked(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no values, weights in channels-last memory. Inside a FakeTensorMode."""
    fakes: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout)
        fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, fakes)


# -- what kernels allocate inside an op, and keep ------------------------------------------------------------


def _scratch(backend: str, op: str, args: Any, kwargs: Any) -> int:
    """Bytes that the kernels of an op allocate beside what it returns, and free."""
    if op.startswith("dense_block"):
        return _scratch_of_block(backend, op, args, kwargs)
    backward, transition, stem = op.endswith("_backward"), op.startswith("transition"), op.startswith("stem_tail")
    x = args[1] if backward else args[0]
    pooled, size = x.numel() // 4, x.element_size()
    if backend == "torch":
        chunk = _chunk(x.shape)
        da = 4 * x.numel() if size < 4 else 0  # in float32 it becomes x's gradient
        return 4 * chunk + da if backward else 2 * chunk
    if not backward or not (transition or stem):
        return 0
    if backend == "triton":
        return 2 * pooled * size if transition else pooled  # pooled z and its gradient; where the maxima were
    threads = torch.get_num_threads()
    return 4 * pooled + 4 * (threads + 1) * args[-1].numel() if transition else 2 * pooled


def _scratch_of_block(backend: str, op: str, args: Any, kwargs: Any) -> int:
    backward, inference = op.endswith("_backward"), op.endswith("_inference")
    x, lists = (args[1], args[7:]) if backward else (args[0], args[1:])
    conv1, conv2 = (lists[DenseLayers._fields.index(name)] for name in ("conv1_weight", "conv2_weight"))
    n, _, h, w = x.shape
    pixels, size, compute = n * h * w, x.element_size(), kwargs["dtype"].itemsize
    width, growth = (len(conv1[0]), len(conv2[0])) if conv2 else (0, len(conv1[0]))
    channels = conv1[0].shape[1] + len(conv1) * growth
    kept = args[2] if backward else kwargs.get("save_bottleneck")
    again = 0 if kept else pixels * width * compute  # one layer's bottleneck, made for the moment
    largest, largest3x3 = (max(weight.numel() for weight in weights) for weights in (conv1 + conv2, conv2 or conv1))

    if backend == "triton":
        packed = compute * sum(weight.numel() for weight in conv1 + conv2)
        return again + packed + backward * pixels * (channels * size + (growth + width) * compute)  # G; dy, da
    if backend == "torch":
        chunk = _chunk((n, channels, h, w))
        if not backward:
            return 2 * chunk + (0 if inference else again)
        casts = 4 * pixels * width if size < 4 else 0
        temporaries = 4 if conv2 else 6  # oneDNN turns the input of a 3x3, and its gradient
        return temporaries * chunk + again + casts + 4 * pixels * (channels + 2 * width)  # G; da, dh
    if inference:
        return 0
    packed = 4 * max(largest, 25 * largest3x3 // 9)  # Winograd's form beside the plain one
    if not backward:
        segments = min(128, pixels // 64)
        return again + packed + 16 * segments * max(channels, width)
    sums = 4 * torch.get_num_threads() * max(largest, 16 * largest3x3 // 9)
    turned = 4 * sum(weight.numel() for weight in conv2 or conv1)  # gradients, to the weights' layout
    widened = 4 * pixels * channels if args[0].element_size() < 4 else 0  # the incoming gradient
    return again + packed + sums + turned + widened + 4 * pixels * (channels + width)  # G; da


def _chunk(shape: Any) -> int:
    """Bytes of the portable kernels' temporary of one chunk."""
    return 4 * chunks(shape, torch.device("cpu"))[0].pixels * shape[1]


def _packed_on_cpu(model: nn.Module, dtype: torch.dtype, train: bool) -> int:
    """Bytes of the weights that the C++ kernels keep in a form of their own: 3x3s in float32 in Winograd's too."""
    if backends.select(torch.device("cpu"), torch.float32) != "cpu":
        return 0
    narrow = gemm_dtype(dtype, torch.device("cpu")) != torch.float32
    fast = [m for m in model.modules() if isinstance(m, FastTransition if train else (FastTransition, FastDenseBlock))]
    weights = [conv.weight for module in fast for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    forms = [2 if narrow else 4 * 25 / 9 if weight.shape[-1] == 3 else 4 for weight in weights]
    return int(sum(form * weight.numel() for form, weight in zip(forms, weights, strict=True)))


# -- what both share -----------------------------------------------------------------------------------------


def _build(network: str | nn.Module, memory_efficient: bool, naive: bool) -> nn.Module:
    """The model, without values where it is built here."""
    if isinstance(network, nn.Module):
        if memory_efficient or naive:
            raise ValueError("memory_efficient and naive are of a network by name; a model is planned as it is")
        return network
    if network not in CONFIGS:
        raise ValueError(f"unknown network {network!r}: there are {', '.join(CONFIGS)}")
    with torch.device("meta"):
        return getattr(reference if naive else models, network)(memory_efficient=memory_efficient)


def _checked(batch: int, dtype: str, device: str) -> torch.dtype:
    """The dtype of that name."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return DTYPES[dtype]


def _pieces(model: nn.Module, stages: list[Stage], batch: int, dtype: torch.dtype, train: bool) -> list[Piece]:
    found = roofline.pieces(stages, batch, dtype, train=train)
    return [*found, roofline.optimizer_piece(_count(model))] if train else found


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
