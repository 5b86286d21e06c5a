"""With a vocabulary divided over processes, each process gets the whole result and its slice of the gradients."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from exactness import DEVICE
from hapo_kernels.linear_logprob import linear_logprob
from hapo_kernels.policy_head import policy_head
from hapo_kernels.policy_loss import Aggregation, Clip, KLPenalty, Teacher
from interpreter import patch_once_per_launch

V, RANKS = 14, 2
SLICES = [slice(7 * rank, 7 * rank + 7) for rank in range(RANKS)]
WHOLE = slice(None)


def batch(dtype):
    """A batch of (3, 4) tokens; slice 2 has almost no probability, except for one token. Unread values are NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    bias = normal(V)
    bias[7:] = -math.inf
    bias[9] = 0.5
    label = torch.randint(0, 7, (3, 4), generator=generator)
    label[0, 1], label[2, 3] = 9, -100
    fields = {
        "hidden": torch.where(mask[..., None], normal(3, 4, 5), math.nan),
        "weight": normal(V, 5),
        "bias": bias,
        "label": label,
        "behaviour": -normal(3, 4).abs(),
        "advantage": torch.tensor([1.0, -0.7, 0.0], dtype=dtype),
        "mask": mask,
        "reference": -normal(3, 4).abs(),
        "importance": normal(3, 4).abs(),
    }
    return {name: tensor.to(DEVICE) for name, tensor in fields.items()}


def leaves_of(fields, mine):
    leaves = [fields["hidden"], fields["weight"][mine], fields["bias"][mine]]
    return [leaf.detach().clone().requires_grad_() for leaf in leaves]


def logprob(fields, mine, **settings):
    hidden, weight, bias = leaves = leaves_of(fields, mine)
    keep, label = fields["mask"].flatten(), fields["label"].flatten()
    result = linear_logprob(
        hidden.flatten(0, 1), weight, label, bias_V=bias, temperature=0.7, keep_N=keep, with_entropy=True, **settings
    )
    slope = torch.linspace(-1, 2, 12, dtype=hidden.dtype, device=DEVICE)
    gradients = torch.autograd.grad((slope * (result.logp_N + 3 * result.entropy_N)).sum(), leaves)
    return [*gradients, *(tensor.detach() for tensor in result)]


def fused(fields, mine, every_term, shape=("power", 0.1, 1.0), **settings):
    hidden, weight, bias = leaves = leaves_of(fields, mine)
    if every_term:
        settings |= {
            "teacher": Teacher(
                torch.tensor([False, True, False], device=DEVICE), shape[1], exponent=shape[2], shape=shape[0]
            ),
            "importance_weight_BT": fields["importance"],
            "kl": KLPenalty(fields["reference"], "k3", 0.05),
            "entropy_coefficient": 0.01,
        }
    result = policy_head(
        hidden,
        weight,
        *(fields[name] for name in ("label", "behaviour", "advantage", "mask")),
        clip=Clip(0.2, 0.28, 3.0),
        aggregation=Aggregation("token-mean"),
        bias_V=bias,
        temperature=0.7,
        **settings,
    )
    gradients = torch.autograd.grad(result.loss, leaves)
    return [*gradients, result.loss.detach(), *result.metrics, result.logp_BT, result.entropy_BT]


CASES = {
    "logprob": logprob,
    "head": lambda *args, **settings: fused(*args, True, **settings),
    "head, logarithm": lambda *args, **settings: fused(*args, True, ("power", 0.1, 0.0), **settings),
    "head, power": lambda *args, **settings: fused(*args, True, ("power", math.inf, 0.3), **settings),
    "head, trsft": lambda *args, **settings: fused(*args, True, ("trsft", 0.1, 1.0), **settings),
    "head, chord": lambda *args, **settings: fused(*args, True, ("chord", 0.1, 1.0), **settings),
    # The row with advantage 0 has no gradient in this case, and is only in the forward pass.
    "head, surrogate only": lambda *args, **settings: fused(*args, False, **settings),
}


def of_rank(rank, rendezvous, results):
    os.environ["TRITON_INTERPRET"] = "1"
    patch_once_per_launch()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    found = {}
    for impl, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        settings = {"vocabulary_group": dist.group.WORLD, "chunk_rows": 4, "impl": impl}
        for name, case in CASES.items():
            found[name, impl] = case(batch(dtype), SLICES[rank], **settings)
        nowhere = batch(dtype)
        nowhere["label"][1, 2] = V
        found["nowhere", impl] = fused(nowhere, SLICES[rank], True, **settings)
    os.environ["HAPO_KERNELS_DEBUG"] = "1"
    for case in CASES.values():
        with pytest.raises(ValueError, match=r"weight_VH of \[8, 6\] tokens on the ranks: slices of one size"):
            case(batch(torch.float32), (slice(0, 8), slice(8, V))[rank], vocabulary_group=dist.group.WORLD)
    torch.save(found, f"{results}-{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="two gloo processes and the interpreter run on a CPU")
def test_two_processes_give_the_result_of_the_whole_vocabulary(tmp_path):
    mp.spawn(of_rank, args=(tmp_path / "rendezvous", tmp_path / "rank"), nprocs=RANKS)
    found = [torch.load(tmp_path / f"rank-{rank}") for rank in range(RANKS)]
    for impl, dtype, tolerance in (
        ("reference", torch.float64, {"rtol": 1e-12, "atol": 1e-12}),
        ("triton", torch.float32, {"rtol": 2e-5, "atol": 2e-6}),
    ):
        fields = {
            name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch(dtype).items()
        }
        for name, case in CASES.items():
            dhidden, dweight, dbias, *values = case(fields, WHOLE, impl="reference")
            assert dhidden[fields["mask"]].abs().max() > 0
            for rank, mine in enumerate(SLICES):
                expected = [dhidden, dweight[mine], dbias[mine], *values]
                for ours, theirs in zip(found[rank][name, impl], expected, strict=True):
                    torch.testing.assert_close(ours.double(), theirs.double(), **tolerance, msg=f"{name}, {impl}")
        # This label is in no slice.
        assert all(ranks["nowhere", impl][3].isnan() for ranks in found)


@pytest.mark.parametrize("case", CASES)
def test_a_group_of_one_process_changes_nothing(case, tmp_path):
    """The kernel's code path with a process group, on one GPU if there is one."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        settings = {"impl": "triton", "chunk_rows": 4}
        sliced = CASES[case](batch(torch.float32), WHOLE, vocabulary_group=dist.group.WORLD, **settings)
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(sliced, CASES[case](batch(torch.float32), WHOLE, **settings), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
