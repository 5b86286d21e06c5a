"""Does our trainer pass TRL's own GRPO tests in the place of theirs?

    python bench/trl_own_tests.py --tests TRL/tests --origin "git 1234abc (1.10.0.dev0)"

TRL is its unpacked source; neither wheel nor sdist has tests. Runs in TRL's environment, without network:
`trl_stand_ins.py` makes the models and data sets. Each test of text models on the CPU runs three times:

    trl            TRL's own GRPOTrainer: the control
    hapo           HapoGRPOTrainer with its default block
    demonstrated   a demonstration in every group

It writes results/trl/own_tests.json and own_tests.md. An hour on two cores; when it is started again, it continues.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from harness import REPOSITORY, machine, version
from trl_stand_ins import OUTCOMES, QUICK, QWENS, TRAINER, write_hub

FILE = "test_grpo_trainer.py"
# Images and what needs a GPU are left out; a part of the tests lets the model write tokens with Qwen's ids.
PARTS = {
    QUICK: "not VLM and not Slow and not mask_truncated",
    QWENS: "not VLM and not Slow and mask_truncated",
}
TRAINERS = ("trl", "hapo", "demonstrated")
KINDS = {
    "passed": "passed as with TRL's trainer",
    "refused": "refused by us, in one line",
    "failed by both": "failed with TRL's trainer too",
    "failed by ours": "failed with ours only",
    "passed by ours": "passed with ours only",
    "skipped": "skipped: a package or a stand-in is missing",
}


def run(tests: Path, work: Path, trainer: str, only: str | None) -> None:
    """Run TRL's tests with a trainer; outcomes are appended to a file in `work`, and those already there are kept."""
    # A copy of the tests alone: beside TRL's source they would import that instead of the installed package.
    shutil.copytree(tests, work / "tests", dirs_exist_ok=True)
    (work / "pytest.ini").write_text("[pytest]\n")
    for vocabulary, chosen in PARTS.items():
        hub = work / f"hub-{vocabulary}"
        write_hub(hub, vocabulary)
        paths = [str(REPOSITORY / "bench"), str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH")]
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "trl_stand_ins", "-p", "no:cacheprovider"),
                *("-c", "pytest.ini", "--tb=line", "--timeout=900", f"tests/{FILE}"),
                *("-k", chosen if only is None else f"({chosen}) and ({only})"),
            ],
            cwd=work,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "HF_HOME": str(work),
                "HF_HUB_CACHE": str(hub),
                "HF_HUB_OFFLINE": "1",
                "TRL_EXPERIMENTAL_SILENCE": "1",
                TRAINER: trainer,
                OUTCOMES: str(work / f"{trainer}.jsonl"),
            },
            check=False,
        )


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The outcomes by test."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.pop("test"): line for line in map(json.loads, lines)}


def kind(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The kind of a test, a key of `KINDS`, from its outcomes with TRL's trainer and ours."""
    if "skipped" in (theirs["outcome"], ours["outcome"]):
        return "skipped"
    if (ours["error"] or "").startswith("ConfigError"):
        return "refused"
    passed = theirs["outcome"] == "passed", ours["outcome"] == "passed"
    return {
        (True, True): "passed",
        (True, False): "failed by ours",
        (False, True): "passed by ours",
        (False, False): "failed by both",
    }[passed]


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    outcomes, ours = record["outcomes"], TRAINERS[1:]
    kinds = {name: {test: kind(of["trl"], of[name]) for test, of in outcomes.items() if name in of} for name in ours}
    lines = ["# TRL's own GRPO tests with our trainer", "", record["origin"], ""]
    lines += [f"| | {' | '.join(ours)} |", f"|---|{'---|' * len(ours)}"]
    counts = {name: Counter(of_tests.values()) for name, of_tests in kinds.items()}
    lines += [f"| {text} | {' | '.join(str(counts[name][which]) for name in ours)} |" for which, text in KINDS.items()]
    groups = {
        name: [sum(of.get(name, {}).get(k, 0) for of in outcomes.values()) for k in ("injected", "judged")]
        for name in ours
    }
    counted = ["{} of {}".format(*groups[name]) if groups[name][1] else "not counted" for name in ours]
    lines.append(f"| groups with a demonstration | {' | '.join(counted)} |")
    refused = Counter(outcomes[test]["hapo"]["error"] for test, which in kinds["hapo"].items() if which == "refused")
    lines += ["", "## Refused", "", "| tests | error |", "|---|---|"]
    lines += [f"| {count} | {error.removeprefix('ConfigError: ')} |" for error, count in refused.most_common()]
    for which in ("failed by ours", "failed by both", "passed by ours"):
        found = {test: name for name in reversed(ours) for test, of in kinds[name].items() if of == which}
        if found:
            lines += ["", f"## {which.capitalize()}", "", "| test | trainer | error |", "|---|---|---|"]
        for test, name in found.items():
            error = outcomes[test]["trl" if which == "passed by ours" else name]["error"] or ""
            lines.append(f"| `{test}` | {name} | {error[:160].replace('|', '/')} |")
    about = record["machine"]
    software = ", ".join(f"{name} {about[name]}" for name in ("torch", "trl", "transformers"))
    lines += ["", f"`{about['command']}`, commit {about['commit']}, {about['date']}: {about['device']}, {software}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the tests with each trainer, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="the folder `tests` of TRL's source")
    parser.add_argument("--origin", required=True, help="where it came from, with the commit")
    parser.add_argument("--trainer", action="append", choices=TRAINERS, help="only this one, may be repeated")
    parser.add_argument("--table", action="store_true", help="only write what is known already")
    parser.add_argument("-k", dest="only", help="only these tests, as in pytest")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "trl_own_tests")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results" / "trl")
    given = parser.parse_args()
    for trainer in () if given.table else given.trainer or TRAINERS:
        run(given.tests.resolve(), given.work.resolve(), trainer, given.only)
    found = {name: read(given.work / f"{name}.jsonl") for name in TRAINERS}
    outcomes = {
        test: {name: of[test] for name, of in found.items() if test in of}
        for test in found["trl"]
        if test in found["hapo"]
    }
    about = machine() | {"command": "python bench/trl_own_tests.py --tests TRL/tests --origin ORIGIN"}
    about |= {name: version(name) for name in ("trl", "transformers", "peft")}
    record = {"origin": given.origin, "machine": about, "outcomes": outcomes}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "own_tests.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "own_tests.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
