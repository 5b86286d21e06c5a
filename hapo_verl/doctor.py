"""Checks an installation and, if overrides are given, a launch. Prints one line per check; exit code 1 if one fails.

python -m hapo_verl.doctor
python -m hapo_verl.doctor +hapo=paper data.train_files=train.parquet actor_rollout_ref.model.path=...
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if every check passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m hapo_verl.doctor",
        description="Checks an installation of hapo-verl and a launch, with one line per check.",
    )
    parser.add_argument("overrides", nargs="*", help="overrides of a launch, as on verl's command line")
    parser.add_argument("--no-ray", action="store_true", help="do not start a local Ray for the checks inside a worker")
    parser.add_argument(
        "--no-model", action="store_true", help="do not load the launch's model to score demonstrations"
    )
    args = parser.parse_args(argv)

    from hapo_verl.launch.diagnosis import findings

    wrong = 0
    for finding in findings(args.overrides, ray=not args.no_ray, model=not args.no_model):
        print(f"{'ok  ' if finding.right else 'FAIL'}  {finding.name}: {finding.detail}", flush=True)
        wrong += not finding.right
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
