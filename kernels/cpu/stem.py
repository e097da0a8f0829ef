"""A stem at running statistics: convolution, norm, ReLU and pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Norm, conv_sizes
from .arguments import Norms, in_three_dimensions, pixels
from .library import DTYPES, StemArgs
from .packing import Prepared


class PreparedStem(Prepared):
    """A stem at given statistics, ready to be called with tensors of ``x_dtype``."""

    kernel = "stem"

    def __init__(
        self,
        norm: Norm,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        x_dtype: torch.dtype,
        dtype: torch.dtype,
        changeable: bool = True,
    ):
        super().__init__(Norms.of([norm]), [weight], dtype, changeable, as_matrix=True)
        self.in_dtype, self.out_dtype = x_dtype, dtype
        self._window = weight.shape[2:], stride, padding
        names = "kernel", "stride", "padding"
        windows = {
            f"{name}_{axis}": size
            for name, flat, sizes in zip(names, (1, 1, 0), self._window, strict=True)
            for axis, size in zip("dhw", in_three_dimensions(sizes, flat), strict=True)
        }
        self.args = StemArgs(
            channels=weight.shape[1],
            out_channels=weight.shape[0],
            **windows,
            norm=self.norms.array[0],
            conv=self.packed[0].data_ptr(),
            store=DTYPES[x_dtype],
            compute=DTYPES[dtype],
            norm_dtype=self.norms.dtype,
        )

    def source(self, x: Tensor) -> Tensor:
        """Channels innermost or outermost."""
        return x.detach() if self.is_planar(x) and x.dtype == self.in_dtype else pixels(x, self.in_dtype)

    def is_planar(self, source: Tensor) -> bool:
        """Whether its channels are outermost."""
        return source.is_contiguous() and not source.movedim(1, -1).is_contiguous()

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[N, C, *spatial] -> [N, C', *ceil(size' / 2)] of the convolution's output's size'."""
        sizes = conv_sizes(shape[2:], *self._window)
        return (shape[0], self.args.out_channels, *((size + 1) // 2 for size in sizes))


def stem_inference(
    x: Tensor, norm: Norm, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """[N, C, *spatial], [C', C, *kernel] -> [N, C', *ceil(size' / 2)] of ``dtype``."""
    return PreparedStem(norm, weight, stride, padding, x.dtype, dtype, changeable=False)(x)
