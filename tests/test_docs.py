"""What the docs name exists: files, links, public names, quoted messages, the order of folders, pinned tools."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fettle
from fettle.options import flag

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fettle"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CURRENT = [
    page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")
]  # those two speak of the past too
TOP = {path.name for path in [*ROOT.iterdir(), *SOURCE.iterdir()]} - {"build", ".venv"}


def of_name(page: Path) -> str:
    return page.name


def quoted(text: str) -> list[str]:
    """What a page sets as code within a line."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def paths(text: str) -> Iterator[str]:
    """The files and folders of the repository that a page names, those with a placeholder left out."""
    for found in quoted(text):
        first, slash, _ = found.partition("/")
        if re.fullmatch(r"[\w./-]+", found) and "NAME" not in found and first in TOP and slash:
            yield found


@pytest.mark.parametrize("page", CURRENT, ids=of_name)
def test_named_files_exist(page: Path) -> None:
    missing = [
        path
        for path in paths(page.read_text())
        if not (ROOT / path).exists() and not (SOURCE / path).exists()
    ]
    assert missing == []


def test_constants_that_the_guides_name_exist() -> None:
    source = "\n".join(file.read_text() for file in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", ROOT / "docs" / "architecture.md"):
        named = [name for name in quoted(page.read_text()) if re.fullmatch(r"_?[A-Z]{2,}[A-Z_]*", name)]
        assert [name for name in named if not re.search(rf"^{name}\b", source, flags=re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES, ids=of_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", [*(ROOT / "docs").glob("*.md")], ids=of_name)
def test_pages_link_only_to_what_is_on_the_site(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert "/" not in target, f"{page.name} links to {target}, which is not in docs/"


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(navigation) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_api_page_has_every_public_name_and_no_other() -> None:
    named = re.findall(
        r"^::: fettle\.(?:[\w.]+\.)?(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(named) == sorted(fettle.__all__)


def test_the_table_of_folders_has_the_order_that_is_checked() -> None:
    text = (ROOT / "tests" / "test_architecture.py").read_text()
    order = re.findall(r'"(\w+)"', text[text.index("ORDER = (") : text.index("HEIGHT = ")])
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("| folder or file |") : page.index("One run,")]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == order


def test_new_places_of_modules_exist() -> None:
    table = re.findall(r"^\| .+ \| (.+) \|$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    modules = [name for cell in table for name in re.findall(r"`fettle\.([\w.]+)`", cell)]
    assert len(modules) > 15
    for name in modules:
        place = SOURCE / name.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), f"fettle.{name} is not there"


def test_the_tables_of_benchmarks_are_what_the_results_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    page = ROOT / "docs" / "benchmarks.md"
    monkeypatch.setattr(tables, "PAGE", tmp_path / page.name)
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.PAGE.write_text(page.read_text())
    try:
        tables.main()
    finally:
        for name in ("tables", "predictions"):
            sys.modules.pop(name, None)
    assert tables.PAGE.read_text() == page.read_text()
    for chart in tmp_path.glob("*.svg"):
        assert chart.read_text() == page.with_name(chart.name).read_text()


def text_of_part(part: ast.expr) -> str:
    """A part of an f-string as the command line prints it; a line break for a value that only a run knows."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    named = re.search(r"option\('(\w+)'\)", ast.unparse(ast.JoinedStr([part])))
    return flag(named[1]) if named else "\n"


def texts_of_the_source() -> str:
    """Every text in the source, one a line, values in it as a line of their own."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(map(text_of_part, node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_are_in_the_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(messages) > 20
    source = texts_of_the_source()
    unknown = [m for m in messages if not all(part.strip() in source for part in m.split("…"))]
    assert unknown == []


def test_lines_of_a_comparison_are_in_the_source() -> None:
    page = (ROOT / "docs" / "compare.md").read_text()
    lines = re.findall(r"^\| ([^|\\]+) \|", page[page.index("| line |") :], flags=re.MULTILINE)
    source = texts_of_the_source()
    assert [line for line in lines[2:] if line.split(",")[0] not in source] == []


def test_options_that_the_docs_name_exist(cli) -> None:
    commands = "quickstart data train plan generate chat compare export pretrain".split()
    known = set(re.findall(r"--[\w-]+", "".join(cli(command, "--help").out for command in commands)))
    others = {
        "--version",
        "--enable-lora",
        "--max-lora-rank",
        "--lora-modules",
        "--check",
    }  # of vLLM and ruff
    for page in CURRENT:
        if page.name in (
            "README.md",
            "training.md",
            "export.md",
            "compare.md",
            "troubleshooting.md",
            "index.md",
        ):
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text()))
            assert named - known - others == set(), page.name


def test_pre_commit_and_the_makefile_run_the_same_ruff() -> None:
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    hooks = re.findall(r'"ruff==(.+?)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and set(hooks) == {pinned[1]}


def test_actions_are_pinned_by_commit() -> None:
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        used = re.findall(r"uses: (\S+)", workflow.read_text())
        assert used
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)
