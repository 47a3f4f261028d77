"""Model factories: names, users' functions, published weights, and what a wrong name is told."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchvision import models as torchvision_models

from compress import models
from compress.errors import InputError, MissingExtraError, WorkError


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("espalier:resnet-20", "did you mean 'resnet20'"),
        ("torchvision:resnet5", "did you mean 'resnet50'"),
        ("torchvision:raft_large", "no model 'raft_large' of classification, segmentation or detection"),
        ("timm:mobilenetv3_smal_100", "did you mean 'mobilenetv3_small_100'"),
        ("resnet50", "names no model"),
        ("torchvision:", "names no model"),
    ],
)
def test_unknown_names_are_told_the_nearest(factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.build(factory)


@pytest.mark.parametrize("factory", ["espalier:resnet20", "torchvision:resnet18", "timm:resnet18"])
def test_unknown_arguments_are_named(factory: str) -> None:
    with pytest.raises(InputError, match="num_clases"):
        models.build(factory, num_clases=3)


def test_torchvision_and_timm_models_take_num_classes() -> None:
    assert models.build("torchvision:squeezenet1_1", num_classes=5).num_classes == 5
    assert models.build("timm:mobilenetv3_small_050", num_classes=5).num_classes == 5


def test_googlenet_gives_a_tensor_in_training_unless_asked_otherwise() -> None:
    assert models.build("torchvision:googlenet").aux1 is None
    assert models.build("torchvision:googlenet", aux_logits=True).aux1 is not None


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[timm\]"):
        models.build("timm:resnet18")


class TestUserFunctions:
    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "usernets").mkdir()
        (tmp_path / "usernets" / "__init__.py").write_text("")
        (tmp_path / "usernets" / "tiny.py").write_text(
            "from torch import nn\n"
            "def net(width=2):\n    return nn.Conv2d(3, width, 1)\n"
            "def text():\n    return 'no module'\n"
            "number = 3\n"
        )
        (tmp_path / "usernets" / "broken.py").write_text("import nothing_of_this_name\n")
        monkeypatch.chdir(tmp_path)
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "usernets"]:
            del sys.modules[name]

    @pytest.mark.parametrize("trust", [("usernets",), ("usernets.tiny",), ("*",)])
    def test_trusted_function_in_the_current_directory(self, trust: tuple[str, ...]) -> None:
        path = list(sys.path)
        assert models.build("usernets.tiny:net", trust=trust, width=5).out_channels == 5
        assert sys.path == path

    @pytest.mark.parametrize("trust", [(), ("usernet",), ("usernets.other",)])
    def test_untrusted_module_is_not_imported(self, trust: tuple[str, ...]) -> None:
        with pytest.raises(InputError, match="--trust usernets"):
            models.build("usernets.tiny:net", trust=trust)
        assert "usernets" not in sys.modules

    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("usernets.absent:net", "Cannot import usernets.absent"),
            ("usernets.broken:net", "nothing_of_this_name"),
            ("usernets.tiny:nett", "did you mean 'net'"),
            ("usernets.tiny:number", "of type int"),
            ("usernets.tiny:text", "returned str"),
        ],
    )
    def test_wrong_references_say_why(self, factory: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            models.build(factory, trust=("*",))


class TestPublishedWeights:
    @pytest.fixture
    def published(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
        """Stands in for the download of squeezenet1_1."""
        state = torchvision_models.squeezenet1_1().state_dict()
        enum = torchvision_models.SqueezeNet1_1_Weights
        monkeypatch.setattr(enum, "get_state_dict", lambda *_, **__: state)
        return state

    @pytest.mark.parametrize(
        "weights", ["DEFAULT", "IMAGENET1K_V1", torchvision_models.SqueezeNet1_1_Weights.IMAGENET1K_V1]
    )
    def test_all_tensors_arrive(self, weights: object, published: dict[str, torch.Tensor]) -> None:
        loaded = models.build("torchvision:squeezenet1_1", weights=weights).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in published.items())

    def test_other_class_count_leaves_the_classifier_fresh(
        self, published: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            model = models.build("torchvision:squeezenet1_1", weights="DEFAULT", num_classes=5)
        loaded = model.state_dict()
        same = {key for key in published if torch.equal(loaded[key], published[key])}
        assert set(published) - same == {"classifier.1.weight", "classifier.1.bias"}
        assert "classifier.1.weight, classifier.1.bias start untrained" in caplog.text

    def test_another_structure_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        enum = torchvision_models.ResNet18_Weights
        state = torchvision_models.resnet18().state_dict()
        monkeypatch.setattr(enum, "get_state_dict", lambda *_, **__: state)
        with pytest.raises(InputError, match="refused its arguments"):
            models.build("torchvision:resnet18", weights="DEFAULT", width_per_group=32)

    def test_unknown_weights_list_the_known(self) -> None:
        with pytest.raises(InputError, match="IMAGENET1K_V2"):
            models.build("torchvision:resnet50", weights="IMAGENET")

    def test_failed_download_is_failed_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("name not known")

        monkeypatch.setattr(torchvision_models.SqueezeNet1_1_Weights, "get_state_dict", fail)
        with pytest.raises(WorkError, match="name not known"):
            models.build("torchvision:squeezenet1_1", weights="DEFAULT")

    def test_the_structure_survives_without_the_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = torchvision_models.googlenet(aux_logits=True, init_weights=False).state_dict()
        monkeypatch.setattr(torchvision_models.GoogLeNet_Weights, "get_state_dict", lambda *_, **__: state)
        kwargs = {"weights": "DEFAULT", "num_classes": 12}
        original = models.build("torchvision:googlenet", **kwargs).eval()
        kept = models.without_weights("torchvision:googlenet", kwargs)
        rebuilt = models.build("torchvision:googlenet", **kept).eval()
        rebuilt.load_state_dict(original.state_dict())
        images = torch.randn(1, 3, 64, 64)
        assert "weights" not in kept
        assert torch.equal(rebuilt(images), original(images))
