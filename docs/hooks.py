"""Fills pages with parts made from the code: tables of keys, errors and row fields, the picture, included files.

A page asks with a line `<!-- make: NAME -->`, or `<!-- include: path/in/the/repository.md -->`.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
PACKAGE = ROOT / "hapo_verl"
# Where each room's code runs: the picture's boxes.
ROOMS = {
    "launch": "before the start, and on the driver",
    "driver": "trainer's driver",
    "rollout": "agent loop workers",
    "actor": "actor ranks",
}


def keys() -> str:
    """Every key of the `hapo:` block, read from `config.py`: default, meaning, rule."""
    from hapo_verl.algo.objectives import objectives
    from hapo_verl.config import GATES, HapoConfig

    lines = ["| key | default | meaning | rule and fix |", "|---|---|---|---|"]
    for field in dataclasses.fields(HapoConfig):
        path = f"hapo.{field.name}"
        choices = {"gate": GATES, "objective": objectives()}.get(field.name)
        if choices is not None:
            names = ", ".join(f"`{name}`" for name in choices)
            lines.append(_row(f"{path}.name", next(iter(choices)), f"One of {names}.", ""))
            seen: set[str] = set()
            for choice in choices.values():
                for own in _keys_of(type(choice)):
                    if own.name not in seen:
                        having = [n for n, c in choices.items() if own.name in {f.name for f in _keys_of(type(c))}]
                        which = f"Of {', '.join(f'`{name}`' for name in having)}. "
                        lines.append(_key_row(f"{path}.{own.name}", own, type(choice), which))
                        seen.add(own.name)
        elif dataclasses.is_dataclass(field.default_factory):
            lines += [
                _key_row(f"{path}.{own.name}", own, field.default_factory) for own in _keys_of(field.default_factory)
            ]
        else:
            lines.append(_key_row(path, field, HapoConfig))
    return "\n".join(lines)


def _keys_of(of: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(of) if field.name != "name" and field.init]


def _key_row(path: str, field: dataclasses.Field, owner: Any, which: str = "") -> str:
    default = "null" if field.default is None else str(field.default).lower()
    return _row(path, default, which + _comment(owner, field.name), field.metadata.get("rule", ""))


def _row(key: str, default: Any, meaning: str, rule: str) -> str:
    rule = rule[:1].upper() + rule[1:]
    return f"| `{key}` | `{default}` | {_cell(meaning)} | {_cell(rule)} |"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def _comment(owner: Any, name: str) -> str:
    """The comment above a field, or if there is none, the first line of the class's docstring."""
    for kind in owner.__mro__:
        if name not in getattr(kind, "__annotations__", {}):
            continue
        source = Path(sys.modules[kind.__module__].__file__ or "")
        lines = source.read_text().splitlines()
        body = next(n for n in ast.parse(source.read_text()).body if getattr(n, "name", "") == kind.__name__)
        line = next(
            node.lineno - 1
            for node in getattr(body, "body", [])
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name
        )
        comment: list[str] = []
        while (above := lines[line - 1].strip()).startswith("#"):
            comment.insert(0, above.removeprefix("#").strip())
            line -= 1
        return " ".join(comment) or (kind.__doc__ or "").splitlines()[0]
    return ""


def row_fields() -> str:
    """The protocol between the processes, from `hapo_verl.protocol.rows`."""
    from hapo_verl.protocol.rows import FIELDS

    lines = ["| field | of | written by | read by | type | meaning |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{f.key}` | {f.of} | `{f.writer}` | {', '.join(f'`{r}`' for r in f.readers)} | `{f.type}` | {f.meaning} |"
        for f in FIELDS
    ]
    return "\n".join(lines)


