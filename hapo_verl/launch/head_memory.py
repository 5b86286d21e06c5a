"""Memory that the language-model head adds to a training step on one rank, in bytes, estimated from sizes alone.

With N tokens at a time, H hidden units, a vocabulary of V, and bf16 multiplications:

    verl's own        2NV                the logits, bf16; flash-attn's cross-entropy writes their gradient over them
                    + 2NV                their copy, where the temperature is not 1
                    + 2VH                the head's gradient
    linear_logprob    4RV + 2RV          logits (fp32) and their gradient (bf16), R rows at a time
                    + 4VH + 2VH          the head's gradient, summed in fp32, and as it is handed on
                    + 2NH                the hidden states' gradient
    policy_head       4RV + 2RV
                    + 4VH + 2NH          both gradients are kept from the forward pass to the backward pass

The hidden states and the gathered head itself (2VH) are there in any case. A lower bound for verl's own: without
flash-attn, or with an entropy term, it is more. Qwen2.5 of 7B, V = 152,064, H = 3,584, at N = 16,384 and R = 1,024, in
GiB: 4.64 + 1.02 = 5.66 for verl's own at temperature 1, 0.87 + 3.05 + 0.11 = 4.02 and 0.87 + 2.03 + 0.11 = 3.01.
"""

from __future__ import annotations


def verl_head_bytes(tokens: int, hidden: int, vocabulary: int, *, temperature: float) -> int:
    """Of verl's own head, at least."""
    copies = 1 if temperature == 1.0 else 2
    return 2 * copies * tokens * vocabulary + 2 * vocabulary * hidden


def linear_logprob_bytes(tokens: int, hidden: int, vocabulary: int, *, chunk_rows: int) -> int:
    """Of `hapo.kernels.head=linear_logprob`, `chunk_rows` rows at a time."""
    return 6 * chunk_rows * vocabulary + 6 * vocabulary * hidden + 2 * tokens * hidden


def policy_head_bytes(tokens: int, hidden: int, vocabulary: int, *, chunk_rows: int) -> int:
    """Of `hapo.kernels.head=policy_head`, `chunk_rows` rows at a time."""
    return 6 * chunk_rows * vocabulary + 4 * vocabulary * hidden + 2 * tokens * hidden
