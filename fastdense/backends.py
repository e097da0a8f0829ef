"""Which implementation computes an op: the registry, the automatic choice, and how to override it.

A backend is a module of kernels with the functions of :mod:`fastdense.kernels.contract`. ``"reference"`` is
not one of them: it makes the modules run their naive, concatenating definition.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels.cpu import library as cpu_library
from .text import aligned

REFERENCE = "reference"


@dataclass(frozen=True)
class Backend:
    """One implementation of all ops.

    Attributes:
        name: as in :func:`use_backend`.
        module: where its functions are, imported when first needed; ``None`` where it cannot run here.
        note: what it is, or why it cannot run here.
        devices: the device types it computes on; ``None`` for all.
        dtypes: those it computes in; ``None`` for all.
        spatial_dims: 1 for sequences, 2 for images, 3 for volumes; those it computes on.
        automatic: chosen without being asked for.
    """

    name: str
    module: str | None
    note: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    automatic: bool = True
    spatial_dims: tuple[int, ...] = (2,)

    def refuses(self, device: torch.device, dtype: torch.dtype, spatial_dims: int = 2) -> str | None:
        """Why it cannot compute on ``device`` in ``dtype`` with so many spatial dimensions, or ``None``."""
        if self.module is None:
            return self.note
        if self.devices is not None and device.type not in self.devices:
            return f"it computes on {' and '.join(self.devices)}, not on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it computes in {', '.join(map(str, self.dtypes))}, not in {dtype}"
        if spatial_dims not in self.spatial_dims:
            return f"it computes in {' and '.join(f'{d}-D' for d in self.spatial_dims)}, not in {spatial_dims}-D"
        return None


def _triton() -> Backend:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", None, "Triton is not installed", ("cuda",), dtypes)
    if os.environ.get("TRITON_INTERPRET") == "1":
        note = "Triton kernels, interpreted on the CPU: for tests, very slow"
        return Backend("triton", "fastdense.kernels.triton", note, ("cpu",), dtypes, automatic=False)
    return Backend("triton", "fastdense.kernels.triton", "Triton kernels, for GPUs", ("cuda",), dtypes)


def _cpu() -> Backend:
    library = cpu_library.load()
    found = not isinstance(library, str)
    return Backend(
        "cpu",
        "fastdense.kernels.cpu" if found else None,
        f"C++ kernels for x86, on {library.isa}" if found else library,
        ("cpu",),
        tuple(cpu_library.DTYPES),
        spatial_dims=(1, 2, 3),
    )


_REGISTRY: dict[str, Backend] = {
    "triton": _triton(),
    "cpu": _cpu(),
    "torch": Backend(
        "torch", "fastdense.kernels.portable", "the portable algorithm in plain PyTorch", spatial_dims=(1, 2, 3)
    ),
}
"""In order of preference."""

_override: str | None = os.environ.get("FASTDENSE_BACKEND") or None


def names() -> tuple[str, ...]:
    """What :func:`use_backend` accepts."""
    return ("auto", *_REGISTRY, REFERENCE)


def kernels(name: str) -> ModuleType:
    """The kernels of a backend that can run here."""
    module = _REGISTRY[name].module if name in _REGISTRY else None
    if module is None:
        raise ValueError(f"no kernels for backend {name!r}; there are {', '.join(_available())}")
    return importlib.import_module(module)


class Prepared(Protocol):
    """An op whose other arguments a backend has ready, or several ops, each of what the one before makes.

    Attributes:
        out_dtype: of the output.
    """

    out_dtype: torch.dtype

    def is_current(self) -> bool:
        """Whether another one of the same arguments, as they are now, would compute the same."""

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of an x of ``shape``; with a zero where there would be no pixels."""

    def __call__(self, x: Tensor) -> Tensor:
        """The output; from any thread."""


CHAIN = "chain"
"""What makes one of several: of them, and of those whose weights may change."""


