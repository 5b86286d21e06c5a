"""Hydra presets: makes `+hapo=paper` and `+hapo_platform=cpu` work on any verl command line.

The YAML files are in `hapo_verl/presets/<group>/`; the default values of the `hapo:` block come from
`hapo_verl.config`.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from hapo_verl.config import defaults


class HapoSearchPath(SearchPathPlugin):
    """Adds this package's presets to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("hapo_verl", "pkg://hapo_verl.presets")


def register_presets() -> None:
    """Make the presets visible to every Hydra composition of this process; a second call changes nothing."""
    plugins = Plugins.instance()
    if HapoSearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(HapoSearchPath)
    # The preset files start from this node, so that every key of the block exists and can be overridden. The node
    # accepts unknown keys as well: HAPO refuses them and names the nearest known key, while Hydra would advise the user
    # to add them.
    ConfigStore.instance().store(name="hapo_defaults", node=OmegaConf.create(defaults(), flags={"struct": False}))
