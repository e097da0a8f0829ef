"""``fastdense train``, ``evaluate`` and ``predict``, from files to checkpoints, and through a kill."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastdense
from fastdense import cli
from fastdense.training import checkpoint, data, log, loop
from fastdense.training.config import Config
from fastdense.training.loop import Diverged
from fastdense.training.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
TINY = dict(arch="densenet_bc_10_4", epochs=2, batch=256)  # 1,438 digits make six steps


def run(folder: Path | None = None, **options: Any) -> dict[str, Any]:
    return loop.train(Config.of(TINY, options), ALONE, folder, quiet=True)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log.read(folder) if "loss" in row]


def weights(folder: Path, name: str = loop.LAST) -> dict[str, Tensor]:
    return checkpoint.load(folder / name)["model"]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# -- choices -------------------------------------------------------------------------------------------------


def test_the_papers_recipe_is_the_default() -> None:
    config = Config.of(dict(data="cifar10"))
    assert (config.arch, config.epochs, config.batch, config.lr) == ("densenet_bc_100_12", 300, 64, 0.1)
    assert (config.momentum, config.nesterov, config.weight_decay, config.decay_norms) == (0.9, True, 1e-4, True)
    rates = [config.learning_rate(epoch) for epoch in (0, 149.9, 150, 224.9, 225, 299.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert config.drops() == 0
    assert Config.of(dict(data="cifar10", augment=False)).drops() == 0.2
    svhn = Config.of(dict(data="svhn"))
    assert (svhn.epochs, svhn.drops()) == (40, 0.2)
    folder = Config.of(dict(data="imagefolder"))
    assert (folder.arch, folder.epochs, folder.batch, folder.size) == ("densenet121", 90, 256, 224)
    assert [folder.learning_rate(epoch) for epoch in (29.9, 30, 60)] == pytest.approx([0.1, 0.01, 0.001])


def test_warmup_and_cosine() -> None:
    config = Config.of(dict(schedule="cosine", epochs=10, warmup=2.0))
    assert [config.learning_rate(epoch) for epoch in (0, 1, 5, 10)] == pytest.approx([0, 0.0487764, 0.05, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(epochs="ten"), "epochs must be int, got 'ten'"),
        (dict(lr=True), "lr must be float, got True"),
        (dict(milestones=(0.75, 0.5)), "milestones must be shares of the run in order"),
        (dict(data="mnist"), "data must be one of digits, cifar10"),
        (dict(arch="resnet50"), "no network is called 'resnet50'"),
        (dict(arch="densenet_bc_11_4"), "depth with bottlenecks must be 6*n + 4"),
        (dict(momentum=0.0), "nesterov needs a momentum"),
        (dict(ema=0.9, fsdp=True), "do not go together"),
        (dict(leraning_rate=1.0), "no such option: leraning_rate"),
        (dict(ema=1.0), "ema must be less than 1"),
    ],
)
def test_a_choice_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace("+", r"\+")):
        Config.of(options)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_options_from_a_file_and_from_the_line(tmp_path: Path, suffix: str) -> None:
    if suffix == ".toml" and sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    path, out = tmp_path / f"options{suffix}", tmp_path / "run"
    text = 'arch = "densenet_bc_10_4"\nepochs = 7\nbatch = 512\nmilestones = [0.5]\n'
    values = dict(arch="densenet_bc_10_4", epochs=7, batch=512, milestones=[0.5])
    path.write_text(text if suffix == ".toml" else json.dumps(values))
    assert cli.main(["train", "--config", str(path), "--epochs", "1", "--quiet", "--output", str(out)]) == 0
    chosen = json.loads((out / "config.json").read_text())
    assert (chosen["epochs"], chosen["batch"], chosen["milestones"]) == (1, 512, [0.5])
    assert Config.of(chosen).as_dict() == chosen


# -- data ----------------------------------------------------------------------------------------------------


def _rows(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), generator.integers(0, classes, count)


_FILES = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "cifar100": ["train", "test"]}


def write_cifar(root: Path, name: str, layout: str, count: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Files of random pixels in one of CIFAR's layouts; each one's rows and labels."""
    classes = 10 if name == "cifar10" else 100
    names = [f"class{i}" for i in range(classes)]
    made = [_rows(count, classes, seed) for seed in range(len(_FILES[name]))]
    if layout == "py":
        folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
        folder.mkdir(parents=True)
        key = "labels" if name == "cifar10" else "fine_labels"
        for file, (pixels, labels) in zip(_FILES[name], made, strict=True):
            (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels.tolist()}))
        meta = ("batches.meta", "label_names") if name == "cifar10" else ("meta", "fine_label_names")
        (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))
    else:
        folder = root / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
        folder.mkdir(parents=True)
        for file, (pixels, labels) in zip(_FILES[name], made, strict=True):
            columns = [labels.astype(np.uint8)[:, None], pixels]
            if name == "cifar100":
                columns.insert(0, np.zeros((count, 1), np.uint8))
            (folder / f"{file}.bin").write_bytes(np.concatenate(columns, 1).tobytes())
        text = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
        (folder / text).write_text("\n".join(names) + "\n")
    return made


