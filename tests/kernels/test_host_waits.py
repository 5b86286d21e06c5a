"""The host launches a training step without waiting for the device, if it is told how many tokens train.

On a GPU, PyTorch makes every operation an error for which the host would wait. Without one, the operations are recorded
and those that would wait must not be among them: a value or a shape that comes from the device, or a tensor made on the
host (lift_fresh), which a copy to the device would wait for.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hapo_kernels.linear_logprob import linear_logprob
from hapo_kernels.policy_head import policy_head, policy_loss_from_logits
from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss
from hapo_kernels.segment_norm import kernel as segment_norm_kernel
from hapo_kernels.segment_norm import segment_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TERMS = {"clip": Clip(0.2, 0.2, 3.0), "aggregation": Aggregation("token-mean", batch_num_tokens=5), "impl": "triton"}
WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "repeat_interleave", "masked_select", "unique_consecutive")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_waiting():
    with Recorder() as recorder:
        if CUDA:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    assert recorder.names
    assert not recorder.names & set(WAITS)


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((2, 3, 8), (11, 8)))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool, device=DEVICE)
    label, advantage = torch.arange(6, device=DEVICE).view(2, 3), torch.tensor([1.0, -2.0], device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), label, mask, advantage


def head():
    hidden, weight, label, mask, advantage = inputs()
    counts = {"active_tokens": 5, "training_tokens": 5}

    def step():
        result = policy_head(hidden, weight, label, None, advantage, mask, **counts, **TERMS)
        torch.autograd.grad(result.loss, (hidden, weight))

    return step


def logprob():
    hidden, weight, label, mask, _ = inputs()

    def step():
        logp, _ = linear_logprob(
            hidden.flatten(0, 1), weight, label.flatten(), keep_N=mask.flatten(), kept_rows=5, impl="triton"
        )
        torch.autograd.grad(logp.sum(), (hidden, weight))

    return step


def logits():
    hidden, weight, label, mask, advantage = inputs()
    logits = (hidden @ weight.T).detach().requires_grad_()

    def step():
        result = policy_loss_from_logits(logits, label, None, advantage, mask, **TERMS)
        torch.autograd.grad(result.loss, logits)

    return step


def loss():
    *_, mask, advantage = inputs()
    logp = torch.zeros(2, 3, device=DEVICE, requires_grad=True)
    return lambda: torch.autograd.grad(policy_loss(logp, None, advantage, mask, **TERMS).loss, logp)


def long_group():
    score, bounds = torch.arange(70_000.0, device=DEVICE), torch.tensor([0, 70_000], device=DEVICE)
    if CUDA:
        return lambda: segment_norm(score, offset_S1=bounds, scale_by_std=True, impl="triton")
    # A recorder does not see what a custom op does inside.
    return lambda: segment_norm_kernel.segment_norm_op._init_fn(score, None, None, bounds, True, 1e-6)


@pytest.mark.parametrize("of", [head, logprob, logits, loss, long_group])
def test_the_host_does_not_wait_for_the_device(of):
    step = of()
    step()  # The first step compiles.
    with without_waiting():
        step()


def test_a_wait_for_the_device_is_detected():
    hidden, weight, label, mask, advantage = inputs()
    with pytest.raises((AssertionError, RuntimeError)), without_waiting():
        policy_head(hidden, weight, label, None, advantage, mask, **TERMS)
