"""How much does HAPO itself cost in a step? One step of verl's own trainer and of HAPO's, without model and GPU.

    python bench/step_cost.py [--smoke] [--out DIR]

The agent loop worker with its agent loop, tokenizer and reward worker, TransferQueue with its Ray actors, and the
trainer's methods are real. vLLM's tokens and the actor's log-probs are replaced by random numbers, whose time does not
count. The case is the most expensive one: every rollout fails and every demonstration is verified, so that every group
is injected; `append` writes one more row per group, and the gate `posterior` knows a million prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import statistics
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transfer_queue.utils.zmq_utils import ZMQMessage, frame_nbytes
from transformers import Qwen2Tokenizer
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.workers.rollout.replica import TokenOutput

from hapo_verl.config import HapoConfig
from hapo_verl.driver.gatekeeper import Gatekeeper
from hapo_verl.driver.trainer import HapoTrainerSync
from hapo_verl.launch.rehearsal import composed
from hapo_verl.rollout.worker import HapoAgentLoopWorker
from harness import REPOSITORY, Prompts, machine

sys.path.insert(0, str(REPOSITORY / "recipes" / "quickstart"))
import tiny_model

N, KNOWN, WAVE, MIB = 16, 1_000_000, 16, 2**20
SOURCE, ANSWER = "openai/gsm8k", "#### 42"
RANKS = 8
# Twice the tokens that fit into 24 GiB beside TransferQueue.
FULL_P, FULL_T = 1024, 8192
DRIVER = ("submit", "balance", "old log-probs", "advantage")
Found = dict[str, dict[str, float]]


class Wire:
    """Counts the bytes of TransferQueue's messages that this process sends and receives."""

    def __init__(self) -> None:
        self.bytes = 0
        serialize, deserialize = ZMQMessage.serialize, ZMQMessage.deserialize.__func__  # pyright: ignore[reportFunctionMemberAccess]

        def counted(frames: list) -> list:
            self.bytes += sum(frame_nbytes(frame) or 0 for frame in frames)
            return frames

        message: Any = ZMQMessage
        message.serialize = lambda self: counted(serialize(self))
        message.deserialize = classmethod(lambda cls, frames: deserialize(cls, counted(frames)))


