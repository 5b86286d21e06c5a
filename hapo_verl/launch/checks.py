"""Checks of a launch before the first rollout. An error is one line: the key as typed, the rule, the fix.

`check_before_ray` needs only the composed configuration and the files that it names. It runs in the launched process
before Ray is started (`preflight.py`). The trainer runs it again, then the checks that need verl, the cluster and the
content of the data.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

import hapo_verl
from hapo_verl.algo.demonstration import Refusal, demonstration_turns
from hapo_verl.config import ConfigError, HapoConfig, PosteriorGate, check_rules
from hapo_verl.launch.contract import check_contract
from hapo_verl.launch.files import check_files
from hapo_verl.launch.head_memory import check_memory
from hapo_verl.launch.sizes import check_sizes
from hapo_verl.launch.weight_bucket import check_bucket
from hapo_verl.rollout.tokens import ChatFormat

logger = logging.getLogger("verl." + __name__)

MANAGER = "hapo_verl.rollout.worker.HapoAgentLoopManager"
MODES = ("hapo_sync", "hapo_colocate_async", "hapo_separate_async")


def check_configuration(config: DictConfig) -> HapoConfig:
    """Check a composed configuration and return its parsed `hapo:` block; imports no part of verl's trainer.

    Raises:
        ConfigError: for the first problem found.
    """
    block = OmegaConf.select(config, "hapo")
    if isinstance(block, DictConfig):
        block = OmegaConf.to_container(block, resolve=True)
    if not isinstance(block, Mapping):
        raise ConfigError(f"hapo={block!r}: the block of HAPO's keys is missing. Launch with +hapo=paper.")
    hapo = HapoConfig.parse(block)
    check_rules(_RULES, partial(OmegaConf.select, config))
    _check_hybrid_engine(config)
    _check_reward_model(config)
    _check_kernels(config, hapo)
    _check_objective(config, hapo)
    _check_rollouts(config, hapo)
    return hapo


def check_before_ray(config: DictConfig) -> HapoConfig:
    """Check as `check_configuration` does, then sizes, and the files that the configuration names.

    Raises:
        ConfigError: for the first problem found; a `MissingFileError` if this machine lacks a file.
    """
    hapo = check_configuration(config)
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name") is None:
        raise ConfigError("actor_rollout_ref.rollout.name: verl needs the name of an engine. Use vllm.")
    check_sizes(config)
    check_files(config, hapo)
    check_bucket(config)
    check_memory(config, hapo)
    return hapo


def check_launch(config: DictConfig) -> HapoConfig:
    """Check as `check_configuration` does, then whether the installed verl has what HAPO needs.

    Raises:
        ConfigError: for the first problem found.
    """
    hapo = check_configuration(config)
    check_contract()
    _check_manager(config)
    if hapo.kernels.head != "off":
        _check_engine(f"hapo.kernels.head={hapo.kernels.head}", "Use hapo.kernels.head=off.")
    if hapo.objective.weighs_likelihood:
        _check_engine(f"hapo.objective.name={hapo.objective.name}", "Use hapo.objective.name=surrogate.")
    return hapo


# As `check_rules` takes them.
_RULES = (
    (
        "trainer.v1.trainer_mode",
        lambda v: v not in MODES,
        f"not a HAPO trainer. Use one of {', '.join(MODES)}.",
    ),
    (
        "algorithm.adv_estimator",
        lambda v: v != "hapo",
        "a HAPO trainer computes HAPO's advantages. Use algorithm.adv_estimator=hapo.",
    ),
    (
        "actor_rollout_ref.rollout.n",
        lambda v: not isinstance(v, int) or v < 2,
        "a group needs at least 2 rollouts. Use actor_rollout_ref.rollout.n=8.",
    ),
    (
        "algorithm.use_kl_in_reward",
        bool,
        "a demonstration has no KL to the policy that sampled it. "
        "Use algorithm.use_kl_in_reward=false and actor_rollout_ref.actor.use_kl_loss=true.",
    ),
    (
        "algorithm.rollout_correction.bypass_mode",
        bool,
        "a demonstration has no rollout log-probs to take for old ones. "
        "Use algorithm.rollout_correction.bypass_mode=false.",
    ),
    (
        "critic.enable",
        bool,
        "HAPO's advantages are group-relative and train no critic. Use critic.enable=false.",
    ),
    (
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        lambda v: v not in (None, "vanilla"),
        "HAPO brings its own loss, whose on-policy part is vanilla. "
        "Use actor_rollout_ref.actor.policy_loss.loss_mode=vanilla.",
    ),
    (
        "distillation.enabled",
        bool,
        "distillation replaces the policy loss that HAPO needs. Use distillation.enabled=false.",
    ),
    (
        "actor_rollout_ref.rollout.enable_rollout_routing_replay",
        bool,
        "a demonstration was not routed by the rollout engine, so its experts cannot be replayed. "
        "Use actor_rollout_ref.rollout.enable_rollout_routing_replay=false.",
    ),
)


def _check_hybrid_engine(config: DictConfig) -> None:
    key = "actor_rollout_ref.hybrid_engine"
    if str(config.trainer.v1.trainer_mode).endswith("separate_async") and not OmegaConf.select(config, key):
        raise ConfigError(
            f"{key}={OmegaConf.select(config, key)}: verl 0.9.1 ends with a TypeError where it logs this mode. "
            f"Use {key}=true."
        )


def _check_manager(config: DictConfig) -> None:
    from verl.utils.import_utils import load_class_from_fqn

    from hapo_verl.rollout.worker import HapoAgentLoopManager

    key = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
    name = OmegaConf.select(config, key)
    manager = load_class_from_fqn(name, "AgentLoopManager") if name else None
    if not (isinstance(manager, type) and issubclass(manager, HapoAgentLoopManager)):
        raise ConfigError(
            f"{key}={name}: this agent loop injects no demonstrations. Use {MANAGER} or a subclass of it."
        )


def _check_reward_model(config: DictConfig) -> None:
    model = OmegaConf.select(config, "reward.reward_model")
    if model is not None and model.enable and not model.enable_resource_pool:
        raise ConfigError(
            "reward.reward_model.enable_resource_pool=False: a reward model on the trainer's devices scores after the "
            "groups are closed, too late for the gate. Use reward.reward_model.enable_resource_pool=True."
        )


# The requirements of our heads, in the form of `_RULES`.
_HEAD_RULES = (
    (
        "actor_rollout_ref.actor.strategy",
        lambda v: v != "fsdp2",
        "a head of hapo.kernels exists for FSDP2 only. "
        "Use actor_rollout_ref.actor.strategy=fsdp2, or hapo.kernels.head=off.",
    ),
    (
        "actor_rollout_ref.ref.strategy",
        lambda v: v != "fsdp2",
        "a head of hapo.kernels exists for FSDP2 only. "
        "Use actor_rollout_ref.ref.strategy=fsdp2, or hapo.kernels.head=off.",
    ),
    (
        "actor_rollout_ref.model.use_fused_kernels",
        bool,
        "verl's own fused head and one of hapo.kernels exclude each other. "
        "Use actor_rollout_ref.model.use_fused_kernels=false, or hapo.kernels.head=off.",
    ),
    (
        "actor_rollout_ref.model.use_liger",
        bool,
        "Liger's kernels and a head of hapo.kernels have not been run together. "
        "Use actor_rollout_ref.model.use_liger=false, or hapo.kernels.head=off.",
    ),
    (
        "actor_rollout_ref.actor.calculate_sum_pi_squared",
        bool,
        "a sum over the vocabulary needs whole logits. "
        "Use actor_rollout_ref.actor.calculate_sum_pi_squared=false, or hapo.kernels.head=off.",
    ),
)


def _check_kernels(config: DictConfig, hapo: HapoConfig) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if hapo.kernels.policy_loss == "triton" and config.trainer.device == "cpu" and not interpreted:
        raise ConfigError(
            "hapo.kernels.policy_loss=triton: trainer.device=cpu, and Triton compiles for GPUs. "
            "Use hapo.kernels.policy_loss=auto."
        )
    if hapo.kernels.head == "off":
        return
    check_rules(_HEAD_RULES, partial(OmegaConf.select, config))
    sequence_parallel = OmegaConf.select(config, "actor_rollout_ref.actor.ulysses_sequence_parallel_size") or 1
    if hapo.kernels.head == "policy_head" and sequence_parallel > 1:
        raise ConfigError(
            f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={sequence_parallel}: policy_head needs whole rows "
            "on a rank. Use hapo.kernels.head=linear_logprob."
        )


def _check_engine(setting: str, fix: str) -> None:
    from verl.utils.device import get_vendor
    from verl.workers.engine import EngineRegistry

    from hapo_verl.actor.engine import HapoFSDPEngine

    if not issubclass(EngineRegistry.get_engine_cls("language_model", "fsdp2"), HapoFSDPEngine):
        raise ConfigError(f"{setting}: verl takes another training engine on {get_vendor()} devices. {fix}")


def _check_objective(config: DictConfig, hapo: HapoConfig) -> None:
    """Check what the objective requires, and the engine if it weights likelihoods."""
    objective, actor = hapo.objective, config.actor_rollout_ref.actor
    name = f"hapo.objective.name={objective.name}"
    if objective.aggregation not in (None, actor.loss_agg_mode):
        raise ConfigError(
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}: {name} is defined with another mode. "
            f"Use actor_rollout_ref.actor.loss_agg_mode={objective.aggregation}."
        )
    if not objective.weighs_likelihood:
        return
    if actor.strategy != "fsdp2":
        raise ConfigError(
            f"actor_rollout_ref.actor.strategy={actor.strategy}: {name} evaluates the policy before every optimizer "
            "step, which exists for FSDP2 only. Use actor_rollout_ref.actor.strategy=fsdp2."
        )
    if hapo.kernels.head == "policy_head":
        raise ConfigError(
            f"hapo.kernels.head=policy_head: {name} has a term that this head does not compute. "
            "Use hapo.kernels.head=linear_logprob."
        )
    if objective.whole_groups and actor.shuffle and actor.ppo_mini_batch_size < config.data.train_batch_size:
        raise ConfigError(
            f"actor_rollout_ref.actor.shuffle=True: {name} needs whole groups in a mini-batch. "
            "Use actor_rollout_ref.actor.shuffle=false."
        )
    if OmegaConf.select(config, "algorithm.rollout_correction.rollout_is"):
        raise ConfigError(
            f"algorithm.rollout_correction.rollout_is={config.algorithm.rollout_correction.rollout_is}: {name} has no "
            "ratio that an importance weight could correct. Use algorithm.rollout_correction.rollout_is=null."
        )


# Where a step is not the set of prompts that its rollouts were shared out to; in the form of `_RULES`.
_ALLOCATION_RULES = (
    (
        "trainer.v1.trainer_mode",
        lambda v: v != "hapo_sync",
        "hapo.rollouts.allocate=posterior shares out the rollouts of a whole step, and in this mode a step is no fixed "
        "set of prompts. Use trainer.v1.trainer_mode=hapo_sync, or hapo.rollouts.allocate=uniform.",
    ),
    (
        "algorithm.filter_groups.enable",
        bool,
        "groups that are replaced would change the number of rows, which hapo.rollouts.allocate=posterior keeps. "
        "Use algorithm.filter_groups.enable=false, or hapo.rollouts.allocate=uniform.",
    ),
    (
        "trainer.v1.sampler.sync_refill_failed_groups",
        bool,
        "groups that are replaced would change the number of rows, which hapo.rollouts.allocate=posterior keeps. "
        "Use trainer.v1.sampler.sync_refill_failed_groups=false, or hapo.rollouts.allocate=uniform.",
    ),
)


def _check_rollouts(config: DictConfig, hapo: HapoConfig) -> None:
    if hapo.rollouts.allocate == "uniform":
        return
    if not isinstance(hapo.gate, PosteriorGate):
        raise ConfigError(
            f"hapo.rollouts.allocate={hapo.rollouts.allocate}: hapo.gate.name={hapo.gate.name} keeps no posterior of a "
            "prompt. Use hapo.gate.name=posterior or thompson, or hapo.rollouts.allocate=uniform."
        )
    check_rules(_ALLOCATION_RULES, partial(OmegaConf.select, config))
    n = config.actor_rollout_ref.rollout.n
    least, most = hapo.rollouts.bounds(n)
    if least > n:
        raise ConfigError(
            f"hapo.rollouts.least={least}: prompts get actor_rollout_ref.rollout.n={n} rollouts on average. "
            "Use hapo.rollouts.least=2."
        )
    if most < n:
        raise ConfigError(
            f"hapo.rollouts.most={most}: prompts get actor_rollout_ref.rollout.n={n} rollouts on average. "
            "Use hapo.rollouts.most=null for twice as many."
        )


def _installation() -> Callable[[], tuple[str, str]]:
    """A function that returns the version of this package in its process, and a digest of the package's files.

    Ray pickles the inner function by value, so it also runs on a node without this package or with another version.
    """

    def look() -> tuple[str, str]:
        import hashlib
        import importlib.util
        import sys
        from importlib import metadata
        from pathlib import Path

        try:
            import verl  # noqa: F401

            version = metadata.version("hapo-verl")
        except (ImportError, metadata.PackageNotFoundError):
            return "is not installed", ""
        if "hapo_verl.plugin" not in sys.modules:
            return "is not loaded by `import verl`", ""
        digest = hashlib.sha256()
        for package in ("hapo_verl", "hapo_kernels"):
            spec = importlib.util.find_spec(package)
            for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
                for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
                    digest.update(f"{package}/{file.relative_to(folder)}".encode() + b"\0" + file.read_bytes() + b"\0")
        return version, digest.hexdigest()[:12]

    return look


def check_cluster() -> None:
    """Raise `ConfigError` if a Ray node lacks this version of hapo-verl, has other files of it, or does not load it.

    The check is needed because actors and agent loops import this package on their own nodes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = _installation()
    own_digest = look()[1]
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    probe = ray.remote(num_cpus=0)(look)
    answers = ray.get(
        [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
    )
    for node, (version, digest) in zip(nodes, answers, strict=True):
        if version != hapo_verl.__version__:
            raise ConfigError(
                f"Ray node {node['NodeManagerAddress']}: hapo-verl {version}, the driver has {hapo_verl.__version__}. "
                f"pip install hapo-verl=={hapo_verl.__version__} there and leave VERL_USE_EXTERNAL_PLUGINS unset."
            )
        if digest != own_digest:
            raise ConfigError(
                f"Ray node {node['NodeManagerAddress']}: hapo-verl {version} with other files than the driver's "
                f"(digest {digest} there, {own_digest} here). Install the same commit on every node."
            )


def check_demonstrations(dataset: Any, tokenizer: Any, config: DictConfig, hapo: HapoConfig, sample: int = 256) -> None:
    """Raise `ConfigError` if no demonstration in a sample of the training data can be injected.

    Args:
        dataset: verl's training data set.
        tokenizer: the tokenizer of the run.
        config: the whole configuration.
        hapo: its `hapo:` block.
        sample: number of rows to check, spread over the data set.
    """
    if not hapo.demonstrations.needs_column:
        return
    key, limit = hapo.demonstration_key, int(config.data.max_response_length)
    rows = getattr(dataset, "dataframe", dataset)
    columns = getattr(rows, "column_names", None) or list(dataset[0])
    if key not in columns:
        raise ConfigError(
            f"hapo.demonstration_key={key}: data.train_files has no such column (it has {', '.join(sorted(columns))}). "
            "Add one with a worked solution a row, name yours, or use hapo.demonstrations.source=own."
        )
    chat = ChatFormat.of_launch(config, tokenizer)
    stride = max(1, len(rows) // sample)
    outcomes = Counter(_usable(rows[i], key, chat, limit) for i in range(0, len(rows), stride))
    several = any(_has_several_turns(rows[i][key]) for i in range(0, len(rows), stride))
    looked_at, usable = outcomes.total(), outcomes.pop("usable", 0)
    reasons = ", ".join(f"{count} {reason}" for reason, count in outcomes.most_common())
    if not usable:
        raise ConfigError(
            f"hapo.demonstration_key={key}: none of {looked_at} demonstrations looked at can be injected ({reasons}). "
            f"Fill the column; they must fit data.max_response_length={limit} with their end of sequence."
            f"{_SEVERAL_TURNS if several else ''}{_THOUGHTS if 'thought' in outcomes else ''}"
        )
    if reasons:
        logger.warning("hapo: of %d demonstrations looked at %d can be injected; %s", looked_at, usable, reasons)


_SEVERAL_TURNS = (
    " Those in which tools answer need actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent, and in "
    "actor_rollout_ref.rollout.multi_turn these tools, format=... of the calls and room for the turns."
)


_THOUGHTS = (
    " Where the chat template opens a thought, a demonstration has to close it (</think>) in front of its answer, and "
    "where the template closes one, to have none: data.apply_chat_template_kwargs.enable_thinking, where the template "
    "knows it, says which."
)


def _has_several_turns(value: Any) -> bool:
    turns = demonstration_turns(value)
    return not isinstance(turns, Refusal) and len(turns) > 1


def _usable(row: Mapping[str, Any], key: str, chat: ChatFormat, limit: int) -> str:
    response = chat.demonstration(row[key], row, max_tokens=limit)
    return response.reason if isinstance(response, Refusal) else "usable"
