"""Writes made-up files of a run: verl's metrics and HAPO's trace."""

import json
import random

OUTCOMES = ("injected", "not_fired", "overlong")


def write_metrics(path, steps, *, seed=0, more=0):
    """Write verl's metrics; returns the records as {step: data}."""
    rng = random.Random(seed)
    names = [
        "hapo/on_policy_success", "hapo/gate/firing_rate", "hapo/gate/threshold", "hapo/injected/row_share",
        "hapo/trained/row_share", "hapo/without_signal/before_injection", "hapo/refused/overlong", "hapo/refused/missing",
        "hapo/loss/demonstration", "actor/grad_norm", "response_length/mean", "timing_s/step",
        *(f"other/{i}" for i in range(more)),
    ]  # fmt: skip
    records = {0: {"val-core/words/acc/mean@1": 0.25}}
    for step in range(1, steps + 1):
        records[step] = {name: rng.random() for name in names}
    records[steps]["val-core/words/acc/mean@1"] = 0.75
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in records.items()))
    return records


def write_trace(folder, steps, *, prompts, groups=4, rollouts=4, tokens=20, seed=0, vocabulary=9):
    """Write a trace in which the prompts are visited in turn, with the rows of every group."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(
        json.dumps({"gate": "paper", "mode": "append", "loss": {"shape": "power", "shaping": "0.1", "exponent": 1.0}})
    )
    with (
        (folder / "groups.jsonl").open("w") as lines,
        (folder / "rows.jsonl").open("w") as rows,
        (folder / "loss-1.jsonl").open("w") as losses,
    ):
        for number in range(steps * groups):
            step, index, uid = 1 + number // groups, number % prompts, f"u{number}"
            won = [rng.random() < 0.3 for _ in range(rollouts)]
            fired = sum(won) < 2
            group = {
                "step": step, "uid": uid, "index": index, "data_source": "words", "fired": fired,
                "outcome": "injected" if fired else "not_fired", "successes": won, "scores": [float(w) for w in won],
            }  # fmt: skip
            lines.write(json.dumps(group) + "\n")
            for member in range(rollouts + fired):
                demonstration = member == rollouts
                row = {
                    "step": step, "uid": uid, "prompts": [index % vocabulary, 1],
                    "responses": [rng.randrange(vocabulary) for _ in range(tokens)],
                    "score": 1.0 if demonstration else float(won[member]), "hapo_demonstration": demonstration,
                }  # fmt: skip
                rows.write(json.dumps(row) + "\n")
                loss = {
                    "uid": uid, "responses": row["responses"], "hapo_demonstration": demonstration,
                    "advantages": [0.5] * tokens, "response_mask": [1] * tokens,
                    "logp": [round(-5 * rng.random(), 3) for _ in range(tokens)],
                }  # fmt: skip
                losses.write(json.dumps(loss) + "\n")
