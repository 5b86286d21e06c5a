"""HAPO for TRL, without verl: `HapoGRPOTrainer` and `HapoGRPOConfig` replace TRL's GRPOTrainer and GRPOConfig."""

from hapo_verl.trl.config import HapoGRPOConfig
from hapo_verl.trl.trainer import HapoGRPOTrainer

__all__ = ["HapoGRPOConfig", "HapoGRPOTrainer"]
