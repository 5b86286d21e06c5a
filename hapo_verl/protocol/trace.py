"""`hapo.trace_dir`: what the gate saw and what reached the loss, for people who want to check.

<trace_dir>/run.json            what a reader has to know of the launch (the trainer writes)
<trace_dir>/groups.jsonl        one line a group and step: scores, successes, bound, outcome (the trainer writes)
<trace_dir>/rows.jsonl          one line a row: tokens of prompt and response, score, demonstration flag (the trainer)
<trace_dir>/loss-<pid>.jsonl    one line a row and update: tokens, log-probabilities, demonstration flag, advantage
                                (the actors write)

Rows are those of `hapo.trace_groups` groups a step: the ones whose prompts come first in an order that no step changes,
so that a prompt that comes again is seen again. A file that reaches a fourth of `hapo.trace_limit` is closed as
`<name>.first.jsonl`; from then on the file and the one before it, `<name>.before.jsonl`, hold the latest lines. So the
beginning is kept, and the end.

A run that begins at step 1 where an earlier one has left its trace moves that trace to `<trace_dir>.1`, or to the next
number that is free. Where a file cannot be written the trace ends with a warning, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from hapo_verl.config import HapoConfig
from hapo_verl.protocol.rows import plain_values
from hapo_verl.protocol.shape import judged_shape

logger = logging.getLogger("verl." + __name__)

MIB = 2**20
# Digits behind the point of a log-probability, nats.
_DIGITS = 3
# Folders of this process that could not be written.
_UNWRITABLE: set[str] = set()


class Trace:
    """Writes nothing where the folder is None."""

    def __init__(self, folder: str | None, *, groups: int | None = None, mib: float | None = None) -> None:
        """Of the keys `hapo.trace_*`."""
        self._folder, self._groups = Path(folder) if folder and folder not in _UNWRITABLE else None, groups
        self._part_bytes = None if mib is None else mib * MIB / 4
        # Uids of the groups of this step whose rows are written; None: all.
        self.sampled: list[str] | None = None
        self._knows_launch = False

    @classmethod
    def of(cls, hapo: HapoConfig) -> Trace:
        """That of a launch."""
        return cls(hapo.trace_dir, groups=hapo.trace_groups, mib=hapo.trace_limit)

    @property
    def is_on(self) -> bool:
        """Whether anything is written."""
        return self._folder is not None

    def launch(self, config: DictConfig, hapo: HapoConfig, step: int) -> None:
        """Write, once, what a reader has to know of the launch.

        Args:
            config: of the launch.
            hapo: its `hapo:` block.
            step: the first that is traced; with 1 the trace of an earlier run is moved out of the way.
        """
        if self._folder is None or self._knows_launch:
            return
        self._knows_launch = True
        try:
            if step == 1 and (self._folder / "run.json").exists():
                self._folder.rename(next(p for p in map(self._numbered, count(1)) if not p.exists()))
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._folder / f".run.json.{os.getpid()}"
            unfinished.write_text(json.dumps(_facts(config, hapo), indent=1) + "\n")
            unfinished.replace(self._folder / "run.json")
        except OSError as error:
            self._end(error)

    def _numbered(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder.with_name(f"{self._folder.name}.{number}")

    def _end(self, error: OSError) -> None:
        """A run is worth more than its trace."""
        logger.warning(
            "hapo: hapo.trace_dir=%s: %s. The run goes on without a trace; name a folder that every node can write, or "
            "null.",
            self._folder,
            error,
        )
        _UNWRITABLE.add(str(self._folder))
        self._folder = None

    def groups(self, step: int, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Append the groups of one step; `groups` maps a prompt's uid to its `hapo_group`."""
        self._append("groups.jsonl", [{"step": step, "uid": uid, **group} for uid, group in groups.items()])

    def sample(self, groups: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Choose the groups of this step whose rows are written; their uids."""
        chosen = sorted(groups, key=lambda uid: _place(groups[uid]))[: self._groups]
        self.sampled = None if self._groups is None else chosen
        return set(chosen)

    def rows(self, step: int, uids: Sequence[str], data: TensorDict, names: Sequence[str]) -> None:
        """Append rows of one step, `names` of their fields; `uids` has the group of each."""
        records = _records(data, names)
        self._append("rows.jsonl", [{"step": step, "uid": u, **r} for u, r in zip(uids, records, strict=True)])

    def loss_rows(
        self,
        data: TensorDict,
        names: Sequence[str],
        logp_BT: torch.Tensor | None = None,
        *,
        sampled: Iterable[str] | None = None,
    ) -> None:
        """Append the rows of one micro-batch as the loss saw them.

        Args:
            data: the micro-batch.
            names: of its fields.
            logp_BT: (B, T) log-probabilities of the response's tokens under the policy, nats.
            sampled: uids of the groups that are written; None for all.
        """
        if self._folder is None:
            return
        keep = set(sampled) if sampled is not None else None
        rows = _records(data, names)
        chosen = [i for i, row in enumerate(rows) if keep is None or row["uid"] in keep]
        if logp_BT is not None and chosen:
            # One copy from the device.
            logp = logp_BT.detach()[chosen].float().cpu().tolist()
            for i, values in zip(chosen, logp, strict=True):
                rows[i]["logp"] = [round(value, _DIGITS) for value in values[: len(rows[i]["responses"])]]
        self._append(f"loss-{os.getpid()}.jsonl", [rows[i] for i in chosen])

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self._folder is None or not records:
            return
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                full = self._part_bytes is not None and file.tell() >= self._part_bytes
            if full:
                first = path.with_suffix(".first.jsonl")
                path.replace(path.with_suffix(".before.jsonl") if first.exists() else first)
        except OSError as error:
            self._end(error)


def _facts(config: DictConfig, hapo: HapoConfig) -> dict[str, Any]:
    shape, metrics = judged_shape(hapo), _metrics_file(config)
    return {
        "metrics": None if metrics is None else str(metrics),
        "model": str(config.actor_rollout_ref.model.path),
        "temperature": config.actor_rollout_ref.rollout.temperature,
        "gate": hapo.gate.name,
        "mode": hapo.injection.mode,
        "objective": hapo.objective.name,
        "loss": {"shape": shape.name, "shaping": str(shape.shaping), "exponent": shape.exponent},
    }


def _metrics_file(config: DictConfig) -> Path | None:
    """The file of verl's `file` logger, which runs in the trainer's process; None where it is not chosen."""
    trainer = config.trainer
    if "file" not in trainer.logger:
        return None
    named = os.getenv("VERL_FILE_LOGGER_PATH")
    root = Path(os.getenv("VERL_FILE_LOGGER_ROOT", ".")).expanduser()
    return (Path(named) if named else root / trainer.project_name / f"{trainer.experiment_name}.jsonl").absolute()


def _place(group: Mapping[str, Any]) -> bytes:
    """Of a prompt in the order that no step changes."""
    return blake2b(f"{group.get('data_source')}/{group.get('index')}".encode(), digest_size=8).digest()


def _records(data: TensorDict, names: Sequence[str]) -> list[dict[str, Any]]:
    columns = {name: plain_values(data[name]) for name in names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def trace_folder(run: Path) -> Path:
    """Of a run's folder that of its trace, which is `trace` in it, or the folder itself."""
    return run / "trace" if (run / "trace").is_dir() else run


def read_groups(run: Path) -> Iterator[dict[str, Any]]:
    """The groups that a run has traced, as they were written; a line that is being written is left out.

    Args:
        run: folder of the run, with the trace in `trace`, or of the trace itself.
    """
    yield from read_lines(trace_folder(run), "groups")


def read_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a trace's files of this name, `loss-<pid>` by `loss-*`, the oldest first."""
    for part in (".first", ".before", ""):
        for path in sorted(folder.glob(f"{name}{part}.jsonl")):
            if not part and path.stem.endswith((".first", ".before")):
                continue
            with path.open() as file:
                for line in file:
                    if line.endswith("\n"):
                        yield json.loads(line)
