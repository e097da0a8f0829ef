"""The command ``fastdense``: ``status``, ``verify``, ``bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from .architectures import CONFIGS
from .backends import status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 for success, 1 for a failed verification, 2 for wrong usage."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest)
    except (ImportError, RuntimeError, ValueError) as error:
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
    command.add_argument("--size", type=_positive, default=128, help="image height and width (default: %(default)s)")
    command.add_argument("--batch", type=_positive, default=2, help="images in a batch (default: %(default)s)")
    command.add_argument(
        "--inputs", type=_positive, default=5, help="batches to take errors over (default: %(default)s)"
    )
    command.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="only these (default: all)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "bench", help="fast against naive: parity, speed, memory, plots (bench --help for its options)", add_help=False
    )
    command.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


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


def _bench(_: argparse.Namespace, rest: list[str]) -> int:
    from .benchmarks import run

    return run.main(rest)
