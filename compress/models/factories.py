"""Model factories: from a name such as `torchvision:resnet50` to a network.

espalier:NAME             the papers' small networks, `compress.models.networks`
torchvision:NAME          any classification, segmentation or detection network of torchvision
timm:NAME                 any network of timm (an extra)
package.module:function   the user's own, imported only with the user's leave
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from compress.errors import InputError, MissingExtraError, WorkError
from compress.models import networks
from compress.models.weights import SUFFIXES, load_weights, transfer

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (networks.resnet20, networks.resnet32, networks.resnet56, networks.lenet3)
}


_SEGMENTATION = frozenset(torchvision_models.list_models(module=torchvision_models.segmentation))
_DETECTION = frozenset(torchvision_models.list_models(module=torchvision_models.detection))


def build(factory: str, *, trust: Collection[str] = (), **kwargs: Any) -> nn.Module:
    """Build a model, in training mode, with fresh or given weights.

    Args:
        factory: one of the forms above.
        trust: modules that `package.module:function` may import: a top-level package, the exact module, or
            "*" for any.
        **kwargs: go to the factory, except `weights`: a .safetensors, .pth or .pt file with a state dict for
            any factory, or, for torchvision, the name of published weights ("DEFAULT", "IMAGENET1K_V2").
            Published weights of another number of classes than `num_classes` give all but the classifier,
            with a warning. googlenet and inception_v3 are built without their auxiliary classifiers unless
            aux_logits=True, as these make the training output a tuple; segmentation networks unless aux_loss=True.
            Those of segmentation and detection start from a fresh backbone unless weights_backbone names weights.

    Raises:
        InputError: the factory, an argument or the weights cannot be used; the sentence says which and why.
        WorkError: published weights could not be downloaded.
    """
    weights = kwargs.pop("weights", None)
    file = Path(weights).expanduser() if _is_file(weights) else None
    if file is not None and not file.is_file():  # known before a large network is built
        raise InputError(f"The weights {file} do not exist: correct the path in `weights`.")
    prefix, separator, name = factory.partition(":")
    if not (prefix and separator and name):
        raise InputError(
            f"{factory!r} names no model: write espalier:NAME, torchvision:NAME, timm:NAME or package.module:function."
        )
    if prefix == "torchvision" and weights is not None and file is None:
        return _with_published_weights(name, str(weights), kwargs)
    if weights is not None and file is None:
        raise InputError(f"The weights {weights!r} of {factory} are not a file ending in {', '.join(SUFFIXES)}.")
    if prefix in FACTORIES:
        model = FACTORIES[prefix](name, kwargs)
    else:
        model = _call(factory, resolve(factory, trust=trust), kwargs)
    if file is not None:
        load_weights(model, file)
    return model


def without_weights(factory: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that build the network of `build(factory, **kwargs)` without reading or downloading weights.

    Published weights also change the structure (number of classes, `transform_input`, image size), so that
    leaving `weights` out is not enough.
    """
    kept = {key: value for key, value in kwargs.items() if key != "weights"}
    prefix, _, name = factory.partition(":")
    if prefix == "torchvision" and name in _SEGMENTATION:
        kept.pop("weights_backbone", None)  # of detectors it also changes the structure
    weights = kwargs.get("weights")
    if prefix == "torchvision" and weights is not None and not _is_file(weights):
        return _structure(name, _published(name, str(weights)).meta) | kept
    if prefix == "timm":
        kept.pop("pretrained", None)
    return kept


def resolve(reference: str, *, trust: Collection[str]) -> Callable[..., Any]:
    """The function that `package.module:function` names, see `find`.

    Raises:
        InputError: as `find`, or it cannot be called.
    """
    found = find(reference, trust=trust)
    if not callable(found):
        raise InputError(f"{reference} is not a function but of type {type(found).__name__}: name a function.")
    function: Callable[..., Any] = found
    return function


def find(reference: str, *, trust: Collection[str]) -> Any:
    """Import what `package.module:object` names; the current directory is importable meanwhile.

    Raises:
        InputError: the module is not in `trust`, cannot be imported, or has no such object.
    """
    module_name, _, name = reference.partition(":")
    package = module_name.partition(".")[0]
    if not {"*", package, module_name} & set(trust):
        raise InputError(
            f"{reference} would run code of the module {module_name}, which is not trusted: "
            f"add --trust {package} if you trust it."
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise InputError(
            f"Cannot import {module_name} for {reference} ({error}): correct the name, or run where it can be imported."
        ) from error
    finally:
        sys.path.remove(here)
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"The module {module_name} has no {name!r}{_nearest(name, dir(module))}.")
    return found


