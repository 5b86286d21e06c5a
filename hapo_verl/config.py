"""The `hapo:` block of a verl configuration: the only defaults and the only range checks. No verl, and no torch
before a configuration is made.

`HapoConfig.parse({"gate": {"threshold": 0.7}})` fills in the defaults and refuses what it does not know, in one line:
the key as typed, the rule, the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hapo_verl.algo.objectives import Objective


class ConfigError(ValueError):
    """A launch that cannot work; the message is one line: key=value, the rule, the fix."""


def checked(default: Any, ok: Callable[[Any], bool], rule: str) -> Any:
    """A dataclass field whose value `ok` has to accept; the rule ends with the fix."""
    return field(default=default, metadata={"ok": ok, "rule": rule})


def _is_number(value: Any) -> bool:
    # Finite, and no integer that is too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def positive(value: Any) -> bool:
    """A finite number above 0."""
    return _is_number(value) and value > 0


_PRIOR = "a Beta prior needs a positive count. Use 1.0 for the uniform prior."


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _threshold() -> Any:
    return checked(
        0.8,
        lambda v: _is_number(v) and 0 <= v <= 1,
        "a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
    )


def _memory() -> Any:
    return checked(
        0.9,
        lambda v: _is_number(v) and 0 <= v < 1,
        "the share of a running mean that a step keeps lies in [0, 1). Use 0.9, about ten steps.",
    )


def _horizon() -> Any:
    return checked(
        None,
        lambda v: v is None or _whole(v),
        "a number of steps is a positive integer. Use null for all steps of the run.",
    )


@dataclass(frozen=True)
class GateConfig:
    """A gate without keys: `never` (GRPO), `always` (LUFFY), `zero` (only groups in which no rollout succeeded)."""

    name: str


@dataclass(frozen=True)
class PaperGate(GateConfig):
    """Injects while the posterior mean of the group's success rate lies below `threshold`."""

    name: str = "paper"
    # gamma: a group is injected while the posterior mean of its success rate lies below it.
    threshold: float = _threshold()
    # a0: successes that the Beta prior pretends to have seen.
    prior_success: float = checked(1.0, positive, _PRIOR)
    # b0: failures that the Beta prior pretends to have seen.
    prior_failure: float = checked(1.0, positive, _PRIOR)


@dataclass(frozen=True)
class AnnealedGate(PaperGate):
    """`paper` with a threshold that falls to 0 at step `horizon`: threshold * (1 - step / horizon) ** power."""

    name: str = "annealed"
    # Steps until the threshold is 0; null: all steps of the run.
    horizon: int | None = _horizon()
    # k of (1 - step / horizon) ** k.
    power: float = checked(1.0, positive, "the schedule's exponent must be positive. Use 1.0 for a straight line.")


@dataclass(frozen=True)
class AdaptiveGate(PaperGate):
    """`paper` with a threshold that falls as the running on-policy success rises."""

    name: str = "adaptive"
    # Share of the running mean of success that a step keeps.
    memory: float = _memory()


@dataclass(frozen=True)
class PosteriorGate(GateConfig):
    """`paper` with a prior of the prompt's own: what its earlier visits and its data source say."""

    name: str = "posterior"
    # gamma: a group is injected while the posterior mean of its success rate lies below it.
    threshold: float = _threshold()
    # Rollouts that the prior of a prompt's data source is worth.
    strength: float = checked(2.0, positive, "the pooled prior needs a positive count. Use 2.0, as Beta(1, 1) has.")
    # Share of what earlier visits of the prompt have shown that counts at the next one.
    discount: float = checked(
        0.5,
        lambda v: _is_number(v) and 0 <= v <= 1,
        "the share of earlier visits that counts lies in [0, 1]. Use 0.5.",
    )
    # Share of the running mean of the data source's success that a step keeps.
    memory: float = _memory()


@dataclass(frozen=True)
class ThompsonGate(PosteriorGate):
    """Injects when a draw from the posterior of `posterior` lies below `threshold`."""

    name: str = "thompson"


GATES: dict[str, GateConfig] = {
    gate.name: gate
    for gate in (
        PaperGate(),
        AnnealedGate(),
        AdaptiveGate(),
        PosteriorGate(),
        ThompsonGate(),
        GateConfig("zero"),
        GateConfig("never"),
        GateConfig("always"),
    )
}


