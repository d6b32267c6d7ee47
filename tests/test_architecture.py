"""Holds the order of docs/architecture.md: a folder imports only from folders below it.

Read from the source with `ast`, so that an import hidden inside a function counts as well. The checker itself
is tested on small trees that break each rule.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fettle"

# From the top down. Every file or folder of src/fettle is in exactly one place; none imports from its own place's
# neighbours above.
ORDER = (
    *("__main__", "__init__", "cli", "quickstart"),
    *("methods", "runs", "evaluation", "export"),
    *("planning", "engine", "adapters", "models", "checkpoints", "data"),
    *("recompute", "quantization", "tiny", "ops"),
    *("options", "terminal", "files", "errors", "events", "threads", "version"),
)
HEIGHT = {name: -place for place, name in enumerate(ORDER)}
GROUND = ORDER[ORDER.index("options") :]
LINES = 450
TRICKS = {"sys.path", "importlib.import_module"}
FACES = ("cli", "options", "terminal")
"""Only these print; a job reports events."""
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
        yield f"{name} has no place: add it to ORDER"
        return
    for line, imported in _imports(tree):
        if imported.startswith("."):
            yield f"line {line} imports by a relative path"
        target = _top_name(source, imported)
        if target is not None and HEIGHT.get(target, -len(ORDER)) > HEIGHT[name]:
            yield f"line {line} imports {imported}, which is above"
        elif name not in FACES and (target == "terminal" or imported.partition(".")[0] == "rich"):
            yield f"line {line} imports {imported}, which only a face may"
    if name != "__init__":
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.path",
                "importlib.import_module",
            ):
                yield f"line {node.lineno} uses {ast.unparse(node)}, which hides what is imported"
    if name in GROUND:
        for line, imported in _imports(ast.Module(_at_import(tree.body), [])):
            if imported.partition(".")[0] in HEAVY:
                yield f"line {line} imports {imported} at module level, below everything"


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


def test_every_folder_imports_only_from_those_below() -> None:
    assert violations(SOURCE) == []


def test_no_class_has_the_name_of_another() -> None:
    """A name that means two things sends a reader to the wrong file."""
    names = [
        node.name
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_package_is_found() -> None:
    assert len(list(SOURCE.rglob("*.py"))) > 3, "the package was not found"


def make_tree(folder: Path, **files: str) -> Path:
    """Write `files` (ops__rotary="...") into `folder` beside a sound skeleton."""
    skeleton = {
        "errors": "",
        "ops__rotary": "import torch\n",
        "models__decoder": "",
        "methods__sft": "",
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
        {"methods__sft": "import fettle.models.decoder\nimport fettled\n"},
        {"cli": "def main():\n    from fettle.methods import sft\n"},
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
            "fettle.models.decoder, which is above",
        ),
        (
            {"ops__rotary": "import fettle.models.decoder as d\n"},
            "fettle.models.decoder, which is above",
        ),
        ({"models__decoder": "def f():\n    from fettle.methods.sft import x\n"}, "line 2 imports"),
        ({"models__decoder": "from fettle import methods\n"}, "fettle.methods, which is above"),
        ({"models__decoder": "from fettle import load\n"}, "fettle.load, which is above"),
        ({"methods__sft": "import fettle\n"}, "imports fettle, which is above"),
        ({"methods__sft": "from fettle.cli import main\n"}, "fettle.cli.main, which is above"),
        ({"methods__sft": "from ..models import decoder\n"}, "relative path"),
        ({"methods__sft": "import sys\nsys.path.insert(0, '..')\n"}, "line 2 uses sys.path"),
        ({"methods__sft": "import importlib\nimportlib.import_module('x')\n"}, "line 2 uses importlib"),
        ({"errors": "try:\n    import torch\nexcept ImportError:\n    pass\n"}, "below everything"),
        ({"methods__sft": "from rich.console import Console\n"}, "which only a face may"),
        ({"methods__sft": "from fettle import terminal\n", "terminal": ""}, "which only a face may"),
        ({"utils": ""}, "utils has no place"),
        ({"helpers__misc": ""}, "helpers has no place"),
        ({"models__decoder": "x = 1\n" * 451}, "451 lines"),
    ],
)
def test_each_broken_rule_is_found(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    found = violations(make_tree(tmp_path, **files))
    assert len(found) == 1
    assert fault in found[0]
