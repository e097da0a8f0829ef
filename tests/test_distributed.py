"""Two processes are one: SyncBatchNorm over shared statistics, FSDP2, and the bytes that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sources import SOURCES
from torch import Tensor, nn

import fastdense
from fastdense import parity, reference

PROGRAM = Path(__file__).with_name("two_ranks.py")
HAS_CPU_KERNELS = fastdense.status().as_dict()["backend cpu"]["state"] == "available"

CASES = [
    ("small", "torch", 32, "fp32"),
    ("plain", "torch", 9, "fp32"),
    ("memory_efficient", "torch", 32, "fp32"),
    ("small", "triton", 32, "fp32"),
    ("plain", "triton", 8, "fp32"),
    *(
        (name, "cpu", size, dtype)
        for name, size, dtype in (
            ("small", 32, "fp32"),
            ("plain", 9, "fp32"),
            ("memory_efficient", 32, "fp32"),
            ("small", 32, "bf16"),
            ("densenet121", 64, "fp32"),
        )
        if HAS_CPU_KERNELS
    ),
]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """two_ranks.py, for its networks and images."""
    spec = spec_from_file_location("two_ranks", PROGRAM)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(case: str, folder: Path, *arguments: str) -> None:
    """two_ranks.py on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), case, str(folder), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def networks(program: ModuleType, clear_relus: Any) -> dict[tuple[str, int], fastdense.FastDenseNet]:
    """The network of each case, in which no ReLU is near zero for the case's images."""
    found = {}
    for name, _, size, _ in CASES:
        if (name, size) not in found:
            found[name, size] = program.network(name)
            clear_relus([found[name, size], fastdense.to_reference(found[name, size])], [program.batch(size)[0]])
    return found


@pytest.fixture(scope="module")
def synced(
    networks: dict[tuple[str, int], fastdense.FastDenseNet], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """What both ranks saw of each case: one start of the processes for all."""
    folder = tmp_path_factory.mktemp("sync")
    for (name, size), model in networks.items():
        torch.save(model.state_dict(), folder / f"{name}-{size}.pt")
    names = [",".join(map(str, case)) for case in CASES]
    run("sync", folder, *names)
    return {
        case: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]
        for case, name in zip(CASES, names, strict=True)
    }


