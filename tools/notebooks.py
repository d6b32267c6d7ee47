"""Write the .ipynb files of notebooks/ from the .py files, without outputs: `make notebooks` runs this."""

import sys
from pathlib import Path

import jupytext
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(source: Path) -> NotebookNode:
    """Return the notebook of a .py file in the percent format: the same for the same text."""
    found = jupytext.read(source)
    found.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for number, cell in enumerate(found.cells, start=1):
        cell.id = f"cell-{number}"  # instead of a random one
    return found


def text(source: Path) -> str:
    """Return the content of the .ipynb file."""
    return jupytext.writes(notebook(source), fmt="ipynb") + "\n"


def main() -> None:
    """Write every notebook."""
    for source in sorted(FOLDER.glob("*.py")):
        source.with_suffix(".ipynb").write_text(text(source), encoding="utf-8")
        print(source.with_suffix(".ipynb").relative_to(FOLDER.parent), file=sys.stderr)


if __name__ == "__main__":
    main()
