"""When the reference runs instead: on request, or with one warning where the ops would bypass something."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune as prune_module

import fastdense
from fastdense import FallbackWarning, backends, norms, reference
from fastdense.kernels.cpu import library as cpu_library


@pytest.fixture
def pair():
    torch.manual_seed(0)
    stock = reference.DenseBlock(2, 6, 2, 4)
    return stock, fastdense.convert(stock)


@pytest.fixture
def x():
    return torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(1))


def assert_falls_back(fast, stock, x, reason):
    """The reference's very numbers, one warning in all, and the reason in it."""
    for block in (fast, stock):
        block.train()
    with pytest.warns(FallbackWarning, match=reason) as caught:
        first = fast(x)
    assert len(caught) == 1
    assert torch.equal(first, stock(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(x), stock(x))


@pytest.mark.parametrize("child", ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_on_inner_modules_fire(pair, x, child, register):
    stock, fast = pair
    calls = []
    for layer in fast.values():
        for name in ("relu1", "relu2"):
            getattr(layer, name).inplace = False  # backward hooks want it
    getattr(getattr(fast.denselayer2, child), register)(lambda *_: calls.append(child))
    with pytest.warns(FallbackWarning, match=f"denselayer2: {child}: it has hooks"):
        out = fast(x.requires_grad_())
    out.sum().backward()
    assert calls == [child]
    torch.testing.assert_close(out, stock(x))


def test_hooks_on_a_layer_fire(pair, x):
    stock, fast = pair
    seen = []
    fast.denselayer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert_falls_back(fast, stock, x, "denselayer1: it has hooks")
    assert seen == [(2, 4, 5, 4)] * 2


def test_removing_the_hook_is_fast_again(pair, x):
    _, fast = pair
    handle = fast.denselayer1.conv1.register_forward_hook(lambda *_: None)
    with pytest.warns(FallbackWarning):
        fast(x)
    handle.remove()
    assert is_fast(fast, x)


def test_global_hooks_fire(pair, x):
    _, fast = pair
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with pytest.warns(FallbackWarning, match="modules have global hooks"):
            fast(x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 4


def test_hooks_on_the_block_itself_stay_fast(pair, x):
    _, fast = pair
    seen = []
    fast.register_forward_hook(lambda *_: seen.append("forward"))
    fast.register_full_backward_hook(lambda *_: seen.append("backward"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        fast(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


def weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer.conv1)


def prune(layer):
    prune_module.l1_unstructured(layer.conv2, "weight", amount=0.5)


def other_activation(layer):
    layer.relu1 = nn.LeakyReLU()


def other_norm(layer):
    layer.norm2 = nn.InstanceNorm2d(8, affine=True)


def norm_with_activation(layer):
    class BatchNormAct2d(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.silu(super().forward(x))

    layer.norm1 = BatchNormAct2d(layer.norm1.num_features)


def with_bias(layer):
    layer.conv2 = nn.Conv2d(8, 4, 3, padding=1)


def reflect(layer):
    layer.conv2.padding_mode = "reflect"
    layer.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def wider_kernel(layer):
    layer.conv2 = nn.Conv2d(8, 4, 5, padding=2, bias=False)


def own_forward(layer):
    layer.forward = lambda features: torch.ones(2, 4, 5, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (weight_norm, "conv1: it is a ParametrizedConv2d"),
        (prune, "conv2: it has hooks"),
        (other_activation, "relu1: it is a LeakyReLU"),
        (other_norm, "norm2: it is a InstanceNorm2d"),
        (norm_with_activation, "norm1: it is a BatchNormAct2d"),
        (with_bias, "conv2: it has a bias"),
        (reflect, "conv2: its padding_mode is reflect"),
        (wider_kernel, r"conv2: its kernel_size is \(5, 5\)"),
        (own_forward, "denselayer2: its forward was replaced"),
    ],
)
def test_changed_layers(pair, x, change, reason):
    stock, fast = pair
    for block in (stock, fast):
        torch.manual_seed(3)
        change(block.denselayer2)
    assert_falls_back(fast, stock, x, reason)


def test_layers_of_another_class_and_uneven_modes(pair, x):
    stock, fast = pair

    class Layer(reference.DenseLayer):
        def forward(self, features):
            return 2 * super().forward(features)

    for block in (stock, fast):
        block.denselayer1.__class__ = Layer
    assert_falls_back(fast, stock, x, "denselayer1 is a Layer")
    uneven = fastdense.FastDenseBlock(2, 6, 2, 4, drop_rate=0.5)
    uneven.denselayer2.eval()
    with pytest.warns(FallbackWarning, match="denselayer2 differs from denselayer1"):
        uneven(x)


def test_normalised_over_different_processes(pair, x, monkeypatch):
    stock, fast = pair
    other = fast.denselayer2.norm1
    monkeypatch.setattr(norms, "group_of", lambda norm: "other" if norm is other else "")
    assert_falls_back(fast, stock, x, "its norms take their statistics over different processes")


def test_transition_stem_and_head_with_hooks():
    torch.manual_seed(0)
    stock = reference.DenseNet(4, (2, 2), 8, 2, num_classes=3).eval()
    fast = fastdense.convert(stock)
    x = torch.randn(2, 3, 32, 32)
    seen = []
    for name in ("relu0", "norm5", "transition1.conv", "transition1", "denseblock2", "norm0"):
        fast.features.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with pytest.warns(FallbackWarning, match="FastTransition runs the reference implementation.*conv: it has hooks"):
        out = fast(x)
    assert seen == ["norm0", "relu0", "transition1.conv", "transition1", "denseblock2", "norm5"]
    torch.testing.assert_close(out, stock(x))
    fast.features.register_forward_hook(lambda *_: seen.append("features"))
    fast(x)
    assert seen[-1] == "features"


def test_feature_maps_and_gradients_for_visual_explanations():
    """Grad-CAM hooks the last norm and the block before it."""
    torch.manual_seed(0)
    stock = reference.DenseNet(4, (2, 2), 8, 2, num_classes=3).eval()
    fast = fastdense.convert(stock)
    x = torch.randn(2, 3, 32, 32)
    maps = []
    for model in (stock, fast):
        kept = {}

        def keep(module, inputs, output, kept=kept):
            output.retain_grad()
            kept["map"] = output

        model.features.denseblock2.register_forward_hook(keep)
        model(x)[:, 1].sum().backward()
        maps.append((kept["map"].detach(), kept["map"].grad))
    for a, b in zip(*maps, strict=True):
        torch.testing.assert_close(a, b)


# -- the choice of a backend -----------------------------------------------------------------------------------


def is_fast(block, x):
    return type(block(x).grad_fn).__name__ == "FusedDenseBlockBackward"


def test_use_backend_nests_and_restores(pair, x):
    _, fast = pair
    assert is_fast(fast, x)
    with fastdense.use_backend("reference"):
        assert not is_fast(fast, x)
        with fastdense.use_backend("torch"):
            assert is_fast(fast, x)
        assert not is_fast(fast, x)
        with pytest.raises(ValueError, match="got 'nonsense'"), fastdense.use_backend("auto"):
            fastdense.use_backend("nonsense").__enter__()
        assert not is_fast(fast, x)
    assert is_fast(fast, x)


def test_backward_runs_where_its_forward_ran(pair, x):
    _, fast = pair
    with fastdense.use_backend("torch"):
        out = fast(x)
    with fastdense.use_backend("reference"):
        out.sum().backward()
    assert fast.denselayer1.conv1.weight.grad is not None


def test_wrong_and_unavailable_backends(pair, x):
    with pytest.raises(ValueError, match="backend must be one of auto, triton, cpu, torch, reference, got 'cuda'"):
        fastdense.use_backend("cuda").__enter__()
    _, fast = pair
    for name in ("cpu", "triton"):
        with fastdense.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was asked for, but"):
            fast.double()(x.double())
    assert is_fast(fast.float(), x)


@pytest.mark.parametrize("dims", [1, 3])
def test_sequences_and_volumes_run_where_they_can(dims, randn):
    block, x = fastdense.FastDenseBlock(2, 6, 2, 4, spatial_dims=dims), randn(2, 6, *[5] * dims)
    assert is_fast(block, x)
    note = f"it computes in 2-D, not in {dims}-D"
    assert backends.Backend("triton", "a module", "").refuses(x.device, x.dtype, dims) == note
    assert backends._REGISTRY["triton"].spatial_dims == (2,)
    with fastdense.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for, but"):
        block(x)


def test_children_of_different_dimensions(pair, x):
    _, fast = pair
    fast.denselayer2.norm2 = torch.nn.BatchNorm3d(fast.denselayer2.norm2.num_features)
    with (
        pytest.warns(fastdense.FallbackWarning, match="denselayer2: its children have different spatial dimensions"),
        pytest.raises(ValueError, match="expected 5D input"),
    ):
        fast(x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_input_of_other_dimensions_is_pytorchs_error(dims, randn):
    fast, stock = (
        kind(2, 6, 2, 4, spatial_dims=dims) for kind in (fastdense.FastDenseBlock, fastdense.reference.DenseBlock)
    )
    for other in {1, 2, 3} - {dims}:
        messages = []
        for block in (fast, stock):
            with pytest.raises((ValueError, RuntimeError)) as error:
                block(randn(2, 6, *[5] * other))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("value", "printed"),
    [("reference", "False"), ("torch", "True"), ("", "True"), ("wrong", "ValueError: backend must be one of")],
)
def test_environment_variable(value, printed):
    program = (
        "import torch, fastdense\n"
        "try: print('DenseBlock' in str(fastdense.FastDenseBlock(1, 2, 2, 2)(torch.randn(2, 2, 3, 3)).grad_fn))\n"
        "except ValueError as error: print('ValueError:', error)\n"
    )
    environment = os.environ | {"FASTDENSE_BACKEND": value}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(printed)


def test_status_says_what_and_why(monkeypatch):
    status = fastdense.status()
    rows = status.as_dict()
    assert rows["fastdense"]["state"] == fastdense.__version__
    assert rows["backend torch"]["state"] == "available"
    assert "Triton" in rows["backend triton"]["note"]
    found = cpu_library.load()
    if isinstance(found, str):
        assert rows["backend cpu"] == {"state": "unavailable", "note": found}
    else:
        assert rows["backend cpu"] == {"state": "available", "note": f"C++ kernels for x86, on {found.isa}"}
    assert rows["chosen for cpu"] == {"state": "torch" if isinstance(found, str) else "cpu", "note": "automatic"}
    assert "backend reference" in str(status)
    with fastdense.use_backend("reference"):
        assert fastdense.status().as_dict()["chosen for cpu"]["state"] == "reference"
    with fastdense.use_backend("triton"), monkeypatch.context() as patch:
        patch.setitem(backends._REGISTRY, "triton", backends.Backend("triton", None, "it is not here"))
        note = fastdense.status().as_dict()["chosen for cpu"]["note"]
    assert note == "backend 'triton' was asked for, but it is not here"
    assert backends.names() == ("auto", "triton", "cpu", "torch", "reference")
