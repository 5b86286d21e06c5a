"""Makes an HTML page about one or several runs: curves, the gate, prompts and examples. Needs no network, no server.

python -m hapo_verl.report outputs/quickstart/words-plus-seed1 --output report.html
"""
