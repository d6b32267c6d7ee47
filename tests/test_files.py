"""Files that are there whole or not at all, and the checks before a job starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fettle.errors import UserError
from fettle.files import (
    human_bytes,
    only_process,
    replace_folder,
    require_free_space,
    require_new_folder,
    sha256_of,
    shell_path,
    sibling,
    write_aside,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    with write_aside(target) as aside:
        aside.write_text("half")
        assert not target.exists()
        assert aside.parent == target.parent  # or the rename would be a copy
    assert target.read_text() == "half"
    assert names(target.parent) == ["report.html"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()  # an empty folder is as good as none
    with write_aside(target) as aside:
        aside.mkdir()
        (aside / "config.json").write_text("{}")
        assert names(target) == []
    assert names(tmp_path) == ["model"]
    assert names(target) == ["config.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with write_aside(tmp_path / "model") as aside:
            aside.mkdir()
            (aside / "part").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == []


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("old")
    for name, replace in (("file", False), ("folder", False), ("folder", True)):
        with (
            pytest.raises(UserError, match=f"{name} .*already"),
            write_aside(tmp_path / name, replace=replace),
        ):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "old"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with write_aside(tmp_path / "file") as aside:
            aside.write_text("mine")
            (tmp_path / "file").write_text("another's")

    with pytest.raises(UserError, match="already exists"):
        write()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "another's"


def test_replacing_a_file_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    target.write_text("old")

    def fail() -> None:
        with write_aside(target, replace=True) as aside:
            aside.write_text("half")
            raise OSError

    with pytest.raises(OSError):
        fail()
    assert target.read_text() == "old"
    with write_aside(target, replace=True) as aside:
        aside.write_text("new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["state.json"]


def test_replacing_a_link_writes_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(target)
    with write_aside(link, replace=True) as aside:
        assert aside.parent == target.parent
        aside.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"


def model_at(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)
    return folder


def fail_at(folder: Path) -> None:
    model_at(folder, "half")
    raise OSError("the disk is full")


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_replacing_a_folder_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    target = model_at(tmp_path / "model", "old")
    with pytest.raises(OSError, match="full"), replace_folder(target) as aside:
        fail_at(aside)
    assert (target / "config.json").read_text() == "old" and names_in(tmp_path) == ["model"]
    with replace_folder(target) as aside:
        model_at(aside, "new")
        assert (target / "config.json").read_text() == "old"
    assert (target / "config.json").read_text() == "new" and names_in(tmp_path) == ["model"]


def test_a_folder_that_cannot_take_the_name_leaves_it_to_the_old_one(tmp_path: Path) -> None:
    target = model_at(tmp_path / "model", "old")
    with pytest.raises(FileNotFoundError), replace_folder(target):
        pass  # nothing was made
    assert (target / "config.json").read_text() == "old" and names_in(tmp_path) == ["model"]


def test_a_folder_that_a_killed_process_had_renamed_is_put_back(tmp_path: Path) -> None:
    target, dead = tmp_path / "model", 2**22 + 7  # beyond any process's number
    model_at(tmp_path / f".replaced-{dead}-model", "old")
    with pytest.raises(OSError, match="full"), replace_folder(target) as aside:
        fail_at(aside)
    assert (target / "config.json").read_text() == "old"
    model_at(tmp_path / f".replaced-{dead}-model", "older")  # killed before it was deleted
    with replace_folder(target) as aside:
        model_at(aside, "new")
    assert (target / "config.json").read_text() == "new" and names_in(tmp_path) == ["model"]


@pytest.mark.parametrize("entry", ["thesis.txt", "photos/"])
def test_only_a_models_folder_is_replaced(tmp_path: Path, entry: str) -> None:
    target = model_at(tmp_path / "model", "old")
    if entry.endswith("/"):
        (target / entry).mkdir()
    else:
        (target / entry).write_text("x")
    with (
        pytest.raises(UserError, match=f"it contains '{entry.rstrip('/')}', which is not a model file"),
        replace_folder(target),
    ):
        pass
    (empty_of_models := tmp_path / "notes").mkdir()
    (empty_of_models / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a complete model"):
        require_new_folder(empty_of_models, "it", replace=True)


def test_the_leavings_of_a_killed_process_are_removed_and_a_living_ones_kept(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal\nfrom fettle.files import write_aside\n"
        f"with write_aside(pathlib.Path({str(tmp_path / 'model')!r})) as aside:\n"
        "    aside.mkdir()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(names(tmp_path)) == 1, "the kill should have left the partial folder"
    living = tmp_path / f".partial-{os.getppid()}-model"
    other = tmp_path / ".partial-999999999-a-model"
    living.mkdir()
    other.mkdir()
    with write_aside(tmp_path / "model") as aside:
        aside.mkdir()
    assert names(tmp_path) == sorted(["model", living.name, other.name])


def test_a_model_set_aside_by_a_killed_process_of_the_same_number_is_put_back(tmp_path: Path) -> None:
    """In a container every run is process 1."""
    model_at(tmp_path / f".replaced-{os.getpid()}-model", "old")
    require_new_folder(tmp_path / "model", "it", replace=True)
    assert names(tmp_path) == ["model"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with (
        pytest.raises(UserError, match="runs is a file, not a folder"),
        write_aside(tmp_path / "runs" / "a" / "b"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("run.yaml", "another run .run.yaml"),
        ("checkpoint-40", "training run .checkpoint-40"),
        ("adapter_config.json", "an adapter"),
        ("model.safetensors", "a model"),
        ("notes.txt", "'notes.txt'"),
    ],
)
def test_a_used_output_folder_is_refused_with_what_it_holds(tmp_path: Path, held: str, said: str) -> None:
    require_new_folder(tmp_path, "the run")  # empty
    require_new_folder(tmp_path / "a" / "b", "the run")  # absent
    assert names(tmp_path) == []  # the check itself makes nothing
    (tmp_path / held).touch()
    with pytest.raises(UserError, match=f"{tmp_path.name} already contains .*{said}.*the run needs"):
        require_new_folder(tmp_path, "the run")
    with pytest.raises(UserError, match="is a file"):
        require_new_folder(tmp_path / held, "the run")


def test_a_read_only_place_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)  # root may write everywhere
    for check in (
        lambda path: require_new_folder(path, "the run"),
        lambda path: write_aside(path).__enter__(),
    ):
        with pytest.raises(UserError, match=f"run cannot be written: {tmp_path} is read-only"):
            check(tmp_path / "not" / "run")
    assert names(tmp_path) == []


def test_too_little_disk_is_said_in_human_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_free_space(tmp_path / "not" / "there", 1, "saving the model")
    with pytest.raises(UserError, match=r"saving the model needs [\d.]+ [A-Z]B .*" + str(tmp_path)):
        require_free_space(tmp_path / "not" / "there", free * 2, "saving the model")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 3_400_000_000)
    )
    with pytest.raises(UserError, match=r"needs 7\.64 GB of disk, but only 3\.40 GB is free"):
        require_free_space(tmp_path, 7_642_000_000, "saving the model")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994_000, "9.99 MB"),
        (9_996_000, "10.0 MB"),
        (999_940_000, "999.9 MB"),
        (999_960_000, "1.00 GB"),
        (16e9, "16.0 GB"),
        (2.5e15, "2500.0 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_sha256_counts_contents_and_order_but_not_names(tmp_path: Path) -> None:
    def file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    ab, c, a, bc, same = file("1", "ab"), file("2", "c"), file("3", "a"), file("4", "bc"), file("5", "ab")
    assert sha256_of([ab, c]) == sha256_of([same, c])
    assert len({sha256_of(files) for files in ([ab, c], [c, ab], [a, bc], [ab], [])}) == 5


def test_a_folder_is_held_by_one_process(tmp_path):
    work = f"""
