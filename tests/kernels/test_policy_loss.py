"""The policy loss: the same bits as verl for on-policy rows, LUFFY's shaping for teacher rows, one aggregation."""

import math

import pytest
import torch

from hapo_kernels.policy_loss import Aggregation, Clip, EntropyBonus, KLPenalty, Teacher, policy_loss
from hapo_kernels.policy_loss.reference import aggregate, shaped
from hapo_kernels.policy_loss.terms import AGGREGATION_MODES, KL_KINDS

CLIP = Clip(low=0.2, high=0.28, dual=3.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GLOBAL = {"dp_size": 2, "batch_num_tokens": 4321, "global_batch_size": 37, "loss_scale_factor": 50}


def batch(rows=6, tokens=33, seed=0, dtype=torch.float32):
    """A batch with ratios on both sides of every clip edge, prefix masks of every length from 0 up, and one full row."""
    generator = torch.Generator().manual_seed(seed)
    policy = (torch.randn(rows, tokens, generator=generator, dtype=dtype) - 1).requires_grad_()
    behaviour = policy.detach() + 0.7 * torch.randn(rows, tokens, generator=generator, dtype=dtype)
    advantage = torch.randn(rows, generator=generator, dtype=dtype)
    length = torch.linspace(0, tokens, rows).long()
    return policy, behaviour, advantage, torch.arange(tokens) < length[:, None]


def loss_and_gradient(policy, *args, **kwargs):
    result = policy_loss(policy, *args, **{"clip": CLIP, "aggregation": Aggregation("token-mean"), **kwargs})
    return result, torch.autograd.grad(result.loss, policy)[0]


def verl():
    return pytest.importorskip("verl.trainer.ppo.core_algos")


def verl_actor_config(aggregation_info):
    config = pytest.importorskip("verl.workers.config").FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=CLIP.low,
        clip_ratio_high=CLIP.high,
        clip_ratio_c=CLIP.dual,
    )
    config.global_batch_info.update(aggregation_info)
    return config


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("no_teacher", ["none", "all rows false"])
def test_without_teacher_rows_loss_gradient_and_metrics_equal_verls_vanilla_loss(mode, info, weighted, no_teacher):
    policy, behaviour, advantage, mask = batch()
    weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(9)) if weighted else None
    config = verl_actor_config(info)
    advantage_BT = advantage[:, None].expand_as(mask).contiguous()
    expected, metrics = verl().compute_policy_loss_vanilla(behaviour, policy, advantage_BT, mask, mode, config, weight)
    expected_gradient = torch.autograd.grad(expected, policy)[0]
    for given in (advantage, advantage_BT):
        result, gradient = loss_and_gradient(
            policy,
            behaviour,
            given,
            mask,
            aggregation=Aggregation(mode, **config.global_batch_info),
            importance_weight_BT=weight,
            teacher=None if no_teacher == "none" else Teacher(torch.zeros(len(mask), dtype=torch.bool), 0.1),
        )
        assert torch.equal(result.loss, expected)
        assert torch.equal(gradient, expected_gradient)
        ours = result.metrics
        assert ours.on_policy_tokens == mask.sum()
        assert torch.equal(ours.on_policy_loss, expected.detach())
        assert (ours.clipped_tokens / ours.on_policy_tokens).item() == pytest.approx(
            metrics["actor/pg_clipfrac"], rel=1e-6
        )
        assert (ours.dual_clipped_tokens / ours.on_policy_tokens).item() == pytest.approx(
            metrics["actor/pg_clipfrac_lower"], rel=1e-6
        )
        assert (ours.log_ratio_sum / ours.on_policy_tokens).item() == pytest.approx(metrics["actor/ppo_kl"], rel=1e-5)
        assert 0 < ours.dual_clipped_tokens < ours.clipped_tokens < ours.on_policy_tokens


