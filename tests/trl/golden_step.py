"""Recorded steps: the results of TRL's trainer for given completions, to be compared with verl's in verl's environment.

Completions, rows, advantages, loss and every gradient of a tiny model are in `golden_step.json`. It is written, in TRL's
environment, by

    python -m tests.trl.golden_step
"""

import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from tests.trl.conftest import PER_GROUP, rows

FILE = Path(__file__).with_suffix(".json")
# A success among failures, only failures, and a group that needs no demonstration. Each has one worst completion.
WRITTEN = (
    *("000<|im_end|>", "12<|im_end|>", "123456", "1234<|im_end|>"),
    *("9<|im_end|>", "12345<|im_end|>", "987654", "123<|im_end|>"),
    *("200<|im_end|>", "200<|im_end|>", "1<|im_end|>", "200<|im_end|>"),
)
# It fires at one success in four, and not at three.
GATE = {"gate": {"threshold": 0.5}}
GROUPS, LONGEST = len(WRITTEN) // PER_GROUP, 6


class Case(NamedTuple):
    """Settings of a step, with TRL's names; `drift` is how far the policy is from the one that sampled, in nats."""

    loss_type: str
    statistics: str
    loss: dict
    scale_rewards: str = "group"
    temperature: float = 1.0
    drift: float = 0.0


CASES = {
    "dapo": Case("dapo", "on_policy", {}, temperature=0.7),
    "grpo": Case("grpo", "all", {"exponent": 0.0}, drift=0.1),
    "dr_grpo": Case("dr_grpo", "on_policy", {"shape": "trsft"}, scale_rewards="none", drift=0.2),
}


def drifted(logp, drift):
    """Log-probabilities (…, T) of the policy that sampled: off by 0, ±`drift` or twice that, by place in the row."""
    return logp.detach() + drift * ((3 * torch.arange(logp.size(-1))) % 5 - 2)


def model():
    """(model, tokenizer); the weights do not depend on versions of torch's or transformers' initialisation."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tiny_model

    tokenizer = tiny_model.make_tokenizer("0123456789")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy, generator = Qwen2ForCausalLM(config), torch.Generator().manual_seed(1)
    for name, parameter in sorted(policy.named_parameters()):
        drawn = 0.5 * torch.rand(parameter.shape, generator=generator) - 0.25
        parameter.data.copy_(1 + drawn if "norm" in name else drawn)
    return policy, tokenizer


def recorded():
    """The recorded steps by the names of `CASES`."""
    return json.loads(FILE.read_text())


def step(case, folder):
    """The results of TRL's trainer for the completions, in the recorded form."""
    from datasets import Dataset

    from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer
    from hapo_verl.trl.trainer import DEMONSTRATION
    from tests.trl.conftest import reward

    policy, tokenizer = model()
    trainer = HapoGRPOTrainer(
        policy,
        reward,
        HapoGRPOConfig(
            output_dir=str(folder),
            hapo={**GATE, "advantage": {"statistics": case.statistics}, "loss": case.loss},
            loss_type=case.loss_type,
            scale_rewards=case.scale_rewards,
            temperature=case.temperature,
            per_device_train_batch_size=len(WRITTEN),
            num_generations=PER_GROUP,
            max_completion_length=LONGEST,
            max_steps=1,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        Dataset.from_list(rows(GROUPS)),
        processing_class=tokenizer,
    )
    written = [tokenizer.encode(text, add_special_tokens=False) for text in WRITTEN]
    trainer._generate_single_turn = lambda prompt_ids, *_, **__: ([list(row) for row in written], None)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([row for row in rows(GROUPS) for _ in range(PER_GROUP)])
    prompts, mask_BT = batch["prompt_ids"], batch["completion_mask"]
    if case.drift:
        logp_BT, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompts, batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], mask_BT], dim=1),
            mask_BT.size(1),
        )
        batch["old_per_token_logps"] = drifted(logp_BT, case.drift)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return {
        "prompts": [row[mask.bool()].tolist() for row, mask in zip(prompts, batch["prompt_mask"], strict=True)],
        "written": written,
        "responses": [row[mask.bool()].tolist() for row, mask in zip(batch["completion_ids"], mask_BT, strict=True)],
        "demonstration": batch[DEMONSTRATION].tolist(),
        "advantages": digits(batch["advantages"]),
        "loss": digits(loss),
        "gradients": {name: digits(weight.grad.flatten()) for name, weight in trainer.model.named_parameters()},
    }


def digits(values):
    """A tensor as plain numbers with eight digits."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.8g}"))


def assert_same(found, expected, tolerance=1e-5):
    """Raise AssertionError unless two steps have the same rows, and advantages, loss and gradients to fp32 rounding."""
    for name in ("prompts", "responses", "demonstration"):
        assert found[name] == expected[name], name
    assert found["gradients"].keys() == expected["gradients"].keys()
    numbers = {name: (found[name], expected[name]) for name in ("advantages", "loss")}
    numbers |= {name: (found["gradients"][name], values) for name, values in expected["gradients"].items()}
    for name, (ours, theirs) in numbers.items():
        largest = float(torch.tensor(theirs).abs().max())
        torch.testing.assert_close(
            torch.tensor(ours),
            torch.tensor(theirs),
            rtol=0,
            atol=tolerance * largest + 1e-8,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: step(case, folder) for name, case in CASES.items()}
    text = json.dumps(steps, indent=1)
    # A list of numbers is one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: json.dumps(json.loads(found[0])), text)
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
