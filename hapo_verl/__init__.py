"""HAPO for verl: verified demonstrations for the prompts on which every rollout fails (arXiv 2603.11321)."""

__version__ = "0.1.0"
