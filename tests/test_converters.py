"""The DenseNets of other libraries and of users' own files: converted, they are what they were, and fused."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import SOURCES, Source
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import fastdense
from fastdense import FallbackWarning, parity
from fastdense.benchmarks import wild
from fastdense.memory import saved_activation_bytes
from fastdense.modules import FusedBlock, FusedTransition
from fastdense.served import carries_relu

EXACT = parity.BUDGETS[torch.float64].floor

each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
only_libraries = pytest.mark.parametrize(
    "source", [s for s in SOURCES.values() if s.package], ids=[name for name, s in SOURCES.items() if s.package]
)


def findings(model: nn.Module) -> dict[str, fastdense.Finding]:
    return {finding.path: finding for finding in fastdense.explain(model).findings}


def blocks(model: nn.Module) -> list[FusedBlock]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


# -- the same numbers --------------------------------------------------------------------------------------------------


def frozen(model: nn.Module) -> None:
    """Training, with the norms in evaluation."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


MODES = {"train": nn.Module.train, "frozen": frozen, "eval": nn.Module.eval}


@pytest.mark.parametrize("mode", MODES)
@each_source
def test_outputs_gradients_and_statistics(source: Source, mode: str, assert_parity) -> None:
    """In float64, with dropout where there is any: it draws what the original draws.

    Encoders call their blocks one by one, which then do not know the layout that the original's features would have.
    """
    stock = source.build(**({source.dropout: source.dropout_rate} if source.dropout else {}))
    fast = fastdense.convert(stock)
    assert len(blocks(fast)) == len(blocks(fastdense.convert(source.build()))) > 1
    for model in (stock, fast):
        MODES[mode](model)
    inputs = [source.images(seed=seed) for seed in range(2)]
    is_encoder = source is SOURCES["segmentation_models_pytorch"]
    memory_format = torch.channels_last if is_encoder else torch.contiguous_format
    assert_parity(fast, stock, inputs, dtype=torch.float64, memory_formats=[memory_format])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast bf16"])
@pytest.mark.parametrize("mode", MODES)
@each_source
def test_lower_precision(source: Source, mode: str, dtype: torch.dtype, clear_relus, assert_parity) -> None:
    if source.spatial_dims == 3 and dtype == torch.bfloat16:
        pytest.skip("PyTorch has no average pool of volumes in half precision on CPUs")
    stock = source.build()
    inputs = [source.images(seed=seed) for seed in range(3)]
    fast = fastdense.convert(stock)
    for model in (stock, fast):
        MODES[mode](model)
    if not any(map(carries_relu, stock.modules())):  # else the norms' outputs are not what the ReLUs see
        clear_relus([fast, stock], inputs)
    assert_parity(fast, stock, inputs, dtype=dtype, autocast=dtype == torch.bfloat16)


CONSTRUCTORS = {
    "timm densenet121": ("timm", lambda timm: timm.create_model("densenet121")),
    "timm densenet161": ("timm", lambda timm: timm.create_model("densenet161")),
    "timm densenet169": ("timm", lambda timm: timm.create_model("densenet169")),
    "timm densenetblur121d": ("timm", lambda timm: timm.create_model("densenetblur121d")),
    "MONAI DenseNet121": ("monai.networks.nets", lambda nets: nets.DenseNet121(2, 3, 1000)),
    "MONAI DenseNet264": ("monai.networks.nets", lambda nets: nets.DenseNet264(2, 3, 1000)),
    "torchxrayvision": ("torchxrayvision", lambda xrv: xrv.models.DenseNet(in_channels=3)),
    "segmentation_models_pytorch densenet169": (
        "segmentation_models_pytorch",
        lambda smp: smp.Unet("densenet169", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8)),
    ),
}


