"""The C++ kernels for CPUs, on every instruction set that this one has: numbers, NaN, changed weights, threads.

The modules' tests run them too, on the best instruction set. Here are their numbers over geometries and dtypes, and
the portable kernels' beside them, what they must not remember, and what the sanitisers say of them.
"""

from __future__ import annotations

import copy
import gc
import operator
import os
import shutil
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdense
from fastdense.kernels import cpu
from fastdense.kernels.cpu import library, packing
from fastdense.stages import FastSequential

pytestmark = pytest.mark.filterwarnings("error::fastdense.FallbackWarning")

OFFERS = library.offered()
PRECISIONS = {
    "fp32": dict(dtype=torch.float32),
    "bf16": dict(dtype=torch.bfloat16),
    "fp16": dict(dtype=torch.float16),
    "autocast bf16": dict(dtype=torch.bfloat16, autocast=True),
    "autocast fp16": dict(dtype=torch.float16, autocast=True),
}
SOURCES = Path(cpu.__file__).parent / "src"


def compile_library(folder: Path, *flags: str, unused: tuple[str, ...] = ()) -> None:
    """The library with AMX's tiles emulated, so that their kernels run on a CPU without them.

    ``unused`` sources, which no test will run, are not optimised, for the sake of time.
    """
    emulate = f'-DFASTDENSE_EMULATE_AMX="{Path(__file__).with_name("amx_emulation.h")}"'

    def gcc(*arguments: str) -> None:
        subprocess.run(["g++", "-std=c++17", "-fPIC", *flags, *arguments], check=True, capture_output=True)

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        gcc(emulate, *(["-O0"] if source.stem in unused else []), "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(SOURCES.glob("*.cpp"))))
    gcc("-shared", "-o", str(folder / "_library.so"), *objects)


@pytest.fixture(scope="module")
def offers(tmp_path_factory) -> dict[str, library.Library]:
    """The C++ kernels by instruction set; those for AMX run on emulated tiles where the CPU has none."""
    if isinstance(OFFERS, str):
        pytest.skip(OFFERS)
    if "amx" in OFFERS or "avx512_bf16" not in OFFERS or shutil.which("g++") is None:
        return OFFERS
    folder = tmp_path_factory.mktemp("emulated")
    compile_library(folder, "-O2", unused=("avx2", "avx512", "avx512_bf16"))
    emulated = library.offered(folder)
    assert not isinstance(emulated, str)
    return {**OFFERS, "amx": emulated["amx"]}


@pytest.fixture
def kernels(request) -> Iterator[str]:
    """The portable kernels, or the C++ ones on an instruction set."""
    if request.param == "portable":
        with fastdense.use_backend("torch"):
            yield request.param
        return
    found = request.getfixturevalue("offers")
    if request.param not in found:
        pytest.skip(f"this CPU has no {request.param}, and what would emulate it neither")
    with pytest.MonkeyPatch.context() as patch, fastdense.use_backend("cpu"):
        patch.setattr(library, "load", lambda: found[request.param])
        yield request.param


each_kernel = pytest.mark.parametrize(  # above other parameters, to run one after another against the same stock runs
    "kernels", ["portable", "avx2", "avx512", "avx512_bf16", "amx"], indirect=True
)


@pytest.fixture
def compiled() -> None:
    """The C++ kernels, on whatever is best."""
    if isinstance(library.load(), str):
        pytest.skip(library.load())
    with fastdense.use_backend("cpu"):
        yield


@pytest.fixture(autouse=True)
def threads():
    """``threads(n)`` sets torch's number of threads until the test ends; at first it is two, so that work is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[True, False], ids=["train", "eval"])
def train(request) -> bool:
    """Batch statistics and every gradient, or running statistics."""
    return request.param


MODES = {  # in training float16 once, as its multiplies are in floats
    **{f"train-{precision}": (True, precision) for precision in ("fp32", "bf16", "autocast bf16", "autocast fp16")},
    **{f"eval-{precision}": (False, precision) for precision in PRECISIONS},
}
every_mode = pytest.mark.parametrize(("train", "precision"), MODES.values(), ids=MODES, indirect=["train"])


@pytest.fixture(scope="module")
def check(train, clear_relus, assert_parity):
    """``check(pair, inputs, precision)``: the errors of a fast module are within its budget."""

    def run(pair: list[nn.Module], inputs: list[Tensor], precision: str) -> None:
        for module in pair:
            module.train(train)
        if train:
            clear_relus(pair, inputs)
        assert_parity(*pair, inputs, **PRECISIONS[precision], backward=train)

    return run


def infer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(x)


# -- numbers ----------------------------------------------------------------------------------------------------

BLOCKS = {
    "growth 32": (dict(num_layers=3, num_input_features=64), (3, 64, 30, 17)),
    "growth 32, 7x7": (dict(num_layers=2, num_input_features=512), (9, 512, 7, 7)),
    "growth 48": (dict(num_layers=2, num_input_features=96, growth_rate=48), (2, 96, 9, 8)),
    "CIFAR, BC, growth 12": (dict(num_layers=3, num_input_features=24, growth_rate=12), (2, 24, 32, 32)),
    "CIFAR, growth 12": (dict(num_layers=3, num_input_features=16, growth_rate=12, bn_size=None), (2, 16, 16, 16)),
    "odd": (dict(num_layers=3, num_input_features=13, growth_rate=5, bn_size=3), (3, 13, 5, 7)),
    "one pixel": (dict(num_layers=2, num_input_features=40, growth_rate=33), (2, 40, 1, 1)),
    "one row": (dict(num_layers=2, num_input_features=40, growth_rate=33), (1, 40, 1, 19)),
    "volumes, small": (dict(num_layers=2, num_input_features=40, spatial_dims=3), (5, 40, 3, 5, 2)),
    "volumes, slices together": (
        dict(num_layers=2, num_input_features=33, growth_rate=12, spatial_dims=3),
        (2, 33, 7, 8, 9),
    ),
    "volumes, rows of slices": (
        dict(num_layers=2, num_input_features=13, growth_rate=5, bn_size=3, spatial_dims=3),
        (1, 13, 3, 20, 21),
    ),
    "volumes, one slice": (dict(num_layers=2, num_input_features=13, growth_rate=5, spatial_dims=3), (2, 13, 1, 6, 7)),
    "volumes, CIFAR": (
        dict(num_layers=3, num_input_features=16, growth_rate=12, bn_size=None, spatial_dims=3),
        (2, 16, 4, 8, 7),
    ),
    "sequences, short": (dict(num_layers=2, num_input_features=40, spatial_dims=1), (5, 40, 7)),
    "sequences, long": (dict(num_layers=2, num_input_features=13, growth_rate=12, spatial_dims=1), (2, 13, 301)),
    "sequences, no bottleneck": (
        dict(num_layers=3, num_input_features=16, growth_rate=5, bn_size=None, spatial_dims=1),
        (3, 16, 50),
    ),
}


@each_kernel
@every_mode
@pytest.mark.parametrize("geometry", BLOCKS)
def test_block(kernels, geometry, precision, twins, randn, check):
    arguments, shape = BLOCKS[geometry]
    check(twins("block", **arguments), [randn(*shape, seed=seed) for seed in range(3)], precision)


@each_kernel
@every_mode
@pytest.mark.parametrize(
    "shape", [(2, 128, 14, 14), (3, 37, 9, 5), (1, 256, 2, 3), (2, 37, 5, 4, 7), (2, 37, 151)], ids=str
)
def test_transition(kernels, shape, precision, twins, randn, check):
    if len(shape) == 5 and PRECISIONS[precision]["dtype"] != torch.float32:
        pytest.skip("PyTorch has no average pool of volumes in half precision on CPUs")
    pair = twins("transition", shape[1], shape[1] // 2, spatial_dims=len(shape) - 2)
    check(pair, [randn(*shape, seed=seed) for seed in range(3)], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_transition_of_equal_slices_is_that_of_one(compiled, precision, twins, randn):
    """Whatever PyTorch has: outputs bit for bit, and gradients that are shared equally between the slices."""
    dtype, autocast = PRECISIONS[precision]["dtype"], PRECISIONS[precision].get("autocast", False)
    of_volumes, of_images = (twins("transition", 37, 19, spatial_dims=dims)[0].eval() for dims in (3, 2))
    image = randn(3, 37, 9, 5)
    volume = image.unsqueeze(2).repeat(1, 1, 2, 1, 1)
    gradients = []
    for module, x in ((of_volumes, volume), (of_images, image)):
        x = (x if autocast else x.to(dtype)).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = (module if autocast else module.to(dtype))(x)
        out.backward(randn(3, 19, 4, 2, seed=1, dtype=out.dtype).view_as(out))
        gradients.append((out.flatten(), x.grad, module.conv.weight.grad.flatten()))
    (out, dx, dw), (expected, dx_of_image, dw_of_image) = gradients
    assert torch.equal(out, expected)
    assert torch.equal(2 * dx[:, :, 0], dx_of_image)
    assert torch.equal(dx[:, :, 0], dx[:, :, 1])
    assert torch.equal(dw, dw_of_image)


@each_kernel
@every_mode
@pytest.mark.parametrize(
    "shape", [(2, 64, 20, 20), (3, 37, 9, 5), (2, 8, 1, 1), (2, 37, 7, 6, 5), (2, 37, 151)], ids=str
)
def test_stem_tail_and_head(kernels, shape, precision, twins, randn, check):
    pair = twins("tails", shape[1], spatial_dims=len(shape) - 2)
    check(pair, [randn(*shape, seed=seed) for seed in range(3)], precision)


STEMS = {  # the convolution; the images
    "7x7": (dict(out_channels=64, kernel_size=7, stride=2, padding=3), (2, 3, 64, 50)),
    "7x7, grey, odd": (dict(out_channels=24, kernel_size=7, stride=2, padding=3), (3, 1, 33, 31)),
    "7x7, many channels": (dict(out_channels=16, kernel_size=7, stride=2, padding=3), (1, 37, 9, 8)),
    "7x7, one pixel": (dict(out_channels=13, kernel_size=7, stride=2, padding=3), (5, 3, 1, 1)),
    "3x3, wide": (dict(out_channels=48, kernel_size=3, stride=1, padding=1), (1, 4, 5, 140)),
    "3x5, no padding": (dict(out_channels=33, kernel_size=(3, 5), stride=(1, 3), padding=(1, 0)), (2, 5, 9, 17)),
    "1x1, apart": (dict(out_channels=8, kernel_size=1, stride=(3, 2)), (2, 2, 7, 8)),
    "sequences": (dict(out_channels=40, kernel_size=7, stride=2, padding=3), (2, 3, 301)),
    "volumes": (dict(out_channels=64, kernel_size=7, stride=2, padding=3), (2, 1, 22, 19, 24)),
    "volumes, 1x3x5": (dict(out_channels=13, kernel_size=(1, 3, 5), stride=(1, 2, 1), padding=1), (3, 4, 6, 9, 8)),
    "volumes, flat": (dict(out_channels=24, kernel_size=3, stride=(2, 1, 1), padding=1), (1, 2, 2, 7, 60)),
}


def features_of(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Of two networks in evaluation."""
    fast, stock = (net.eval().features for net in pair)
    return FastSequential(OrderedDict(fast.named_children())), stock


@each_kernel
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", STEMS)
def test_stem(kernels, geometry, precision, twins, randn, assert_parity):
    arguments, shape = STEMS[geometry]
    dims, channels = len(shape) - 2, arguments["out_channels"]
    pair = features_of(twins("net", 4, (), channels, spatial_dims=dims))
    for features in pair:
        torch.manual_seed(0)
        features.conv0 = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](shape[1], bias=False, **arguments)
    assert_parity(*pair, [randn(*shape, seed=seed) for seed in range(3)], **PRECISIONS[precision], backward=False)


