"""The notebooks run from top to bottom, keep their promises, and are what a user opens."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs jupytext, of the extra dev")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra dev")
nbformat = pytest.importorskip("nbformat", reason="comes with nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra dev")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def of_name(path: Path) -> str:
    return path.stem


def code_of(source: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import notebooks

    return notebooks


def test_there_are_notebooks() -> None:
    assert [source.stem for source in SOURCES] == ["conversational", "preferences", "raw_text"]
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))] == list(map(of_name, SOURCES))


@pytest.mark.parametrize("source", SOURCES, ids=of_name)
def test_the_committed_file_is_what_the_source_gives(source: Path, tool: ModuleType) -> None:
    """Without outputs, and with the kernel that Jupyter and Colab have."""
    committed = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert committed == tool.text(source), "run `make notebooks`"
    content = json.loads(committed)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("source", SOURCES, ids=of_name)
def test_cells_are_short_and_explained(source: Path) -> None:
    cells = jupytext.read(source).cells
    assert all(len(cell.source.splitlines()) <= 45 for cell in cells)
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"


@pytest.mark.parametrize("source", SOURCES, ids=of_name)
def test_one_cell_has_the_settings(source: Path) -> None:
    (settings,) = [code for code in code_of(source) if re.search(r"^MODEL = ", code, flags=re.MULTILINE)]
    assigned = [node.targets[0].id for node in ast.parse(settings).body if isinstance(node, ast.Assign)]
    assert assigned[:3] == ["MODEL", "DATA", "OUTPUT"] and len(assigned) == 4


# ---- run ----------------------------------------------------------------------------------------------------------

RESULT = """
import json
scores = {each.name: (each.before, each.after) for each in outcome.report.scores}
print(json.dumps([str(outcome.output), scores]))
"""


class Ran(NamedTuple):
    """What a notebook left: its output folder, the scores before and after, and what each cell printed."""

    output: Path
    scores: dict[str, tuple[float, float]]
    printed: dict[str, str]

    def of(self, code: str) -> str:
        """What the only cell with this code printed."""
        (text,) = [text for source, text in self.printed.items() if code in source]
        return text


def run(name: str, folder: Path) -> Ran:
    """Run a notebook in a folder of its own, with one more cell that prints its figures."""
    book = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    book.cells.append(nbformat.v4.new_code_cell(RESULT))
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    warned = [
        output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text
    ]
    assert warned == []
    printed = {cell.source: "".join(output.get("text", "") for output in cell.outputs) for cell in cells}
    output, scores = json.loads(cells[-1].outputs[-1].text)
    return Ran(folder / output, {name: tuple(pair) for name, pair in scores.items()}, printed)


def require_files(ran: Ran) -> None:
    """The adapter, the report, the GGUF file and its Modelfile; and the plan, which is a program of its own."""
    gguf = ran.output.with_name(f"{ran.output.name}.gguf")
    modelfile = gguf.with_suffix(".Modelfile")
    for file in (ran.output / "adapter_model.safetensors", ran.output / "report.html", gguf, modelfile):
        assert file.stat().st_size > 0
    assert gguf.name in modelfile.read_text()
    assert "longest context that fits: 2,048 tokens" in ran.of("fettle plan")


@pytest.mark.slow
def test_conversational(tmp_path: Path) -> None:
    """Exact match rises from 0 to 94% on two cores; the mask covers the answers; the GGUF file answers alike."""
    ran = run("conversational", tmp_path)
    before, after = ran.scores["held-out exact match"]
    assert before < 0.1 and after > 0.75
    assert "200 rows (100 messages, 100 ShareGPT)" in ran.of("inspect_data")
    trained = re.findall(r"⟦(.+?)⟧", ran.of("part.is_trained"))
    assert trained and all(re.fullmatch(r"(Booked|Changed): .+ guests\.<\|end\|>", text) for text in trained)
    assert ran.of("answer = ") == ran.of("fettle.load(gguf)") == "Booked: Emma, Friday, 6 guests.\n"
    assert ran.of("conversation = ") == "Changed: Emma, Sunday, 6 guests.\n"
    require_files(ran)


@pytest.mark.slow
def test_raw_text(tmp_path: Path) -> None:
    """The held-out loss falls from 7.5 to 0.55, and the model writes entries of the log."""
    ran = run("raw_text", tmp_path)
    before, after = ran.scores["held-out loss"]
    assert before > 5 and after < 1
    assert "1 text split into windows of 128 tokens" in ran.of("inspect_data")
    written = ran.of("fettle.load(OUTPUT)")
    assert "took the boat out and came back with" in written
    assert "took the boat" in ran.of("fettle.load(gguf)")
    require_files(ran)


@pytest.mark.slow
def test_preferences(tmp_path: Path) -> None:
    """The chosen answer is preferred in 31% of the held-out pairs before, and in all of them after."""
    ran = run("preferences", tmp_path)
    before, after = ran.scores["held-out pairs, chosen answer preferred"]
    assert before < 0.6 and after > 0.85
    assert "-" in ran.of("fettle.load(OUTPUT)") and ran.of("fettle.load(gguf)") == ran.of(
        "fettle.load(OUTPUT)"
    )
    require_files(ran)
