"""How much does the policy loss cost from hidden states, compared with every head that can be installed?

    python bench/head.py [--smoke] [--part headline|sweep] [--out DIR] [--minutes 9]

Work is 6 T' H V flops (4 T' H V with a frozen weight, 2 T' H V for log-probabilities alone), where T' is the number of
tokens that train. It is the same for every contender, whatever that computes. All get bf16 hidden states and weight and
compute the same loss, except QuACK: its loss is the summed cross entropy, which needs no loss of the caller, so its
time is a ceiling. Each peer gets the mask in its own form. Random rows have flat distributions and random labels;
LLM-like rows have a favourite token, and labels drawn from the row. The error is that of ∂hidden against fp64, on a
sample of tokens; the first table compares all gradients in full.
"""

import itertools
from dataclasses import dataclass

import harness

PARTS = ("headline", "sweep")
arguments = harness.options(
    __doc__ or "",
    lambda parser: parser.add_argument("--part", choices=PARTS, help="default: both, the headline shapes first"),
)

import torch  # noqa: E402  # after `options`, which chooses the interpreter

from hapo_kernels.linear_logprob import linear_logprob  # noqa: E402
from hapo_kernels.policy_head import policy_head  # noqa: E402
from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss  # noqa: E402
from harness import Contender, Report, compare, confidence, drawn  # noqa: E402
from peers import trl_chunked_logprob, verl_kernels  # noqa: E402

CLIP = Clip(0.2, 0.28, float("inf"))  # no dual clip: not every peer has one
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
COLUMNS = 32768  # of TRL's tiles: what its trainers take
SAMPLE = 64  # number of tokens whose gradient is checked in a timed case
LLM_LIKE = "LLM-like"
FLOPS = {"train": 6, "frozen weight": 4, "log-probabilities": 2}


@dataclass(frozen=True)
class Case:
    T: int
    H: int
    V: int
    share: float = 1.0  # of tokens that train
    task: str = "train"
    rows: str = "random"
    sequences: int = 8

    def __str__(self) -> str:
        shape = f"T = {self.T}, H = {self.H}, V = {self.V}, {DTYPE}"
        return f"{self.task}: {shape}, B = {self.sequences}, {self.share:.4g} of tokens train, {self.rows} rows"


GATE = Case(512, 512, 8192) if CUDA else Case(8, 24, 300, sequences=4)
HEADLINES = [
    Case(8192, 4096, 151936),
    Case(8192, 4096, 151936, 1 / 8),
    Case(8192, 4096, 151936, 1.0, "log-probabilities"),
    Case(8192, 4096, 248320),
    Case(131072, 2048, 151936, sequences=1),
    Case(8192, 4096, 151936, 1.0, "frozen weight"),
    Case(8192, 4096, 151936, rows=LLM_LIKE),
    Case(8192, 4096, 151936, 0.6),
    Case(8192, 4096, 151936, 1.0, "log-probabilities", LLM_LIKE),
    Case(16384, 4096, 128256),
    Case(65536, 5120, 152064),
]
GRID = itertools.product(
    (4096, 8192, 16384, 65536), (2048, 3584, 4096, 5120), (128256, 151936, 152064, 248320), (1.0, 0.6, 0.3, 1 / 8)
)


def cases() -> list[Case]:
    smoke = {
        "headline": [Case(8, 24, 300, 0.6, rows=LLM_LIKE), Case(8, 24, 300, 1.0, "log-probabilities")],
        "sweep": [Case(8, 24, 300, 1 / 4, sequences=1)],
    }
    sweep = [Case(*point, rows=rows) for point in GRID for rows in ("random", LLM_LIKE)]
    parts = smoke if arguments.smoke else {"headline": HEADLINES, "sweep": sweep}
    headline = [GATE, *parts["headline"]]
    if arguments.part:
        return headline if arguments.part == "headline" else [x for x in parts["sweep"] if x not in headline]
    return list(dict.fromkeys([*headline, *parts["sweep"]]))