@pytest.mark.parametrize("kind", [kind + plus for kind in KL_KINDS for plus in ("", "+")])
def test_kl_and_entropy_terms_equal_those_of_verls_ppo_loss(kind):
    policy, behaviour, advantage, mask = batch()
    generator = torch.Generator().manual_seed(1)
    reference = policy.detach() + torch.randn(mask.shape, generator=generator)
    entropy = torch.rand(mask.shape, generator=generator).requires_grad_()
    config, algos = verl_actor_config(GLOBAL), verl()
    advantage_BT = advantage[:, None].expand_as(mask).contiguous()
    expected, _ = algos.compute_policy_loss_vanilla(behaviour, policy, advantage_BT, mask, "token-mean", config)
    entropy_loss = algos.agg_loss(entropy, mask, "token-mean", **config.global_batch_info)
    kl_loss = algos.agg_loss(algos.kl_penalty(policy, reference, kind), mask, "token-mean", **config.global_batch_info)
    expected = expected - 0.01 * entropy_loss + kl_loss * 0.05
    result = policy_loss(
        policy,
        behaviour,
        advantage,
        mask,
        clip=CLIP,
        aggregation=Aggregation("token-mean", **config.global_batch_info),
        kl=KLPenalty(reference, kind, 0.05),
        entropy=EntropyBonus(entropy, 0.01),
    )
    assert torch.equal(result.loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, (policy, entropy)),
        torch.autograd.grad(expected, (policy, entropy)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(result.metrics.kl_loss, kl_loss.detach())
    assert torch.equal(result.metrics.entropy, entropy_loss.detach())


def test_two_rows_by_hand():
    # On-policy row, A = 2: ρ = 2 is clipped to 1.28 (loss -2.56, no gradient), ρ = 1 is not (loss -2, gradient -2).
    # Teacher row, A = 3, λ = .1: q = .1 gives f = 1/2, ∂f = .25; q = 1 gives f = 1/1.1, ∂f = .1/1.21.
    policy = torch.tensor(
        [[math.log(0.5), math.log(0.3)], [math.log(0.1), 0.0]], dtype=torch.float64, requires_grad=True
    )
    behaviour = torch.tensor([[math.log(0.25), math.log(0.3)], [math.nan, math.nan]], dtype=torch.float64)
    result, gradient = loss_and_gradient(
        policy,
        behaviour,
        torch.tensor([2.0, 3.0], dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.bool),
        teacher=Teacher(torch.tensor([False, True]), shaping=0.1),
    )
    assert result.loss.item() == pytest.approx((-2.56 - 2 - 1.5 - 3 / 1.1) / 4)
    torch.testing.assert_close(gradient, torch.tensor([[0, -2], [-0.75, -0.3 / 1.21]], dtype=torch.float64) / 4)
    metrics = [round(value.item(), 9) for value in result.metrics]
    assert metrics == [
        round((-2.56 - 2) / 4, 9),  # on_policy_loss
        round((-1.5 - 3 / 1.1) / 4, 9),  # teacher_loss
        0.0,  # kl_loss
        0.0,  # entropy
        2.0,  # on_policy_tokens
        2.0,  # teacher_tokens
        1.0,  # clipped_tokens
        0.0,  # dual_clipped_tokens
        round(-math.log(2), 9),  # log_ratio_sum
        1.1,  # teacher_probability_sum
    ]


@pytest.mark.parametrize(("probability", "slope"), [(0.1, 0.25), (1.0, 0.0826), (0.001, 0.0098)])
def test_the_slope_of_the_shaping(probability, slope):
    log_q = torch.tensor(math.log(probability), dtype=torch.float64, requires_grad=True)
    value = shaped(log_q, Teacher(torch.ones(1, dtype=torch.bool), 0.1))
    assert value.item() == pytest.approx(probability / (probability + 0.1))
    assert torch.autograd.grad(value, log_q)[0].item() == pytest.approx(slope, abs=5e-5)


def test_known_teacher_probabilities_are_the_denominator_of_the_ratio():
    policy, behaviour, advantage, mask = batch(dtype=torch.float64)
    teacher_logp = torch.full_like(policy, math.log(0.25)).detach()
    teacher_B = torch.ones(len(mask), dtype=torch.bool)
    aggregation = Aggregation("token-sum")
    result, gradient = loss_and_gradient(
        policy, behaviour, advantage, mask, teacher=Teacher(teacher_B, 0.1, teacher_logp), aggregation=aggregation
    )
    q = policy.exp() / 0.25
    expected = (-advantage[:, None] * q / (q + 0.1) * mask).sum()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, policy)[0])


