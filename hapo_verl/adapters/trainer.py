"""The HAPO trainers: verl's three trainer modes with one class in front.

    hapo_sync            PPOTrainerSync
    hapo_colocate_async  PPOTrainerColocateAsync
    hapo_separate_async  PPOTrainerSeparateAsync

It checks the launch before anything is started, gives the actor the HAPO loss, keeps demonstrations out of what
compares two policies, computes advantages from one score a row, and logs under `hapo/`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.v1 import (
    PPOTrainer,
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.utils.seqlen_balancing import calculate_workload
from verl.utils.tensordict_utils import assign_non_tensor_stack

from hapo_kernels.segment_norm import segment_ids
from hapo_verl.adapters import checks, jagged
from hapo_verl.adapters.gatekeeper import Gatekeeper
from hapo_verl.adapters.head import choose_head
from hapo_verl.adapters.idle_rows import (
    compares_rollouts,
    corrects_rollouts,
    needs_old_log_probs,
    over_trained_rows,
    why_no_row_is_left_out,
)
from hapo_verl.adapters.loss import hapo_loss, token_means
from hapo_verl.adapters.metrics import group_metrics
from hapo_verl.adapters.mini_batches import (
    grown_mini_batch,
    micro_batches_fit,
    mini_batch_of_rows,
    order_of_trained_rows,
    order_of_whole_groups,
)
from hapo_verl.adapters.rows import (
    APPENDED,
    DEMONSTRATION,
    GROUP,
    OPTIMIZER_STEP,
    ROWS_LEFT_OUT,
    SINGLE_UPDATE,
    SITUATION,
    demonstration_flags,
    plain_values,
)
from hapo_verl.adapters.trace import Trace
from hapo_verl.adapters.watch import Watch
from hapo_verl.algo.advantage import session_advantage
from hapo_verl.config import ConfigError

logger = logging.getLogger("verl." + __name__)


class HapoTrainer(PPOTrainer):
    """What HAPO adds to verl's trainer, in front of one of its three modes.

    Overrides of verl's private methods are listed, with the version they were read in, in `contract.py`.
    """

    # Of the step in training: it has its advantages; the rows it trains on, None: all of them; of the policy's own
    # tokens the share that these rows have.
    _has_advantages = False
    _trained: Any = None
    _trained_share = 1.0
    _mini_batches = 1

    def __init__(self, config: Any) -> None:
        self.hapo = checks.check_launch(config)
        checks.check_cluster()
        choose_head(config, self.hapo)
        kept = why_no_row_is_left_out(config, self.hapo)
        if kept and self.hapo.skip_idle_rows:
            logger.warning("hapo.skip_idle_rows=true: all rows are scored and trained on, %s", kept)
        self._timing: dict[str, float] = {}
        self.trace = Trace(self.hapo.trace_dir)
        # Of the batch in training: rows, appended ones among them, and what mini-batches they make.
        self._rows, self._appended, self._prompts_per_mini_batch = 0, 0, None
        # Rows of each group, where no mini-batch may cut one.
        self._group_sizes: list[int] | None = None
        self._dp_size = 1
        self._watch: Watch | None = None
        super().__init__(config)

    @property
    def trainer_mode(self) -> str:
        """verl's name of the mode: it is compared in several places and names a configuration block."""
        return self._trainer_mode

    @trainer_mode.setter
    def trainer_mode(self, name: str) -> None:
        self._trainer_mode = name.removeprefix("hapo_")

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        checks.check_demonstrations(self.train_dataset, self.tokenizer, self.config, self.hapo)
        self.gatekeeper = Gatekeeper(self.hapo, total_steps=self.total_training_steps)
        self.gatekeeper.know(
            getattr(self.train_dataset, "dataframe", self.train_dataset), prompt_column=self.config.data.prompt_key
        )

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        names = {"raw_prompt", "data_source", "extra_info", self.config.data.prompt_key}
        columns = {name: plain_values(batch[name]) for name in names if name in batch}
        situations = self.gatekeeper.situations(columns, self.global_steps, prompt_column=self.config.data.prompt_key)
        assign_non_tensor_stack(batch, SITUATION, situations)
        return super()._submit_batch_to_rollout(batch)

    def _save_checkpoint(self) -> None:
        # Before verl's own, whose last act is to declare the checkpoint complete.
        self.gatekeeper.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            trainer = self.config.trainer
            explicit = trainer.resume_from_path if trainer.resume_mode == "resume_path" else None
            self.gatekeeper.load(Path(explicit or Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"))

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> Any:
        self._timing = timing_raw
        return super()._step_once(metrics, timing_raw, sample_batch_size)

    def _balance_batch(self, batch: Any, metrics: dict, *args: Any, **kwargs: Any) -> Any:
        """verl's, then advantages: they need rewards alone, and say which rows are worth scoring and training on."""
        self._rows, self._appended = len(batch.keys), sum(bool(tag.get(APPENDED)) for tag in batch.tags)
        if self.hapo.objective.whole_groups:
            self._group_sizes = list(Counter(_split_keys(batch.keys)[0]).values())
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        self._mini_batches = len(batch.keys) // self._mini_batch_rows
        if self.hapo.objective.whole_groups and self._mini_batches > 1:
            prompt_of, _, _ = _split_keys(batch.keys)
            batch.reorder(order_of_whole_groups(prompt_of, _loads(batch.tags), self._mini_batches, self._dp_size))
        self._trained, self._trained_share = None, 1.0
        self._has_advantages = not corrects_rollouts(self.config)
        if self._has_advantages:
            # Under the name of the place where verl has them.
            with marked_timer("adv", self._timing, color="brown"):
                self._write_advantages(batch, metrics)
        return batch

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        """verl's, or the size at which appended rows make no further optimizer step and no group is cut.

        verl pads a batch to whole mini-batches of `ppo_mini_batch_size * n` rows. Appended rows would open another
        mini-batch, mostly padding, whose few rows weigh as much as all others.
        """
        self._dp_size, self._prompts_per_mini_batch = dp_size, None
        if not self._appended and self._group_sizes is None:
            return super()._get_required_batch_multiple(dp_size)
        updates, self._prompts_per_mini_batch = grown_mini_batch(
            self.config.actor_rollout_ref, self._rows, self._appended, dp_size, self._group_sizes
        )
        return updates * self._mini_batch_rows

    @property
    def _mini_batch_rows(self) -> int:
        """Rows of an optimizer step, padding included."""
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        return (self._prompts_per_mini_batch or actor.ppo_mini_batch_size) * rollout.n

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        if self.hapo.poll_interval is not None:
            buffer.poll_interval = self.hapo.poll_interval
        return buffer

    def on_init_end(self) -> None:
        # What follows sends the first weights, which hangs where a server is dead.
        self._start_watch()
        super().on_init_end()
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(hapo_loss, config=actor, hapo=self.hapo))

    def fit(self, agent_loop_manager: Any) -> None:
        if self._watch:
            self._watch.over(_named("agent loop worker", agent_loop_manager.agent_loop_workers))
        failed = False
        try:
            super().fit(agent_loop_manager)
        except Exception:
            failed = True
            raise
        finally:
            if self._watch:
                self._watch.stop(failed=failed)

    def _start_watch(self) -> None:
        """Watch all that this run waits for."""
        interval, trainer = self.hapo.watch_interval, self.config.trainer
        if interval is None:
            return
        replicas = [replica for manager in self._rollout_server_managers() for replica in manager.get_replicas()]
        training = self.actor_rollout_wg.workers
        self._watch = Watch(
            interval=interval,
            advice="Start it again with trainer.resume_mode=auto: it goes on from its last checkpoint."
            if trainer.save_freq > 0
            else f"No checkpoint is saved, for trainer.save_freq={trainer.save_freq}: start it again from step 1.",
        )
        engine = self.config.actor_rollout_ref.rollout.name
        self._watch.over(
            {"TransferQueue": ray.get_actor("TransferQueueController", namespace="transfer_queue")}
            | _named("training worker", training)
            | _named(f"{engine} server", [server for replica in replicas for server in replica.servers])
            | _named("rollout worker", [w for replica in replicas for w in replica.workers if w not in training])
            | _named("reward worker", self.reward_loop_manager.reward_loop_workers),
            # Other engines answer other questions.
            _named("vllm engine", [replica.server_address for replica in replicas]) if engine == "vllm" else {},
        )
        self._watch.start()

    @property
    def _single_update(self) -> bool:
        """The step is one update, of the policy that its old log-probs would be of."""
        # separate_async scores all updates of a cycle with the policy of the first.
        cycle = self.trainer_mode == "separate_async" and self.parameter_sync_step > 1
        return self._mini_batches == 1 and self.config.actor_rollout_ref.actor.ppo_epochs == 1 and not cycle

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        """Of the rows that are trained on, where the update does not have them itself."""
        if needs_old_log_probs(self.config, self.hapo, single_update=self._single_update):
            found: dict[str, Any] = {}
            self._score(self._trained or batch, found)
            metrics.update(self._of_trained_rows(found))
        return batch

    def _of_trained_rows(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Metrics of old log-probs under their names: verl's where all rows of this run are scored."""
        return metrics if why_no_row_is_left_out(self.config, self.hapo) else over_trained_rows(metrics)

    def _score(self, batch: Any, metrics: dict) -> None:
        """verl's, then: a demonstration was sampled by nobody, so its rollout log-probs are its old log-probs.

        Rollout correction then gives it weight 1. verl's comparison of rollout and actor is made here, without it, and
        not by verl: that would read every token twice.
        """
        rollout = self.config.actor_rollout_ref.rollout
        compare, rollout.calculate_log_probs = rollout.calculate_log_probs, False
        try:
            batch = super()._compute_old_log_prob(batch, metrics)
        finally:
            rollout.calculate_log_probs = compare
        if not compare:
            return
        fields = ["response_mask", "rollout_log_probs", "old_log_probs", DEMONSTRATION]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        demonstration_B = demonstration_flags(data)
        injected = [key for key, flag in zip(batch.keys, demonstration_B.tolist(), strict=True) if flag]
        if injected:
            old = jagged.select(data["old_log_probs"], demonstration_B)
            tq.kv_batch_put(
                keys=injected,
                partition_id=batch.partition_id,
                fields=TensorDict({"rollout_log_probs": old}, batch_size=len(injected)),
            )
        # verl's comparison takes rows of any length, and one of all tokens needs no padding.
        tokens = {name: jagged.in_one_row(data[name]) for name in ("rollout_log_probs", "old_log_probs")}
        mask = jagged.in_one_row(jagged.without(data["response_mask"], demonstration_B))
        # Of `responses` only the width is read.
        tokens |= {"response_mask": mask, "responses": mask}
        # Where rows are left out, those that remain may all be demonstrations.
        if mask.any():
            metrics.update(calculate_debug_metrics(DataProto(batch=TensorDict(tokens, batch_size=1))))

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        """Advantages where they had to wait for rollout correction; elsewhere its metrics alone."""
        if not self._has_advantages:
            return self._write_advantages(batch, metrics)
        scored = needs_old_log_probs(self.config, self.hapo, single_update=self._single_update)
        if scored and compares_rollouts(self.config):
            trained, found = self._trained or batch, {}
            fields = ["response_mask", DEMONSTRATION, "rollout_log_probs", "old_log_probs"]
            data = tq.kv_batch_get(keys=trained.keys, partition_id=trained.partition_id, select_fields=fields)
            sampled_B = ~demonstration_flags(data) & _is_real(trained.tags)
            if sampled_B.any():
                self._correct_rollouts(data, sampled_B, found)
            metrics.update(self._of_trained_rows(found))
        return batch

    def _write_advantages(self, batch: Any, metrics: dict) -> Any:
        """Advantages from one score a row, written as verl's trainer writes them, without a padded (B, T)."""
        fields = ["response_mask", "rm_scores", DEMONSTRATION, GROUP]
        correct = not self._has_advantages and compares_rollouts(self.config)
        if correct:
            fields += ["rollout_log_probs", "old_log_probs"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        demonstration_B = demonstration_flags(data)
        real_B = _is_real(batch.tags)
        output = self._correct_rollouts(data, ~demonstration_B & real_B, metrics) if correct else {}

        mask = output["response_mask"] if "response_mask" in output else data["response_mask"]
        score_B = jagged.row_sums(data["rm_scores"])
        prompt_of, session_of, output_B = _split_keys(batch.keys)
        group_B = segment_ids(prompt_of)
        advantage_B = session_advantage(
            score_B,
            group_B,
            segment_ids(session_of),
            output_B,
            scale_by_std=bool(self.config.algorithm.get("norm_adv_by_std_in_grpo", True)),
            apart_B=demonstration_B if self._statistics == "on_policy" else None,
        )
        self._check_scores(score_B)
        advantage_B = self.hapo.objective.advantage(advantage_B, demonstration_B)
        advantages = jagged.spread(advantage_B, mask)
        output.update({"advantages": advantages, "returns": advantages})

        tokens_B = jagged.row_sums(data["response_mask"])
        trained_B = torch.ones(len(batch), dtype=torch.bool)
        if self._has_advantages and not why_no_row_is_left_out(self.config, self.hapo):
            # Padding and rows that a tool wrote alone have no token that trains.
            trains_B = tokens_B > 0
            trains_B[trains_B.clone()] = self.hapo.objective.trains(
                *(value_B[tokens_B > 0] for value_B in (score_B, group_B, advantage_B))
            )
            trained_B = self._leave_out(batch, trains_B)
        own_B = tokens_B * ~demonstration_B
        self._trained_share = _share(own_B, trained_B)
        metrics["hapo/trained/row_share"] = _share(real_B.long(), trained_B)
        metrics["hapo/trained/token_share"] = _share(tokens_B, trained_B)
        if self._trained is not None:
            output[OPTIMIZER_STEP] = self._whole_steps(tokens_B, group_B)

        groups = dict(zip(prompt_of, plain_values(data[GROUP]), strict=True))
        groups = {uid: groups[uid] for uid, keep in zip(prompt_of, real_B.tolist(), strict=True) if keep}
        metrics.update(
            group_metrics(
                groups,
                demonstration_B=demonstration_B[real_B],
                tokens_B=tokens_B[real_B],
            )
        )
        self.gatekeeper.observe(groups.values())
        self.trace.groups(self.global_steps, groups)
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(output, batch_size=len(batch))
        )

    @property
    def _statistics(self) -> str:
        """With whom the policy's own rows are compared."""
        return self.hapo.advantage.statistics or ("on_policy" if self.hapo.injection.mode == "append" else "all")

    def _check_scores(self, score_B: Tensor) -> None:
        if self.hapo.objective.binary_scores:
            other = score_B[(score_B != 0) & (score_B != 1)]
            if other.numel():
                raise ConfigError(
                    f"hapo.objective.name={self.hapo.objective.name}: a reward is {other[0].item():g}, and this "
                    "objective takes rewards for labels, 0 or 1. Use a binary reward function, or "
                    "hapo.objective.name=surrogate."
                )

    def _leave_out(self, batch: Any, trains_B: Tensor) -> Tensor:
        """Shrink what is scored and trained on to the rows with a gradient, and what their mini-batches need.

        Returns:
            (B,) bool: the rows that remain.
        """
        settings, forward = (
            self.config.actor_rollout_ref,
            needs_old_log_probs(self.config, self.hapo, single_update=self._single_update),
        )
        order = order_of_trained_rows(
            trains_B.tolist(),
            [tag["seq_len"] for tag in batch.tags],
            _loads(batch.tags),
            self._mini_batches,
            self._dp_size,
            lambda rows: micro_batches_fit(settings, self._mini_batches, rows, forward=forward),
        )
        if len(order) == len(batch):
            return torch.ones_like(trains_B)
        self._trained = batch.select_keys([batch.keys[row] for row in order])
        return torch.zeros_like(trains_B).index_fill_(0, torch.tensor(order), True)

    def _whole_steps(self, tokens_B: Tensor, group_B: Tensor) -> Tensor:
        """(B, 3) `OptimizerStep` of each row, all rows of the batch counted."""
        step_B = torch.tensor(mini_batch_of_rows(len(tokens_B), self._mini_batches, self._dp_size))
        of_step = []
        for number in range(self._mini_batches):
            here_B = step_B == number
            groups = group_B[here_B & (tokens_B > 0)].unique().numel()
            of_step.append([int(tokens_B[here_B].sum()), int(here_B.sum()), groups])
        return torch.tensor(of_step)[step_B]

    def _correct_rollouts(self, data: TensorDict, sampled_B: Tensor, metrics: dict) -> dict[str, Tensor]:
        """verl's rollout correction over the sampled rows; a demonstration keeps weight 1 and all of its tokens.

        Log-probs leave `data`: padded, as verl wants them, they are as large again.
        """
        correction, mask = self.config.algorithm.rollout_correction, data["response_mask"]
        rows = {name: jagged.padded(data.pop(name), sampled_B) for name in ("rollout_log_probs", "old_log_probs")}
        # A mask of int64 would be the largest tensor of all.
        rows["response_mask"] = jagged.padded(mask.bool(), sampled_B)
        sampled, correction_metrics = compute_rollout_correction_and_add_to_batch(
            DataProto(batch=TensorDict(rows, batch_size=int(sampled_B.sum()))), correction
        )
        metrics.update(correction_metrics)
        corrected = {}
        if correction.get("rollout_rs", None) is not None:
            corrected["response_mask"] = jagged.with_rows(mask, sampled_B, sampled.batch["response_mask"])
        if "rollout_is_weights" in sampled.batch:
            weights = sampled.batch["rollout_is_weights"]
            ones = jagged.spread(torch.ones(len(mask), dtype=weights.dtype), torch.ones_like(mask))
            corrected["rollout_is_weights"] = jagged.with_rows(ones, sampled_B, weights)
        return corrected

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        trained = self._trained or batch
        trained.extra_info[SINGLE_UPDATE] = self._single_update
        trained.extra_info[ROWS_LEFT_OUT] = self._trained is not None
        configured = actor.ppo_mini_batch_size, rollout.n
        # What is left of a mini-batch need not be whole groups: verl is to multiply by 1.
        actor.ppo_mini_batch_size, rollout.n = len(trained) // self._mini_batches, 1
        try:
            super()._update_actor(trained, metrics)
        finally:
            actor.ppo_mini_batch_size, rollout.n = configured
        all_rows = why_no_row_is_left_out(self.config, self.hapo)
        metrics.update(token_means(metrics, trained_share=None if all_rows else self._trained_share))
        for name in [name for name in metrics if name.startswith("actor/hapo/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch


def _named(what: str, members: Iterable[Any]) -> dict[str, Any]:
    """Members by what they are and their number."""
    return {f"{what} {number}": member for number, member in enumerate(members)}


def _is_real(tags: list[dict[str, Any]]) -> Tensor:
    """(B,) bool: False on padding."""
    return torch.tensor([not tag.get("is_padding", False) for tag in tags])


def _loads(tags: list[dict[str, Any]]) -> list[int]:
    """What each row costs, as verl reckons."""
    return calculate_workload(torch.tensor([tag["seq_len"] for tag in tags], dtype=torch.int64)).tolist()


def _share(count_B: Tensor, part_B: Tensor) -> float:
    return count_B[part_B].sum().item() / max(1, count_B.sum().item())


def _split_keys(keys: list[str]) -> tuple[list[str], list[str], Tensor]:
    """Prompt, session and position of each row from verl's `{uid}_{session}_{index}`."""
    parts = [key.rsplit("_", 2) for key in keys]
    prompt_of = [uid for uid, _, _ in parts]
    session_of = [f"{uid}_{session}" for uid, session, _ in parts]
    return prompt_of, session_of, torch.tensor([int(index) for _, _, index in parts])


@register_trainer("hapo_sync")
class HapoTrainerSync(HapoTrainer, PPOTrainerSync):
    """Rollout and training take turns on the same devices."""


@register_trainer("hapo_colocate_async")
class HapoTrainerColocateAsync(HapoTrainer, PPOTrainerColocateAsync):
    """The same devices; unfinished rollouts go on under the next weights."""


@register_trainer("hapo_separate_async")
class HapoTrainerSeparateAsync(HapoTrainer, PPOTrainerSeparateAsync):
    """Rollout and training on devices of their own."""
