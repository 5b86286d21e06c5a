"""What may enter a policy loss, one frozen value each; the equations are in `hapo_kernels.policy_loss`.

They stand apart from `reference.py` because the reference, the kernel and `policy_head` all take them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

AGGREGATION_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
SHAPES = ("power", "trsft", "chord")
KL_KINDS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl")


@dataclass(frozen=True)
class Clip:
    """Where the ratio ρ = π/π_old of an on-policy token stops counting.

    low: ρ is clipped below at 1 - low; `inf` never clips.
    high: ρ is clipped above at 1 + high; `inf` never clips.
    dual: for A < 0 the loss is at most -A·dual (arXiv 1912.09729); greater than 1, `inf` never bounds it.
    """

    low: float
    high: float
    dual: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"clip.{name}={getattr(self, name)}: a clip range is at least 0. Use inf to switch it off."
                )
        if not self.dual > 1:
            raise ValueError(f"clip.dual={self.dual}: the dual clip is greater than 1. Use inf to switch it off.")


@dataclass(frozen=True)
class Teacher:
    """Rows whose tokens a teacher chose, and how hard a token of probability q is pushed: its weight ∂F/∂log q.

    row_B: bool, True on a teacher row.
    shaping: λ > 0.
    logp_BT: log π_teacher of the tokens, nats; None takes π_teacher = 1, the choice where it is not known.
    exponent: κ in [0, 1] of the shape `power`; 1 is LUFFY's f(q) = q/(q+λ), 0 is log f.
    shape: `power`, λq^κ/(q+λ)^(κ+1), with λ = inf q^κ; `trsft`, min(q/λ, 1); `chord`, q(1-q).
    """

    row_B: Tensor
    shaping: float
    logp_BT: Tensor | None = None
    exponent: float = 1.0
    shape: str = "power"

    def __post_init__(self) -> None:
        if not self.shaping > 0:
            raise ValueError(f"teacher.shaping={self.shaping}: λ of q/(q+λ) is positive. LUFFY uses 0.1.")
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"teacher.exponent={self.exponent}: κ lies in [0, 1]. LUFFY's f(q) is 1, log f(q) is 0.")
        if self.shape not in SHAPES:
            raise ValueError(f"teacher.shape={self.shape!r}: no such shape. Use one of {', '.join(SHAPES)}.")
        if self.shape == "trsft" and self.shaping == math.inf:
            raise ValueError("teacher.shaping=inf with teacher.shape='trsft': min(q/λ, 1) would be 0. Use a finite λ.")

    @property
    def largest_weight(self) -> float:
        """The largest ∂F/∂log q of any q in (0, 1]: of `power` at q = κλ, or at q = 1 where that is above 1."""
        if self.shape != "power":
            return 1.0 if self.shape == "trsft" else 0.25
        if self.exponent == 0 or self.shaping == math.inf:
            return 1.0
        q = min(1.0, self.exponent * self.shaping)
        return self.shaping * q**self.exponent / (q + self.shaping) ** (self.exponent + 1)


@dataclass(frozen=True)
class KLPenalty:
    """coefficient · KL(π || π_ref), estimated a token, over on-policy tokens.

    kind: verl's `kl_loss_type`: k1 (kl), abs, k2 (mse), k3 (low_var_kl); a trailing + keeps the value and takes k2's
    gradient.
    """

    reference_logp_BT: Tensor
    kind: str
    coefficient: float

    def __post_init__(self) -> None:
        if self.kind.removesuffix("+") not in KL_KINDS:
            raise ValueError(
                f"kl.kind={self.kind!r}: no such estimator. Use one of {', '.join(KL_KINDS)}, with or without +."
            )


@dataclass(frozen=True)
class EntropyBonus:
    """- coefficient · H(π) of every token. With coefficient 0 the entropy is only measured."""

    entropy_BT: Tensor
    coefficient: float


@dataclass(frozen=True)
class Aggregation:
    """From a loss a token to one number: verl's `loss_agg_mode` with the normalisers of the global batch.

    mode                       Σ over the micro-batch of
    token-mean                 token losses · dp_size / batch_num_tokens
    token-sum                  token losses · dp_size
    seq-mean-token-sum         row sums · dp_size / global_batch_size
    seq-mean-token-sum-norm    row sums · dp_size / (global_batch_size · loss_scale_factor)
    seq-mean-token-mean        row means · dp_size / global_batch_size

    A normaliser that is None is counted in the micro-batch itself: rows with at least one active token, active tokens,
    and T for loss_scale_factor. Then the loss does change with the cut into micro-batches (and with T, the padding).
    The fields after `mode` are verl's `global_batch_info`: `Aggregation(mode, **config.global_batch_info)`.
    """

    mode: str
    dp_size: int = 1
    batch_num_tokens: int | Tensor | None = None
    global_batch_size: int | Tensor | None = None
    loss_scale_factor: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in AGGREGATION_MODES:
            raise ValueError(
                f"aggregation.mode={self.mode!r}: no such mode. Use one of {', '.join(AGGREGATION_MODES)}."
            )
        if self.dp_size > 1 and self.mode != "token-sum":
            key = "batch_num_tokens" if self.mode == "token-mean" else "global_batch_size"
            if getattr(self, key) is None:
                raise ValueError(
                    f"aggregation.{key}=None with dp_size={self.dp_size}: a rank cannot count the tokens or rows of "
                    f"the others. Pass the global {key}."
                )


class PolicyLossMetrics(NamedTuple):
    """0-d fp32 tensors without gradient (fp64 for fp64 input), all of them sums over the micro-batch.

    A loss contribution carries the global normaliser: add it up over micro-batches. A mean over tokens is a sum
    divided by its count, after both have been added up.
    """

    on_policy_loss: (
        Tensor  # the aggregated loss of the on-policy tokens; with teacher_loss, the policy part of the loss
    )
    teacher_loss: Tensor  # the aggregated loss of the teacher tokens
    kl_loss: Tensor  # aggregated, before its coefficient; 0 without a KL term
    entropy: Tensor  # aggregated, before its coefficient; 0 without an entropy term
    on_policy_tokens: Tensor  # count
    teacher_tokens: Tensor  # count
    clipped_tokens: Tensor  # count of on-policy tokens that the clip holds; / on_policy_tokens = verl's pg_clipfrac
    dual_clipped_tokens: Tensor  # the same for the dual clip; verl's pg_clipfrac_lower
    log_ratio_sum: Tensor  # Σ log(π_old/π), on-policy; / on_policy_tokens = verl's ppo_kl
    teacher_probability_sum: Tensor  # Σ π(token), teacher tokens


class PolicyLoss(NamedTuple):
    """What the policy loss returns."""

    loss: Tensor  # 0-d, differentiable with respect to policy_logp_BT and entropy_BT
    metrics: PolicyLossMetrics