def test_the_loss_of_luffy():
    """arXiv 2504.14945: -A ρ without a clip on the policy's rows, -A π/(π+.1) on the teacher's, summed, over the length."""
    policy, behaviour, advantage, mask = batch(dtype=torch.float64)
    teacher_B = torch.arange(len(mask)) % 2 == 1
    result, gradient = loss_and_gradient(
        policy,
        behaviour,
        advantage,
        mask,
        clip=Clip(math.inf, math.inf, math.inf),
        teacher=Teacher(teacher_B, 0.1),
        aggregation=Aggregation("seq-mean-token-sum-norm", global_batch_size=1),
    )
    ratio, probability = (policy - behaviour).exp(), policy.exp()
    weight = torch.where(teacher_B[:, None], probability / (probability + 0.1), ratio)
    expected = (-advantage[:, None] * weight)[mask].sum() / mask.shape[1]
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, policy)[0])


def test_teacher_rows_take_no_ratio_no_clip_no_weight_and_no_kl():
    policy, behaviour, advantage, mask = batch()
    teacher = Teacher(torch.ones(len(mask), dtype=torch.bool), 0.1)
    plain = loss_and_gradient(policy, behaviour, advantage, mask, teacher=teacher)
    changed = loss_and_gradient(
        policy,
        torch.full_like(behaviour, -math.inf),
        advantage,
        mask,
        teacher=teacher,
        clip=Clip(0.0, 0.0, 1.1),
        importance_weight_BT=torch.full_like(behaviour, math.nan),
        kl=KLPenalty(torch.full_like(behaviour, math.nan), "k3", 1.0),
    )
    assert torch.equal(plain[0].loss, changed[0].loss)
    assert torch.equal(plain[1], changed[1])
    assert plain[0].metrics.on_policy_tokens == changed[0].metrics.log_ratio_sum == 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_without_old_log_probabilities_the_ratio_is_1_and_its_gradient_that_of_the_log_probability(impl):
    policy, _, advantage, mask = (tensor.detach().to(DEVICE) for tensor in batch())
    result, gradient = loss_and_gradient(
        policy.requires_grad_(),
        None,
        advantage,
        mask,
        impl=impl,
        aggregation=Aggregation("token-sum"),
        clip=Clip(0.0, 0.0, 3.0),
    )
    expected = torch.where(mask, -advantage[:, None], 0.0)
    torch.testing.assert_close(result.loss, expected.sum())
    torch.testing.assert_close(gradient, expected)
    assert result.metrics.clipped_tokens == result.metrics.log_ratio_sum == 0


def test_infinite_clips_give_the_plain_importance_ratio():
    policy, behaviour, advantage, mask = batch(dtype=torch.float64)
    advantage[0] = 0
    unclipped = Clip(math.inf, math.inf, math.inf)
    result, gradient = loss_and_gradient(
        policy, behaviour, advantage, mask, clip=unclipped, aggregation=Aggregation("token-sum")
    )
    expected = (-advantage[:, None] * (policy - behaviour).exp() * mask).sum()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, policy)[0])
    assert result.metrics.clipped_tokens == result.metrics.dual_clipped_tokens == 0