def alone(
    network: nn.Module,
    batch: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    amp: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Any]:
    """The same step of stock modules on the whole batch, in one process."""
    model = fastdense.to_reference(network).to(dtype=dtype, memory_format=memory_format)
    x, grad = (values.to(dtype) for values in batch)
    x = x.detach().clone(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model(x)
        out.backward(grad.to(out.dtype))
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    return dict(out=out.detach(), x=x.grad, grads=grads, buffers=dict(model.named_buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_unequal_batches_of_two_processes_are_one_batch(
    case: tuple[str, str, int, str], synced: dict[Any, Any], networks: dict[Any, Any], program: ModuleType
) -> None:
    name, _, size, dtype_name = case
    amp = dtype_name == "bf16"
    first, second = synced[case]
    network, batch = networks[name, size], program.batch(size)
    truth = alone(network, batch, torch.float64)
    stocks = [_flat(alone(network, batch, torch.float32, amp, layout)) for layout in parity.MEMORY_FORMATS]
    ours = dict(
        out=torch.cat([first["out"], second["out"]]),
        x=torch.cat([first["x"], second["x"]]),
        grads=first["grads"],
        buffers=first["buffers"],
    )
    rows = parity.compare(_flat(ours), stocks, _flat(truth), torch.bfloat16 if amp else torch.float32)
    assert not list(parity.failures(rows))
    for key, value in second["buffers"].items():
        assert torch.equal(value, first["buffers"][key]), key  # bit by bit the same on both


def _flat(step: dict[str, Any]) -> dict[str, Tensor]:
    buffers = {key: value for key, value in step["buffers"].items() if "num_batches" not in key}
    assert all(int(v) == 1 for key, v in step["buffers"].items() if "num_batches" in key)
    return {"out": step["out"], "x": step["x"]} | step["grads"] | buffers


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CPU_KERNELS, reason="needs the C++ kernels")
def test_a_third_of_the_bytes_of_a_norm_each(synced: dict[Any, Any], program: ModuleType) -> None:
    sent = 0

    def count(norm: nn.Module, _: Any, out: Tensor) -> None:
        """torch.nn.SyncBatchNorm gathers mean, inverse deviation and count, and reduces two sums in backward."""
        nonlocal sent
        sent += 4 * (2 * norm.num_features + 1) + 4 * 2 * norm.num_features

    model = fastdense.to_reference(program.network("densenet121"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    model(program.batch(64)[0])
    ours = [rank["bytes"] for rank in synced["densenet121", "cpu", 64, "fp32"]]
    assert ours[0] == ours[1]
    assert ours[0] <= sent / 3, f"{ours[0]} bytes, a norm each {sent}"


@pytest.mark.slow
def test_a_rank_without_images_is_refused(tmp_path: Path) -> None:
    run("empty", tmp_path)
    assert "needs images" in torch.load(tmp_path / "empty-1.pt")["error"]


FOREIGN = [
    name
    for name, package in (("timm", "timm"), ("MONAI", "monai"), ("gpleiss ImageNet", ""))
    if not package or find_spec(package)
]


@pytest.mark.slow
def test_converted_networks_of_two_processes_are_one(tmp_path: Path, program: ModuleType) -> None:
    """DDP and the libraries' own ways to synchronised norms, on unequal shares of a batch, in float64."""
    names = [name for name in FOREIGN if name != "gpleiss ImageNet"]
    if not names:
        pytest.skip("needs timm or MONAI")
    run("ddp", tmp_path, *names)
    x, grad = (values.double() for values in program.batch(32))
    for name in names:
        stock = SOURCES[name].build().double()
        stock.features.norm5.eval()
        out = stock(x)
        out.backward(grad)
        ranks = [torch.load(tmp_path / f"ddp{name}-{rank}.pt") for rank in (0, 1)]
        truth = {"out": out.detach(), **{key: parameter.grad for key, parameter in stock.named_parameters()}}
        ours = {"out": torch.cat([rank["out"] for rank in ranks]), **ranks[0]["grads"]}
        for key, buffer in stock.named_buffers():
            truth[key], ours[key] = buffer, ranks[1]["buffers"][key]
        assert not list(parity.failures(parity.compare(ours, [truth], truth, torch.float64))), name


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a step of every network, sharded and whole, of both ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    run("fsdp", folder, "small", *FOREIGN)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", *FOREIGN])
def test_fsdp_step(name: str, sharded: Path) -> None:
    for rank in (0, 1):
        found = torch.load(sharded / f"fsdp{name}-{rank}.pt")
        assert found["finite"]
        assert found["sharded"].keys() == found["whole"].keys()
        for key, value in found["whole"].items():
            torch.testing.assert_close(found["sharded"][key], value, msg=key)


@pytest.mark.filterwarnings("error::fastdense.FallbackWarning")
def test_a_sync_batch_norm_alone_is_a_batch_norm(randn: Any) -> None:
    torch.manual_seed(0)
    plain = fastdense.FastDenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(fastdense.convert(plain))
    x = randn(2, 3, 32, 32)
    assert torch.equal(plain(x), synced(x))
    for (name, ours), theirs in zip(synced.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(plain.eval()(x), synced.eval()(x))


def test_a_converted_model_keeps_its_sync_batch_norms(randn: Any) -> None:
    torch.manual_seed(0)
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(reference.DenseNet(4, (2, 2), 8, num_classes=3))
    fast = fastdense.convert(stock)
    assert all(finding.verdict == "fast" for finding in fastdense.explain(fast).findings)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in fast.modules())
