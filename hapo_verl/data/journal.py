"""A journal of a teacher's answers on disk, so that no answer is paid for twice.

An answer is written before it is used. The file has one JSON object per line; lines are only appended, each is synced
to disk before the program continues, and one process writes at a time. A line that was cut off by a kill stays in the
file and is counted, and its answer is treated as never given.
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
    """The answers of earlier runs, and the file to which new ones are added.

    Attributes:
        answers: `request_key` → the line with the answer.
        tokens: tokens that all lines together have cost, in this run and in earlier ones.
        cut: number of lines that are not valid.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal and read it, or start a new one.

        Raises:
            DataError: if another process is writing it.
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
        """Add a line and wait until it is on disk; can be called from any thread.

        Args:
            line: has `request` and `tokens`; an answer also has `text`, a request that only cost tokens has `lost`.
        """
        with self._lock:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._keep(dict(line))

    def close(self) -> None:
        """Close the file, so that another process can write it."""
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
    """A hash that identifies the `sample`-th request with this body; equal prompts have the same one.

    Args:
        body: everything that is sent, as JSON values.
        sample: 0 for the first request of a prompt.
    """
    canonical = json.dumps([body, sample], sort_keys=True, ensure_ascii=False)
    return sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk; a new file's name is on disk only after that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
