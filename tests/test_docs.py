"""The documentation: limits of the README, working links, and pages that agree with the code."""

import ast
import dataclasses
import importlib.util
import re
from collections import deque
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("hapo_verl", "kernels", "recipes", "tests", "bench", "docs")
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
    if not page.is_relative_to(ROOT / "bench" / "results" / "study")
]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)#\s]*)(?:#[^)]*)?\)")
PUBLIC = [ROOT / "hapo_verl" / "algo", ROOT / "hapo_verl" / "protocol", ROOT / "kernels" / "hapo_kernels"]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hapo_docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    targets = (target for target in LINK.findall(page.read_text()) if target and "://" not in target)
    return {(page.parent / target).resolve() for target in targets}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page):
    assert not [str(target) for target in links(page) if not target.exists()]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"`((?:hapo_verl|kernels|tests|recipes|bench|docs)/[\w./-]+)`", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ("docs/launch.md", "+hapo=plus"),
        ("recipes/quickstart/README.md", "make quickstart"),
        ("CONTRIBUTING.md", "a method (loss)"),
    ],
)
def test_important_pages_are_at_most_three_links_from_the_readme(goal, said):
    target, seen = (ROOT / goal).resolve(), {ROOT / "README.md": 0}
    queue = deque(seen)
    while queue:
        page = queue.popleft()
        for near in links(page):
            near = near / "README.md" if near.is_dir() else near
            if near not in seen and near.suffix == ".md" and near.exists():
                seen[near] = seen[page] + 1
                queue.append(near)
    assert seen.get(target, 99) <= 3
    assert said in target.read_text()


def test_every_key_is_in_the_table_with_its_default(hooks):
    from hapo_verl.config import HapoConfig, LossConfig

    table = hooks.keys()
    for field in dataclasses.fields(HapoConfig):
        assert f"`hapo.{field.name}" in table
    for field in dataclasses.fields(LossConfig):
        assert f"| `hapo.loss.{field.name}` | `{str(field.default).lower()}` |" in table
    # Only the rule of a choice may be an empty cell.
    assert not [line for line in table.splitlines()[2:] if "|  |" in line and ".name`" not in line]


def test_a_comment_of_the_source_is_the_meaning_of_a_key(hooks):
    line = next(line for line in hooks.keys().splitlines() if line.startswith("| `hapo.loss.exponent`"))
    assert "also teaches what the policy would never write" in line
    assert "Use 1.0, the value of the paper, or 0.0." in line


def test_an_error_of_the_source_is_in_the_list(hooks):
    errors = hooks.errors()
    assert "### `hapo_verl/launch/weight_bucket.py`" in errors
    assert "hapo.loss.shaping=inf: with hapo.loss.shape=trsft no token would have a weight." in errors


def test_every_file_of_a_process_and_every_field_are_in_the_picture(hooks):
    from hapo_verl.protocol.rows import FIELDS

    picture = hooks.picture()
    for room in hooks.ROOMS:
        for path in (ROOT / "hapo_verl" / room).glob("*.py"):
            assert path.name in picture or path.name == "__init__.py"
    for field in FIELDS:
        if field.writer not in field.readers:
            assert field.key.removeprefix("hapo_") in picture


def test_every_reason_of_a_refusal_is_explained():
    from hapo_verl.algo.demonstration import REASONS

    page = (ROOT / "docs" / "demonstrations.md").read_text()
    assert not [reason for reason in REASONS if f"| `{reason}` |" not in page]


def test_every_module_of_the_algorithm_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "algo.md").read_text()
    algo = ROOT / "hapo_verl" / "algo"
    modules = [".".join(path.relative_to(algo).with_suffix("").parts) for path in algo.rglob("*.py")]
    assert not [
        m for m in modules if m != "__init__" and f"::: hapo_verl.algo.{m.removesuffix('.__init__')}\n" not in page
    ]


def test_every_public_function_and_class_is_documented():
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for folder in PUBLIC
        for path in folder.rglob("*.py")
        if path.name != "kernel.py"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare
