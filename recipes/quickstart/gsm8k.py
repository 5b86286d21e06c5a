"""Real word problems for the quickstart: the shortest rows of GSM8K, so that a tiny model's steps stay short."""

from __future__ import annotations

from pathlib import Path

from hapo_verl.adapters.reward import default_score
from hapo_verl.data.gsm8k import gsm8k_records, verified_rows
from hapo_verl.data.parquet import DataError, write_parquet

ROWS, HELDOUT = 48, 8


def write(output: Path, source: Path | None) -> tuple[int, list[str]]:
    """Write `train.parquet` and `heldout.parquet` into the folder `output`.

    Args:
        output: folder.
        source: GSM8K as JSON lines; None fetches `openai/gsm8k`.

    Returns:
        The response length in bytes (one token each) that the longest demonstration needs with its end of sequence,
        and the overrides that rows of this length need.

    Raises:
        DataError: when the rows cannot be had or are too few.
    """
    rows, _ = verified_rows(gsm8k_records(source), default_score, split="train")
    if len(rows) < ROWS + HELDOUT:
        raise DataError(f"--gsm8k {source}: {len(rows)} usable rows. At least {ROWS + HELDOUT} are needed.")
    shortest = sorted(rows, key=lambda row: len(row["prompt"][0]["content"] + row["demonstration"]))[: ROWS + HELDOUT]
    write_parquet(shortest[:ROWS], output / "train.parquet")
    write_parquet(shortest[ROWS:], output / "heldout.parquet")
    prompt = max(len(row["prompt"][0]["content"].encode()) for row in shortest) + 16
    response = max(len(row["demonstration"].encode()) for row in shortest) + 1
    return response, [
        f"data.max_prompt_length={prompt}",
        f"actor_rollout_ref.rollout.max_model_len={prompt + response}",
        # A few dozen rows of some hundred bytes at a time.
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
        "trainer.test_freq=3",
    ]
