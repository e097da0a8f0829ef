"""Autograd's rules: graphs that live on, abandoned ones, mutations, modes, threads, and what is out of scope."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastdense
from fastdense import reference


@pytest.fixture
def block():
    torch.manual_seed(0)
    return fastdense.FastDenseBlock(2, 6, 2, 4)


@pytest.fixture
def x():
    return torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(block, x):
    return torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])


def test_two_forwards_then_one_backward(block, x):
    separate = [a + b for a, b in zip(gradients(block, x), gradients(block, 2 * x), strict=True)][1:]
    out = block(x).square().sum() + block(2 * x).square().sum()
    for a, b in zip(torch.autograd.grad(out, list(block.parameters())), separate, strict=True):
        torch.testing.assert_close(a, b)


def test_retained_graph_gives_the_same_twice(block, x):
    loss = block(x).square().sum()
    first = torch.autograd.grad(loss, [x, *block.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def test_interleaved_models(block, x):
    other = copy.deepcopy(block)
    expected = gradients(block, x)
    a, b = block(x).square().sum(), other(x).square().sum()
    torch.autograd.grad(b, [x, *other.parameters()])
    for got, want in zip(torch.autograd.grad(a, [x, *block.parameters()]), expected, strict=True):
        assert torch.equal(got, want)


def test_threads(x):
    blocks = [fastdense.FastDenseBlock(2, 6, 2, 4) for _ in range(4)]
    serial = [gradients(copy.deepcopy(block), x) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda block: gradients(block, x), blocks))
    for got, want in zip(parallel, serial, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("train", [True, False])
def test_without_gradients(block, x, mode, train):
    expected = copy.deepcopy(block).train(train)(x)
    block.train(train)
    with mode():
        out = block(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected.detach())


def test_mutations_before_backward_are_errors(block, x):
    out = block(x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    loss = block(x).sum()
    with torch.no_grad():
        block.denselayer1.conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_input_may_change_after_forward(block):
    """The block keeps its own copy: what it was given is no longer read."""
    leaf = torch.randn(2, 6, 5, 4, requires_grad=True)
    inner = leaf * 1
    expected = torch.autograd.grad(block(inner).square().sum(), leaf)[0]
    inner = leaf * 1
    loss = block(inner).square().sum()
    with torch.no_grad():
        inner.zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


def test_in_place_relu_after_a_block_without_backward(block, x):
    block.eval()
    with torch.no_grad():
        expected = block(x).relu()
        assert torch.equal(block(x).relu_(), expected)
    out = block(x)
    assert out._base is None, "a view would forbid what follows it to be in place"


def test_second_derivatives_are_an_error(block, x):
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"dense_block_backward is not differentiable.*use_backend"):
        torch.autograd.grad(gradient.square().sum(), x)
    with fastdense.use_backend("reference"):
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_function_transforms_are_right(block, x):
    block.eval()
    stock = fastdense.to_reference(block)
    many = torch.randn(3, 2, 6, 5, 4)
    torch.testing.assert_close(torch.func.vmap(block)(many), torch.stack([stock(one) for one in many]))
    _, ours = torch.func.jvp(block, (x.detach(),), (many[0],))
    _, theirs = torch.func.jvp(stock, (x.detach(),), (many[0],))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0
    gradient = torch.func.grad(lambda x: block(x).square().sum())(x.detach())
    torch.testing.assert_close(gradient, gradients(stock, x)[0])


def test_memory_is_flat_over_iterations_and_abandoned_graphs(block, x):
    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    def iterate(times):
        for i in range(times):
            loss = block(x).square().sum()
            if i % 2:
                loss.backward()

    iterate(4)
    before = tensors()
    iterate(1000)
    assert tensors() <= before


def test_graphs_are_freed_without_the_garbage_collector(block, x):
    gc.collect()
    gc.disable()
    try:
        out = block(x)
        buffer = weakref.ref(out.untyped_storage())
        node = weakref.ref(out.grad_fn)
        del out
        assert buffer() is None
        assert node() is None
    finally:
        gc.enable()


# -- copies ------------------------------------------------------------------------------------------------------


def test_deepcopy_pickle_to_and_data_parallel(block, x):
    block(x).sum().backward()
    expected = block.eval()(x)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), nn.DataParallel(block)):
        assert torch.equal(copied(x), expected)
    assert block.double()(x.double()).dtype == torch.float64
    assert block.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_no_scratch_in_state(block, x):
    before = set(block.state_dict()), {k for k in block.__dict__ if not k.startswith("_")}
    block(x).sum().backward()
    block.eval()(x)
    assert (set(block.state_dict()), {k for k in block.__dict__ if not k.startswith("_")}) == before
    stock = reference.DenseBlock(2, 6, 2, 4)
    assert [n for n, _ in block.named_buffers()] == [n for n, _ in stock.named_buffers()]


def change_by_optimizer(net):
    net.train()
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def change_by_load_state_dict(net):
    net.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in net.state_dict().items()})


def change_by_data(net):
    for p in net.parameters():
        p.data.mul_(1.1)
    net.features.denseblock1.denselayer1.norm2.running_var.data.fill_(2)


def change_by_swap(net):
    """As an average of weights is swapped in for evaluation."""
    for p in net.parameters():
        p.data = p.data * 0.9


@pytest.mark.parametrize("change", [change_by_optimizer, change_by_load_state_dict, change_by_data, change_by_swap])
def test_evaluation_sees_every_change_of_the_weights(change):
    torch.manual_seed(0)
    net = fastdense.FastDenseNet(4, (2, 2), 8, 2, num_classes=3, small_inputs=True)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = net.eval()(x)
    change(net)
    with torch.no_grad():
        after = net.eval()(x)
        torch.testing.assert_close(after, fastdense.to_reference(net)(x))
    assert not torch.allclose(after, before)
