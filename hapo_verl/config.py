"""The `hapo:` block of a verl configuration: the only defaults and the only range checks. No torch, no verl.

`HapoConfig.parse({"gate": {"threshold": 0.7}})` fills in the defaults and refuses what it does not know, in one line:
the key as typed, the rule, the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A launch that cannot work; the message is one line: key=value, the rule, the fix."""


def _checked(default: Any, ok: Callable[[Any], bool], rule: str) -> Any:
    return field(default=default, metadata={"ok": ok, "rule": rule})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _is_number(value) and value > 0


@dataclass(frozen=True)
class GateConfig:
    """When a group is injected: the posterior mean of its success rate lies below `threshold`."""

    name: str = _checked("paper", lambda v: v in GATES, "not a gate. Use one of: paper, never.")
    threshold: float = _checked(
        0.8,
        lambda v: _is_number(v) and 0 <= v <= 1,
        "a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
    )
    prior_success: float = _checked(
        1.0, _positive, "a Beta prior needs a positive count. Use 1.0 for the uniform prior."
    )
    prior_failure: float = _checked(
        1.0, _positive, "a Beta prior needs a positive count. Use 1.0 for the uniform prior."
    )


GATES = ("paper", "never")


@dataclass(frozen=True)
class LossConfig:
    """The demonstration's term of the policy loss."""

    shaping: float = _checked(
        0.1, _positive, "lambda of q/(q+lambda) must be positive. Use 0.1, the value of the paper."
    )


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementations of `hapo_kernels` the actor runs."""

    # auto: the Triton kernel on a GPU, the PyTorch reference elsewhere.
    policy_loss: str = _checked(
        "auto", lambda v: v in ("auto", "reference", "triton"), "no such kernel. Use one of: auto, reference, triton."
    )
    # off: verl's own; linear_logprob: log-probs from hidden states, a chunk of logits at a time, trained tokens only;
    # policy_head: in training also the loss, with its gradient computed in the forward pass.
    head: str = _checked(
        "off",
        lambda v: v in HEADS or v is False,  # YAML reads a bare `off` as false
        "no such head. Use one of: off, linear_logprob, policy_head.",
    )

    def __post_init__(self) -> None:
        if self.head is False:
            object.__setattr__(self, "head", "off")


HEADS = ("off", "linear_logprob", "policy_head")


@dataclass(frozen=True)
class HapoConfig:
    """Every key of the `hapo:` block."""

    gate: GateConfig = field(default_factory=GateConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    # A rollout is a success when its `acc` (its score, where the reward function returns no `acc`) is at least this.
    success_threshold: float = _checked(1.0, _is_number, "the least score of a success is a number. Use 1.0.")
    # The data set's column with the demonstration: a string, or a list with one assistant message.
    demonstration_key: str = _checked(
        "demonstration", lambda v: isinstance(v, str) and bool(v), "a column name is needed. Use demonstration."
    )
    # Breaks the last ties in the choice of the worst rollout.
    seed: int = _checked(0, lambda v: isinstance(v, int) and not isinstance(v, bool), "a seed is an integer. Use 0.")
    # Seconds between two looks of the trainer at the replay buffer; null keeps verl's own (2.0).
    poll_interval: float | None = _checked(
        None,
        lambda v: v is None or _positive(v),
        "seconds between two polls must be positive. Use null for verl's 2.0.",
    )
    # Folder for one JSON line a group and step, and the rows that reached the loss; null writes nothing.
    trace_dir: str | None = _checked(
        None, lambda v: v is None or (isinstance(v, str) and bool(v)), "a folder is needed. Use null to write no trace."
    )

    @classmethod
    def parse(cls, block: Mapping[str, Any] | HapoConfig | None) -> HapoConfig:
        """The checked configuration of a `hapo:` block.

        Args:
            block: the keys under `hapo:` (nested mappings of plain values); absent keys take their defaults.

        Raises:
            ConfigError: on an unknown key or a value out of range, naming the key as typed.
        """
        if isinstance(block, HapoConfig):
            return block
        return _parse(cls, block, "hapo")


def _parse(cls: type, block: Any, path: str) -> Any:
    if not isinstance(block, Mapping):
        raise ConfigError(f"{path}={block!r}: a block of keys is needed. Launch with +hapo=paper.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in block.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ConfigError(f"{path}.{key}: no such key. Did you mean {path}.{near[0]}?")
        spec = fields[key]
        if dataclasses.is_dataclass(spec.default_factory):
            values[key] = _parse(spec.default_factory, value, f"{path}.{key}")  # type: ignore[arg-type]
            continue
        if not spec.metadata["ok"](value):
            raise ConfigError(f"{path}.{key}={value!r}: {spec.metadata['rule']}")
        values[key] = value
    return cls(**values)


def defaults() -> dict[str, Any]:
    """Every key with its default, as nested plain dictionaries: what a preset starts from."""
    return dataclasses.asdict(HapoConfig())
