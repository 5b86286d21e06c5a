"""Checks that the model's weights fit the bucket by which verl sends new weights to vLLM.

verl's actor sends its weights in pieces of `rollout.checkpoint_engine.update_weights_bucket_megabytes`. A tied weight
is sent under both of its names. Some versions of vLLM treat a tied weight as uninitialised unless both names come in
the same piece, so they need all weights in one. If the pieces go through shared memory, the largest weight must fit.
Sizes are read from the headers of the model's safetensors files; no weight is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from hapo_verl.config import ConfigError

KEY = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
MIB = 2**20
_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
_INPUT, _OUTPUT = "embed_tokens.weight", "lm_head.weight"


class Weights(NamedTuple):
    """The weights that an update sends: total and largest size in bytes, and whether the embeddings are tied."""

    total: int
    largest: int
    tied: bool


def check_bucket(config: DictConfig) -> str:
    """Check the bucket, and describe in one line what an update sends.

    Raises:
        ConfigError: if an update would fail or wait for ever.
    """
    engine, path = OmegaConf.select(config, "actor_rollout_ref.rollout.name"), str(config.actor_rollout_ref.model.path)
    if engine not in (None, "vllm"):
        return f"not checked for {engine}"
    weights = sent_weights(config)
    if weights is None:
        return f"not checked: {path} has no safetensors files on this machine"
    bucket, what = OmegaConf.select(config, KEY), f"{path} sends {_mib(weights.total)} MiB at every update"
    if weights.tied and weights.total > bucket * MIB and _tied_weights_need_one_bucket():
        raise ConfigError(
            f"{KEY}={bucket}: {what}, and its embeddings are tied, which the installed vLLM takes only in one piece: "
            f"the run would wait for ever. Use {KEY}={_mib(weights.total)} or more."
        )
    if weights.largest > bucket * MIB and _through_shared_memory(config):
        raise ConfigError(
            f"{KEY}={bucket}: the largest weight of {path} has {_mib(weights.largest)} MiB and goes through in one "
            f"piece. Use {KEY}={_mib(weights.largest)} or more."
        )
    return f"{what}{', tied embeddings among them' if weights.tied else ''}; {bucket} MiB at a time"


def _mib(size: int) -> int:
    return math.ceil(size / MIB)


def sent_weights(config: DictConfig) -> Weights | None:
    """The weights of a model on this machine, in the actor's data type; None if their sizes are not known."""
    folder = Path(str(config.actor_rollout_ref.model.path)).expanduser()
    try:
        model = json.loads((folder / "config.json").read_text())
        counts = dict(_counts(folder))
    except (OSError, ValueError):
        return None
    if not counts:
        return None
    tied = _is_tied(model, OmegaConf.select(config, "actor_rollout_ref.model.override_config"))
    if tied and not any(name.endswith(_OUTPUT) for name in counts):
        embeddings = [count for name, count in counts.items() if name.endswith(_INPUT)]
        counts |= {_OUTPUT: max(embeddings, default=0)}
    actor = config.actor_rollout_ref.actor
    # Engines other than FSDP send the dtype in which they compute.
    dtype = OmegaConf.select(actor, "fsdp_config.model_dtype") if str(actor.strategy).startswith("fsdp") else "bf16"
    size = _BYTES.get(str(dtype), 4)
    return Weights(sum(counts.values()) * size, max(counts.values()) * size, tied)


def _is_tied(model: dict[str, Any], override: Any) -> bool:
    key = "tie_word_embeddings"
    if override is not None and key in override:
        return bool(override[key])
    # A multi-modal model may have the key in the block of its language model.
    for block in (model, model.get("text_config") or {}):
        if key in block:
            return bool(block[key])
    try:
        # config.json leaves out values that are the default of the architecture.
        from transformers import AutoConfig

        kind = AutoConfig.for_model(str(model.get("model_type")))
    except (ImportError, ValueError):
        return False
    return bool(getattr(kind.get_text_config(), key, False))


def _counts(folder: Path) -> Iterator[tuple[str, int]]:
    """The name and the number of elements of every weight.

    Raises:
        OSError, ValueError: if a file is not a safetensors file.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError(f"{file} is no safetensors file")
            header = json.loads(opened.read(size))
        yield from ((name, math.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


def _tied_weights_need_one_bucket() -> bool:
    """Whether the installed vLLM needs both names of a tied weight in one piece, as 0.30 does; does not import it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return False
    loader = Path(spec.submodule_search_locations[0]) / "model_executor" / "models" / "utils.py"
    return loader.is_file() and "_check_skipped_aliases" in loader.read_text(encoding="utf-8")


def _through_shared_memory(config: DictConfig) -> bool:
    if config.trainer.device == "cpu":
        return True
    from verl.utils.device import is_support_ipc

    return not is_support_ipc()
