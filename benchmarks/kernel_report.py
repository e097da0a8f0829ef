"""What the compiler makes of every kernel a DenseNet-121 launches, for each GPU generation; no GPU needed.

``python -m fastdense.benchmarks.kernel_report``, or ``make kernel-report``: registers, spills, shared memory,
occupancy and matrix instructions of each distinct kernel, then the arithmetic, the compulsory bytes and the
time at an H100's measured ceilings of each layer. Exit status 1 where a kernel spills, asks for more shared
memory than there is, or multiplies without tensor cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .launches import Launch, network_launches


@dataclass(frozen=True)
class Gpu:
    """A compilation target, and per multiprocessor what bounds occupancy."""

    name: str
    backend: str
    arch: int | str
    warp: int
    registers: int
    shared: int  # bytes; also the most that one program may have
    warps: int
    matrix: str  # the tensor cores' instructions, as a regular expression


GPUS = (
    Gpu("sm_80", "cuda", 80, 32, 65536, 163 << 10, 64, r"\bHMMA\."),
    Gpu("sm_90", "cuda", 90, 32, 65536, 227 << 10, 64, r"\bHGMMA\."),
    Gpu("sm_100", "cuda", 100, 32, 65536, 227 << 10, 64, r"\bUTC\w*MMA|\bHMMA\."),
    Gpu("gfx942", "hip", "gfx942", 64, 131072, 64 << 10, 32, r"\bv_mfma_"),
)

_MODES = {
    (True, False): "training forward",
    (True, True): "backward",
    (False, False): "inference",
}  # by training and backward

H100_BYTES_PER_S, H100_FLOPS = 3.0e12, 800e12
"""Measured on an H100 SXM: a large copy, and a large bfloat16 product."""


@dataclass(frozen=True)
class Compiled:
    """Resources of one kernel on one GPU."""

    kernel: str
    blocks: str
    gpu: str
    warps: int
    registers: int  # per thread
    spills: int  # loads from and stores to local memory
    shared: int  # bytes
    occupancy: float  # of the warps a multiprocessor can hold
    matrix: int  # matrix instructions
    problem: str


def distinct(launches: Iterable[Launch], specialised: bool = False) -> list[Launch]:
    """The last launch of each set of blocks, flags and ones; or of each way of specialising its arguments.

    Triton compiles an argument of 1 as a constant, with which a loop over tiles is none.
    """

    def kind(launch: Launch) -> tuple[str, ...]:
        ones = [name for name, value in launch.arguments.items() if isinstance(value, int) and value == 1]
        ways = map(str, _specialised(launch)) if specialised else ones
        return launch.name, _blocks(launch), str(launch.arguments["num_warps"]), *ways

    return list({kind(launch): launch for launch in launches}.values())


def compile_for(launch: Launch, gpu: Gpu) -> Compiled:
    """Compile as Triton would at this launch on ``gpu``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = _specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget(gpu.backend, gpu.arch, gpu.warp), options=options)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    if gpu.backend == "cuda":
        registers, spills, text = _sass(kernel.asm["cubin"])
    else:
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])  # type: ignore[index]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])  # type: ignore[index]
    wide = launch.arguments.get("BLOCK_M", 0) >= 64  # narrower tiles use the older instructions
    matrix = len(re.findall(gpu.matrix if wide else rf"{gpu.matrix}|\bHMMA\.", text))
    threads = warps * gpu.warp
    programs = min(
        gpu.warps // warps, gpu.registers // (threads * max(registers, 1)), gpu.shared // shared if shared else 1 << 30
    )
    problems = []
    if spills:
        problems.append(f"{spills} spills")
    if shared > gpu.shared:
        problems.append("too much shared memory")
    if not matrix and launch.macs():
        problems.append("no tensor cores")
    return Compiled(
        launch.label, _blocks(launch), gpu.name, warps, registers, spills,
        shared, min(1.0, programs * warps / gpu.warps), matrix, ", ".join(problems),
    )  # fmt: skip


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]], dict[str, Any]]:
    """Signature, constants, attributes and options, by Triton's rules for arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[Any]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            divisible = int(value.storage_offset()) * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages")}
    return signature, constants, attributes, options


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1", torch.uint8: "u8"}


def _blocks(launch: Launch) -> str:
    """The constexprs that tell variants apart: block sizes, flags that are on, and numbers."""
    constants = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    sizes = {name: value for name, value in constants.items() if name.startswith("BLOCK")}
    rest = {name.lower(): value for name, value in constants.items() if name not in sizes and value}
    flags = [name if value is True else f"{name} {value}" for name, value in rest.items() if isinstance(value, int)]
    return " ".join(["x".join(map(str, sizes.values())), *flags])


def _sass(cubin: bytes) -> tuple[int, int, str]:
    """Registers, local-memory instructions, and the disassembly."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        text = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", usage))
    return registers, len(re.findall(r"\b(?:STL|LDL)\b", text)), text


