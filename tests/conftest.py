"""What the tests share: devices, pairs of a fast module and its stock definition, and what is asked of a pair.

The helpers are session-scoped fixtures that return functions, so that hypothesis may use them too.
"""

from __future__ import annotations

import copy
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


_FAST = {"block": FastDenseBlock, "transition": FastTransition, "tails": _tails, "net": FastDenseNet}


@pytest.fixture(scope="session")
def twins() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """``twins(kind, *args, seed=0, **kwargs)``: a fast module and its stock definition, of equal state.

    ``kind`` is ``"block"``, ``"transition"``, ``"net"``, or ``"tails"`` (the stem tail and the head alone). The
    norms' parameters and running statistics are random.
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


@pytest.fixture(scope="session")
def assert_parity() -> Callable[..., None]:
    """``assert_parity(fast, stock, inputs, dtype=..., **options)`` of :func:`fastdense.parity.check`."""

    def check(fast: nn.Module, stock: nn.Module, inputs: Tensor | Sequence[Tensor], **options: Any) -> None:
        failures = list(parity.failures(parity.check(fast, stock, inputs, **options)))
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
