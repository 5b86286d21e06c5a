"""The `hapo:` block of a verl configuration, with all defaults and all range checks.

`HapoConfig.parse({"gate": {"threshold": 0.7}})` fills in the defaults and refuses unknown keys and bad values with one
line: the key as typed, the rule, the fix. Importing this module imports neither verl nor torch; making a configuration
imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hapo_verl.algo.objectives import Objective


class ConfigError(ValueError):
    """Raised for a launch that cannot work; the message is one line: key=value, the rule, the fix."""


# (key, predicate that is true for a wrong value, text with the rule and the fix)
Rule = tuple[str, Callable[[Any], bool], str]


def check_rules(rules: Iterable[Rule], value_of: Callable[[str], Any]) -> None:
    """Raise `ConfigError` for the first rule that the value of its key breaks."""
    for key, wrong, advice in rules:
        value = value_of(key)
        if wrong(value):
            raise ConfigError(f"{key}={value}: {advice}")


def checked(default: Any, ok: Callable[[Any], bool], rule: str) -> Any:
    """A dataclass field that is checked: `ok` must accept the value; `rule` is the error text and ends with the fix."""
    return field(default=default, metadata={"ok": ok, "rule": rule})


def _is_number(value: Any) -> bool:
    # Finite, and not an integer that is too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def positive(value: Any) -> bool:
    """Whether the value is a finite number above 0."""
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
    """A gate without keys: `never` (GRPO), `always` (LUFFY), `zero` (fires if no rollout of the group succeeded)."""

    name: str


@dataclass(frozen=True)
class PaperGate(GateConfig):
    """Injects if the posterior mean of the group's success rate is below `threshold`."""

    name: str = "paper"
    # gamma: a group is injected if the posterior mean of its success rate is below it.
    threshold: float = _threshold()
    # a0: pseudo-count of successes of the Beta prior.
    prior_success: float = checked(1.0, positive, _PRIOR)
    # b0: pseudo-count of failures of the Beta prior.
    prior_failure: float = checked(1.0, positive, _PRIOR)


@dataclass(frozen=True)
class AnnealedGate(PaperGate):
    """`paper` with a threshold that falls to 0 at step `horizon`: threshold * (1 - step / horizon) ** power."""

    name: str = "annealed"
    # Steps until the threshold is 0; null: all steps of the run.
    horizon: int | None = _horizon()
    # Exponent k of (1 - step / horizon) ** k.
    power: float = checked(1.0, positive, "the schedule's exponent must be positive. Use 1.0 for a straight line.")


@dataclass(frozen=True)
class AdaptiveGate(PaperGate):
    """`paper` with a threshold that falls as the running mean of on-policy success rises."""

    name: str = "adaptive"
    # Share of the running mean of success that each step keeps.
    memory: float = _memory()


@dataclass(frozen=True)
class PosteriorGate(GateConfig):
    """`paper` with a separate prior for each prompt, learned from its earlier visits and from its data source."""

    name: str = "posterior"
    # gamma: a group is injected if the posterior mean of its success rate is below it.
    threshold: float = _threshold()
    # Weight of the data source's prior, as a number of rollouts.
    strength: float = checked(2.0, positive, "the pooled prior needs a positive count. Use 2.0, as Beta(1, 1) has.")
    # Factor by which the counts of a prompt's earlier visits are multiplied at its next visit.
    discount: float = checked(
        0.5,
        lambda v: _is_number(v) and 0 <= v <= 1,
        "the share of earlier visits that counts lies in [0, 1]. Use 0.5.",
    )
    # Share of the running counts of the data source's successes that each step keeps.
    memory: float = _memory()


@dataclass(frozen=True)
class ThompsonGate(PosteriorGate):
    """Injects if a random draw from the posterior of the gate `posterior` is below `threshold`."""

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
    """The largest share of a step's groups that can be injected, whatever the gate decides."""

    share: float = checked(
        1.0, lambda v: _is_number(v) and 0 <= v <= 1, "a share of groups lies in [0, 1]. Use 1.0 for no limit."
    )
    # Steps until the share has fallen to 0 along a straight line; null keeps it constant.
    horizon: int | None = checked(
        None,
        lambda v: v is None or _whole(v),
        "a number of steps is a positive integer. Use null for a constant share.",
    )


