"""What a module keeps from call to call: running statistics, dropout's generator, parameters, and nothing else."""

from __future__ import annotations

import copy
import io
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastdense import parity, reference
from fastdense.parity import memory_formats_of
from fastdense.ready import Ready

pytestmark = pytest.mark.filterwarnings("error::fastdense.FallbackWarning")

SHAPES = {"block": (2, 16, 6, 7), "transition": (2, 16, 6, 7), "tails": (2, 16, 6, 7), "net": (2, 3, 32, 32)}
ARGUMENTS = {"block": (3, 16, 2, 8), "transition": (16, 9), "tails": (16,), "net": (8, (2, 2), 16, 2, 0.0, 5)}
every_kind = pytest.mark.parametrize("kind", SHAPES)
SPATIAL = {1: (41,), 2: (6, 7), 3: (4, 2, 5)}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
"""PyTorch's names for channels innermost; of sequences it has none."""


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


# -- items 10 to 12: running statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0], ids=str)
@pytest.mark.parametrize(
    "kind_and_options",
    [
        ("block", {}),
        ("block", dict(memory_efficient=True)),
        ("transition", {}),
        ("tails", {}),
        ("net", {}),
        ("net", dict(spatial_dims=1)),
        ("net", dict(spatial_dims=3)),
    ],
    ids=["block", "memory_efficient block", "transition", "tails", "net", "net of sequences", "net of volumes"],
)
def test_running_statistics_over_20_steps(kind_and_options, momentum, device, twins, randn, batch_norms):
    kind, options = kind_and_options
    fast, stock = twins(kind, *ARGUMENTS[kind], **options)
    models = dict(fast=fast.to(device), stock=stock.to(device), exact=copy.deepcopy(stock).double().to(device))
    shape = SHAPES[kind][:2] + (32,) * options["spatial_dims"] if "spatial_dims" in options else SHAPES[kind]
    last = memory_formats_of(torch.empty(shape))[-1]
    models["stock NHWC"] = copy.deepcopy(models["stock"]).to(memory_format=last)
    for model in models.values():
        for norm in batch_norms(model):
            norm.momentum = momentum
    for step in range(20):
        x = randn(*shape, seed=step, device=device) * (1 + step / 10) + step / 10
        for name, model in models.items():
            y = x.double() if name == "exact" else x
            if name == "stock NHWC":
                y = y.contiguous(memory_format=last)
            if step % 2:  # an autograd graph makes no difference
                model(y)
            else:
                with torch.no_grad():
                    model(y)
    seen = {name: buffers(model) for name, model in models.items()}
    counts = [seen["fast"][name] for name in seen["fast"] if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 20 for count in counts)
    stocks = [seen["stock"], seen["stock NHWC"]]
    assert not list(parity.failures(parity.compare(seen["fast"], stocks, seen["exact"], torch.float32)))


def test_momentum_zero_changes_nothing(twins, randn, batch_norms):
    block = twins("block", *ARGUMENTS["block"])[0]
    for norm in batch_norms(block):
        norm.momentum = 0.0
    before = buffers(block)
    block(randn(*SHAPES["block"]))
    for name, after in block.named_buffers():
        assert name.endswith("num_batches_tracked") or torch.equal(after, before[name])


def test_norms_of_different_momentum(twins, randn, batch_norms, assert_within_budget):
    fast, stock = twins("block", *ARGUMENTS["block"])
    exact = copy.deepcopy(stock).double()
    momenta = [0.1, None, 0.0, 1.0, 0.5, None]
    for model in (fast, stock, exact):
        for norm, momentum in zip(batch_norms(model), momenta, strict=True):
            norm.momentum = momentum
    for step in range(3):
        x = randn(*SHAPES["block"], seed=step)
        for model in (fast, stock, exact):
            model(x.to(next(model.parameters()).dtype))
    assert_within_budget(buffers(fast), buffers(stock), buffers(exact), torch.float32)


def freeze_all(norms: list[nn.BatchNorm2d]) -> None:
    for norm in norms:
        norm.eval()


def freeze_some(norms: list[nn.BatchNorm2d]) -> None:
    for i, norm in enumerate(norms):
        norm.train(i % 3 != 1)
        norm.eps = 1e-5 * 10 ** (i % 4)


@pytest.mark.parametrize("freeze", [freeze_all, freeze_some])
@pytest.mark.parametrize(
    ("kind", "options"), [(kind, {}) for kind in SHAPES] + [("block", dict(memory_efficient=True))]
)
def test_frozen_norms_keep_their_bits_and_have_right_gradients(
    kind, options, freeze, device, twins, randn, batch_norms, clear_relus, assert_parity
):
    fast, stock = (model.to(device) for model in twins(kind, *ARGUMENTS[kind], **options))
    for model in (fast, stock):
        freeze(batch_norms(model))
    inputs = [randn(*SHAPES[kind], seed=seed, device=device) for seed in range(3)]
    clear_relus([fast, stock], inputs)
    assert_parity(fast, stock, inputs, dtype=torch.float64)
    assert_parity(fast, stock, inputs, dtype=torch.float32)
    before = buffers(fast)
    fast(inputs[0]).sum().backward()
    for name, norm in fast.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            for buffer_name, after in norm.named_buffers():
                assert torch.equal(after, before[f"{name}.{buffer_name}"]) != norm.training