@pytest.mark.parametrize(("package", "make"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructors_of_the_libraries(package: str, make: Callable[[Any], nn.Module], assert_parity) -> None:
    library = pytest.importorskip(package, reason=f"needs {package}")
    torch.manual_seed(0)
    stock = make(library)
    fast = fastdense.convert(stock.eval())
    assert len(blocks(fast)) == 4
    assert sum(isinstance(module, FusedTransition) for module in fast.modules()) == 3
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_parity(fast, stock, x, dtype=torch.float32, backward=False)


# -- what is kept ------------------------------------------------------------------------------------------------------


@each_source
def test_state_and_way_back(source: Source, assert_identical) -> None:
    stock = source.build()
    fast = fastdense.convert(stock)
    assert_identical(dict(fast.state_dict()), dict(stock.state_dict()))
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert isinstance(fast, type(stock)) or source.package == "torchvision"
    back = fastdense.to_reference(fast)
    assert [type(module) for module in back.modules()] == [type(module) for module in stock.modules()]
    assert [vars(module).keys() for module in back.modules()] == [vars(module).keys() for module in stock.modules()]
    x = source.images()
    for model in (stock, back):
        model.train()
    assert_identical(parity.observe(back, x), parity.observe(stock, x))


@each_source
def test_inplace_keeps_every_object(source: Source) -> None:
    model = source.build()
    parameters, modules = list(model.parameters()), list(model.modules())
    assert fastdense.convert(model, inplace=True) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert fastdense.convert(model, inplace=True) is model
    assert "convertible" not in {finding.verdict for finding in findings(model).values()}


@each_source
def test_copies_and_pickles(source: Source, assert_identical) -> None:
    fast = fastdense.convert(source.build())
    x = source.images()
    expected = parity.observe(copy.deepcopy(fast), x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)):
        assert type(copied) is type(fast)
        assert_identical(parity.observe(copied, x), expected)


@pytest.mark.parametrize("name", ["timm", "MONAI", "kuangliu", "FC-DenseNet"])
def test_pickles_open_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    """Where no class has been made yet, and fastdense not been imported."""
    fast = fastdense.convert(SOURCES[name].build()).eval()
    x = SOURCES[name].images()
    with torch.no_grad():
        torch.save((fast, x, fast(x)), tmp_path / "model.pt")
    program = (
        f"import torch; fast, x, out = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "import fastdense, warnings; warnings.simplefilter('error', fastdense.FallbackWarning)\n"
        "with torch.no_grad(): print(torch.equal(fast(x), out))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr[-2000:]


@only_libraries
def test_weights_of_one_library_in_the_network_of_another(source: Source) -> None:
    """Converted on either side."""
    stock = SOURCES["torchvision"].build()
    if source.spatial_dims != 2 or source in (SOURCES["segmentation_models_pytorch"], SOURCES["timm deep stem"]):
        pytest.skip("no network of the same tensors")
    model = fastdense.convert(source.build(**dict(bn_size=4)))
    torch.nn.init.zeros_(next(model.parameters()))
    fastdense.load_weights(model, fastdense.convert(stock).state_dict())
    x = source.images()
    with torch.no_grad():
        assert parity.relative_error(model.eval()(x), stock.eval()(x)) <= parity.BUDGETS[torch.bfloat16].floor


# -- hooks, and what changes after conversion --------------------------------------------------------------------------


@each_source
def test_hooks_inside_a_block_fire_and_its_own_forward_runs(source: Source) -> None:
    stock = source.build().double()
    fast = fastdense.convert(stock)
    seen: list[str] = []
    first = next(module for module in blocks(fast)[0].modules() if isinstance(module, _ConvNd))
    first.register_forward_hook(lambda *_: seen.append("conv"))
    with pytest.warns(FallbackWarning, match="it has hooks"):
        out = fast(source.images().double())
    assert seen == ["conv"]
    assert parity.relative_error(out, stock(source.images().double())) <= EXACT


@each_source
def test_hooks_of_blocks_see_the_same_features(source: Source) -> None:
    """As Grad-CAM does: the last block's output and its gradient."""
    stock = source.build().double().eval()
    fast = fastdense.convert(stock)
    paths = [path for path, module in fast.named_modules() if isinstance(module, FusedBlock)]
    maps: list[list[Tensor]] = []
    for model in (stock, fast):
        kept: list[Tensor] = []
        handle = model.get_submodule(paths[-1]).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        out = model(source.images().double())
        (gradient,) = torch.autograd.grad(out.square().sum(), kept)
        maps.append([kept[0], gradient])
        handle.remove()
    for ours, theirs in zip(*maps[::-1], strict=True):
        assert parity.relative_error(ours, theirs) <= EXACT


def test_a_layer_replaced_after_conversion() -> None:
    stock = wild.KuangliuDenseNet().double()
    fast = fastdense.convert(stock)
    for model in (stock, fast):
        torch.manual_seed(1)
        model.stages[0][1] = wild.PhlippeLayer(24, 4, 8, nn.ReLU).double()
    x = SOURCES["kuangliu"].images().double()
    with pytest.warns(FallbackWarning, match="1 is a PhlippeLayer"):
        assert parity.relative_error(fast(x), stock(x)) <= EXACT


def test_an_output_switched_after_conversion() -> None:
    stock = wild.DenseBlock(12, 6, 3, 0.3, upsample=True).double()
    fast = fastdense.convert(stock)
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    for upsample in (True, False):
        stock.upsample = fast.upsample = upsample
        seen = []
        for model in (stock, fast):
            torch.manual_seed(0)
            seen.append(model(x))
        assert seen[0].shape[1] == (18 if upsample else 30)
        assert not seen[1]._is_view()
        assert parity.relative_error(*seen[::-1]) <= EXACT


class _NewFirst(wild.DenseBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = []
        for layer in self.layers:
            new.insert(0, layer(x))
            x = torch.cat([new[0], x], 1)
        return torch.cat(new, 1) if self.upsample else x


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_biases_of_new_features_first(training, upsample) -> None:
    stock = _NewFirst(12, 6, 3, 0.3, upsample).double().train(training)
    fast = fastdense.convert(stock)
    assert isinstance(fast, fastdense.modules.FusedBlock)
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    seen = []
    for model in (fast, stock):
        torch.manual_seed(0)
        out = model(x)
        out.square().sum().backward()
        seen.append([out, *(p.grad for p in model.parameters()), *model.buffers()])
    with torch.no_grad():
        for values, model in zip(seen, (fast, stock), strict=True):
            values.append(model.eval()(x))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("upsample", [True, False])
def test_biases_leave_features_and_their_gradients_in_their_layout(upsample, op_calls) -> None:
    block = fastdense.convert(wild.DenseBlock(12, 6, 3, 0.3, upsample))
    x = torch.randn(2, 12, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    with op_calls() as calls:
        block(x).square().sum().backward()
    read = {op.name(): args[0] for op, args, _ in calls}
    assert read.keys() == {"fastdense::dense_block", "fastdense::dense_block_backward"}
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in read.values())


# -- what is declined --------------------------------------------------------------------------------------------------


def assert_declined(stock: nn.Module, path: str, reason: str, x: Tensor) -> None:
    """It is listed with its reason, and runs as before."""
    finding = findings(stock)[path]
    assert finding.verdict == "left alone"
    assert reason in finding.reason
    fast = fastdense.convert(stock)
    assert type(fast.get_submodule(path)) is type(stock.get_submodule(path))
    torch.testing.assert_close(fast.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "path", "reason"),
    [
        ("timm", dict(act_layer="silu"), "features.denseblock1", "it has the activation SiLU"),
        ("timm", dict(norm_layer="groupnorm", growth_rate=32), "features.denseblock1", "norm1: it is a GroupNormAct"),
        ("MONAI", dict(norm="instance"), "features.denseblock2", "denselayer1: norm1: it is a InstanceNorm2d"),
        ("MONAI", dict(norm=("group", dict(num_groups=4))), "features.transition1", "norm: it is a GroupNorm"),
        ("MONAI", dict(act="swish"), "features.denseblock1", "relu1: it is a Swish"),
        ("phlippe", dict(act=nn.Tanh), "blocks.0", "this class is not known"),
    ],
    ids=str,
)
def test_other_norms_and_activations(name: str, options: dict, path: str, reason: str) -> None:
    stock = SOURCES[name].build(**options)
    if name == "phlippe":
        reason = "block is a Sequential"
    assert_declined(stock, path, reason, SOURCES[name].images())


def test_blurred_pools_of_timm() -> None:
    layers = pytest.importorskip("timm.layers", reason="needs timm")
    stock = SOURCES["timm"].build(aa_layer=layers.BlurPool2d, aa_stem_only=False)
    assert_declined(stock, "features.transition1", "pool: it is a BlurPool2d", SOURCES["timm"].images())
    assert findings(stock)["features.denseblock1"].verdict == "convertible"


def test_rdnet_by_name() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    stock = timm.create_model("rdnet_tiny", num_classes=3)
    reasons = {finding.reason for finding in findings(stock).values()}
    assert reasons == {"RDNet's layers are 7x7 depthwise convolutions, LayerNorm and GELU"}
    assert "" in findings(stock)


def test_transitions_of_fc_densenet() -> None:
    stock, x = wild.FCDenseNet(), SOURCES["FC-DenseNet"].images()
    assert_declined(stock, "transDownBlocks.0", "maxpool: it is a MaxPool2d", x)
    assert_declined(stock, "transUpBlocks.0", "convTrans: it is a ConvTranspose2d", x)


class ScaledLayer(wild.Bottleneck):
    """Of the right structure, with a setting that may change what it computes."""

    def __init__(self, channels: int, growth_rate: int) -> None:
        super().__init__(channels, growth_rate)
        self.scale = 1.0


class DroppedLayer(wild.Bottleneck):
    """Skips itself at random: the same output whenever it does not."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if not self.training or torch.rand(()) > 0 else out.detach()


class LateLayer(wild.Bottleneck):
    """Puts the new features in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, 1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (DroppedLayer, "on a probe in train mode it differs by"),
        (LateLayer, "on a probe in eval mode it differs by"),
    ],
)
def test_the_right_structure_that_computes_something_else(layer: type[nn.Module], reason: str) -> None:
    stock = nn.Sequential(nn.Sequential(layer(8, 4), layer(12, 4)))
    assert_declined(stock, "0", reason, torch.randn(2, 8, 5, 6))


