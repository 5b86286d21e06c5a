"""Starts vLLM's own server as a child of this process, on a free port of this machine; it ends with this process."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hapo_verl.data.parquet import DataError

_PR_SET_PDEATHSIG = 1


@contextmanager
def served(
    model: str, arguments: Sequence[str], log: Path, *, limit: float, command: Sequence[str] | None = None
) -> Iterator[str]:
    """A context manager that runs a server for a model and gives the address of its API.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        arguments: further arguments of vLLM's server.
        log: file for the server's output.
        limit: seconds after which the server must be ready.
        command: command to run instead of vLLM's server, with the same arguments.

    Raises:
        DataError: if the server ends, or is not ready in time.
    """
    port = _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    call = [
        # Not `vllm serve`, which does not work in vLLM's CPU build.
        *(command or (sys.executable, "-m", "vllm.entrypoints.openai.api_server")),
        *("--model", model, "--host", "127.0.0.1", "--port", str(port), *arguments),
    ]
    with log.open("wb") as output:
        # In its own session, so that an interrupt from the terminal reaches only the parent.
        process = subprocess.Popen(
            call, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent()
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log, limit)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(process)


def _end_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], health: str, log: Path, limit: float) -> None:
    end = time.monotonic() + limit
    # A proxy that the environment names must not be used for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if (code := process.poll()) is not None:
            raise DataError(f"--serve: vLLM ended with exit code {code} before it was ready. Its output is {log}.")
        with suppress(urllib.error.URLError, OSError), opener.open(health, timeout=5):
            return
        if time.monotonic() > end:
            raise DataError(
                f"--serve-limit {limit:g}: vLLM was not ready in this time. Its output is {log}; give it longer."
            )
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server, then kill what is left of its process group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
