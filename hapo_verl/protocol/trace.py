"""The trace of a run (`hapo.trace_dir`): files with what the gate saw and what reached the loss, for checking a run.

<trace_dir>/run.json            the settings of the launch that a reader needs
<trace_dir>/groups.jsonl        one line per group and step: scores, successes, bound, outcome
<trace_dir>/rows.jsonl          one line per row: tokens of prompt and response, score, demonstration flag
<trace_dir>/loss-<pid>.jsonl    one line per row and update: tokens, log-probabilities, demonstration flag, advantage

The trainer writes the first three, each actor process its own loss file.

Rows are traced for `hapo.trace_groups` groups per step. The prompts are ranked in a fixed order (a hash), and the first
ones of the step are taken, so that a prompt that comes again is traced again. The first time that a file reaches a
quarter of `hapo.trace_limit`, it becomes `<name>.first.jsonl`; every later time, `<name>.before.jsonl`. So the first
lines and the latest ones are kept.

If a run begins at step 1 and finds the trace of an earlier run, it first moves that trace to `<trace_dir>.1`, or to the
next free number. If a file cannot be written, the trace ends with a warning and the run continues.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from hapo_verl.config import HapoConfig
from hapo_verl.protocol.rows import plain_values
from hapo_verl.protocol.shape import judged_shape

logger = logging.getLogger("verl." + __name__)

MIB = 2**20
# Decimal places of the log-probabilities (nats).
_DIGITS = 3
# Folders of this process that could not be written.
_UNWRITABLE: set[str] = set()


class Trace:
    """Writer of the trace files; writes nothing if the folder is None."""

    def __init__(self, folder: str | None, *, groups: int | None = None, mib: float | None = None) -> None:
        """Configure the trace.

        Args:
            folder: `hapo.trace_dir`.
            groups: `hapo.trace_groups`.
            mib: `hapo.trace_limit`.
        """
        self._folder, self._groups = Path(folder) if folder and folder not in _UNWRITABLE else None, groups
        self._part_bytes = None if mib is None else mib * MIB / 4
        # Uids of this step's groups whose rows are written; None means all.
        self.sampled: list[str] | None = None
        self._knows_launch = False

    @classmethod
    def of(cls, hapo: HapoConfig) -> Trace:
        """The trace that a launch configures."""
        return cls(hapo.trace_dir, groups=hapo.trace_groups, mib=hapo.trace_limit)

    @property
    def is_on(self) -> bool:
        """Whether anything is written."""
        return self._folder is not None

    def launch(self, config: DictConfig, hapo: HapoConfig, step: int) -> None:
        """Write `run.json`; later calls do nothing.

        Args:
            config: the configuration of the launch.
            hapo: its `hapo:` block.
            step: the first step that is traced. With 1, the trace of an earlier run is moved away.
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
        """Append the groups of one step; `groups` maps each group's uid to its `hapo_group`."""
        self._append("groups.jsonl", [{"step": step, "uid": uid, **group} for uid, group in groups.items()])

    def sample(self, groups: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Choose the groups of this step whose rows are written, and return their uids."""
        chosen = sorted(groups, key=lambda uid: _place(groups[uid]))[: self._groups]
        self.sampled = None if self._groups is None else chosen
        return set(chosen)

    def rows(self, step: int, uids: Sequence[str], data: TensorDict, names: Sequence[str]) -> None:
        """Append the rows of one step.

        Args:
            step: training step.
            uids: uid of each row's group.
            data: the rows.
            names: the fields of `data` to write.
        """
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
            names: the fields of `data` to write.
            logp_BT: (B, T) log-probabilities of the response's tokens under the policy, nats.
            sampled: uids of the groups whose rows are written; None for all.
        """
        if self._folder is None:
            return
        chosen = list(range(len(data)))
        if sampled is not None:
            keep, uids = set(sampled), plain_values(data["uid"])
            chosen = [i for i in chosen if uids[i] in keep]
        if not chosen:
            return
        rows = _records(data, names, chosen)
        if logp_BT is not None:
            # A single copy from the device.
            logp = logp_BT.detach()[chosen].float().cpu().tolist()
            for row, values in zip(rows, logp, strict=True):
                row["logp"] = [round(value, _DIGITS) for value in values[: len(row["responses"])]]
        self._append(f"loss-{os.getpid()}.jsonl", rows)

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
    """The sort key of a group's prompt, the same in every step."""
    return blake2b(f"{group.get('data_source')}/{group.get('index')}".encode(), digest_size=8).digest()


def _records(data: TensorDict, names: Sequence[str], chosen: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The chosen rows as plain values; the others are not read, which on a device would be a copy each."""

    def column(name: str) -> list[Any]:
        if chosen is None:
            return plain_values(data[name])
        rows = list(cast("Iterable[Any]", data[name]))
        return plain_values(rows[i] for i in chosen)

    columns = {name: column(name) for name in names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def trace_folder(run: Path) -> Path:
    """The folder of a run's trace: `trace` inside the run's folder, or else the folder itself."""
    return run / "trace" if (run / "trace").is_dir() else run


def read_groups(run: Path) -> Iterator[dict[str, Any]]:
    """The groups in a run's trace, in the order of writing; an unfinished last line is left out.

    Args:
        run: folder of the run, with the trace in `trace`, or folder of the trace itself.
    """
    yield from read_lines(trace_folder(run), "groups")


def read_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a trace's files, the oldest first; `name` is `groups`, `rows`, or `loss-*` for all actors' files."""
    for part in (".first", ".before", ""):
        for path in sorted(folder.glob(f"{name}{part}.jsonl")):
            if not part and path.stem.endswith((".first", ".before")):
                continue
            with path.open() as file:
                for line in file:
                    if line.endswith("\n"):
                        yield json.loads(line)
