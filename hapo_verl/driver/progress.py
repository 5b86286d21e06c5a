"""Reads from another thread where a running trainer is, without wrapping or delaying it.

Progress means that one of these has changed: the place in verl's trainer (function and line), the step, or the number
of finished prompts in the replay buffer. A prompt that fails and is sampled again is no progress. This module does not
know how long a place may take; it only tells whether something has changed.
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
# Files whose current lines count as the place; the code that they call may poll, so its lines do not count.
_STEPS = ("main_ppo.py", "trainer_base.py", "trainer_sync.py", "trainer_colocate_async.py", "trainer_separate_async.py")
# Functions that only call another one; they are left out of the text.
_WRAPPERS = ("wrapper", "wrapped", "inner", "func", "_run", "__call__")


class Position(NamedTuple):
    """The place where a trainer is.

    Attributes:
        mark: a value that changes with every progress.
        text: a description for a reader.
    """

    mark: Hashable
    text: str


class Progress:
    """Tells the position of a trainer that runs in the thread which created this object."""

    def __init__(self, trainer: Any) -> None:
        """Take note of the trainer and of the current thread, in which it must run."""
        self._trainer, self._thread = trainer, threading.get_ident()

    def position(self) -> Position:
        """The trainer's current position; to be called from another thread."""
        frames = _frames(sys._current_frames().get(self._thread))
        places = tuple((frame.f_code.co_name, frame.f_lineno) for frame in frames if _file(frame).name in _STEPS)
        step, prompts = getattr(self._trainer, "global_steps", None), self._prompts()
        names = [frame.f_code.co_name for frame in frames if frame.f_code.co_name not in _WRAPPERS]
        # groupby: our methods call verl's of the same name, which is then written once.
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
        """For each partition of the replay buffer, the numbers of finished, of failed and of all prompts."""
        buffer = getattr(self._trainer, "replay_buffer", None)
        sets = [getattr(buffer, f"{name}_keys", {}) for name in ("finished", "failure", "running", "pending")]
        # The trainer's thread may change the sets meanwhile. So the names are copied first, and if reading fails, the
        # numbers are left out this time.
        try:
            parts = sorted({part for keys in sets for part in list(keys)})
            counts = {part: [len(keys.get(part, ())) for keys in sets] for part in parts}
        except RuntimeError:
            return {}
        return {part: (of[0], of[1], sum(of)) for part, of in counts.items()}


def _frames(frame: FrameType | None) -> list[FrameType]:
    """The frames that run code of verl or of this package, the outermost first."""
    frames = []
    while frame is not None:
        if any(package in _file(frame).parts for package in _PACKAGES):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)
