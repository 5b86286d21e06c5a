"""How much does normalisation within groups cost on the GPU: for rows, and for groups of tokens or steps?

    python bench/group_norm.py [--smoke] [--out DIR] [--minutes 9]

Work is the least possible traffic: one fp32 read and one fp32 write per score. The cases cover different group sizes:
rows of a rollout batch (groups of 8), token-level groups of mixed size, and the whole batch as one group (whitening).
"""

import harness

arguments = harness.options(__doc__ or "")

import torch  # noqa: E402  # after `options`, which chooses the interpreter

from hapo_kernels.segment_norm import segment_norm  # noqa: E402
from harness import Contender, Report, compare  # noqa: E402
from peers import verl_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 2 if arguments.smoke else 60


def sizes(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "groups of 8 rows":
        return torch.full((8 if arguments.smoke else 8192,), 8)
    if kind == "token-level groups of 1 to 16k":
        return torch.randint(
            1, 40 if arguments.smoke else 16_385, (8 if arguments.smoke else 2048,), generator=generator
        )
    return torch.tensor([3000 if arguments.smoke else 2**24])


def scattered(score, segment, groups: int, eps: float = 1e-6):
    """The usual implementation in PyTorch: two scatter-adds and two gathers."""
    count = torch.bincount(segment, minlength=groups).to(score.dtype)
    mean = score.new_zeros(groups).index_add_(0, segment, score) / count.clamp(min=1)
    centred = score - mean[segment]
    square = score.new_zeros(groups).index_add_(0, segment, centred * centred)
    return centred / ((square / (count - 1).clamp(min=1)).sqrt()[segment] + eps)


def verl_vectorized(score, segment):
    verl_kernels()
    from verl.utils.groupwise import group_mean_std

    def call():
        mean, std, _ = group_mean_std(score, segment, eps=0.0, device=score.device)
        return {"advantage": (score - mean[segment]) / (std[segment] + 1e-6)}

    return call


def measure(report: Report, kind: str) -> None:
    size = sizes(kind)
    groups = len(size)
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)]).to(DEVICE)
    segment = torch.repeat_interleave(size).to(DEVICE)
    score = torch.randn(int(size.sum()), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    fast = torch.compile(scattered, backend="inductor" if DEVICE == "cuda" else "aot_eager")

    def triton(**given):
        return lambda: {"advantage": segment_norm(score, scale_by_std=True, impl="triton", **given)}

    def plain(function):
        return lambda: {"advantage": function(score, segment, groups)}

    found = compare(
        [
            Contender("hapo segment_norm, by bounds", lambda: triton(offset_S1=offset), ours=True),
            Contender("hapo segment_norm, by ids", lambda: triton(segment_B=segment), ours=True),
            Contender("torch index_add", lambda: plain(scattered)),
            Contender("torch.compile of index_add", lambda: plain(fast)),
            Contender("verl group_mean_std", lambda: verl_vectorized(score, segment)),
        ],
        exact=lambda: {"advantage": segment_norm(score.double(), segment, scale_by_std=True, impl="reference")},
        baseline="torch index_add",
        repeats=REPEATS,
        budget_s=4,
        arguments=arguments,
    )
    title = f"{kind}: {groups} groups, {len(score)} scores, fp32"
    report.case(title, found, work=8.0 * len(score), unit="GB/s", baseline="torch index_add")


report = Report("group_norm", arguments)
for kind in ("token-level groups of 1 to 16k", "groups of 8 rows", "one group, whitening"):
    if harness.time.monotonic() > arguments.deadline:
        report.say(f"\n{kind} and later: not measured, the time is up")
        break
    measure(report, kind)
