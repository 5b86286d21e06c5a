"""The command line of the data tools; the exit code is 0 if at least one row was written."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.data import demonstrations as demonstrations_
from hapo_verl.data import gsm8k as gsm8k_
from hapo_verl.data import gym as gym_
from hapo_verl.data import teach_command
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet


def gsm8k(args: argparse.Namespace) -> None:
    """Write GSM8K with its human solutions as demonstrations."""
    from tqdm import tqdm

    from hapo_verl.rollout.reward import default_score

    records = tqdm(gsm8k_.gsm8k_records(args.input), desc="verifying", unit="row")
    rows, left_out = gsm8k_.verified_rows(records, default_score, split=args.split)
    path = args.output / f"{args.split}.parquet"
    _print_reasons(left_out, "left out")
    write_parquet(rows, path)
    _print_kept(len(rows), len(rows) + left_out.total(), path)


def demonstrations(args: argparse.Namespace) -> None:
    """Write a data set whose demonstrations, from other projects' columns, are verified.

    Rows without a usable demonstration stay, with null.
    """
    from tqdm import tqdm

    rows = list(read_parquet(args.input))
    column = demonstrations_.column_of(rows[0] if rows else (), args.column)
    print(f"demonstrations are read from the column {column}")
    judge = partial(
        demonstrations_.judge_of,
        str(args.tokenizer),
        args.max_response_length,
        args.reward and str(args.reward),
        args.reward_name,
        args.success_threshold,
        args.multi_turn,
    )
    chosen = demonstrations_.choices(rows, column, judge, workers=args.workers)
    chosen = tqdm(chosen, total=len(rows), desc="verifying", unit="row")
    kept, rejected = demonstrations_.verified(rows, chosen, column, only_verified=args.only_verified)
    report = args.output.with_suffix(".rejected.jsonl")
    reasons = demonstrations_.write_report(rejected, report)
    _print_reasons(reasons, "left out" if args.only_verified else "without one")
    print(f"{'report':<{_WIDTH}}{report}")
    if len(rejected) == len(rows):
        raise DataError(f"{args.output}: no row has a demonstration that a run would inject. See the reasons above.")
    write_parquet(kept, args.output)
    print(f"{'verified':<{_WIDTH}}{len(rows) - len(rejected):7}  of {len(rows)}")
    _print_kept(len(kept), len(rows), args.output)


def reasoning_gym(args: argparse.Namespace) -> None:
    """Write a task of reasoning-gym, with a demonstration column if the task has worked solutions."""
    rows, without = gym_.rows(args.task, size=args.size, seed=args.seed, split=args.split)
    _print_reasons(without, "without one")
    if without.total() == len(rows):
        print(f"{args.task} has no worked solutions: the file gets no demonstration column")
        rows = [{key: value for key, value in row.items() if key != "demonstration"} for row in rows]
    write_parquet(rows, args.output)
    _print_kept(len(rows), len(rows), args.output)
    print(f"{'reward':<{_WIDTH}}reward.custom_reward_function.path={gym_.__file__}")


def teach(args: argparse.Namespace) -> None:
    """Write a data set with demonstrations from a teacher model behind an OpenAI-compatible server."""
    teach_command.run(args)


_WIDTH = 13


def _print_reasons(reasons: Counter[str], what: str) -> None:
    for reason, count in reasons.most_common():
        print(f"{what:<{_WIDTH}}{count:7}  {reason}")


def _print_kept(kept: int, rows: int, path: Path) -> None:
    print(f"{'kept':<{_WIDTH}}{kept:7}  of {rows}, written to {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if at least one row was written, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m hapo_verl.data", description="Data sets with demonstrations for HAPO."
    )
    command = parser.add_subparsers(dest="dataset", required=True)

    def subcommand(run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = command.add_parser(run.__name__.replace("_", "-"), help=text)
        sub.set_defaults(run=run)
        return sub

    sub = subcommand(gsm8k, "GSM8K with its human solutions as demonstrations")
    sub.add_argument("--input", type=Path, help="JSON lines with question and answer; default: download them")
    sub.add_argument("--output", type=Path, required=True, help="folder for <split>.parquet")
    sub.add_argument("--split", default="train", help="name of the split, used for the file and kept in extra_info")

    sub = subcommand(demonstrations, "the columns of LUFFY (target), AMPO (target_lst) and Prefix-RFT (demos)")
    sub.add_argument("--input", type=Path, required=True, help="parquet file")
    sub.add_argument(
        "--output", type=Path, required=True, help="parquet file to write; a .rejected.jsonl is written beside it"
    )
    sub.add_argument("--tokenizer", type=Path, required=True, help="folder of the model that will be trained")
    sub.add_argument(
        "--max-response-length", type=int, required=True, help="in tokens: the run's data.max_response_length"
    )
    sub.add_argument(
        "--column", choices=demonstrations_.COLUMNS, help="column to read, if the file has more than one of these"
    )
    sub.add_argument("--reward", type=Path, help="the run's reward.custom_reward_function.path; default: verl's own")
    sub.add_argument("--reward-name", default="compute_score", help="the run's reward.custom_reward_function.name")
    sub.add_argument(
        "--success-threshold",
        type=float,
        default=HapoConfig().success_threshold,
        help="the run's hapo.success_threshold",
    )
    sub.add_argument(
        "--multi-turn",
        nargs="*",
        metavar="KEY=VALUE",
        help="if the run uses tool_agent: its keys of actor_rollout_ref.rollout.multi_turn, e.g. function_tool_path",
    )
    sub.add_argument(
        "--only-verified",
        action="store_true",
        help="leave out rows without a usable demonstration; default: keep them without one, for on-policy training",
    )
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes; default: one per core")

    sub = subcommand(reasoning_gym, "a task of reasoning-gym, with its worked solutions if it has some")
    sub.add_argument("--task", required=True, help="name of the task, e.g. gsm_symbolic")
    sub.add_argument("--size", type=int, required=True, help="number of rows")
    sub.add_argument("--output", type=Path, required=True, help="parquet file")
    sub.add_argument("--seed", type=int, default=0, help="seed of the generator; use another one for held-out rows")
    sub.add_argument("--split", default="train", help="name of the split, kept in extra_info")

    sub = subcommand(teach, "ask a model behind an OpenAI-compatible server for the missing demonstrations")
    teach_command.add_arguments(sub)
    args = parser.parse_args(argv)

    try:
        args.run(args)
    except (DataError, ConfigError) as error:
        print(f"hapo_verl.data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
