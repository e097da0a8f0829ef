"""Time of each part of a network beside its floor of :mod:`fastdense.roofline`, at this machine's measured ceilings.

Parts are told by the order of the ops: stem, blocks, transitions, head. Multiply-adds are those of direct
convolutions, so a part that saves some, as Winograd's 3x3 does, may be quicker than its floor.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense import roofline

from .contenders import FAST, Workload
from .subjects import DTYPES, Network

Row = dict[str, Any]

_RUNS = 7

_STEM = ("aten::conv2d", "aten::convolution", "aten::convolution_backward", "fastdense::channel_stats")
_HEAD = ("aten::linear", "aten::addmm", "aten::mm")


def measure(network: Network, batch: int, device: str, dtype_name: str) -> list[Row]:
    """A row a part of inference, of training's forward and of its backward."""
    dtype = DTYPES[dtype_name]
    workload = Workload(network, FAST, batch, device, dtype)
    ceilings = _ceilings(device, dtype)
    stages = roofline.stages(workload.model, network.size)
    blocks = sum(stage.part.startswith("block") for stage in stages)
    rows = []
    for mode in ("inference", "forward", "backward"):
        pieces = [
            piece
            for piece in roofline.pieces(stages, batch, dtype, train=mode != "inference")
            if piece.phase == ("backward" if mode == "backward" else "forward")
        ]
        seconds = _seconds(workload, mode, blocks)
        for stage in stages:
            own = [piece for piece in pieces if piece.part == stage.part]
            rows.append(
                {
                    "subject": network.name,
                    "title": network.title,
                    "batch": batch,
                    "dtype": dtype_name,
                    "mode": mode,
                    "part": stage.part,
                    "seconds": seconds[stage.part],
                    "floor_s": sum(piece.seconds(ceilings) for piece in own),
                    "bytes": sum(piece.bytes for piece in own),
                    "macs": sum(piece.flops for piece in own) // 2,
                    "bandwidth": ceilings.bytes_per_s,
                    "flops": ceilings.flops,
                }
            )
    return rows


def _ceilings(device: str, dtype: torch.dtype) -> roofline.Ceilings:
    if device == "cpu":
        return roofline.measured_on_cpu(dtype)
    from .gpu_check import ceilings

    found = ceilings()
    return roofline.Ceilings(found["bytes_per_s"], found["flops"], "measured")


class _Clock(TorchDispatchMode):
    """Seconds of each op that the network itself calls, in order; what an op calls inside is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, float]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self._now()
        result = op(*args, **(kwargs or {}))
        self.ops.append((op.name().split(".")[0], self._now() - start))
        return result

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def _seconds(workload: Workload, mode: str, blocks: int) -> dict[str, float]:
    """Of each part, the median of some runs."""
    runs: dict[str, list[float]] = defaultdict(list)
    workload.run(*workload.prepare(mode))
    for _ in range(_RUNS):
        arguments = workload.prepare(mode)
        with _Clock() as clock:
            workload.run(*arguments)
        totals: dict[str, float] = defaultdict(float)
        for part, seconds in _parts(clock.ops, mode, blocks):
            totals[part] += seconds
        for part, seconds in totals.items():
            runs[part].append(seconds)
    return {part: statistics.median(seconds) for part, seconds in runs.items()}


def _parts(ops: list[tuple[str, float]], mode: str, blocks: int) -> Iterator[tuple[str, float]]:
    """Each op's seconds, with the part that it belongs to; what is not worth a name belongs to none."""
    seen = {"block": 0, "transition": 0}
    for name, seconds in ops:
        if name in _STEM or "::stem_" in name:
            yield "stem", seconds
        elif name in _HEAD or "::head" in name:
            yield "head", seconds
        elif name.startswith("fastdense::"):
            kind = "block" if "dense_block" in name else "transition"
            seen[kind] += 1
            last = blocks if kind == "block" else blocks - 1
            yield f"{kind} {last + 1 - seen[kind] if mode == 'backward' else seen[kind]}", seconds
