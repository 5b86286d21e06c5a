"""Trains SmolLM2-135M-Instruct on word problems with TRL's trainer on a CPU; data and model are the quickstart's.

python recipes/trl/words.py                                       HAPO
python recipes/trl/words.py --hapo '{"gate": {"name": "never"}}'  no demonstrations
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import smollm2
import word_problems
from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer

SETTINGS = {
    "output_dir": "outputs/trl", "hapo": {"gate": {"name": "annealed"}, "loss": {"exponent": 0.0}}, "max_steps": 32,
    "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 16, "num_generations": 8,
    "gradient_accumulation_steps": 4, "max_completion_length": word_problems.RESPONSE_TOKENS, "logging_steps": 1,
    "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": [], "seed": 1,
}  # fmt: skip


def reward(completions, answer, **_):
    """The rewards: 1 for a right last line, else 0."""
    return [float(word_problems.is_right(c[0]["content"], a)) for c, a in zip(completions, answer, strict=True)]


def success(model, tokenizer, problems):
    """The share of problems whose greedy answer is right."""
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    ids = model.eval().generate(**prompts, do_sample=False, max_new_tokens=word_problems.RESPONSE_TOKENS)
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].size(1) :], skip_special_tokens=True)
    return sum(word_problems.is_right(t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(problems)


def setup(trainer_class, args):
    """Make the trainer, the tokenizer and the held-out problems."""
    model, tokenizer = smollm2.load()
    problems = word_problems.splits(train=8 * args.max_steps, heldout=50, seed=args.seed)
    rows = [
        {"prompt": [{"role": "user", "content": p.question}], "answer": p.answer, "demonstration": p.demonstration}
        for p in problems["train"]
    ]
    data = Dataset.from_list(rows)
    return trainer_class(model, reward, args, data, processing_class=tokenizer), tokenizer, problems["heldout"]


if __name__ == "__main__":
    parser = HfArgumentParser(HapoGRPOConfig)  # pyright: ignore[reportArgumentType]
    parser.set_defaults(**SETTINGS)
    trainer, tokenizer, heldout = setup(HapoGRPOTrainer, parser.parse_args_into_dataclasses()[0])
    print("held-out success before", success(trainer.model, tokenizer, heldout))
    trainer.train()
    print("held-out success after", success(trainer.model, tokenizer, heldout))
