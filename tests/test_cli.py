"""The command line: what it prints, and its exit codes."""

import json

import pytest
import torch

import fastdense
from fastdense import cli, parity
from fastdense.kernels import portable

VERIFY = ["verify", "--arch", "densenet_40_12", "--size", "32", "--batch", "2", "--inputs", "3", "--json"]


@pytest.fixture
def photographs(monkeypatch):
    """Noise in the place of photographs, so that scikit-learn is not needed."""
    from fastdense import images

    def noise(size, count):
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(images, "photographs", noise)


def test_status_as_table_and_json(capsys):
    assert cli.main(["status"]) == 0
    table = capsys.readouterr().out
    assert "backend torch" in table
    assert "chosen for cpu" in table
    assert cli.main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["backend torch"]["state"] == "available"
    assert status["torch"]["state"] == torch.__version__


def test_verify_reports_every_kind_of_tensor(capsys, photographs):
    quick = [*VERIFY, "--inputs", "1", "--batch", "1", "--dtype", "fp32", "bf16"]
    assert cli.main(quick) in (0, 1)  # one input may meet a flipped ReLU
    result = json.loads(capsys.readouterr().out)
    kinds = {(line["dtype"], line["mode"], line["what"]) for line in result["lines"]}
    train = {"output", "input gradient", "parameter gradients", "running statistics"}
    assert kinds == {(d, "train", w) for d in ("fp32", "bf16") for w in train} | {
        (d, "eval", "output") for d in ("fp32", "bf16")
    }
    by_kind = {(line["dtype"], line["what"]): line for line in result["lines"] if line["mode"] == "train"}
    assert by_kind["fp32", "parameter gradients"]["tensors"] == 119
    assert result["passed"] == all(line["fast_error"] <= line["allowed"] for line in result["lines"])


def test_verify_fails_when_the_kernels_are_wrong(capsys, photographs, monkeypatch):
    """One head gradient, off by one part in a thousand."""
    head_backward = portable.head_backward

    def wrong(grad_out, x, norm):
        grads = head_backward(grad_out, x, norm)
        return grads._replace(norm_bias=grads.norm_bias * 1.001)

    monkeypatch.setattr(portable, "head_backward", wrong)
    with fastdense.use_backend("torch"):
        assert cli.main([*VERIFY, "--dtype", "fp32"]) == 1
    result = json.loads(capsys.readouterr().out)
    failed = [name for line in result["lines"] for name in line["failed"]]
    assert failed == ["grad features.norm5.bias"]


def test_verify_passes_and_prints_a_table(capsys, photographs):
    assert cli.main([*VERIFY[:-1], "--dtype", "fp32"]) == 0
    table = capsys.readouterr().out
    assert "parameter gradients" in table
    assert "equal within the budgets" in table


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["verify", "--arch", "resnet50"], "invalid choice: 'resnet50'"),
        (["verify", "--inputs", "0"], "must be at least 1, got 0"),
        (["verify", "--sizes", "3"], "unrecognized arguments: --sizes 3"),
    ],
)
def test_wrong_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_said_in_one_line(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(VERIFY) == 2
    assert "pip install 'fastdense[bench]'" in capsys.readouterr().err


def test_photographs_of_a_package_verify(capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the photographs")
    assert cli.main([arg for arg in VERIFY if arg != "--json"] + ["--dtype", "fp32", "--batch", "1"]) == 0


def test_budgets_catch_what_they_should():
    exact = {"a": torch.ones(4, dtype=torch.float64), "b": torch.zeros(2)}
    stock = {"a": torch.full((4,), 1 + 1e-6), "b": torch.zeros(2)}
    fine = {"a": torch.full((4,), 1 - 2e-6), "b": torch.zeros(2)}
    assert not list(parity.failures(parity.compare(fine, [stock], exact, torch.float32)))
    wrong = {"a": torch.full((4,), 1 + 3e-6), "b": torch.full((2,), 1e-3)}
    assert len(list(parity.failures(parity.compare(wrong, [stock], exact, torch.float32)))) == 2
    with pytest.raises(ValueError, match="shapes differ"):
        parity.relative_error(torch.zeros(2), torch.zeros(3))
    nan = torch.tensor([1.0, float("nan")])
    assert parity.relative_error(nan, nan) == 0
    assert parity.relative_error(torch.ones(2), nan) == float("inf")
    assert parity.relative_error(nan, torch.ones(2)) == float("inf")
    assert parity.relative_error(torch.tensor([float("inf")]), torch.tensor([float("-inf")])) == float("inf")
