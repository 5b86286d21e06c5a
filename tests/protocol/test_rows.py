"""The protocol's table of fields agrees with the code."""

import ast
from pathlib import Path

import pytest

from hapo_verl.protocol import rows

PACKAGE = Path(rows.__file__).parents[1]
NAMES = {value: name for name, value in vars(rows).items() if name.isupper() and isinstance(value, str)}
# Helpers that read a field for other modules.
HELPERS = {rows.DEMONSTRATION: "demonstration_flags", rows.MINI_BATCH: "mini_batch"}


def rooms_that_name(*names: str) -> set[str]:
    """The folders in which one of these names is imported from the protocol."""
    return {
        path.parent.name
        for path in PACKAGE.glob("*/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "hapo_verl.protocol.rows"
        and any(alias.name in names for alias in node.names)
    }


def test_every_key_has_an_entry():
    assert [field.key for field in rows.FIELDS] == list(NAMES)


@pytest.mark.parametrize("field", rows.FIELDS, ids=lambda field: field.key)
def test_the_listed_writer_and_readers_are_the_folders_that_use_the_field(field):
    names = {NAMES[field.key], HELPERS.get(field.key, NAMES[field.key])}
    assert rooms_that_name(*names) == {field.writer, *field.readers}
