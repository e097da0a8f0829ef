"""What a run says: bars on a terminal, a line an epoch elsewhere, metrics as JSON lines, curves, TensorBoard.

``metrics.jsonl`` has a line for every step, ``{"epoch", "step", "loss", "lr"}``, and one for every epoch with its
losses, accuracies, images per second. A run that is resumed continues the file after its last whole epoch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .checkpoint import write_whole

METRICS, CURVES = "metrics.jsonl", "curves.png"


class Log:
    """The log of a run, in a folder if there is one.

    Args:
        epochs, steps: how many there are, and of an epoch.
        first_epoch: where the run begins; what the files hold of later ones is dropped.
        quiet: print nothing.
        observe: told every row.
    """

    def __init__(
        self,
        folder: Path | None,
        epochs: int,
        steps: int,
        first_epoch: int,
        quiet: bool,
        observe: Callable[[dict[str, Any]], None],
    ):
        self._folder, self._steps, self._observe = folder, steps, observe
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bars: Progress | None = None
        self._tensorboard: Any = None
        if folder is not None:
            kept = [row for row in read(folder) if row["epoch"] < first_epoch]
            write_whole(folder / METRICS, lambda file: file.write("".join(map(_line, kept)).encode()))
            self._file = open(folder / METRICS, "a")  # noqa: SIM115  closed by close()
        if folder is not None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch * steps)
        if self._console.is_terminal and not self._console.quiet:
            self._bars = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._epoch_bar: TaskID = self._bars.add_task("epochs", total=epochs, completed=first_epoch, status="")
            self._step_bar: TaskID = self._bars.add_task("", total=steps, status="")
            self._bars.start()

    def begin_epoch(self, epoch: int) -> None:
        if self._bars is not None:
            self._bars.reset(self._step_bar, description=f"epoch {epoch + 1}", status="")

    def steps(self, rows: list[dict[str, Any]], accuracy: float, images_per_s: float) -> None:
        """What some steps came to."""
        for row in rows:
            self._write(row)
            if self._tensorboard is not None:
                at = row["epoch"] * self._steps + row["step"]
                self._tensorboard.add_scalar("train/loss of a step", row["loss"], at)
                self._tensorboard.add_scalar("learning rate", row["lr"], at)
        if self._bars is not None:
            status = f"loss {rows[-1]['loss']:.4f}  accuracy {accuracy:.2%}  {images_per_s:,.0f} images/s"
            self._bars.update(self._step_bar, advance=len(rows), status=status)

    def epoch(self, row: dict[str, Any]) -> None:
        """What an epoch came to."""
        self._write(row)
        status = f"evaluated {row['eval_accuracy']:.2%}, best {row['best_accuracy']:.2%}"
        if self._bars is not None:
            self._bars.update(self._epoch_bar, advance=1, status=status)
        else:
            self._console.print(
                f"epoch {row['epoch'] + 1}: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}, "
                f"{status}, {row['images_per_s']:,.0f} images/s",
                soft_wrap=True,
            )
        if self._tensorboard is not None:
            for name in ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy"):
                at = (row["epoch"] + 1) * self._steps
                self._tensorboard.add_scalar(name.replace("_", "/"), row[name], at)

    def _write(self, row: dict[str, Any]) -> None:
        self._observe(row)
        if self._folder is not None:
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        """Leave everything in the files, the curves drawn."""
        if self._bars is not None:
            self._bars.stop()
        if self._folder is None:
            return
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if find_spec("matplotlib") is not None:
            draw(read(self._folder), self._folder / CURVES)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a last line that a killed process left unfinished is none."""
    path = folder / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Curves of loss and of the error in evaluation against epochs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (losses, errors) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    whole = [row for row in rows if "eval_accuracy" in row]
    epochs = [row["epoch"] + 1 for row in whole]
    losses.plot(epochs, [row["train_loss"] for row in whole], label="training")
    losses.plot(epochs, [row["eval_loss"] for row in whole], label="evaluation")
    errors.plot(epochs, [100 * (1 - row["eval_accuracy"]) for row in whole])
    losses.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
    errors.set(xlabel="epoch", ylabel="error in evaluation, %", ylim=(0, None))
    losses.legend()
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=120))
    pyplot.close(figure)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
