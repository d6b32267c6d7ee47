"""Pushing to the hub, with a hub that is not there."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from fettle.errors import UserError
from fettle.export.hub import model_card, push


class Hub:
    """What the library is asked to do."""

    calls: list[tuple[str, dict[str, Any]]]
    fails: str | None = None
    has_card = False

    def __getattr__(self, name: str):
        def call(*_: Any, **options: Any) -> bool:
            Hub.calls.append((name, options))
            if name == Hub.fails:
                raise OSError("no route")
            return Hub.has_card

        return call


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.fails, Hub.has_card = [], None, False
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_folder_is_uploaded_with_its_card(cli, hub, trained: Path, tmp_path: Path) -> None:
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", "me/mine")
    assert ended.code == 0, ended.err
    assert "https://huggingface.co/me/mine" in ended.out
    calls = ["whoami", "create_repo", "upload_folder", "file_exists", "upload_file"]
    assert [name for name, _ in hub.calls] == calls
    assert hub.calls[1][1]["private"] is True
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


@pytest.mark.parametrize("name", ["mine", "a/b/c", "/x", "me/x y!", "me/"])
def test_a_name_that_is_none(cli, trained, tmp_path, name) -> None:
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", name)
    assert ended.code == 2 and "owner/name" in ended.err


def test_a_card_that_is_there_stays(cli, hub, trained, tmp_path) -> None:
    hub.has_card = True
    ended = cli("export", "--model", trained, "--to", tmp_path / "merged", "--push", "me/mine")
    assert ended.code == 0 and "upload_file" not in [name for name, _ in hub.calls]


def test_every_file_of_a_failed_upload_is_named(hub, tmp_path) -> None:
    hub.fails, files = "upload_file", [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    with pytest.raises(UserError) as error:
        push(files, "me/mine", "card")
    assert all(f"`hf upload me/mine {file}`" in str(error.value) for file in files)


@pytest.mark.parametrize(
    ("form", "use"),
    [("gguf", "llama-server -hf me/mine"), ("adapter-gguf", "llama-server -m BASE.gguf --lora m.gguf")],
)
def test_a_files_card_says_how_to_run_it(trained: Path, form: str, use: str) -> None:
    card = model_card(str(trained), "m.gguf", "me/mine", form)
    assert use in card and "Fine-tuned and exported with fettle." in card


@pytest.mark.parametrize("text", ["a: [", "- a", "word"])
def test_a_broken_record_of_the_run_is_found_before_anything_is_written(
    cli, hub, trained, tmp_path, text
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "run.yaml").write_text(text)
    ended = cli("export", "--model", run, "--to", tmp_path / "merged", "--push", "me/mine")
    assert ended.code == 2 and "run.yaml is malformed" in ended.err
    assert hub.calls == [] and not (tmp_path / "merged").exists()


def test_a_model_of_the_hub_is_named_as_the_base(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fettle.adapters.model_ref.locate", lambda name, **_: small_model)
    card = model_card("them/theirs", "merged", "me/mine", "safetensors")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "them/theirs"


def test_a_plain_model_is_not_called_fine_tuned(small_model: Path) -> None:
    card = model_card(str(small_model), "merged", "me/mine", "safetensors")
    assert "Exported with fettle." in card and "vllm serve me/mine" in card
