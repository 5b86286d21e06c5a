"""If verl's trainer would wait forever with every process alive, the run ends with a line that says why."""

import signal
import time

import pytest

from tests.e2e.conftest import TrainingError, name_of
from tests.e2e.test_limits import HAPO, SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.long]
MINUTE = 60
# Each part of the start takes less time than this, even on a busy machine.
REPORT, LIMIT = 150, 180


class Hang:
    """A launch that hangs after its first steps, and the result."""

    def __init__(self, prepare, name, *overrides, stopped=None, environment=None):
        launch, self.run = prepare(
            name, "+hapo=plus", *SCRIPTED, "trainer.save_freq=-1", *HAPO, *overrides, steps=8, environment=environment
        )
        self.error, self.steps, at = None, 0, time.monotonic()
        try:
            for kind, _ in launch.run():
                if kind == "step":
                    self.steps, at = self.steps + 1, time.monotonic()
                if self.steps == 2 and stopped:
                    (process,) = [p for p in launch.process.children(recursive=True) if name_of(p) == stopped]
                    process.send_signal(signal.SIGSTOP)
                    stopped = None
        except TrainingError as error:
            self.error = error
        self.seconds = time.monotonic() - at
        log = launch.log.read_text(errors="replace")
        self.lines = [line[line.index("hapo: ") :] for line in log.splitlines() if "hapo: " in line]


def test_an_engine_that_cannot_load_weights_ends_the_run_within_a_minute(prepared):
    environment = {"VERL_USE_EXTERNAL_MODULES": "tests.e2e.failing_update"}
    hang = Hang(prepared, "failing_update", environment=environment)
    assert hang.error is not None
    assert hang.steps == 1
    assert hang.seconds < MINUTE
    (line,) = [line for line in hang.lines if "could not load new weights" in line]
    assert line.startswith("hapo: vllm server 0 could not load new weights (")
    assert "ValueError: these weights fail on purpose" in line
    assert line.endswith("No checkpoint is saved, for trainer.save_freq=-1: start it again from step 1.")


def test_a_worker_that_hangs_is_reported_and_ends_the_run_with_all_stacks(prepared):
    limits = [f"hapo.stall_report={REPORT}", f"hapo.stall_limit={LIMIT}"]
    hang = Hang(prepared, "stopped_worker", *limits, stopped="ray::WorkerDict")
    assert hang.error is not None
    assert LIMIT <= hang.seconds < LIMIT + 2 * MINUTE
    said, ended = [line for line in hang.lines if "no progress for" in line]
    for line in (said, ended):
        assert " > " in line
        assert "busy: training worker 0;" in line
    assert f"The run goes on, and ends after {LIMIT} s without progress (hapo.stall_limit)." in said
    assert "The run ends. No checkpoint is saved" in ended
    stacks = [file.read_text() for file in sorted((hang.run.folder / "checkpoints").glob("hapo_stacks_*.txt"))]
    assert len(stacks) == 2
    for text in stacks:
        assert " in fit\n" in text, "the trainer's own"
        for process in ("training worker 0, process ", "vllm server 0, process ", "agent loop worker 0, process "):
            assert process in text
