"""Holds the house of docs/architecture.md: a file imports only from its own floor or a lower one.

Read from the source with `ast`, so that an import hidden inside a function counts as well. The checker itself
is tested on small trees that break each rule.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fettle"

# From the ground up. A top-level file or folder of src/fettle stands on exactly one floor.
FLOORS = {
    "ground": {"errors", "files", "options", "terminal", "threads"},
    "ops": {"ops"},
    "parts": {"data", "models", "adapters", "memory", "quantization", "llama_cpp", "tiny"},
    "jobs": {"training", "generation", "evaluation", "export"},
    "faces": {"__init__", "__main__", "cli", "quickstart", "studio", "server"},
}
HEIGHT = {name: height for height, names in enumerate(FLOORS.values()) for name in names}
LINES = 450
TRICKS = {"sys.path", "importlib.import_module"}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}


def violations(source: Path) -> list[str]:
    """Return what is wrong in the package at `source`, one sentence each."""
    found = []
    for file in sorted(source.rglob("*.py")):
        place = file.relative_to(source)
        tree = ast.parse(file.read_text())
        found += [f"{place}: {fault}" for fault in _faults(source, place, tree)]
        lines = len(file.read_text().splitlines())
        if lines > LINES and "kernel" not in str(place):
            found.append(f"{place}: {lines} lines, more than {LINES}")
    return found


def _faults(source: Path, place: Path, tree: ast.Module) -> Iterator[str]:
    name = place.parts[0].removesuffix(".py")
    if name not in HEIGHT:
        yield f"{name} stands on no floor: add it to FLOORS"
        return
    for line, imported in _imports(tree):
        if imported.startswith("."):
            yield f"line {line} imports by a relative path"
        target = _top_name(source, imported)
        if target is not None and HEIGHT.get(target, -1) > HEIGHT[name]:
            yield f"line {line} imports {imported}, which stands higher"
    if HEIGHT[name] < HEIGHT["cli"]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.path",
                "importlib.import_module",
            ):
                yield f"line {node.lineno} uses {ast.unparse(node)}, which hides what is imported"
    if HEIGHT[name] == HEIGHT["errors"]:
        for line, imported in _imports(ast.Module(_at_import(tree.body), [])):
            if imported.partition(".")[0] in HEAVY:
                yield f"line {line} imports {imported} at module level, on the ground floor"


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and dotted name of everything imported; `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _top_name(source: Path, imported: str) -> str | None:
    """Return the file or folder of the package that `imported` comes from; None for other packages.

    `fettle` itself, and any name in it that is no file, is the public face.
    """
    package, _, rest = imported.partition(".")
    if package != "fettle":
        return None
    name = rest.partition(".")[0]
    is_file = (source / name).is_dir() or (source / f"{name}.py").exists()
    return name if name and is_file else "__init__"


def _at_import(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that run when the module is imported: all but those inside functions."""
    return [node for node in body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_file_keeps_to_its_floor() -> None:
    assert violations(SOURCE) == []


def test_the_floors_hold_every_file_found() -> None:
    assert len(list(SOURCE.rglob("*.py"))) > 3, "the package was not found"


def make_tree(folder: Path, **files: str) -> Path:
    """Write `files` (ops__rotary="...") into `folder` beside a sound skeleton."""
    skeleton = {
        "errors": "",
        "ops__rotary": "import torch\n",
        "models__decoder": "",
        "training__sft": "",
        "cli": "",
    }
    for name, text in (skeleton | files).items():
        file = folder / (name.replace("__", "/") + ".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"models__decoder": "from fettle.ops.rotary import rotary\nfrom fettle.errors import UserError\n"},
        {"models__decoder": "from fettle import errors\n"},
        {"training__sft": "import fettle.models.decoder\nimport fettled\n"},
        {"cli": "def main():\n    from fettle.training import sft\n"},
        {"options": "def device():\n    import torch\n"},
        {"ops__rms_norm_kernels": "x = 1\n" * 900},
    ],
)
def test_a_sound_tree_passes(tmp_path: Path, files: dict[str, str]) -> None:
    assert violations(make_tree(tmp_path, **files)) == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"ops__rotary": "from fettle.models import decoder\n"},
            "fettle.models.decoder, which stands higher",
        ),
        (
            {"ops__rotary": "import fettle.models.decoder as d\n"},
            "fettle.models.decoder, which stands higher",
        ),
        ({"models__decoder": "def f():\n    from fettle.training.sft import x\n"}, "line 2 imports"),
        ({"models__decoder": "from fettle import training\n"}, "fettle.training, which stands higher"),
        ({"models__decoder": "from fettle import load\n"}, "fettle.load, which stands higher"),
        ({"training__sft": "import fettle\n"}, "imports fettle, which stands higher"),
        ({"training__sft": "from fettle.cli import main\n"}, "fettle.cli.main, which stands higher"),
        ({"training__sft": "from ..models import decoder\n"}, "relative path"),
        ({"training__sft": "import sys\nsys.path.insert(0, '..')\n"}, "line 2 uses sys.path"),
        ({"training__sft": "import importlib\nimportlib.import_module('x')\n"}, "line 2 uses importlib"),
        ({"errors": "try:\n    import torch\nexcept ImportError:\n    pass\n"}, "on the ground floor"),
        ({"utils": ""}, "utils stands on no floor"),
        ({"helpers__misc": ""}, "helpers stands on no floor"),
        ({"models__decoder": "x = 1\n" * 451}, "451 lines"),
    ],
)
def test_each_broken_rule_is_found(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    found = violations(make_tree(tmp_path, **files))
    assert len(found) == 1
    assert fault in found[0]