MODES = ("replace", "append")


@dataclass(frozen=True)
class InjectionConfig:
    """How a demonstration joins its group."""

    # replace: it replaces the group's worst rollout. append: every rollout stays, the demonstration is an extra row.
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


ALLOCATIONS = ("uniform", "posterior")


@dataclass(frozen=True)
class RolloutsConfig:
    """How the rollouts of a step are spread over its prompts."""

    # uniform: each prompt gets actor_rollout_ref.rollout.n. posterior: the same total, spread so that by the prompts'
    # posteriors the most groups have a signal; with the gates posterior and thompson, in the trainer hapo_sync.
    allocate: str = checked(
        "uniform", lambda v: v in ALLOCATIONS, "no such allocation. Use one of: uniform, posterior."
    )
    # Smallest number of rollouts of a prompt. Not used by uniform.
    least: int = checked(2, lambda v: _whole(v) and v >= 2, "a group needs at least 2 rollouts. Use 2.")
    # Largest number of rollouts of a prompt; null: twice actor_rollout_ref.rollout.n. Not used by uniform.
    most: int | None = checked(
        None,
        lambda v: v is None or (_whole(v) and v >= 2),
        "a group needs at least 2 rollouts. Use null for twice actor_rollout_ref.rollout.n.",
    )

    def bounds(self, per_prompt: int) -> tuple[int, int]:
        """Smallest and largest number of rollouts of a prompt where `per_prompt` is their mean."""
        return self.least, 2 * per_prompt if self.most is None else self.most


STATISTICS = ("all", "on_policy")


@dataclass(frozen=True)
class AdvantageConfig:
    """The rows with which the policy's own rows are compared."""

    # The rows whose mean and deviation give the rollouts' advantages. all: every row of the group; on_policy: rollouts
    # only; null: all in mode replace, on_policy in mode append.
    statistics: str | None = checked(
        None, lambda v: v is None or v in STATISTICS, "no such statistics. Use one of: all, on_policy, null."
    )


SHAPES = ("power", "trsft", "chord")
# Hydra's command line reads inf as a number and .inf as a string; in YAML files it is the other way round.
_INFINITE = (math.inf, "inf", ".inf")


@dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    # Weight of a demonstration's token of probability q. power: lambda * q^kappa / (q + lambda)^(kappa + 1), the
    # paper's and LUFFY's weight at kappa = 1; trsft: min(q/lambda, 1); chord: q(1 - q).
    shape: str = checked("power", lambda v: v in SHAPES, "no such shape. Use one of: power, trsft, chord.")
    # lambda of the shape. With inf, power is q^kappa. Not used by chord.
    shaping: float = checked(
        0.1,
        lambda v: positive(v) or v in _INFINITE,
        "lambda of q/(q+lambda) must be positive, or inf. Use 0.1, the value of the paper.",
    )
    # kappa of the shape power. 1: the paper's and LUFFY's q/(q+lambda). 0: its logarithm, which
    # also teaches what the policy would never write. Not used by the other shapes.
    exponent: float = checked(
        1.0,
        # A smaller kappa would not differ from the logarithm, and fp32 could not divide by it.
        lambda v: _is_number(v) and (v == 0 or 1e-6 <= v <= 1),
        "kappa is 0, or lies in [1e-6, 1]. Use 1.0, the value of the paper, or 0.0.",
    )
    # Whether the ratio of the policy's own rows is clipped; false is LUFFY's published script.
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
    """The implementations of `hapo_kernels` that the actor runs."""

    # Implementation of the policy loss. auto: the Triton kernel on a GPU, the PyTorch reference elsewhere.
    policy_loss: str = checked(
        "auto", lambda v: v in ("auto", "reference", "triton"), "no such kernel. Use one of: auto, reference, triton."
    )
    # Language-model head. off: verl's own; linear_logprob: computes log-probs from hidden states, of trained tokens
    # only, one chunk of logits at a time; policy_head: in training also computes the loss, and its gradient in the
    # forward pass.
    head: str = checked(
        "off",
        lambda v: v in HEADS or v is False,  # YAML reads a bare `off` as false
        "no such head. Use one of: off, linear_logprob, policy_head.",
    )
    # GiB per rank for the head's logits, their gradients and the head's own gradient in fp32; it decides how many rows
    # are processed at once. null: for a vocabulary of 150,000, up to two chunks of 1,024 rows of logits, and 4,096 rows
    # of their gradient.
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
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    # A rollout is a success if its `acc`, or its score if the reward function returns no `acc`, is at least this.
    success_threshold: float = checked(1.0, _is_number, "the least score of a success is a number. Use 1.0.")
    # Leave rows whose gradient is exactly 0 out of the update; loss, gradient and parameters do not change.
    skip_idle_rows: bool = checked(True, lambda v: isinstance(v, bool), "either true or false. Use true.")
    # How the old log-probs are obtained. auto: if the step has one update, from that update itself; else by a pass over
    # the rows that are trained on. all: by a pass over every row, with verl's metrics of that pass.
    old_log_probs: str = checked(
        "auto", lambda v: v in ("auto", "all"), "neither auto nor all. Use auto, or all for verl's own pass."
    )
    # The data set's column with the demonstration: a string, or a list with one assistant message.
    demonstration_key: str = checked(
        "demonstration", lambda v: isinstance(v, str) and bool(v), "a column name is needed. Use demonstration."
    )
    # Seed of HAPO's random choices, such as the last ties between worst rollouts.
    seed: int = checked(0, lambda v: isinstance(v, int) and not isinstance(v, bool), "a seed is an integer. Use 0.")
    # Seconds between two polls of the replay buffer by the trainer; null keeps verl's own (2.0).
    poll_interval: float | None = checked(
        None,
        lambda v: v is None or positive(v),
        "seconds between two polls must be positive. Use null for verl's 2.0.",
    )
    # Seconds between two checks whether the actors and servers of the run are alive; null switches the checks off.
    watch_interval: float | None = checked(
        5.0,
        lambda v: v is None or positive(v),
        "seconds between two looks must be positive. Use 5.0, or null to wait for ever where a worker has died.",
    )
    # Seconds without progress until the log says what the trainer waits for and where the stacks of all processes are;
    # null never does.
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
    # Seconds after which a call of the reward function counts as failed; null waits for ever.
    reward_timeout: float | None = checked(
        3600.0,
        lambda v: v is None or positive(v),
        "seconds that a reward function may take must be positive. Use 3600.0, or null to wait for ever.",
    )
    # Folder for the trace: JSON lines about every group of every step, and about the rows that reached the loss; null
    # writes nothing. The presets name the folder `trace` beside the run's checkpoints.
    trace_dir: str | None = checked(
        None, lambda v: v is None or (isinstance(v, str) and bool(v)), "a folder is needed. Use null to write no trace."
    )
    # Number of groups per step whose rows are traced; a prompt that was traced is traced again. null traces all groups.
    trace_groups: int | None = checked(
        4, lambda v: v is None or _whole(v), "a number of groups is a positive integer. Use null for all."
    )
    # MiB that each file of the trace may take; of a longer one the beginning and the end are kept. null sets no limit.
    trace_limit: float | None = checked(
        64.0, lambda v: v is None or positive(v), "a size in MiB is positive. Use null for no limit."
    )

    @classmethod
    def parse(cls, block: Mapping[str, Any] | HapoConfig | None) -> HapoConfig:
        """Check a `hapo:` block and fill in its defaults.

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
    """Parse a block whose `name` selects one of `choices`: only that choice's keys; null takes a key's default."""
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
    """A key as it was typed, or its `repr` if it has unprintable characters."""
    return str(key) if str(key).isprintable() else repr(key)


def _keys(choice: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(choice) if f.name != "name"]


def defaults() -> dict[str, Any]:
    """All keys with their defaults as nested dictionaries, for presets to start from.

    Keys of the gate and the objective are null, which stands for the default of the chosen gate or objective.
    """
    choices = {"gate": GATES, "objective": _objectives()}
    return dataclasses.asdict(HapoConfig()) | {
        kind: {"name": next(iter(of))} | dict.fromkeys(sorted({key for choice in of.values() for key in _keys(choice)}))
        for kind, of in choices.items()
    }
