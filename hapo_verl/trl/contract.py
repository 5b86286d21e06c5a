"""The methods of TRL's GRPOTrainer that our trainer extends, with their signatures in the supported versions of TRL.

When a trainer is made, a TRL with other signatures is refused with one line.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from packaging.version import Version

from hapo_verl.config import ConfigError

READ_IN = "1.16.0"
SUPPORTED = (Version("1.16.0"), Version("1.17"))

# Method → the names of its parameters in `READ_IN`, in order.
EXTENDED = {
    "_generate": ("self", "prompts"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_per_token_logps_and_entropies": (
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        *("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
        *("spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
    ),
    "_compute_loss": ("self", "model", "inputs"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}


def check_contract() -> None:
    """Raise `ConfigError` if this package does not support the installed TRL."""
    trl: Any = importlib.import_module("trl")
    version = Version(trl.__version__)
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise ConfigError(
            f"trl=={version}: hapo-verl supports {SUPPORTED[0]} up to, not including, {SUPPORTED[1]}. "
            f"pip install 'trl>={SUPPORTED[0]},<{SUPPORTED[1]}'."
        )
    for method, parameters in EXTENDED.items():
        found = tuple(inspect.signature(getattr(trl.GRPOTrainer, method, lambda: None)).parameters)
        if found != parameters:
            raise ConfigError(
                f"trl=={version}: GRPOTrainer.{method}({', '.join(found)}) has changed since TRL {READ_IN}, where it "
                f"took ({', '.join(parameters)}). pip install trl=={READ_IN}."
            )
