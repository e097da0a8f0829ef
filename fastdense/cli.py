"""The command ``fastdense``: ``status``, ``verify``, ``plan``, ``bench``, ``train``, ``evaluate``, ``predict``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from .architectures import CONFIGS, image_size
from .backends import status
from .roofline import GPUS
from .training import command as training


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 for success, 1 for a failed verification, 2 for wrong usage."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"fastdense {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdense", description="DenseNets near the memory roofline.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("status", help="what can run here, what is chosen, and why")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_status)

    command = commands.add_parser("verify", help="prove fast equal to naive on real photographs")
    command.add_argument("--arch", default="densenet121", choices=CONFIGS, help="network (default: %(default)s)")
    command.add_argument("--size", type=positive, default=128, help="image height and width (default: %(default)s)")
    command.add_argument("--batch", type=positive, default=2, help="images in a batch (default: %(default)s)")
    command.add_argument(
        "--inputs", type=positive, default=5, help="batches to take errors over (default: %(default)s)"
    )
    command.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="only these (default: all)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_verify)

    command = commands.add_parser("plan", help="predict memory, the least time, and the largest batch that fits")
    command.add_argument("--arch", default="densenet121", choices=CONFIGS, help="network (default: %(default)s)")
    command.add_argument("--batch", type=positive, default=32, help="images in a batch (default: %(default)s)")
    command.add_argument("--size", type=positive, help="image height and width (default: 224; CIFAR networks: 32)")
    command.add_argument(
        "--dtype",
        default="fp32",
        choices=("fp32", "bf16", "fp16"),
        help="the latter by autocast (default: %(default)s)",
    )
    command.add_argument("--train", action="store_true", help="a training step with SGD instead of inference")
    command.add_argument("--memory-efficient", action="store_true", help="recompute in backward")
    command.add_argument("--naive", action="store_true", help="the stock modules, concatenating")
    command.add_argument("--memory", type=_bytes, help="such as 16GB: the largest batch that fits there, too")
    command.add_argument("--gpu", choices=GPUS, help="plan for it instead of for this CPU")
    command.add_argument(
        "--bandwidth", type=_positive_float, help="GB/s that the device moves, instead of what is known"
    )
    command.add_argument("--flops", type=_positive_float, help="TFLOP/s that it computes, likewise")
    command.add_argument("--device", choices=("cpu", "cuda"), help="whose kernels (default: cuda with --gpu, else cpu)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "bench", help="fast against naive: parity, speed, memory, plots (bench --help for its options)", add_help=False
    )
    command.set_defaults(run=_bench)

    training.add_commands(commands)
    return parser


def positive(text: str) -> int:
    """The type of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be a size such as 16GB or 512MiB, got {text}")
    return float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " ")


def _status(arguments: argparse.Namespace, _: list[str]) -> int:
    found = status()
    print(json.dumps(found.as_dict(), indent=2) if arguments.json else found)
    return 0


def _verify(arguments: argparse.Namespace, _: list[str]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import verify

    dtypes = arguments.dtype or list(verify.DTYPES)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=verify.num_steps(dtypes, arguments.inputs), completed=-1)
        lines = verify.verify(
            arguments.arch,
            dtypes=dtypes,
            size=arguments.size,
            batch=arguments.batch,
            inputs=arguments.inputs,
            seed=arguments.seed,
            device=arguments.device,
            progress=lambda step: bar.update(task, advance=1, description=step),
        )
    passed = all(line.passed for line in lines)
    if arguments.json:
        print(json.dumps({"arch": arguments.arch, "passed": passed, "lines": [x.as_dict() for x in lines]}, indent=2))
    else:
        _print_verification(arguments, lines, passed)
    return 0 if passed else 1


