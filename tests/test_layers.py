"""Imports point one way, and a module's folder says in which process it runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hapo_verl"

# Each folder ("room") and the other folders that it may import. The folders of the workers do not import each other;
# the data that they exchange is defined in `protocol`.
ROOMS = {
    "algo": set(),
    "protocol": {"algo"},
    "rollout": {"algo", "protocol"},
    "actor": {"algo", "protocol"},
    "cpu": {"algo", "protocol"},
    "launch": {"algo", "protocol", "rollout", "actor"},
    "driver": {"algo", "protocol", "rollout", "actor", "launch"},
    "data": {"algo", "protocol", "rollout", "launch"},
    "report": {"algo", "protocol", "data"},
    # Other trainers share no process with the rest.
    "trl": {"algo"},
    "openrlhf": {"algo"},
}
# Entry points are above the rooms. `config` is below all of them.
ENTRY_POINTS = {"plugin", "doctor"}


def imports(path: Path) -> set[str]:
    """The first name below `hapo_verl` of each import of a module, at module level or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hapo_verl"):
            below = (node.module or "").split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hapo_verl.")}
    return found


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement names."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_every_folder_is_a_room():
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} - {"presets"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_lower_rooms(room):
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / room).rglob("*.py")
        for name in imports(path) - ROOMS[room] - {room, "config"}
    }
    assert not wrong


@pytest.mark.parametrize("trainer", ["trl", "openrlhf"])
def test_nothing_else_imports_another_trainer(trainer):
    """verl 0.9.1 cannot load models in an environment with TRL, so nothing else may import another trainer."""
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != trainer
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported(node)
        if name.split(".")[0] == trainer or name.startswith(f"hapo_verl.{trainer}")
    }
    assert not wrong


@pytest.mark.parametrize("room", ["algo", "data", "openrlhf"])
def test_these_rooms_do_not_import_verl_at_module_level(room):
    tops = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in (PACKAGE / room).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "verl")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "verl" for alias in node.names))
    }
    assert not tops


def test_the_algorithm_does_not_import_verl():
    """One process imports all of it, since importing torch takes seconds."""
    names = ["hapo_verl.config", *(f"hapo_verl.algo.{path.stem}" for path in sorted((PACKAGE / "algo").glob("*.py")))]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'verl' not in sys.modules, name\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import hapo_verl.config; hapo_verl.config.HapoConfig()", "torch"),
        ("from hapo_verl.data.__main__ import main; main(['gsm8k', '--input', 'no.jsonl', '--output', 'no'])", "torch"),
        ("import hapo_kernels.policy_head.kernel", "torch._dynamo"),
    ],
)
def test_a_command_does_not_wait_for_imports_that_it_does_not_need(code, heavy):
    code = f"import sys; {code}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
