"""The plain loop: supervised steps first, then the rest of the run with its own learning rate."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.recipes.plain import plain_loop

TINY = {"digits": 2, "hidden": 64, "prompts": 4, "rollouts": 2, "steps": 6, "heldout": 2, "imitate": 1 / 3, "lr": 1e-2}


def parameters_after(**settings):
    found = []

    def keep(policy):
        found.extend(parameter.detach().clone() for parameter in policy.model.parameters())
        return {}

    plain_loop.train(plain_loop.Settings(**TINY | settings), probe=keep)
    return found


def largest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def test_the_steps_after_the_supervised_ones_have_the_learning_rate_after():
    """At a rate of 1e-9 it makes no difference what they train on; at a larger one, or with the first rate, it does."""
    always, never = {"gate": "always", "mode": "append"}, {"gate": "never"}
    supervised = parameters_after(**never, lr_after=1e-9)
    assert largest(parameters_after(**always, lr_after=1e-9), supervised) < 1e-7
    assert largest(parameters_after(**always, lr_after=1e-3), supervised) > 1e-4
    assert largest(parameters_after(**always), supervised) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_learning_rate_falls_to_a_tenth_in_each_part(monkeypatch, share):
    parts = []
    made = plain_loop.optimizer_of

    def spy(parameters, settings, lr, steps):
        optimizer, schedule = made(parameters, settings, lr, steps)
        parts.append((lr, steps, optimizer))
        return optimizer, schedule

    monkeypatch.setattr(plain_loop, "optimizer_of", spy)
    parameters_after(imitate=share, lr_after=1e-3)
    expected = {0.0: [(1e-3, 6)], 0.5: [(1e-2, 3), (1e-3, 3)], 1.0: [(1e-2, 6)]}[share]
    assert [(lr, steps) for lr, steps, _ in parts if steps] == expected
    for lr, steps, optimizer in parts:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr / 10 if steps else lr)


@pytest.mark.parametrize(
    ("settings", "rate"), [({"task": "digits"}, 1e-3), ({"task": "words"}, 1e-4), ({"model": "a-model"}, 1e-4)]
)
def test_the_rate_of_the_warm_up_is_lower_for_a_pretrained_model(monkeypatch, settings, rate):
    """The first steps of Adam move a weight by the rate, whatever the gradient: here two, until all answers are right."""
    weight = torch.nn.Parameter(torch.zeros(1))
    policy = SimpleNamespace(
        model=SimpleNamespace(parameters=lambda: [weight]),
        task=SimpleNamespace(train=["a problem"]),
        demonstration_rows=len,
        rollouts=lambda problems, counts, generator: SimpleNamespace(score_B=torch.ones(len(problems))),
    )
    monkeypatch.setattr(plain_loop, "imitation_loss", lambda policy, rows: 5 * weight.sum())
    plain_loop.warm_up(policy, plain_loop.Settings(**settings, lr=3e-4, warm=0.5))
    assert weight.item() == pytest.approx(-2 * rate, rel=0.02)


class Makers(TorchFunctionMode):
    """Records the device of each tensor that the plain loop makes from numbers: line of the call → device."""

    MAKERS = (torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.empty)

    def __init__(self):
        self.devices = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        if function in self.MAKERS and frame.f_code.co_filename == plain_loop.__file__:
            self.devices[frame.f_lineno] = kwargs.get("device")
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "always", "mode": "append", "imitate": 1 / 3},
        {"gate": "always", "mode": "replace", "objective": "srft"},
        {"gate": "never", "filter_groups": True, "warm": 1e-6},
        {"gate": "always", "objective": "real", "source": "column_or_own"},
    ],
)
def test_every_tensor_of_a_step_is_made_on_the_device_of_the_model(settings):
    with Makers() as made:
        plain_loop.train(plain_loop.Settings(**TINY | {"imitate": 0.0, "steps": 2} | settings))
    assert len(made.devices) > 5
    assert {line: device for line, device in made.devices.items() if device is None} == {}


def test_a_task_of_ones_own_is_what_the_run_trains_on():
    settings = plain_loop.Settings(**TINY | {"steps": 1, "imitate": 0.0}, test_first=True)
    task = plain_loop.make_task(settings)
    asked = []
    task.is_right = lambda problem, text: asked.append(problem) or True
    plain_loop.train(settings, task=task)
    assert set(asked) >= {*task.train[:4], *task.heldout["heldout_success"]}
