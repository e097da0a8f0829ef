"""Data sets, and the batches of a step.

An epoch is an order of the images, cut into steps of ``batch``; a step is cut among the ranks, and a rank's share into
parts. Order and augmentation are drawn for the whole step from a generator seeded by (seed, epoch, step), so that
neither the number of ranks, nor of parts, nor of workers changes what is trained on.

CIFAR, SVHN and image folders are read by torchvision, without its checksums, which are the business of a download;
CIFAR's binary files, which torchvision does not know, are read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..images import IMAGENET_MEAN, IMAGENET_STD, digits
from .config import Config

Part = tuple[Tensor, Tensor]
"""Images [n, C, H, W], normalised float32, and their classes [n], int64."""

_FOLDER_CROP = 0.875  # of an image's shorter side, in evaluation


def seed_of(*numbers: int) -> int:
    """A seed from (seed, epoch, step, ...), all of whose bits depend on all of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Preprocess:
    """From an image file to a network's input; a checkpoint keeps it.

    Attributes:
        size: height and width.
        channels: 3 for colours, 1 for grey.
        mean, std: of each channel, of pixels in [0, 1].
        crop: the middle share of the image that is taken.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0

    def __call__(self, image: Any) -> Tensor:
        """A PIL image as [C, size, size]: its shorter side resized, its middle cut out, normalised."""
        from torchvision.transforms.v2 import functional as transforms

        image = image.convert("L" if self.channels == 1 else "RGB")
        image = transforms.resize(image, [round(self.size / self.crop)], antialias=True)
        return self.normalize(transforms.pil_to_tensor(transforms.center_crop(image, [self.size, self.size])))

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [..., C, H, W] as float32."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


class Step(NamedTuple):
    """Positions [n] in the training set of one optimizer step's images, and the seed of what is drawn for it."""

    positions: Tensor
    seed: int


class Images(Protocol):
    """Some images with their classes."""

    def __len__(self) -> int: ...

    def training(self, steps: Sequence[Step], rank: int, world: int, parts: int) -> Iterator[list[Part]]:
        """The parts of one rank's share of each step, augmented."""

    def evaluation(self, batches: Sequence[Tensor]) -> Iterator[Part]:
        """The images at these positions, as they are."""


@dataclass(frozen=True)
class Data:
    """A data set to train on."""

    train: Images
    test: Images
    classes: list[str]
    preprocess: Preprocess


def share(positions: Tensor, rank: int, world: int, parts: int) -> list[Tensor]:
    """One rank's part of a step, in ``parts``; sizes differ by one at most."""
    return list(positions.tensor_split(world * parts)[rank * parts : (rank + 1) * parts])


def epoch_steps(images: Tensor, config: Config, epoch: int, world: int) -> list[Step]:
    """An epoch over the images at these positions. Its last step has what is left, if two for every part.

    Fewer could leave a BatchNorm one value of a channel.
    """
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    order = images[torch.randperm(len(images), generator=generator)]
    smallest = 2 * world * config.accumulate
    return [
        Step(positions, seed_of(config.seed, epoch, number))
        for number, positions in enumerate(order.split(config.batch))
        if len(positions) >= smallest
    ]


def load(config: Config) -> Data:
    """The data set of a run.

    Raises:
        FileNotFoundError: it is not where it should be; the message says where that is.
        ImportError: a package that reads it is missing.
        ValueError: its files are not what they should be.
    """
    try:
        return _LOADERS[config.data](config)
    except ImportError as error:
        needed = "pip install 'fastdense[train]'"
        raise ImportError(f"{config.data} needs {error.name or error}, which is not installed: {needed}") from error


# -- images in memory ----------------------------------------------------------------------------------------


