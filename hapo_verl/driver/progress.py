"""Where a trainer is, read from outside while it runs: nothing of it is wrapped, and nothing of it waits.

Progress is a change of what follows: the place in verl's trainer (function and line), the step, and how many prompts
the replay buffer knows to be finished; one that failed and is sampled anew, for ever, is none. How long a place may
take is not known here; that it does not change is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

_PACKAGES = ("verl", "hapo_verl")
# Files whose lines follow each other in a step; what lies below them may poll.
_STEPS = ("main_ppo.py", "trainer_base.py", "trainer_sync.py", "trainer_colocate_async.py", "trainer_separate_async.py")
# Functions that only hand on.
_WRAPPERS = ("wrapper", "wrapped", "inner", "func", "_run", "__call__")


class Position(NamedTuple):
    """Where a trainer is.

    Attributes:
        mark: changes with every progress.
        text: for a reader.
    """

    mark: Hashable
    text: str


class Progress:
    """Of the thread that has made it, and its trainer."""

    def __init__(self, trainer: Any) -> None:
        """Of a trainer that runs in this thread."""
        self._trainer, self._thread = trainer, threading.get_ident()

    def position(self) -> Position:
        """Where the trainer is now; called from another thread."""
        frames = _frames(sys._current_frames().get(self._thread))
        places = tuple((frame.f_code.co_name, frame.f_lineno) for frame in frames if _file(frame).name in _STEPS)
        step, prompts = getattr(self._trainer, "global_steps", None), self._prompts()
        names = [frame.f_code.co_name for frame in frames if frame.f_code.co_name not in _WRAPPERS]
        # Ours calls verl's of the same name.
        where = " > ".join(name for name, _ in groupby(names)) or "no place in verl"
        if frames:
            file = _file(frames[-1])
            where += f" ({'/'.join(file.parts[-3:])}:{frames[-1].f_lineno})"
        finished = tuple((part, done) for part, (done, _, _) in prompts.items())
        said = "".join(
            f"; {part}: {done} of {known} prompts finished, {failed} failed"
            for part, (done, failed, known) in prompts.items()
        )
        return Position((places, step, finished), f"step {step}: {where}{said}")

    def _prompts(self) -> dict[str, tuple[int, int, int]]:
        """Of each partition of the replay buffer the prompts that are finished, that have failed, and all."""
        buffer = getattr(self._trainer, "replay_buffer", None)
        sets = [getattr(buffer, f"{name}_keys", {}) for name in ("finished", "failure", "running", "pending")]
        # The trainer's thread may be writing them: a copy of the names first, and a look that fails is no progress.
        try:
            parts = sorted({part for keys in sets for part in list(keys)})
            counts = {part: [len(keys.get(part, ())) for keys in sets] for part in parts}
        except RuntimeError:
            return {}
        return {part: (of[0], of[1], sum(of)) for part, of in counts.items()}


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Frames of verl and of this package, the outermost first."""
    frames = []
    while frame is not None:
        if any(package in _file(frame).parts for package in _PACKAGES):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)
