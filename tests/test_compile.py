"""torch.compile: one graph, few compilations and eager's numbers. CUDA graphs: replay what eager computes."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdense
from fastdense import FallbackWarning, FastDenseBlock, FastDenseNet, FastTransition
from fastdense.parity import BUDGETS, Row, compare, failures, observe, relative_error
from fastdense.served import BatchNorm

CONFIG = dict(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=5)
EXACT = BUDGETS[torch.float64].floor


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(**options: Any) -> FastDenseNet:
    """A small network whose norms have learned something, so that no gradient vanishes by symmetry."""
    torch.manual_seed(0)
    model = FastDenseNet(**CONFIG | options)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.5)
        nn.init.normal_(norm.running_mean, std=0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def photos(size: int = 32, seed: int = 0, dims: int = 2) -> Tensor:
    return torch.randn(2, 3, *[size] * dims, generator=torch.Generator().manual_seed(seed))


def eager_parity(
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    *,
    autocast: bool = False,
    backward: bool = True,
    backend: Any = "aot_eager",
) -> list[Row]:
    """A compiled copy of ``model`` against an eager one: output, every gradient, running statistics."""
    truth = observe(copy.deepcopy(model).double(), x.double(), backward=backward)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend=backend)
    options = dict(autocast=dtype if autocast else None, backward=backward)
    return compare(observe(compiled, x, **options), [observe(copy.deepcopy(model), x, **options)], truth, dtype)


def fastdense_ops(counter: CompileCounterWithBackend) -> set[str]:
    """Names of the package's ops in the graph compiled last."""
    targets = [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    return {str(target).split(".")[1] for target in targets if str(target).startswith("fastdense.")}


# -- one graph with eager's numbers --------------------------------------------------------------------------


def frozen_stem_and_transition(model: FastDenseNet) -> None:
    model.features.norm0.eval()
    model.features.transition1.norm.eval()


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[FastDenseNet], Any]]] = {
    "train": ({}, FastDenseNet.train),
    "eval": ({}, FastDenseNet.eval),
    "dropout": (dict(drop_rate=0.3), FastDenseNet.train),
    "dropout after every conv": (dict(drop_rate=0.3, drop_every_conv=True), FastDenseNet.train),
    "memory_efficient": (dict(memory_efficient=True), FastDenseNet.train),
    "no bottlenecks": (dict(bn_size=None, small_inputs=True), FastDenseNet.train),
    "partly frozen": ({}, frozen_stem_and_transition),
    "sequences": (dict(spatial_dims=1), FastDenseNet.train),
    "volumes": (dict(spatial_dims=3), FastDenseNet.train),
    "volumes, eval": (dict(spatial_dims=3), FastDenseNet.eval),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph_equals_eager(variant):
    """In float64, where dropout masks do not depend on rounding and a wrong graph has nowhere to hide."""
    options, prepare = VARIANTS[variant]
    model = network(**options).double()
    prepare(model)
    size = 12 if options.get("small_inputs") else 32
    assert not list(
        failures(eager_parity(model, photos(size, dims=options.get("spatial_dims", 2)).double(), torch.float64))
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast bf16"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_lower_precision_equals_eager(train, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    rows = eager_parity(network().train(train), photos(), dtype, autocast=autocast)
    assert not list(failures(rows))


def test_autocast_inside_the_graph():
    model = network()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    eager = forward(photos())
    out = compiled(photos())
    assert out.dtype == eager.dtype == torch.bfloat16
    assert relative_error(out, eager) <= BUDGETS[torch.bfloat16].floor


def test_inference_is_compiled_to_the_inference_op():
    counter = CompileCounterWithBackend("aot_eager")
    rows = eager_parity(network().eval(), photos(), torch.float32, backward=False, backend=counter)
    assert not list(failures(rows))
    assert "dense_block_inference" in fastdense_ops(counter)


@pytest.mark.parametrize("module", [FastDenseBlock(2, 8, 4, 8), FastTransition(8, 4)], ids=lambda m: type(m).__name__)
def test_modules_compile_by_themselves(module):
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not list(failures(eager_parity(copy.deepcopy(module).double(), x, torch.float64)))


def test_block_compiled_inside_an_eager_network():
    model = network().double()
    expected = observe(copy.deepcopy(model), photos().double())
    model.features.denseblock1.compile(fullgraph=True, backend="aot_eager")
    seen = observe(model, photos().double())
    assert not list(failures(compare(seen, [expected], expected, torch.float64)))


# -- few compilations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_at_most_two_compilations_over_five_sizes(train):
    eager = network().double().train(train)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=counter)
    for size in (32, 41, 48, 57, 64):
        x = photos(size).double()
        expected = observe(eager, x, backward=train)
        assert not list(failures(compare(observe(compiled, x, backward=train), [expected], expected, torch.float64))), (
            size
        )
    assert counter.frame_count <= 2


def test_dynamic_shapes_fit_every_size_at_once():
    model = network().double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for size in (32, 41, 64):
        out = compiled(photos(size).double())
        out.sum().backward()
        compilations.append(counter.frame_count)
        assert relative_error(out, model(photos(size).double())) <= EXACT
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_compiles_once(momentum):
    """Counters that a module keeps in Python would compile it anew at every step."""
    models = [network().double() for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    models[0].compile(fullgraph=True, backend=counter)
    for model in models:
        for norm in norms(model):
            norm.momentum = momentum
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            model(photos(seed=step).double()).square().mean().backward()
            optimizer.step()
    compiled, eager = (model.state_dict() for model in models)
    assert max(relative_error(compiled[name], eager[name]) for name in eager) <= EXACT
    assert counter.frame_count == 1


@torch.no_grad()
def test_switching_between_train_and_eval_compiles_each_once():
    model = network().double()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=counter)
    for train in (True, False, True, False):
        x = photos(seed=int(train)).double()
        assert relative_error(model.train(train)(x), eager.train(train)(x)) <= EXACT
    assert counter.frame_count == 2


# -- what changes after compilation, and what cannot be fused ------------------------------------------------


@torch.no_grad()
def test_backend_changed_after_compilation():
    model = network().eval().double()
    x = photos().double()
    expected = fastdense.to_reference(model)(x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    assert relative_error(compiled(x), expected) <= EXACT
    assert "dense_block_inference" in fastdense_ops(counter)
    with fastdense.use_backend("reference"):
        assert torch.equal(compiled(x), expected)
        assert not fastdense_ops(counter)
    with fastdense.use_backend("torch"):
        assert relative_error(compiled(x), expected) <= EXACT
        assert "dense_block_inference" in fastdense_ops(counter)


@torch.no_grad()
def test_backend_chosen_inside_the_graph():
    model = network().eval().double()
    x = photos().double()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with fastdense.use_backend("reference"):
            naive = model(x)
        return naive, model(x)

    naive, fast = torch.compile(forward, fullgraph=True, backend="aot_eager")(x)
    expected = fastdense.to_reference(model)(x)
    assert torch.equal(naive, expected)
    assert relative_error(fast, expected) <= EXACT
    assert fastdense.backends.select(x.device, x.dtype) != fastdense.backends.REFERENCE


def doubling(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def hooked_network() -> tuple[FastDenseNet, nn.Module]:
    """A network with a hook that changes an inner module's output, and its reference."""
    model = network().double()
    model.features.denseblock1.denselayer2.conv2.register_forward_hook(doubling)
    return model, fastdense.to_reference(model)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graph breaks allowed", "fullgraph"])
def test_fallback_is_compiled_and_warned_of_once(fullgraph):
    model, reference = hooked_network()
    x = photos().double()
    expected = observe(reference, x)
    model.compile(fullgraph=fullgraph, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        first = observe(model, x)
        model(x)
    assert not list(failures(compare(first, [expected], expected, torch.float64)))
    assert [w.category for w in caught].count(FallbackWarning) == 1


@torch.no_grad()
def test_hook_added_after_compilation():
    """Dynamo looks for new hooks if told to; without that, it overlooks them in stock modules too."""
    model = network().double().eval()
    x = photos().double()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(model, backend="aot_eager")
        before = compiled(x)
        model.features.denseblock1.denselayer2.conv2.register_forward_hook(doubling)
        with pytest.warns(FallbackWarning):
            after = compiled(x)
    assert relative_error(after, fastdense.to_reference(model)(x)) <= EXACT
    assert not torch.allclose(before, after)


# -- inductor ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_inductor_equals_eager(train):
    """Inductor checks every op's strides against its fake's. In float64: a flipped ReLU would hide an error."""
    model = network().double().train(train)
    assert not list(failures(eager_parity(model, photos().double(), torch.float64, backward=train, backend="inductor")))


# -- CUDA graphs ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_cuda_graph_replays_what_eager_computes(train):
    eager = network().cuda().train(train)
    x = photos().cuda()
    truth = observe(copy.deepcopy(eager).double(), x.double())
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(eager), (torch.zeros_like(x).requires_grad_(),))
    graphed.load_state_dict(eager.state_dict())  # the warm-up has updated the running statistics
    rows = compare(observe(graphed, x), [observe(eager, x)], truth, torch.float32)
    assert not list(failures(rows))
