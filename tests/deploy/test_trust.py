"""Plans are executed only where somebody vouches for them."""

import hashlib
from pathlib import Path

import pytest

from compress.errors import InputError
from deploy import manifest
from deploy.runtimes import TensorSpec
from deploy.trust import trust_plan, trusted_plan

CONTENT = b"machine code" * 20


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    path = folder / "net.fp16.plan"
    path.write_bytes(CONTENT)
    specs = (TensorSpec("images", "float16", ("batch", 3, 8, 8)),)
    manifest.add(folder, path.name, kind="plan", precision="fp16", inputs=specs, outputs=specs)
    return path


def test_a_plan_built_here_is_trusted(plan: Path) -> None:
    trust_plan(hashlib.sha256(CONTENT).hexdigest())
    content, entry = trusted_plan(plan)
    assert content == CONTENT
    assert entry.precision == "fp16"


def test_building_another_plan_keeps_the_trust_in_the_first(plan: Path) -> None:
    trust_plan(hashlib.sha256(CONTENT).hexdigest())
    trust_plan("ab" * 32)
    trust_plan("ab" * 32)
    assert trusted_plan(plan)[0] == CONTENT


def test_a_plan_from_elsewhere_is_refused_even_with_its_own_manifest(plan: Path) -> None:
    with pytest.raises(InputError, match=r"net\.fp16\.plan was not built by you on this machine.*--trust-manifest"):
        trusted_plan(plan)


def test_a_manifest_that_the_user_names_is_enough(plan: Path) -> None:
    assert trusted_plan(plan, trusted_manifest=plan.parent / "manifest.json")[0] == CONTENT


def test_one_changed_byte_is_refused_whoever_vouches(plan: Path) -> None:
    changed = bytearray(CONTENT)
    changed[7] ^= 1
    trust_plan(hashlib.sha256(CONTENT).hexdigest())
    trust_plan(hashlib.sha256(changed).hexdigest())
    plan.write_bytes(changed)
    for listed in (None, plan.parent / "manifest.json"):
        with pytest.raises(InputError, match="is not the file that the manifest records"):
            trusted_plan(plan, trusted_manifest=listed)


def test_a_plan_without_an_entry_is_refused(plan: Path) -> None:
    stranger = plan.with_name("stranger.plan")
    stranger.write_bytes(CONTENT)
    trust_plan(hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(InputError, match=r"stranger\.plan does not stand in .*manifest\.json as a plan"):
        trusted_plan(stranger)


def test_an_entry_of_another_kind_does_not_do(tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    path.write_bytes(CONTENT)
    manifest.add(tmp_path, path.name, kind="onnx", precision="fp32", inputs=(), outputs=())
    trust_plan(hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(InputError, match="as a plan, so it is not executed"):
        trusted_plan(path)


def test_without_a_manifest_nothing_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    path.write_bytes(CONTENT)
    with pytest.raises(InputError, match=r"Cannot read .*manifest\.json"):
        trusted_plan(path)
