"""How much does the policy loss cost from log-probabilities: loss, gradient and metrics in one launch or in many?

    python bench/policy_loss.py [--smoke] [--out DIR] [--minutes 9]

Work is the least possible traffic: 4 B policy + 4 B behaviour + 1 B mask + 4 B gradient per token.
"""

import harness

arguments = harness.options(__doc__ or "")

import torch  # noqa: E402  # after `options`, which chooses the interpreter

from hapo_kernels.dispatch import Impl  # noqa: E402
from hapo_kernels.policy_loss import Aggregation, Clip, Teacher, policy_loss  # noqa: E402
from harness import Contender, Report, compare  # noqa: E402

CLIP = Clip(0.2, 0.28, 3.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 130)] if arguments.smoke else [(64, 16384), (256, 4096), (1024, 8192), (8, 65536)]
REPEATS = 2 if arguments.smoke else 60


def inputs(rows: int, tokens: int) -> dict:
    generator = torch.Generator(DEVICE).manual_seed(0)
    random = {"generator": generator, "device": DEVICE}
    policy = -torch.rand(rows, tokens, **random) * 3
    return {
        "policy": policy,
        "behaviour": policy + 0.3 * torch.randn(rows, tokens, **random),
        "advantage": torch.randn(rows, **random),
        "mask": torch.arange(tokens, device=DEVICE) < torch.randint(tokens // 2, tokens, (rows, 1), **random),
        "teacher": torch.zeros(rows, dtype=torch.bool, device=DEVICE),
    }


def result(loss: torch.Tensor, policy: torch.Tensor) -> dict:
    return {"gradient": torch.autograd.grad(loss, policy)[0], "loss": loss.detach()}


def ours(batch: dict, impl: Impl, aggregation: Aggregation, with_teacher: bool = True):
    policy = batch["policy"].clone().requires_grad_()
    teacher = Teacher(batch["teacher"], 0.1) if with_teacher else None

    def call() -> dict:
        tokens = (batch[name] for name in ("behaviour", "advantage", "mask"))
        output = policy_loss(policy, *tokens, clip=CLIP, aggregation=aggregation, teacher=teacher, impl=impl)
        return result(output.loss, policy)

    return call


def compiled(batch: dict, aggregation: Aggregation):
    policy = batch["policy"].clone().requires_grad_()

    def loss(policy):
        tokens = (batch[name] for name in ("behaviour", "advantage", "mask"))
        return policy_loss(policy, *tokens, clip=CLIP, aggregation=aggregation, impl="reference").loss

    fast = torch.compile(loss, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    return lambda: result(fast(policy), policy)


def verl_vanilla(batch: dict, aggregation: Aggregation):
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import FSDPActorConfig

    clips = {"clip_ratio_low": CLIP.low, "clip_ratio_high": CLIP.high, "clip_ratio_c": CLIP.dual}
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **clips)
    config.global_batch_info.update(batch_num_tokens=aggregation.batch_num_tokens, dp_size=1)
    policy = batch["policy"].clone().requires_grad_()
    advantage_BT = batch["advantage"][:, None] * batch["mask"]  # the (B, T) tensor that verl ships

    def call() -> dict:
        loss, _ = compute_policy_loss_vanilla(  # pyright: ignore[reportCallIssue]
            batch["behaviour"], policy, advantage_BT, batch["mask"], "token-mean", config
        )
        return result(loss, policy)

    return call


def measure(report: Report, rows: int, tokens: int) -> None:
    batch = inputs(rows, tokens)
    how = Aggregation("token-mean", batch_num_tokens=int(batch["mask"].sum()))
    exact = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    found = compare(
        [
            Contender("hapo policy_loss, triton", lambda: ours(batch, "triton", how), ours=True),
            Contender("hapo policy_loss, reference", lambda: ours(batch, "reference", how, with_teacher=False)),
            Contender("torch.compile of the reference", lambda: compiled(batch, how)),
            Contender("verl compute_policy_loss_vanilla", lambda: verl_vanilla(batch, how)),
        ],
        exact=ours(exact, "reference", how),
        baseline="hapo policy_loss, reference",
        repeats=REPEATS,
        budget_s=4,
        arguments=arguments,
    )
    report.case(
        f"policy_loss forward + backward, B = {rows}, T = {tokens}, fp32, no teacher rows",
        found,
        work=13.0 * rows * tokens,
        unit="GB/s",
        baseline="verl compute_policy_loss_vanilla",
    )


report = Report("policy_loss", arguments)
for shape in SHAPES:
    if harness.time.monotonic() > arguments.deadline:
        report.say(f"\n{shape} and later: not measured, the time is up")
        break
    measure(report, *shape)
