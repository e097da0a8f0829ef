"""The plan's memory against measurements in fresh processes, its work against the paper, and the scaling document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastdense
from fastdense import backends, cli, plan, reference, roofline
from fastdense.architectures import CONFIGS
from fastdense.roofline import Ceilings

UNIT = Ceilings(1, 1, "for tests, so that nothing is measured")
DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"


def build(name: str, naive: bool = False, **arguments: Any) -> nn.Module:
    """Without values."""
    with torch.device("meta"):
        return getattr(reference if naive else fastdense, name)(**arguments)


# -- memory, against measurements ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What ``fastdense bench`` measures in a process of its own."""

    network: str
    size: int
    batch: int
    dtype: str
    contender: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def naive(self) -> bool:
        return self.contender.startswith("naive")

    @property
    def memory_efficient(self) -> bool:
        return "memory_efficient" in self.contender

    def plan(self, train: bool = True) -> plan.Plan:
        options: dict[str, Any] = dict(batch=self.batch, size=self.size, dtype=self.dtype, train=train, ceilings=UNIT)
        flags = dict(memory_efficient=self.memory_efficient)
        if self.network in CONFIGS:
            return plan.plan(self.network, naive=self.naive, **flags, **options)
        return plan.plan(build(self.network, self.naive, **flags, **self.arguments), **options)

    def __str__(self) -> str:
        return f"{self.network}-{self.size}-batch{self.batch}-{self.dtype}-{self.contender.replace(', ', '-')}"


CASES = (
    Case("densenet121", 128, 8, "fp32", "fast"),
    Case("densenet121", 224, 4, "fp32", "fast, memory_efficient"),
    Case("densenet121", 96, 16, "bf16", "fast"),
    Case("densenet169", 128, 8, "fp32", "fast"),
    Case("densenet201", 160, 6, "fp32", "fast"),
    Case("densenet_bc_100_12", 32, 8, "fp32", "fast"),
    Case("densenet_bc_100_12", 32, 8, "bf16", "fast, memory_efficient"),
    Case("densenet_40_12", 32, 8, "fp32", "fast"),
    Case("densenet_40_12", 32, 8, "bf16", "fast"),
    Case("densenet_cifar", 32, 4, "fp32", "fast, memory_efficient", dict(depth=190, growth_rate=12)),
    Case("densenet121", 64, 8, "fp32", "naive"),
    Case("densenet_cifar", 32, 8, "bf16", "naive", dict(depth=40)),
    Case("densenet_40_12", 32, 8, "fp32", "naive, memory_efficient"),
)
"""Large enough for activations to be most of the peak."""


@pytest.fixture(scope="module")
def measure() -> Iterator[Callable[..., Any]]:
    """``measure(case, mode="step")``: the bytes that a fresh process counts."""
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package, reason="needs the packages of fastdense[bench]")
    from fastdense.benchmarks import cases, memory

    if not memory.CAN_MEASURE_CPU_PEAK:
        pytest.skip("needs a /proc/self/clear_refs that can be written: Linux")
    contenders = {contender.name: contender for contender in cases.MEMORY_CONTENDERS}
    with memory.meter("cpu") as meter:

        def run(case: Case, mode: str = "step") -> Any:
            network = cases.Network(case.network, case.size, arguments=case.arguments)
            return meter.measure(
                cases.MemoryCase(network, contenders[case.contender], case.batch, "cpu", case.dtype, mode)
            )

        yield run


def skip_without_kernels(case: Case) -> None:
    if not case.naive and backends.select(torch.device("cpu"), torch.float32) != "cpu":
        pytest.skip("needs the C++ kernels, whose scratch is predicted")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_what_a_fresh_process_needs(case: Case, measure: Callable[..., Any]) -> None:
    skip_without_kernels(case)
    measured, found = measure(case), case.plan()
    assert measured.saved is not None, measured.note
    assert found.saved_bytes == pytest.approx(measured.saved, rel=0.1)
    assert found.peak == pytest.approx(measured.peak, rel=0.15)