def _espalier(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if name not in _NETWORKS:
        raise InputError(f"espalier has no model {name!r}{_nearest(name, _NETWORKS)}.")
    return _call(f"espalier:{name}", _NETWORKS[name], kwargs)


def _torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    _check_torchvision(name)
    return _call(
        f"torchvision:{name}",
        torchvision_models.get_model,
        {"name": name, "weights": None, **_structure(name, {}), **kwargs},
    )


def _timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError("timm", "timm", f"The model timm:{name}") from error
    architecture = name.partition(".")[0]  # what follows the dot is a tag of pretrained weights
    if not timm.is_model(architecture):
        raise InputError(f"timm has no model {name!r}{_nearest(architecture, timm.list_models())}.")
    try:
        return _call(f"timm:{name}", timm.create_model, {"model_name": name, **kwargs})
    except OSError as error:
        raise WorkError(f"Cannot download the weights of timm:{name} ({error}): check the network.") from error


FACTORIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "espalier": _espalier,
    "torchvision": _torchvision,
    "timm": _timm,
}


def _with_published_weights(name: str, weights: str, kwargs: dict[str, Any]) -> nn.Module:
    """A torchvision network with weights from its enum, whose classifier may be of another width."""
    enum = _published(name, weights)
    structure = _structure(name, enum.meta) | kwargs
    # torchvision insists on the weights' own classes and auxiliary classifiers, so these go to the second
    # model only.
    own = {
        key: value for key, value in kwargs.items() if key not in ("num_classes", "init_weights", "weights_backbone")
    }
    for auxiliary in ("aux_logits", "aux_loss"):
        if not own.get(auxiliary):
            own.pop(auxiliary, None)
    try:
        source = _call(f"torchvision:{name}", torchvision_models.get_model, {"name": name, "weights": enum, **own})
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of the download is wrong
        raise WorkError(
            f"Cannot download the weights {enum} of torchvision:{name} ({error}): check the network."
        ) from error
    model = _torchvision(name, structure)
    classes = (len(enum.meta["categories"]), structure["num_classes"])
    transfer(model, source.state_dict(), classes=classes, source=str(enum))
    return model


def _published(name: str, weights: str) -> Any:
    """The member of torchvision's weights enum of this model."""
    _check_torchvision(name)
    if name in _DETECTION:
        raise InputError(
            f"The published weights of torchvision:{name} change its normalisation layers, so that {weights!r} do not "
            "fit a fresh one: name a function of your own, package.module:function, that builds it with them."
        )
    enum: Any = torchvision_models.get_model_weights(name)
    member = weights.rpartition(".")[2]  # ResNet50_Weights.IMAGENET1K_V2 is accepted too
    if member not in enum.__members__:
        raise InputError(
            f"torchvision:{name} has no weights {weights!r}: use one of {', '.join(enum.__members__)}, "
            f"or a file ending in {', '.join(SUFFIXES)}."
        )
    return enum[member]


def _structure(name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Default arguments of a torchvision model; `meta`, of its published weights, adds what they imply."""
    defaults: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        defaults |= {"aux_logits": False, "init_weights": False}
        if meta:
            defaults["transform_input"] = True
    if name in _SEGMENTATION | _DETECTION:
        defaults["weights_backbone"] = None  # torchvision's default downloads
    if meta:
        defaults["num_classes"] = len(meta["categories"])
        if name.startswith("vit_"):
            defaults["image_size"] = meta["min_size"][0]
    return defaults


def _is_file(weights: object) -> bool:
    """Whether `weights` is the path of a file rather than the name, or the member, of torchvision's enum."""
    return Path(str(weights)).suffix in SUFFIXES


def _check_torchvision(name: str) -> None:
    names = {*torchvision_models.list_models(module=torchvision_models), *_SEGMENTATION, *_DETECTION}
    if name not in names:
        raise InputError(
            f"torchvision has no model {name!r} of classification, segmentation or detection{_nearest(name, names)}."
        )


def _call(factory: str, function: Callable[..., Any], kwargs: dict[str, Any]) -> nn.Module:
    """Call the factory, and hold it to what it must return."""
    try:
        model = function(**kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"{factory} refused its arguments ({error}): correct them.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{factory} returned {type(model).__name__} instead of a torch.nn.Module.")
    return model


def _nearest(name: str, valid: Iterable[str]) -> str:
    """`: did you mean …`, or all valid names when none is near and they are few."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f": did you mean {near[0]!r}"
    return f": use one of {', '.join(names)}" if len(names) <= 10 else ""