@pytest.mark.parametrize("layout", ["py", "bin"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_both_layouts(tmp_path: Path, name: str, layout: str) -> None:
    made = write_cifar(tmp_path, name, layout)
    found = data.load(Config.of(dict(data=name, root=str(tmp_path), augment=False)))
    assert len(found.train) == 8 * (len(made) - 1)
    assert len(found.test) == 8
    assert found.classes[3] == "class3"
    pixels, labels = made[-1]
    ((x, y),) = found.test.evaluation([torch.arange(8)])
    assert y.tolist() == labels.tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.preprocess.mean, found.preprocess.std))
    torch.testing.assert_close(x * std + mean, torch.tensor(pixels).view(8, 3, 32, 32) / 255)
    ((x, _),) = found.train.evaluation([torch.arange(len(found.train))])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "cifar10", "--root", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "cifar-10-batches-py" in said
    assert str(tmp_path) in said
    assert "--download" in said
    for name, part in (("svhn", "train_32x32.mat"), ("imagefolder", "ROOT/train/CLASS")):
        with pytest.raises(FileNotFoundError, match=part):
            data.load(Config.of(dict(data=name, root=str(tmp_path))))


def test_a_truncated_binary_file_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", "bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: expected rows of 3073 bytes"):
        data.load(Config.of(dict(data="cifar10", root=str(tmp_path))))


