"""HAPO's gate and demonstrations as an agent executor of OpenRLHF. Not run by us yet: OpenRLHF needs a GPU."""
