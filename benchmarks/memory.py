"""Bytes: what a forward saves for its backward, the peak of a training step, and that of inference.

The peak of a step is counted above what is there before it, the parameters and the batch; it includes the parameters'
gradients, which are the same for all contenders. That of inference includes the weights, of which runtimes keep
copies of their own, and all else that a contender brings; only what importing its packages takes is not counted.

On a GPU the caching allocator knows it. On a CPU the kernel does: the largest resident set of a process. To make
that reproducible every case runs in a fresh process, whose C library returns freed tensors to the system at once.
A server that has imported everything, and computed nothing, forks these processes: ``python -m`` this module.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdense.memory import saved_activation_bytes

from .cases import MemoryCase
from .contenders import Workload

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")

CAN_MEASURE_CPU_PEAK = _STATUS.exists() and os.access(_RESET_PEAK, os.W_OK)

_ALLOCATE_EXACTLY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4096",  # every larger tensor is a mapping of its own, gone when freed
    "MALLOC_TRIM_THRESHOLD_": "4096",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's; its threads would not survive a fork
}


@dataclass(frozen=True)
class Bytes:
    """What was measured; ``None`` where it was not, and ``note`` says why."""

    saved: int | None
    peak: int | None
    note: str = ""


def measure(case: MemoryCase) -> Bytes:
    """In this process: a training step, or only what a forward of it saves, or inference."""
    if case.mode == "inference":
        return Bytes(None, _peak_of_inference(case))
    workload = Workload(case.subject, case.contender, case.batch, case.device, case.dtype)
    workload.prepare("step")
    out: list[Tensor] = []
    saved = saved_activation_bytes(workload.model, lambda: out.append(workload.forward()))
    if not case.peak:
        return Bytes(saved, None, "the peak is not asked for")
    out.clear()
    workload.run(*workload.prepare("step"))  # after which code, workspaces and the optimizer's state are there
    arguments = workload.prepare("step")
    return Bytes(saved, _peak(workload, lambda: workload.run(*arguments)))


def _peak_of_inference(case: MemoryCase) -> int:
    """Of everything: the weights in every form, what a runtime keeps, and what a call needs."""
    for package in case.contender.packages:
        import_module(package)
    case.subject.inputs(1, case.dtype)
    torch.conv2d(torch.ones(1, 8, 8, 8), torch.ones(8, 8, 3, 3))  # after which PyTorch's threads are there
    on_gpu = torch.device(case.device).type == "cuda"
    before = torch.cuda.memory_allocated(case.device) if on_gpu else _resident("VmRSS")
    workload = Workload(case.subject, case.contender, case.batch, case.device, case.dtype)
    workload.run(*workload.prepare("inference"))
    del workload.inputs[1:]
    arguments = workload.prepare("inference")
    inside = torch.cuda.memory_allocated(case.device) if on_gpu else _resident("VmRSS")
    return _peak(workload, lambda: workload.run(*arguments)) + inside - before


def _peak(workload: Workload, run: Callable[[], Any]) -> int:
    """The most bytes there are during ``run``, above those before it."""
    if workload.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(workload.device)
        before = torch.cuda.memory_allocated(workload.device)
        run()
        return torch.cuda.max_memory_allocated(workload.device) - before
    _RESET_PEAK.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status that is given in kB."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


class Meter:
    """Measures cases, on a CPU in fresh processes. Made by :func:`meter`."""

    def __init__(self, server: subprocess.Popen[bytes] | None) -> None:
        self._server = server

    def measure(self, case: MemoryCase) -> Bytes:
        if case.device != "cpu":
            try:
                return measure(case)
            except torch.OutOfMemoryError:
                return Bytes(None, None, "out of GPU memory")
        if self._server is None:
            saved = None if case.mode == "inference" else measure(replace(case, peak=False)).saved
            return Bytes(saved, None, "the peak of a CPU process is read from /proc of Linux, which is not here")
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        pickle.dump(case, self._server.stdin)
        self._server.stdin.flush()
        return Bytes(**json.loads(self._server.stdout.readline()))


@contextmanager
def meter(device: str) -> Iterator[Meter]:
    """A :class:`Meter`, whose server lives inside the ``with`` block."""
    if device != "cpu" or not CAN_MEASURE_CPU_PEAK:
        yield Meter(None)
        return
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | _ALLOCATE_EXACTLY
    ) as server:
        yield Meter(server)
        assert server.stdin is not None
        server.stdin.close()


def _serve() -> None:
    """Answer every pickled case on standard input with a line of JSON, measured in a fork."""
    torch.optim.SGD([torch.zeros(1)])  # imports what every fork would have to import
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            print(json.dumps(asdict(measure(case))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            reason = "killed, out of memory" if code == -9 else f"the measuring process ended with {code}"
            print(json.dumps(asdict(Bytes(None, None, reason))), flush=True)


if __name__ == "__main__":
    _serve()