def _print_verification(arguments: argparse.Namespace, lines: Sequence[Any], passed: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    photographs = f"{arguments.inputs} x {arguments.batch} photographs of {arguments.size}x{arguments.size}"
    table = Table(
        title=f"{arguments.arch} on {photographs}",
        caption="errors relative to float64, of the tensor that uses most of its budget",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("dtype", "mode", "what"):
        table.add_column(name, no_wrap=True)
    table.add_column("tensors", justify="right")
    for name in ("fast", "stock", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for line in lines:
        errors = [f"{error:.1e}" for error in (line.fast_error, line.stock_error, line.allowed)]
        verdict = "[green]ok" if line.passed else f"[red]{len(line.failed)} over: {line.failed[0]}"
        table.add_row(line.dtype, line.mode, line.what, str(line.tensors), *errors, verdict)
    console = Console()
    console.print(table)
    console.print("[green]equal within the budgets" if passed else "[red]over the budgets")


def _plan(arguments: argparse.Namespace, _: list[str]) -> int:
    from . import plan, roofline, verify

    dtype = verify.DTYPES[arguments.dtype]
    given = (arguments.bandwidth, arguments.flops)
    if any(given) and not all(given):
        raise ValueError("--bandwidth and --flops belong together")
    ceilings = roofline.ceilings_of(arguments.gpu, dtype) if arguments.gpu else None
    if all(given):
        ceilings = roofline.Ceilings(arguments.bandwidth * 1e9, arguments.flops * 1e12, "as given")
    options: dict[str, Any] = dict(
        size=arguments.size or image_size(arguments.arch),
        dtype=arguments.dtype,
        train=arguments.train,
        memory_efficient=arguments.memory_efficient,
        naive=arguments.naive,
        device=arguments.device or ("cuda" if arguments.gpu else "cpu"),
    )
    found = plan.plan(arguments.arch, batch=arguments.batch, ceilings=ceilings, **options)
    largest = plan.largest_batch(arguments.arch, arguments.memory, **options) if arguments.memory else None
    if arguments.json:
        print(json.dumps(found.as_dict() | {"memory": arguments.memory, "largest_batch": largest}, indent=2))
    else:
        _print_plan(found)
        if largest is not None:
            print(f"largest batch in {arguments.memory / 1e9:.2f} GB: {largest}")
    return 0


def _print_plan(found: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    memory = Table("memory", box=SIMPLE_HEAD, pad_edge=False)
    memory.add_column("MB", justify="right")
    rows = [*found.held.items(), ("peak", found.peak)]
    if found.train:
        rows += [("  gradients", found.gradients), ("  saved for the backward", found.saved_bytes)]
        rows += [(f"    {part}", size) for part, size in found.saved.items()]
    for name, size in [*rows, ("total", found.total_bytes)]:
        memory.add_row(name, f"{size / 1e6:.1f}", style="bold" if name == "total" else None)

    floors = found.floors()
    phases = list(dict.fromkeys(phase for phase, _ in floors))
    time = Table("least time", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("MB", "GFLOP", *(f"{phase}, ms" for phase in phases)):
        time.add_column(name, justify="right")
    parts: dict[str, list[float]] = {}
    for (phase, part), (moved, operations, seconds) in floors.items():
        row = parts.setdefault(part, [0.0] * (2 + len(phases)))
        row[0] += moved / 1e6
        row[1] += operations / 1e9
        row[2 + phases.index(phase)] += seconds * 1e3
    total = [sum(column) for column in zip(*parts.values(), strict=True)]
    for part, (moved, operations, *milliseconds) in [*parts.items(), ("total", total)]:
        cells = f"{moved:.1f}", f"{operations:.2f}", *(f"{ms:.3f}" if ms else "" for ms in milliseconds)
        time.add_row(part, *cells, style="bold" if part == "total" else None)

    console = Console(highlight=False, soft_wrap=True)
    kind = "".join(f", {word}" for word in ("naive", "memory_efficient") if getattr(found, word))
    what = "a training step" if found.train else "inference"
    console.print(f"[bold]{what} of {found.network}{kind}, on {found.device}", end="")
    console.print(f"[bold]: batch {found.batch}, {found.size}x{found.size}, {found.dtype}")
    console.print(f"{found.parameters:,} parameters, {found.macs / 1e9:.3f} GMACs an image")
    console.print(memory)
    console.print(time)
    bandwidth, flops = found.ceilings.bytes_per_s / 1e9, found.ceilings.flops / 1e12
    console.print(f"{found.seconds * 1e3:.3f} ms or more: at most {found.batch / found.seconds:,.0f} images/s")
    console.print(f"at {bandwidth:.4g} GB/s and {flops:.3g} TFLOP/s, {found.ceilings.source}")


def _bench(_: argparse.Namespace, rest: list[str]) -> int:
    from .benchmarks import run

    return run.main(rest)
