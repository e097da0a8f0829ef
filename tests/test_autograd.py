"""The modules as citizens of autograd: graphs that live side by side, mutation, transforms, memory."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("error::fastdense.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),  # PyTorch's own, when it is first transformed
]

SHAPES = {"block": (2, 5, 6, 6), "transition": (2, 5, 6, 6), "tails": (2, 5, 6, 6), "net": (2, 3, 32, 32)}
ARGUMENTS = {"block": (2, 5, 2, 3), "transition": (5, 3), "tails": (5,), "net": (3, (2, 2), 6, 2, 0.0, 4)}
every_kind = pytest.mark.parametrize("kind", SHAPES)
train_and_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A forward and a backward, alone."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    module(x).square().sum().backward()
    return {"x": x.grad, **gradients(module)}


# -- item 2: finite differences -------------------------------------------------------------------------------


def gradcheck(module: nn.Module, x: Tensor, fast_mode: bool = False) -> None:
    """With respect to the input and every parameter, which are perturbed in place."""
    inputs = (x.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x), inputs, fast_mode=fast_mode)


def frozen(norms: list[nn.BatchNorm2d]) -> None:
    for norm in norms:
        norm.eval()


def mixed(norms: list[nn.BatchNorm2d]) -> None:
    for i, norm in enumerate(norms):
        norm.train(i % 2 == 0)
        norm.eps = 1e-5 * 10 ** (i % 4)


MODES = {"train": lambda norms: None, "frozen": frozen, "mixed": mixed}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@every_mode
@pytest.mark.parametrize("small_inputs", [False, True], ids=["ImageNet stem", "CIFAR stem"])
def test_gradcheck_of_a_network(small_inputs, mode, twins, randn, batch_norms, clear_relus):
    """All but its first convolution: statistics pass from the blocks to the norms after them."""
    pair = twins("net", 2, (1, 2), 4, 1, num_classes=2, small_inputs=small_inputs)
    for model in pair:
        model.features.conv0 = nn.Identity()
        mode(batch_norms(model.double()))
    x = randn(2, 4, *((4, 4) if small_inputs else (8, 7)), dtype=torch.float64)
    clear_relus(pair, [x])
    gradcheck(pair[0], x, fast_mode=True)


@train_and_eval
@pytest.mark.parametrize("options", [dict(affine=False), dict(track_running_stats=False)], ids=str)
@pytest.mark.parametrize("kind", ["block", "transition", "tails"])
def test_gradcheck_of_norms_without(kind, options, train, twins, randn, batch_norms):
    """Without weight and bias, or without running statistics."""
    fast, _ = twins(kind, *{"block": (2, 3, 1, 2), "transition": (3, 2), "tails": (3,)}[kind])
    for parent in list(fast.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(child.num_features, **options))
    fast.double().train(train)
    gradcheck(fast, randn(2, 3, 4, 4, dtype=torch.float64))


@train_and_eval
@pytest.mark.parametrize("without", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["block", "transition", "tails"])
def test_norms_without_weight_or_bias_alone(kind, without, train, twins, randn, batch_norms, assert_within_budget):
    """The other is not forgotten."""
    pair = twins(kind, *{"block": (2, 3, 1, 2), "transition": (3, 2), "tails": (3,)}[kind])
    x = randn(2, 3, 4, 4)
    outputs = []
    for model in pair:
        for norm in batch_norms(model):
            norm.register_parameter(without, None)
        exact = copy.deepcopy(model).double().train(train)(x.double())
        outputs += [{"output": model.train(train)(x)}, {"output": exact}]
    fast, _, stock, exact = outputs
    assert_within_budget(fast, stock, exact, torch.float32)


@train_and_eval
@every_kind
def test_gradients_do_not_depend_on_which_others_are_wanted(kind, train, twins, randn, assert_within_budget):
    fast, _ = twins(kind, *ARGUMENTS[kind])
    fast.double().train(train)
    x = randn(*SHAPES[kind], dtype=torch.float64)
    everything = step(fast, x)
    for wanted in ("x", *(name for name, _ in fast.named_parameters())):
        for name, parameter in fast.named_parameters():
            parameter.requires_grad_(name == wanted)
        y = x.detach().requires_grad_(wanted == "x")
        fast.zero_grad()
        fast(y).square().sum().backward()
        alone = gradients(fast) if wanted != "x" else {"x": y.grad}
        assert list(alone) == [wanted]
        expected = {wanted: everything[wanted]}
        assert_within_budget(alone, expected, expected, torch.float64)


# -- item 18: graphs side by side -----------------------------------------------------------------------------


@train_and_eval
@every_kind
def test_two_forwards_one_backward(kind, train, twins, randn, assert_within_budget):
    results = []
    for model in twins(kind, *ARGUMENTS[kind]):
        model.double().train(train)
        a, b = (randn(*SHAPES[kind], seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2))
        (model(a).square().sum() + model(b).square().sum()).backward()
        results.append({"a": a.grad, "b": b.grad, **gradients(model), **dict(model.named_buffers())})
    fast, stock = results
    assert_within_budget(fast, stock, stock, torch.float64)


@every_kind
def test_module_applied_to_its_own_output(kind, twins, randn, assert_within_budget):
    results = []
    for model in twins(kind, *ARGUMENTS[kind]):
        model.double()
        x = randn(*SHAPES[kind], dtype=torch.float64).requires_grad_()
        out = model(x + model(x).mean())
        out.square().sum().backward()
        results.append({"x": x.grad, **gradients(model)})
    assert_within_budget(results[0], results[1], results[1], torch.float64)


@every_kind
def test_retained_graph(kind, twins, randn, assert_identical):
    fast, _ = twins(kind, *ARGUMENTS[kind])
    expected = step(fast, randn(*SHAPES[kind]))
    x = randn(*SHAPES[kind]).requires_grad_()
    fast.zero_grad()
    loss = fast(x).square().sum()
    wanted = [x, *fast.parameters()]
    for retain in (True, True, False):
        found = torch.autograd.grad(loss, wanted, retain_graph=retain)
        assert_identical(dict(zip(expected, found, strict=True)), expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@every_kind
def test_interleaved_models(kind, twins, randn, assert_identical):
    models = [twins(kind, *ARGUMENTS[kind], seed=seed)[0] for seed in range(2)]
    inputs = [randn(*SHAPES[kind], seed=seed) for seed in range(2)]
    expected = [step(model, x) for model, x in zip(models, inputs, strict=True)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    for model in models:
        model.zero_grad()
    losses = [model(x).square().sum() for model, x in zip(models, leaves, strict=True)]
    for loss in losses:
        loss.backward()
    for model, x, alone in zip(models, leaves, expected, strict=True):
        assert_identical({"x": x.grad, **gradients(model)}, alone)


@every_kind
def test_backward_in_another_thread(kind, twins, randn, assert_identical):
    fast, _ = twins(kind, *ARGUMENTS[kind])
    expected = step(fast, randn(*SHAPES[kind]))
    x = randn(*SHAPES[kind]).requires_grad_()
    fast.zero_grad()
    loss = fast(x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_identical({"x": x.grad, **gradients(fast)}, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_kind
def test_training_statistics_without_gradients(kind, mode, twins, randn, assert_identical):
    with_graph, without = (twins(kind, *ARGUMENTS[kind])[0] for _ in range(2))
    x = randn(*SHAPES[kind])
    expected = with_graph(x)
    with mode():
        out = without(x)
    assert not out.requires_grad
    assert out.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(out, expected)
    assert_identical(dict(without.named_buffers()), dict(with_graph.named_buffers()))
    assert_identical(step(without, x), step(with_graph, x))  # and training goes on


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_kind
def test_inference_equals_the_stock_modules(kind, mode, twins, randn, assert_within_budget):
    fast, stock = (model.double().eval() for model in twins(kind, *ARGUMENTS[kind]))
    x = randn(*SHAPES[kind], dtype=torch.float64)
    with mode():
        out, exact = fast(x), stock(x)
    assert not out.requires_grad
    assert_within_budget({"out": out}, {"out": exact}, {"out": exact}, torch.float64)


# -- item 19: mutation ----------------------------------------------------------------------------------------


def mutate(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


@train_and_eval
@every_kind
def test_mutated_parameter(kind, train, twins, randn):
    fast, _ = twins(kind, *ARGUMENTS[kind])
    loss = fast.train(train)(randn(*SHAPES[kind])).square().sum()
    mutate(next(p for p in fast.parameters() if p.dim() == 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@train_and_eval
def test_mutated_output_of_a_block(train, twins, randn):
    """The output is the shared buffer that the backward reads."""
    fast, _ = twins("block", *ARGUMENTS["block"])
    out = fast.train(train)(randn(*SHAPES["block"]))
    loss = out.sum()
    mutate(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@train_and_eval
@pytest.mark.parametrize("mutated", ["input", "output"])
@every_kind
def test_mutation_is_an_error_or_harmless(kind, mutated, train, twins, randn, assert_identical):
    fast, _ = twins(kind, *ARGUMENTS[kind])
    fast.train(train)

    def run(change: Callable[[Tensor], None]) -> dict[str, Tensor]:
        leaf = randn(*SHAPES[kind]).requires_grad_()
        fast.zero_grad()
        x = leaf * 1
        out = fast(x)
        loss = out.sum()
        change({"input": x, "output": out}[mutated])
        loss.backward()
        return {"x": leaf.grad, **gradients(fast)}

    expected = run(lambda tensor: None)
    try:
        found = run(mutate)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_identical(found, expected)


# -- item 20: right, or an explicit error ---------------------------------------------------------------------

EXPLICIT = (RuntimeError, NotImplementedError)


def right_or_error(compute: Callable[[nn.Module], Tensor], fast: nn.Module, stock: nn.Module, check: Callable) -> None:
    """``compute(fast)`` raises, or gives what ``compute(stock)`` gives."""
    try:
        found = compute(fast)
    except EXPLICIT:
        return
    expected = compute(stock)
    assert found is not None
    check({"": found}, {"": expected}, {"": expected}, torch.float64)


@train_and_eval
@every_kind
def test_double_backward(kind, train, twins, randn, assert_within_budget):
    pair = [model.double().train(train) for model in twins(kind, *ARGUMENTS[kind])]

    def compute(model: nn.Module) -> Tensor:
        x = randn(*SHAPES[kind], dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    right_or_error(compute, *pair, assert_within_budget)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@train_and_eval
@every_kind
def test_dual_numbers(kind, train, grad_mode, twins, randn, assert_within_budget):
    pair = [model.double().train(train) for model in twins(kind, *ARGUMENTS[kind])]
    x, tangent = (randn(*SHAPES[kind], seed=seed, dtype=torch.float64) for seed in range(2))

    def compute(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent

    right_or_error(compute, *pair, assert_within_budget)


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad", "jacrev"])
@every_kind
def test_functional_transforms(kind, transform, twins, randn, assert_within_budget):
    """In eval mode, where the stock modules can be transformed."""
    pair = [model.double().eval() for model in twins(kind, *ARGUMENTS[kind])]
    x, tangent = (randn(*SHAPES[kind], seed=seed, dtype=torch.float64) for seed in range(2))

    def compute(model: nn.Module) -> Tensor:
        if transform == "jvp":
            return torch.func.jvp(model, (x,), (tangent,))[1]
        if transform == "vmap":
            return torch.func.vmap(lambda image: model(image[None])[0])(x)
        if transform == "grad":
            return torch.func.grad(lambda x: model(x).square().sum())(x)
        return torch.func.jacrev(lambda x: model(x).mean())(x)

    right_or_error(compute, *pair, assert_within_budget)


# -- item 21: flat memory -------------------------------------------------------------------------------------


def python_nodes(out: Tensor) -> list[Any]:
    """The nodes of a graph that are Python's, as those of custom ops are: they own what was saved."""
    found, todo = {}, [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = hasattr(node, "saved_tensors")
            todo += [parent for parent, _ in node.next_functions]
    return [node for node, is_python in found.items() if is_python]


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "abandoned"])
@pytest.mark.parametrize("kind", ["block", "net"])
def test_a_graph_is_freed_at_once(kind, backward, memory_efficient, twins, randn):
    """Not at the next garbage collection: nothing in it is in a reference cycle."""
    fast, _ = twins(kind, *ARGUMENTS[kind][:4], memory_efficient=memory_efficient)
    gc.collect()
    gc.disable()
    try:
        out = fast(randn(*SHAPES[kind]))
        alive = [weakref.ref(node) for node in python_nodes(out)] + [weakref.ref(out.untyped_storage())]
        assert len(alive) == {"block": 2, "net": 6}[kind]
        if backward:
            out.sum().backward()
        del out
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_live_tensors_over_1000_iterations(twins, randn):
    """Every other graph is abandoned without a backward."""
    blocks = [twins("block", 1, 4, 2, 2, memory_efficient=flag)[0] for flag in (False, True)]
    x = randn(1, 4, 3, 3)

    def iterate(count: int) -> int:
        for i in range(count):
            block = blocks[i // 2 % 2]
            block.zero_grad()
            loss = block(x).sum()
            if i % 2:
                loss.backward()
        del loss
        return live_tensors()

    before = iterate(4)
    assert iterate(1000) == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_resident_memory_over_iterations(twins, randn):
    """An iteration saves about 3 MB: holding on to a tenth of it would show."""
    fast, _ = twins("block", 2, 32, 4, 16)
    x = randn(4, 32, 32, 32)

    def iterate(count: int) -> int:
        for i in range(count):
            fast.zero_grad()
            loss = fast(x).sum()
            if i % 2:
                loss.backward()
        del loss
        return resident_bytes()

    before = iterate(20)
    assert iterate(100) - before < 100 * 0.3e6