@pytest.mark.parametrize("spatial", [(34, 35), (13, 14, 15)], ids=["images", "volumes"])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_stem_of_any_layout(compiled, precision, spatial, twins, randn, op_calls):
    """Weights and images, planar or by pixels, of another image's memory or not."""
    dtype, autocast = PRECISIONS[precision]["dtype"], PRECISIONS[precision].get("autocast", False)
    net = twins("net", 4, (), 20, spatial_dims=len(spatial))[0].eval()
    net, x = (net, randn(3, 3, *spatial)) if autocast else (net.to(dtype), randn(3, 3, *spatial, dtype=dtype))
    channels_last = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
    by_pixels, strided = x.to(memory_format=channels_last), x.mT.contiguous().mT
    with torch.autocast("cpu", dtype, enabled=autocast):
        with op_calls() as calls:
            expected = net(x)
        assert calls[0][0].name() == "fastdense::stem_inference"
        for _ in range(2):
            for same in (x, by_pixels, strided, torch.cat([x, x])[3:]):
                assert torch.equal(net(same), expected)
            net.to(memory_format=channels_last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spatial", [(40, 50), (24, 26, 28)], ids=["images", "volumes"])
@torch.inference_mode()
def test_stem_of_what_is_not_finite(compiled, value, dtype, spatial, twins, randn):
    """It reaches the pixels whose windows it is in, and no neighbour."""
    fast, stock = (features.to(dtype) for features in features_of(twins("net", 4, (), 20, spatial_dims=len(spatial))))
    x = randn(2, 3, *spatial, dtype=dtype)
    x[(1, 0, *(size // 2 for size in spatial))] = value
    found, expected = fast(x), stock(x)
    for same in (torch.isnan, torch.isposinf):
        assert torch.equal(same(found), same(expected))
    assert 0 < (~expected.isfinite()).sum() < expected[1].numel() / 8


@each_kernel
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_network(kernels, precision, twins, randn, check):
    pair = twins("net", block_config=(2, 3, 4, 3), num_classes=10)
    check(pair, [randn(2, 3, 96, 80, seed=seed) for seed in range(3)], precision)


@each_kernel
@every_mode
@pytest.mark.parametrize("growth", [12, 5])
def test_network_of_new_features_first(kernels, growth, precision, twins, randn, check):
    check(twins("new first", (2, 3), growth), [randn(2, 3, 16, 14, seed=seed) for seed in range(3)], precision)


@each_kernel
@pytest.mark.parametrize("spatial", [(40, 33, 36), (500,)], ids=["volumes", "sequences"])
def test_network_of_other_dimensions(kernels, spatial, twins, randn, check):
    pair = twins("net", block_config=(2, 3), num_classes=10, spatial_dims=len(spatial))
    check(pair, [randn(2, 3, *spatial, seed=seed) for seed in range(3)], "fp32")


one_kernel_for_all_examples = settings(  # other ones for each; of five inputs, as a flipped ReLU may be in one or two
    max_examples=7, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
any_layer = dict(growth=st.sampled_from([1, 12, 31, 32, 33, 48]), bn_size=st.sampled_from([None, 1, 4]))


@each_kernel
@one_kernel_for_all_examples
@given(
    channels=st.integers(1, 70),
    **any_layer,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 41), st.integers(2, 41)),
    precision=st.sampled_from(sorted(PRECISIONS)),
)
def test_any_shape(kernels, channels, growth, bn_size, shape, precision, train, twins, randn, check):
    n, h, w = shape
    block = dict(num_layers=2, num_input_features=channels, growth_rate=growth, bn_size=bn_size)
    check(twins("block", **block), [randn(n, channels, h, w, seed=seed) for seed in range(5)], precision)


@each_kernel
@one_kernel_for_all_examples
@given(
    batch=st.integers(1, 5),
    channels=st.integers(8, 70),
    **any_layer,
    spatial=st.one_of(
        st.tuples(st.integers(7, 300)),
        st.tuples(st.integers(1, 5), st.integers(2, 9), st.integers(2, 22)),
    ),
    precision=st.sampled_from(["fp32", "bf16"]),  # in float16 stock PyTorch's volumes take minutes
)
def test_any_shape_of_sequences_and_volumes(
    kernels, batch, channels, growth, bn_size, spatial, precision, train, twins, randn, check
):
    block = dict(num_layers=2, num_input_features=channels, growth_rate=growth, bn_size=bn_size)
    pair = twins("block", **block, spatial_dims=len(spatial))
    check(pair, [randn(batch, channels, *spatial, seed=seed) for seed in range(5)], precision)


LAYER_OPTIONS = {
    "memory-efficient": dict(memory_efficient=True),
    "dropout": dict(drop_rate=0.4),
    "dropout after every convolution": dict(drop_rate=0.4, drop_every_conv=True),
    "no bottleneck, dropout": dict(bn_size=None, drop_rate=0.4),
    "volumes, memory-efficient, dropout": dict(memory_efficient=True, drop_rate=0.4, spatial_dims=3),
}


@each_kernel
@pytest.mark.parametrize("frozen", [None, "norm1", "norm2", "denselayer2"])
@pytest.mark.parametrize("precision", ["fp32", "autocast bf16"])
@pytest.mark.parametrize("options", LAYER_OPTIONS)
def test_training_options(kernels, options, precision, frozen, twins, randn, assert_parity):
    """Dropout, recomputation, and norms of which some use running statistics."""
    pair = twins("block", num_layers=3, num_input_features=10, growth_rate=6, **LAYER_OPTIONS[options])
    for module in pair:
        for name, norm in module.named_modules():
            if frozen is not None and frozen in name and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
                norm.eval()
    volumes = "spatial_dims" in LAYER_OPTIONS[options]
    inputs = [randn(3, 10, *((3, 5, 7) if volumes else (9, 11)), seed=seed) for seed in range(5)]
    layout = torch.channels_last_3d if volumes else torch.channels_last
    assert_parity(*pair, inputs, **PRECISIONS[precision], memory_formats=[layout])


@each_kernel
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wanted", ["x", "denselayer1.conv1", "denselayer2.norm2", "denselayer3.conv2", "conv"])
def test_only_the_gradients_that_are_wanted(kernels, wanted, precision, twins, randn):
    """The same bits as when all are made."""
    dtype = PRECISIONS[precision]["dtype"]
    fast = twins("block", num_layers=3, num_input_features=10, growth_rate=6)[0].to(dtype)
    x, grad = randn(2, 10, 7, 9, dtype=dtype).requires_grad_(), randn(2, 28, 7, 9, seed=1, dtype=dtype)
    fast(x).backward(grad)
    every = {"x": x.grad, **{name: p.grad for name, p in fast.named_parameters()}}
    named = {"x": x, **dict(fast.named_parameters())}
    for name, tensor in named.items():
        tensor.grad = None
        tensor.requires_grad_(wanted in name)
    fast(x).backward(grad)
    for name, tensor in named.items():
        assert (tensor.grad is None) == (wanted not in name)
        assert tensor.grad is None or torch.equal(tensor.grad, every[name])


@each_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("growth_rate", "spatial"), [(5, (11, 13)), (32, (11, 13)), (32, (5, 6, 7)), (32, (40,))], ids=str
)
def test_what_is_not_finite_stays_where_it_was(kernels, precision, value, growth_rate, spatial, twins, randn):
    """One bad pixel of one channel: as far as the 3x3 convolutions carry it, and no further."""
    dtype = PRECISIONS[precision]["dtype"]
    block = dict(num_layers=2, num_input_features=20, growth_rate=growth_rate, spatial_dims=len(spatial))
    fast, stock = (module.to(dtype) for module in twins("block", **block))
    x = randn(2, 20, *spatial, dtype=dtype)
    x[1, 3].view(-1)[x[1, 3].numel() // 2] = value
    found, expected = infer(fast, x), infer(stock, x)
    assert not expected.isfinite().all()
    for same in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(same(found), same(expected))


@each_kernel
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("growth_rate", "spatial"), [(5, (11, 13)), (32, (11, 13)), (32, (7, 6, 9))], ids=str)
def test_a_gradient_that_is_not_finite_stays_where_it_was(kernels, precision, growth_rate, spatial, twins, randn):
    """That of one pixel of the new features: with running statistics, as far as the 3x3 convolution carries it."""
    dtype = PRECISIONS[precision]["dtype"]
    pair = twins("block", num_layers=1, num_input_features=20, growth_rate=growth_rate, spatial_dims=len(spatial))
    found, expected = (randn(2, 20, *spatial, dtype=dtype).requires_grad_() for _ in pair)
    grad = randn(2, 20 + growth_rate, *spatial, seed=1, dtype=dtype)
    grad[1, 22].view(-1)[grad[1, 22].numel() // 2] = float("nan")
    for module, x in zip(pair, (found, expected), strict=True):
        module.to(dtype).eval()(x).backward(grad)
    assert 0 < expected.grad.isnan().sum() < expected.grad[1].numel() / 8
    assert torch.equal(found.grad.isnan(), expected.grad.isnan())


@each_kernel
@pytest.mark.parametrize("spatial", [(6, 6), (5, 6, 6)], ids=str)
def test_values_near_overflow(kernels, spatial, twins):
    """Winograd's sums exceed what they come from: where they overflow, the result must not."""
    fast, stock = twins(
        "block", num_layers=1, num_input_features=4, growth_rate=4, bn_size=None, spatial_dims=len(spatial)
    )
    with torch.no_grad():
        fast.denselayer1.conv1.weight.fill_(1 / 4 / 3 ** len(spatial))
    stock.load_state_dict(fast.state_dict())
    x = torch.full((1, 4, *spatial), 1.5e38)
    assert infer(stock, x).isfinite().all()
    torch.testing.assert_close(infer(fast, x), infer(stock, x))


# -- what must not matter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(151,), (35, 31), (17, 20, 16)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_bits_for_any_batch_and_threads(compiled, threads, precision, spatial, twins, randn):
    """Every pixel's sums run in one order, however the work was cut."""
    dtype = PRECISIONS[precision]["dtype"]
    net = twins("net", block_config=(2, 3), num_classes=7, spatial_dims=len(spatial))[0].to(dtype)
    net.features.conv0 = nn.Identity()  # PyTorch's, whose bits for sequences depend on the batch
    x = randn(5, 64, *spatial, dtype=dtype)
    features = [infer(net.features, x)]
    for count in (1, 3):
        threads(count)
        features += [infer(net.features, x), torch.cat([infer(net.features, image[None]) for image in x])]
    assert all(torch.equal(features[0], other) for other in features[1:])


@each_kernel
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_training_repeats_its_bits(kernels, threads, count, precision, twins, randn, clear_relus, assert_within_budget):
    """For a number of threads: gradients are added up over the threads' shares of a batch, in their order."""
    net, stock = twins("net", block_config=(2, 3), num_classes=7)
    x = randn(5, 3, 70, 61)
    clear_relus([net, stock], [x])
    dtype = PRECISIONS[precision]["dtype"]

    def gradients(model: nn.Module, x: Tensor, narrow: bool = False) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            out = model(x)
        out.float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    narrow = dtype != torch.float32
    threads(count)
    sums_in_floats = torch.channels_last if kernels == "portable" else torch.contiguous_format  # PyTorch's norms
    stocks = gradients(stock, x.contiguous(memory_format=sums_in_floats), narrow)
    exact = gradients(copy.deepcopy(stock).double(), x.double())
    first, second = gradients(net, x, narrow), gradients(net, x, narrow)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_within_budget(first, stocks, exact, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_any_strides(compiled, layout, twins, randn):
    fast, _ = twins("block", num_layers=2, num_input_features=6)
    x = randn(4, 6, 9, 10)
    y = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], 1)[:, :6],
        "expanded": x[:1].expand(4, -1, -1, -1),
    }[layout]
    same = infer(fast, y.contiguous(memory_format=torch.channels_last))
    assert torch.equal(infer(fast, y), same)
    assert infer(fast, y).is_contiguous(memory_format=torch.channels_last)


def test_weights_in_any_memory_format(compiled, twins, randn):
    fast, _ = twins("net", block_config=(2, 2), num_classes=5)
    x = randn(2, 3, 64, 64)
    expected = infer(fast, x)
    torch.testing.assert_close(infer(copy.deepcopy(fast).to(memory_format=torch.channels_last), x), expected)


# -- what must not be remembered --------------------------------------------------------------------------------


def negate(weight: Tensor) -> None:
    weight.data.neg_()


def one_value(weight: Tensor) -> None:
    weight.data.view(-1)[weight.numel() // 2] += 1


def write_through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] *= 1.5


def exchange_storage(weight: Tensor) -> None:
    weight.data = weight.data * 2


def swap_two_values(weight: Tensor) -> None:
    flat = weight.data.view(-1)
    flat[[0, 64]] = flat[[64, 0]]


def read_the_same_bytes_by_pixels(weight: Tensor) -> None:
    by_pixels = weight.data.to(memory_format=torch.channels_last)
    weight.data = weight.data.as_strided(by_pixels.shape, by_pixels.stride())


@pytest.mark.parametrize("change", [negate, one_value, write_through_numpy, exchange_storage, swap_two_values])
@pytest.mark.parametrize("name", ["denselayer1.conv1", "denselayer2.conv2"])
def test_a_changed_weight_is_seen_at_once(compiled, change, name, twins, randn):
    fast, stock = twins("block", num_layers=2, num_input_features=32)
    x = randn(1, 32, 6, 6)
    before = infer(fast, x)
    for model in (fast, stock):
        change(model.get_submodule(name).weight)
    assert not torch.equal(infer(fast, x), before)
    torch.testing.assert_close(infer(fast, x), infer(stock, x))


def test_a_changed_norm_is_seen_at_once(compiled, twins, randn):
    fast, stock = twins("block", num_layers=2, num_input_features=32)
    x = randn(1, 32, 6, 6)
    infer(fast, x)
    for model in (fast, stock):
        for layer in model.values():
            layer.norm1.running_var.data.mul_(3)
            layer.norm2.bias.data.add_(1)
    torch.testing.assert_close(infer(fast, x), infer(stock, x))


def stride_bias(norm: nn.Module) -> None:
    norm.bias.data = torch.stack([norm.bias.data + 1] * 2, 1)[:, 0]


@pytest.mark.parametrize(
    ("name", "change"),
    [("denselayer2.conv2.weight", read_the_same_bytes_by_pixels), ("denselayer1.norm1", stride_bias)],
)
def test_other_strides_are_seen_at_once(compiled, name, change, twins, randn):
    fast, stock = twins("block", num_layers=2, num_input_features=32)
    x = randn(1, 32, 6, 6)
    before = infer(fast, x)
    for model in (fast, stock):
        change(operator.attrgetter(name)(model))
    assert not torch.equal(infer(fast, x), before)
    torch.testing.assert_close(infer(fast, x), infer(stock, x))


def test_what_was_seen_goes_with_its_module(compiled, twins, randn):
    fast, _ = twins("block", num_layers=2, num_input_features=8)
    infer(fast, randn(1, 8, 5, 5))
    weight = fast.denselayer1.conv1.weight.detach()  # shares memory, not the tensor
    memory = weakref.ref(fast.denselayer1.conv1.weight)
    del fast, _
    gc.collect()
    assert memory() is None
    assert weight.isfinite().all()


def test_packed_weights_live_as_long_as_their_weights(compiled, twins, randn):
    def held() -> int:
        gc.collect()
        return sum(map(len, packing._packed.values()))

    before = held()
    fast, _ = twins("block", num_layers=3, num_input_features=8)
    infer(fast, randn(1, 8, 5, 5))
    assert held() == before + 6
    infer(fast, randn(2, 8, 7, 7))
    assert held() == before + 6
    del fast, _
    assert held() == before


# -- choice -----------------------------------------------------------------------------------------------------

STATUS = "import fastdense; rows = fastdense.status().as_dict(); print(rows['backend cpu'], rows['chosen for cpu'])"


@pytest.mark.parametrize("isa", ["avx2", "nothing"])
def test_instruction_set_by_environment(compiled, isa):
    done = subprocess.run(
        [sys.executable, "-c", STATUS],
        env={**os.environ, "FASTDENSE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    if isa == "avx2":
        assert "on avx2" in done.stdout
    else:
        assert "'unavailable'" in done.stdout
        assert "FASTDENSE_CPU_ISA asks for nothing" in done.stdout
        assert "'torch'" in done.stdout


def test_float64_is_the_portable_backends(compiled, twins, randn):
    fast, stock = (module.double() for module in twins("block", num_layers=2, num_input_features=8))
    x = randn(1, 8, 5, 5, dtype=torch.float64)
    with fastdense.use_backend("auto"):
        torch.testing.assert_close(infer(fast, x), infer(stock, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="not in torch"):
        infer(fast, x)


# -- sanitisers -------------------------------------------------------------------------------------------------

SANITISED = """
import sys, torch, fastdense
from pathlib import Path
from fastdense.kernels import cpu
from fastdense.kernels.cpu import library
shapes = [(1, 13, 5, 7), (2, 16, 1, 1), (3, 64, 9, 2), (5, 33, 7, 7), (1, 20, 15, 31), (2, 20, 3, 5, 7), (3, 20, 37)]
class NewFirst(fastdense.FastDenseBlock):
    @property
    def _layout(self):
        return super()._layout._replace(new_first=True)

layers = [(5, 3), (32, 4), (12, None)]
dtypes = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None), (torch.float16, None)]
for isa, found in library.offered(Path(sys.argv[1])).items():
    library.load = lambda: found
    for dtype, autocast in dtypes:
        for shape in shapes:
            c, dims = shape[1], dict(spatial_dims=len(shape) - 2)
            orders = (fastdense.FastDenseBlock, NewFirst)
            blocks = [of(2, c, bn_size, growth, 0.1, **dims) for growth, bn_size in layers for of in orders]
            tails = fastdense.FastDenseNet(block_config=(), num_init_features=c, num_classes=1, **dims)
            tails.features.conv0 = torch.nn.Identity()
            others = [fastdense.FastTransition(c, c // 2, **dims)] if min(shape[2:]) > 1 else []
            if min(shape[2:]) > 4:
                others += [fastdense.FastDenseNet(4, (1, 2), c, 2, num_classes=1, **dims)]
                others[-1].features.conv0 = torch.nn.Identity()
            stem = fastdense.FastDenseNet(4, (1,), 9, 2, num_classes=1, in_channels=c, **dims).to(dtype).eval()
            x = torch.randn(shape).to(dtype)
            with fastdense.use_backend("cpu"), torch.autocast("cpu", autocast, enabled=autocast is not None):
                with torch.inference_mode():
                    for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
                        assert stem(layout).isfinite().all()
            for module in (*blocks, tails, *others):
                x = torch.randn(shape).to(dtype)
                with fastdense.use_backend("cpu"), torch.autocast("cpu", autocast, enabled=autocast is not None):
                    y = module.to(dtype).train()(x.requires_grad_())
                    y.backward(torch.randn_like(y))
                    with torch.inference_mode():
                        assert module.eval()(x).isfinite().all()
                        x.data.view(-1)[0] = float("nan")
                        module(x)
    print("clean on", isa)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_sanitisers_find_nothing(compiled, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over odd shapes, every instruction set and dtype."""
    compile_library(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    done = subprocess.run(
        [sys.executable, "-c", SANITISED, str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("clean on") >= len(OFFERS)


AHEAD = """
#include <cstdio>
static const void* asked;
#define __builtin_prefetch(p) (asked = (p))
#include "memory.h"

alignas(64) static char memory[1 << 16];

int main() {
  fastdense::Ahead ahead;
  ahead.add(reinterpret_cast<const float*>(memory + FIRST), ROWS, STRIDE, WIDTH);
  ahead.add(memory + 32768, 3, 64, 64).add(memory + 49152, 2, 128, 64).add(memory + 57344, 1, 64, 64);
  do {
    asked = nullptr;
    ahead.ask();
    if (asked != nullptr) std::printf("%ld ", (static_cast<const char*>(asked) - memory) / 64);
  } while (asked != nullptr);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("first", "rows", "stride", "width"),
    [(0, 5, 64, 16), (48, 7, 54, 12), (32, 6, 54, 40), (60, 1, 300, 300), (20, 4, 48, 48)],
    ids=["of a line each", "over a line's end", "of several lines", "one", "dense"],
)
def test_every_line_is_asked_for(tmp_path, first, rows, stride, width):
    """Those of rows of floats, then those of the next arrays, and no others; then nothing."""
    (tmp_path / "ahead.cpp").write_text(AHEAD)
    sizes = dict(FIRST=first, ROWS=rows, STRIDE=stride, WIDTH=width)
    program = str(tmp_path / "ahead")
    definitions = [f"-D{name}={value}" for name, value in sizes.items()]
    subprocess.run(
        ["g++", "-std=c++17", f"-I{SOURCES}", *definitions, str(tmp_path / "ahead.cpp"), "-o", program], check=True
    )
    asked = [int(line) for line in subprocess.run([program], check=True, capture_output=True).stdout.split()]
    starts = [first + 4 * stride * row for row in range(rows)]
    lines = {line for start in starts for line in range(start // 64, (start + 4 * width - 1) // 64 + 1)}
    assert set(asked) == lines | {512, 513, 514, 768, 770, 896}
    later = [512, 513, 514, 514, 768, 768, 770, 770, 896, 896]  # a row's last again, where it might end in one more
    assert [line for line in asked if line >= 512] == later
