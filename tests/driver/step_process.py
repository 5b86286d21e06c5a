"""Runs steps of the trainers, driver and workers, in separate processes (gloo, CPU), without Ray and real rollouts.

Every process runs verl's own `_step_once` over the same rows, and its rank's part of the work: verl's training worker
with verl's FSDP2 engine. TransferQueue is a dictionary in each process, and rollouts are random.
"""

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transfer_queue as tq
from verl.trainer.ppo import padding_utils

from hapo_verl.protocol.rows import plain_values
from tests import composed
from tests.actor.engine_process import VOCABULARY, Case, _engine, on_ranks

PROMPTS, ROLLOUTS, STEPS, LONGEST = 8, 4, 5, 7
# Successes of each group: in three of the eight groups all rollouts fail, in two all succeed.
MIXED = (0, 4, 1, 0, 3, 4, 0, 2)
# Sizes of groups with the same total as eight groups of four.
UNEVEN = (2, 4, 8, 2, 6, 4, 2, 4)
# With these overrides nothing is left out.
WHOLE = "hapo.skip_idle_rows=false", "hapo.old_log_probs=all"


class Run(NamedTuple):
    """Some steps of a trainer, with overrides of its launch in addition to those that all runs share."""

    overrides: tuple[str, ...]
    # Injection of demonstrations: "replace" or "append" in failed groups, "always" in all groups, None in no group.
    injection: str | None = None
    # The number of successful rollouts of each group of a step.
    successes: tuple[int, ...] = MIXED
    # The number of rollouts of each group.
    sizes: tuple[int, ...] = (ROLLOUTS,) * PROMPTS
    # Steps in which all rollouts succeed.
    silent: tuple[int, ...] = ()
    trainer: str = "hapo"
    packed: bool = True
    optimizer: str = "SGD"
    steps: int = STEPS
    # Folder of a model; with None the model is random.
    model: str | None = None

    def whole(self):
        """The same run without leaving out any rows or passes."""
        return self._replace(overrides=(*self.overrides, *WHOLE))


def run(runs, processes, folder):
    """The results of `_train` for each run and rank."""
    ranks = on_ranks(_train, runs, processes, folder)
    return {one: [results[i] for results in ranks] for i, one in enumerate(runs)}


class Queue:
    """TransferQueue's key-value interface with a dictionary; a batch has only the fields that all its rows have."""

    def __init__(self):
        self.rows, self.tags = {}, {}

    def get(self, keys, partition_id, select_fields=None):
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        names = [name for name in self.rows[keys[0]] if all(name in self.rows[key] for key in keys)]
        names = [name for name in names if select_fields is None or name in select_fields]
        data = list_of_dict_to_tensordict([{name: self.rows[key][name] for name in names} for key in keys])
        for name in names:
            # Rows of one length are jagged too.
            if isinstance(self.rows[keys[0]][name], torch.Tensor) and self.rows[keys[0]][name].ndim:
                column = [self.rows[key][name] for key in keys]
                data[name] = torch.nested.as_nested_tensor(column, layout=torch.jagged)
        return data

    def put(self, keys, partition_id, fields=None, tags=None):
        for key in keys:
            self.rows.setdefault(key, {})
        for name in [] if fields is None else list(fields.keys()):
            column = fields[name]
            values = column.unbind() if isinstance(column, torch.Tensor) else plain_values(column)
            for key, value in zip(keys, values, strict=True):
                self.rows[key][name] = value
        if tags is not None:
            self.tags.update(zip(keys, tags, strict=True))
        names = [name for name in self.rows[keys[0]] if all(name in self.rows[key] for key in keys)]
        return tq.KVBatchMeta(
            keys=keys, tags=[self.tags[key] for key in keys], partition_id=partition_id, fields=names, extra_info={}
        )


