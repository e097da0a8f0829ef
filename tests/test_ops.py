"""The ops as PyTorch sees them: ``opcheck`` of the very calls that the modules make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdense import FastDenseNet

pytestmark = pytest.mark.filterwarnings("error::fastdense.FallbackWarning")

DIFFERENTIABLE = {"dense_block", "transition", "stem_tail", "head"}
OTHERS = {f"{op}_backward" for op in DIFFERENTIABLE} | {"dense_block_inference", "stem_inference", "channel_stats"}

SITUATIONS: dict[str, dict[str, Any]] = {
    "train": {},
    "eval": dict(train=False),
    "autocast": dict(autocast=True),
    "no bottleneck": dict(bn_size=None),
    "memory efficient": dict(memory_efficient=True),
    "dropout": dict(drop_rate=0.3, drop_every_conv=True),
    "sequences": dict(spatial_dims=1),
    "volumes": dict(spatial_dims=3),
    "volumes, eval": dict(spatial_dims=3, train=False),
}
every_situation = pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)

Calls = dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]


def calls_of_a_network(
    op_calls: Callable[[], Any], device: str, *, train: bool = True, autocast: bool = False, **options: Any
) -> Calls:
    """The last call of each op in a training step, followed in eval mode by an inference, by the op's name."""
    torch.manual_seed(0)
    net = FastDenseNet(3, (2, 1), 4, num_classes=3, **options).to(device).train(train)
    x = torch.randn(2, 3, *(32, 28, 33)[: options.get("spatial_dims", 2)], device=device)
    with op_calls() as calls:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = net(x)
        out.float().square().sum().backward()
        if not train:
            with torch.no_grad():
                net(x)
    return {op.name().removeprefix("fastdense::"): (op, args, kwargs) for op, args, kwargs in calls}


def leaves(argument: Any, requires_grad: bool) -> Any:
    """A copy of an argument in which every floating-point tensor is a leaf."""
    if isinstance(argument, Tensor):
        return argument.detach().clone().requires_grad_(requires_grad and argument.is_floating_point())
    if isinstance(argument, list | tuple):
        return [leaves(item, requires_grad) for item in argument]
    return argument


@every_situation
def test_opcheck(situation, device, op_calls):
    for op, args, kwargs in calls_of_a_network(op_calls, device, **situation).values():
        torch.library.opcheck(op, tuple(leaves(args, requires_grad=False)), kwargs)


@every_situation
def test_opcheck_where_gradients_are_required(situation, device, op_calls):
    """Of ops that cannot be differentiated it asks no backward: that is an error, tested below."""
    for name, (op, args, kwargs) in calls_of_a_network(op_calls, device, **situation).items():
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if name in DIFFERENTIABLE:
            utilities.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, tuple(leaves(args, requires_grad=True)), kwargs, test_utils=utilities)


@every_situation
def test_what_cannot_be_differentiated_says_so(situation, op_calls):
    for name, (op, args, kwargs) in calls_of_a_network(op_calls, "cpu", **situation).items():
        if name in OTHERS:
            out = op(*leaves(args, requires_grad=True), **kwargs)
            out = out if isinstance(out, Tensor) else out[0]
            with pytest.raises(RuntimeError, match=f"fastdense::{name} is not differentiable"):
                out.sum().backward()


def test_the_situations_call_every_op(op_calls):
    called = set().union(*(calls_of_a_network(op_calls, "cpu", **situation) for situation in SITUATIONS.values()))
    schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
    registered = {name.removeprefix("fastdense::") for name in schemas if name.startswith("fastdense::")}
    assert called == registered == DIFFERENTIABLE | OTHERS


@every_situation
def test_outputs_are_fresh(situation, op_calls):
    """No output shares memory with an input or with another output, and no input is written to."""
    for op, args, kwargs in calls_of_a_network(op_calls, "cpu", **situation).values():
        inputs = leaves(args, requires_grad=False)
        given = leaves(inputs, requires_grad=False)
        outputs = list(tensors_in(op(*inputs, **kwargs)))
        storages = [t.untyped_storage().data_ptr() for t in (*tensors_in(inputs), *outputs) if t.numel()]
        assert len(set(storages)) == len(storages)
        assert all(torch.equal(a, b) for a, b in zip(tensors_in(inputs), tensors_in(given), strict=True))


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []
