"""Bit for bit: the same call again, in another process, and beside another thread."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastdense import FastDenseBlock, FastDenseNet
from fastdense.parity import observe


@pytest.fixture
def deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch raises at a nondeterministic operation, and fills uninitialised memory with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Undo what ``torch.set_num_threads`` does in a test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_block(**options: float | bool | None) -> FastDenseBlock:
    torch.manual_seed(0)
    return FastDenseBlock(2, 8, bn_size=2, growth_rate=4, **options)


def small_network() -> FastDenseNet:
    torch.manual_seed(0)
    return FastDenseNet(8, (2, 2), 8, num_classes=5)


def digest(tensors: dict[str, Tensor]) -> str:
    """Of the bits of all tensors: NaN equals itself, and -0 is not 0."""
    sha = hashlib.sha256()
    for tensor in tensors.values():
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def step_digest(threads: int) -> str:
    """Of a training step on images so large that the block is computed in several chunks."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    block = FastDenseBlock(2, 16, bn_size=4, growth_rate=16, drop_rate=0.2)
    return digest(observe(block, normal(3, 16, 128, 128)))


# -- the same call again -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("deterministic_algorithms")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, dict(memory_efficient=True), dict(drop_rate=0.2)],
    ids=["stored", "memory_efficient", "dropout"],
)
def test_250_repeats_are_identical(options, device):
    """Forward, every gradient and the running statistics, from the same state and seed."""
    block = small_block(**options).to(device)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    x = normal(4, 8, 7, 7).to(device)
    first = observe(block, x)
    assert all(tensor.isfinite().all() for tensor in first.values())
    expected = digest(first)
    for _ in range(249):
        block.load_state_dict(state)
        assert digest(observe(block, x)) == expected


@pytest.mark.usefixtures("deterministic_algorithms")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast bf16"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_network_runs_under_deterministic_algorithms(train, autocast):
    """On CPUs: the backward of CUDA's max pool is refused, in the reference as well."""
    model = small_network().train(train)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    digests = set()
    for _ in range(5):
        model.load_state_dict(state)
        digests.add(digest(observe(model, normal(2, 3, 32, 32), autocast=autocast)))
    assert len(digests) == 1


def test_inference_repeats_are_identical():
    block = small_block().eval()
    x = normal(4, 8, 7, 7)
    with torch.inference_mode():
        assert len({digest({"out": block(x)}) for _ in range(250)}) == 1


@pytest.mark.parametrize("drop_every_conv", [False, True])
def test_dropout_is_reproducible_by_seed(drop_every_conv):
    block = FastDenseBlock(3, 8, bn_size=2, growth_rate=4, drop_rate=0.3, drop_every_conv=drop_every_conv)
    x = normal(4, 8, 7, 7)
    first, again, other = (digest({"out": observe(block, x, seed=seed)["output"]}) for seed in (0, 0, 1))
    assert first == again != other


# -- another number of threads, another process --------------------------------------------------------------


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bit_stable_for_a_number_of_threads(threads):
    assert len({step_digest(threads) for _ in range(3)}) == 1


@pytest.mark.usefixtures("num_threads")
def test_bit_stable_across_processes():
    """Addresses, hash seeds and what ran before differ; the bits do not."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [step_digest(threads) for threads in (1, 2)]


# -- beside another thread -----------------------------------------------------------------------------------


def digest_after_training(model: FastDenseNet, autocast: torch.dtype | None) -> str:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        observe(model, normal(2, 3, 32, 32), autocast=autocast)
        optimizer.step()
    return digest(model.state_dict())


@pytest.mark.parametrize("precisions", [(None, None), (None, torch.bfloat16)], ids=["both fp32", "one under autocast"])
def test_two_threads_train_two_models_as_one_after_the_other(precisions):
    serial = [digest_after_training(small_network(), autocast) for autocast in precisions]
    models = [small_network() for _ in precisions]  # here: the seed is the process's
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(digest_after_training, models, precisions)) == serial


def test_threads_share_a_model_in_inference():
    model = small_network().eval()
    inputs = [torch.randn(2, 3, size, size) for size in (32, 40, 48, 56)]

    def infer(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    serial = [infer(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(infer, inputs), serial))


if __name__ == "__main__":  # the other process
    print(*(step_digest(threads) for threads in (1, 2)))
