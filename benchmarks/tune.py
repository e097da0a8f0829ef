"""Find the best block shapes of the Triton kernels on this GPU: ``make tune`` writes ``kernels/tuned/<gpu>.json``.

Every distinct launch of DenseNet-121's inference and training step is timed with a few candidates around its
default, on buffers that nothing reads any more, as some launches add to theirs. The median decides, and a candidate
must beat the default by 3% to be written down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton.testing
from rich.console import Console
from rich.progress import track

import fastdense
from fastdense.kernels.triton import tuning
from fastdense.kernels.triton.launch import ceil_div, next_power_of_2

from . import results
from .launches import Launch, recorded

_TUNED = {
    "_bn_relu_conv1x1_fwd_kernel": "conv1x1_fwd",
    "_bn_relu_conv3x3_fwd_kernel": "conv3x3_fwd",
    "_bn_relu_pool_conv1x1_fwd_kernel": "transition_fwd",
    "_bn_relu_conv1x1_bwd_kernel": "conv1x1_bwd",
    "_conv3x3_dgrad_kernel": "conv3x3_dgrad",
    "_bn_relu_conv3x3_wgrad_kernel": "conv3x3_wgrad",
}
_MARGIN = 0.97


def candidates(launch: Launch) -> Iterator[dict[str, int]]:
    """Rows that change how often L2 is read, depths that change bytes in flight, warps that change registers.

    Backward launches keep their blocks, by which their partial sums are laid out.
    """
    if "fwd" not in launch.name:
        yield from (dict(num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (1, 2, 3, 4))
        return
    for block_m in (64, 128, 256):
        for block_k in (32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    accumulators = block_m * launch.arguments["BLOCK_N"] // (32 * warps)
                    if accumulators <= 128 and block_k <= next_power_of_2(launch.arguments["K"]):
                        yield dict(BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages)


def best(launch: Launch) -> tuple[dict[str, int] | None, float, float]:
    """The winning candidate, its seconds and the default's; ``None`` where the default stands."""
    default = _seconds(launch)
    winner, quickest = None, default * _MARGIN
    for candidate in candidates(launch):
        grid = launch.grid
        if "BLOCK_M" in candidate:
            grid = (ceil_div(launch.arguments["M"], candidate["BLOCK_M"]), *launch.grid[1:])
            if launch.arguments.get("STATS") and grid[0] > launch.grid[0]:
                continue  # more partial statistics than there is room for
        tried = dataclasses.replace(launch, grid=grid, arguments=launch.arguments | candidate)
        try:
            seconds = _seconds(tried)
        except (triton.OutOfResources, triton.CompilationError):
            continue
        if seconds < quickest:
            winner, quickest = candidate, seconds
    return winner, quickest if winner else default, default


def tune(batch: int, size: int) -> dict[str, dict[str, dict[str, int]]]:
    """The entries of a tuned file, from DenseNet-121 in bfloat16."""
    net = fastdense.densenet121().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    found: dict[str, dict[str, dict[str, int]]] = {name: {} for name in _TUNED.values()}
    launches: dict[tuple[str, str], Launch] = {}
    for train in (True, False):
        with torch.set_grad_enabled(train), recorded(make=True) as made:
            out = net.train(train)(x)
            if train:
                out.sum().backward()
        for launch in made:
            if launch.name in _TUNED:
                launches.setdefault((_TUNED[launch.name], _key(launch)), launch)
    for (kernel, key), launch in track(launches.items(), "tuning", console=Console(stderr=True)):
        winner, seconds, default = best(launch)
        if winner is not None:
            found[kernel][key] = winner
        print(f"{kernel} {key}: {1e6 * default:.1f} us by default, {1e6 * seconds:.1f} us with {winner or 'it'}")
    return found


def _key(launch: Launch) -> str:
    a = launch.arguments
    return tuning.key(a["M"], a["N"], a["K"], a["w_ptr" if "w_ptr" in a else "dy_ptr"].dtype)


def _seconds(launch: Launch) -> float:
    return 1e-3 * triton.testing.do_bench(launch.replay, warmup=5, rep=20, return_mode="median")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 8], help="batch sizes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="image height and width (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file to write (default: the one that is read)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 1
    configs: dict[str, Any] = {}
    for batch in arguments.batch:
        for kernel, entries in tune(batch, arguments.size).items():
            configs.setdefault(kernel, {}).update(entries)
    path = arguments.output or tuning.file_for(torch.cuda.get_device_name())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": results.environment("cuda"), "configs": configs}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
