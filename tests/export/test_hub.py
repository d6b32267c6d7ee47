"""Pushing to the hub, with a hub that is not there."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from fettle.export.hub import model_card


class Hub:
    """What the library is asked to do."""

    calls: list[tuple[str, dict[str, Any]]]
    fails: str | None = None

    def __getattr__(self, name: str):
        def call(*_: Any, **options: Any) -> None:
            Hub.calls.append((name, options))
            if name == Hub.fails:
                raise OSError("no route")

        return call


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.fails = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_folder_is_uploaded_with_its_card(cli, hub, trained: Path, tmp_path: Path) -> None:
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", "me/mine")
    assert ended.code == 0, ended.err
    assert "https://huggingface.co/me/mine" in ended.out
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder", "upload_file"]
    card = hub.calls[-1][1]["path_or_fileobj"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "base_model" not in head  # a folder of this machine
    assert "learning_rate: 0.02" in card and str(tmp_path) not in card


def test_nobody_known_stops_it_before_anything_is_written(cli, hub, trained, tmp_path) -> None:
    hub.fails = "whoami"
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", "me/mine")
    assert ended.code == 2 and "hf auth login" in ended.err
    assert not (tmp_path / "merged").exists()


def test_a_failed_upload_keeps_what_was_exported(cli, hub, trained, tmp_path) -> None:
    hub.fails = "upload_folder"
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", "me/mine")
    assert ended.code == 2 and "hf upload me/mine" in ended.err
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["mine", "a/b/c", "/x"])
def test_a_name_that_is_none(cli, trained, tmp_path, name) -> None:
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", name)
    assert ended.code == 2 and "owner/name" in ended.err


def test_a_files_card_says_how_to_run_it(trained: Path, tmp_path: Path) -> None:
    assert "llama-server -hf me/mine" in model_card(str(trained), [tmp_path / "m.gguf"], "me/mine")