class MemoryImages:
    """Images that fit into memory, as uint8 [N, C, H, W]; shifted by a few pixels and mirrored as batches.

    Args:
        shift: pixels of zeros around an image, out of which as much as it was is cut.
        mirror: whether a mirrored image is of the same class.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, preprocess: Preprocess, shift: int, mirror: bool):
        self._pixels, self._labels, self._preprocess = pixels, labels, preprocess
        self._shift, self._mirror = shift, mirror

    def __len__(self) -> int:
        return len(self._labels)

    def training(self, steps: Sequence[Step], rank: int, world: int, parts: int) -> Iterator[list[Part]]:
        for step in steps:
            count = len(step.positions)
            generator = torch.Generator().manual_seed(step.seed)
            down, right = torch.randint(0, 2 * self._shift + 1, (2, count), generator=generator)
            mirrored = torch.rand(count, generator=generator) < (0.5 if self._mirror else 0)
            drawn = torch.stack([step.positions, down, right, mirrored.long()], 1)
            yield [self._augmented(*part.unbind(1)) for part in share(drawn, rank, world, parts)]

    def _augmented(self, positions: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Part:
        x = self._preprocess.normalize(self._pixels[positions])
        n, channels, height, width = x.shape
        margin = self._shift
        x = torch.nn.functional.pad(x, [margin] * 4)
        rows = down[:, None] + torch.arange(height)
        columns = torch.arange(width)
        columns = right[:, None] + torch.where(mirrored.bool()[:, None], columns.flip(0), columns)
        image, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
        return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]], self._labels[positions]

    def evaluation(self, batches: Sequence[Tensor]) -> Iterator[Part]:
        for part in batches:
            yield self._preprocess.normalize(self._pixels[part]), self._labels[part]


def _in_memory(
    config: Config,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: list[str],
    *,
    shift: int,
    mirror: bool,
    standardize: bool = True,
) -> Data:
    """``standardize``: by the mean and standard deviation of each channel of the training images."""
    pixels = train[0]
    channels = pixels.shape[1]
    if pixels.shape[2:] != (config.size, config.size):
        raise ValueError(f"{config.data}: its images are {list(pixels.shape[2:])}, got size {config.size}")
    mean, std = (0.0,) * channels, (1.0,) * channels
    if standardize:
        stds, means = torch.std_mean(pixels.transpose(0, 1).flatten(1).double() / 255, 1)
        mean, std = tuple(means.tolist()), tuple(stds.clamp_min(1e-6).tolist())
    preprocess = Preprocess(config.size, channels, mean, std)
    if not config.augment:
        shift, mirror = 0, False
    return Data(
        MemoryImages(*train, preprocess, shift, mirror), MemoryImages(*test, preprocess, 0, False), classes, preprocess
    )


def _digits(config: Config) -> Data:
    train_x, train_y, test_x, test_y = digits()
    return _in_memory(config, (train_x, train_y), (test_x, test_y), list("0123456789"), shift=1, mirror=False)


def _cifar(config: Config) -> Data:
    read = _read_cifar_binary if _cifar_folder(config, "bin") else _read_cifar
    train, test, classes = read(config)
    return _in_memory(config, train, test, classes, shift=4, mirror=True)


def _cifar_folder(config: Config, layout: str) -> Path | None:
    """Where CIFAR lies, in torchvision's layout (``"py"``) or in binary files (``"bin"``), if it does."""
    name = {
        "cifar10": {"py": "cifar-10-batches-py", "bin": "cifar-10-batches-bin"},
        "cifar100": {"py": "cifar-100-python", "bin": "cifar-100-binary"},
    }[config.data][layout]
    folder = Path(config.root, name)
    return folder if folder.is_dir() else None


def _read_cifar(config: Config) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    stock = CIFAR10 if config.data == "cifar10" else CIFAR100
    if config.download:
        stock(config.root, download=True)
    elif not _cifar_folder(config, "py"):
        raise FileNotFoundError(
            f"{config.data}: no {stock.base_folder} (nor its binary files) in {Path(config.root).absolute()}; "
            f"unpack {stock.url} there, name its folder by --root, or give --download"
        )
    unchecked = type(
        stock.__name__,
        (stock,),
        dict(
            train_list=[[name, None] for name, _ in stock.train_list],
            test_list=[[name, None] for name, _ in stock.test_list],
            meta=stock.meta | dict(md5=None),
        ),
    )
    splits = []
    try:
        for train in (True, False):
            found = unchecked(config.root, train=train)
            splits.append((torch.tensor(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)))
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(f"{config.data}: {Path(config.root, stock.base_folder)}: {error}") from error
    return splits[0], splits[1], list(found.classes)


