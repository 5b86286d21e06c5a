"""Real word problems for the quickstart: the shortest rows of GSM8K, so that a step does not take long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hapo_verl.data.gsm8k import GSM8K, gsm8k_records, verified_rows
from hapo_verl.data.parquet import DataError, write_parquet
from hapo_verl.rollout.reward import default_score

__all__ = ["GSM8K", "write"]

ROWS, HELDOUT = 48, 8


def write(output: Path, source: Path | None, model: Path) -> dict[str, Any]:
    """Write `train.parquet` and `heldout.parquet` into the folder `output`.

    Args:
        output: folder for the files.
        source: GSM8K as JSON lines; None to download `openai/gsm8k`.
        model: folder of the model, whose tokenizer is used to count tokens.

    Returns:
        Settings of verl for rows of this length.

    Raises:
        DataError: if the rows cannot be read or are too few.
    """
    from transformers import AutoTokenizer

    rows, _ = verified_rows(gsm8k_records(source), default_score, split="train")
    if len(rows) < ROWS + HELDOUT:
        raise DataError(f"--gsm8k {source}: {len(rows)} usable rows. At least {ROWS + HELDOUT} are needed.")
    shortest = sorted(rows, key=lambda row: len(row["prompt"][0]["content"] + row["demonstration"]))[: ROWS + HELDOUT]
    write_parquet(shortest[:ROWS], output / "train.parquet")
    write_parquet(shortest[ROWS:], output / "heldout.parquet")
    encode = AutoTokenizer.from_pretrained(model).encode
    # The chat template adds about a dozen tokens to a question.
    prompt = max(len(encode(row["prompt"][0]["content"])) for row in shortest) + 16
    response = max(len(encode(row["demonstration"])) for row in shortest) + 1
    return {
        "data.max_prompt_length": prompt,
        "data.max_response_length": response,
        "actor_rollout_ref.rollout.max_model_len": prompt + response,
        "trainer.test_freq": 3,
    }
