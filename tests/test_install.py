"""The package as others install it: its wheel in an empty environment, without the repository and its test tools."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    """The packages that requirements name, as pip spells them."""
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def test_users_install_what_the_readme_explains_and_no_tool_for_tests() -> None:
    table = (ROOT / "README.md").read_text().partition("## Dependencies")[2]
    explained = re.findall(r"^\| ([a-z][\w, -]*) \|", table, flags=re.MULTILINE)
    explained = {name for cell in explained for name in cell.split(", ")} - {"dependency"}
    assert names(PROJECT["dependencies"]) == explained
    extras = PROJECT["optional-dependencies"].values()
    assert names(PROJECT["dependencies"]).isdisjoint(set().union(*map(names, extras)))


# --- in an environment of its own ----------------------------------------------------------------------------


def run(*words: object, folder: Path) -> str:
    """What a command prints, with nothing of this environment: only what is installed can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with fettle's wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("install")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    probe = [*pip, "download", "--no-deps", "--retries", "0", "--dest", str(folder), "setuptools>=77"]
    if subprocess.run(probe, cwd=folder, capture_output=True).returncode != 0:
        pytest.skip("needs a package index, which pip does not reach here")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run(*pip, "wheel", "--no-deps", "--wheel-dir", "dist", ".", folder=folder)
    (wheel,) = (folder / "dist").glob("*.whl")

    venv.create(folder / "venv", with_pip=True)
    install = (folder / "venv" / "bin" / "python", *pip[1:], "install")
    constraints = ROOT / "constraints.txt"
    (torch,) = re.findall(r"^torch==.+$", constraints.read_text(), flags=re.MULTILINE)
    run(*install, torch, folder=folder)  # first and by its version, as in the Makefile
    run(*install, "--constraint", constraints, wheel, folder=folder)
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_the_wheel_runs_on_its_own(installed: Path, tmp_path: Path) -> None:
    """Version, help and the quickstart, which needs the embedded model, the report's template and llama.cpp."""
    assert run(installed / "fettle", "--version", folder=tmp_path) == f"fettle {version('fettle-llm')}\n"
    where = run(installed / "python", "-c", "import fettle; print(fettle.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    printed = run(installed / "fettle", "quickstart", "--output", "quickstart", folder=tmp_path)
    assert "exact" in printed
    for name in ("model/adapter_model.safetensors", "model/report.html", "merged/model.safetensors"):
        assert (tmp_path / "quickstart" / name).stat().st_size > 0
    assert list((tmp_path / "quickstart").glob("*.gguf"))


@pytest.mark.slow
def test_the_wheel_brings_no_tool_for_tests(installed: Path, tmp_path: Path) -> None:
    listed = run(installed / "python", "-m", "pip", "list", "--format", "freeze", folder=tmp_path)
    found = names(listed.splitlines())
    tools = {"pytest", "pytest-xdist", "hypothesis", "mypy", "ruff", "lm-eval", "bitsandbytes", "zensical"}
    assert found >= names(PROJECT["dependencies"]) and not found & tools