def test_inference_grows_with_the_batch_as_in_a_fresh_process(measure: Callable[..., Any]) -> None:
    """Of more images: what is measured for inference includes the process's own libraries."""
    few, many = (Case("densenet_bc_100_12", 32, batch, "fp32", "fast") for batch in (8, 40))
    skip_without_kernels(few)
    grown = measure(many, "inference").peak - measure(few, "inference").peak
    assert many.plan(train=False).total_bytes - few.plan(train=False).total_bytes == pytest.approx(grown, rel=0.15)


def test_parts_are_the_buffers_of_the_contract() -> None:
    """X and the bottlenecks of each block, to the byte but for the channels' statistics, which are float32."""
    found = plan.plan("densenet121", batch=3, size=64, dtype="bf16", ceilings=UNIT)
    side, channels = 16, 64
    for number, layers in enumerate((6, 12, 24, 16), start=1):
        pixels, width = 3 * side**2, channels + 32 * layers
        assert found.saved[f"block {number}: X"] == 2 * pixels * width + 8 * (width + 128 * layers)
        assert found.saved[f"block {number}: bottlenecks"] == 2 * pixels * 128 * layers
        side, channels = side // 2, width // 2
    assert "batch" not in found.saved, "what the first convolution saves is a narrow copy"
    assert found.held["batch"] == 4 * 3 * 3 * 64**2
    assert found.held["parameters"] == found.held["momentum"] == found.gradients == 4 * 7_978_856


def test_recomputation_drops_the_bottlenecks_alone() -> None:
    kept, dropped = (
        plan.plan("densenet_bc_100_12", batch=2, size=32, memory_efficient=m, ceilings=UNIT) for m in (0, 1)
    )
    assert dropped.memory_efficient
    assert kept.saved == dropped.saved | {k: v for k, v in kept.saved.items() if k.endswith("bottlenecks")}
    assert dropped.peak < kept.peak
    assert dropped.seconds > kept.seconds


def test_naive_saves_what_it_concatenates_and_normalises() -> None:
    found = plan.plan("densenet_40_12", batch=2, size=32, naive=True, ceilings=UNIT)
    assert found.naive
    prefixes = sum(16 + 12 * i for i in range(12))  # of the first block, as read by its norms
    vectors = 2 * 4 * prefixes  # mean and 1 / deviation
    assert found.saved["block 1: concatenated"] == 4 * 2 * 32**2 * prefixes
    assert found.saved["block 1: normalised"] == 4 * 2 * 32**2 * prefixes + vectors


def test_inference_holds_weights_and_one_block() -> None:
    found = plan.plan("densenet121", batch=8, size=64, train=False, ceilings=UNIT)
    assert not found.saved
    assert "momentum" not in found.held
    stem, first, second = 64 * 32**2, 256 * 16**2, 512 * 8**2
    assert 4 * 8 * max(stem, first, second) <= found.peak <= 4 * 8 * (stem + first + second)


def test_gpu_gathers_gradients_in_the_dtype_of_x() -> None:
    cpu, gpu = (
        plan.plan("densenet121", batch=8, size=64, dtype="bf16", device=d, ceilings=UNIT) for d in ("cpu", "cuda")
    )
    assert gpu.saved == cpu.saved
    assert gpu.saved_bytes < gpu.peak
    assert "packed weights" not in gpu.held


def test_model_is_planned_as_it_is_and_stays_so() -> None:
    model = fastdense.densenet_bc_100_12().eval()
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    found = plan.plan(model, batch=2, size=32, ceilings=UNIT)
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()} == before
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    named = plan.plan("densenet_bc_100_12", batch=2, size=32, ceilings=UNIT)
    assert found.network == "FastDenseNet"
    assert (found.saved, found.peak, found.pieces) == (named.saved, named.peak, named.pieces)