@dataclass(frozen=True)
class BudgetConfig:
    """At most this share of a step's groups is injected, whatever the gate says."""

    share: float = checked(
        1.0, lambda v: _is_number(v) and 0 <= v <= 1, "a share of groups lies in [0, 1]. Use 1.0 for no limit."
    )
    # Steps until the share has fallen to 0 along a straight line; null keeps it.
    horizon: int | None = checked(
        None,
        lambda v: v is None or _whole(v),
        "a number of steps is a positive integer. Use null for a constant share.",
    )


MODES = ("replace", "append")


@dataclass(frozen=True)
class InjectionConfig:
    """What becomes of the group's worst rollout."""

    # replace: the demonstration takes its place. append: it stays, the demonstration is one row more.
    mode: str = checked("replace", lambda v: v in MODES, "no such mode. Use one of: replace, append.")


SOURCES = ("column", "own", "column_or_own")


@dataclass(frozen=True)
class DemonstrationsConfig:
    """Whose solutions are injected."""

    # column: the data set's. own: what the policy itself has solved the prompt with before, without any teacher.
    # column_or_own: its own where the data set's cannot be used.
    source: str = checked("column", lambda v: v in SOURCES, "no such source. Use one of: column, own, column_or_own.")
    # MiB of the trainer's memory for the policy's own successes; the ones written longest ago make room.
    own_memory_mib: float = checked(
        256,
        positive,
        "a size in MiB is positive. Use 256, which holds 100,000 prompts with 1,000 tokens each.",
    )
    # Steps after which a success of the policy is injected no more; null keeps it until the prompt succeeds again.
    own_max_age: int | None = checked(
        None,
        lambda v: v is None or _whole(v),
        "a number of steps is a positive integer. Use null for no limit.",
    )

    @property
    def needs_column(self) -> bool:
        """Whether the data set has to have demonstrations."""
        return self.source != "own"

    @property
    def remembers(self) -> bool:
        """Whether the policy's own successes are kept."""
        return self.source != "column"


STATISTICS = ("all", "on_policy")


@dataclass(frozen=True)
class AdvantageConfig:
    """With whom the policy's own rows are compared."""

    # all: every row of the group; on_policy: rollouts only; null: all in mode replace, on_policy in mode append.
    statistics: str | None = checked(
        None, lambda v: v is None or v in STATISTICS, "no such statistics. Use one of: all, on_policy, null."
    )


SHAPES = ("power", "trsft", "chord")
# A command line reads a bare inf as a number and .inf as a string, YAML the other way round.
_INFINITE = (math.inf, "inf", ".inf")


@dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    # What weighs a demonstration's token of probability q. power: lambda * q^kappa / (q + lambda)^(kappa + 1), the
    # paper's and LUFFY's at kappa = 1; trsft: min(q/lambda, 1); chord: q(1 - q).
    shape: str = checked("power", lambda v: v in SHAPES, "no such shape. Use one of: power, trsft, chord.")
    # lambda; inf: power is then q^kappa; not read by chord.
    shaping: float = checked(
        0.1,
        lambda v: positive(v) or v in _INFINITE,
        "lambda of q/(q+lambda) must be positive, or inf. Use 0.1, the value of the paper.",
    )
    # kappa: 1 is the paper's and LUFFY's q/(q+lambda); 0 is its logarithm, which also teaches what the policy would
    # never write. Read by power alone.
    exponent: float = checked(
        1.0,
        # Between 0 and that it is the logarithm, too, until fp32 cannot hold it.
        lambda v: _is_number(v) and (v == 0 or 1e-6 <= v <= 1),
        "kappa is 0, or lies in [1e-6, 1]. Use 1.0, the value of the paper, or 0.0.",
    )
    # false: the ratio of the policy's own rows is clipped nowhere, as in LUFFY's published script.
    clip: bool = checked(True, lambda v: isinstance(v, bool), "either true or false. Use true.")

    def __post_init__(self) -> None:
        if isinstance(self.shaping, str):
            object.__setattr__(self, "shaping", math.inf)
        if self.shape == "trsft" and self.shaping == math.inf:
            raise ConfigError(
                "hapo.loss.shaping=inf: with hapo.loss.shape=trsft no token would have a weight. "
                "Use 0.1, the value of TRAPO."
            )


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementations of `hapo_kernels` the actor runs."""

    # auto: the Triton kernel on a GPU, the PyTorch reference elsewhere.
    policy_loss: str = checked(
        "auto", lambda v: v in ("auto", "reference", "triton"), "no such kernel. Use one of: auto, reference, triton."
    )
    # off: verl's own; linear_logprob: log-probs from hidden states, a chunk of logits at a time, trained tokens only;
    # policy_head: in training also the loss, with its gradient computed in the forward pass.
    head: str = checked(
        "off",
        lambda v: v in HEADS or v is False,  # YAML reads a bare `off` as false
        "no such head. Use one of: off, linear_logprob, policy_head.",
    )
    # GiB for the head's logits, their gradients and the head's own gradient in fp32, on each rank; picks how many rows
    # are taken at once. null: up to 1,024 rows of logits, twice, and 4,096 of their gradient, at 150,000 tokens.
    memory_gib: float | None = checked(
        None,
        lambda v: v is None or positive(v),
        "a size in GiB is positive. Use null for the default, or what the doctor names as the least.",
    )

    def __post_init__(self) -> None:
        if self.head is False:
            object.__setattr__(self, "head", "off")
        if self.head == "off" and self.memory_gib is not None:
            raise ConfigError(
                f"hapo.kernels.memory_gib={self.memory_gib}: hapo.kernels.head=off takes all rows at once. "
                "Use hapo.kernels.head=policy_head or linear_logprob, or hapo.kernels.memory_gib=null."
            )


HEADS = ("off", "linear_logprob", "policy_head")


def _surrogate() -> Objective:
    from hapo_verl.algo.objectives import Objective

    return Objective()


@dataclass(frozen=True)
class HapoConfig:
    """Every key of the `hapo:` block."""

    gate: GateConfig = field(default_factory=PaperGate)
    objective: Objective = field(default_factory=_surrogate)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    demonstrations: DemonstrationsConfig = field(default_factory=DemonstrationsConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    # A rollout is a success when its `acc` (its score, where the reward function returns no `acc`) is at least this.
    success_threshold: float = checked(1.0, _is_number, "the least score of a success is a number. Use 1.0.")
    # Rows whose gradient is exactly 0 are left out of the update; loss, gradient and parameters stay those of all rows.
    skip_idle_rows: bool = checked(True, lambda v: isinstance(v, bool), "either true or false. Use true.")
    # auto: log-probabilities before the update only of rows that are trained on, and from the update itself where it is
    # the step's only one; all: of every row in a pass of their own, with verl's metrics of that pass.
    old_log_probs: str = checked(
        "auto", lambda v: v in ("auto", "all"), "neither auto nor all. Use auto, or all for verl's own pass."
    )
    # The data set's column with the demonstration: a string, or a list with one assistant message.
    demonstration_key: str = checked(
        "demonstration", lambda v: isinstance(v, str) and bool(v), "a column name is needed. Use demonstration."
    )
    # Breaks the last ties in the choice of the worst rollout.
    seed: int = checked(0, lambda v: isinstance(v, int) and not isinstance(v, bool), "a seed is an integer. Use 0.")
    # Seconds between two looks of the trainer at the replay buffer; null keeps verl's own (2.0).
    poll_interval: float | None = checked(
        None,
        lambda v: v is None or positive(v),
        "seconds between two polls must be positive. Use null for verl's 2.0.",
    )
    # Seconds between two looks at the actors and servers that the run needs; null does not look.
    watch_interval: float | None = checked(
        5.0,
        lambda v: v is None or positive(v),
        "seconds between two looks must be positive. Use 5.0, or null to wait for ever where a worker has died.",
    )
    # Seconds without progress until a line says what the trainer waits for, and where the stacks of all processes are.
    stall_report: float | None = checked(
        1800.0,
        lambda v: v is None or positive(v),
        "seconds without progress must be positive. Use 1800.0, or null to say nothing.",
    )
    # Seconds without progress until the run ends; null waits for ever.
    stall_limit: float | None = checked(
        7200.0,
        lambda v: v is None or positive(v),
        "seconds without progress must be positive. Use 7200.0, or null to wait for ever.",
    )
    # Seconds until a call of the reward function has failed; null waits for ever.
    reward_timeout: float | None = checked(
        3600.0,
        lambda v: v is None or positive(v),
        "seconds that a reward function may take must be positive. Use 3600.0, or null to wait for ever.",
    )
    # Folder for one JSON line a group and step, and the rows that reached the loss; null writes nothing. The presets
    # name the folder `trace` beside the run's checkpoints.
    trace_dir: str | None = checked(
        None, lambda v: v is None or (isinstance(v, str) and bool(v)), "a folder is needed. Use null to write no trace."
    )
    # Groups a step whose rows are traced, the same prompts wherever they come again; null traces those of all.
    trace_groups: int | None = checked(
        4, lambda v: v is None or _whole(v), "a number of groups is a positive integer. Use null for all."
    )
    # MiB that each of a trace's files may take, its beginning and its end; null has no limit.
    trace_limit: float | None = checked(
        64.0, lambda v: v is None or positive(v), "a size in MiB is positive. Use null for no limit."
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
            raise ConfigError(f"{path}.{_typed(key)}: no such key. Did you mean {path}.{near[0]}?")
        spec = fields[key]
        if key == "gate":
            values[key] = _parse_choice(value, f"{path}.gate", GATES, first="paper")
        elif key == "objective":
            values[key] = _parse_choice(value, f"{path}.objective", _objectives(), first="surrogate")
        elif dataclasses.is_dataclass(spec.default_factory):
            values[key] = _parse(spec.default_factory, value, f"{path}.{key}")  # type: ignore[arg-type]
        elif "ok" in spec.metadata and not spec.metadata["ok"](value):
            raise ConfigError(f"{path}.{key}={value!r}: {spec.metadata['rule']}")
        else:
            values[key] = value
    return cls(**values)


def _objectives() -> Mapping[str, Objective]:
    from hapo_verl.algo.objectives import objectives  # brings torch

    return objectives()


def _parse_choice(block: Any, path: str, choices: Mapping[str, Any], *, first: str) -> Any:
    """The choice that `name` names, with its own keys only; null stands for its own default of a key."""
    if any(type(block) is type(choice) for choice in choices.values()):
        return block
    if not isinstance(block, Mapping):
        raise ConfigError(f"{path}={block!r}: a block of keys is needed. Launch with +hapo=paper.")
    kind, name = path.rpartition(".")[2], block.get("name", first)
    if not isinstance(name, str) or name not in choices:
        article = "an" if kind[0] in "aeiou" else "a"
        raise ConfigError(f"{path}.name={name!r}: not {article} {kind}. Use one of: {', '.join(choices)}.")
    given = {key: value for key, value in block.items() if value is not None and key != "name"}
    own = _keys(choices[name])
    for key, value in given.items():
        if key in own:
            continue
        others = [other for other, choice in choices.items() if key in _keys(choice)]
        if others:
            has = f"which has {', '.join(own)}" if own else "which has no keys"
            raise ConfigError(
                f"{path}.{_typed(key)}={value!r}: not a key of the {kind} {name}, {has}. "
                f"Use {path}.name={others[0]} or remove it."
            )
        near = difflib.get_close_matches(str(key), own or ["name"], n=1, cutoff=0.0)
        raise ConfigError(f"{path}.{_typed(key)}: no such key. Did you mean {path}.{near[0]}?")
    return _parse(type(choices[name]), {"name": name, **given}, path)


def _typed(key: Any) -> str:
    """A key as it was typed; one that would break the line as Python writes it."""
    return str(key) if str(key).isprintable() else repr(key)


def _keys(choice: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(choice) if f.name != "name"]


def defaults() -> dict[str, Any]:
    """Every key, as nested plain dictionaries: what a preset starts from. A choice's keys are null, its own default."""
    choices = {"gate": GATES, "objective": _objectives()}
    return dataclasses.asdict(HapoConfig()) | {
        kind: {"name": next(iter(of))} | dict.fromkeys(sorted({key for choice in of.values() for key in _keys(choice)}))
        for kind, of in choices.items()
    }
