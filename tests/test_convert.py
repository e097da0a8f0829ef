"""Converting torchvision's and our own networks, and back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastdense
from fastdense import parity, reference

torchvision_models = pytest.importorskip("torchvision.models", reason="needs torchvision")

ARCHITECTURES = ("densenet121", "densenet161", "densenet169", "densenet201")


def small(**kwargs):
    """A torchvision DenseNet of two short blocks."""
    torch.manual_seed(0)
    return torchvision_models.DenseNet(8, (2, 3), 16, 4, num_classes=5, **kwargs)


def verdicts(model):
    return {finding.path: finding.verdict for finding in fastdense.explain(model).findings}


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_torchvision_networks_convert_whole_within_budget(arch, x):
    torch.manual_seed(0)
    stock = getattr(torchvision_models, arch)()
    fast = fastdense.convert(stock)
    assert type(fast) is fastdense.FastDenseNet
    assert type(stock).__module__.startswith("torchvision")
    assert set(verdicts(fast).values()) == {"fast"}
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), stock.state_dict().values(), strict=True))
    inputs = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    stock.eval(), fast.eval()
    rows = parity.check(fast, stock, inputs, dtype=torch.float32, backward=False)
    assert not list(parity.failures(rows))
    with torch.no_grad():
        assert torch.equal(fastdense.to_reference(fast)(x), reference_of(stock)(x))


def reference_of(stock):
    """The same weights in the reference's DenseNet, which torchvision's equals operation by operation."""
    layers = [len(b) for n, b in stock.features.named_children() if n.startswith("denseblock")]
    first = stock.features.denseblock1.denselayer1
    model = reference.DenseNet(first.conv2.out_channels, layers, first.norm1.num_features)
    model.load_state_dict(stock.state_dict())
    return model.train(stock.training)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"memory_efficient": True}, {"drop_rate": 0.3}], ids=str)
def test_converted_gradients_and_statistics(train, kwargs, x):
    stock = small(drop_rate=kwargs.get("drop_rate", 0.0)).train(train)
    fast = fastdense.convert(small(**kwargs)).train(train)
    rows = parity.check(fast, stock, x, dtype=torch.float64, memory_formats=[torch.contiguous_format])
    assert not list(parity.failures(rows))
    assert any(row.name.startswith("grad features.denseblock2") for row in rows)


def test_inplace_keeps_identity_parameters_and_hooks(x):
    stock = small().eval()
    calls = []
    stock.register_forward_hook(lambda *_: calls.append("model"))
    stock.features.denseblock1.register_forward_hook(lambda *_: calls.append("block"))
    parameters = list(stock.parameters())
    with torch.no_grad():
        expected = stock(x)
    converted = fastdense.convert(stock, inplace=True)
    assert converted is stock
    assert type(stock) is fastdense.FastDenseNet
    assert all(a is b for a, b in zip(parameters, stock.parameters(), strict=True))
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(stock(x), expected)
    assert calls == ["block", "model"]


def test_copy_leaves_the_original_alone(x):
    stock = small()
    before = copy.deepcopy(stock.state_dict())
    rng = torch.get_rng_state()
    fast = fastdense.convert(stock)
    assert type(stock) is torchvision_models.DenseNet
    assert stock.training
    assert fast.training
    assert all(torch.equal(before[k], v) for k, v in stock.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in fast.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()), "the check must not consume random numbers"
    fast(x).sum().backward()
    assert all(p.grad is None for p in stock.parameters())


def test_nested_models_and_subclasses_convert_their_parts(x):
    class Doubled(torchvision_models.DenseNet):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Doubled(8, (2, 2), 16, 4, num_classes=5), "b": nn.Sequential(small())}).eval()
    fast = fastdense.convert(model)
    assert type(fast["a"]) is Doubled
    assert type(fast["a"].features.denseblock1) is fastdense.FastDenseBlock
    assert type(fast["b"][0]) is fastdense.FastDenseNet
    assert verdicts(model)["a"] == "left alone"
    with torch.no_grad():
        torch.testing.assert_close(fast["a"](x), model["a"](x))
        torch.testing.assert_close(fast["b"](x), model["b"](x))


def replace_conv(block):
    block.denselayer1.conv2 = nn.Conv2d(32, 8, 3, padding=1)


def dilate(block):
    block.denselayer2.conv2 = nn.Conv2d(32, 8, 3, padding=2, dilation=2, bias=False)


def swish(block):
    block.denselayer1.relu1 = nn.SiLU()


def group_norm(block):
    block.denselayer2.norm1 = nn.GroupNorm(4, block.denselayer2.norm1.num_features)


def add_child(block):
    block.denselayer1.add_module("extra", nn.Identity())


def hook(block):
    block.denselayer1.conv1.register_forward_hook(lambda *_: None)


def parametrise(block):
    nn.utils.parametrizations.weight_norm(block.denselayer1.conv1)


def other_forward(block):
    block.denselayer1.forward = lambda features: torch.zeros(1)


def foreign_layer(block):
    block["denselayer2"] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_conv, "conv2: it has a bias"),
        (dilate, "conv2: its "),
        (swish, "relu1: it is a SiLU"),
        (group_norm, "norm1: it is a GroupNorm"),
        (add_child, "its children are norm1, relu1, conv1, norm2, relu2, conv2, extra"),
        (hook, "conv1: it has hooks"),
        (parametrise, "conv1: it is a ParametrizedConv2d"),
        (other_forward, "its forward was replaced"),
        (foreign_layer, "denselayer2 is a Identity"),
    ],
)
def test_what_is_not_recognised_is_left_alone_with_its_reason(change, reason):
    stock = small()
    change(stock.features.denseblock1)
    findings = {f.path: f for f in fastdense.explain(stock).findings}
    assert findings["features.denseblock1"].verdict == "left alone"
    assert reason in findings["features.denseblock1"].reason
    assert findings["features.denseblock2"].verdict == "convertible"
    fast = fastdense.convert(stock)
    assert type(fast.features.denseblock1) is type(stock.features.denseblock1)
    assert type(fast.features.denseblock2) is fastdense.FastDenseBlock


def test_a_block_that_computes_something_else_fails_its_probe(monkeypatch):
    """The numerical check is the last line: same structure, other arithmetic."""
    stock = small()
    block_class = type(stock.features.denseblock1)
    original = block_class.forward
    monkeypatch.setattr(block_class, "forward", lambda self, features: original(self, features).flip(1))
    finding = next(f for f in fastdense.explain(stock).findings if f.path == "features.denseblock1")
    assert finding.verdict == "left alone"
    assert "on a probe in eval mode it differs by" in finding.reason


def test_replaced_head_and_stem_survive(x):
    stock = small()
    stock.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(stock.classifier.in_features, 3), nn.Sigmoid())
    stock.features.conv0 = nn.Conv2d(1, 16, 7, stride=2, padding=3, bias=False)
    stock.features.norm5 = nn.Identity()
    stock.eval()
    fast = fastdense.convert(stock)
    assert type(fast) is fastdense.FastDenseNet
    with torch.no_grad():
        torch.testing.assert_close(fast(x[:, :1]), stock(x[:, :1]))
        torch.testing.assert_close(fast.features(x[:, :1]), stock.features(x[:, :1]))


def test_explain_lists_what_is_fast_and_what_fell_back():
    fast = fastdense.convert(small())
    fast.features.denseblock1.denselayer1.conv1.register_forward_hook(lambda *_: None)
    findings = {f.path: f for f in fastdense.explain(fast).findings}
    assert findings["features.denseblock1"].verdict == "fast"
    assert "conv1: it has hooks" in findings["features.denseblock1"].reason
    assert "it has hooks" in str(fastdense.explain(fast))
    assert "nothing in this model" in str(fastdense.explain(nn.Linear(2, 2)))


def test_unknown_dense_blocks_are_named():
    class DenseBlock(nn.Module):
        def forward(self, x):
            return x

    findings = fastdense.explain(nn.Sequential(DenseBlock())).findings
    assert [(f.path, f.verdict, f.reason) for f in findings] == [
        ("0", "left alone", "this class is not known and may compute anything")
    ]


def test_reference_networks_convert_and_return(x):
    torch.manual_seed(0)
    stock = reference.DenseNet(6, (2, 2), 12, None, num_classes=4, small_inputs=True, drop_every_conv=True)
    fast = fastdense.convert(stock)
    assert type(fast) is fastdense.FastDenseNet
    assert not list(parity.failures(parity.check(fast, stock, x, dtype=torch.float64)))
    back = fastdense.to_reference(fast)
    assert {type(m) for m in back.modules()} == {type(m) for m in stock.modules()}
    assert torch.equal(back.eval()(x), stock.eval()(x))


def test_converted_models_copy_pickle_and_move(x):
    fast = fastdense.convert(small()).eval()
    with torch.no_grad():
        expected = fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x), expected)
        torch.testing.assert_close(fast.double()(x.double()).float(), expected)


def test_models_on_the_meta_device_convert_by_structure():
    with torch.device("meta"):
        stock = small()
    assert set(verdicts(stock).values()) == {"convertible"}
    assert type(fastdense.convert(stock)) is fastdense.FastDenseNet
