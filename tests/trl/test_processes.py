"""Two processes that share the rows of a group give the same weights as one process with all rows."""

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("trl", reason="TRL is not installed; it has an environment of its own, see the Makefile")
import torch

from tests.trl import step_process

PROCESSES = 2


def in_two_processes(output, port):
    """Run the steps in two processes that communicate by gloo, with the environment that torchrun would set."""
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    of_all |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, step_process.__file__, str(output)],
            env=os.environ | of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(PROCESSES)
    ]
    try:
        assert [process.wait(timeout=900) for process in started] == [0] * PROCESSES
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_two_processes_give_the_result_of_one(tmp_path):
    step_process.main(tmp_path / "1.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    in_two_processes(tmp_path / "2.pt", port)
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, PROCESSES))
    assert one.pop("rows") == two.pop("rows")
    assert one.pop("injected") == two.pop("injected")
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
