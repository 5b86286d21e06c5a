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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

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
from hapo_verl.actor.head import choose_head
from hapo_verl.actor.loss import TRAINED, demonstration_means, hapo_loss, token_means
from hapo_verl.algo.advantage import session_advantage
from hapo_verl.algo.demonstration import Response
from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.driver.gatekeeper import Gatekeeper
from hapo_verl.driver.idle_rows import counted, savings
from hapo_verl.driver.metrics import group_metrics, silence
from hapo_verl.driver.mini_batches import Reduced, grown_mini_batch, order_of_whole_groups, reduced
from hapo_verl.driver.own_past import shortest_successes
from hapo_verl.driver.progress import Progress
from hapo_verl.driver.rollouts import Rollouts
from hapo_verl.driver.watch import Stall, Watch
from hapo_verl.launch import checks
from hapo_verl.protocol import jagged
from hapo_verl.protocol.rows import (
    APPENDED,
    DEMONSTRATION,
    GROUP,
    MINI_BATCH,
    OWN_OLD_LOG_PROBS,
    OWN_SUCCESS,
    ROLLOUTS,
    SINGLE_UPDATE,
    SITUATION,
    TRACED,
    demonstration_flags,
    plain_values,
)
from hapo_verl.protocol.trace import Trace
from hapo_verl.rollout.reward import RewardError

logger = logging.getLogger("verl." + __name__)

# verl's metrics of the pass for old log-probs, by the names that they have where it is not over all rows.
_OF_THE_PASS = {"actor/entropy": TRAINED + "entropy", "training/rollout_": TRAINED + "rollout_"}


