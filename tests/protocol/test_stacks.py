"""Stacks of blocked processes, and no harm to processes that have not registered for the signal."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from hapo_verl.protocol.stacks import SIGNAL, stacks_of

ANSWERS = "from hapo_verl.protocol.stacks import answer_the_signal; answer_the_signal(); answer_the_signal()\n"
# This process is blocked in C and holds the interpreter's lock, so no Python code can run in it.
BLOCKED = (
    "import ctypes\ndef stuck():\n    while True:\n        ctypes.PyDLL(None).sleep(600)\n"
    "print('ready', flush=True)\nstuck()\n"
)


@pytest.fixture
def process():
    started = []

    def start(code):
        command = [sys.executable, "-c", code]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and the children that it started
        child.wait()


def test_the_stack_of_a_process_blocked_in_c_is_shown(process):
    child = process(ANSWERS + BLOCKED)
    time.sleep(0.5)
    for _ in range(2):
        (stack,) = stacks_of([child.pid]).values()
        assert stack.count("in stuck") == 1
    assert child.poll() is None


def test_the_stacks_of_child_processes_are_shown(process):
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ANSWERS + BLOCKED!r}])"
    outer = process(ANSWERS + "import threading\n" + inner)
    stacks = stacks_of([outer.pid])
    assert len(stacks) == 2
    assert sum("in stuck" in stack for stack in stacks.values()) == 1


@pytest.mark.parametrize(
    "prepare", ["", f"import signal; signal.signal({int(SIGNAL)}, lambda *_: print('mine'))\n" + ANSWERS]
)
def test_a_process_that_has_not_registered_is_left_alone(process, prepare):
    child = process(prepare + BLOCKED)
    (stack,) = stacks_of([child.pid]).values()
    assert stack.endswith(": does not answer the signal")
    time.sleep(0.3)
    assert child.poll() is None


def test_a_process_that_has_ended_is_not_an_error(process):
    child = process(ANSWERS + BLOCKED)
    child.kill()
    child.wait()
    assert list(stacks_of([child.pid])) == [child.pid]


def test_a_process_of_the_users_own_keeps_its_signal():
    """Importing verl outside Ray changes no signal handler."""
    code = f"import verl, signal; print(signal.getsignal({int(SIGNAL)}) is signal.SIG_DFL, flush=True)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + "; import os; os.kill(os.getpid(), signal.SIGUSR2)"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert run.stdout.splitlines()[-1] == "True"
    assert run.returncode == -signal.SIGUSR2
