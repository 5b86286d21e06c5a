"""Runs two optimizer steps of HAPO on given completions, in one process or in one of several, and writes the weights.

Called by `test_processes.py`, and started by it as `step_process.py OUTPUT` in each of two processes.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))
from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer
from hapo_verl.trl.trainer import DEMONSTRATION
from tests.trl.conftest import PER_GROUP, reward, rows

# The completions of one group, in the order of its rows; the third is the worst.
WRITTEN = ("000<|im_end|>", "12<|im_end|>", "123456", "1234<|im_end|>")


def main(output: Path) -> None:
    import tiny_model  # It is in the recipes' folder, which conftest.py adds.

    tokenizer = tiny_model.make_tokenizer("0123456789")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = HapoGRPOTrainer(
        tiny_model.make_model(tokenizer, hidden=64, layers=2, seed=0),
        reward,
        HapoGRPOConfig(
            output_dir=str(output.parent / "run"),
            hapo={"gate": {"name": "posterior"}},
            # Each step has two groups. With two processes, the rows of one of them are in both processes.
            per_device_train_batch_size=PER_GROUP // processes,
            gradient_accumulation_steps=2,
            num_generations=PER_GROUP,
            max_completion_length=6,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        # Every group but one fails, because the completion 000 is right for only one question.
        Dataset.from_list(rows()),
        processing_class=tokenizer,
    )
    first = trainer.accelerator.process_index
    seen = []

    def generate(prompt_ids, *args, **kwargs):
        start = first * len(prompt_ids)
        texts = [WRITTEN[(start + i) % PER_GROUP] for i in range(len(prompt_ids))]
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts], None

    trainer._generate_single_turn = generate
    generate_and_score = trainer._generate_and_score_completions

    def noting(inputs):
        found = generate_and_score(inputs)
        rows_of_all = trainer.accelerator.gather(
            torch.stack([found[DEMONSTRATION].float(), found["advantages"]], dim=1)
        )
        seen.append(rows_of_all.tolist())
        return found

    trainer._generate_and_score_completions = noting
    trainer.train()
    if trainer.accelerator.is_main_process:
        state = trainer._gate_state.posterior
        torch.save(
            {
                "rows": seen,
                "success": torch.from_numpy(state.success_K),
                "injected": [log["hapo/injected/group_share"] for log in trainer.state.log_history if "reward" in log],
                **{name: value.detach() for name, value in trainer.model.named_parameters()},
            },
            output,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