def preparation(name: str, op: str, changeable: bool = True) -> Callable[..., Prepared] | None:
    """What makes an op ready, or :data:`CHAIN`, in a backend that has such a thing; an op's from what comes after x.

    Args:
        changeable: the tensors may change. Otherwise what it makes will not be asked whether it is current, so that
            backends have it too that could not say.
    """
    if name == REFERENCE:
        return None
    module = kernels(name)
    prepare = getattr(module, "PREPARED", {}).get(op)
    if changeable:
        return prepare
    return getattr(module, "FROZEN", {}).get(op) if prepare is None else functools.partial(prepare, changeable=False)


def select(device: torch.device, dtype: torch.dtype, spatial_dims: int = 2) -> str:
    """The backend for tensors of ``dtype`` on ``device``: the override, or the first that can compute there.

    Args:
        spatial_dims: 1 for sequences [N, C, L], 2 for images, 3 for volumes [N, C, D, H, W].

    Raises:
        ValueError: the override names no backend.
        RuntimeError: the override names one that cannot compute there.
    """
    if _override is None or _override == "auto":
        backends = (backend for backend in _REGISTRY.values() if backend.automatic)
        return next(backend.name for backend in backends if backend.refuses(device, dtype, spatial_dims) is None)
    if _override == REFERENCE:
        return REFERENCE
    if _override not in _REGISTRY:
        raise ValueError(_unknown(_override))
    reason = _REGISTRY[_override].refuses(device, dtype, spatial_dims)
    if reason is not None:
        raise RuntimeError(f"backend {_override!r} was asked for, but {reason}")
    return _override


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have every fastdense module computed by one backend inside a ``with`` block.

    The choice is the process's, like the flags of ``torch.backends``: it holds in all threads. A backward
    runs on the backend of its forward. The environment variable ``FASTDENSE_BACKEND`` sets the default.

    Args:
        name: ``"auto"``, ``"triton"``, ``"cpu"``, ``"torch"``, or ``"reference"`` for the naive definition.

    Raises:
        ValueError: no backend has that name.
    """
    global _override
    if name not in names():
        raise ValueError(_unknown(name))
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


@dataclass(frozen=True)
class Status:
    """What :func:`status` found. ``str()`` is a table, ``rows`` the same as (item, state, note)."""

    rows: tuple[tuple[str, str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        return {item: {"state": state, "note": note} for item, state, note in self.rows}

    def __str__(self) -> str:
        return aligned(self.rows)


def status() -> Status:
    """What can run here, what is chosen, and why what cannot run cannot."""
    from . import __version__

    rows = [
        ("fastdense", __version__, ""),
        ("torch", torch.__version__, f"{platform.python_implementation()} {platform.python_version()}"),
        ("cpu", torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"),
        ("cuda", *_cuda()),
    ]
    for package, use in (("triton", "kernels for GPUs"), ("torchvision", "pretrained weights by name, convert")):
        rows.append((package, *_package(package, use)))
    for backend in _REGISTRY.values():
        rows.append((f"backend {backend.name}", "available" if backend.module else "unavailable", backend.note))
    rows.append((f"backend {REFERENCE}", "available", "the naive definition, concatenating"))
    chosen = f"FASTDENSE_BACKEND or use_backend: {_override}" if _override else "automatic"
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        try:
            rows.append((f"chosen for {device}", select(torch.device(device), torch.float32), chosen))
        except (ValueError, RuntimeError) as error:
            rows.append((f"chosen for {device}", "none", str(error)))
    return Status(tuple(rows))


def _available() -> list[str]:
    return [name for name, backend in _REGISTRY.items() if backend.module is not None]


def _unknown(name: str) -> str:
    return f"backend must be one of {', '.join(names())}, got {name!r}"


def _cuda() -> tuple[str, str]:
    if not torch.backends.cuda.is_built():
        return "unavailable", "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "unavailable", f"no GPU or driver (torch is built for CUDA {torch.version.cuda})"
    return "available", torch.cuda.get_device_name()


def _package(name: str, use: str) -> tuple[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name), use
    except PackageNotFoundError:
        return "not installed", f"only needed for {use}"