def test_torchvision_model_is_naive() -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    config: Any = dict(growth_rate=8, block_config=(2, 3), num_init_features=16)
    with torch.device("meta"):
        theirs, ours, fast = (
            plan.plan(kind(**config), batch=2, size=32, ceilings=UNIT)
            for kind in (torchvision.models.DenseNet, reference.DenseNet, fastdense.FastDenseNet)
        )
    assert theirs.naive
    assert not fast.naive
    assert (theirs.saved, theirs.peak, theirs.pieces) == (ours.saved, ours.peak, ours.pieces)


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (50e6, dict(train=True)),
        (50e6, dict(train=False)),
        (50e6, dict(train=True, dtype="bf16", device="cuda")),
        (10.5e6, dict(train=True)),  # at first the parameters' gradients are the most of it
    ],
    ids=str,
)
@pytest.mark.parametrize("naive", [False, True], ids=["fast", "naive"])
def test_largest_batch_fits_and_the_next_does_not(naive: bool, memory: float, options: dict[str, Any]) -> None:
    model = build("DenseNet" if naive else "FastDenseNet", naive, growth_rate=48, block_config=(2, 3), num_classes=10)
    batch = plan.largest_batch(model, memory, size=16, **options)
    fits, too_large = (plan.plan(model, batch=b, size=16, ceilings=UNIT, **options) for b in (batch, batch + 1))
    assert fits.total_bytes <= memory < too_large.total_bytes