class Server:
    """Replaces vLLM: random tokens, N sessions at a time. The last session of every prompt ends after all others."""

    def __init__(self, tokens: range) -> None:
        self._tokens, self._rng = tokens, np.random.default_rng(0)
        self.start(0, 0)

    def start(self, prompts: int, T: int) -> None:
        """Start a wave of prompts, to be answered with up to T tokens."""
        self._T, self._asked, self._left = T, Counter(), prompts * (N - 1)
        self._others_ended, self._slots = asyncio.Event(), asyncio.Semaphore(N)

    def ended(self) -> None:
        """Count a session that has ended."""
        self._slots.release()
        self._left -= 1
        if self._left == 0:
            self._others_ended.set()

    async def generate(self, *, prompt_ids: list[int], **_: Any) -> TokenOutput:
        self._asked[tuple(prompt_ids)] += 1
        if self._asked[tuple(prompt_ids)] == N:
            await self._others_ended.wait()
        else:
            await self._slots.acquire()
        # Never quite equal, so that TransferQueue stores rows of a length of their own, as in a run.
        length = self._T - int(self._rng.integers(self._T // 128))
        return TokenOutput(
            token_ids=self._rng.integers(self._tokens.start, self._tokens.stop, length).tolist(),
            log_probs=(-self._rng.random(length)).tolist(),
            extra_fields={"min_global_steps": 0, "max_global_steps": 0},
        )


class Waves:
    """Methods that the bench adds to an agent loop worker: waiting for a wave, and measuring it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._wire = Wire()
        super().__init__(*args, **kwargs)

    async def roll(self, batch: TensorDict, T: int) -> tuple[int, float]:
        """Roll out these prompts into TransferQueue; returns bytes on the wire and the peak of memory in MiB."""
        worker: Any = self
        worker.llm_client.start(len(batch), T)
        before, floor = self._wire.bytes, reset_peak()
        await worker.generate_sequences(batch)
        await asyncio.gather(*worker.background_tasks)
        return self._wire.bytes - before, peak_mib(floor)

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        try:
            await parent._run_agent_loop(*args, **kwargs)
        finally:
            worker: Any = self
            worker.llm_client.ended()


class VerlWorker(Waves, AgentLoopWorkerTQ.__ray_actor_class__):  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
    """verl's agent loop worker."""


class HapoWorker(Waves, HapoAgentLoopWorker):
    """HAPO's."""


class Actor:
    """Replaces the actor: random log-probs, and smaller rows once nothing reads them any more."""

    def __init__(self) -> None:
        tq.init()

    def ready(self) -> None: ...

    def put_jagged(self, keys: list[str], lengths: list[int], names: list[str]) -> None:
        """Write these fields, with a float for each token."""
        for start in range(0, len(keys), 64):
            part = slice(start, start + 64)
            rows = [{name: -torch.rand(length) for name in names} for length in lengths[part]]
            tq.kv_batch_put(keys=keys[part], partition_id="train", fields=tu.list_of_dict_to_tensordict(rows))

    def copy(self, keys: list[str], uids: list[str], names: list[str]) -> None:
        """Copy these fields of a group's rows for each of these prompts."""
        tags = tq.kv_list("train")["train"]
        fields = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=names)
        for uid in uids:
            tu.assign_non_tensor_stack(fields, "uid", [uid] * len(keys))
            tq.kv_batch_put(
                keys=[f"{uid}_{key.split('_', 1)[1]}" for key in keys],
                partition_id="train",
                fields=fields,
                tags=[tags[key] for key in keys],
            )

    def shrink(self, keys: list[str], names: list[str]) -> None:
        """Replace each of these fields by one token."""
        ones = TensorDict({name: torch.ones(len(keys), 1, dtype=torch.int64) for name in names}, batch_size=len(keys))
        tq.kv_batch_put(keys=keys, partition_id="train", fields=ones)


def reset_peak() -> float:
    """Reset the peak of memory to the current MiB, and return these."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib(0.0)


def peak_mib(floor: float) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024 - floor


def remote(actor: type) -> Any:
    """Make the class a Ray actor that needs no CPU."""
    return ray.remote(num_cpus=0)(actor)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def write_model(folder: Path) -> None:
    """Write a tiny model with a tokenizer of some thousand tokens, pairs of letters."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in string.ascii_uppercase for b in string.ascii_lowercase]
    vocabulary = {token: i for i, token in enumerate([*symbols, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = Qwen2Tokenizer(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = tiny_model.CHAT_TEMPLATE
    fast.save_pretrained(folder)
    tiny_model.make_model(fast, hidden=32, layers=1, seed=0).save_pretrained(folder)


def a_row(index: int) -> dict[str, Any]:
    """A row as verl's data set returns it."""
    messages = [{"role": "user", "content": f"Question number {index}, and what is needed to answer it."}]
    return {
        "data_source": SOURCE,
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"index": index, "split": "train"},
        "raw_prompt": messages,
        "prompt": messages,
        "index": index,
        "tools_kwargs": {},
        "interaction_kwargs": {},
    }


def prompts(P: int, T: int, *, known: int, demonstrations: bool) -> TensorDict:
    """P prompts in the form of verl's dataloader, from a data set of `known` rows, with demonstrations of T tokens."""
    rng = random.Random(0)
    rows = [a_row(rng.randrange(known)) for _ in range(P)]
    if demonstrations:
        pairs = [a + b for a in string.ascii_uppercase for b in string.ascii_lowercase]
        words = ["".join(rng.choices(pairs, k=4)) for _ in range(4096)]
        for row in rows:
            # A word is a space and four pairs of letters.
            row["demonstration"] = " ".join([*rng.choices(words, k=(T - 32) // 5), ANSWER])
    columns: dict[str, Any] = {
        name: np.array([row[name] for row in rows] + [None], dtype=object)[:-1] for name in rows[0]
    }
    columns["index"] = np.array([row["index"] for row in rows])
    columns["uid"] = np.array([f"{number:032x}" for number in range(P)], dtype=object)
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    return batch


class Bench:
    """Holds Ray, TransferQueue, the actors of both sides, and the meters."""

    def __init__(self, folder: Path, known: int) -> None:
        write_model(folder)
        self._folder, self._known, self._wire, self._not_counted = folder, known, Wire(), np.zeros(4)
        # Ray would add 15 to the bench's niceness, so that on a busy machine its actors would hardly run.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
        tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 2}}}))
        reward = remote(RewardLoopWorker).remote(self.config("hapo", N))
        self.actor = remote(Actor).remote()
        server = Server(range(256, 256 + len(string.ascii_lowercase) ** 2))
        self.workers = {
            side: remote(worker).remote(self.config(side, N), server, reward_loop_worker_handles=[reward])
            for side, worker in (("verl", VerlWorker), ("hapo", HapoWorker))
        }
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self.gatekeeper = self.keeper(known)
        ray.get(self.actor.ready.remote())
        self.processes = {"queue": []}
        for side in self.workers:
            # Warm-up: imports and first calls are slow only once.
            self.shrink(self._first_wave(side), "prompts")
        tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
        children = psutil.Process().children(recursive=True)
        self.processes = {
            role: [child for child in children if any(name in " ".join(child.cmdline()) for name in names)]
            for role, names in {
                "queue": ("ray::SimpleStorageUnit", "ray::TransferQueueController"),
                "reward": ("ray::RewardLoopWorker",),
                "verl": ("ray::VerlWorker",),
                "hapo": ("ray::HapoWorker",),
            }.items()
        }

    def _first_wave(self, side: str) -> list[str]:
        batch = prompts(2, 128, known=self._known, demonstrations=side == "hapo")
        self.trainer(side, 2)._submit_batch_to_rollout(batch)
        ray.get(self.workers[side].roll.remote(batch, 128))
        return list(batch["uid"])

    def close(self) -> None:
        """End what was started."""
        tq.close()
        ray.shutdown()

    def config(self, side: str, P: int) -> Any:
        own = {
            "verl": ["algorithm.adv_estimator=grpo", "trainer.v1.trainer_mode=sync"],
            # Every row is scored, as in verl: what remains to be compared is what HAPO itself does.
            "hapo": [
                "+hapo=plus",
                "hapo.gate.name=posterior",
                "hapo.old_log_probs=all",
                "hapo.trace_dir=null",
                "trainer.v1.trainer_mode=hapo_sync",
            ],
        }
        # Prompts are made by `a_row`: the file is named, since a launch without one is refused, and never read.
        (self._folder / "prompts.json").touch()
        return composed(
            [
                *own[side],
                f"data.train_files={self._folder}/prompts.json",
                f"data.val_files={self._folder}/prompts.json",
                f"actor_rollout_ref.model.path={self._folder}",
                "actor_rollout_ref.rollout.name=vllm",
                f"actor_rollout_ref.rollout.n={N}",
                f"data.train_batch_size={P}",
                f"actor_rollout_ref.actor.ppo_mini_batch_size={P}",
                "actor_rollout_ref.actor.use_dynamic_bsz=true",
                "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
                "data.max_response_length=8192",
                "data.max_prompt_length=1024",
            ]
        )

    def keeper(self, known: int) -> Gatekeeper:
        """A gatekeeper that knows this many prompts."""
        keeper = Gatekeeper(HapoConfig.parse({"gate": {"name": "posterior"}}), total_steps=500)
        keeper.know(Prompts(known, a_row), prompt_column="prompt")
        return keeper

    def trainer(self, side: str, P: int) -> Any:
        """verl's or HAPO's trainer, with random numbers instead of a model."""
        trainer: Any = (HapoTrainerSync if side == "hapo" else PPOTrainerSync)(self.config(side, P))
        trainer.global_steps, trainer.tokenizer, trainer.gatekeeper = 1, self.tokenizer, self.gatekeeper
        # Prompts go to the workers through Ray, which serialises them once.
        trainer.agent_loop_manager = SimpleNamespace(generate_sequences=ray.put)
        trainer.actor_rollout_wg = SimpleNamespace(
            _dispatch_info={"actor": list(range(RANKS))}, compute_log_prob=self._compute_log_prob
        )
        return trainer

    def _compute_log_prob(self, batch: Any) -> Any:
        self.stand_in(
            self.actor.put_jagged, batch.keys, [tag["seq_len"] for tag in batch.tags], ["log_probs", "entropy"]
        )
        return batch

    @contextlib.contextmanager
    def meter(self, found: Found, part: str) -> Iterator[None]:
        """A context that measures the driver: seconds, bytes on the wire, and the peak of memory above the start."""
        floor, before = reset_peak(), self._reading()
        yield
        wall, cpu, queue, wire = self._reading() - before
        peak = peak_mib(floor)
        found[part] = {"cpu s": cpu, "wall s": wall, "queue cpu s": queue, "wire MiB": wire / MIB, "peak MiB": peak}

    def stand_in(self, method: Any, *arguments: Any) -> None:
        """Call the actor without counting it in a meter."""
        before = self._reading()
        ray.get(method.remote(*arguments))
        self._not_counted += self._reading() - before

    def _reading(self) -> np.ndarray:
        queue = cpu_seconds(self.processes["queue"])
        return np.array([time.perf_counter(), time.process_time(), queue, self._wire.bytes]) - self._not_counted

    def rollouts(self, side: str, batch: TensorDict, T: int) -> dict[str, float]:
        """Run the worker's part in waves; after each wave, data that nothing reads any more leaves TransferQueue."""
        before = {role: cpu_seconds(self.processes[role]) for role in (side, "reward")}
        queue = wall = wire = peak = 0.0
        for wave in batch.split(WAVE):
            start = self._reading()
            sent, reached = ray.get(self.workers[side].roll.remote(wave, T))
            spent = self._reading() - start
            wall, queue, wire, peak = wall + spent[0], queue + spent[2], wire + sent, max(peak, reached)
            self.shrink(list(wave["uid"]), "prompts", "input_ids", "position_ids", "loss_mask")
        spent = {role: cpu_seconds(self.processes[role]) - value for role, value in before.items()}
        return {
            "cpu s": spent[side],
            "wall s": wall,
            "queue cpu s": queue,
            "wire MiB": wire / MIB,
            "peak MiB": peak,
            "reward cpu s": spent["reward"],
        }

    def update(self, side: str, uids: list[str]) -> Found:
        """Run the driver's part of a step over the groups of these prompts."""
        trainer, found, metrics = self.trainer(side, len(uids)), {}, {}
        tags, keys = tq.kv_list("train")["train"], self.keys(uids)
        batch = tq.KVBatchMeta(partition_id="train", keys=keys, tags=[tags[key] for key in keys])
        with self.meter(found, "balance"):
            batch = trainer._balance_batch(batch, metrics)
        with self.meter(found, "old log-probs"):
            batch = trainer._compute_old_log_prob(batch, metrics)
        with self.meter(found, "advantage"):
            trainer._compute_advantage(batch, metrics)
        assert metrics["training/rollout_probs_diff_valid"] == 1, metrics
        assert side == "verl" or metrics["hapo/injected/group_share"] == 1.0, metrics
        return found

    def keys(self, uids: list[str]) -> list[str]:
        """The keys of the rows of these prompts."""
        wanted = set(uids)
        return [key for key in tq.kv_list("train")["train"] if "_" in key and key.split("_")[0] in wanted]

    def shrink(self, uids: list[str], *names: str) -> None:
        """Drop these fields of these prompts' rows."""
        ray.get(self.actor.shrink.remote(self.keys(uids), list(names)))

    def resident_mib(self) -> dict[str, float]:
        """The current memory of all processes of the bench, in MiB."""
        processes = {"driver": [psutil.Process()], **self.processes}
        return {role: sum(p.memory_info().rss for p in found) / MIB for role, found in processes.items()}

    def step(self, side: str, sizes: list[int], T: int, rolled: int) -> dict[int, Found]:
        """Run steps of these numbers of prompts, where the smaller ones are a part of the largest.

        The worker rolls out only `rolled` prompts; the rows of all other groups are copies of theirs.
        """
        batch = prompts(max(sizes), T, known=self._known, demonstrations=side == "hapo")
        uids: Any = list(batch["uid"])
        found: dict[int, Found] = {}
        for P in sizes:
            found[P], trainer = {}, self.trainer(side, P)
            # The worker gets the situations of the last one, the whole batch.
            part = batch[:P] if len(batch) > P else batch
            with self.meter(found[P], "submit"):
                trainer._submit_batch_to_rollout(part)
        worker, done = Counter(), 0
        for P in sizes:
            if rolled >= P:
                part = self.rollouts(side, batch[done:P], T)
                worker.update({name: value for name, value in part.items() if name != "peak MiB"})
                found[P]["worker"] = {**worker, "peak MiB": part["peak MiB"]}
            else:
                self._copy(uids[:rolled], uids[done:P])
                scaled = {name: P / rolled * value for name, value in worker.items()}
                found[P]["worker"] = {**scaled, "peak MiB": found[rolled]["worker"]["peak MiB"], "scaled": 1.0}
            done = P
            found[P] |= self.update(side, uids[:P])
            found[P]["resident MiB"] = self.resident_mib()
            print(f"{side}, T = {T}, P = {P}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
        return found

    def _copy(self, uids: list[str], more: list[str]) -> None:
        names = ["responses", "response_mask", "rm_scores", "rollout_log_probs", "hapo_demonstration", "hapo_group"]
        of_prompt: dict[str, list[str]] = {}
        for key in self.keys(uids):
            of_prompt.setdefault(key.split("_")[0], []).append(key)
        for number, keys in enumerate(of_prompt.values()):
            ray.get(self.actor.copy.remote(keys, more[number :: len(of_prompt)], names))

    def memory_of_prompts(self, P: int, known: int) -> dict[str, float]:
        """CPU milliseconds of the gatekeeper in a step of P prompts, when it knows `known` prompts."""
        keeper, spent = self.keeper(known), []
        rows = [a_row(random.Random(index).randrange(known)) for index in range(P)]
        columns = {name: [row[name] for row in rows] for name in ("raw_prompt", "data_source", "extra_info", "prompt")}
        for step in range(1, 12):
            start = time.process_time()
            situations = keeper.situations(columns, step, prompt_column="prompt")
            keeper.observe(
                {"key": one["key"], "successes": [False] * N, "firing": [1.0] * (N + 1)} for one in situations
            )
            spent.append(1e3 * (time.process_time() - start))
        return {"P": P, "known prompts": known, "cpu ms": statistics.median(spent)}


def total(parts: Found, name: str, of: tuple[str, ...] = DRIVER) -> float:
    return sum(parts[part][name] for part in of)


def step_seconds(P: int, T: int, gpus: int) -> float:
    """Computed seconds of a step of a 7B model, with rows of T tokens and prompts of 250; see `recipes/README.md`."""
    rows, parameters = P * N, 7.62e9
    training = 10 * parameters * rows * (T + 250) / (gpus * 312e12 * 0.4)
    generation = max(rows * T / (gpus * 2500), T / 40)
    return training + generation + 20


def report(content: dict, say: Callable[[str], None]) -> None:
    """The tables, in Markdown."""
    cases = content["cases"]
    T = max(map(int, cases))
    verl, hapo = cases[T]["verl"], cases[T]["hapo"]
    P = max(verl)
    say(f"P = {P} prompts x N = {N} rollouts x T = {T} tokens, every group injected ({N + 1} rows)\n")
    say("| part | process | CPU s: verl | HAPO | more | MiB on the wire: verl | HAPO | MiB above: verl | HAPO |")
    say("|---|---|---|---|---|---|---|---|---|")
    for part in ("submit", "worker", *DRIVER[1:]):
        one, other = verl[P][part], hapo[P][part]
        mark = " *" if "scaled" in one or "scaled" in other else ""
        say(
            f"| {part}{mark} | {'worker' if part == 'worker' else 'driver'} "
            f"| {one['cpu s']:.2f} | {other['cpu s']:.2f} | {other['cpu s'] - one['cpu s']:+.2f} "
            f"| {one['wire MiB']:.0f} | {other['wire MiB']:.0f} | {one['peak MiB']:.0f} | {other['peak MiB']:.0f} |"
        )
    for name, rows in (
        ("TransferQueue's processes", [total(side[P], "queue cpu s", ("worker", *DRIVER)) for side in (verl, hapo)]),
        ("reward worker", [side[P]["worker"]["reward cpu s"] for side in (verl, hapo)]),
    ):
        say(f"| {name} | | {rows[0]:.2f} | {rows[1]:.2f} | {rows[1] - rows[0]:+.2f} | | | | |")
    driver = [total(side[P], "cpu s") for side in (verl, hapo)]
    say(f"| **driver, all of it** | | {driver[0]:.2f} | {driver[1]:.2f} | {driver[1] - driver[0]:+.2f} | | | | |")

    say("\n| P | T | rows | driver CPU s: verl | HAPO | µs a row | ns a token | worker CPU s: verl | HAPO | ms a row |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    for T, sides in sorted(cases.items()):
        for P in sides["verl"]:
            one, other = sides["verl"][P], sides["hapo"][P]
            rows = P * (N + 1)
            mark = " *" if "scaled" in other["worker"] else ""
            cpu = [total(parts, "cpu s") for parts in (one, other)]
            say(
                f"| {P} | {T} | {rows} | {cpu[0]:.2f} | {cpu[1]:.2f} | {1e6 * cpu[1] / rows:.0f} "
                f"| {1e9 * cpu[1] / rows / T:.1f} | {one['worker']['cpu s']:.1f} | {other['worker']['cpu s']:.1f} "
                f"| {1e3 * other['worker']['cpu s'] / rows:.2f}{mark} |"
            )

    say("\n| gate `posterior` knows | CPU ms a step of the largest P, to attach and to observe |")
    say("|---|---|")
    for row in content["memory of prompts"]:
        say(f"| {row['known prompts']:,} prompts | {row['cpu ms']:.1f} |")

    say("\n| 7B on so many GPUs | a step, computed | driver with HAPO, all of it | share | more than verl's | share |")
    say("|---|---|---|---|---|---|")
    for row in content["share of a step"]:
        say(
            f"| {row['gpus']} | {row['step s']:,.0f} s | {row['driver s']:.1f} s | {row['driver share']:.3%} "
            f"| {row['more s']:+.1f} s | {row['more share']:+.3%} |"
        )


def shares(cases: dict) -> list[dict[str, float]]:
    """The driver's seconds for 1,024 prompts of 8,192 tokens, scaled from the largest batch, relative to a step."""
    T = max(cases)
    P = max(cases[T]["verl"])
    factor, rows = FULL_P * FULL_T / (P * T), []
    verl, hapo = (factor * total(cases[T][side][P], "cpu s") for side in ("verl", "hapo"))
    for gpus in (8, 64, 512):
        step = step_seconds(FULL_P, FULL_T, gpus)
        more = {"more s": hapo - verl, "more share": (hapo - verl) / step}
        rows.append({"gpus": gpus, "step s": step, "driver s": hapo, "driver share": hapo / step, **more})
    return rows


def main() -> None:
    """Measure, print the tables, write `step_cost.json` and `step_cost.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few prompts of a few tokens; no claim")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results")
    arguments = parser.parse_args()
    sizes, rolled = {1024: [64, 1024], 2048: [64], 4096: [64, 1024], 8192: [32, 64, 128, 256, 512]}, 64
    if arguments.smoke:
        sizes, rolled = {256: [1, 2, 4], 128: [1]}, 2
    known = 1000 if arguments.smoke else KNOWN
    torch.set_num_threads(1)

    name = f"step_cost{'-smoke' if arguments.smoke else ''}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / f"{name}.md"
    table.write_text("")

    def say(line: str) -> None:
        print(line, flush=True)
        with table.open("a") as file:
            print(line, file=file)

    content: dict[str, Any] = {
        "machine": machine(),
        "smoke": arguments.smoke,
        "load": [os.getloadavg()[0]],
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), known)
        try:
            for T, batches in sizes.items():
                content["cases"][T] = {side: bench.step(side, batches, T, rolled) for side in ("verl", "hapo")}
                # Written each time, so that an interrupted run loses nothing.
                (arguments.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
                content["load"].append(os.getloadavg()[0])
            largest = max(batches[-1] for batches in sizes.values())
            content["memory of prompts"] = [bench.memory_of_prompts(largest, count) for count in (largest, known)]
        finally:
            bench.close()
    content["share of a step"] = shares(content["cases"])
    say(" · ".join(f"{key} {value}" for key, value in content["machine"].items()))
    say("load " + ", ".join(f"{load:.1f}" for load in content["load"]) + f" on {os.cpu_count()} cores\n")
    report(content, say)
    (arguments.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
