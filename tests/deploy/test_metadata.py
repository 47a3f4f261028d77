"""What a file says about itself is checked before anybody computes with it."""

import json
from typing import Any

import onnx
import pytest

from compress.errors import InputError
from deploy.metadata import Metadata, decode, encode

ABOUT = Metadata(
    version="1",
    torch_version="2",
    image_shape=(3, 8, 8),
    classes=("a", "b"),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    checkpoint_sha256="",
    other={"note": "mine"},
)


def entries(**changes: Any) -> list[onnx.StringStringEntryProto]:
    written = encode(ABOUT) | {f"espalier.{key}": json.dumps(value) for key, value in changes.items()}
    return [onnx.StringStringEntryProto(key=key, value=value) for key, value in written.items()]


def test_what_is_written_is_read() -> None:
    assert decode(entries(), "x.onnx") == ABOUT


def test_files_of_other_tools_say_nothing() -> None:
    assert decode([onnx.StringStringEntryProto(key="producer", value="another")], "x.onnx") is None


def test_files_from_before_a_field_have_its_default() -> None:
    old = [item for item in entries() if item.key not in ("espalier.precision", "espalier.target", "espalier.resize")]
    found = decode(old, "x.onnx")
    assert found is not None
    assert (found.precision, found.target, found.resize) == ("fp32", "any", None)


@pytest.mark.parametrize(
    "change",
    [
        {"std": [0.2, 0.0, 0.2]},
        {"mean": [float("nan"), 0.5, 0.5]},
        {"mean": [0.5]},
        {"mean": []},
        {"image_shape": [3, -8, 0]},
        {"resize": -5},
        {"target": "tpu"},
        {"precision": "fp64"},
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"x\.onnx lacks Espalier's description"):
        decode(entries(**change), "x.onnx")