def rollouts(one, step):
    """The rows of a step by key, and their tags."""
    generator = torch.Generator().manual_seed(step)
    rows, tags = {}, {}
    for prompt, (size, successes) in enumerate(zip(one.sizes, one.successes, strict=True)):
        successes = size if step in one.silent else successes
        uid, length = f"{step}p{prompt}", int(torch.randint(2, 6, (), generator=generator))
        prompt_ids = torch.randint(VOCABULARY, (length,), generator=generator)
        sessions = [session < successes for session in range(size)]
        demonstrations = [False] * size
        injected = one.injection is not None and (successes == 0 or one.injection == "always")
        if injected and one.injection == "append":
            sessions, demonstrations = [*sessions, True], [*demonstrations, True]
        elif injected:
            sessions[-1] = demonstrations[-1] = True
        group = {
            "outcome": "injected" if injected else "not_fired",
            "scores": [float(session < successes) for session in range(size)],
            "successes": [session < successes for session in range(size)],
            "fired": injected,
            "firing": [0.0] * size + [0.0],
            "threshold": 0.8,
            "confidence": 0.5,
            "key": None,
        }
        for session, (success, demonstration) in enumerate(zip(sessions, demonstrations, strict=True)):
            response = torch.randint(
                VOCABULARY, (int(torch.randint(1, LONGEST + 1, (), generator=generator)),), generator=generator
            )
            mask = torch.ones_like(response)
            if len(mask) > 4:
                mask[2] = 0  # a tool token
            reward = torch.zeros(len(response))
            reward[-1] = float(success)
            ids, key = torch.cat([prompt_ids, response]), f"{uid}_{session}_0"
            sampled = -3 * torch.rand(len(response), generator=generator)
            rows[key] = {
                "uid": uid,
                "prompts": prompt_ids,
                "responses": response,
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "loss_mask": mask,
                "response_mask": mask,
                "rm_scores": reward,
                "rollout_log_probs": torch.full_like(sampled, torch.nan) if demonstration else sampled,
                "hapo_demonstration": torch.tensor(demonstration),
                "hapo_group": group,
            }
            tags[key] = {"seq_len": len(ids)} | ({"hapo_appended": True} if session >= size else {})
    return rows, tags


def _config(one):
    if one.trainer == "hapo":
        chosen = [*one.overrides, "trainer.v1.trainer_mode=hapo_sync", "hapo.trace_dir=null"]
    else:
        chosen = [*one.overrides, "algorithm.adv_estimator=grpo"]
    return composed.launch(
        *(
            # If two overrides name the same key, the last one counts.
            f"actor_rollout_ref.rollout.n={ROLLOUTS}",
            f"data.train_batch_size={PROMPTS}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
            "actor_rollout_ref.actor.strategy=fsdp2",
            "actor_rollout_ref.actor.use_dynamic_bsz=true",
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128",
            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=128",
            "actor_rollout_ref.rollout.temperature=0.7",
            *chosen,
        )
    )


def _worker(one, config, folder):
    """verl's training worker without Ray."""
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.profiler import DistProfiler
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from hapo_verl.actor.loss import hapo_loss
    from hapo_verl.launch.checks import check_launch

    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    hapo = check_launch(config) if one.trainer == "hapo" else None
    head = "off" if hapo is None else hapo.kernels.head
    worker: Any = object.__new__(TrainingWorker)
    # Adam divides a gradient by its own size. With a small ε, rounding errors of a gradient near 0 would become large.
    adam = {"optimizer": "AdamW", "weight_decay": 0.1, "override_optimizer_config": {"eps": 1e-3}}
    optim = {"SGD": {"optimizer": "SGD", "weight_decay": 0.0}, "AdamW": adam}[one.optimizer]
    # Gradients are not clipped, since clipping would hide a wrong scale.
    worker.engine = _engine(Case(packed=one.packed, model=one.model), head, folder, clip_grad=1e9, lr=0.02, **optim)
    worker.device_name, worker.profiler = "cpu", DistProfiler(rank=dist.get_rank())
    worker.model_config = {"use_remove_padding": one.packed}
    worker.engine_config = SimpleNamespace(
        forward_only=False,
        use_dynamic_bsz=actor.use_dynamic_bsz,
        max_token_len_per_gpu=actor.ppo_max_token_len_per_gpu,
        micro_batch_size_per_gpu=actor.ppo_micro_batch_size_per_gpu,
        infer_max_token_len_per_gpu=rollout.log_prob_max_token_len_per_gpu,
        infer_micro_batch_size_per_gpu=rollout.log_prob_micro_batch_size_per_gpu,
        use_fused_kernels=False,
    )
    # Tokens are counted instead of flops.
    worker.flops_counter = SimpleNamespace(
        estimate_flops=lambda lengths, seconds, images_seqlens=None: (float(sum(lengths)), 1.0)
    )
    of_actor = omega_conf_to_dataclass(actor)
    worker.loss_fn = (
        partial(ppo_loss, config=of_actor) if hapo is None else partial(hapo_loss, config=of_actor, hapo=hapo)
    )
    return worker, hapo


