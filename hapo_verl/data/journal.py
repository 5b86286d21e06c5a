"""What a teacher has answered, on disk before anything is made of it: no answer is paid for twice.

One JSON object a line; lines are only ever added, each is synced before the next step, and one process writes at a
time. A line that a kill has cut off is counted and left where it is; its answer counts as never given.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from hapo_verl.data.parquet import DataError


class Journal:
    """The answers of earlier runs, and a file for further ones.

    Attributes:
        answers: of each request, by `request_key`, the line of its answer.
        tokens: that all lines together have cost, in this run and earlier ones.
        cut: lines that are no JSON.
    """

    def __init__(self, path: Path) -> None:
        """Read a journal, or begin one.

        Raises:
            DataError: where another process writes it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._file, self._lock = path.open("ab+"), threading.Lock()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(
                f"--journal {path}: another process writes it. Wait for its end, or name another one."
            ) from None
        if is_new:
            _sync_folder(path.parent)
        self.answers: dict[str, dict[str, Any]] = {}
        self.tokens = self.cut = 0
        self._file.seek(0)
        last = b"\n"
        for last in self._file:
            self._read(last)
        if not last.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line and wait until it is on disk; from any thread.

        Args:
            line: with `request` and `tokens`; an answer has `text`, what has only cost something has `lost`.
        """
        with self._lock:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._keep(dict(line))

    def close(self) -> None:
        """Let another process write it."""
        self._file.close()

    def _read(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            self._keep(found)
        except (ValueError, KeyError, TypeError):
            self.cut += 1

    def _keep(self, line: dict[str, Any]) -> None:
        request, tokens = line["request"], int(line["tokens"])
        self.tokens += tokens
        if "lost" not in line:
            self.answers[request] = line


def request_key(body: Mapping[str, Any], sample: int) -> str:
    """The name of the `sample`-th request with this body; the same for equal prompts, wherever they stand.

    Args:
        body: everything that is sent, as JSON values.
        sample: 0 for the first of a prompt.
    """
    canonical = json.dumps([body, sample], sort_keys=True, ensure_ascii=False)
    return sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    """A new file's name is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
