"""The task of reversing digits: a tiny model can learn it but hardly ever guesses an answer.

The prompt is K digits, the answer the same digits backwards, and only the exact answer is rewarded. With a vocabulary
of V tokens a random policy succeeds with probability about 1/V^(K+1). So all rollouts of a group fail, and GRPO's
advantages are all 0. The demonstration is the answer.

    python recipes/quickstart/digits.py --output DIR --digits 3      writes DIR/train.parquet and DIR/heldout.parquet
"""

import argparse
import random
from pathlib import Path

DATA_SOURCE = "reverse_digits"


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """The reward function for verl: 1 for exactly the reversed digits, 0 for everything else."""
    success = float(solution_str == ground_truth)
    return {"score": success, "acc": success}


def problems(digits: int, train: int, heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """Digit strings for training (drawn with replacement), and held-out ones (distinct, never trained on).

    Args:
        digits: K, length of each string.
        train: number of training problems.
        heldout: number of held-out problems, fewer than 10^K.
        seed: seed of the draw.

    Raises:
        ValueError: if no string would be left for training.
    """
    if not 0 < heldout < 10**digits:
        raise ValueError(f"heldout={heldout}: of 10^{digits} strings some must be left to train on. Use fewer.")
    rng = random.Random(seed)
    strings = [f"{number:0{digits}d}" for number in range(10**digits)]
    rng.shuffle(strings)
    return rng.choices(strings[heldout:], k=train), strings[:heldout]


def row(question: str, index: int, split: str) -> dict:
    """A row in verl's format, with the demonstration."""
    answer = question[::-1]
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": index, "split": split},
        "demonstration": answer,
    }


def write(output: Path, *, digits: int, train: int, heldout: int, seed: int) -> None:
    """Write `train.parquet` and `heldout.parquet` into the folder `output`."""
    import pandas

    output.mkdir(parents=True, exist_ok=True)
    splits = zip(("train", "heldout"), problems(digits, train, heldout, seed), strict=True)
    for split, questions in splits:
        rows = [row(question, index, split) for index, question in enumerate(questions)]
        pandas.DataFrame(rows).to_parquet(output / f"{split}.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--digits", type=int, default=3)
    parser.add_argument("--train", type=int, default=4096)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    write(**vars(parser.parse_args()))
