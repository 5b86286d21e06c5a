"""Python stacks of the processes of a run, even of a process that is blocked in C++ code.

When verl is imported in a process of Ray or vLLM, the process registers `faulthandler` for a signal. The handler is C
code, needs no lock of the interpreter, and writes into an in-memory file that the process keeps open. To read the
stacks, another process on the same node sends the signal and reads the file through /proc. It sends the signal only to
processes that have registered, since the signal would kill any other process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

SIGNAL = signal.SIGUSR2
_NAME = "hapo-stacks"
# The handler writes within milliseconds, unless the process is stopped or swapped out.
_ANSWER_SECONDS = 2.0


def answer_the_signal() -> None:
    """Register this process, so that it writes its stacks when signalled; does nothing if the signal is in use."""
    if not hasattr(os, "memfd_create") or signal.getsignal(SIGNAL) is not signal.SIG_DFL or _memory_of(os.getpid()):
        return
    memory = os.memfd_create(_NAME)
    faulthandler.register(SIGNAL, file=memory, all_threads=True, chain=False)


def stacks_of(processes: Iterable[int]) -> dict[int, str]:
    """The stacks of these processes of this machine and of all their descendants, by process id.

    For a process that does not answer, the text is the reason.
    """
    return {pid: _stacks(pid) for root in processes for pid in (root, *_descendants(root))}


def _stacks(pid: int) -> str:
    memory = _memory_of(pid)
    if memory is None or not _catches(pid):
        return f"{_title(pid)}: does not answer the signal"
    try:
        with memory.open("rb") as file:
            before = file.seek(0, os.SEEK_END)
            os.kill(pid, SIGNAL)
            until, size = time.monotonic() + _ANSWER_SECONDS, before
            while time.monotonic() < until:
                time.sleep(0.05)
                grown = file.seek(0, os.SEEK_END)
                # Complete when it has stopped growing.
                if size == grown > before:
                    break
                size = grown
            file.seek(before)
            stacks = file.read().decode(errors="replace") or f"wrote nothing in {_ANSWER_SECONDS:.0f} s"
            return f"{_title(pid)}\n{stacks}"
    except OSError as error:
        return f"{_title(pid)}: {error}"


def _memory_of(pid: int) -> Path | None:
    """The in-memory file of a process; None if the process has none or we may not read it."""
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith(f"/memfd:{_NAME}"):
                return entry
    except OSError:
        pass
    return None


def _catches(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (SIGNAL - 1) & 1)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return "gone"


def _descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The process name, in parentheses, may contain anything; the parent's id is the second field after it.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    yield from found[1:]
