"""One page about a run, or several over each other: curves, the gate, prompts and examples. No network, no server.

python -m hapo_verl.report outputs/quickstart/words-plus-seed1 --output report.html
"""
