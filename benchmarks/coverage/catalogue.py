"""The models of the table, each with an image about as small as its architecture takes.

A small image saves time and changes nothing of the channels. Sizes are sides of square images in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torchvision

from compress.errors import InputError

_SMALL = 64
"""Of every model that is not named with another size below."""

_TORCHVISION = {
    "inception_v3": 299,  # its auxiliary head takes no smaller one
    "maxvit_t": 224,
    "vit_h_14": 56,
    **dict.fromkeys(("swin_t", "swin_s", "swin_b"), 112),
    **dict.fromkeys(("swin_v2_t", "swin_v2_s", "swin_v2_b"), 128),
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}

# NAME, NAME:SIZE, or NAME@SIZE where the network must be told the size when it is built; + traces with embedding=True.
_TIMM = """
bat_resnext26ts:256 beit_base_patch16_224@64 botnet26t_256@64 caformer_s18 cait_xxs24_224@64 coat_tiny@64
coatnet_0_224@64 coatnet_pico_rw_224@64 convit_tiny@64 convmixer_768_32 convnext_atto convnextv2_atto+
crossvit_tiny_240 csatv2 cspdarknet53 cspresnet50 darknet53 davit_tiny deit3_small_patch16_224@64
deit_tiny_distilled_patch16_224@64 densenet121 dla34 dm_nfnet_f0 dpn68 ecaresnet50t edgenext_xx_small
efficientformer_l1:224 efficientformerv2_s0@64 efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0 efficientvit_m0
ese_vovnet19b_dw eva02_tiny_patch14_224@112 fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcresnet33ts
gcvit_xxtiny@64 gernet_s ghostnet_100 ghostnetv2_100 gmixer_12_224@64 gmlp_ti16_224@64+ halonet26t:256 hardcorenas_a
hgnet_tiny hgnetv2_b0 hiera_tiny_224@64 hrnet_w18_small inception_next_atto inception_resnet_v2:96 inception_v4:96
lambda_resnet26t lcnet_050 legacy_senet154 legacy_seresnet18 legacy_xception levit_128s@64 mambaout_femto+
maxvit_pico_rw_256@64 maxvit_tiny_tf_224:224 mixer_s32_224@64 mnasnet_small mobilenetv3_small_100
mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge
nest_tiny@64 nextvit_small nfnet_l0 pit_ti_224@64 pnasnet5large poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002
regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224@64 resnest14d resnet18 resnet50d
resnetv2_50 resnetv2_50x1_bit+ resnext50_32x4d rexnet_100 selecsls42b semnasnet_075 sequencer2d_s seresnet50 shvit_s1
skresnet18 spnasnet_100 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224@112 swinv2_cr_tiny_224@112
swinv2_tiny_window8_256@128 tf_efficientnet_b0 tf_mixnet_s tiny_vit_5m_224 tinynet_e tresnet_m twins_svt_small
visformer_tiny@64 vit_small_patch16_224@64 vit_tiny_patch16_224@64 vitamin_small_224@64 volo_d1_224@64 vovnet39a
xception41 xcit_nano_12_p16_224
"""

QUICK = (
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "timm:test_byobnet",
    "timm:test_convnext",
    "timm:test_efficientnet_gn",
    "timm:test_mambaout",
    "timm:test_maxvit",
    "timm:test_nfnet",
    "timm:test_resnet",
    "timm:test_vit",
    "timm:mobileone_s0",
)
"""A dozen small ones of as many kinds."""


@dataclass(frozen=True)
class Subject:
    """A model of the table.

    Attributes:
        model: its factory.
        size: side of the image.
        build: further arguments of the factory.
        part: the submodule that alone is traced; None for the whole.
        embedding: whether channels that normalisations mix may go: without them the model has none.
    """

    model: str
    size: int = _SMALL
    build: dict[str, Any] = field(default_factory=dict)
    part: str | None = None
    embedding: bool = False


def _classification() -> list[Subject]:
    return [_torchvision(name) for name in torchvision.models.list_models(module=torchvision.models)]


def _segmentation() -> list[Subject]:
    return [_torchvision(name) for name in torchvision.models.list_models(module=torchvision.models.segmentation)]


def _detection() -> list[Subject]:
    names = torchvision.models.list_models(module=torchvision.models.detection)
    return [_torchvision(name, part="backbone") for name in names]


def _timm() -> list[Subject]:
    return [_of_timm(entry) for entry in _TIMM.split()]


def _quick() -> list[Subject]:
    return [subject for pattern in QUICK for subject in _matching(pattern)]


def _all() -> list[Subject]:
    return _classification() + _segmentation() + _detection() + _timm()


SETS: dict[str, Callable[[], list[Subject]]] = {
    "quick": _quick,
    "torchvision": _classification,
    "segmentation": _segmentation,
    "detection": _detection,
    "timm": _timm,
    "all": _all,
}


def chosen(patterns: Sequence[str]) -> list[Subject]:
    """The models that the patterns mean, each once: sets, factories, and factories with * and ?.

    Raises:
        InputError: a pattern with * or ? fits no model of the table, or names neither a set nor a factory.
    """
    found = {}
    for pattern in patterns:
        for subject in SETS[pattern]() if pattern in SETS else _matching(pattern):
            found[subject.model] = subject
    return list(found.values())


def _matching(pattern: str) -> list[Subject]:
    subjects = [subject for subject in _all() if fnmatchcase(subject.model, pattern)]
    if subjects:
        return subjects
    if ":" not in pattern or set(pattern) & set("*?["):
        raise InputError(
            f"--models {pattern!r} fits no model of the table: write a set ({', '.join(SETS)}) or timm:NAME."
        )
    # A model that is not in the table comes with the image that timm gives it, or with a small one.
    prefix, _, name = pattern.partition(":")
    return [Subject(pattern, _timm_size(name)) if prefix == "timm" else Subject(pattern)]


def _torchvision(name: str, part: str | None = None) -> Subject:
    size = _TORCHVISION.get(name, _SMALL)
    build: dict[str, Any] = {}
    if name.startswith("vit_"):
        build = {"image_size": size}
    elif name in ("googlenet", "inception_v3"):
        build = {"aux_logits": True}  # which training runs, and evaluation does not
    return Subject(f"torchvision:{name}", size, build, part)


def _of_timm(entry: str) -> Subject:
    entry, mixed, _ = entry.partition("+")
    name, _, told = entry.partition("@")
    if told:
        return Subject(f"timm:{name}", int(told), {"img_size": int(told)}, embedding=bool(mixed))
    name, _, size = entry.partition(":")
    return Subject(f"timm:{name}", int(size or _SMALL), embedding=bool(mixed))


def _timm_size(name: str) -> int:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return int(cfg.input_size[1]) if cfg is not None else _SMALL