def test_svhn(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="needs SciPy")
    for seed, split in enumerate(("train", "extra", "test")):
        pixels, labels = _rows(6, 10, seed)
        content = {"X": pixels.reshape(6, 3, 32, 32).transpose(2, 3, 1, 0), "y": (labels + 1)[:, None]}
        io.savemat(tmp_path / f"{split}_32x32.mat", content)
    found = data.load(Config.of(dict(data="svhn", root=str(tmp_path))))
    assert len(found.train) == 12
    ((x, y),) = found.test.evaluation([torch.arange(6)])
    pixels, labels = _rows(6, 10, 2)
    assert y.tolist() == ((labels + 1) % 10).tolist()  # its files call the digit 0 ten
    torch.testing.assert_close(x, torch.tensor(pixels).view(6, 3, 32, 32) / 255)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder of two classes, whose photographs are dark and bright."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 3)):
        for name, least in (("bright", 150), ("dark", 0)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(least, least + 100, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folders_give_the_same_batches_for_any_workers(photos: Path, workers: int) -> None:
    config = Config.of(dict(data="imagefolder", root=str(photos), size=32, workers=workers, batch=8))
    found = data.load(config)
    assert found.classes == ["bright", "dark"]
    steps = data.epoch_steps(torch.arange(18), config, 0, 1)
    assert [len(step.positions) for step in steps] == [8, 8, 2]
    batches = [part for parts in found.train.training(steps, 0, 1, 2) for part in parts]
    assert [len(y) for _, y in batches] == [4, 4, 4, 4, 1, 1]
    again = data.load(Config.of(dict(data="imagefolder", root=str(photos), size=32, workers=0, batch=8)))
    for (x, y), (x2, y2) in zip(batches, [p for s in again.train.training(steps, 0, 1, 2) for p in s], strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_a_step_is_the_same_however_it_is_shared(photos: Path) -> None:
    for name, options in (("digits", {}), ("imagefolder", dict(root=str(photos), size=32, workers=0))):
        config = Config.of(dict(data=name, batch=7), options)
        found = data.load(config)
        steps = data.epoch_steps(torch.arange(18), config, 3, 1)
        whole = list(found.train.training(steps, 0, 1, 1))
        shared = [list(found.train.training(steps, rank, 2, 2)) for rank in (0, 1)]
        for i, (part,) in enumerate(whole):
            parts = shared[0][i] + shared[1][i]
            for column in (0, 1):
                assert torch.equal(part[column], torch.cat([each[column] for each in parts]))


def test_shifts_and_mirrors_are_those_of_whole_images() -> None:
    """Each augmented image is some shift, mirrored or not, of its original; and not all are alike."""
    pixels = torch.randint(1, 256, (20, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = data.Preprocess(6, 3, (0.0,) * 3, (1.0,) * 3)
    images = data.MemoryImages(pixels, torch.arange(20), plain, shift=2, mirror=True)
    seen = set()
    (((x, y),),) = images.training([data.Step(torch.arange(20), 5)], 0, 1, 1)
    assert torch.equal(y, torch.arange(20))
    for image, original in zip(x, plain.normalize(pixels), strict=True):
        padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
        matches = [
            (down, right, flipped)
            for down in range(5)
            for right in range(5)
            for flipped in (False, True)
            if torch.equal(_cut(padded, down, right, flipped), image)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 10
    assert {flipped for *_, flipped in seen} == {True, False}


def _cut(padded: Tensor, down: int, right: int, flipped: bool) -> Tensor:
    cut = padded[:, down : down + 6, right : right + 5]
    return cut.flip(2) if flipped else cut


# -- the run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["py", "bin"])
@pytest.mark.parametrize(("arch", "parameters"), [("densenet121", 6_956_298), ("densenet_bc_100_12", 769_162)])
def test_the_two_programs_for_cifar10(tmp_path: Path, arch: str, parameters: int, layout: str) -> None:
    """End to end on files of CIFAR-10's layouts: training, its checkpoints, evaluation, prediction."""
    write_cifar(tmp_path / "data", "cifar10", layout, count=2)
    out = tmp_path / "run"
    root = ["--root", str(tmp_path / "data")]
    line = ["train", "--data", "cifar10", *root, "--arch", arch, "--epochs", "1", "--batch", "5", "--quiet"]
    assert cli.main([*line, "--output", str(out)]) == 0
    assert {"best.pt", "last.pt", "config.json", "metrics.jsonl", "curves.png"} <= {p.name for p in out.iterdir()}
    content = checkpoint.load(out / "best.pt")
    model, classes, preprocess = checkpoint.described(content)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert classes[0] == "class0"
    assert preprocess.size == 32
    assert cli.main(["evaluate", str(out / "best.pt"), *root]) == 0
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(tmp_path / "image.png")
    assert cli.main(["predict", str(out / "best.pt"), str(tmp_path / "image.png")]) == 0


def test_the_same_run_twice_and_the_reference(tmp_path: Path) -> None:
    for name, options in (("a", {}), ("b", {}), ("reference", dict(backend="reference"))):
        run(tmp_path / name, **options)
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    ours, theirs = losses(tmp_path / "a"), losses(tmp_path / "reference")
    assert len(ours) == 12
    assert ours[:4] == pytest.approx(theirs[:4], rel=1e-3)
    assert ours != theirs  # the option did something


def test_parts_change_no_gradient(tmp_path: Path) -> None:
    """With frozen BatchNorms a step in three parts is a step."""
    options = dict(freeze=4, batch=100, epochs=1)
    run(tmp_path / "whole", **options)
    run(tmp_path / "parts", **options, accumulate=3)
    for name, value in weights(tmp_path / "parts").items():
        torch.testing.assert_close(value, weights(tmp_path / "whole")[name], msg=name)


class Started:
    """``fastdense train`` in a process of its own."""

    def __init__(self, *options: str, ranks: int = 1):
        launch = ["-m", "fastdense"]
        if ranks > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launch]
        self.process = subprocess.Popen(
            [sys.executable, *launch, "train", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def wait(self) -> str:
        said = self.process.communicate()[0]
        assert self.process.returncode == 0, said[-4000:]
        return said


_KILLED = ("--arch", "densenet_bc_10_4", "--epochs", "3", "--batch", "32", "--log-every", "1", "--drop-rate", "0.1")


@pytest.mark.slow
def test_killed_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (*_KILLED, "--ema", "0.9", "--threads", "1")
    Started(*options, "--output", str(whole)).wait()
    started = Started(*options, "--output", str(killed))
    _until(lambda: any(row["epoch"] == 1 and row.get("step", 0) >= 3 for row in log.read(killed)))
    os.kill(started.process.pid, signal.SIGKILL)
    started.process.wait()
    assert checkpoint.load(killed / "last.pt")["epoch"] == 1  # of three
    Started("--resume", str(killed)).wait()
    for name in ("last.pt", "best.pt"):
        assert_equal(weights(killed, name), weights(whole, name))
        assert_equal(*(checkpoint.load(folder / name)["ema"] for folder in (killed, whole)))
    assert losses(killed) == losses(whole)


def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """With SyncBatchNorm: the same images, augmentations and unequal last batch; DDP and FSDP2."""
    options = ("--arch", "densenet_bc_10_4", "--epochs", "1", "--batch", "255", "--no-nesterov", "--lr", "0.01")
    Started(*options, "--output", str(tmp_path / "one")).wait()
    Started(*options, "--sync-bn", "--output", str(tmp_path / "ddp"), ranks=2).wait()
    Started(*options, "--sync-bn", "--fsdp", "--output", str(tmp_path / "fsdp"), ranks=2).wait()
    expected = losses(tmp_path / "one")
    assert len(expected) == 6
    for name in ("ddp", "fsdp"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=2e-3), name
        assert weights(tmp_path / name).keys() == weights(tmp_path / "one").keys()
    Started("--resume", str(tmp_path / "fsdp"), ranks=2).wait()  # it is done, and says so


def test_fine_tuning_freezes_stages_and_replaces_the_head(tmp_path: Path) -> None:
    torch.manual_seed(3)
    stock = fastdense.FastDenseNet(
        **fastdense.architectures.config_of("densenet_bc_10_4") | dict(in_channels=1, num_classes=7)
    )
    torch.save(stock.state_dict(), tmp_path / "weights.pt")
    run(tmp_path / "run", weights=str(tmp_path / "weights.pt"), freeze=2, epochs=1)
    after = weights(tmp_path / "run")
    assert after["classifier.weight"].shape[0] == 10
    frozen = ("features.conv0", "features.denseblock1", "features.transition1")
    for name, value in stock.state_dict().items():
        if name.startswith(frozen):
            assert torch.equal(after[name], value), name
        elif name.startswith("features.denseblock2") and name.endswith("conv1.weight"):
            assert not torch.equal(after[name], value), name
    with pytest.raises(ValueError, match="freeze must be at most 4"):
        run(freeze=5)
    with pytest.raises(ValueError, match="are not of densenet_bc_16_4"):
        run(arch="densenet_bc_16_4", weights=str(tmp_path / "weights.pt"))


def test_a_run_begins_with_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "first", epochs=1)
    content = weights(tmp_path / "first", "best.pt")
    run(tmp_path / "second", weights=str(tmp_path / "first" / "best.pt"), freeze=4, lr=0.0, epochs=1)
    assert_equal(content, weights(tmp_path / "second"))


@pytest.mark.parametrize(
    "options",
    [
        dict(amp="bf16"),
        dict(amp="fp16"),
        dict(ema=0.99),
        dict(schedule="cosine", warmup=0.5),
        dict(label_smoothing=0.1),
        dict(decay_norms=False),
        dict(memory_efficient=True),
        dict(channels_last=False),
        dict(augment=False),
        dict(holdout=100),
        dict(deterministic=True),
    ],
    ids=str,
)
def test_every_way_to_train_learns(tmp_path: Path, options: dict[str, Any]) -> None:
    row = run(tmp_path / "run", epochs=2, **options)
    seen = losses(tmp_path / "run")
    assert sum(seen[-3:]) < sum(seen[:3])
    assert row["eval_accuracy"] <= row["best_accuracy"] <= 1
    (tmp_path / "plain").mkdir()
    run(tmp_path / "plain", epochs=2)
    if "channels_last" not in options and "deterministic" not in options:
        same = seen == losses(tmp_path / "plain") and row["eval_loss"] == log.read(tmp_path / "plain")[-1]["eval_loss"]
        assert not same or options == dict(memory_efficient=True), "the option did nothing"


def test_compiled(tmp_path: Path) -> None:
    run(tmp_path / "run", epochs=1, batch=700, compile="default")
    run(tmp_path / "plain", epochs=1, batch=700)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "plain").keys()


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) in step"):
        run(tmp_path / "run", lr=1e20)
    out = ["--output", str(tmp_path / "other"), "--lr", "1e20", "--batch", "256", "--arch", "densenet_bc_10_4"]
    assert cli.main(["train", *out]) == 2
    assert "the loss is" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    line = ["train", "--epochs", "1", "--arch", "densenet_bc_10_4", "--batch", "700"]
    assert cli.main([*line, "--output", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert cli.main(["train", "--resume", str(tmp_path), "--lr", "1"]) == 2
    assert "drop lr" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, dict(value=1))

    class Unwritable:
        def __reduce__(self) -> Any:
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        checkpoint.save(path, dict(value=Unwritable()))
    assert checkpoint.load(path)["value"] == 1
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.load(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="not a checkpoint of fastdense train"):
        checkpoint.load(path)


# -- a checkpoint at work ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder, epochs=8, batch=64)
    return folder


def test_evaluate_agrees_with_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(trained / "last.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = log.read(trained)[-1]
    assert found["images"] == 359
    assert found["accuracy"] == last["eval_accuracy"]
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert found["top5_accuracy"] >= found["accuracy"] > 0.5
    assert cli.main(["evaluate", str(trained / "last.pt"), "--backend", "reference"]) == 0
    assert "of 359 images right" in capsys.readouterr().out


def test_predict_a_digit(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, scans, labels = fastdense.images.digits()
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(scans[i, 0].numpy()).save(paths[-1])
    assert cli.main(["predict", str(trained / "best.pt"), *map(str, paths), "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    right = [each["classes"][0]["name"] == str(label) for each, label in zip(found, labels.tolist(), strict=False)]
    assert sum(right) >= 15
    for each in found:
        probabilities = [row["probability"] for row in each["classes"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
    assert cli.main(["predict", str(trained / "best.pt"), str(paths[0])]) == 0
    assert "probability" in capsys.readouterr().out


def test_predict_what_is_no_image(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    for path, message in ((tmp_path / "text.png", "is no image"), (tmp_path / "none.png", "No such file")):
        assert cli.main(["predict", str(trained / "best.pt"), str(path)]) == 2
        assert message in capsys.readouterr().err


def test_what_a_log_holds(trained: Path) -> None:
    rows = log.read(trained)
    epochs = [row for row in rows if "eval_accuracy" in row]
    assert [row["epoch"] for row in epochs] == list(range(8))
    steps: Sequence[dict[str, Any]] = [row for row in rows if "step" in row]
    assert [row["step"] for row in steps if row["epoch"] == 7] == list(range(23))
    assert steps[-1]["lr"] == pytest.approx(0.001)
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"
