"""Kernels of hapo-verl: one folder an operation, each with its mathematics, a plain PyTorch reference and a Triton kernel.

    segment_norm      (score - mean) / (std + eps) within groups of any size, in any order
    policy_loss       clipped surrogate and teacher shaping, chosen per row, from per-token log-probabilities

Import the operation from its folder: `from hapo_kernels.policy_loss import policy_loss`.

Axis letters: B rollouts (rows), T tokens of a response, V vocabulary, H hidden size, G groups, S segments.
`logp` is the natural logarithm of a probability, in nats.
"""
