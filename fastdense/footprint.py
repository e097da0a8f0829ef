"""The memory that a DenseNet needs, found without computing anything.

One training step, or one inference, runs on tensors without values: PyTorch's fake tensors have shapes and storages,
and everything that a step allocates, saves and frees happens in its order. What happens inside an op of fastdense they
do not see: :func:`_scratch` says what its kernels allocate there. The numbers are those of tensors; a process needs its
libraries too, a GPU its context and what its allocator cannot reuse, and stock convolutions on GPUs ask for workspaces.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import backends
from .kernels.contract import DenseLayers
from .kernels.cpu.chain import Room
from .kernels.portable.batch_norm import gemm_dtype
from .kernels.portable.chunks import OF_A_BLOCK, OF_A_PASS, chunks
from .modules import FusedBlock, FusedTransition
from .roofline import Stage


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole batch, with the meanings of :class:`fastdense.plan.Plan`'s."""

    held: dict[str, int]
    saved: dict[str, int]
    peak: int

    @property
    def total_bytes(self) -> int:
        return sum(self.held.values()) + self.peak


def footprint(
    model: nn.Module, stages: list[Stage], batch: int, size: int, dtype: torch.dtype, train: bool, device: str
) -> Footprint:
    """Of a training step or of inference; arguments as :func:`fastdense.plan.plan`'s, ``stages`` those of the model.

    Raises:
        ValueError: the last norm would see one value a channel.
    """
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
        "parameters": bytes_of(*model.parameters()),
        "running statistics": bytes_of(*model.buffers()),
        "momentum": bytes_of(*model.parameters()) if train else 0,
        "packed weights": 0 if on_gpu else _packed_on_cpu(model, dtype, train),
        "batch": bytes_of(x),
    }
    order = ["batch", *(stage.part for stage in stages)]
    saved = sorted(ledger.saved.items(), key=lambda item: order.index(item[0].partition(":")[0]))
    return Footprint({kind: size for kind, size in held.items() if size}, dict(saved), ledger.peak)


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
        self._chain: list[Tensor] = []  # what the first of the last ops that are one call took, and what each made
        self._in_room: set[int] = set()  # of these, those that are no tensors then
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
        before = self._bytes
        bottlenecks = set(map(id, result[1])) if name == "fastdense::dense_block" else ()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, "bottlenecks" if id(leaf) in bottlenecks else _KINDS.get(name, "other"))
        scratch, _alive = 0, self._chain  # which lives until the peak is known
        backend = None
        if op.namespace == "fastdense":
            backend = self._backend or kwargs["backend"]
            scratch = _scratch(backend, name.partition("::")[2], args, kwargs)
        ends_chain = self._chain and _key(self._chain[-1]) in keys and self._bytes > before  # not by a view
        if (backend == "cpu" or ends_chain) and not torch.is_grad_enabled():
            scratch += self._room(name, args[0], result)
        if not self._chain:  # of which nothing is a tensor but its input and output
            self.peak = max(self.peak, self._bytes + scratch)
        return result

    def _room(self, name: str, x: Tensor, out: Any) -> int:
        """Bytes that ops of one call have made for one another, once it ends; what the first took lives as long."""
        if name in _OF_A_CHAIN:
            if not self._chain or _key(self._chain[-1]) != _key(x):
                self._chain = [x]
            elif len(self._chain) > 1:  # no tensor, as it was counted
                self._in_room.add(_key(x))
                self._bytes -= x.untyped_storage().nbytes()
            self._chain.append(out)
            return 0
        room = Room.between([bytes_of(made) // len(made) for made in self._chain[1:]])
        group = room.group(len(self._chain[0])) if self._chain else 0
        self._chain = []
        return sum(room) * group

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
            self._bytes -= 0 if key in self._in_room else size
            self._in_room.discard(key)

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


_OF_A_CHAIN = tuple(
    f"fastdense::{name}" for name in ("stem_inference", "stem_tail", "dense_block_inference", "transition", "head")
)
"""Ops that, one after another, are one call of the C++ kernels."""


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


# -- what kernels allocate inside an op, and keep -------------------------------------------------------------


def _scratch(backend: str, op: str, args: Any, kwargs: Any) -> int:
    """Bytes that the kernels of an op allocate beside what it returns, and free."""
    if op.startswith("dense_block"):
        return _scratch_of_block(backend, op, args, kwargs)
    backward, transition, stem = op.endswith("_backward"), op.startswith("transition"), op.startswith("stem_tail")
    x = args[1] if backward else args[0]
    pooled, size = x.numel() // 4, x.element_size()
    if backend == "torch":
        chunk = _chunk(x.shape)
        return 4 * chunk + 4 * x.numel() if backward else 2 * chunk  # da
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
        chunk = _chunk((n, channels, h, w), OF_A_BLOCK if inference else OF_A_PASS)
        if not backward:
            return 2 * chunk + (0 if inference else again)
        casts = 4 * pixels * width if size < 4 else 0
        temporaries = 4 if conv2 else 6  # oneDNN turns the input of a 3x3, and its gradient
        raw = channels if args[0].element_size() < 4 else channels - growth  # a float32 gradient is read where it is
        return temporaries * chunk + again + casts + 4 * pixels * (raw + 2 * width)  # G; da, dh
    if inference:
        return 0
    narrow = gemm_dtype(kwargs["dtype"], x.device) == torch.bfloat16
    word, forms, places = (2, 9, 9) if narrow else (4, 25, 16)  # in floats Winograd's form beside the plain one
    packed = word * max(largest, forms * largest3x3 // 9)
    if not backward:
        segments = min(128, pixels // 64)
        return again + packed + 16 * segments * max(channels, width)
    sums = 4 * torch.get_num_threads() * max(largest, places * largest3x3 // 9)
    turned = 4 * sum(weight.numel() for weight in conv2 or conv1)  # gradients, to the weights' layout
    gradient = 2 if x.dtype == torch.bfloat16 else 4
    widened = gradient * pixels * channels if args[0].element_size() < gradient else 0  # the incoming gradient
    return again + packed + sums + turned + widened + pixels * (gradient * channels + word * width)  # G; da


def _chunk(shape: Any, size: int = OF_A_PASS) -> int:
    """Bytes of the portable kernels' temporary of one chunk."""
    return 4 * chunks(shape, torch.device("cpu"), size)[0].pixels * shape[1]


def _packed_on_cpu(model: nn.Module, dtype: torch.dtype, train: bool) -> int:
    """Bytes of the weights that the C++ kernels keep in a form of their own: 3x3s in float32 in Winograd's too."""
    if backends.select(torch.device("cpu"), torch.float32) != "cpu":
        return 0
    narrow = gemm_dtype(dtype, torch.device("cpu")) != torch.float32
    fast = [m for m in model.modules() if isinstance(m, FusedTransition if train else (FusedTransition, FusedBlock))]
    weights = [conv.weight for module in fast for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    forms = [2 if narrow else 4 * 25 / 9 if weight.shape[-1] == 3 else 4 for weight in weights]
    return int(sum(form * weight.numel() for form, weight in zip(forms, weights, strict=True)))


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
