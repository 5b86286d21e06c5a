"""What are the ceilings of this GPU: its copy bandwidth, and the rate of each GEMM of a language-model head?

    python bench/ceilings.py [--smoke] [--out DIR]

At T 8192, H 4096, V 151,936, with chunks of 1,024 rows: logits, ∂hidden, and ∂weight in fp32. The first GEMM of ∂weight
writes (β = 0) and later ones add (β = 1); these are also measured with the rows of four chunks. The sum of the times is
a lower bound for a head.
"""

from typing import Any

import harness

arguments = harness.options(__doc__ or "")

import torch  # noqa: E402  # after `options`

from harness import Measured, Report, milliseconds  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
ROWS, H, V = (16, 24, 300) if arguments.smoke else (1024, 4096, 151936)
CHUNKS = 4


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, summed: bool = False):
    """out <- a b, or out + a b, in fp32."""
    given: dict[str, Any] = {"out_dtype": torch.float32} if CUDA else {}
    if summed:
        return lambda: torch.addmm(out, a, b, out=out, **given)
    return lambda: torch.mm(a, b, out=out, **given)


report = Report("ceilings", arguments)
hidden, weight, dlogits = normal(CHUNKS * ROWS, H), normal(V, H), normal(CHUNKS * ROWS, V)
logits, dhidden = (torch.empty(ROWS, width, device=DEVICE, dtype=torch.float32) for width in (V, H))
dweight = torch.empty(V, H, device=DEVICE, dtype=torch.float32)
few = slice(ROWS)
for title, rows, call in (
    ("logits of a chunk, fp32 out", ROWS, into(logits, hidden[few], weight.T)),
    ("∂hidden of a chunk, fp32 out", ROWS, into(dhidden, dlogits[few], weight)),
    ("∂weight of a chunk, fp32, first", ROWS, into(dweight, dlogits[few].T, hidden[few])),
    ("∂weight of a chunk, fp32, summed", ROWS, into(dweight, dlogits[few].T, hidden[few], summed=True)),
    ("∂weight of four chunks, fp32, summed", CHUNKS * ROWS, into(dweight, dlogits.T, hidden, summed=True)),
):
    call()
    row = Measured(title, milliseconds=[milliseconds(call) for _ in range(3 if arguments.smoke else 20)])
    report.case(f"{title}: rows {rows}, H {H}, V {V}", [row], work=2.0 * rows * H * V, unit="TFLOP/s", baseline=title)
