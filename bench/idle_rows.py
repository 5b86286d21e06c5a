"""How much do rows without a gradient cost? Old log-probs and update of one step, in verl's GRPO and HAPO's trainer.

    python bench/idle_rows.py [--smoke] [--out DIR]

Both trainers' `_step_once`, verl's training worker and its FSDP2 engine are real, with a small Qwen2 on one rank (gloo,
CPU). TransferQueue is replaced by a dictionary, and rollouts are random (`tests/driver/step_process.py`). Both sides
get the same rows, without demonstrations, of which a given share has a nonzero advantage; the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when verl and torch are imported.
os.environ["VERL_PLATFORM"] = "cpu"
os.environ["TORCH_COMPILE_DISABLE"] = os.environ["OMP_NUM_THREADS"] = "1"

from harness import REPOSITORY, machine

sys.path.insert(0, str(REPOSITORY))

import torch
import torch.distributed as dist
import transfer_queue as tq
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.driver import step_process
from tests.driver.step_process import Queue, Run

N, PROMPT = 4, 16
# Numbers of groups, of 36, that have a signal.
SHARES = {"1/9": 4, "1/4": 9, "1/2": 18, "1": 36}
_SIZES = (
    f"actor_rollout_ref.rollout.n={N}",
    "data.train_batch_size=36",
    "actor_rollout_ref.actor.ppo_mini_batch_size=36",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=1024",
)
# No pass is run, the rows are left out; in steps of several updates there is a pass, over the rows that are left.
SIDES = {
    "verl grpo": Run(_SIZES, trainer="verl"),
    "hapo": Run(("+hapo=grpo", *_SIZES)),
    "hapo, a pass for old log-probs": Run(("+hapo=grpo", *_SIZES, "actor_rollout_ref.actor.ppo_mini_batch_size=18")),
    "verl grpo, two updates": Run((*_SIZES, "actor_rollout_ref.actor.ppo_mini_batch_size=18"), trainer="verl"),
}
BASELINE = {"hapo": "verl grpo", "hapo, a pass for old log-probs": "verl grpo, two updates"}
# GEMMs of a token: 2 flops a parameter forward, 4 backward. The least that a side can cost beside verl's 8.
LEAST = {"hapo": 6 / 8, "hapo, a pass for old log-probs": 1.0}


def a_batch(signals: int, T: int, seed: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a step by key, and their tags: so many groups have two successes, the others fail."""
    generator = torch.Generator().manual_seed(seed)
    rows, tags = {}, []
    signal = set(torch.randperm(36, generator=generator)[:signals].tolist())
    for prompt in range(36):
        scores = [1.0, 1.0, 0.0, 0.0] if prompt in signal else [0.0] * N
        successes = [bool(score) for score in scores]
        group = {"outcome": "not_fired", "scores": scores, "successes": successes, "fired": False, "key": None}
        group |= {"firing": [0.0] * (N + 1), "threshold": 0.8, "confidence": 0.5}
        for session, score in enumerate(scores):
            # Lengths differ, and have nothing to do with the reward.
            length = T - int(torch.randint(T // 2, (), generator=generator))
            asked = PROMPT - prompt % 3
            ids = torch.randint(step_process.VOCABULARY, (asked + length,), generator=generator)
            mask, reward = torch.ones(length, dtype=torch.int64), torch.zeros(length)
            reward[-1] = score
            rows[f"p{prompt}_{session}_0"] = {
                "uid": f"p{prompt}",
                "prompts": ids[:asked],
                "responses": ids[asked:],
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "loss_mask": mask,
                "response_mask": mask,
                "rm_scores": reward,
                "rollout_log_probs": -torch.rand(length, generator=generator),
                "hapo_demonstration": torch.tensor(False),
                "hapo_group": group,
            }
            tags.append({"seq_len": len(ids)})
    return rows, tags


def write_model(folder: Path, *, smoke: bool) -> None:
    """Where `step_process` looks for its own, smaller one."""
    config = Qwen2Config(
        vocab_size=64 if smoke else 2048,
        hidden_size=32 if smoke else 128,
        intermediate_size=64 if smoke else 384,
        num_hidden_layers=1 if smoke else 3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model-False-0")


class Side:
    """A trainer with its worker and engine."""

    def __init__(self, one: Run, folder: Path) -> None:
        config = step_process._config(one)
        worker, hapo = step_process._worker(one, config, folder)
        self._queue = Queue()
        self._trainer = step_process._trainer(one, config, hapo, worker, self._queue)

    def step(self, signals: int, T: int, seed: int) -> dict[str, float]:
        """Seconds of the two parts, wall and CPU."""
        self._queue.rows, tags = a_batch(signals, T, seed)
        self._queue.tags = dict(zip(self._queue.rows, tags, strict=True))
        tq.kv_batch_get, tq.kv_batch_put = self._queue.get, self._queue.put
        batch = tq.KVBatchMeta(keys=list(self._queue.rows), tags=tags, partition_id="train")
        self._trainer.replay_buffer = step_process.SimpleNamespace(sample=lambda **_: (batch, {}))
        self._trainer.global_steps += 1
        timing: dict[str, float] = {}
        spent = {"cpu": 0.0}

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                start = time.process_time()
                try:
                    return method(*arguments, **named)
                finally:
                    spent["cpu"] += time.process_time() - start

            return run

        for name in ("_compute_old_log_prob", "_update_actor"):
            bound = getattr(type(self._trainer), name).__get__(self._trainer)
            setattr(self._trainer, name, counted(bound))
        self._trainer._step_once({}, timing, 36)
        wall = {part: timing[part] for part in ("old_log_prob", "update_actor")}
        return {**wall, "wall": sum(wall.values()), "cpu": spent["cpu"]}


def measure(folder: Path, T: int, repetitions: int) -> list[dict[str, Any]]:
    sides = {name: Side(one, folder) for name, one in SIDES.items()}
    for side in sides.values():
        side.step(36, T, seed=0)
    cases = {(share, name): [] for share in SHARES for name in sides}
    order = random.Random(0)
    for repetition in range(repetitions):
        for share, signals in SHARES.items():
            for name in order.sample(list(sides), len(sides)):
                cases[share, name].append(sides[name].step(signals, T, seed=repetition + 1))
    return [
        {"share": share, "side": name}
        | {part: statistics.median(one[part] for one in of) for part in ("old_log_prob", "update_actor", "wall", "cpu")}
        for (share, name), of in cases.items()
    ]


def report(rows: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    say("| rows with a gradient | side | old_log_prob s | update_actor s | x verl | CPU s | x verl | GEMMs, computed |")
    say("|---|---|---|---|---|---|---|---|")
    found = {(row["share"], row["side"]): row for row in rows}
    for row in rows:
        share, side = row["share"], row["side"]
        verls = found[share, BASELINE.get(side, side)]
        row["x verl, wall"], row["x verl, cpu"] = row["wall"] / verls["wall"], row["cpu"] / verls["cpu"]
        least = LEAST.get(side, 1.0) * (SHARES[share] / 36 if side in BASELINE else 1.0)
        wall = f"{row['old_log_prob']:.3f} | {row['update_actor']:.3f} | {row['x verl, wall']:.2f}"
        say(f"| {share} | {side} | {wall} | {row['cpu']:.3f} | {row['x verl, cpu']:.2f} | {least:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds; no speed is claimed")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "idle_rows-smoke" if arguments.smoke else "idle_rows"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        write_model(folder, smoke=arguments.smoke)
        load = [os.getloadavg()[0]]
        rows = measure(folder, *((8, 2) if arguments.smoke else (96, 7)))
        load.append(os.getloadavg()[0])
        dist.destroy_process_group()
    lines: list[str] = []
    content = {"machine": machine(), "smoke": arguments.smoke, "load": load, "rows": rows}
    lines.append(" · ".join(f"{key} {value}" for key, value in content["machine"].items()))
    lines.append(f"load {load[0]:.1f}, {load[1]:.1f} on {os.cpu_count()} cores\n")
    report(rows, lines.append)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
