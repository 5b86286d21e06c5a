"""Steps of HAPO's and of verl's trainer on verl's own worker and FSDP2 engine, in gloo processes.

Every rank runs the trainer on the same rows; what the trainer sends to its workers, a rank cuts as verl's dispatch does
and gives to its own. Rollouts and rewards are drawn; everything after them is the trainers', the workers' and the
engine's own code.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.adapters.engine_process import VOCABULARY, Case, _engine, on_ranks

PROMPTS, ROLLOUTS, STEPS, EOS = 8, 4, 5, 1
# What the rollouts of a group score, and whether a demonstration comes with it; the groups of a step in this order.
FAILED, ALONE, SOLVED, MIXED = ([0, 0, 0, 0], True), ([0, 0, 0, 0], False), ([1, 1, 1, 1], False), ([1, 0, 0, 1], False)
SPARSE = [SOLVED, ALONE, FAILED, SOLVED, ALONE, MIXED, SOLVED, ALONE]


class Setting(NamedTuple):
    """A run of `STEPS` steps."""

    preset: str = "plus"
    mini_batches: int = 1
    epochs: int = 1
    dynamic: bool = True
    head: str = "off"
    mode: str = "token-mean"
    optimizer: str = "SGD"
    # Of these steps nothing has a gradient.
    idle_steps: tuple = ()


class Result(NamedTuple):
    parameters: list  # after each step, by name
    metrics: list  # of each step


def run(settings, processes, folder, sides=("whole", "left out")):
    """For each setting and side its result on rank 0."""
    ranks = on_ranks(partial(_train_all, sides=sides), settings, processes, folder)
    return {
        setting: {side: Result(*of_side) for side, of_side in ranks[0][i].items()} for i, setting in enumerate(settings)
    }


def _train_all(setting, folder, *, sides):
    return {side: _train(setting, side, folder) for side in sides}


def _train(setting, side, folder):
    case = Case(head=setting.head)
    optimizer = {"lr": 0.2, "optimizer": setting.optimizer, "total_training_steps": STEPS}
    optimizer |= {"lr": 0.01, "weight_decay": 0.1} if setting.optimizer == "AdamW" else {"weight_decay": 0.0}
    engine = _engine(case, setting.head, folder, clip_grad=1.0, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        import transfer_queue as tq

        queue = Queue()
        for name in ("kv_batch_get", "kv_batch_put"):
            patch.setattr(tq, name, getattr(queue, name))
        # All ranks are to name the rows of padding alike.
        patch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="0"))
        config = _config(setting, side)
        trainer = _trainer(config, side)
        trainer.actor_rollout_wg = Workers(engine, config, trainer, queue)
        result = Result([], [])
        for step in range(STEPS):
            metrics = {}
            batch = queue.fill(step, setting, demonstrations=side != "verl" and trainer.hapo.gate.name != "never")
            trainer.global_steps = step + 1
            keys = list(batch.keys)
            batch = trainer._balance_batch(batch, metrics)
            batch = trainer._compute_old_log_prob(batch, metrics)
            batch = trainer._compute_advantage(batch, metrics)
            batch = trainer._update_actor(batch, metrics)
            assert set(keys) <= set(batch.keys)
            result.parameters.append(
                {name: value.detach().full_tensor().clone() for name, value in engine.module.named_parameters()}
            )
            result.metrics.append({name: float(value) for name, value in metrics.items()})
    return tuple(result)


def _config(setting, side):
    from hapo_verl.adapters.rehearsal import composed

    own = {
        "verl": ["algorithm.adv_estimator=grpo"],
        "whole": [f"+hapo={setting.preset}", "hapo.skip_idle_rows=false", "hapo.old_log_probs=always"],
        "left out": [f"+hapo={setting.preset}"],
    }
    rows = PROMPTS // setting.mini_batches
    return composed(
        [
            *own[side],
            "actor_rollout_ref.actor.strategy=fsdp2",
            f"actor_rollout_ref.rollout.n={ROLLOUTS}",
            f"data.train_batch_size={PROMPTS}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={rows}",
            f"actor_rollout_ref.actor.ppo_epochs={setting.epochs}",
            f"actor_rollout_ref.actor.loss_agg_mode={setting.mode}",
            "actor_rollout_ref.actor.loss_scale_factor=7",
            f"actor_rollout_ref.actor.use_dynamic_bsz={setting.dynamic}",
            f"actor_rollout_ref.rollout.log_prob_use_dynamic_bsz={setting.dynamic}",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
            f"+hapo.kernels.head={setting.head}" if side == "verl" else f"hapo.kernels.head={setting.head}",
        ]
    )


def _trainer(config, side):
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from hapo_verl.adapters.trace import Trace
    from hapo_verl.adapters.trainer import HapoTrainerSync
    from hapo_verl.config import HapoConfig

    trainer = object.__new__(PPOTrainerSync if side == "verl" else HapoTrainerSync)
    trainer.config, trainer.use_critic, trainer.parameter_sync_step = config, False, 1
    trainer.tokenizer = SimpleNamespace(eos_token_id=EOS)
    trainer.trainer_mode = "sync"
    if side != "verl":
        trainer.hapo, trainer.trace, trainer._timing = HapoConfig.parse(config.hapo), Trace(None), {}
        trainer._group_sizes, trainer._prompts_per_mini_batch = None, None
        trainer.gatekeeper = SimpleNamespace(observe=list)
    return trainer


class Workers:
    """verl's worker group, of which this process has one worker."""

    def __init__(self, engine, config, trainer, queue):
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.engine_workers import TrainingWorker
        from verl.workers.utils.losses import ppo_loss

        from hapo_verl.adapters.loss import hapo_loss

        self._ranks, self._queue = dist.get_world_size(), queue
        self._dispatch_info = {"actor": list(range(self._ranks))}
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self._worker = object.__new__(TrainingWorker)
        vars(self._worker).update(
            engine=engine,
            model_config={"use_remove_padding": True},
            engine_config=SimpleNamespace(
                forward_only=False,
                use_dynamic_bsz=config.actor_rollout_ref.actor.use_dynamic_bsz,
                max_token_len_per_gpu=130,
                micro_batch_size_per_gpu=2,
                infer_max_token_len_per_gpu=130,
                infer_micro_batch_size_per_gpu=2,
                use_fused_kernels=False,
            ),
            loss_fn=partial(hapo_loss, config=actor, hapo=trainer.hapo)
            if hasattr(trainer, "hapo")
            else partial(ppo_loss, config=actor),
            # One operation a token, and one a second: the utilisation is the number of tokens.
            flops_counter=SimpleNamespace(estimate_flops=lambda tokens, seconds, **_: (sum(tokens), 1.0)),
            device_name="cpu",
            profiler=SimpleNamespace(step=lambda: None, rank=0, check_enable=lambda: False),
        )

    def _mine(self, batch):
        """This rank's slice, with what concerns the whole batch."""
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu

        of_rank = len(batch.keys) // self._ranks
        assert of_rank * self._ranks == len(batch.keys)
        keys = batch.keys[dist.get_rank() * of_rank :][:of_rank]
        data: TensorDict = self._queue.kv_batch_get(keys, batch.partition_id)
        tu.assign_non_tensor(data, **batch.extra_info)
        return keys, data

    def compute_log_prob(self, batch):
        keys, data = self._mine(batch)
        output = self._worker.infer_batch(data)
        own = {
            key: {name: row.clone() for name, row in (("log_probs", logp), ("entropy", entropy))}
            for key, logp, entropy in zip(
                keys, output["log_probs"].unbind(), output["entropy"].unbind(), strict=True
            )
        }
        everyone = [None] * self._ranks
        dist.all_gather_object(everyone, own)
        for rows in everyone:
            for key, fields in rows.items():
                self._queue.rows[key] |= fields
        return batch

    def update_actor(self, batch):
        return self._worker.train_mini_batch(self._mine(batch)[1])


