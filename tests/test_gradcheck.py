"""The maths: every module against finite differences in float64. And what the ops say of wrong shapes."""

import pytest
import torch
from torch import nn

import fastdense
from fastdense import ops
from fastdense.ends import head, stem_tail
from fastdense.kernels.contract import Norm
from fastdense.served import BatchNorm

MODES = ("train", "frozen", "mixed")
every_dimension = pytest.mark.parametrize("dims", [1, 2, 3], ids="{}-D".format)


def set_mode(module, mode):
    """Frozen: all norms use running statistics. Mixed: every other one does, with epsilons that all differ."""
    generator = torch.Generator().manual_seed(0)
    for i, norm in enumerate(m for m in module.modules() if isinstance(m, BatchNorm)):
        norm.train(mode == "train" or (mode == "mixed" and i % 2 == 0))
        if mode == "mixed":
            norm.eps = 1e-5 * 10 ** (i % 4)
        if norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
        if norm.affine:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(0, 0.5, generator=generator)


def assert_gradients(module, x, run=None):
    """gradcheck with respect to the input and every parameter. Its differences must not update statistics."""
    for m in module.modules():
        if isinstance(m, BatchNorm) and m.running_mean is not None:
            m.momentum = 0.0
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *values):
        return (
            torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)) if run is None else run(x)
        )

    assert torch.autograd.gradcheck(function, (x, *parameters) if run is None else (x,), fast_mode=False, atol=1e-6)


def features(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"memory_efficient": True}, {"bn_size": None}],
    ids=["bottleneck", "recomputed", "no bottleneck"],
)
@every_dimension
def test_block(dims, mode, kwargs):
    torch.manual_seed(0)
    layers = 3 if dims < 3 else 2  # of volumes, a third as many finite differences
    options = {"bn_size": 2, "growth_rate": 2, "spatial_dims": dims, **kwargs}
    block = fastdense.FastDenseBlock(layers, 3, **options).double()
    set_mode(block, mode)
    assert_gradients(block, features(2, 3, *(3, 4, 2)[:dims]))


@pytest.mark.parametrize("bn_size", [2, None])
@every_dimension
def test_block_with_dropout(dims, bn_size):
    torch.manual_seed(0)
    options = dict(drop_rate=0.4, drop_every_conv=True, spatial_dims=dims)
    block = fastdense.FastDenseBlock(2, 3, bn_size, 2, **options).double()
    set_mode(block, "train")

    def run(x):
        torch.manual_seed(5)
        return block(x)

    assert_gradients(block, features(2, 3, *(3, 4, 2)[:dims]), run)


@pytest.mark.parametrize("mode", ["train", "frozen"])
@every_dimension
def test_transition(dims, mode):
    torch.manual_seed(0)
    transition = fastdense.FastTransition(4, 3, spatial_dims=dims).double()
    set_mode(transition, mode)
    assert_gradients(transition, features(2, 4, *(5, 4, 3)[:dims]))


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class StemTail(nn.Module):
    def __init__(self, channels, dims):
        super().__init__()
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
        self.norm, self.relu, self.pool = NORMS[dims - 1](channels), nn.ReLU(), pool(3, 2, 1)

    def forward(self, x):
        return stem_tail((self.norm, self.relu, self.pool), x)


class Head(nn.Module):
    def __init__(self, channels, dims):
        super().__init__()
        self.norm = NORMS[dims - 1](channels)

    def forward(self, x):
        return head(self.norm, x, None)


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("kind", [StemTail, Head])
@every_dimension
def test_stem_tail_and_head(dims, kind, mode):
    module = kind(3, dims).double()
    set_mode(module, mode)
    assert_gradients(module, features(2, 3, *(5, 6, 3)[:dims]))


@every_dimension
def test_a_whole_network_equals_the_reference_in_float64(dims):
    """Statistics and layouts cross the borders of the modules."""
    torch.manual_seed(0)
    stock = fastdense.reference.DenseNet(3, (2, 2), 4, 2, num_classes=3, spatial_dims=dims).double()
    fast = fastdense.FastDenseNet(3, (2, 2), 4, 2, num_classes=3, spatial_dims=dims).double()
    fast.load_state_dict(stock.state_dict())
    x = features(3, 3, *(32, 40, 33)[:dims])
    for mode in MODES:
        gradients = []
        for model in (stock, fast):
            set_mode(model, mode)
            out = model(x)
            gradients.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


# -- errors name what was expected and what came -----------------------------------------------------------------


def test_wrong_shapes():
    x = torch.randn(2, 3, 4, 3)
    block = fastdense.FastDenseBlock(2, 3, 2, 2)
    layers = block._gather(block.dense_layers(), x, channels_last=False)
    run = {"dtype": torch.float32, "save_bottleneck": True, "backend": "torch"}
    with pytest.raises(ValueError, match=r"dense_block: x must be \[N, C, H, W\], .* got shape \[4, 3\]"):
        ops.dense_block(x[0, 0], layers, **run)
    expected = r"layer 0: conv1_weight must be \[4, 3, 1\] for x \[2, 3, 12\], got \[4, 3, 1, 1\]"
    with pytest.raises(ValueError, match=expected):
        ops.dense_block(x.flatten(2), layers, **run)
    expected = r"layer 0: norm1_weight must be \[2\] for x \[2, 2, 4, 3\], got \[3\]"
    with pytest.raises(ValueError, match=expected):
        ops.dense_block(x[:, :2], layers, **run)
    with pytest.raises(ValueError, match="every norm must use running statistics"):
        ops.dense_block_inference(x, layers, dtype=torch.float32, backend="torch")
    with pytest.raises(ValueError, match=r"no kernels for backend 'none'; there are .*torch"):
        ops.dense_block(x, layers, **{**run, "backend": "none"})
    norm = Norm(*[torch.ones(3)] * 4, 1e-5, False)
    with pytest.raises(ValueError, match=r"transition: conv_weight must be \[C', 3, 1, 1\], got shape \[2, 4, 1, 1\]"):
        ops.transition(x, norm, torch.ones(2, 4, 1, 1), dtype=torch.float32, backend="torch")
    with pytest.raises(ValueError, match="transition: spatial dimensions must be at least 2"):
        ops.transition(x[:, :, :1], norm, torch.ones(2, 3, 1, 1), dtype=torch.float32, backend="torch")
    stem = dict(stride=[2, 2], padding=[0, 0], dtype=torch.float32, backend="torch")
    for weight, message in (
        (torch.ones(3, 2, 1, 1), r"conv_weight must be \[C', 3, \*kernel\] for x .*, got shape \[3, 2, 1, 1\]"),
        (torch.ones(2, 3, 1, 1), r"norm weight must be \[2\] like the outputs of conv_weight .*, got shape \[3\]"),
        (torch.ones(3, 3, 5, 1), r"x .* is smaller than the kernel \[5, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"stem_inference: {message}"):
            ops.stem_inference(x, norm, weight, **stem)
    with pytest.raises(ValueError, match=r"stem_inference: stride must have 2 values, got \[2\]"):
        ops.stem_inference(x, norm, torch.ones(3, 3, 1, 1), **{**stem, "stride": [2]})
    with pytest.raises(ValueError, match=r"stem_inference: x must be \[N, C, H, W\], .*, got shape \[2, 3\]"):
        ops.stem_inference(x[:, :, 0, 0], norm, torch.ones(3, 3), **stem)
    with pytest.raises(ValueError, match=r"head: norm weight must be \[2\] like the channels of x"):
        ops.head(x[:, :2], norm, backend="torch")