def everything(seed=0, dtype=torch.float64):
    """A batch with all terms on, as one dict of tensors from which rows and tokens can be selected."""
    policy, behaviour, advantage, mask = batch(rows=8, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    noise = torch.randn(3, *mask.shape, generator=generator, dtype=dtype)
    return {
        "policy": policy.detach(),
        "behaviour": behaviour,
        "advantage": advantage,
        "mask": mask,
        "teacher": torch.arange(8) % 3 == 1,
        "teacher_logp": -noise[0].abs(),
        "weight": noise[1].abs(),
        "reference": policy.detach() + noise[1],
        "entropy": noise[2].abs(),
    }


def run(fields, aggregation):
    policy = fields["policy"].clone().requires_grad_()
    result, gradient = loss_and_gradient(
        policy,
        fields["behaviour"],
        fields["advantage"],
        fields["mask"],
        aggregation=aggregation,
        teacher=Teacher(fields["teacher"], 0.1, fields["teacher_logp"]),
        importance_weight_BT=fields["weight"],
        kl=KLPenalty(fields["reference"], "k3", 0.05),
        entropy=EntropyBonus(fields["entropy"], 0.01),
    )
    return result, gradient


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("cut", [[8], [3, 5], [1, 1, 1, 1, 1, 1, 1, 1], [0, 8]])
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batches(mode, cut):
    fields, aggregation = everything(), Aggregation(mode, **GLOBAL)
    whole, whole_gradient = run(fields, aggregation)
    pieces = [
        run(dict(zip(fields, piece, strict=True)), aggregation)
        for piece in zip(*(tensor.split(cut) for tensor in fields.values()), strict=True)
    ]
    torch.testing.assert_close(sum(result.loss for result, _ in pieces), whole.loss)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in pieces]), whole_gradient)
    for name, value in whole.metrics._asdict().items():
        torch.testing.assert_close(sum(getattr(result.metrics, name) for result, _ in pieces), value, msg=name)
    torch.testing.assert_close(
        whole.metrics.on_policy_loss
        + whole.metrics.teacher_loss
        + 0.05 * whole.metrics.kl_loss
        - 0.01 * whole.metrics.entropy,
        whole.loss.detach(),
    )


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_rows_may_come_in_any_order_and_with_any_padding(mode):
    fields, aggregation = everything(), Aggregation(mode, **GLOBAL)
    whole, whole_gradient = run(fields, aggregation)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    shuffled, gradient = run({name: tensor[order] for name, tensor in fields.items()}, aggregation)
    torch.testing.assert_close(shuffled.loss, whole.loss)
    assert torch.equal(gradient, whole_gradient[order])
    padding = {torch.bool: False}
    padded, gradient = run(
        {
            name: torch.nn.functional.pad(tensor, (0, 17), value=padding.get(tensor.dtype, math.nan))
            if tensor.ndim == 2
            else tensor
            for name, tensor in fields.items()
        },
        aggregation,
    )
    torch.testing.assert_close(padded.loss, whole.loss)
    # It is not bit for bit: torch uses another exp after the vectorised part of a row.
    torch.testing.assert_close(gradient[:, :33], whole_gradient, rtol=1e-14, atol=0)
    assert (gradient[:, 33:] == 0).all()


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_values_at_masked_positions_change_nothing(mode, garbage):
    fields, aggregation = everything(), Aggregation(mode, **GLOBAL)
    clean, clean_gradient = run(fields, aggregation)
    dirty = {
        name: tensor.masked_fill(~fields["mask"], garbage) if tensor.ndim == 2 and name != "mask" else tensor
        for name, tensor in fields.items()
    }
    dirty["advantage"] = fields["advantage"].masked_fill(~fields["mask"].any(1), garbage)
    result, gradient = run(dirty, aggregation)
    assert torch.equal(result.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result.metrics, clean.metrics, strict=True))


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["counted here", "a number", "a tensor"])
def test_a_batch_without_active_tokens_gives_zero(mode, count):
    """This also holds if the whole global batch has no active token, since all are rejected or padding."""
    policy, behaviour, advantage, mask = batch()
    nothing = Aggregation(mode, batch_num_tokens=count, global_batch_size=count)
    result, gradient = loss_and_gradient(policy, behaviour, advantage, torch.zeros_like(mask), aggregation=nothing)
    assert result.loss == 0
    assert (gradient == 0).all()
    assert all(value == 0 for value in result.metrics)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
