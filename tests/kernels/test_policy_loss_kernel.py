"""The Triton policy loss compared with the reference's fp64 autograd: every term, mode and edge, as exact as PyTorch."""

import math

import pytest
import torch

from exactness import DEVICE, STORAGE, assert_no_less_exact
from hapo_kernels.policy_loss import Aggregation, Clip, EntropyBonus, KLPenalty, Teacher, kernel, policy_loss
from hapo_kernels.policy_loss.reference import aggregate, row_weight
from hapo_kernels.policy_loss.terms import AGGREGATION_MODES, KL_KINDS

CLIP = Clip(low=0.2, high=0.28, dual=3.0)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 4321, "global_batch_size": 37, "loss_scale_factor": 50}


def batch(rows=6, tokens=129, seed=0, dtype=torch.float32):
    """A batch with all terms on, prefix masks of every length from 0 to T, and NaN and ±inf where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    policy = -normal(rows, tokens).abs()
    fields = {
        "policy": policy,
        "behaviour": policy + 0.7 * normal(rows, tokens),
        "advantage": normal(rows),
        "teacher_logp": -normal(rows, tokens).abs(),
        "weight": normal(rows, tokens).abs(),
        "reference": policy + normal(rows, tokens),
        "entropy": normal(rows, tokens).abs(),
    }
    fields = {name: tensor.to(dtype) for name, tensor in fields.items()}
    fields["mask"] = torch.arange(tokens) < torch.linspace(0, tokens, rows).long()[:, None]
    fields["teacher"] = torch.arange(rows) % 3 == 1
    garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[torch.arange(tokens) % 3]
    for name in ("policy", "behaviour", "teacher_logp", "weight", "reference", "entropy"):
        fields[name] = torch.where(fields["mask"], fields[name], garbage)
    on, off = fields["teacher"][:, None], ~fields["teacher"][:, None]
    for name, unread in (("behaviour", on), ("weight", on), ("reference", on), ("teacher_logp", off)):
        fields[name] = torch.where(unread, garbage, fields[name])
    return {name: tensor.to(DEVICE) for name, tensor in fields.items()}


def run(
    fields, impl, *, dtype=None, mode="token-mean", info=GLOBAL, kind="k3", clip=CLIP, entropy_coefficient=0.01, **given
):
    fields = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in fields.items()
    }
    policy = fields["policy"].detach().clone().requires_grad_()
    entropy = fields["entropy"].detach().clone().requires_grad_()
    terms = {
        "teacher": Teacher(fields["teacher"], 0.1, fields["teacher_logp"]),
        "importance_weight_BT": fields["weight"],
        "kl": KLPenalty(fields["reference"], kind, 0.05),
        "entropy": EntropyBonus(entropy, entropy_coefficient),
        **given,
    }
    result = policy_loss(
        policy,
        fields["behaviour"],
        fields["advantage"],
        fields["mask"],
        clip=clip,
        aggregation=Aggregation(mode, **info),
        impl=impl,
        **terms,
    )
    wanted = (policy, entropy) if terms["entropy"] is not None else (policy,)
    gradients = torch.autograd.grad(result.loss, wanted, allow_unused=True)
    return {
        "loss": result.loss.detach(),
        "policy gradient": gradients[0],
        "entropy gradient": gradients[-1] if gradients[-1] is not None else torch.zeros(0),
        **result.metrics._asdict(),
    }


def check(fields, **settings):
    ours = run(fields, "triton", **settings)
    same_dtype, exact = run(fields, "reference", **settings), run(fields, "reference", dtype=torch.float64, **settings)
    for name in exact:
        assert_no_less_exact(ours[name], same_dtype[name], exact[name], name)
    return ours


@pytest.mark.parametrize("tokens", [0, 1, 7, 127, 128, 129, 1023, 1024, 1025])
def test_every_row_length_in_every_storage_dtype(tokens):
    for dtype in STORAGE:
        check(batch(tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_every_aggregation(mode, info):
    check(batch(), mode=mode, info=info)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
def test_one_weight_per_row_gives_the_same_aggregation(mode, info):
    mask = batch()["mask"]
    value = torch.randn(mask.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(DEVICE)
    how = Aggregation(mode, **info)
    torch.testing.assert_close((row_weight(mask, how) * (value * mask).sum(-1)).sum(), aggregate(value, mask, how))


@pytest.mark.parametrize("kind", [kind + plus for kind in KL_KINDS for plus in ("", "+")])
def test_every_kl_estimator(kind):
    check(batch(), kind=kind)


def test_kl_estimators_are_clamped_like_verls():
    fields = batch(rows=1, tokens=7)
    fields["mask"], fields["teacher"] = torch.ones_like(fields["mask"]), torch.zeros_like(fields["teacher"])
    fields["policy"] = fields["behaviour"] = torch.full_like(fields["policy"], -5.0)
    fields["reference"] = fields["policy"] + torch.tensor([-25.0, -20.0, -1.0, 0.0, 2.0, 3.0, 21.0], device=DEVICE)
    fields["entropy"] = fields["weight"] = torch.ones_like(fields["policy"])
    for kind in ("k1", "abs", "k2", "k3", "k3+", "abs+"):
        ours = check(fields, kind=kind)
        assert ours["policy gradient"].isfinite().all()


@pytest.mark.parametrize("absent", ["teacher", "importance_weight_BT", "kl", "entropy"])
def test_every_term_may_be_absent(absent):
    fields = batch()
    if absent == "teacher":  # Its rows are on-policy rows now, and are read.
        fields = {
            name: tensor.nan_to_num(0.5, 0.5, 0.5) if tensor.is_floating_point() else tensor
            for name, tensor in fields.items()
        }
    check(fields, **{absent: None})


def test_a_teacher_with_unknown_probability():
    fields = batch()
    check(fields, teacher=Teacher(fields["teacher"], 0.1))


def test_one_advantage_per_token():
    fields = batch()
    fields["advantage"] = torch.where(fields["mask"], fields["behaviour"].nan_to_num(1.0).sin(), math.nan)
    check(fields)


def test_clips_switched_off_and_advantages_of_zero():
    fields = batch()
    fields["advantage"][::2] = 0
    for clip in (Clip(math.inf, math.inf, math.inf), Clip(0.0, 0.0, 1.5)):
        check(fields, clip=clip)


def test_ratios_on_the_edges_take_autograds_gradient():
    edges = torch.tensor([0.8, 1.28, 3.0, 1.0, math.exp(20), math.exp(-20), 2.0, 0.5])
    log_ratio = torch.cat([edges.log(), torch.tensor([20.0, -20.0, 20.5, -20.5, math.inf, -math.inf])])
    for advantage in (-1.0, 0.0, 1.0):
        policy = torch.full_like(log_ratio, -2.0)[None].to(DEVICE)
        fields = {
            "policy": policy,
            "behaviour": (policy - log_ratio.to(DEVICE)),
            "advantage": torch.tensor([advantage], device=DEVICE),
            "mask": torch.ones_like(policy, dtype=torch.bool),
            "teacher": torch.zeros(1, dtype=torch.bool, device=DEVICE),
            "entropy": torch.zeros_like(policy),
        }
        none = {"teacher": None, "importance_weight_BT": None, "kl": None, "entropy": None}
        fields |= {"teacher_logp": policy, "weight": policy, "reference": policy}
        off = {"clip": Clip(math.inf, math.inf, math.inf)}
        for clip in ({}, off):
            ours, reference = (run(fields, impl, **none, **clip) for impl in ("triton", "reference"))
            # With another exp a rounded ratio may lie on the other side of an edge, so compare with the fp32 reference.
            torch.testing.assert_close(ours["policy gradient"], reference["policy gradient"], rtol=1e-6, atol=0)
            torch.testing.assert_close(ours["loss"], reference["loss"], rtol=1e-6, atol=0)


def test_a_tie_with_the_dual_clip_shares_the_gradient():
    # A dual clip of 1 is refused, so ρ = 1 cannot tie with it. The tie is at ratios that are exact in fp32.
    for dual in (2.0, 4.0):
        policy = torch.full((1, 1), -1.0, device=DEVICE)
        exact_ratio = torch.exp(torch.tensor(math.log(dual))).item()
        fields = {
            "policy": policy,
            "behaviour": policy - math.log(dual),
            "advantage": torch.tensor([-1.0], device=DEVICE),
            "mask": torch.ones(1, 1, dtype=torch.bool, device=DEVICE),
            "teacher": torch.zeros(1, dtype=torch.bool, device=DEVICE),
            "entropy": policy,
        }
        none = {"teacher": None, "importance_weight_BT": None, "kl": None, "entropy": None}
        fields |= {"teacher_logp": policy, "weight": policy, "reference": policy}
        clip = Clip(math.inf, math.inf, exact_ratio)
        ours, reference = (run(fields, impl, clip=clip, info={}, **none) for impl in ("triton", "reference"))
        torch.testing.assert_close(ours["policy gradient"], reference["policy gradient"])


def test_teacher_probabilities_at_both_ends_stay_finite():
    fields = batch(rows=3, tokens=4)
    fields["mask"], fields["teacher"] = torch.ones_like(fields["mask"]), torch.ones_like(fields["teacher"])
    ends = torch.tensor([-math.inf, -1e4, -100.0, 0.0], device=DEVICE)
    fields["policy"] = ends.expand(3, 4).contiguous()
    fields["entropy"] = torch.ones(3, 4, device=DEVICE)
    ours = check(fields, teacher=Teacher(fields["teacher"], 0.1))
    assert ours["policy gradient"].isfinite().all()


def test_all_rows_masked_gives_zero():
    fields = batch()
    fields["mask"] = torch.zeros_like(fields["mask"])
    for mode in AGGREGATION_MODES:
        ours = run(fields, "triton", mode=mode, info={})
        assert all((value == 0).all() for value in ours.values())


def test_a_nan_in_an_active_position_is_not_hidden():
    fields = batch()
    fields["policy"][-1, 0] = math.nan
    assert run(fields, "triton")["loss"].isnan()


def test_inputs_may_be_strided_expanded_and_unaligned():
    fields = batch(tokens=65)
    plain = run(fields, "triton")

    def awkward(tensor):
        if tensor.ndim == 1:
            return tensor.repeat_interleave(2)[::2]
        storage = torch.empty(tensor.shape[1], tensor.shape[0] + 1, dtype=tensor.dtype, device=DEVICE)
        storage[:, 1:] = tensor.T
        return storage[:, 1:].T

    strided = run({name: awkward(tensor) for name, tensor in fields.items()}, "triton")
    assert all(torch.equal(plain[name], strided[name]) for name in plain)
    fields["advantage"] = fields["advantage"][:1].expand(6)
    once = run(fields, "triton")
    fields["advantage"] = fields["advantage"].contiguous()
    assert torch.equal(once["policy gradient"], run(fields, "triton")["policy gradient"])


def test_masks_of_any_dtype_are_the_same_mask():
    fields = batch()
    plain = run(fields, "triton")
    for dtype in (torch.int64, torch.int32, torch.float32, torch.uint8):
        assert torch.equal(run({**fields, "mask": fields["mask"].to(dtype)}, "triton")["loss"], plain["loss"])


def test_two_runs_give_the_same_bits_and_other_rows_do_not_change_a_rows_bits():
    fields = batch()
    first, second = run(fields, "triton"), run(fields, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
    order = torch.tensor([5, 2, 2, 4], device=DEVICE)
    some = run({name: tensor[order] for name, tensor in fields.items()}, "triton")
    assert torch.equal(some["policy gradient"], first["policy gradient"][order])


def test_the_upstream_gradient_multiplies():
    fields = batch()
    policy, entropy = (fields[name].clone().requires_grad_() for name in ("policy", "entropy"))
    result = policy_loss(
        policy,
        fields["behaviour"],
        fields["advantage"],
        fields["mask"] & ~fields["teacher"][:, None],
        clip=CLIP,
        aggregation=Aggregation("token-sum"),
        entropy=EntropyBonus(entropy, 0.5),
        impl="triton",
    )
    once = torch.autograd.grad(result.loss, (policy, entropy), retain_graph=True)
    scaled = torch.autograd.grad(-4.0 * result.loss, (policy, entropy))
    for ours, factor_of in zip(scaled, once, strict=True):
        assert factor_of.abs().max() > 0
        assert torch.equal(ours, -4.0 * factor_of)
    assert not any(value.requires_grad for value in result.metrics)


def test_no_grad_computes_no_gradient():
    fields = batch()
    with torch.no_grad():
        result = policy_loss(
            fields["policy"].requires_grad_(),
            fields["behaviour"],
            fields["advantage"],
            fields["mask"],
            clip=CLIP,
            aggregation=Aggregation("token-sum"),
            teacher=Teacher(fields["teacher"], 0.1),
            impl="triton",
        )
    assert not result.loss.requires_grad
    assert result.loss.isfinite()


def test_an_entropy_coefficient_of_zero_only_measures():
    ours = run(batch(), "triton", entropy_coefficient=0.0)
    assert ours["entropy gradient"].numel() == 0
    assert ours["entropy"] > 0


def test_the_op_is_registered_so_that_compile_and_fake_tensors_work():
    fields = batch(rows=2, tokens=5)
    fields["mask"], fields["teacher"] = torch.ones_like(fields["mask"]), torch.zeros_like(fields["teacher"])
    policy = fields["policy"].nan_to_num(-1, -1, -1).requires_grad_()
    row_weight_B = torch.ones(2, device=DEVICE)
    arguments = (policy, fields["behaviour"].nan_to_num(-1, -1, -1), fields["advantage"], fields["mask"], row_weight_B)
    torch.library.opcheck(
        kernel.policy_loss_op, (*arguments, *[None] * 5, 0.2, 0.28, 3.0, 0.1, 1.0, "power", "", 0.0, 0.0, True)
    )

    def loss(policy):
        return policy_loss(
            policy, *arguments[1:4], clip=CLIP, aggregation=Aggregation("token-mean"), impl="triton"
        ).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (expected,), (ours,) = torch.autograd.grad(loss(policy), policy), torch.autograd.grad(compiled(policy), policy)
    assert torch.equal(ours, expected)


def test_a_second_derivative_is_refused():
    fields = batch()
    policy = fields["policy"].requires_grad_()
    arguments = (policy, fields["behaviour"], fields["advantage"], fields["mask"])
    result = policy_loss(*arguments, clip=CLIP, aggregation=Aggregation("token-sum"), impl="triton")
    with pytest.raises(
        RuntimeError,
        match=r"policy_loss: create_graph=True: the kernel has a first derivative only. Use impl='reference'",
    ):
        torch.autograd.grad(result.loss, policy, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: a batch of 70,000 rows is beyond the interpreter")
def test_more_rows_than_a_grid_axis_holds():
    fields = batch(rows=70_000, tokens=64)
    check(fields)
