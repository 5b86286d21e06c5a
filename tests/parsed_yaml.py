"""Parses each YAML text once in a process: composing a launch reads 28 files of verl and Hydra, for half a second."""

import copy
from typing import Any

import yaml

_parsed: dict[tuple[str, str], Any] = {}
_load = yaml.load


def load(stream, Loader):
    """Like `yaml.load`; a copy of the first result if this loader has read the same text before."""
    text = stream if isinstance(stream, (str, bytes)) else stream.read()
    key = (f"{Loader.__module__}.{Loader.__qualname__}", text)
    if key not in _parsed:
        _parsed[key] = _load(text, Loader=Loader)
    return copy.deepcopy(_parsed[key])


def install() -> None:
    """Let OmegaConf, and all that use `yaml.load`, read through `load`."""
    yaml.load = load