def predicted_seconds(launch: Launch) -> float:
    """At an H100's measured ceilings: the larger of moving and multiplying."""
    return max(launch.bytes() / H100_BYTES_PER_S, 2 * launch.macs() / H100_FLOPS)


def shipped(arch: str, gpu: Gpu) -> list[Launch]:
    """What the defaults are made for: inference and training, large and small batch, bfloat16."""
    from fastdense.kernels.triton import tuning

    with tuning.assume(gpu.backend):
        return [
            launch
            for batch in (256, 1)
            for train, backward in _MODES
            for launch in network_launches(arch, batch, 224, torch.bfloat16, train, backward)
        ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernel_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="densenet121", help="network (default: %(default)s)")
    parser.add_argument("--gpu", nargs="+", choices=[gpu.name for gpu in GPUS], help="only these")
    parser.add_argument(
        "--specialised", action="store_true", help="compile every specialisation of the kernels' arguments (long)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args(argv)
    gpus = [gpu for gpu in GPUS if arguments.gpu is None or gpu.name in arguments.gpu]
    work = [(launch, gpu) for gpu in gpus for launch in distinct(shipped(arguments.arch, gpu), arguments.specialised)]
    console = Console()
    rows = [compile_for(*item) for item in track(work, "compiling", console=Console(stderr=True))]
    rows.sort(key=lambda row: (row.kernel, row.blocks))
    console.print(_resources(rows))
    for train, backward in _MODES:
        console.print(_layers(arguments.arch, train, backward))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    problems = [row for row in rows if row.problem]
    for row in problems:
        console.print(f"{row.kernel} {row.blocks} on {row.gpu}: {row.problem}", style="red")
    return 1 if problems else 0


def _resources(rows: list[Compiled]) -> Table:
    columns = ("kernel", "blocks", "GPU", "warps", "registers", "spills", "shared", "occupancy", "matrix ops")
    table = Table(*columns, title="Compiled kernels", title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.kernel, row.blocks, row.gpu, str(row.warps), str(row.registers), str(row.spills),
            f"{row.shared / 1024:.0f} KiB", f"{row.occupancy:.0%}", str(row.matrix),
        )  # fmt: skip
    return table


def _layers(arch: str, train: bool, backward: bool, batch: int = 256) -> Table:
    mode = _MODES[train, backward]
    table = Table(
        "part", "kernel", "launches", "GMAC", "MB", "us", title_justify="left", box=None, pad_edge=False,
        title=f"{arch}, {mode}, bfloat16, batch {batch}: at an H100's {H100_BYTES_PER_S / 1e12} TB/s and "
        f"{H100_FLOPS / 1e12:.0f} TFLOP/s",
    )  # fmt: skip
    groups: dict[tuple[str, str], list[Launch]] = {}
    for launch in network_launches(arch, batch, 224, torch.bfloat16, train, backward):
        groups.setdefault((launch.part, launch.label), []).append(launch)
    total = 0.0
    for (part, name), launches in groups.items():
        seconds = sum(map(predicted_seconds, launches))
        total += seconds
        table.add_row(
            part, name, str(len(launches)),
            f"{sum(launch.macs() for launch in launches) / 1e9:.1f}",
            f"{sum(launch.bytes() for launch in launches) / 1e6:.0f}", f"{1e6 * seconds:.0f}",
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", "", "", "", f"{1e6 * total:.0f}, {1e6 * total / batch:.1f} an image")
    return table


if __name__ == "__main__":
    sys.exit(main())