class HapoTrainer(PPOTrainer):
    """What HAPO adds to verl's trainer, in front of one of its three modes.

    Overrides of verl's private methods are listed, with the version they were read in, in `contract.py`.
    """

    def __init__(self, config: Any) -> None:
        checks.check_before_ray(config)
        self.hapo = checks.check_launch(config)
        checks.check_cluster()
        choose_head(config, self.hapo)
        self._leaves_out = savings(config, self.hapo)
        for line in self._leaves_out.lines():
            logger.warning("hapo: %s", line)
        if self.hapo.trace_dir is not None:
            # The actors write into it too, and may stand in another folder.
            self.hapo = replace(self.hapo, trace_dir=str(Path(self.hapo.trace_dir).absolute()))
        self.trace = Trace.of(self.hapo)
        # Of the batch in training: rows, appended ones among them, and what mini-batches they make.
        self._rows, self._appended, self._prompts_per_mini_batch = 0, 0, None
        # Rows of each group, where no mini-batch may cut one.
        self._group_sizes: list[int] | None = None
        self._dp_size = 1
        # Of the batch in training the rows that are computed; None: all of them.
        self._reduced: Reduced | None = None
        self.timing_raw: dict[str, float] = {}
        self._watch: Watch | None = None
        # None: each prompt gets rollout.n of them.
        self._rollouts: Rollouts | None = None
        if self.hapo.rollouts.allocate == "posterior":
            self._rollouts = Rollouts(self.hapo.rollouts, config.actor_rollout_ref.rollout.n)
        # The first groups of this run have been looked at.
        self._heard = False
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
        if self._rollouts is not None:
            assign_non_tensor_stack(batch, ROLLOUTS, self._rollouts.allocate(situations))
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

    def _balance_batch(self, batch: Any, metrics: dict, *args: Any, **kwargs: Any) -> Any:
        if not batch.keys:
            raise RewardError(
                f"step {self.global_steps}: no rollout has a reward, so there is nothing to train on. Look for the "
                "error of the reward function, or of the agent loop, in the lines of the agent loop worker above."
            )
        self._rows, self._appended = len(batch.keys), sum(bool(tag.get(APPENDED)) for tag in batch.tags)
        if self.hapo.objective.whole_groups:
            self._group_sizes = list(Counter(_split_keys(batch.keys)[0]).values())
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        mini_batches = len(batch.keys) // self._mini_batch_rows
        if self.hapo.objective.whole_groups and mini_batches > 1:
            prompt_of, _, _ = _split_keys(batch.keys)
            lengths = torch.tensor([tag["seq_len"] for tag in batch.tags], dtype=torch.int64)
            loads = calculate_workload(lengths).tolist()
            batch.reorder(order_of_whole_groups(prompt_of, loads, mini_batches, self._dp_size))
        self._reduced = None
        if not self._leaves_out.idle_scores:
            # Rewards are all that advantages need, and the passes that follow need to know them.
            with marked_timer("adv", self.timing_raw, color="brown"):
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

    def init(self) -> None:
        # From here on: a cluster that is too small lets the start wait for ever.
        self._start_watch()
        super().init()

    def on_init_end(self) -> None:
        # What follows sends the first weights, which hangs where a server is dead.
        self._watch_members()
        super().on_init_end()
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(hapo_loss, config=actor, hapo=self.hapo))

    def fit(self, agent_loop_manager: Any) -> None:
        if self._watch and self.hapo.watch_interval is not None:
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
        """Watch this trainer, and what it will wait for."""
        hapo, trainer = self.hapo, self.config.trainer
        if all(seconds is None for seconds in (hapo.watch_interval, hapo.stall_report, hapo.stall_limit)):
            return
        folder = Path(trainer.default_local_dir)
        self._watch = Watch(
            interval=hapo.watch_interval or cast("float", HapoConfig.watch_interval),
            stall=Stall(Progress(self).position, hapo.stall_report, hapo.stall_limit, folder),
            advice="Start it again with trainer.resume_mode=auto: it goes on from its last checkpoint."
            if trainer.save_freq > 0
            else f"No checkpoint is saved, for trainer.save_freq={trainer.save_freq}: start it again from step 1.",
        )
        self._watch.start()

    def _watch_members(self) -> None:
        """Watch all that this run waits for."""
        if self._watch is None or self.hapo.watch_interval is None:
            return
        replicas = [replica for manager in self._rollout_server_managers() for replica in manager.get_replicas()]
        training = self.actor_rollout_wg.workers
        engine = self.config.actor_rollout_ref.rollout.name
        servers = _named(f"{engine} server", [server for replica in replicas for server in replica.servers])
        self._watch.over(
            {"TransferQueue": ray.get_actor("TransferQueueController", namespace="transfer_queue")}
            | _named("training worker", training)
            | servers
            | _named("rollout worker", [w for replica in replicas for w in replica.workers if w not in training])
            | _named("reward worker", self.reward_loop_manager.reward_loop_workers),
            # Other engines answer other questions.
            _named("vllm engine", [replica.server_address for replica in replicas]) if engine == "vllm" else {},
            servers if engine == "vllm" else {},
        )

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        """Those of all rows; or of the rows that are trained on, if the update does not bring its own."""
        if self._leaves_out.idle_scores:
            return self._score(batch, metrics)
        if not self._brings_old_log_probs(batch):
            of_the_pass: dict[str, Any] = {}
            self._score(self._rows_to_compute(batch, self._forward_micro_batch), of_the_pass)
            for name, value in of_the_pass.items():
                verls = next((prefix for prefix in _OF_THE_PASS if name.startswith(prefix)), "")
                metrics[_OF_THE_PASS.get(verls, "") + name.removeprefix(verls)] = value
        return batch

    def _score(self, batch: Any, metrics: dict) -> Any:
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
            return batch
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
        metrics.update(calculate_debug_metrics(DataProto(batch=TensorDict(tokens, batch_size=1))))
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        """Nothing, where they came first."""
        return self._write_advantages(batch, metrics) if self._leaves_out.idle_scores else batch

    def _write_advantages(self, batch: Any, metrics: dict) -> Any:
        """Advantages from one score a row, written as verl's trainer writes them, without a padded (B, T)."""
        fields = ["response_mask", "rm_scores", DEMONSTRATION, GROUP]
        corrects = self._corrects_rollouts and bool(self._leaves_out.idle_scores)
        if corrects:
            fields += ["rollout_log_probs", "old_log_probs"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        demonstration_B = demonstration_flags(data)
        real_B = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        output = self._correct_rollouts(data, ~demonstration_B & real_B, metrics) if corrects else {}

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
        tokens_B = jagged.row_sums(data["response_mask"])
        advantage_B = self.hapo.objective.advantage(advantage_B, demonstration_B, tokens_B)
        advantages = jagged.spread(advantage_B, mask)
        output.update({"advantages": advantages, "returns": advantages})
        if not self._leaves_out.idle_rows and self._mini_batches_are_known(batch):
            active_B = jagged.row_sums(mask)
            keep_B = self.hapo.objective.has_gradient(advantage_B, score_B, group_B) & (active_B > 0)
            # verl's workers count `loss_mask`, which rollout correction leaves alone.
            mini_batches = len(batch.keys) // self._mini_batch_rows
            output[MINI_BATCH] = counted(tokens_B, active_B, demonstration_B, group_B, mini_batches, self._dp_size)
            metrics.update(self._reduce(batch, keep_B, real_B, tokens_B))

        groups = dict(zip(prompt_of, plain_values(data[GROUP]), strict=True))
        groups = {uid: groups[uid] for uid, keep in zip(prompt_of, real_B.tolist(), strict=True) if keep}
        own_B = torch.tensor([groups.get(uid, {}).get("own_step") is not None for uid in prompt_of])
        metrics.update(
            group_metrics(
                groups,
                demonstration_B=demonstration_B[real_B],
                own_B=(demonstration_B & own_B)[real_B],
                tokens_B=tokens_B[real_B],
            )
        )
        if self._rollouts is not None:
            metrics.update(self._rollouts.metrics(groups.values()))
        if not self._heard:
            self._heard = True
            if (advice := silence(groups)) is not None:
                logger.warning("hapo: step %d: %s", self.global_steps, advice)
        self.gatekeeper.observe(groups.values())
        self._remember(batch, prompt_of, real_B & (jagged.row_sums(mask) == tokens_B), groups, metrics)
        if self.trace.is_on:
            with marked_timer("hapo_trace", self.timing_raw):
                self._write_trace(batch, prompt_of, real_B, groups)
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(output, batch_size=len(batch))
        )

    def _remember(self, batch: Any, prompt_of: list[str], whole_B: Tensor, groups: Any, metrics: dict) -> None:
        """The policy's successes of this update, where they are kept."""
        past = self.gatekeeper.own_past
        if past is None:
            return
        keys = {uid: group["key"] for uid, group in groups.items()}
        rows, responses = shortest_successes(batch.tags, prompt_of, whole_B.tolist(), keys), []
        if rows:
            data = tq.kv_batch_get(
                keys=[batch.keys[row] for row in rows],
                partition_id=batch.partition_id,
                select_fields=["responses", "response_mask"],
            )
            columns = zip(plain_values(data["responses"]), plain_values(data["response_mask"]), strict=True)
            responses = [Response(*of, *batch.tags[row][OWN_SUCCESS]) for row, of in zip(rows, columns, strict=True)]
        successes = [(keys[prompt_of[row]], response) for row, response in zip(rows, responses, strict=True)]
        past.observe(successes, self.global_steps)
        metrics.update(past.metrics())

    def _write_trace(self, batch: Any, prompt_of: list[str], real_B: Tensor, groups: Any) -> None:
        """Trace all groups, and all rows of some: the actors see only the rows that train."""
        self.trace.launch(self.config, self.hapo, self.global_steps)
        self.trace.groups(self.global_steps, groups)
        chosen = self.trace.sample(groups)
        rows = [i for i, uid in enumerate(prompt_of) if uid in chosen and real_B[i]]
        if not rows:
            return
        fields = ["prompts", "responses", "rm_scores", DEMONSTRATION]
        data = tq.kv_batch_get(
            keys=[batch.keys[i] for i in rows], partition_id=batch.partition_id, select_fields=fields
        )
        data["score"] = jagged.row_sums(data["rm_scores"])
        self.trace.rows(
            self.global_steps,
            [prompt_of[i] for i in rows],
            data,
            ["prompts", "responses", "score", DEMONSTRATION],
        )

    def _mini_batches_are_known(self, batch: Any) -> bool:
        """What the workers make of this batch: not so where they shuffle, or where no update follows."""
        mini_batches, rest = divmod(len(batch.keys), self._mini_batch_rows)
        shuffles = self.config.actor_rollout_ref.actor.shuffle and mini_batches > 1
        return not rest and not shuffles and self.config.trainer.critic_warmup <= self.global_steps

    def _reduce(self, batch: Any, keep_B: Tensor, real_B: Tensor, tokens_B: Tensor) -> dict[str, float]:
        """Choose the rows that are computed; their shares of the batch, padding left out."""
        actor, micro_batch = self.config.actor_rollout_ref.actor, None
        if not actor.use_dynamic_bsz:
            micro_batch = actor.ppo_micro_batch_size_per_gpu
            if not self._leaves_out.idle_scores and not self._brings_old_log_probs(batch):
                micro_batch = min(micro_batch, self.config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu)
        self._reduced = reduced(
            keep_B.tolist(),
            [tag["seq_len"] for tag in batch.tags],
            len(batch.keys) // self._mini_batch_rows,
            self._dp_size,
            micro_batch,
        )
        computed_B = torch.zeros_like(real_B)
        computed_B[self._reduced.order] = True
        computed_B &= real_B
        return {
            TRAINED + "row_share": int(computed_B.sum()) / max(int(real_B.sum()), 1),
            TRAINED + "token_share": int(tokens_B[computed_B].sum()) / max(int(tokens_B[real_B].sum()), 1),
        }

    def _rows_to_compute(self, batch: Any, micro_batch: int | None) -> Any:
        """These of the batch; on each rank in fixed micro-batches of this size, where there are such."""
        if self._reduced is None or len(self._reduced.order) == len(batch.keys):
            return batch
        part = batch.select_keys([batch.keys[row] for row in self._reduced.order])
        if micro_batch is not None:
            part.extra_info["micro_batch_size_per_gpu"] = micro_batch
        return part

    @property
    def _forward_micro_batch(self) -> int | None:
        """The largest that verl would take and that divides a rank's rows to compute."""
        rollout = self.config.actor_rollout_ref.rollout
        if rollout.log_prob_use_dynamic_bsz or self._reduced is None:
            return None
        rows = len(self._reduced.order) // self._dp_size
        return next(size for size in range(rollout.log_prob_micro_batch_size_per_gpu, 0, -1) if rows % size == 0)

    def _is_single_update(self, batch: Any) -> bool:
        """The policy in the update is the one that old log-probs are of."""
        once = len(batch.keys) == self._mini_batch_rows and self.config.actor_rollout_ref.actor.ppo_epochs == 1
        # Later ones of a cycle are compared with the policy at its start.
        return once and self.local_trigger_step == 0

    def _brings_old_log_probs(self, batch: Any) -> bool:
        """The update's own log-probs serve as old ones, so that no pass is needed."""
        return not self._leaves_out.old_log_probs and self._is_single_update(batch)

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

    @property
    def _corrects_rollouts(self) -> bool:
        """verl compares rollout and actor by row, and corrects where it is told to, if this block is there at all."""
        correction = self.config.algorithm.get("rollout_correction", None)
        return correction is not None and self.config.actor_rollout_ref.rollout.calculate_log_probs

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
        configured = actor.ppo_mini_batch_size, rollout.n
        rows = self._rows_to_compute(batch, self._reduced and self._reduced.micro_batch)
        rows.extra_info[SINGLE_UPDATE] = self._is_single_update(batch)
        rows.extra_info[OWN_OLD_LOG_PROBS] = self._brings_old_log_probs(batch)
        if self.trace.sampled is not None:
            rows.extra_info[TRACED] = ",".join(self.trace.sampled)
        # verl multiplies the two.
        if self._reduced is not None and rows is not batch:
            actor.ppo_mini_batch_size, rollout.n = self._reduced.rows, 1
        else:
            actor.ppo_mini_batch_size = self._prompts_per_mini_batch or configured[0]
        try:
            super()._update_actor(rows, metrics)
        finally:
            actor.ppo_mini_batch_size, rollout.n = configured
        metrics.update(token_means(metrics))
        metrics.update(demonstration_means(metrics))
        for name in [name for name in metrics if name.startswith("actor/hapo/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch


def _named(what: str, members: Iterable[Any]) -> dict[str, Any]:
    """Members by what they are and their number."""
    return {f"{what} {number}": member for number, member in enumerate(members)}


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
