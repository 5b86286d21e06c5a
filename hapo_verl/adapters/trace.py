"""`hapo.trace_dir`: what the gate saw and what reached the loss, for people who want to check.

<trace_dir>/groups.jsonl        one line a group and step: scores, successes, bound, outcome (the trainer writes)
<trace_dir>/loss-<pid>.jsonl    one line a row and update: tokens, demonstration flag, advantage (the actors write)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from hapo_verl.adapters.rows import plain_values


class Trace:
    """Writes nothing where the folder is None."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None

    def groups(self, step: int, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Append the groups of one step; `groups` maps a prompt's uid to its `hapo_group`."""
        self._append("groups.jsonl", [{"step": step, "uid": uid, **group} for uid, group in groups.items()])

    def loss_rows(self, data: TensorDict, names: Sequence[str]) -> None:
        """Append the rows of one micro-batch, `names` of their fields, as the loss saw them."""
        if self._folder is None:
            return
        columns = {name: plain_values(data[name]) for name in names}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._append(f"loss-{os.getpid()}.jsonl", rows)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read_groups(run: Path) -> Iterator[dict[str, Any]]:
    """The groups that a run has traced, in the order of their steps; a line that is being written is left out.

    Args:
        run: folder of the run, with the trace in `trace`, or of the trace itself.
    """
    yield from _lines(sorted({*run.glob("groups*.jsonl"), *run.glob("trace/groups*.jsonl")}))


def _lines(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        with path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)
