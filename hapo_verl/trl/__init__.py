"""HAPO in TRL's GRPOTrainer: `HapoGRPOTrainer` and `HapoGRPOConfig` in the place of TRL's own two. No verl."""

from hapo_verl.trl.config import HapoGRPOConfig
from hapo_verl.trl.trainer import HapoGRPOTrainer

__all__ = ["HapoGRPOConfig", "HapoGRPOTrainer"]