def test_settings_of_unknown_meaning() -> None:
    """One that is not named like a dense block is nothing of interest then; one that is gets its reason."""

    class DenseBlock(nn.Sequential):
        pass

    plain = nn.Sequential(ScaledLayer(8, 4), ScaledLayer(12, 4))
    assert not findings(plain)
    named = nn.Sequential(DenseBlock(ScaledLayer(8, 4), ScaledLayer(12, 4)))
    assert_declined(named, "0", "it has a setting of unknown meaning, scale", torch.randn(2, 8, 5, 6))


def test_on_the_meta_device_only_what_is_known_by_name() -> None:
    with torch.device("meta"):
        known, unknown = SOURCES["MONAI"].make(), wild.KuangliuDenseNet()
    assert findings(known)["features.denseblock1"].verdict == "convertible"
    assert blocks(fastdense.convert(known))
    reason = findings(unknown)["stages.0"].reason
    assert reason == "without values it cannot be told what it computes"


def test_networks_of_other_kinds_are_not_listed() -> None:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    for model in (models.resnet18(), models.mobilenet_v3_small(), models.vit_b_16()):
        assert not findings(model)


# -- what is special of a library --------------------------------------------------------------------------------------


def test_timms_own_methods() -> None:
    source = SOURCES["timm"]
    stock = source.build().double().eval()
    fast = fastdense.convert(stock)
    x = source.images().double()
    for ours, theirs in zip(fast.forward_intermediates(x)[1], stock.forward_intermediates(x)[1], strict=True):
        assert parity.relative_error(ours, theirs) <= EXACT
    fast.reset_classifier(7)
    assert fast.double()(x).shape == (2, 7)
    fast.prune_intermediate_layers([1])
    assert isinstance(fast.features, nn.Sequential)
    assert fast.forward_features(x).shape == stock.forward_intermediates(x)[1][1].shape


