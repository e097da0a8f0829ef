"""Converted networks inside the frameworks people use: compilers, exporters, trainers, and torch.func."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from sources import SOURCES, Source
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense import parity
from fastdense.modules import FusedBlock, FusedTransition

EXACT = parity.BUDGETS[torch.float64].floor
LIBRARIES = ("timm", "MONAI", "torchxrayvision", "segmentation_models_pytorch")
EACH = (*LIBRARIES, "gpleiss", "FC-DenseNet", "kuangliu")

each = pytest.mark.parametrize("source", [SOURCES[name] for name in EACH], ids=EACH)
each_library = pytest.mark.parametrize("source", [SOURCES[name] for name in LIBRARIES], ids=LIBRARIES)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(source: Source, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, its conversion and images. Biases before a norm have a gradient under dropout only."""
    drops = source.without_gradient and source.dropout
    stock = source.build(**({source.dropout: source.dropout_rate} if drops else {})).to(dtype)
    return stock, fastdense.convert(stock), source.images().to(dtype)


def ops_of(graph: torch.fx.Graph) -> set[str]:
    """Names of the package's ops in a graph."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return {target.split(".")[1] for target in targets if target.startswith("fastdense.")}


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@each
def test_compiles_to_one_graph(source: Source, train: bool) -> None:
    stock, fast, x = pair(source)
    counter = CompileCounterWithBackend("aot_eager")
    expected = parity.observe(stock.train(train), x)
    fast.train(train).compile(fullgraph=True, backend=counter)
    seen = parity.observe(fast, x)
    assert not list(parity.failures(parity.compare(seen, [expected], expected, torch.float64)))
    assert counter.frame_count == 1
    assert "dense_block" in ops_of(counter.graphs[-1].graph)


def test_compiles_for_every_size_at_once() -> None:
    stock, fast, _ = pair(SOURCES["timm"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=counter)
    for size in (32, 41, 64):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert parity.relative_error(compiled(x), stock(x)) <= EXACT
    assert counter.frame_count <= 2


# -- torch.export ------------------------------------------------------------------------------------------------------


@each_library
def test_exported_saved_and_loaded(source: Source, tmp_path: Path) -> None:
    """With the ops in the graph, for any batch; whoever loads it imports fastdense."""
    _, fast, x = pair(source)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=16)},)
    with torch.no_grad():
        program = torch.export.export(fast.eval(), (x,), dynamic_shapes=dynamic)
        assert "dense_block_inference" in ops_of(program.graph)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for images in (x, x[:1]):
            assert parity.relative_error(loaded(images), fast(images)) <= EXACT


@pytest.mark.slow
@needs_compiler
def test_compiled_ahead_of_time_by_way_of_the_original(tmp_path: Path) -> None:
    """AOTInductor hands empty lists to ops as ``None``, so ours cannot be in its graphs: ``to_reference`` first."""
    _, fast, x = pair(SOURCES["timm"], torch.float32)
    with torch.no_grad():
        expected = fast.eval()(x)
        program = torch.export.export(fastdense.to_reference(fast), (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        assert parity.relative_error(compiled(x), expected) <= parity.BUDGETS[torch.bfloat16].floor


@each_library
def test_onnx_by_way_of_the_original(source: Source) -> None:
    """ONNX knows no ops of ours: ``to_reference`` first."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    _, fast, x = pair(source, torch.float32)
    stock = fastdense.to_reference(fast.eval())
    program = torch.onnx.export(stock, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    with torch.no_grad():
        out = torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0])
        assert parity.relative_error(out, fast(x)) <= parity.BUDGETS[torch.bfloat16].floor


# -- checkpointing, data parallelism -----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A network that is run again in the backward."""

    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@each
def test_statistics_are_updated_once_under_checkpointing(source: Source, use_reentrant: bool) -> None:
    """Of the blocks and transitions; norms outside of these are PyTorch's, which does it twice.

    So are those of an encoder's transitions, whose parts it calls one by one.
    """
    _, fast, x = pair(source)
    again = copy.deepcopy(fast)
    expected = parity.observe(fast, x)
    seen = parity.observe(Checkpointed(again, use_reentrant), x)
    ours = FusedBlock if source is SOURCES["segmentation_models_pytorch"] else (FusedBlock, FusedTransition)
    seen = {name.replace("model.", ""): tensor for name, tensor in seen.items()}
    for path, block in fast.named_modules():
        if isinstance(block, ours):
            inside = [name for name in expected if path in name]
            assert len(inside) > 4
            assert max(parity.relative_error(seen[name], expected[name]) for name in inside) <= EXACT


