"""What TRL's own GRPO tests load by name, made here: tiny models and data sets; and a pytest plugin that uses them.

`write_hub` fills a folder that works as `HF_HUB_CACHE`, so that transformers and TRL load the stand-ins by the names in
the tests. The plugin (`-p trl_stand_ins`) replaces names in the test modules: `load_dataset`, and for `TRAINER` other
than `trl` also `GRPOTrainer` and `GRPOConfig`. It appends one line of JSON for each test to the file `OUTCOMES`.

What differs from TRL's files: the weights are random, the text has one token per byte,
and the data sets have other texts and a column `demonstration`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from hapo_verl.algo.judgement import Judgement, described

TRAINER, OUTCOMES = "HAPO_TRL_TRAINER", "HAPO_TRL_OUTCOMES"
# Name → the `hapo` block. In `demonstrated`, every group gets a demonstration, whatever the reward functions say.
BLOCKS: dict[str, dict[str, Any]] = {
    "hapo": {},
    "demonstrated": {"gate": {"name": "always"}, "success_threshold": -1e6},
}
OWNER = "trl-internal-testing"
# The last ids of the vocabulary, in this order, as in Qwen's.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A test with a small vocabulary takes a fifth of the time; some tests let the model write Qwen's ids.
QWENS, QUICK = 151_646, 1024
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Name of the model → (architecture, chat template in TRL's package, settings beside `SMALL`).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", "qwen2_5", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", "qwen2_5", {"num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 8}),
    "tiny-Qwen3ForSequenceClassification": (
        *("Qwen3ForSequenceClassification", "qwen3"),
        {"head_dim": 8, "num_labels": 1},
    ),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "qwen3", {**EXPERTS, "head_dim": 8, "num_experts": 4}),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", "qwen2_5", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "qwen2_5", {"num_labels": 1}),
    "tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", "qwen2_5", {"head_dim": 2}),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", "qwen2_5", {"head_dim": 8}),
    "tiny-Cohere2ForCausalLM": ("Cohere2ForCausalLM", "qwen2_5", {"logit_scale": 1.0}),
    "tiny-Glm4MoeForCausalLM": (
        *("Glm4MoeForCausalLM", "qwen2_5"),
        {**EXPERTS, "head_dim": 2, "n_routed_experts": 4, "attention_bias": True, "use_qk_norm": True},
    ),
    "tiny-GptOssForCausalLM": ("GptOssForCausalLM", "qwen2_5", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-NemotronHForCausalLM-nano": (
        *("NemotronHForCausalLM", "qwen2_5"),
        {
            **EXPERTS,
            "hidden_size": 16,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "mamba_n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
}
# Prompts and demonstrations; None is a row without one. Most tests allow eight tokens, and here a token is a byte.
LINES = (
    *("A gate opens for the group that", "fails."),
    *("One row of many is", "lost."),
    *("The worst completion leaves its", "row."),
    *("A demonstration is scored", "too."),
    *("What the policy can do needs", "none."),
    *("Rewards of one group are", "one."),
    *("No step without", "it."),
    *("Short answers are", "no."),
    *("Everything that is written has to", "end."),
    *("A threshold is a number", None),
)


def write_hub(hub: Path, vocabulary: int) -> None:
    """Write all stand-in models into `hub`, in the layout of a hub's cache.

    Args:
        hub: the folder.
        vocabulary: the number of tokens, `QWENS` or `QUICK`.
    """
    templates = Path(importlib.import_module("trl").__path__[0]) / "chat_templates"
    tokenizer = _tokenizer(vocabulary)
    for name, (architecture, template, more) in MODELS.items():
        folder = hub / f"models--{OWNER}--{name}"
        snapshot = folder / "snapshots" / "0"
        if snapshot.exists():
            continue
        tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
        model_class = getattr(transformers, architecture)
        torch.manual_seed(0)
        config = model_class.config_class(
            **SMALL | more,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model_class(config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(snapshot.name)


def _tokenizer(size: int) -> PreTrainedTokenizerBase:
    """A token for each byte and tokens that stand for the others of Qwen's vocabulary, but come from no text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    vocabulary |= {f"unused{number}": number for number in range(len(symbols), size - len(SPECIAL))}
    vocabulary |= {token: size - len(SPECIAL) + number for number, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = Qwen2Tokenizer(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return fast


def load_dataset(path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False) -> Any:
    """The stand-in for a data set of TRL's tests: 17 rows to train on and 2 to test on."""
    if path != f"{OWNER}/zen" or name not in ("standard_prompt_only", "conversational_prompt_only"):
        pytest.skip(f"no stand-in for the data set {path}, {name}")
    pairs = [(LINES[i], LINES[i + 1]) for i in range(0, len(LINES), 2)]
    pairs = [(f"{prompt}{mark}", answer) for mark in ("", " ") for prompt, answer in pairs][:19]
    rows = [{"prompt": prompt, "demonstration": answer} for prompt, answer in pairs]
    if name == "conversational_prompt_only":
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    parts: Any = {"train": datasets.Dataset.from_list(rows[:17]), "test": datasets.Dataset.from_list(rows[17:])}
    if streaming:
        parts = {part: data.to_iterable_dataset() for part, data in parts.items()}
    if split is not None:
        return parts[split]
    return datasets.IterableDatasetDict(parts) if streaming else datasets.DatasetDict(parts)


# --- the plugin ---

# Of the test that is running: groups that the gate was applied to, and groups with a demonstration.
_groups: Counter[str] = Counter()


def pytest_configure() -> None:
    """Answer what tests of another version ask `trl.import_utils` for and the installed one does not have."""
    from trl import import_utils

    def is_available(name: str) -> Any:
        if name.startswith("is_") and name.endswith("_available"):
            return lambda: importlib.util.find_spec(name[len("is_") : -len("_available")]) is not None
        raise AttributeError(name)

    import_utils.__getattr__ = is_available  # pyright: ignore[reportAttributeAccessIssue]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Replace the names in the modules of the tests, and leave out tests with a known outcome."""
    chosen, outcomes = os.environ.get(TRAINER), Path(os.environ.get(OUTCOMES, ""))
    if chosen is None:
        return
    if outcomes.is_file():
        known = {json.loads(line)["test"] for line in outcomes.read_text().splitlines()}
        items[:] = [item for item in items if _name(item) not in known]
    for module in {item.module for item in items}:
        module.load_dataset = load_dataset
        if chosen != "trl":
            from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer, trainer

            trainer.described = _counted
            module.GRPOTrainer, module.GRPOConfig = HapoGRPOTrainer, partial(HapoGRPOConfig, hapo=BLOCKS[chosen])


def _counted(judgements: Sequence[Judgement], per_group: int, *, injected: int, **more: Any) -> dict[str, float]:
    _groups.update(judged=len(judgements), injected=injected)
    return described(judgements, per_group, injected=injected, **more)


def _name(item: Any) -> str:
    return item.nodeid.partition("::")[2]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Append the outcome of a test to `OUTCOMES`."""
    report = yield
    if TRAINER in os.environ and (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
        error = call.excinfo
        line = {
            "test": _name(item),
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            **_groups,
            "error": None
            if error is None
            else f"{error.type.__name__}: {str(error.value).strip()}".split("\n")[0][:300],
        }
        with Path(os.environ[OUTCOMES]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        _groups.clear()
    return report