from pathlib import Path
from fettle.errors import UserError
from fettle.files import only_process
try:
    with only_process(Path({str(tmp_path)!r})):
        print("held")
except UserError as error:
    print(error)
"""

    def other_process() -> str:
        return subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True).stdout

    with only_process(tmp_path):
        assert "another process is using" in other_process()
    assert other_process() == "held\n"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my run/", "my run-merged"),
        ("run.v1", "run.v1-merged"),
        ("a/run", "a/run-merged"),
        ("/a/run", "/a/run-merged"),
    ],
)
def test_a_sibling_has_a_longer_name(path: str, expected: str) -> None:
    assert str(sibling(Path(path), "-merged")) == expected


@pytest.mark.parametrize("path", [".", "./", "sub/.."])
def test_a_sibling_of_the_folder_one_is_in(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert sibling(Path(path), ".gguf") == tmp_path / "run.gguf"


@pytest.mark.parametrize("name", ["my run", "it's", "-x", "$HOME", "a;b", "run.v1"])
def test_a_path_is_one_word_of_a_shell_and_no_option(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    done = subprocess.run(
        f"ls -d {shell_path(Path(name))}",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == Path(name)


DEAD = 999999999
"""No process has this number."""


def test_what_a_killed_process_left_at_its_start_does_not_occupy_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / ".lock").touch()
    (target / f".partial-{DEAD}-run.yaml").write_text("half")
    require_new_folder(target, "the run")
    with write_aside(target) as aside:
        aside.mkdir()
        (aside / "config.json").write_text("{}")
    assert names(tmp_path) == ["run"] and names(target) == ["config.json"]


def test_what_a_running_process_writes_does(tmp_path: Path) -> None:
    (tmp_path / f".partial-{os.getppid()}-run.yaml").write_text("half")
    with pytest.raises(UserError, match=r"already contains '\.partial"):
        require_new_folder(tmp_path, "the run")


def test_a_folder_set_aside_comes_back_without_overwrite_too(tmp_path: Path) -> None:
    old = tmp_path / f".replaced-{DEAD}-model"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(UserError, match="already contains a model"):
        require_new_folder(tmp_path / "model", "the exported model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"


OPERATIONS = ("rename", "replace", "unlink", "mkdir", "rmdir")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("is_folder", [False, True])
def test_killed_between_any_two_operations_the_old_or_the_new_is_there(
    tmp_path: Path, is_folder: bool
) -> None:
    """A child process is ended at its first, second, ... change of the disk, until one comes to its end."""

    def whole(path: Path) -> str | None:
        files = {"config.json", "a.safetensors"}
        if not path.exists() or (is_folder and set(names(path)) != files):
            return None
        texts = {(path / name).read_text() for name in files} if is_folder else {path.read_text()}
        return texts.pop() if len(texts) == 1 else None

    def write(path: Path, text: str) -> None:
        if is_folder:
            path.mkdir()
        for file in (path / "config.json", path / "a.safetensors") if is_folder else (path,):
            file.write_text(text)

    def replace(path: Path) -> None:
        with replace_folder(path) if is_folder else write_aside(path, replace=True) as aside:
            write(aside, "new")

    def child(path: Path, at: int) -> None:
        left = at

        def counted(operation):  # type: ignore[no-untyped-def]
            def run(*args, **options):  # type: ignore[no-untyped-def]
                nonlocal left
                if left == 0:
                    os._exit(9)  # as SIGKILL: nothing is tidied up
                left -= 1
                return operation(*args, **options)

            return run

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        replace(path)
        os._exit(0)

    for at in range(100):
        place = tmp_path / str(at)
        place.mkdir()
        write(target := place / "model", "old")
        if (pid := os.fork()) == 0:
            child(target, at)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        kept = [whole(path) for path in (target, *place.glob(".replaced-*"))]
        assert "old" in kept or "new" in kept, f"lost at operation {at}"
        replace(target)
        assert whole(target) == "new" and names(place) == ["model"]
        if code == 0:
            break
    assert code == 0 and at > (3 if is_folder else 0)
