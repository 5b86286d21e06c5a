"""Progress of a trainer: a new place in the code, step or finished prompt is progress, and polling is not."""

import threading
import time
from types import SimpleNamespace

import pytest

from hapo_verl.driver.progress import Progress

# A trainer and its replay buffer with the names that they have in verl; the trainer polls the buffer.
TRAINER = """
def fit(self):
    self.step()
    self.step()

def step(self):
    self.buffer.sample()
    self.update()

def update(self):
    self.gate("update")
"""
BUFFER = """
def sample(self):
    while not self.done.wait(0.01):
        self.polls += 1
        poll(self)

def poll(self):
    self.polls += 1
"""


def functions(code, file):
    names = {}
    exec(compile(code, f"/site-packages/verl/trainer/ppo/v1/{file}", "exec"), names)
    return {name: value for name, value in names.items() if callable(value)}


@pytest.fixture
def running():
    """A trainer with these functions in a separate thread; it waits in its buffer, then at its gate."""
    buffer = type("Buffer", (), functions(BUFFER, "replay_buffer.py"))()
    buffer.done, buffer.polls = threading.Event(), 0
    buffer.finished_keys, buffer.running_keys, buffer.failure_keys = (
        {"train": set()},
        {"train": {1, 2, 3}},
        {"train": set()},
    )
    passed = threading.Semaphore(0)
    trainer = type("Trainer", (), functions(TRAINER, "trainer_base.py"))()
    trainer.buffer, trainer.replay_buffer, trainer.global_steps = buffer, buffer, 7
    trainer.gate = lambda name: passed.acquire(timeout=30)
    made = []

    def run():
        made.append(Progress(trainer))
        trainer.fit()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while buffer.polls < 3:
        time.sleep(0.01)
    yield SimpleNamespace(progress=made[0], trainer=trainer, buffer=buffer, passed=passed)
    buffer.done.set()
    passed.release(4)
    thread.join(30)


def marks(progress, count=20):
    found = set()
    for _ in range(count):
        found.add(progress.position().mark)
        time.sleep(0.01)
    return found


def test_polling_is_not_progress_and_a_finished_prompt_is(running):
    before = marks(running.progress)
    assert len(before) == 1
    assert running.buffer.polls > 10
    running.buffer.running_keys["train"].remove(2)
    running.buffer.finished_keys["train"].add(2)
    (after,) = marks(running.progress)
    assert after not in before


def test_prompts_that_fail_and_are_resampled_are_not_progress(running):
    (before,) = marks(running.progress)
    for prompt in (4, 5):
        running.buffer.failure_keys["train"] = {prompt}
        running.buffer.running_keys["train"] = {1, 2, prompt}
        assert marks(running.progress) == {before}


def test_the_text_names_step_place_and_prompts(running):
    running.buffer.running_keys["train"].remove(2)
    running.buffer.failure_keys["train"].add(2)
    texts = {running.progress.position().text for _ in range(20)}
    assert all(text.startswith("step 7: fit > step > sample") for text in texts)
    assert all("(ppo/v1/replay_buffer.py:" in text for text in texts)
    assert all(text.endswith("; train: 0 of 3 prompts finished, 1 failed") for text in texts)


def test_the_next_part_of_a_step_and_the_next_step_are_progress(running):
    (sampling,) = marks(running.progress)
    running.buffer.done.set()
    while "update" not in running.progress.position().text:
        time.sleep(0.01)
    (updating,) = marks(running.progress)
    assert updating != sampling
    running.passed.release()
    while running.progress.position().mark in (sampling, updating):
        time.sleep(0.01)
    (second,) = marks(running.progress)
    running.trainer.global_steps = 8
    assert marks(running.progress).isdisjoint({sampling, updating, second})


def test_a_trainer_without_a_buffer_or_a_step_still_has_a_place():
    position = Progress(object()).position()
    assert position.text.startswith("step None: ")
