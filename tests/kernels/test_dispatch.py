"""Inputs that every kernel refuses with one line: a DTensor, fp64, an unknown implementation."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from exactness import DEVICE
from hapo_kernels.linear_logprob import linear_logprob
from hapo_kernels.policy_head import policy_head, policy_loss_from_logits
from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss
from hapo_kernels.segment_norm import segment_norm, segment_norm_tokens, segment_stats

LOSS = {"clip": Clip(0.2, 0.28, 3.0), "aggregation": Aggregation("token-sum")}
LABEL = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
MASK = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
GROUP = LABEL[:, 0]
BOUNDS = torch.tensor([0, 3, 6], device=DEVICE)


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, device=DEVICE)


# Each operation gets one wrong tensor and, if it takes more tensors, valid ones.
CALLS = {
    "segment_norm": ((2,), lambda x, impl: segment_norm(x, GROUP, scale_by_std=True, impl=impl)),
    "segment_stats": ((2,), lambda x, impl: segment_stats(x, GROUP, impl=impl)),
    "segment_norm_tokens": (
        (2,),
        lambda x, impl: segment_norm_tokens(
            x, GROUP, mask_T=MASK.flatten(), token_offset_B1=BOUNDS, scale_by_std=True, impl=impl
        ),
    ),
    "policy_loss": ((2, 3), lambda x, impl: policy_loss(x, ones(2, 3), ones(2), MASK, impl=impl, **LOSS)),
    "linear_logprob": (
        (6, 4),
        lambda x, impl: linear_logprob(x, ones(5, 4, dtype=x.dtype), LABEL.flatten(), impl=impl),
    ),
    "policy_head": (
        (2, 3, 4),
        lambda x, impl: policy_head(x, ones(5, 4, dtype=x.dtype), LABEL, ones(2, 3), ones(2), MASK, impl=impl, **LOSS),
    ),
    "policy_loss_from_logits": (
        (2, 3, 5),
        lambda x, impl: policy_loss_from_logits(x, LABEL, ones(2, 3), ones(2), MASK, impl=impl, **LOSS),
    ),
}


@pytest.mark.parametrize(("shape", "call"), CALLS.values(), ids=CALLS)
def test_the_kernel_refuses_fp64_and_the_reference_accepts_it(shape, call):
    wrong = ones(*shape, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"impl='triton' on torch.float64: the kernels store fp32, bf16 or fp16. Use impl='reference'"
    ):
        call(wrong, "triton")
    assert call(wrong, "auto")[0].dtype == torch.float64


@pytest.mark.parametrize(("shape", "call"), CALLS.values(), ids=CALLS)
def test_an_unknown_implementation_is_refused(shape, call):
    with pytest.raises(ValueError, match="impl='cuda': no such implementation"):
        call(ones(*shape), "cuda")


def test_a_dtensor_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))

        def spread(tensor):
            return DTensor.from_local(tensor, mesh, [Replicate()])

        calls = [lambda shape=shape, call=call: call(spread(ones(*shape)), "triton") for shape, call in CALLS.values()]
        calls.append(lambda: linear_logprob(ones(6, 4), spread(ones(5, 4)), LABEL.flatten(), impl="triton"))
        calls.append(lambda: policy_loss(ones(2, 3), spread(ones(2, 3)), ones(2), MASK, impl="triton", **LOSS))
        for call in calls:
            with pytest.raises(
                TypeError, match=r"a DTensor: a kernel sees one rank's memory. Pass tensor.to_local\(\)"
            ):
                call()
    finally:
        dist.destroy_process_group()
