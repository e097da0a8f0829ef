"""The named networks: their sizes, their arguments, their weights."""

import pytest
import torch

import fastdense
from fastdense import architectures, reference

PARAMETERS = {
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
    "densenet_40_12": 1_019_722,
    "densenet_100_12": 6_979_642,
    "densenet_100_24": 27_249_082,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_250_24": 15_324_406,
    "densenet_bc_190_40": 25_624_430,
}
"""Counted in the paper's networks (tables 1 and 2)."""

TORCHVISION = ("densenet121", "densenet161", "densenet169", "densenet201")


@pytest.mark.parametrize("library", [fastdense, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_of_the_paper(library, name):
    with torch.device("meta"):
        model = getattr(library, name)()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert type(model) is (fastdense.FastDenseNet if library is fastdense else reference.DenseNet)
    assert set(PARAMETERS) == set(architectures.CONFIGS)


@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_is_torchvisions_both_ways(name):
    torchvision_models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    ours, theirs = getattr(fastdense, name)(), getattr(torchvision_models, name)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(getattr(fastdense, name)().state_dict())


def test_initialisation_is_torchvisions():
    torchvision_models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    torch.manual_seed(0)
    theirs = dict(torchvision_models.DenseNet(16, (2, 2), 32, num_classes=64).named_parameters())
    for name, ours in fastdense.FastDenseNet(16, (2, 2), 32, num_classes=64).named_parameters():
        if ours.numel() > 1000:
            assert ours.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
        elif "classifier" not in name:
            assert torch.equal(ours, theirs[name]), name  # norms: ones and zeros


def test_fan_out_initialisation():
    torch.manual_seed(0)
    wide = fastdense.densenet_cifar(depth=22, growth_rate=48).features.denseblock1.denselayer1.conv1.weight
    assert wide.std().item() == pytest.approx((2 / wide.shape[0]) ** 0.5, rel=0.05)


@pytest.mark.parametrize("library", [fastdense, reference], ids=["fast", "reference"])
def test_densenet_cifar_arguments(library):
    model = library.densenet_cifar(depth=22, growth_rate=8, num_classes=7)
    assert [len(b) for n, b in model.features.named_children() if n.startswith("denseblock")] == [3, 3, 3]
    assert model.features.conv0.out_channels == 16
    assert model.classifier.out_features == 7
    plain = library.densenet_cifar(depth=13, bottleneck=False, compression=1.0, in_channels=1, num_init_features=5)
    assert plain.features.conv0.weight.shape == (5, 1, 3, 3)
    assert not hasattr(plain.features.denseblock1.denselayer1, "conv2")
    assert plain(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 41, "bottleneck": False}, r"depth without bottlenecks must be 3\*n \+ 4 with n >= 1, got 41"),
        ({"depth": 99}, r"depth with bottlenecks must be 6\*n \+ 4 with n >= 1, got 99"),
        ({"depth": 4}, "got 4"),
        ({"compression": 0}, r"compression must be in \(0, 1\], got 0"),
        ({"drop_rate": 1.5}, r"drop_rate must be in \[0, 1\], got 1.5"),
        ({"init": "fan_mid"}, "init must be 'fan_in' or 'fan_out', got 'fan_mid'"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fastdense.densenet_cifar(**kwargs)


# -- weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    return fastdense.densenet_bc_100_12()


def same(model, state_dict):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state_dict.values(), strict=True))


def test_weights_from_a_path_a_url_and_a_training_checkpoint(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    state_dict = trained.state_dict()
    torch.save(state_dict, tmp_path / "plain.pth")
    assert same(fastdense.densenet_bc_100_12(weights=tmp_path / "plain.pth"), state_dict)
    assert same(reference.densenet_bc_100_12(weights=str(tmp_path / "plain.pth")), state_dict)
    assert same(fastdense.densenet_bc_100_12(weights=(tmp_path / "plain.pth").as_uri(), progress=False), state_dict)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state_dict.items()}}, tmp_path / "ddp.pth")
    assert same(fastdense.densenet_bc_100_12(weights=tmp_path / "ddp.pth"), state_dict)


def test_legacy_dotted_keys(trained, tmp_path):
    legacy = {
        key.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        for key in trained.state_dict()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in legacy
    dotted = dict(zip(sorted(legacy), (trained.state_dict()[k] for k in sorted(trained.state_dict())), strict=True))
    torch.save(dotted, tmp_path / "legacy.pth")
    assert same(fastdense.densenet_bc_100_12(weights=tmp_path / "legacy.pth"), trained.state_dict())


def test_weights_that_do_not_fit(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "small.pth")
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        fastdense.densenet_bc_190_40(weights=tmp_path / "small.pth")
    with pytest.raises(ValueError, match="no such file"):
        fastdense.densenet121(weights=tmp_path / "missing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict of tensors, got list"):
        fastdense.densenet121(weights=tmp_path / "list.pth")


def test_torchvision_weights_by_enum_and_name(monkeypatch):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    state_dict = models.densenet121().state_dict()
    entry = models.DenseNet121_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, *args, **kwargs: state_dict)
    for weights in (entry, "IMAGENET1K_V1", "DEFAULT", "DenseNet121_Weights.DEFAULT"):
        assert same(fastdense.densenet121(weights=weights), state_dict)
    with pytest.raises(ValueError, match="weights are for num_classes=1000, got num_classes=3"):
        fastdense.densenet121(weights="DEFAULT", num_classes=3)
    with pytest.raises(ValueError, match=r"weights for densenet169 must be one of DenseNet169_Weights\.IMAGENET1K_V1"):
        fastdense.densenet169(weights=entry)
    with pytest.raises(ValueError, match="torchvision has no weights for densenet264"):
        fastdense.densenet264(weights="DEFAULT")