@each
def test_data_parallel_without_gpus_passes_through(source: Source, assert_identical) -> None:
    _, fast, x = pair(source)
    expected = parity.observe(copy.deepcopy(fast), x)
    seen = parity.observe(nn.DataParallel(fast, []), x)
    assert_identical({name.replace("module.", ""): tensor for name, tensor in seen.items()}, expected)


def replica_of(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module for each GPU: its parameters are plain attributes, and no leaves."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    for name, parameter in module._parameters.items():
        replica._parameters.pop(name, None)
        setattr(replica, name, None if parameter is None else parameter * 1)
    return replica


@pytest.mark.parametrize("mode", ["train", "frozen"])
@each
def test_replicas_train(source: Source, mode: str) -> None:
    _, fast, x = pair(source)
    expected = parity.observe(copy.deepcopy(fast).train(mode == "train"), x)
    torch.manual_seed(0)
    out = replica_of(fast.train(mode == "train"))(x)
    assert out.requires_grad
    if mode == "frozen":
        assert parity.relative_error(out, expected["output"]) <= EXACT
    generator = torch.Generator().manual_seed(0)
    fast.zero_grad()
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            assert parity.relative_error(parameter.grad, expected[f"grad {name}"]) <= EXACT, name


# -- trainers ----------------------------------------------------------------------------------------------------------


def test_lightning(tmp_path: Path) -> None:
    """The recipe of docs/porting.md in miniature: fits, saves, and loads into the unconverted network."""
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    source = SOURCES["MONAI"]

    class Classifier(lightning.LightningModule):
        def __init__(self, convert: bool = True) -> None:
            super().__init__()
            model = source.build()
            self.model = fastdense.convert(model) if convert else model

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    x = torch.cat([source.images(seed=seed) for seed in range(3)])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(6) % 5), batch_size=2)
    states = []
    for convert in (True, False):
        torch.manual_seed(0)
        module = Classifier(convert)
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        states.append(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert max(parity.relative_error(states[0][key], states[1][key]) for key in states[0]) <= EXACT


def test_timms_training_script() -> None:
    """What its train.py does with a model: optimizer groups, moving average, checkpointing, layer decay, evaluation."""
    timm = pytest.importorskip("timm", reason="needs timm")
    optim, utils = importlib.import_module("timm.optim"), importlib.import_module("timm.utils")
    states = []
    for convert in (True, False):
        model = SOURCES["timm"].build().double()
        if convert:
            model = fastdense.convert(model)
        optimizer = optim.create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=1e-4, layer_decay=0.9)
        average = utils.ModelEmaV3(model, decay=0.9)
        scaler = timm.utils.NativeScaler(device="cpu")
        for seed in range(2):
            loss = model(SOURCES["timm"].images(seed=seed).double()).square().mean()
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model, step=seed)
        utils.reparameterize_model(average.module.eval())(SOURCES["timm"].images().double())
        states.append({**model.state_dict(), **{f"average.{k}": v for k, v in average.module.state_dict().items()}})
    assert max(parity.relative_error(states[0][key], states[1][key]) for key in states[1]) <= EXACT


# -- torch.func --------------------------------------------------------------------------------------------------------


@each
def test_functional_call_is_fast(source: Source) -> None:
    stock, fast, x = pair(source)
    parameters = {name: (p * 1.1).detach() for name, p in stock.named_parameters()}
    stock.eval(), fast.eval()
    out = functional_call(fast, parameters, (x,))
    assert parity.relative_error(out, functional_call(stock, parameters, (x,))) <= EXACT


@each
def test_transforms_run_the_original(source: Source) -> None:
    """Gradients of each image alone, and a forward-mode derivative, in evaluation; no warning, no wrong number."""
    stock, fast, x = pair(source)
    stock.eval(), fast.eval()
    seen = []
    for model in (stock, fast):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor, model: nn.Module = model) -> Tensor:
            return functional_call(model, parameters, (image[None],)).square().sum()

        each_image = vmap(grad(loss), (None, 0))(parameters, x)
        tangent = jvp(lambda x, model=model: model(x), (x,), (torch.ones_like(x),))[1]
        seen.append({**each_image, "tangent": tangent})
    assert max(parity.relative_error(seen[1][name], seen[0][name]) for name in seen[0]) <= EXACT


def test_second_derivatives_are_an_error() -> None:
    _, fast, x = pair(SOURCES["MONAI"])
    (first,) = torch.autograd.grad(fast(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        first.square().sum().backward()


@each_library
def test_traced_by_fx(source: Source) -> None:
    """As torchvision's feature extraction does: what is traced is the original."""
    _, fast, x = pair(source)
    graph = torch.fx.symbolic_trace(fast.eval())
    assert parity.relative_error(graph(x), fast(x)) <= EXACT
    assert not ops_of(graph.graph)