def test_timms_feature_lists() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    stock = timm.create_model("densenet121", features_only=True, growth_rate=8, block_config=(2, 2, 2, 2))
    fast = fastdense.convert(stock)
    assert len(blocks(fast)) == 4
    x = SOURCES["timm"].images()
    for ours, theirs in zip(fast.eval().double()(x.double()), stock.eval().double()(x.double()), strict=True):
        assert parity.relative_error(ours, theirs) <= EXACT


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of activations that a training forward keeps for its backward."""
    return saved_activation_bytes(model, lambda: model(x))


@each_source
def test_less_is_saved(source: Source) -> None:
    stock = source.build().train()
    x = source.images()
    assert saved_bytes(fastdense.convert(stock), x) < 0.7 * saved_bytes(stock, x)


def test_timms_checkpointing_recomputes_and_counts_once() -> None:
    source = SOURCES["timm"]
    fast = fastdense.convert(source.build()).train()
    plain = saved_bytes(fast, source.images())
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    fast.set_grad_checkpointing()
    assert saved_bytes(fast, source.images()) < 0.7 * plain
    fast(source.images()).sum().backward()
    for name, buffer in fast.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == before[name] + 2


def test_timms_synchronised_norms() -> None:
    """timm's conversion keeps the ReLU; torch's drops it, of timm's own network too."""
    timm_layers = pytest.importorskip("timm.layers", reason="needs timm")
    source = SOURCES["timm"]
    stock = source.build().double().eval()
    x = source.images().double()
    kept = timm_layers.convert_sync_batchnorm(fastdense.convert(stock))
    assert type(kept.features.norm5).__name__ == "SyncBatchNormAct"
    assert parity.relative_error(kept(x), stock(x)) <= EXACT
    assert findings(kept)["features.denseblock1"].reason == ""
    dropped = nn.SyncBatchNorm.convert_sync_batchnorm(fastdense.convert(stock))
    with pytest.warns(FallbackWarning, match="norm1: it has no ReLU"):
        out = dropped(x)
    assert torch.equal(out, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock))(x))


def test_torchxrayvisions_forward_around_the_network(tmp_path: Path) -> None:
    """Operating points, resized images and features, of an instance unpickled as the library does."""
    source = SOURCES["torchxrayvision"]
    model = source.build(in_channels=1, op_threshs=torch.linspace(0.1, 0.9, 5)).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for module in (model, loaded):
        module.input_resolution = 48
    fast = fastdense.convert(loaded)
    assert torch.equal(fast.op_threshs, model.op_threshs)
    x = source.images()[:, :1] * 500
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.features2(x), model.features2(x), rtol=1e-4, atol=1e-5)


def test_encoders_call_the_parts_of_converted_transitions() -> None:
    source = SOURCES["segmentation_models_pytorch"]
    fast = fastdense.convert(source.build()).eval()
    transition = fast.encoder.features.transition1
    assert isinstance(transition, FusedTransition)
    x = torch.randn(2, 32, 6, 6)
    parts = transition.pool(transition.conv(transition.relu(transition.norm(x))))
    torch.testing.assert_close(transition(x), parts, rtol=1e-4, atol=1e-5)
