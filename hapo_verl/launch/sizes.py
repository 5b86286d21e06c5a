"""Checks that the sizes of a launch fit together; verl itself finds such errors only after models are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.config import ConfigError

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"


def check_sizes(config: DictConfig) -> str:
    """Check the sizes, and describe in one line how the rows of a step are divided.

    Raises:
        ConfigError: for the first number that does not fit.
    """
    for check in (_check_counts, _check_updates, _check_ranks, _check_micro_batches, _check_lengths, _check_servers):
        check(config)
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    prompts, ranks = config.data.train_batch_size, _ranks(config)
    return (
        f"{prompts} prompts x {n} rollouts = {prompts * n} rows a step, {prompts // actor.ppo_mini_batch_size} "
        f"update(s) of {actor.ppo_mini_batch_size * n // ranks} rows on each of {ranks} rank(s)"
    )


def tokens_at_a_time(config: DictConfig) -> int:
    """The largest number of tokens that one rank of the actor passes through the model at once."""
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz:
        return actor.ppo_max_token_len_per_gpu
    longest = config.data.max_prompt_length + config.data.max_response_length
    return (actor.ppo_micro_batch_size_per_gpu or 1) * longest // _sequence_parallel(config)


def _sequence_parallel(config: DictConfig) -> int:
    return config.actor_rollout_ref.actor.get("ulysses_sequence_parallel_size", 1) or 1


def _ranks(config: DictConfig) -> int:
    """The number of the actor's data-parallel ranks."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node // _sequence_parallel(config)


# Keys of counts that a launch needs, then keys of counts that may be null.
_COUNTS = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    f"{_ACTOR}.ppo_mini_batch_size",
    f"{_ACTOR}.ppo_epochs",
    f"{_ROLLOUT}.n",
    f"{_ROLLOUT}.tensor_model_parallel_size",
    f"{_ROLLOUT}.data_parallel_size",
    f"{_ROLLOUT}.pipeline_model_parallel_size",
    f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes",
)
_COUNTS_OR_NULL = (
    f"{_ACTOR}.ulysses_sequence_parallel_size",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{_ACTOR}.ppo_max_token_len_per_gpu",
    *(f"{block}.log_prob_micro_batch_size_per_gpu" for block in (_ROLLOUT, "actor_rollout_ref.ref")),
    *(f"{block}.log_prob_max_token_len_per_gpu" for block in (_ROLLOUT, "actor_rollout_ref.ref")),
    f"{_ROLLOUT}.max_model_len",
)


def _check_counts(config: DictConfig) -> None:
    for key in (*_COUNTS, *_COUNTS_OR_NULL):
        value = OmegaConf.select(config, key)
        if value is None and key in _COUNTS_OR_NULL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key}={value}: a count is a positive integer. Use a whole number of at least 1.")


def _check_updates(config: DictConfig) -> None:
    prompts, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if config.trainer.v1.trainer_mode.endswith("separate_async"):
        syncs = config.trainer.v1.separate_async.parameter_sync_step
        if prompts != syncs * mini:
            raise ConfigError(
                f"data.train_batch_size={prompts}: separate_async makes trainer.v1.separate_async.parameter_sync_step="
                f"{syncs} updates of {_ACTOR}.ppo_mini_batch_size={mini}. Use data.train_batch_size={syncs * mini}."
            )
    elif prompts % mini:
        raise ConfigError(
            f"{_ACTOR}.ppo_mini_batch_size={mini}: data.train_batch_size={prompts} is no multiple of it, and the last "
            f"update of a step would be filled with copies. Use {_ACTOR}.ppo_mini_batch_size={_divisor(prompts, mini)}."
        )


def _divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


