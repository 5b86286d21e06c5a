"""How much does the gates' memory of prompts cost the trainer with a million prompts?

    python bench/gate_state.py [--smoke] [--out DIR]

A step attaches priors to its prompts and observes their outcomes; some steps also write and read a checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hapo_verl.config import HapoConfig
from hapo_verl.driver.gatekeeper import STATE_FILE, Gatekeeper
from harness import Prompts, machine

STEPS = 20


def a_row(index: int) -> dict:
    """A row as in verl's data frame."""
    return {"data_source": f"source-{index % 5}", "extra_info": {"index": index}, "raw_prompt": [], "prompt": []}


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def measure(prompts: int, batch: int) -> dict[str, float]:
    """Measure a run of `STEPS` steps over a data set of `prompts` prompts, with `batch` prompts per step."""
    keeper = Gatekeeper(HapoConfig.parse({"gate": {"name": "posterior"}}), total_steps=STEPS)
    rows = Prompts(prompts, a_row)
    seconds = milliseconds(lambda: keeper.know(rows, prompt_column="prompt")) / 1e3
    tracemalloc.start()
    keeper.know(rows, prompt_column="prompt")
    held, peak = (value / 2**20 for value in tracemalloc.get_traced_memory())
    tracemalloc.stop()

    rng, attach, observe = np.random.default_rng(0), [], []
    for step in range(1, STEPS + 1):
        chosen = [a_row(index) for index in rng.choice(prompts, batch, replace=False).tolist()]
        columns = {name: [row[name] for row in chosen] for name in chosen[0]}
        situations: list[dict] = []
        attach.append(
            milliseconds(lambda: situations.extend(keeper.situations(columns, step, prompt_column="prompt")))  # noqa: B023
        )
        groups = [
            {"key": situation["key"], "successes": [True] * 3 + [False] * 5, "firing": [1.0] * 9}
            for situation in situations
        ]
        observe.append(milliseconds(lambda: keeper.observe(groups)))  # noqa: B023
    with tempfile.TemporaryDirectory() as folder:
        save = milliseconds(lambda: keeper.save(Path(folder)))
        size = (Path(folder) / STATE_FILE).stat().st_size / 2**20
        load = milliseconds(lambda: keeper.load(Path(folder)))
    return {
        "prompts": prompts,
        "batch": batch,
        "start-up s": round(seconds, 2),
        "held MiB": round(held, 1),
        "peak MiB": round(peak, 1),
        "attach ms": round(float(np.median(attach)), 2),
        "observe ms": round(float(np.median(observe)), 2),
        "save ms": round(save, 1),
        "load ms": round(load, 1),
        "file MiB": round(size, 2),
    }


def main() -> None:
    """Print the table and write `gate_state.json`."""
    smoke = "--smoke" in sys.argv
    out = Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else Path(__file__).parent / "results"
    cases = [(1000, 16)] if smoke else [(10_000, 1024), (100_000, 1024), (1_000_000, 1024)]
    rows = [measure(*case) for case in cases]
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))
    out.mkdir(parents=True, exist_ok=True)
    (out / "gate_state.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