def _read_cifar_binary(config: Config) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Rows of a label byte (for CIFAR-100 a coarse and a fine one) and 3 x 32 x 32 pixels."""
    folder = _cifar_folder(config, "bin")
    assert folder is not None
    if config.data == "cifar10":
        names, labels, text = [f"data_batch_{i}.bin" for i in range(1, 6)], 1, "batches.meta.txt"
        test = ["test_batch.bin"]
    else:
        names, labels, text, test = ["train.bin"], 2, "fine_label_names.txt", ["test.bin"]

    def read(files: list[str]) -> tuple[Tensor, Tensor]:
        rows = []
        for name in files:
            content, row = (folder / name).read_bytes(), labels + 3 * 32 * 32
            if not content or len(content) % row:
                raise ValueError(f"{folder / name}: expected rows of {row} bytes, got {len(content)} bytes")
            rows.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, row))
        found = torch.cat(rows)
        return found[:, labels:].reshape(-1, 3, 32, 32), found[:, labels - 1].long()

    try:
        classes = (folder / text).read_text().split()
        return read(names), read(test), classes
    except OSError as error:
        raise FileNotFoundError(f"{config.data}: {error}") from error


def _svhn(config: Config) -> Data:
    from torchvision.datasets import SVHN

    splits = {}
    for split, (url, name, _) in SVHN.split_list.items():
        if config.download:
            SVHN(config.root, split=split, download=True)
        elif not Path(config.root, name).is_file():
            raise FileNotFoundError(
                f"svhn: no {name} in {Path(config.root).absolute()}; put {url} there, name its folder by --root, or "
                "give --download"
            )
        unchecked = type("SVHN", (SVHN,), dict(split_list=SVHN.split_list | {split: [url, name, None]}))
        found = unchecked(config.root, split=split)
        splits[split] = torch.tensor(found.data), torch.tensor(found.labels)
    both = [torch.cat(each) for each in zip(splits["train"], splits["extra"], strict=True)]
    return _in_memory(
        config, (both[0], both[1]), splits["test"], list("0123456789"), shift=4, mirror=False, standardize=False
    )


# -- images in files -----------------------------------------------------------------------------------------


class FolderImages:
    """The files of a torchvision ``ImageFolder``, decoded by ``workers`` processes."""

    def __init__(self, samples: list[tuple[str, int]], preprocess: Preprocess, augment: bool, workers: int):
        self._files = _Files(samples, preprocess, augment)
        self._workers = workers

    def __len__(self) -> int:
        return len(self._files.samples)

    def training(self, steps: Sequence[Step], rank: int, world: int, parts: int) -> Iterator[list[Part]]:
        batches: list[list[tuple[int, int | None]]] = [
            [(int(position), seed_of(step.seed, int(position))) for position in part]
            for step in steps
            for part in share(step.positions, rank, world, parts)
        ]
        loaded = iter(self._loader(batches))
        for _ in steps:
            yield [next(loaded) for _ in range(parts)]

    def evaluation(self, batches: Sequence[Tensor]) -> Iterator[Part]:
        yield from self._loader([[(int(position), None) for position in part] for part in batches])

    def _loader(self, batches: Sequence[list[tuple[int, int | None]]]) -> Any:
        return torch.utils.data.DataLoader(
            self._files,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists of what __getitem__ takes
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )


class _Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, samples: list[tuple[str, int]], preprocess: Preprocess, augment: bool):
        self.samples, self._preprocess, self._augment = samples, preprocess, augment

    def __getitem__(self, drawn: tuple[int, int | None]) -> tuple[Tensor, int]:  # type: ignore[override]
        """An image by its position; augmented by what its seed draws, if there is one."""
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import v2

        position, seed = drawn
        path, label = self.samples[position]
        image = default_loader(path)
        if seed is None or not self._augment:
            return self._preprocess(image), label
        size = self._preprocess.size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = v2.RandomHorizontalFlip()(v2.RandomResizedCrop(size, antialias=True)(image))
        return self._preprocess.normalize(v2.functional.pil_to_tensor(image)), label


def _imagefolder(config: Config) -> Data:
    from torchvision.datasets import ImageFolder

    preprocess = Preprocess(config.size, 3, IMAGENET_MEAN, IMAGENET_STD, _FOLDER_CROP)
    root = Path(config.root)
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    for folder in (root / "train", test):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"imagefolder: no {folder.absolute()}; put images into ROOT/train/CLASS/ and ROOT/val/CLASS/ and name "
                "ROOT by --root"
            )
    found, held = ImageFolder(root / "train"), ImageFolder(test)
    if found.classes != held.classes:
        raise ValueError(
            f"imagefolder: {root / 'train'} has the classes {found.classes}, but {test} has {held.classes}"
        )
    return Data(
        FolderImages(found.samples, preprocess, config.augment, config.workers),
        FolderImages(held.samples, preprocess, False, config.workers),
        found.classes,
        preprocess,
    )


_LOADERS = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "svhn": _svhn, "imagefolder": _imagefolder}