class WorkerGroup:
    """Replaces Ray's worker group: each rank gets its slice of a batch, and every process gets all ranks' results."""

    def __init__(self, worker, queue):
        self._worker, self._queue, self.calls = worker, queue, []
        self._dispatch_info = {"actor": list(range(dist.get_world_size()))}

    def _slice(self, batch):
        from tensordict.tensorclass import NonTensorData
        from verl.utils import tensordict_utils as tu

        part = batch.chunk(dist.get_world_size())[dist.get_rank()]
        data = self._queue.get(part.keys, part.partition_id)
        for name, value in copy.deepcopy(batch.extra_info).items():
            if isinstance(value, NonTensorData):
                data[name] = value
            else:
                tu.assign_non_tensor_data(data, name, value)
        return part, data

    def compute_log_prob(self, batch):
        self.calls.append(("score", list(batch.keys)))
        part, data = self._slice(batch)
        output = self._worker.infer_batch(data)
        mine = [
            (key, logp, entropy)
            for key, logp, entropy in zip(
                part.keys, output["log_probs"].unbind(), output["entropy"].unbind(), strict=True
            )
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for key, logp, entropy in (row for rank in everyone for row in rank):
            self._queue.rows[key] |= {"log_probs": logp, "entropy": entropy}
        return batch

    def update_actor(self, batch):
        self.calls.append(("train", list(batch.keys)))
        return self._worker.train_mini_batch(self._slice(batch)[1])


def _trainer(one, config, hapo, worker, queue):
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from hapo_verl.driver.idle_rows import savings
    from hapo_verl.driver.trainer import HapoTrainerSync
    from hapo_verl.protocol.trace import Trace

    trainer: Any = object.__new__(PPOTrainerSync if hapo is None else HapoTrainerSync)
    trainer.config, trainer.global_steps, trainer.local_trigger_step = config, 0, 0
    trainer.use_critic = trainer.use_reference_policy = False
    trainer.tokenizer = SimpleNamespace(eos_token_id=0)
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    trainer.actor_rollout_wg = WorkerGroup(worker, queue)
    trainer.on_sample_begin = trainer.on_sample_end = lambda: None
    trainer.timing_raw = {}
    if hapo is not None:
        trainer.hapo, trainer.trace = hapo, Trace(None)
        trainer.gatekeeper = SimpleNamespace(observe=lambda groups: None, own_past=None)
        trainer._leaves_out = savings(config, hapo)
        trainer._prompts_per_mini_batch, trainer._group_sizes, trainer._reduced = None, None, None
        trainer._heard, trainer._rollouts = False, None
    return trainer


def _train(one, folder):
    config = _config(one)
    worker, hapo = _worker(one, config, folder)
    queue = Queue()
    tq.kv_batch_get, tq.kv_batch_put = queue.get, queue.put
    # Rows of padding have the same keys in every process.
    padding_utils.uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=""))
    trainer = _trainer(one, config, hapo, worker, queue)
    parameters, logged = [], []
    for step in range(one.steps):
        rows, tags = rollouts(one, step)
        queue.rows, queue.tags = rows, tags
        batch = tq.KVBatchMeta(keys=list(rows), tags=list(tags.values()), partition_id="train")
        trainer.replay_buffer = SimpleNamespace(sample=lambda batch=batch, **_: (batch, {}))
        trainer.global_steps += 1
        metrics: dict[str, Any] = {}
        returned = trainer._step_once(metrics, trainer.timing_raw, PROMPTS)
        assert "advantages" in queue.get(returned.keys, "train")
        logged.append({name: float(value) for name, value in metrics.items()} | {"rows": len(returned.keys)})
        parameters.append(
            {
                name: getattr(value, "full_tensor", lambda value=value: value)().detach().clone()
                for name, value in worker.engine.module.named_parameters()
            }
        )
    return {
        "parameters": parameters,
        "metrics": logged,
        "calls": trainer.actor_rollout_wg.calls,
        "moving": [key for key in queue.rows if queue.rows[key]["advantages"].any()],
        "restored": [config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n],
    }
