"""The upstream gradient is multiplied and converted once, and overwrites only a tensor that is not read again."""

import pytest
import torch

from hapo_kernels.policy_head import policy_head, policy_loss_from_logits
from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss
from hapo_kernels.upstream import BLOCK, times_upstream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 is tested only on a GPU, because the interpreter truncates to bf16 instead of rounding.
STORAGE = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
FACTORS = (1.0, -0.3, 0.0)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_product_is_rounded_once_and_a_kept_tensor_is_not_changed(size, dtype, factor):
    gradient, upstream = numbers(size), torch.tensor(factor, device=DEVICE)
    before = gradient.clone()
    assert torch.equal(times_upstream(gradient, upstream, dtype), (before * factor).to(dtype))
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("factor", FACTORS)
def test_a_consumed_tensor_is_overwritten_and_no_memory_is_allocated(dtype, factor):
    gradient, upstream = numbers(3, 700).to(dtype), torch.tensor(factor, device=DEVICE)
    expected = (gradient.float() * factor).to(dtype)
    found = times_upstream(gradient, upstream, dtype, consume=True)
    assert found.data_ptr() == gradient.data_ptr()
    assert torch.equal(found, expected)


def losses():
    """A loss of each operation that computes its gradient in the forward pass, with the leaves of that gradient."""
    hidden, weight = numbers(2, 3, 8), numbers(11, 8)
    label, advantage = torch.arange(6, device=DEVICE).view(2, 3), torch.tensor([1.0, -2.0], device=DEVICE)
    mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    terms = {"clip": Clip(0.2, 0.2, 3.0), "aggregation": Aggregation("token-mean"), "impl": "triton"}

    def of(operation, *leaves, tokens=(label, None, advantage, mask)):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        return operation(*leaves, *tokens, **terms).loss, leaves

    yield of(policy_head, hidden, weight)
    yield of(policy_loss_from_logits, hidden @ weight.T)
    yield of(policy_loss, -numbers(2, 3).abs(), tokens=(None, advantage, mask))


@pytest.mark.parametrize("factor", FACTORS)
def test_the_gradient_is_the_same_again_whether_the_graph_is_kept_or_freed(factor):
    for loss, leaves in losses():
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [torch.autograd.grad(factor * loss, leaves, retain_graph=True) for _ in range(2)]
        freed = torch.autograd.grad(factor * loss, leaves)
        assert all(gradient.abs().max() > 0 for gradient in once)
        for gradients in (*kept, freed):
            for gradient, expected in zip(gradients, once, strict=True):
                assert torch.equal(gradient, factor * expected)


def test_unused_outputs_create_no_gradient_of_zeros():
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    for loss, leaves in losses():
        with Recorder():
            torch.autograd.grad(loss, leaves)
    assert seen
    assert not [name for name in seen if "zeros" in name], seen