def test_aggregation_equals_verls(mode, info):
    _, behaviour, _, mask = batch()
    assert torch.equal(
        aggregate(behaviour, mask, Aggregation(mode, **info)), verl().agg_loss(behaviour, mask, mode, **info)
    )


def test_probabilities_at_the_ends_stay_finite():
    policy = torch.tensor([[-math.inf, -1e4, 0.0, -1e-30]], requires_grad=True)
    on_policy = {"behaviour_logp_BT": torch.tensor([[-1.0, -math.inf, -30.0, 0.0]])}
    for teacher_row in (False, True):
        result, gradient = loss_and_gradient(
            policy,
            *on_policy.values(),
            torch.tensor([-1.5]),
            torch.ones(1, 4),
            teacher=Teacher(torch.tensor([teacher_row]), 0.1),
        )
        assert result.loss.isfinite()
        assert gradient.isfinite().all()


def test_half_precision_is_computed_in_fp32():
    policy, behaviour, advantage, mask = batch()
    half = policy.detach().bfloat16().requires_grad_()
    behaviour = behaviour.bfloat16()
    result, gradient = loss_and_gradient(half, behaviour, advantage.bfloat16(), mask)
    full, full_gradient = loss_and_gradient(
        half.detach().float().requires_grad_(), behaviour.float(), advantage.bfloat16().float(), mask
    )
    assert torch.equal(result.loss, full.loss)
    assert torch.equal(gradient, full_gradient.bfloat16())


def test_an_entropy_coefficient_of_zero_only_measures():
    policy, behaviour, advantage, mask = batch()
    entropy = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with_entropy, gradient = loss_and_gradient(policy, behaviour, advantage, mask, entropy=EntropyBonus(entropy, 0.0))
    without, plain_gradient = loss_and_gradient(policy, behaviour, advantage, mask)
    assert torch.equal(with_entropy.loss, without.loss)
    assert torch.equal(gradient, plain_gradient)
    torch.testing.assert_close(with_entropy.metrics.entropy, (entropy[mask].mean()).detach())
    assert torch.autograd.grad(with_entropy.loss, entropy, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(-0.1, 0.2, 3), r"clip.low=-0.1: a clip range is at least 0"),
        (lambda: Clip(0.1, 0.2, 1.0), r"clip.dual=1.0: the dual clip is greater than 1"),
        (lambda: Teacher(torch.zeros(1).bool(), 0.0), r"teacher.shaping=0.0: λ of q/\(q\+λ\) is positive"),
        (lambda: KLPenalty(torch.zeros(1), "k4", 0.1), r"kl.kind='k4': no such estimator. Use one of k1"),
        (lambda: Aggregation("mean"), r"aggregation.mode='mean': no such mode. Use one of token-mean"),
        (lambda: Aggregation("token-mean", dp_size=2), r"aggregation.batch_num_tokens=None with dp_size=2"),
        (lambda: Aggregation("seq-mean-token-sum", dp_size=2), r"aggregation.global_batch_size=None with dp_size=2"),
        (lambda: loss_and_gradient(*batch()[:3], torch.ones(6, 32)), r"mask_BT of shape \(6, 32\): one value a token"),
        (
            lambda: loss_and_gradient(*batch()[:2], torch.ones(5), batch()[3]),
            r"advantage of shape \(5,\): one a row or one a token",
        ),
        (lambda: loss_and_gradient(*batch(), teacher=Teacher(torch.zeros(6), 0.1)), r"teacher.row_B: torch.float32"),
        (lambda: loss_and_gradient(torch.zeros(3), *batch()[1:]), r"policy_logp_BT: torch.float32 of shape \(3,\)"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