class Batch:
    def __init__(self, case: Case):
        random = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
        shape = (case.sequences, case.T // case.sequences)
        self.case = case
        self.hidden = torch.randn(*shape, case.H, **random).to(DTYPE)
        self.weight = (torch.randn(case.V, case.H, **random) / case.H**0.5).to(DTYPE)
        self.label = torch.randint(0, case.V, shape, **random)
        if case.rows == LLM_LIKE:
            # Weights have length 1, so the favourite token's logit is its confidence plus the others' noise.
            self.hidden += (confidence(shape, **random)[..., None] * self.weight[self.label]).to(DTYPE)
            chunks = self.hidden.flatten(0, 1).split(1024)
            labels = [drawn(hidden @ self.weight.T, random["generator"]) for hidden in chunks]
            self.label = torch.cat(labels).view(shape)
        self.mask = torch.rand(shape, **random) <= case.share
        self.advantage = torch.randn(case.sequences, **random)
        with torch.no_grad():
            logp = linear_logprob(
                self.hidden.flatten(0, 1), self.weight, self.label.flatten(), impl="triton" if CUDA else "reference"
            ).logp_N.view(shape)
        self.behaviour = logp + 0.2 * torch.randn(shape, **random)
        # Where a peer takes a mask it takes it so.
        self.ignoring = torch.where(self.mask, self.label, -100).flatten()
        self.active = int(self.mask.sum())  # known on the host, as a trainer knows it
        self.how = Aggregation("token-mean", batch_num_tokens=self.active)
        active = self.mask.flatten().nonzero()[:, 0]
        self.sample = (
            active if case == GATE else active[torch.linspace(0, len(active) - 1, SAMPLE, device=DEVICE).long()]
        )

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        train = self.case.task != "log-probabilities"
        weight = self.weight.detach().requires_grad_(train and self.case.task != "frozen weight")
        return self.hidden.detach().requires_grad_(train), weight

    def loss(self, logp_BT: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            logp_BT, self.behaviour, self.advantage, self.mask, clip=CLIP, aggregation=self.how, impl="reference"
        ).loss

    def outputs(self, loss_or_logp: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> dict:
        """The end of the timed call: the backward pass, or the log-probabilities."""
        if self.case.task == "log-probabilities":
            return {"logp": loss_or_logp.flatten()[self.sample]}
        wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
        gradients = torch.autograd.grad(loss_or_logp, wanted)
        found = {"dhidden": gradients[0].flatten(0, 1)[self.sample]}
        if self.case == GATE:
            found["dweight"] = gradients[1]
        return found

    def exact(self) -> dict:
        """The exact result in fp64 for the sampled tokens, computed in slices of the vocabulary."""
        hidden = self.hidden.flatten(0, 1)[self.sample].double()
        slices = [slice(start, start + 16384) for start in range(0, self.case.V, 16384)]
        logits = torch.cat([hidden @ self.weight[piece].double().T for piece in slices], 1)
        row, label = self.sample // self.mask.shape[1], self.label.flatten()[self.sample]
        logp_NV = logits.log_softmax(1)
        logp = logp_NV.gather(1, label[:, None]).requires_grad_()
        if self.case.task == "log-probabilities":
            return {"logp": logp.detach()[:, 0]}
        behaviour = self.behaviour.flatten()[self.sample, None].double()
        advantage, one = self.advantage[row].double(), torch.ones_like(label, dtype=torch.bool)[:, None]
        loss = policy_loss(logp, behaviour, advantage, one, clip=CLIP, aggregation=self.how, impl="reference").loss
        (slope,) = torch.autograd.grad(loss, logp)
        dlogits = -slope * logp_NV.exp()
        dlogits.scatter_add_(1, label[:, None], slope)
        dhidden = torch.zeros_like(hidden)
        for piece in slices:
            dhidden += dlogits[:, piece] @ self.weight[piece].double()
        found = {"dhidden": dhidden}
        if self.case == GATE:
            found["dweight"] = dlogits.T @ hidden
        return found


def from_logp(batch: Batch, head):
    """A contender that computes log-probabilities, then our loss. `head(hidden_NH, weight, label_N) -> logp_N`"""

    def call() -> dict:
        hidden, weight = batch.leaves()
        with torch.set_grad_enabled(batch.case.task != "log-probabilities"):
            logp_BT = head(hidden.flatten(0, 1), weight, batch.label.flatten()).view(batch.mask.shape)
            if batch.case.task == "log-probabilities":
                return batch.outputs(logp_BT, hidden, weight)
            return batch.outputs(batch.loss(logp_BT), hidden, weight)

    return call


def hapo_head(batch: Batch):
    def call() -> dict:
        hidden, weight = batch.leaves()
        arguments = (hidden, weight, batch.label, batch.behaviour, batch.advantage, batch.mask)
        result = policy_head(
            *arguments,
            clip=CLIP,
            aggregation=batch.how,
            active_tokens=batch.active,
            training_tokens=batch.active,  # no advantage drawn is exactly 0
            impl="triton",
        )
        logp_only = batch.case.task == "log-probabilities"
        return batch.outputs(result.logp_BT if logp_only else result.loss, hidden, weight)

    return call


def hapo_logprob(batch: Batch):
    keep = batch.mask.flatten()
    given = {"keep_N": keep, "kept_rows": batch.active}
    return from_logp(batch, lambda h, w, y: linear_logprob(h, w, y, impl="triton", **given).logp_N)


def eager_head(hidden, weight, label):
    logits = (hidden @ weight.T).float()
    return logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1)


def compiled(batch: Batch):
    return from_logp(batch, torch.compile(eager_head, backend="inductor" if CUDA else "aot_eager"))


def torch_linear_cross_entropy(batch: Batch):
    from torch.nn.functional import linear_cross_entropy
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    chunked = LinearCrossEntropyOptions()  # without it this is the eager head
    return from_logp(batch, lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", options=chunked))


def verl_torch(batch: Batch):
    verl_kernels()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return from_logp(batch, lambda h, w, y: fused(h, w, y)[0])


def verl_triton(batch: Batch):
    if not CUDA:
        raise RuntimeError("needs a GPU")
    verl_kernels()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return from_logp(batch, lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "none", None)[0])


def trl_chunked(batch: Batch):
    """As TRL's trainers call it: on a GPU masked rows are left out before, on a CPU they are computed."""
    chunked, keep = trl_chunked_logprob(), batch.mask.flatten()

    def head(hidden, weight, label):
        if not CUDA:
            return chunked.apply(hidden, weight, None, label, 1.0, COLUMNS, None, 1.0, ())[0]
        logp = chunked.apply(hidden[keep], weight, None, label[keep], 1.0, COLUMNS, None, 1.0, ())[0]
        return logp.new_zeros(len(keep)).masked_scatter(keep, logp)

    return from_logp(batch, head)


def liger_grpo(batch: Batch):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if batch.case.task != "train":
        raise RuntimeError("computes loss and both gradients, or nothing")
    oracle = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=CUDA, use_ref_model=False, epsilon_low=CLIP.low, epsilon_high=CLIP.high, loss_type="bnpo"
    )

    def call() -> dict:
        hidden, weight = batch.leaves()
        tokens = (batch.label, batch.mask.float(), batch.advantage)
        loss = oracle(hidden, weight, *tokens, old_per_token_logps=batch.behaviour)[0]
        return batch.outputs(loss, hidden, weight)

    return call


