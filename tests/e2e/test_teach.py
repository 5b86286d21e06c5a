"""`teach` with vLLM's own server: a real model is started, asked and stopped, and its right answers are kept."""

import json
import subprocess
import sys

import pandas
import pytest
from transformers import AutoTokenizer

from tests.e2e import last_number
from tests.e2e.conftest import ROOT

import smollm2  # isort: skip  # conftest puts its folder on the path
import word_problems
from launch import cpu_environment

pytestmark = [pytest.mark.e2e, pytest.mark.long]
PROMPTS, SAMPLES, TOKENS = 8, 4, 96


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder and the journal after two equal calls."""
    folder = tmp_path_factory.mktemp("teach")
    word_problems.write(folder, train=PROMPTS, heldout=1, seed=1)
    frame = pandas.read_parquet(folder / "train.parquet")
    frame["demonstration"] = None
    frame.to_parquet(folder / "train.parquet")
    model = smollm2.write(smollm2.CACHE)
    command = [
        *(sys.executable, "-m", "hapo_verl.data", "teach"),
        *("--input", folder / "train.parquet", "--output", folder / "taught.parquet"),
        *("--serve", model, "--serve-args", "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 32"),
        *("--tokenizer", model, "--max-response-length", TOKENS, "--reward", ROOT / "tests/e2e/last_number.py"),
        *("--samples", SAMPLES, "--system", "Solve the problem in one short sentence. End with the answer."),
    ]
    environment = cpu_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    journals = []
    for _ in range(2):
        run = subprocess.run(map(str, command), capture_output=True, text=True, check=False, env=environment)
        logs = "".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
        assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}\n{logs}"
        journals.append((folder / "taught.journal.jsonl").read_bytes())
    return folder, journals


def test_right_answers_of_the_model_are_kept_as_demonstrations(taught):
    folder, _ = taught
    frame = pandas.read_parquet(folder / "taught.parquet")
    tokenizer = AutoTokenizer.from_pretrained(smollm2.CACHE)
    kept = frame[frame["demonstration"].notna()]
    assert len(kept) > 0
    for _, row in kept.iterrows():
        assert last_number.compute_score("", row["demonstration"], row["reward_model"]["ground_truth"], {}) == 1.0
        assert len(tokenizer.encode(row["demonstration"], add_special_tokens=False)) < TOKENS
    lines = [json.loads(line) for line in (folder / "taught.taught.jsonl").read_text().splitlines()]
    assert len(lines) == PROMPTS


def test_the_same_call_again_asks_nothing(taught):
    _, (first, second) = taught
    assert len(first.splitlines()) == PROMPTS * SAMPLES
    assert second == first
