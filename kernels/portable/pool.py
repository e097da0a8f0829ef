"""The pools of a DenseNet, in 1, 2 or 3 dimensions, over channels-last memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def avg_pool(z: Tensor) -> Tensor:
    """The average pool of 2, as a transition's."""
    if z.dim() == 3:
        return F.avg_pool2d(z.unsqueeze(2), (1, 2)).squeeze(2)
    if z.dim() == 4:
        return F.avg_pool2d(z, 2)
    pooled = F.avg_pool2d(_slices(z), 2)  # PyTorch's pool of volumes knows no channels-last memory
    return pooled.movedim(1, -1).view(len(z), -1, 2, *pooled.shape[2:], z.shape[1]).mean(2).movedim(-1, 1)


def avg_pool_backward(dout: Tensor, z: Tensor, out: Tensor) -> None:
    """The gradient of z, dense in channels-last memory, from that of :func:`avg_pool`."""
    if z.dim() == 3:
        _avg_pool_backward(dout.unsqueeze(2), z.unsqueeze(2), [1, 2], out.unsqueeze(2))
    elif z.dim() == 4:
        _avg_pool_backward(dout, z, [2, 2], out)
    else:
        even = z.shape[2] // 2 * 2
        dpooled = (dout / 2).movedim(1, -1).repeat_interleave(2, 1).flatten(0, 1).movedim(-1, 1)
        slices = _slices(z)
        dslices = _avg_pool_backward(dpooled, slices, [2, 2], torch.empty_like(slices))
        out[:, :, :even] = dslices.movedim(1, -1).unflatten(0, (len(z), -1)).movedim(-1, 1)
        out[:, :, even:] = 0


def _slices(z: Tensor) -> Tensor:
    """[N, C, D, H, W] as images [N * D, C, H, W], without the last of an odd number."""
    return z[:, :, : z.shape[2] // 2 * 2].movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def _avg_pool_backward(dout: Tensor, z: Tensor, size: list[int], out: Tensor) -> Tensor:
    backward = torch.ops.aten.avg_pool2d_backward.grad_input
    return backward(dout, z, size, size, [0, 0], False, True, None, grad_input=out)


def max_pool(z: Tensor) -> tuple[Tensor, Tensor]:
    """The max pool of 3 with stride 2 and padding 1, as the stem's, and where in z the maxima are."""
    if z.dim() == 3:
        out, argmax = torch.ops.aten.max_pool2d_with_indices(z.unsqueeze(2), [1, 3], [1, 2], [0, 1])
        return out.squeeze(2), argmax.squeeze(2)
    pool = torch.ops.aten.max_pool2d_with_indices if z.dim() == 4 else torch.ops.aten.max_pool3d_with_indices
    three, two, one = ([size] * (z.dim() - 2) for size in (3, 2, 1))
    return pool(z, three, two, one)


def max_pool_backward(dout: Tensor, z: Tensor, argmax: Tensor, out: Tensor) -> None:
    """The gradient of z, dense in channels-last memory, from that of :func:`max_pool`."""
    if z.dim() == 3:
        planar = [tensor.unsqueeze(2) for tensor in (dout, z)]
        backward, sizes = torch.ops.aten.max_pool2d_with_indices_backward.grad_input, ([1, 3], [1, 2], [0, 1], [1, 1])
        backward(*planar, *sizes, False, argmax.unsqueeze(2), grad_input=out.unsqueeze(2))
        return
    backward = torch.ops.aten.max_pool2d_with_indices_backward.grad_input
    if z.dim() == 5:
        backward = torch.ops.aten.max_pool3d_with_indices_backward.grad_input
    three, two, one = ([size] * (z.dim() - 2) for size in (3, 2, 1))
    backward(dout, z, three, two, one, one, False, argmax, grad_input=out)