def messages() -> Iterator[tuple[str, str]]:
    """Module and text of every error that the source raises; … stands for values that a launch fills in."""
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels" / "hapo_kernels").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and _called(node).endswith("Error"):
                text = _text(node.args[0])
                if len(text.replace("…", "").strip()) > 20:
                    yield str(path.relative_to(ROOT)), text


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def errors() -> str:
    """The errors, one list per module; the rules of single keys are in the table of keys."""
    tables: dict[str, list[str]] = {}
    for module, text in messages():
        tables.setdefault(module, []).append(" ".join(text.split()))
    parts = []
    for module, texts in tables.items():
        parts += [f"### `{module}`", "", *(f"- {_cell(text)}" for text in dict.fromkeys(texts)), ""]
    return "\n".join(parts)


def picture() -> str:
    """The processes of a run with their files, and the fields that they exchange, as SVG."""
    from hapo_verl.protocol.rows import FIELDS

    width, parts, bottom = 330, [], {}
    corner = {"launch": (10, 10), "driver": (10, 200), "rollout": (430, 10), "actor": (430, 290)}
    for room, (x, y) in corner.items():
        files = [path.name for path in sorted((PACKAGE / room).glob("*.py")) if path.name != "__init__.py"]
        rows = ["  ".join(files[i : i + 3]) for i in range(0, len(files), 3)]
        bottom[room] = y + 52 + 16 * len(rows)
        parts += [
            f'<rect x="{x}" y="{y}" width="{width}" height="{bottom[room] - y}" rx="8" class="box"/>',
            f'<text x="{x + 12}" y="{y + 22}" class="room">{room}/</text>',
            f'<text x="{x + 92}" y="{y + 22}" class="where">{html.escape(ROOMS[room])}</text>',
            *(f'<text x="{x + 12}" y="{y + 44 + 16 * i}" class="file">{row}</text>' for i, row in enumerate(rows)),
        ]
    # The path of each arrow, and the position of its label.
    top, under, ranks = corner["driver"][1], bottom["rollout"], corner["actor"][1]
    middle = (top + under) / 2
    ways = {
        ("driver", "rollout"): (f"M 280 {top} C 280 {middle}, 450 {middle}, 450 {under}", (250, middle + 4)),
        ("rollout", "driver"): (f"M 490 {under} C 490 {middle}, 320 {middle}, 320 {top}", (440, middle + 24)),
        ("rollout", "actor"): (f"M 680 {under} L 680 {ranks}", (690, middle + 60)),
        ("driver", "actor"): (f"M 280 {bottom['driver']} Q 280 {ranks + 42} 430 {ranks + 42}", (100, ranks + 70)),
    }
    for (writer, reader), (path, (x, y)) in ways.items():
        fields = [field for field in FIELDS if field.writer == writer and reader in field.readers]
        label = ", ".join(field.key.removeprefix("hapo_") for field in fields)
        parts += [
            f'<path d="{path}" class="way" marker-end="url(#tip)"/>',
            f'<text x="{x}" y="{y}" class="crossing">{html.escape(label)}</text>',
        ]
    style = (
        ".box{fill:none;stroke:currentColor;stroke-width:1.2}.room{font:bold 14px sans-serif;fill:currentColor}"
        ".where{font:12px sans-serif;fill:currentColor;opacity:.75}.file{font:11px monospace;fill:currentColor}"
        ".way{fill:none;stroke:#00897b;stroke-width:1.6}.crossing{font:11px sans-serif;fill:#00897b}"
    )
    return (
        '<svg viewBox="0 0 800 420" role="img" aria-label="processes of a run" style="max-width:100%">'
        f"<style>{style}</style>"
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#00897b"/></marker></defs>' + "".join(parts) + "</svg>"
    )


MAKERS: dict[str, Callable[[], str]] = {"keys": keys, "row_fields": row_fields, "errors": errors, "picture": picture}


def included(path: str) -> str:
    """A file of the repository without its links to other files, which would lead out of the site."""
    text = (ROOT / path).read_text()
    text = re.sub(r"!\[[^\]]*\]\((?!http)[^)]*\)\n?", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook of mkdocs: replace `make` and `include` comments of a page."""
    markdown = re.sub(r"<!-- make: (\w+) -->", lambda m: MAKERS[m.group(1)](), markdown)
    return re.sub(r"<!-- include: (\S+) -->", lambda m: included(m.group(1)), markdown)
