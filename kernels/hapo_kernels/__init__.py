"""Kernels of hapo-verl: one folder per operation, with its mathematics, a PyTorch reference and a Triton kernel.

    segment_norm      (score - mean) / (std + eps) within groups of any size, in any order
    policy_loss       clipped surrogate and teacher shaping, chosen per row, from per-token log-probabilities
    linear_logprob    log-probability and entropy from hidden states and the language-model head
    policy_head       policy_loss on linear_logprob in one pass, with the gradient computed in the forward pass

Import the operation from its folder: `from hapo_kernels.policy_loss import policy_loss`.

Axis letters: B rollouts (rows), T tokens of a response, V vocabulary, H hidden size, G groups, S segments.
`logp` is the natural logarithm of a probability, in nats.
"""
