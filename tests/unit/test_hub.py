"""Pushing and pulling a delta: folders, a hub on this machine, damage, other bases."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pathtune import hub
from pathtune.backends.base import ModelInfo
from pathtune.deltafile import DeltaFile
from pathtune.errors import PathtuneError, UsageError
from tests import fake_hub
from tests.unit.test_deltafile import make, weights

RESULTS = {"test": None}


@dataclass
class Base:
    """What checking a base asks of a backend."""

    tensors: dict = field(default_factory=weights)

    def stored_weights(self):
        return self.tensors


@pytest.fixture
def run(tmp_path) -> Path:
    """Write a run folder with a delta for the model "toy"."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    make(weights()).save(folder / "delta.safetensors")
    (folder / "README.md").write_text("# a card\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    (folder / "config.yaml").write_text("train: secret/train.xyz\n", encoding="utf-8")
    return folder


@pytest.fixture
def toy(monkeypatch):
    """Let the model "toy" be a released one that is available here."""
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return Base(weights(seed=5) if name == "other" else weights())

    info = ModelInfo("toy", "toy", True, "here", "toy.pth")
    monkeypatch.setattr(hub, "models", lambda: [info])
    monkeypatch.setattr(hub, "load", load)
    return asked


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Point the hub's client to a hub on this machine."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with fake_hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def damaged(whole: bytes) -> bytes:
    """Flip a bit of a value: the file can be read, and is another delta."""
    flipped = bytearray(whole)
    flipped[8 + int.from_bytes(whole[:8], "little")] ^= 1
    return bytes(flipped)


def test_what_is_pushed_to_a_folder_can_be_pulled(run, toy, tmp_path):
    pushed = hub.push(run, str(tmp_path / "shared"))
    assert set(contents(tmp_path / "shared")) == set(pushed["files"])
    # Settings name files of one's own machine, and stay there.
    assert set(pushed["files"]) == {
        "delta.safetensors",
        "README.md",
        "metrics.json",
        "SHA256SUMS",
    }
    pulled = hub.pull(str(tmp_path / "shared"), tmp_path / "mine")
    assert pulled["base_checked"]
    assert toy == [("toy", {"device": "cpu", "head": None, "trust_checkpoint": False})]
    assert contents(tmp_path / "mine") == contents(tmp_path / "shared")
    original = (run / "delta.safetensors").read_bytes()
    assert Path(pulled["delta"]).read_bytes() == original


def test_a_delta_alone_is_pushed_with_a_card(run, tmp_path):
    hub.push(run / "delta.safetensors", str(tmp_path / "copper-r2scan"))
    card = (tmp_path / "copper-r2scan" / "README.md").read_text(encoding="utf-8")
    assert "# copper-r2scan" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "toy"
    assert "H" in header["tags"]


def test_nothing_is_overwritten_silently(run, toy, tmp_path):
    shared, mine = str(tmp_path / "shared"), tmp_path / "mine"
    hub.push(run, shared)
    with pytest.raises(UsageError, match="--overwrite"):
        hub.push(run, shared)
    hub.push(run, shared, overwrite=True)
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        hub.pull(shared, mine)
    assert list(contents(mine)) == ["notes.txt"]
    hub.pull(shared, mine, overwrite=True)
    assert (mine / "notes.txt").read_text() == "precious"
    with pytest.raises(UsageError, match="the source itself"):
        hub.pull(shared, Path(shared), overwrite=True)


def test_a_damaged_delta_is_refused_and_nothing_is_written(run, toy, tmp_path):
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    hub.push(run, str(shared))
    whole = (shared / "delta.safetensors").read_bytes()
    (shared / "delta.safetensors").write_bytes(damaged(whole))
    DeltaFile.load(shared / "delta.safetensors")
    with pytest.raises(PathtuneError, match="differs from its checksum"):
        hub.pull(str(shared), mine)
    (shared / "delta.safetensors").write_bytes(whole)
    (shared / "SHA256SUMS").unlink()
    with pytest.raises(PathtuneError, match="no SHA256SUMS"):
        hub.pull(str(shared), mine)
    (shared / "delta.safetensors").unlink()
    with pytest.raises(PathtuneError, match=r"no delta\.safetensors"):
        hub.pull(str(shared), mine)
    assert not mine.exists()


@pytest.mark.parametrize("line", ["0" * 64 + "  ../../evil", "no checksum at all"])
def test_checksums_of_other_files_are_refused(run, toy, tmp_path, line):
    hub.push(run, str(tmp_path / "shared"))
    with open(tmp_path / "shared" / "SHA256SUMS", "a", encoding="utf-8") as sums:
        sums.write(line + "\n")
    with pytest.raises(PathtuneError, match="which is not there"):
        hub.pull(str(tmp_path / "shared"), tmp_path / "mine")


def test_an_edited_card_is_no_damage(run, toy, tmp_path):
    hub.push(run, str(tmp_path / "shared"))
    (tmp_path / "shared" / "README.md").write_text("# edited", encoding="utf-8")
    hub.pull(str(tmp_path / "shared"), tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "# edited"


def test_another_base_is_refused(run, toy, tmp_path):
    hub.push(run, str(tmp_path / "shared"))
    with pytest.raises(PathtuneError, match=r"made for 'toy'.*first in 'a.weight'"):
        hub.pull(str(tmp_path / "shared"), tmp_path / "mine", model="other")
    assert not (tmp_path / "mine").exists()


def test_a_base_that_is_not_here_is_not_compared(run, tmp_path):
    hub.push(run, str(tmp_path / "shared"))
    assert not hub.pull(str(tmp_path / "shared"), tmp_path / "mine")["base_checked"]


def test_a_missing_source_is_said(tmp_path):
    with pytest.raises(PathtuneError, match="no such folder"):
        hub.pull(str(tmp_path / "nowhere"), tmp_path / "mine")
    with pytest.raises(PathtuneError, match="no such delta file"):
        hub.push(tmp_path / "nowhere", str(tmp_path / "shared"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://owner/name", "owner/name"),
        ("owner/my-delta.v2", "owner/my-delta.v2"),
        ("./owner/name", None),
        ("name", None),
        ("a/b/c", None),
        ("../name", None),
    ],
)
def test_what_is_a_repository_and_what_a_folder(address, expected):
    assert hub.repository(address) == expected


def test_an_existing_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.repository("owner/name") is None
    assert hub.repository("hf://owner/name") == "owner/name"
    with pytest.raises(UsageError, match="hf://owner/name"):
        hub.repository("hf://name")


def test_without_the_client_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pathtune\[hub\]"):
        hub.push(run, "hf://owner/name")


def test_what_is_pushed_to_a_hub_can_be_pulled(run, toy, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = hub.push(run, "hf://me/copper")
    assert set(server.repositories["me/copper"]) == set(pushed["files"])
    pulled = hub.pull("me/copper")
    assert pulled["output"] == "copper"
    assert pulled["base_checked"]
    assert contents(Path("copper")) == server.repositories["me/copper"]


def test_a_hub_keeps_its_delta_until_told(run, server):
    hub.push(run, "hf://me/copper")
    before = dict(server.repositories["me/copper"])
    make(weights(), seed=9).save(run / "delta.safetensors")
    with pytest.raises(UsageError, match="--overwrite"):
        hub.push(run, "hf://me/copper")
    assert server.repositories["me/copper"] == before
    hub.push(run, "hf://me/copper", overwrite=True)
    new = (run / "delta.safetensors").read_bytes()
    assert server.repositories["me/copper"]["delta.safetensors"] == new


def test_a_damaged_delta_of_a_hub_is_refused(run, toy, server, tmp_path):
    hub.push(run, "hf://me/copper")
    whole = server.repositories["me/copper"]["delta.safetensors"]
    server.repositories["me/copper"]["delta.safetensors"] = damaged(whole)
    with pytest.raises(PathtuneError, match="differs from its checksum"):
        hub.pull("hf://me/copper", tmp_path / "mine")


def test_what_a_hub_refuses_is_one_sentence(run, server, tmp_path):
    with pytest.raises(PathtuneError, match=r"forbidden/x.*login"):
        hub.push(run, "hf://forbidden/x")
    with pytest.raises(PathtuneError, match=r"hf://me/nothing has no delta"):
        hub.pull("hf://me/nothing", tmp_path / "mine")


def test_a_hub_that_is_not_there_is_one_sentence(run, server, tmp_path, monkeypatch):
    constants = sys.modules["huggingface_hub.constants"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PathtuneError, match="the hub does not give or take me/x"):
        hub.push(run, "hf://me/x")