@every_kind
def test_first_call_of_a_fresh_module_updates_once(kind, device, twins, randn, batch_norms):
    model = twins(kind, *ARGUMENTS[kind])[0].to(device)
    model(randn(*SHAPES[kind], device=device))
    assert all(norm.num_batches_tracked == 1 for norm in batch_norms(model))


# -- item 13: checkpointing -----------------------------------------------------------------------------------


def gradients(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Of one training step from seed 0, with the statistics that it leaves."""
    x = x.detach().requires_grad_()
    torch.manual_seed(0)
    run(x).square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}, **buffers(module)}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["block", "transition", "net"])
def test_checkpointed_module(kind, drop_rate, use_reentrant, device, twins, randn, batch_norms, assert_identical):
    options = {} if kind == "transition" else dict(drop_rate=drop_rate)
    arguments = ARGUMENTS[kind][:4]
    plain, ours = (twins(kind, *arguments, **options)[0].to(device) for _ in range(2))
    x = randn(*SHAPES[kind], device=device)
    expected = gradients(plain, x, plain)
    assert_identical(gradients(ours, x, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant)), expected)
    assert all(norm.num_batches_tracked == 1 for norm in batch_norms(ours))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_twice_over(use_reentrant, twins, randn, batch_norms, assert_identical):
    """A block that recomputes, inside a checkpoint, inside a checkpoint."""
    plain, ours = (twins("block", *ARGUMENTS["block"], memory_efficient=True)[0] for _ in range(2))
    x = randn(*SHAPES["block"])

    def inner(x: Tensor) -> Tensor:
        return checkpoint(ours, x, use_reentrant=use_reentrant)

    expected = gradients(plain, x, plain)
    assert_identical(gradients(ours, x, lambda x: checkpoint(inner, x, use_reentrant=use_reentrant)), expected)
    assert all(norm.num_batches_tracked == 1 for norm in batch_norms(ours))


@pytest.mark.parametrize("options", [{}, dict(bn_size=None), dict(drop_rate=0.3, drop_every_conv=True)], ids=str)
def test_memory_efficient(options, device, twins, randn, batch_norms, assert_identical):
    x = randn(*SHAPES["block"], device=device)
    seen = []
    for memory_efficient in (False, True):
        block = twins("block", 3, 16, growth_rate=4, memory_efficient=memory_efficient, **options)[0].to(device)
        seen.append(gradients(block, x, block))
        assert all(norm.num_batches_tracked == 1 for norm in batch_norms(block))
    assert_identical(*seen)


def test_memory_efficient_reference(randn, batch_norms, assert_identical):
    """The definition too updates its statistics once, where torchvision's updates norm1's twice."""
    x = randn(*SHAPES["block"])
    seen = []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        block = reference.DenseBlock(*ARGUMENTS["block"], memory_efficient=memory_efficient)
        seen.append(gradients(block, x, block))
        assert all(norm.num_batches_tracked == 1 for norm in batch_norms(block))
    assert_identical(*seen)


# -- item 14: dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_rate", [0.3, 1.0])
@pytest.mark.parametrize("drop_every_conv", [False, True], ids=["", "every conv"])
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("weights_last", [False, True], ids=["", "weights NHWC"])
@pytest.mark.parametrize("input_last", [False, True], ids=["", "input NHWC"])
@pytest.mark.parametrize("dims", SPATIAL, ids="{}-D".format)
def test_dropout_draws_what_the_reference_draws(
    dims, input_last, weights_last, bn_size, drop_every_conv, drop_rate, twins, randn
):
    options = dict(drop_rate=drop_rate, drop_every_conv=drop_every_conv, spatial_dims=dims)
    pair = twins("block", 3, 16, bn_size, 4, **options)
    x = randn(16, 16, *SPATIAL[dims])  # fewer volumes PyTorch convolves in a layout of its own, with one thread
    if input_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    outputs, states = [], []
    for module in pair:
        torch.manual_seed(0)
        if weights_last and dims in LAST:
            module.to(memory_format=LAST[dims])
        outputs.append(module(x))
        states.append(torch.get_rng_state())
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)
    assert outputs[0].isfinite().all()
    assert torch.equal(*states)


@pytest.mark.parametrize("drop_rate", [0.3, 1.0])
@pytest.mark.parametrize("drop_every_conv", [False, True], ids=["", "every conv"])
@pytest.mark.parametrize("memory_format", parity.MEMORY_FORMATS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["block", "net"])
def test_values_and_gradients_under_dropout(
    kind, memory_format, drop_every_conv, drop_rate, device, twins, randn, assert_parity
):
    pair = twins(kind, *ARGUMENTS[kind][:4], drop_rate=drop_rate, drop_every_conv=drop_every_conv)
    pair = [module.to(device) for module in pair]
    inputs = [randn(*SHAPES[kind], seed=seed, device=device) for seed in range(2)]
    assert_parity(*pair, inputs, dtype=torch.float64, memory_formats=[memory_format])


def test_no_dropout_in_eval(twins, randn):
    block = twins("block", 3, 16, drop_rate=0.9)[0].eval()
    x = randn(*SHAPES["block"])
    assert torch.equal(block(x), block(x))


# -- item 15: nothing stale after eval() ----------------------------------------------------------------------


def optimizer_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


def write_data(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data * 3


def write_in_place_below_autograds_sight(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.mul_(3)


def swap_in_averages(model: nn.Module) -> None:
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer_step(model)
    average.update_parameters(model)
    for ours, theirs in zip(model.parameters(), average.module.parameters(), strict=True):
        ours.data, theirs.data = theirs.data, ours.data


def replace_statistics(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = norm.running_mean + 1
            norm.running_var.add_(1)


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        load_state_dict,
        write_data,
        write_in_place_below_autograds_sight,
        swap_in_averages,
        replace_statistics,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["block", "net"])
def test_the_next_inference_sees_every_change(kind, mode, change, twins, randn, assert_parity):
    fast, stock = (model.eval() for model in twins(kind, *ARGUMENTS[kind]))
    x = randn(*SHAPES[kind])
    with mode():
        before = fast(x)
    change(fast)
    change(stock)
    with mode():
        assert not torch.equal(fast(x), before)
    assert_parity(fast, stock, x, dtype=torch.float64, backward=False)


# -- item 17: copies, pickles, moves --------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def there_and_back(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().float()


@pytest.mark.parametrize("move", [copy.deepcopy, through_pickle, through_torch_save, there_and_back])
@every_kind
def test_copies_compute_the_same(kind, move, twins, randn, assert_identical):
    model = twins(kind, *ARGUMENTS[kind])[0]
    x = randn(*SHAPES[kind])
    model(x).sum().backward()  # anything kept would be copied
    copied = move(model)
    for train in (True, False):
        assert_identical(parity.observe(copied.train(train), x), parity.observe(model.train(train), x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
        assert not torch.equal(copied(x), model(x))


@every_kind
def test_data_parallel_without_gpus_passes_through(kind, twins, randn, assert_identical):
    model = twins(kind, *ARGUMENTS[kind])[0].eval()
    x = randn(*SHAPES[kind])
    wrapped = {name.replace("module.", ""): t for name, t in parity.observe(nn.DataParallel(model, []), x).items()}
    assert_identical(wrapped, parity.observe(model, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_kind
def test_to_dtype_takes_everything_along(kind, dtype, twins, randn):
    model = twins(kind, *ARGUMENTS[kind])[0]
    x = randn(*SHAPES[kind])
    model(x)
    model.to(dtype)
    assert model(x.to(dtype)).dtype == dtype
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} <= {dtype, torch.int64}


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("kind", ["block", "net"])
def test_nothing_is_kept_from_a_step(kind, memory_efficient, twins, randn):
    model, stock = twins(kind, *ARGUMENTS[kind][:4], memory_efficient=memory_efficient)

    def attributes() -> dict[str, set[str]]:
        return {name: set(vars(module)) for name, module in model.named_modules()}

    before = attributes()
    x = randn(*SHAPES[kind])
    model(x).sum().backward()
    model.eval()(x).sum().backward()
    with torch.inference_mode():
        model(x)
    model.train()(x).sum().backward()
    after = attributes()
    assert {added for name in before for added in after[name] - before[name]} == {"_ready"}  # see tests/test_ready.py
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    ready = [module._ready for module in model.modules() if isinstance(vars(module).get("_ready"), Ready)]
    kept = [leaf for one in ready for leaf in tree_leaves(list(one.gathered.values())) if isinstance(leaf, Tensor)]
    assert kept
    assert all(id(tensor) in own or tensor.numel() == 0 for tensor in kept)
    assert dict(model.named_buffers()).keys() == dict(stock.named_buffers()).keys()
    assert model.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_kept_on_request():
    """Memory that one iteration has touched and freed costs the next no page faults."""
    program = """
import resource, torch
from fastdense.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(3, 64 << 20, dtype=torch.uint8)
        [torch.zeros(8 << 20, dtype=torch.uint8) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
assert keep_freed_memory()
faults()
print(returned, faults())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    returned, kept = map(int, result.stdout.split())
    assert kept < returned / 10
