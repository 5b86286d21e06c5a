"""How much does the policy loss cost from existing logits: forward only, and with ∂logits?

    python bench/logits.py [--smoke] [--out DIR] [--minutes 9]

Work is the least possible traffic: bf16 logits read once, ∂logits written once. The error is that of ∂logits against
fp64, on a sample of tokens. Random rows have flat distributions and random labels; LLM-like rows have a favourite
token, and labels drawn from the row.
"""

import harness

arguments = harness.options(__doc__ or "")

import torch  # noqa: E402  # after `options`, which chooses the interpreter

from hapo_kernels.policy_head import policy_loss_from_logits  # noqa: E402
from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss  # noqa: E402
from harness import Contender, Report, compare, confidence, drawn  # noqa: E402

CLIP = Clip(0.2, 0.28, float("inf"))  # no dual clip: not every peer has one
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
LLM_LIKE = "LLM-like"
CASES = [(8192, 151936, "random"), (8192, 151936, LLM_LIKE), (4096, 128256, "random"), (16384, 151936, "random")]
if arguments.smoke:
    CASES = [(8, 300, "random"), (8, 300, LLM_LIKE)]
ROWS, SAMPLE = 8, 64
EAGER = "torch eager"


class Batch:
    def __init__(self, tokens: int, V: int, rows: str):
        random = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
        shape = (ROWS, tokens // ROWS)
        self.logits = torch.randn(*shape, V, **random).to(DTYPE)
        self.label = torch.randint(0, V, shape, **random)
        if rows == LLM_LIKE:
            self.logits.scatter_add_(2, self.label[..., None], confidence(shape, **random)[..., None].to(DTYPE))
            labels = [drawn(logits, random["generator"]) for logits in self.logits.flatten(0, 1).split(1024)]
            self.label = torch.cat(labels).view(shape)
        self.mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
        self.advantage = torch.randn(ROWS, **random)
        self.how = Aggregation("token-mean", batch_num_tokens=tokens)
        self.sample = torch.linspace(0, tokens - 1, min(SAMPLE, tokens), device=DEVICE).long()
        some_NV = self.logits.flatten(0, 1)
        logp = torch.cat(
            [
                eager_logp(piece, label)
                for piece, label in zip(some_NV.split(1024), self.label.flatten().split(1024), strict=True)
            ]
        )
        self.behaviour = logp.view(shape) + 0.2 * torch.randn(shape, **random)

    def terms(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.behaviour, self.advantage, self.mask

    def outputs(self, loss: torch.Tensor, logits: torch.Tensor) -> dict:
        (gradient,) = torch.autograd.grad(loss, logits)
        return {"dlogits": gradient.flatten(0, 1)[self.sample]}

    def exact(self) -> dict:
        logits = self.logits.flatten(0, 1)[self.sample].double().requires_grad_()
        logp = eager_logp(logits, self.label.flatten()[self.sample])[:, None]
        row, one = self.sample // self.mask.shape[1], torch.ones_like(self.sample, dtype=torch.bool)[:, None]
        behaviour = self.behaviour.flatten()[self.sample, None].double()
        loss = policy_loss(
            logp, behaviour, self.advantage[row].double(), one, clip=CLIP, aggregation=self.how, impl="reference"
        ).loss
        return {"dlogits": torch.autograd.grad(loss, logits)[0]}


def eager_logp(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, label[..., None])[..., 0] - logits.logsumexp(-1)


def from_logp(batch: Batch, logp_of):
    def call() -> dict:
        logits = batch.logits.detach().requires_grad_()
        logp_BT = logp_of(logits, batch.label)
        loss = policy_loss(logp_BT, *batch.terms(), clip=CLIP, aggregation=batch.how, impl="reference").loss
        return batch.outputs(loss, logits)

    return call


def hapo(batch: Batch):
    def call() -> dict:
        logits = batch.logits.detach().requires_grad_()
        result = policy_loss_from_logits(
            logits, batch.label, *batch.terms(), clip=CLIP, aggregation=batch.how, impl="triton"
        )
        return batch.outputs(result.loss, logits)

    return call


def liger(batch: Batch):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    # It needs one more position than there are labels.
    padded = torch.cat([batch.logits, batch.logits[:, :1]], 1)
    settings = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP.low, "eps_high": CLIP.high, "inplace": False}

    def call() -> dict:
        logits = padded.detach().requires_grad_()
        mask = batch.mask.float()
        loss = triton_grpo_loss(
            logits, batch.behaviour, None, batch.label, batch.advantage, mask, loss_type="bnpo", reduce=True, **settings
        )[0]
        (gradient,) = torch.autograd.grad(loss, logits)
        return {"dlogits": gradient[:, :-1].flatten(0, 1)[batch.sample]}

    return call


def fla(batch: Batch):
    """Computes another loss: one update per batch, so that the ratio is 1 and nothing is clipped. Same traffic."""
    if not CUDA:
        raise RuntimeError("needs a GPU")
    from fla.modules.grpo.ops import fused_grpo_loss

    padded = torch.cat([batch.logits, batch.logits[:, :1]], 1)

    def call() -> dict:
        logits = padded.detach().requires_grad_()
        loss = fused_grpo_loss(logits, batch.behaviour, batch.label, batch.advantage, 0.0, batch.mask.int())
        torch.autograd.grad(loss.mean(), logits)
        return {}

    return call


def flash_attention(batch: Batch):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def logp_of(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return -cross_entropy_loss(logits.flatten(0, 1), label.flatten())[0].view(label.shape)

    return from_logp(batch, logp_of)


def measure(report: Report, tokens: int, V: int, rows: str) -> None:
    batch = Batch(tokens, V, rows)
    fast = torch.compile(eager_logp, backend="inductor" if CUDA else "aot_eager")
    found = compare(
        [
            Contender("hapo policy_loss_from_logits", lambda: hapo(batch), ours=True),
            Contender(EAGER, lambda: from_logp(batch, eager_logp)),
            Contender("torch.compile", lambda: from_logp(batch, fast)),
            Contender("Liger Triton GRPO loss", lambda: liger(batch)),
            Contender("fla GRPO loss, no ratio: a ceiling", lambda: fla(batch)),
            Contender("flash-attn cross entropy", lambda: flash_attention(batch)),
        ],
        exact=batch.exact,
        baseline=EAGER,
        repeats=2 if arguments.smoke else 30,
        budget_s=4,
        arguments=arguments,
    )
    title = f"policy loss from logits, forward + backward: T = {tokens}, V = {V}, {DTYPE}, {rows} rows"
    report.case(title, found, work=2.0 * batch.logits.nbytes, unit="GB/s", baseline=EAGER)


report = Report("logits", arguments)
for case in CASES:
    if harness.time.monotonic() > arguments.deadline:
        report.say(f"\n{case} and later: not measured, the time is up")
        break
    measure(report, *case)