class Queue:
    """TransferQueue as a dictionary: a row's fields by its key."""

    def __init__(self):
        self.rows = {}

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        from tensordict import TensorDict
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        # A field that one row lacks disappears for all.
        common = set.intersection(*(set(self.rows[key]) for key in keys))
        names = [name for name in (select_fields or sorted(common)) if name in common]
        rows = [{name: self.rows[key][name] for name in names} for key in keys]
        data: TensorDict = list_of_dict_to_tensordict(rows)
        for name in names:
            # Rows of one size come as jagged ones too.
            if isinstance(rows[0][name], torch.Tensor) and rows[0][name].ndim:
                data[name] = torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        return data

    def kv_batch_put(self, keys, partition_id, fields, tags=None):
        from transfer_queue import KVBatchMeta

        for name in fields.keys():  # noqa: SIM118
            column = fields[name]
            rows = column.unbind() if isinstance(column, torch.Tensor) else list(column)
            for key, row in zip(keys, rows, strict=True):
                self.rows.setdefault(key, {})[name] = getattr(row, "data", row) if name == "uid" else row
        return KVBatchMeta(keys=list(keys), tags=tags or [{} for _ in keys], partition_id=partition_id)

    def fill(self, step, setting, *, demonstrations):
        """The rows of a step, as the agent loop writes them."""
        from transfer_queue import KVBatchMeta

        self.rows.clear()
        generator = torch.Generator().manual_seed(step)
        keys, tags = [], []
        for number in range(PROMPTS):
            # Another place for each kind of group in each step.
            scores, has_demonstration = SPARSE[(number + 3 * step) % PROMPTS]
            if step in setting.idle_steps:
                scores, has_demonstration = SOLVED
            outcome = "injected" if has_demonstration and demonstrations else "not_fired"
            group = {
                "firing": [0.0] * (ROLLOUTS + 1), "fired": False, "outcome": outcome, "confidence": 0.5,
                "threshold": 0.8, "successes": scores, "scores": scores, "key": number,
            }  # fmt: skip
            rows = [(float(score), False) for score in scores]
            if outcome == "injected":
                rows = [*rows, (1.0, True)] if setting.preset == "plus" else [*rows[:-1], (1.0, True)]
            for session, (score, is_demonstration) in enumerate(rows):
                prompt = torch.randint(2, VOCABULARY, (2 + number % 3,), generator=generator)
                length = int(torch.randint(1, 8, (1,), generator=generator))
                response = torch.randint(2, VOCABULARY, (length,), generator=generator)
                mask = torch.ones(length, dtype=torch.int64)
                if session == 1 and length > 2:
                    mask[1] = 0  # a tool token
                rewards = torch.zeros(length)
                rewards[-1] = score
                whole = torch.cat([prompt, response])
                key = f"u{number}_{session}_0"
                self.rows[key] = {
                    "uid": f"u{number}", "prompts": prompt, "responses": response, "input_ids": whole,
                    "position_ids": torch.arange(len(whole)), "loss_mask": mask, "response_mask": mask,
                    "attention_mask": torch.ones_like(whole), "rm_scores": rewards,
                    "rollout_log_probs": -torch.rand(length, generator=generator),
                    "hapo_demonstration": torch.tensor(is_demonstration), "hapo_group": group,
                }  # fmt: skip
                keys.append(key)
                tags.append({"seq_len": len(whole), "hapo_appended": is_demonstration and setting.preset == "plus"})
        return KVBatchMeta(keys=keys, tags=tags, partition_id="train")
