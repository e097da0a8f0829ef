"""A training run: steps, epochs, evaluation, checkpoints.

A step's gradient is the mean over all images of its batch, however they are cut among ranks and parts: each part adds
its sum divided by the number of all. The optimizer is the paper's, SGD.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import backends, weights
from ..architectures import config_of
from ..models import FastDenseNet
from . import checkpoint, data
from .config import Config
from .data import Data, Images, Part
from .log import Log
from .ranks import Ranks, accumulating

LAST, BEST = "last.pt", "best.pt"
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_SMALL = 64  # images up to this size get the stem for CIFAR


class Diverged(RuntimeError):
    """The loss is not a number any more."""


def train(
    config: Config,
    ranks: Ranks,
    folder: Path | None,
    *,
    resume: bool = False,
    quiet: bool = False,
    observe: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Train a network; what its last epoch came to.

    Args:
        folder: for checkpoints, metrics and curves; ``None`` for no files.
        resume: go on from the folder's last checkpoint, which is of the same configuration.
        quiet: print nothing.
        observe: told every row of the metrics (:mod:`.log`).

    Raises:
        Diverged: the loss is not finite; the last checkpoint is that of the epoch before.
        FileNotFoundError, ImportError, ValueError: the data set, the weights or the checkpoint are not there, or are
            not what they should be.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or config.deterministic)
    try:
        with backends.use_backend(config.backend):
            return _Run(config, ranks, folder, resume).run(quiet, observe)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def network_of(config: Config, found: Data) -> dict[str, Any]:
    """Arguments of the :class:`~fastdense.models.FastDenseNet` to train."""
    arguments = config_of(config.arch) | dict(
        num_classes=len(found.classes),
        in_channels=found.preprocess.channels,
        drop_rate=config.drops(),
        memory_efficient=config.memory_efficient,
    )
    if config.size <= _SMALL:
        arguments["small_inputs"] = True
    return arguments


def evaluate(
    model: nn.Module, images: Images, positions: Tensor, ranks: Ranks, *, batch: int, amp: str, channels_last: bool
) -> dict[str, float]:
    """Mean cross entropy, accuracy, and the share of images whose class is among the five most probable.

    Every rank takes its part of every ``batch`` images a rank, so that all call the model equally often.
    """
    chunks = [chunk.tensor_split(ranks.world)[ranks.rank] for chunk in positions.split(batch * ranks.world)]
    filled = [chunk if len(chunk) else positions[:1] for chunk in chunks]
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    model.eval()
    with torch.no_grad():
        for chunk, (x, y) in zip(chunks, images.evaluation(filled), strict=True):
            logits, y = _logits(model, x, ranks.device, amp, channels_last).float(), y.to(ranks.device)
            if len(chunk):
                top = logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]
                loss = F.cross_entropy(logits, y, reduction="sum")
                sums += torch.stack([loss, top[:, 0].sum(), top.sum()]).double()
    loss, accuracy, top5 = (ranks.total(sums) / len(positions)).tolist()
    return dict(loss=loss, accuracy=accuracy, top5_accuracy=top5)


def _logits(model: nn.Module, x: Tensor, device: torch.device, amp: str, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.to(device, memory_format=layout, non_blocking=True)
    with torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp in AMP_DTYPES):
        return model(x)


class _Run:
    def __init__(self, config: Config, ranks: Ranks, folder: Path | None, resume: bool):
        self.config, self.ranks, self.folder = config, ranks, folder
        self.data = data.load(config)
        positions = torch.arange(len(self.data.train))
        if config.holdout >= len(positions):
            raise ValueError(f"holdout must be less than the {len(positions)} training images, got {config.holdout}")
        generator = torch.Generator().manual_seed(0)  # the same images in every run
        shuffled = positions[torch.randperm(len(positions), generator=generator)]
        self.held_out, self.trained = shuffled[: config.holdout], shuffled[config.holdout :].sort().values
        self.num_steps = len(data.epoch_steps(self.trained, config, 0, ranks.world))
        if not self.num_steps:
            raise ValueError(f"batch {config.batch} and {len(self.trained)} training images make no step")
        content = checkpoint.load(folder / LAST) if resume and folder is not None else None

        self.network = network_of(config, self.data)
        torch.manual_seed(config.seed)
        self.model = FastDenseNet(**self.network)
        if content is None and config.weights:
            _begin_with(self.model, config.weights, config.arch)
        self.frozen = _freeze(self.model, config.freeze)
        if config.channels_last and not config.fsdp:  # which takes contiguous parameters
            self.model.to(memory_format=torch.channels_last)
        self.model.to(ranks.device)
        if config.compile != "off":
            self.model.compile(mode=config.compile)
        self.shared = ranks.share_model(self.model, config.fsdp, config.sync_bn)
        self.optimizer = _optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.ema: AveragedModel | None = None
        if config.ema:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.first_epoch = 0
        self.last_row: dict[str, Any] = {}
        if content is not None:
            self._restore(content)

    def run(self, quiet: bool, observe: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        first = self.ranks.is_first
        folder = self.folder if first else None
        log = Log(folder, self.config.epochs, self.num_steps, self.first_epoch, quiet or not first, observe)
        try:
            for epoch in range(self.first_epoch, self.config.epochs):
                log.begin_epoch(epoch)
                row = self._epoch(epoch, log)
                best = self.last_row.get("best_accuracy", -1.0)
                is_best = row["eval_accuracy"] > best
                self.last_row = row | dict(best_accuracy=max(best, row["eval_accuracy"]))
                log.epoch(self.last_row)
                self._save(epoch + 1, is_best)
        finally:
            log.close()
        return self.last_row

    def _epoch(self, epoch: int, log: Log) -> dict[str, Any]:
        config, ranks = self.config, self.ranks
        torch.manual_seed(data.seed_of(config.seed, epoch, -1 - ranks.rank))  # dropout
        self.shared.train()
        for module in self.frozen:
            module.eval()
        begun, sums, seen = time.perf_counter(), torch.zeros(2, dtype=torch.float64), 0
        pending: list[tuple[dict[str, Any], int, Tensor]] = []  # rows but for the loss, images, sums
        steps = data.epoch_steps(self.trained, config, epoch, ranks.world)
        batches = self.data.train.training(steps, ranks.rank, ranks.world, config.accumulate)
        for number, (step, parts) in enumerate(zip(steps, batches, strict=True)):
            rate = config.learning_rate(epoch + number / len(steps))
            count = len(step.positions)
            pending.append((dict(epoch=epoch, step=number, lr=rate), count, self._step(parts, count, rate)))
            seen += count
            if len(pending) == config.log_every or number + 1 == len(steps):
                totals = ranks.total(torch.stack([found for *_, found in pending])).cpu()
                sums += totals.sum(0)
                rows = [
                    row | dict(loss=loss / count)
                    for (row, count, _), loss in zip(pending, totals[:, 0].tolist(), strict=True)
                ]
                _check_finite(rows)
                log.steps(rows, sums[1].item() / seen, seen / (time.perf_counter() - begun))
                pending.clear()
        seconds = time.perf_counter() - begun
        ranks.agree_on_buffers(self.model)
        found = self._evaluate()
        return dict(
            epoch=epoch,
            train_loss=sums[0].item() / seen,
            train_accuracy=sums[1].item() / seen,
            **{f"eval_{name}": value for name, value in found.items()},
            lr=rate,
            seconds=seconds,
            images_per_s=seen / seconds,
        )

    def _step(self, parts: list[Part], count: int, rate: float) -> Tensor:
        """One optimizer step; [2]: the sum of this rank's losses, and how many images it had right."""
        config, ranks = self.config, self.ranks
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        found = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for i, (x, y) in enumerate(parts):
            with accumulating(self.shared, last=i + 1 == len(parts)):
                logits = _logits(self.shared, x, ranks.device, config.amp, config.channels_last).float()
                y = y.to(ranks.device, non_blocking=True)
                loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=config.label_smoothing)
                self.scaler.scale(loss * (ranks.world / count)).backward()  # DDP and FSDP take the mean over ranks
            found += torch.stack([loss.detach(), (logits.detach().argmax(1) == y).sum()])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return found

    def _evaluate(self) -> dict[str, float]:
        """Of the held-out images, or the test images where none are held out."""
        images, positions = self.data.test, torch.arange(len(self.data.test))
        if len(self.held_out):
            images, positions = self.data.train, self.held_out
        model = self.shared if self.config.fsdp else self.ema.module if self.ema else self.model
        options: dict[str, Any] = dict(
            batch=self.config.eval_batch, amp=self.config.amp, channels_last=self.config.channels_last
        )
        return evaluate(model, images, positions, self.ranks, **options)

    def _save(self, next_epoch: int, is_best: bool) -> None:
        model, optimizer = self._states()
        if self.folder is None or not self.ranks.is_first:
            return
        content = checkpoint.description(self.network, self.data.classes, self.data.preprocess) | dict(
            config=self.config.as_dict(), epoch=next_epoch, row=self.last_row, model=model
        )
        if self.ema is not None:
            content |= dict(ema=self.ema.module.state_dict(), averaged=self.ema.n_averaged)
        if is_best:
            checkpoint.save(self.folder / BEST, content)
        content |= dict(optimizer=optimizer, scaler=self.scaler.state_dict())
        checkpoint.save(self.folder / LAST, content)

    def _states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of model and optimizer, whole; every rank must ask."""
        if not self.config.fsdp:
            return self.model.state_dict(), self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        return get_state_dict(
            self.shared, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def _restore(self, content: dict[str, Any]) -> None:
        if self.config.fsdp:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

            set_state_dict(
                self.shared,
                self.optimizer,
                model_state_dict=content["model"],
                optim_state_dict=content["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
        else:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
            self.ema.n_averaged.copy_(content["averaged"])
        self.first_epoch, self.last_row = content["epoch"], content["row"]


def _check_finite(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise Diverged(
                f"the loss is {row['loss']} in step {row['step'] + 1} of epoch {row['epoch'] + 1}, at a learning rate "
                f"of {row['lr']:g}; the last checkpoint is that of the epoch before"
            )


def _optimizer(model: nn.Module, config: Config) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [dict(params=parameters)]
    if not config.decay_norms:
        groups = [
            dict(params=[p for p in parameters if p.dim() > 1]),
            dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0),
        ]
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=not config.fsdp,
    )


def _freeze(model: FastDenseNet, count: int) -> list[nn.Module]:
    """The modules of the first ``count`` stages, the stem and then blocks with their transitions, made constant."""
    stages: list[list[nn.Module]] = [[]]
    for name, module in model.features.named_children():
        if name.startswith("denseblock"):
            stages.append([])
        stages[-1].append(module)
    if count > len(stages):
        raise ValueError(f"freeze must be at most {len(stages)}, the stem and {len(stages) - 1} blocks, got {count}")
    frozen = [module for stage in stages[:count] for module in stage]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _begin_with(model: FastDenseNet, source: str, arch: str) -> None:
    """Load weights; a classifier for other classes is left as initialised."""
    state_dict, _ = weights.fetch(source, arch)
    head = {f"classifier.{name}" for name in ("weight", "bias")}
    if state_dict["classifier.weight"].shape != model.classifier.weight.shape:
        state_dict = {name: value for name, value in state_dict.items() if name not in head}
    try:
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # other shapes
        raise ValueError(f"weights {source!r} are not of {arch}: {str(error).splitlines()[1].strip()}") from error
    if unexpected or set(missing) - head:
        raise ValueError(f"weights {source!r} are not of {arch}: missing {missing[:3]}, unexpected {unexpected[:3]}")
