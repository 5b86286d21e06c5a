"""Runs before the start, without Ray: checks of a launch, presets, the doctor's diagnosis and rehearsal."""
