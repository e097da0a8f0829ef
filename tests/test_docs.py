"""The documentation: its Python runs, its links and names lead somewhere, its figures are those of the code."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdense
from fastdense import backends, reference

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
FIGURES = CHECKOUT / "docs" / "figures"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def python_in(page: Path) -> list[str]:
    """The page's blocks of Python, each on the lines that it has in the page."""
    text = page.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def names_in(page: Path) -> list[str]:
    """What the prose has in backticks."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


# -- Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if python_in(page)], ids=lambda page: page.name)
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, in one namespace a page. Nothing is downloaded: DenseNet-121 is a short one of random weights."""

    def short(network: Callable[..., Any]) -> Callable[..., Any]:
        return lambda weights=None, **options: network(block_config=(2, 2, 2, 2), **options)

    blocks = python_in(page)
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))  # an example adds to it
    monkeypatch.setattr(fastdense, "densenet121", short(fastdense.FastDenseNet))
    if any("torchvision" in block for block in blocks):
        models = pytest.importorskip("torchvision", reason="needs torchvision").models
        monkeypatch.setattr(models, "densenet121", short(models.DenseNet))
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)


# -- links and names ----------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose_of(page)))
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in relative if not (page.parent / target).exists()]


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "fastdense|kernels|benchmarks|tests|docs"
    files = [name for name in names_in(page) if re.fullmatch(rf"({folders})/[\w./-]*", name)]
    assert not [name for name in files if not (CHECKOUT / name).exists()]


@every_page
def test_tests_that_are_named_exist(page: Path) -> None:
    tests = [name for name in names_in(page) if re.fullmatch(r"test_\w+", name)]
    sources = "".join(path.read_text() for path in (CHECKOUT / "tests").glob("test_*.py"))
    assert not [name for name in tests if f"def {name}(" not in sources]


# -- figures ------------------------------------------------------------------------------------------------------


def figures_module() -> Any:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from fastdense.benchmarks import figures

    return figures


def test_figures_are_up_to_date(tmp_path: Path) -> None:
    figures = figures_module()
    version = metadata.version("matplotlib")
    kept = {path.name: path.read_text() for path in FIGURES.glob("*.svg")}
    versions = {re.search(r"Matplotlib v(\S+),", svg)[1] for svg in kept.values()}
    if versions != {version}:
        pytest.skip(f"needs matplotlib {' or '.join(versions)}, which drew the figures")
    assert {path.name: path.read_text() for path in figures.draw(tmp_path)} == kept


class _Bytes(TorchDispatchMode):
    """Elements per image that the operations on images read and write, in as many passes as each makes."""

    def __init__(self, images: int, training: bool):
        super().__init__()
        self.images, self.training, self.elements = images, training, 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        features = [x.numel() / self.images for x in tree_leaves((args, out)) if self._is_features(x)]
        if not op.is_view:
            self.elements += sum(features)
        if self.training and op.name().startswith("aten::native_batch_norm"):
            self.elements += features[0]  # once for the statistics
        return out

    def _is_features(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] == self.images and x.is_floating_point()


@pytest.mark.parametrize("mode", ["inference", "training forward"])
def test_naive_traffic_is_that_of_stock_operations(mode: str) -> None:
    figures = figures_module()
    images, training = 5, mode != "inference"
    with torch.device("meta"):
        naive, x = reference.densenet121().train(training), torch.empty(images, 3, 224, 224)
    with torch.no_grad(), _Bytes(images, training) as counted:
        naive(x)
    assert sum(figures.traffic(figures.COEFFICIENTS[mode][0]).values()) == pytest.approx(counted.elements, rel=1e-3)


# -- numbers ----------------------------------------------------------------------------------------------------


def numbers_module() -> Any:
    pytest.importorskip("matplotlib", reason="needs the packages of fastdense[bench]")
    from fastdense.benchmarks import numbers

    return numbers


@every_page
def test_numbers_are_those_of_the_results(page: Path) -> None:
    """`make docs-numbers` writes them."""
    text = page.read_text()
    assert numbers_module().rewritten(text) == text


@every_page
def test_every_quantity_has_its_source(page: Path) -> None:
    """What looks measured is written by `make docs-numbers`, and by nobody else."""
    assert list(numbers_module().stray_quantities(page.read_text())) == []


def test_a_wrong_or_unknown_number_is_noticed() -> None:
    numbers = numbers_module()
    text = "in <!--n traffic:inference:naive-->999<!--/n--> MB"
    assert numbers.rewritten(text) == "in <!--n traffic:inference:naive-->215<!--/n--> MB"
    assert list(numbers.stray_quantities("took 3.5 ms, 12 GB/s, 2x and 20% in `4 ms`")) == [
        "3.5 ms",
        "12 GB/s",
        "2x",
        "20%",
    ]
    for key in ("ms", "speed:x", "ms:nowhere-quick:densenet121:4:fp32:step:fast", "traffic:sleep:fast"):
        with pytest.raises(ValueError, match=re.escape(repr(key))):
            numbers.value_of(key)
