"""What the tests share: devices, pairs of a fast module and its stock definition, and what is asked of a pair.

The helpers are session-scoped fixtures that return functions, so that hypothesis may use them too.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():  # before fastdense looks for Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastdense
from fastdense import FastDenseBlock, FastDenseNet, FastTransition, parity
from fastdense.benchmarks import wild
from fastdense.served import BatchNorm

settings.register_profile(
    "fastdense",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastdense")


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that the modules run on."""
    return request.param


@pytest.fixture(scope="session")
def randn() -> Callable[..., Tensor]:
    """``randn(*shape, seed=0, dtype=float32, device="cpu")``: normal noise, whatever ran before."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    return make


def _tails(channels: int, **kwargs: Any) -> FastDenseNet:
    """A network of nothing but the stem tail and the head: [N, channels, *spatial] -> [N, channels]."""
    net = FastDenseNet(block_config=(), num_init_features=channels, num_classes=1, **kwargs)
    net.features.conv0, net.classifier = nn.Identity(), nn.Identity()
    return net


def _new_first(*args: Any) -> nn.Module:
    """A network whose blocks put new features before older ones."""
    return fastdense.convert(wild.KuangliuDenseNet(*args))


_FAST: dict[str, Callable[..., nn.Module]] = {
    "block": FastDenseBlock,
    "transition": FastTransition,
    "tails": _tails,
    "net": FastDenseNet,
    "new first": _new_first,
}


@pytest.fixture(scope="session")
def twins() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """``twins(kind, *args, seed=0, **kwargs)``: a fast module and its stock definition, of equal state.

    ``kind`` is ``"block"``, ``"transition"``, ``"net"``, ``"tails"`` (the stem tail and the head alone), or ``"new
    first"`` (a network of blocks that put new features first). The norms' parameters and running statistics are random.
    """

    def make(kind: str, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fast = _FAST[kind](*args, **kwargs)
            for norm in batch_norms_of(fast):
                norm.weight.data.uniform_(0.5, 1.5)
                norm.bias.data.normal_(0, 0.3)
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
        return fast, fastdense.to_reference(fast)

    return make


def batch_norms_of(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


@pytest.fixture(scope="session")
def batch_norms() -> Callable[[nn.Module], list[BatchNorm]]:
    """``batch_norms(model)``, in the order of the forward."""
    return batch_norms_of


@pytest.fixture(scope="session")
def clear_relus() -> Callable[..., None]:
    """``clear_relus(models, inputs)``: no ReLU of equal ``models`` comes near zero at any of ``inputs``.

    A rounding that flips a ReLU changes a gradient by far more than a rounding: by chance, in either
    implementation. So each norm's bias is moved until zero falls into the widest gap of its outputs; then
    errors are those of arithmetic alone, far smaller, and the same on every machine.
    """

    def widest_gap(values: Tensor) -> Tensor:
        """[C]: the middle of the widest gap between neighbours among the central values of each row of [C, M]."""
        ordered, margin = values.sort(1).values, values.shape[1] // 8
        at = ordered.diff(dim=1)[:, margin : values.shape[1] - margin].argmax(1, keepdim=True) + margin
        return (ordered.gather(1, at) + ordered.gather(1, at + 1)).squeeze(1) / 2

    def clear(models: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        probe = copy.deepcopy(models[-1]).double()

        def move(norm: BatchNorm, args: tuple[Tensor], _: Tensor) -> Tensor:
            out = torch.cat([norm.forward(x) for x in args[0].chunk(len(inputs))])  # each with its own statistics
            shift = widest_gap(out.transpose(0, 1).flatten(1))
            norm.bias.data -= shift
            return out - shift.view(-1, *[1] * (out.dim() - 2))

        for norm in batch_norms_of(probe):
            norm.register_forward_hook(move)
        with torch.no_grad():
            probe(torch.cat(list(inputs)).double())
        for model in models:
            for norm, moved in zip(batch_norms_of(model), batch_norms_of(probe), strict=True):
                norm.bias.data.copy_(moved.bias)

    return clear


class _Remembered:
    """:func:`fastdense.parity.observe` of stock models, which does not run the same one on the same input again.

    The same is what has the same bytes and settings everywhere. Each backend is compared with the same runs.
    """

    most_bytes = 2 << 30

    def __init__(self) -> None:
        self._seen: dict[bytes, dict[str, Tensor]] = {}
        self._bytes = 0

    def __call__(self, model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            return parity.observe(model, x, **options)
        key = self._key(model, x, options)
        found = self._seen.pop(key, None)
        if found is None:
            found = parity.observe(model, x, **options)
            self._bytes += self._size(found)
        self._seen[key] = found  # the latest last
        while self._bytes > self.most_bytes:
            self._bytes -= self._size(self._seen.pop(next(iter(self._seen))))
        return found

    @staticmethod
    def _size(seen: dict[str, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in seen.values())

    @staticmethod
    def _key(model: nn.Module, x: Tensor, options: dict[str, Any]) -> bytes:
        digest = hashlib.blake2b(repr((options, x.device, torch.get_num_threads())).encode())
        for name, module in model.named_modules():
            settings = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple | None)}
            digest.update(repr((name, type(module), settings)).encode())
        named = [*model.named_parameters(), *model.named_buffers(), ("x", x)]
        for name, tensor in named:
            facts = name, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad
            digest.update(repr(facts).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.digest()


@pytest.fixture(scope="session")
def assert_parity() -> Callable[..., None]:
    """``assert_parity(fast, stock, inputs, dtype=..., **options)`` of :func:`fastdense.parity.check`."""
    remembered = _Remembered()

    def check(fast: nn.Module, stock: nn.Module, inputs: Tensor | Sequence[Tensor], **options: Any) -> None:
        rows = parity.check(fast, stock, inputs, **options, observe_stock=remembered)
        failures = list(parity.failures(rows))
        assert not failures, "\n".join(failures)

    return check


@pytest.fixture(scope="session")
def assert_within_budget() -> Callable[..., None]:
    """``assert_within_budget(fast, stock, exact, dtype)``: named tensors, as :func:`fastdense.parity.compare`."""

    def check(fast: dict[str, Tensor], stock: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
        failures = list(parity.failures(parity.compare(fast, [stock], exact, dtype)))
        assert not failures, "\n".join(failures)

    return check


@pytest.fixture(scope="session")
def assert_identical() -> Callable[..., None]:
    """``assert_identical(a, b)``: dicts of tensors with the same names and the same bits."""

    def check(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different

    return check


class _OpCalls(TorchDispatchMode):
    """Notes every call of a fastdense op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastdense":
            self.calls.append((op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def op_calls() -> Callable[[], Any]:
    """``with op_calls() as calls``: ``calls`` fills with the (op, args, kwargs) of fastdense's ops."""

    @contextmanager
    def record() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
        with _OpCalls() as mode:
            yield mode.calls

    return record