def liger_scaled_cross_entropy(batch: Batch):
    """On Hopper a CuTe kernel, which needs nvidia-cutlass-dsl; elsewhere PyTorch code like verl's."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return from_logp(batch, lambda h, w, y: -Function.apply(h, w, batch.ignoring, 1.0, -100, 1, False))


def apple_cce(batch: Batch):
    if not CUDA:
        raise RuntimeError("needs a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return from_logp(batch, lambda h, w, y: -linear_cross_entropy(h, w, batch.ignoring, reduction="none"))


def flash_attention(batch: Batch):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return from_logp(batch, lambda h, w, y: -cross_entropy_loss(h @ w.T, y)[0])


def quack(batch: Batch):
    """Computes another loss: the sum of cross entropies, with the gradient computed in the forward pass like ours."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if batch.case.task == "log-probabilities":
        raise RuntimeError("gives no log-probability of a token")

    def call() -> dict:
        hidden, weight = batch.leaves()
        loss = chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, batch.ignoring, reduction="sum")
        torch.autograd.grad(loss, [tensor for tensor in (hidden, weight) if tensor.requires_grad])
        return {}

    return call


EAGER = "torch eager"


def contenders(batch: Batch) -> list[Contender]:
    return [
        Contender("hapo policy_head", lambda: hapo_head(batch), ours=True),
        Contender("hapo linear_logprob + loss", lambda: hapo_logprob(batch), ours=True),
        Contender(EAGER, lambda: from_logp(batch, eager_head)),
        Contender("torch.compile", lambda: compiled(batch)),
        Contender("torch F.linear_cross_entropy", lambda: torch_linear_cross_entropy(batch)),
        Contender("verl FusedLinearForPPO (torch)", lambda: verl_torch(batch)),
        Contender("verl linear_cross_entropy (triton)", lambda: verl_triton(batch)),
        Contender("TRL ChunkedLogProbFunction", lambda: trl_chunked(batch)),
        Contender("Liger FusedLinearGRPOLoss", lambda: liger_grpo(batch)),
        Contender("Liger scaled cross entropy", lambda: liger_scaled_cross_entropy(batch)),
        Contender("Apple CCE", lambda: apple_cce(batch)),
        Contender("flash-attn cross entropy", lambda: flash_attention(batch)),
        Contender("QuACK cross entropy, sum: a ceiling", lambda: quack(batch)),
    ]


report = Report("head-sweep" if arguments.part == "sweep" else "head", arguments)
for case in cases():
    if harness.time.monotonic() > arguments.deadline:
        report.say(f"\n{case} and later: not measured, the time is up")
        break
    batch = Batch(case)
    rows = compare(
        contenders(batch),
        exact=batch.exact,
        baseline=EAGER,
        repeats=2 if arguments.smoke else 3 if case == GATE else 30,
        budget_s=5,
        arguments=arguments,
    )
    work = FLOPS[case.task] * float(batch.active) * case.H * case.V
    report.case(f"GATE {case}" if case == GATE else str(case), rows, work=work, unit="TFLOP/s", baseline=EAGER)
    if any("WRONG" in row.note for row in rows):
        raise SystemExit("a kernel of ours is wrong: nothing else is timed")
    del batch, rows