def test_least_batch_has_two_values_a_channel() -> None:
    """At 4x4 the last norm sees one pixel an image, and trains on two images or more."""
    model = build("FastDenseNet", block_config=(2,))
    least = plan.plan(model, batch=2, size=4, ceilings=UNIT).total_bytes
    assert plan.largest_batch(model, least, size=4) == 2
    with pytest.raises(ValueError, match="MB are too few: a batch of 2 images of 4x4 needs"):
        plan.largest_batch(model, least - 1, size=4)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("resnet50", {}, "unknown network 'resnet50': there are densenet121"),
        (nn.Linear(3, 3), {}, "Linear has not the parts of torchvision's DenseNet"),
        (nn.Linear(3, 3), dict(naive=True), "a model is planned as it is"),
        ("densenet121", dict(batch=0), "batch must be at least 1, got 0"),
        ("densenet121", dict(dtype="int8"), "unknown dtype 'int8': there are fp32, bf16, fp16"),
        ("densenet121", dict(device="tpu"), "device must be 'cpu' or 'cuda', got 'tpu'"),
        ("densenet121", dict(size=28), "images of 28x28 are too small for this network: 29x29 is the least"),
        ("densenet_40_12", dict(size=3), "images of 3x3 are too small for this network: 4x4 is the least"),
        ("densenet121", dict(size=32, batch=1), "training needs two images or more of 32x32"),
    ],
)
def test_what_cannot_be_planned(network: str | nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.plan(network, **dict(batch=2, size=64, ceilings=UNIT) | options)


# -- work, against the paper -----------------------------------------------------------------------------------

PAPER = {
    "densenet121": (7_978_856, 2.834),
    "densenet161": (28_681_000, 7.728),
    "densenet169": (14_149_480, 3.360),
    "densenet201": (20_013_928, 4.291),
    "densenet264": (33_337_704, 5.752),
    "densenet_40_12": (1_019_722, 0.265),
    "densenet_100_12": (6_979_642, 1.770),
    "densenet_100_24": (27_249_082, 6.889),
    "densenet_bc_100_12": (769_162, 0.288),
    "densenet_bc_250_24": (15_324_406, 5.419),
    "densenet_bc_190_40": (25_624_430, 9.302),
}
"""Parameters, and multiply-adds in 1e9 at 224x224 or 32x32, of the networks of its tables 1 and 2."""


@pytest.mark.parametrize("name", CONFIGS)
def test_work_is_that_of_the_paper(name: str) -> None:
    model = build(name)
    stages = roofline.stages(model, 32 if "_" in name else 224)
    assert (sum(p.numel() for p in model.parameters()), round(roofline.macs(stages) / 1e9, 3)) == PAPER[name]


@pytest.mark.parametrize(
    ("naive", "train", "phase", "megabytes"),
    [
        (False, False, "forward", 42),
        (False, True, "forward", 45),
        (False, True, "backward", 118),
        (True, False, "forward", 215),
        (True, True, "forward", 248),
        (True, True, "backward", 401),
    ],
)
def test_bytes_an_image_are_those_of_the_design(naive: bool, train: bool, phase: str, megabytes: float) -> None:
    """DenseNet-121 in bfloat16 at 224x224, in a batch so large that weights hardly count."""
    found = roofline.pieces(roofline.stages(build("densenet121", naive), 224), 256, torch.bfloat16, train=train)
    moved = sum(piece.bytes for piece in found if piece.phase == phase) / 256e6
    assert moved == pytest.approx(megabytes, rel=0.02)


def test_piece_takes_the_longer_of_moving_and_computing() -> None:
    piece = roofline.Piece("forward", "head", "classifier", bytes=100, flops=600)
    assert piece.seconds(Ceilings(10, 100, "")) == 10
    assert piece.seconds(Ceilings(100, 100, "")) == 6


def test_work_grows_with_batch_and_dtype() -> None:
    stages = roofline.stages(build("densenet_bc_100_12"), 32)
    one, two = (roofline.pieces(stages, batch, torch.float32, train=True) for batch in (1, 2))
    narrow = roofline.pieces(stages, 2, torch.bfloat16, train=True)
    weights = [2 * a.bytes - b.bytes for a, b in zip(one, two, strict=True)]
    assert min(weights) == 0
    for a, b, half, weight in zip(one, two, narrow, weights, strict=True):
        assert 2 * a.flops == b.flops == half.flops
        assert b.bytes - weight == 2 * (half.bytes - weight)


def test_recomputation_is_one_more_product_a_layer() -> None:
    kept, dropped = (
        roofline.pieces(
            roofline.stages(build("densenet_bc_100_12", memory_efficient=m), 32), 1, torch.float32, train=True
        )
        for m in (False, True)
    )
    more = [piece for piece in dropped if piece not in kept]
    assert len(dropped) - len(kept) == 48
    assert {piece.name for piece in more} == {"conv1x1 again"}


def test_ceilings_have_a_source() -> None:
    h100 = roofline.ceilings_of("h100", torch.bfloat16)
    assert (h100.bytes_per_s, h100.flops) == (3.0e12, 800e12)
    assert "measured" in h100.source
    assert roofline.ceilings_of("h100", torch.float32).flops < h100.flops
    with pytest.raises(ValueError, match="unknown GPU 'v100': there are a100, h100, h200"):
        roofline.ceilings_of("v100", torch.float32)


def test_ceilings_of_this_cpu_are_measured() -> None:
    found = roofline.measured_on_cpu(torch.float32)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops < 1e15
    assert "measured now" in found.source


# -- many devices ----------------------------------------------------------------------------------------------


def test_statistics_are_exchanged_once_a_norm_or_once_a_channel() -> None:
    model = build("densenet121")
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    found = plan.scaling(batch=32)
    assert (found.statistics.reductions, found.statistics.channels) == (len(norms), sum(norms)) == (121, 41824)
    once = 64 + sum(64 * 2**i for i in range(4)) + 58 * (32 + 128)  # stem; blocks' inputs; slices and bottlenecks
    assert found.shared_statistics.channels == once
    assert found.statistics.backward_bytes == 8 * sum(norms)
    assert found.statistics.forward_bytes == 8 * sum(norms) + 4 * 121


def test_ring_sends_each_gradient_twice_but_for_its_own_share() -> None:
    found = plan.scaling(batch=32, gpus=8, link_bytes_per_s=1e9)
    assert found.gradient_bytes == 4 * 7_978_856
    assert found.reduction_seconds == pytest.approx(2 * 7 / 8 * 4 * 7_978_856 / 1e9)
    assert plan.scaling(batch=32, gpus=1).reduction_seconds == 0
    assert found.images_per_s < plan.scaling(batch=32, gpus=8).images_per_s, "longer than a backward, it shows"
    with pytest.raises(ValueError, match="gpus must be at least 1, got 0"):
        plan.scaling(batch=32, gpus=0)


def test_hidden_reduction_costs_nothing() -> None:
    found = plan.scaling(batch=256, gpus=8)
    assert found.reduction_seconds < found.backward_seconds < found.step_seconds
    assert found.images_per_s == pytest.approx(8 * 256 / found.step_seconds)
    assert found.imagenet_seconds(2) == pytest.approx(2 * 1_281_167 / found.images_per_s)
    assert found.decoding_cores == found.images_per_s / plan.DECODED_PER_S
    assert found.file_bytes_per_s / found.images_per_s == pytest.approx(115.4e3, rel=1e-3)


def test_document_has_the_numbers_of_the_plan() -> None:
    from fastdense.benchmarks.scaling_numbers import NUMBERS

    written = dict(re.findall(r"<!--n (.+?)-->(.*?)<!--/n-->", DOCUMENT.read_text()))
    assert written == {key: number() for key, number in NUMBERS.items()}


# -- the command -----------------------------------------------------------------------------------------------

COMMAND = ["plan", "--arch", "densenet_bc_100_12", "--batch", "2", "--bandwidth", "300", "--flops", "2"]


def test_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--train"]) == 0
    printed = capsys.readouterr().out
    for part in ("a training step of densenet_bc_100_12", "32x32", "block 3: bottlenecks", "momentum", "optimizer, ms"):
        assert part in printed
    assert "at 300 GB/s and 2 TFLOP/s, as given" in printed
    assert "largest batch" not in printed


def test_command_prints_the_largest_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--memory", "30MB"]) == 0
    found = re.search(r"largest batch in 0.03 GB: (\d+)\n", capsys.readouterr().out)
    assert found
    fits = plan.plan("densenet_bc_100_12", batch=int(found[1]), size=32, train=False, ceilings=UNIT)
    assert 29e6 < fits.total_bytes <= 30e6


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--memory-efficient", "--train", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    ceilings = Ceilings(3e11, 2e12, "as given")
    found = plan.plan("densenet_bc_100_12", batch=2, size=32, memory_efficient=True, ceilings=ceilings)
    assert (printed["naive"], printed["memory_efficient"]) == (False, True)
    assert printed == json.loads(json.dumps(found.as_dict())) | {"memory": None, "largest_batch": None}
    assert printed["total_bytes"] == sum(printed["held"].values()) + printed["peak"]
    assert sum(row["seconds"] for row in printed["floors"]) == pytest.approx(printed["seconds"])
    assert {row["phase"] for row in printed["floors"]} == {"forward", "backward", "optimizer"}


@pytest.mark.parametrize(("flags", "us"), [([], 14), (["--naive"], 72)])
def test_command_plans_inference_for_a_gpu(flags: list[str], us: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpu", "h100", "--dtype", "bf16", "--batch", "256", "--json", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["device"], printed["size"], printed["train"]) == ("cuda", 224, False)
    assert printed["naive"] == bool(flags)
    assert printed["seconds"] / 256 == pytest.approx(us * 1e-6, rel=0.02)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "1MB"], "fastdense plan: 1.0 MB are too few: a batch of 1 image of 32x32 needs"),
        (["--size", "3"], "fastdense plan: images of 3x3 are too small"),
        (["--size", "4", "--batch", "1", "--train"], "fastdense plan: training needs two images or more of 4x4"),
    ],
)
def test_command_says_in_one_line_what_cannot_be(argv: list[str], message: str, capsys: Any) -> None:
    assert cli.main([*COMMAND, *argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_one_ceiling_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--bandwidth", "300"]) == 2
    assert "--bandwidth and --flops belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--gpu", "v100"], "invalid choice: 'v100'"),
        (["--memory", "16 apples"], "must be a size such as 16GB or 512MiB, got 16 apples"),
        (["--memory", "0GB"], "must be a size such as 16GB or 512MiB, got 0GB"),
        (["--flops", "-1"], "must be positive, got -1.0"),
        (["--batch", "0"], "must be at least 1, got 0"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*COMMAND, *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("16GB", 16e9), ("1.5 MiB", 1.5 * 2**20), ("100", 100), ("2T", 2e12)])
def test_sizes_of_memory(text: str, value: float) -> None:
    assert cli._bytes(text) == value
