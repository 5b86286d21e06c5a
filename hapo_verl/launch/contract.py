"""The private methods of verl that this package overrides or calls, with their signatures in a given verl version.

They are checked at the start of a run and by `hapo_verl.doctor`: a verl with other signatures is refused with one line
instead of failing in the middle of a run. Methods marked `REPLACED` are not called any more; for those the tests keep a
digest of verl's body, to notice when it changes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from importlib import metadata

from packaging.version import Version

from hapo_verl.config import ConfigError

READ_IN = "0.9.1"
SUPPORTED = (Version("0.9.1"), Version("0.10"))

EXTENDED, REPLACED = "extended", "replaced"


@dataclass(frozen=True)
class Override:
    """A private method of verl that this package extends, replaces or calls.

    Attributes:
        owner: dotted path of verl's class.
        method: its name.
        parameters: its parameter names in verl `READ_IN`, in order.
        how: `EXTENDED` (verl's method still runs) or `REPLACED` (it does not).
    """

    owner: str
    method: str
    parameters: tuple[str, ...]
    how: str = EXTENDED


_TRAINER = "verl.trainer.ppo.v1.trainer_base.PPOTrainer"
_WORKER = "verl.experimental.agent_loop.agent_loop.AgentLoopWorker"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl.FSDPEngineWithLMHead"
_WORKER_TQ = "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopWorkerTQ"
_TOOL_LOOP = "verl.experimental.agent_loop.tool_agent_loop.ToolAgentLoop"

OVERRIDES = (
    Override(_TRAINER, "_init_dataloader", ("self",)),
    Override(_TRAINER, "_build_replay_buffer", ("self",)),
    Override(_TRAINER, "_submit_batch_to_rollout", ("self", "batch")),
    Override(_TRAINER, "_save_checkpoint", ("self",)),
    Override(_TRAINER, "_load_checkpoint", ("self",)),
    Override(_TRAINER, "_balance_batch", ("self", "batch", "metrics", "logging_prefix", "keep_minibatch")),
    Override(_TRAINER, "_get_required_batch_multiple", ("self", "dp_size")),
    Override(_TRAINER, "_compute_old_log_prob", ("self", "batch", "metrics")),
    Override(_TRAINER, "_compute_advantage", ("self", "batch", "metrics"), REPLACED),
    Override(_TRAINER, "_update_actor", ("self", "batch", "metrics")),
    Override(_WORKER_TQ, "_run_prompt", ("self", "prompt", "sampling_params", "trajectory", "trace")),
    Override(_WORKER_TQ, "_agent_loop_postprocess", ("self", "output", "validate", "kwargs"), REPLACED),
    Override(_WORKER, "_run_agent_loop", ("self", "sampling_params", "trajectory", "agent_name", "trace", "kwargs")),
    Override(_ENGINE, "_build_fsdp_module", ("self", "module")),
    Override(_ENGINE, "forward_step", ("self", "micro_batch", "loss_function", "forward_only")),
    Override(_ENGINE, "prepare_model_inputs", ("self", "micro_batch")),
    Override(
        _ENGINE,
        "prepare_model_outputs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
        REPLACED,
    ),
    # `hapo_verl/rollout/tool_loop.py` writes the same tokens as these methods.
    Override(
        _TOOL_LOOP,
        "_handle_generating_state",
        ("self", "agent_data", "sampling_params", "ignore_termination"),
        REPLACED,
    ),
    Override(_TOOL_LOOP, "_handle_processing_tools_state", ("self", "agent_data"), REPLACED),
    Override(_TOOL_LOOP, "_build_assistant_message", ("self", "content", "agent_data"), REPLACED),
    Override(_TOOL_LOOP, "_call_tool", ("self", "tool_call", "tools_kwargs", "agent_data"), REPLACED),
    # Called, not overridden.
    Override(_TRAINER, "_rollout_server_managers", ("self",)),
    Override(_ENGINE, "_gather_and_unpad_packed", ("self", "tensor", "pad_size")),
    Override(_WORKER, "_compute_score", ("self", "outputs", "kwargs")),
    Override(_WORKER, "_compute_multi_modal_inputs", ("self", "output", "input_ids")),
    Override(
        _WORKER,
        "_compute_position_ids",
        ("self", "input_ids", "attention_mask", "multi_modal_inputs", "mm_processor_kwargs"),
    ),
)


def check_contract() -> None:
    """Raise `ConfigError` if this package does not support the installed verl."""
    import verl

    version = Version(verl.__version__)
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise ConfigError(
            f"verl=={version}: hapo-verl supports {SUPPORTED[0]} up to, not including, {SUPPORTED[1]}. "
            f"pip install 'verl>={SUPPORTED[0]},<{SUPPORTED[1]}'."
        )
    _check_trl()
    for override in OVERRIDES:
        found = parameters_of(override)
        if found != override.parameters:
            raise ConfigError(
                f"verl=={version}: {override.owner}.{override.method}({', '.join(found)}) has changed since verl "
                f"{READ_IN}, where it took ({', '.join(override.parameters)}). pip install verl=={READ_IN}."
            )


def _check_trl() -> None:
    """Raise `ConfigError` if a TRL is installed with which verl cannot load models.

    verl imports a class of TRL's PPO, if TRL is installed, and newer versions of TRL do not have that class.
    """
    if importlib.util.find_spec("trl") is None:
        return
    for module in ("trl.experimental.ppo", "trl"):
        try:
            if hasattr(importlib.import_module(module), "AutoModelForCausalLMWithValueHead"):
                return
        except ImportError:
            continue
    installed = next((found.version for found in metadata.distributions(name="trl")), "?")
    raise ConfigError(
        f"trl=={installed}: verl {READ_IN} loads no model where this TRL is installed, because it imports "
        "trl.AutoModelForCausalLMWithValueHead, which TRL no longer has. pip uninstall trl; hapo_verl.trl takes an "
        "environment of its own."
    )


def parameters_of(override: Override) -> tuple[str, ...]:
    """The parameter names of the installed verl's method; empty if the method does not exist."""
    method = verl_method(override)
    names = inspect.signature(method).parameters if method else ()
    # Ray adds a parameter of its own to the methods of an actor class.
    return tuple(name for name in names if name != "_ray_trace_ctx")


def verl_method(override: Override):
    """The function of the installed verl, or None if it does not exist."""
    module, _, name = override.owner.rpartition(".")
    owner = getattr(importlib.import_module(module), name, None)
    # Ray hides the class behind an actor handle.
    return getattr(getattr(owner, "__ray_actor_class__", owner), override.method, None)