def _check_ranks(config: DictConfig) -> None:
    gpus, parallel = config.trainer.nnodes * config.trainer.n_gpus_per_node, _sequence_parallel(config)
    if gpus % parallel:
        raise ConfigError(
            f"{_ACTOR}.ulysses_sequence_parallel_size={parallel}: {gpus} GPUs train. Use a divisor of {gpus}."
        )
    mini, n = config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n
    if mini * n % _ranks(config):
        raise ConfigError(
            f"{_ACTOR}.ppo_mini_batch_size={mini}: its {mini} x {n} rows cannot be divided evenly among "
            f"{_ranks(config)} data-parallel ranks. Use a size whose product with {_ROLLOUT}.n={n} can."
        )


def _forward_settings(config: DictConfig) -> Iterator[tuple[str, Any, bool, int]]:
    """For each forward pass: key and value of its fixed micro-batch size, whether it is dynamic, its token budget."""
    from verl.trainer.ppo.utils import need_reference_policy

    models = config.actor_rollout_ref
    yield (
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu",
        models.actor.ppo_micro_batch_size_per_gpu,
        models.actor.use_dynamic_bsz,
        models.actor.ppo_max_token_len_per_gpu,
    )
    for name in ("rollout", "ref") if need_reference_policy(config) else ("rollout",):
        block = models[name]
        yield (
            f"actor_rollout_ref.{name}.log_prob_micro_batch_size_per_gpu",
            block.log_prob_micro_batch_size_per_gpu,
            block.log_prob_use_dynamic_bsz,
            block.log_prob_max_token_len_per_gpu,
        )


def _check_micro_batches(config: DictConfig) -> None:
    rows = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // _ranks(config)
    longest = config.data.max_prompt_length + config.data.max_response_length
    for key, micro, dynamic, tokens in _forward_settings(config):
        if not dynamic and not micro:
            raise ConfigError(f"{key}={micro}: a number of rows is needed. Use {_ACTOR}.use_dynamic_bsz=true.")
        if not dynamic and rows % micro:
            raise ConfigError(
                f"{key}={micro}: a rank has {rows} rows of a mini-batch. Use a divisor of {rows}, or "
                f"{_ACTOR}.use_dynamic_bsz=true."
            )
        if dynamic and not tokens:
            budget = key.replace("micro_batch_size", "max_token_len")
            raise ConfigError(f"{budget}={tokens}: a number of tokens is needed. Use {budget}={longest} or more.")
        if dynamic and tokens * _sequence_parallel(config) < longest:
            budget = key.replace("micro_batch_size", "max_token_len")
            raise ConfigError(
                f"{budget}={tokens}: a row may have data.max_prompt_length + data.max_response_length = {longest} "
                f"tokens. Use {budget}={-(-longest // _sequence_parallel(config))} or more."
            )


def _check_lengths(config: DictConfig) -> None:
    window = config.actor_rollout_ref.rollout.max_model_len
    longest = config.data.max_prompt_length + config.data.max_response_length
    if window is not None and window < longest:
        raise ConfigError(
            f"{_ROLLOUT}.max_model_len={window}: prompts and responses may have {longest} tokens together. "
            f"Use {_ROLLOUT}.max_model_len={longest}."
        )


def _check_servers(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    server = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    pools = [config.trainer.nnodes * config.trainer.n_gpus_per_node]
    if config.trainer.v1.trainer_mode.endswith("separate_async"):
        pools.append(rollout.nnodes * rollout.n_gpus_per_node)
        if not pools[-1]:
            raise ConfigError(f"{_ROLLOUT}.nnodes={rollout.nnodes}: separate_async needs nodes that generate. Use 1.")
        if rollout.checkpoint_engine.backend == "naive":
            raise ConfigError(
                f"{_ROLLOUT}.checkpoint_engine.backend=naive: this backend sends no weights to other nodes. Use nccl."
            )
    for gpus in pools:
        if gpus % server:
            raise ConfigError(
                f"{_ROLLOUT}.tensor_model_parallel_size={rollout.tensor_model_parallel_size}: a server takes {server} "
                f"GPUs and there are {gpus}. Use a divisor of {gpus}."
            )
