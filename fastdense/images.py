"""Real images that a package ships, so nothing is downloaded: scikit-learn's photographs and handwritten digits."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SMALLEST_CROP = 0.35  # of a photograph's height
_TEST_SHARE = 5  # one digit in five


def photographs(size: int, count: int) -> Tensor:
    """Square crops of ``china.jpg`` and ``flower.jpg`` in turn, resized and normalised as for ImageNet.

    The crops are always the same: ``photographs(size, n)`` begins with ``photographs(size, m)`` for m < n.

    Returns:
        [count, 3, size, size], float32.

    Raises:
        ImportError: scikit-learn or Pillow is missing.
    """
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in _datasets().load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = torch.empty(count, 3, size, size)
    for i in range(count):
        photo = photos[i % len(photos)]
        height, width = photo.shape[1:]
        scale, down, right = torch.rand(3, generator=generator).tolist()
        side = round((_SMALLEST_CROP + (1 - _SMALLEST_CROP) * scale) * height)
        top, left = round(down * (height - side)), round(right * (width - side))
        crop = photo[None, :, top : top + side, left : left + side]
        crops[i] = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)[0]
    return (crops - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 handwritten digits of 8x8 pixels, shuffled and split.

    Returns:
        ``train_x`` [1438, 1, 8, 8] and ``test_x`` [359, 1, 8, 8], uint8; ``train_y`` and ``test_y``, int64.

    Raises:
        ImportError: scikit-learn is missing.
    """
    data = _datasets().load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images * (255 / data.images.max())).round().to(torch.uint8)[order, None]
    y = torch.tensor(data.target, dtype=torch.int64)[order]
    held_out = len(y) // _TEST_SHARE
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


def _datasets() -> ModuleType:
    try:
        import PIL  # noqa: F401  scikit-learn decodes with it, and says less when it is missing
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"the sample images come with scikit-learn and are decoded by Pillow, but {error.name} is not installed: "
            "pip install 'fastdense[bench]'"
        ) from error
    return datasets
