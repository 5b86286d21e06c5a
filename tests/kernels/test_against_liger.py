"""Loss and gradients compared with Liger's fused linear GRPO loss, an independent implementation."""

import math

import pytest
import torch

from exactness import DEVICE
from hapo_kernels.policy_head import policy_head
from hapo_kernels.policy_loss import Aggregation, Clip, KLPenalty

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("loss_type", "mode", "loss_scale_factor"),
    [("bnpo", "token-mean", None), ("grpo", "seq-mean-token-mean", None), ("dr_grpo", "seq-mean-token-sum-norm", 9)],
)
def test_loss_and_gradients_equal_ligers(impl, loss_type, mode, loss_scale_factor):
    generator = torch.Generator().manual_seed(0)
    rows, tokens, H, V, temperature = 5, 7, 24, 67, 0.7

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden, weight, bias = normal(rows, tokens, H), normal(V, H) / math.sqrt(H), normal(V)
    label = torch.randint(0, V, (rows, tokens), generator=generator).to(DEVICE)
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    logp = torch.log_softmax(logits, -1).gather(-1, label[..., None])[..., 0]
    behaviour, reference, advantage = logp + 0.4 * normal(rows, tokens), logp + normal(rows, tokens), normal(rows)
    # Every row has a token: Liger's mean over rows counts empty ones, verl's does not.
    mask = torch.arange(tokens, device=DEVICE) < torch.tensor([1, 3, 7, 4, 2], device=DEVICE)[:, None]

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    ours = policy_head(
        leaves[0],
        leaves[1],
        label,
        behaviour,
        advantage,
        mask,
        clip=Clip(0.2, 0.28, math.inf),
        aggregation=Aggregation(mode, loss_scale_factor=loss_scale_factor),
        kl=KLPenalty(reference, "k3", 0.04),
        bias_V=leaves[2],
        temperature=temperature,
        chunk_rows=8,
        impl=impl,
    )
    gradients = torch.autograd.grad(ours.loss, leaves)

    theirs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    oracle = chunked_loss.LigerFusedLinearGRPOLoss(
        beta=0.04,
        compiled=False,
        use_ref_model=True,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type=loss_type,
        max_completion_length=loss_scale_factor,
        temperature=temperature,
    )
    loss, metrics = oracle(
        theirs[0],
        theirs[1],
        label,
        mask.float(),
        advantage,
        bias=theirs[2],
        ref_per_token_logps=reference,
        old_per_token_logps=behaviour,
    )
    torch.testing.assert_close(ours.loss.detach(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert loss.abs() > 1e-3
    for mine, yours in zip(gradients, torch.autograd.grad(loss, theirs), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-6 * yours.abs().max().item())
    clipped = ours.metrics.clipped_tokens / ours.metrics.on_policy_tokens
    torch.testing.assert_close(clipped, metrics[-1].float().cpu().to(clipped.device), rtol=1e-5, atol=1e-6)
