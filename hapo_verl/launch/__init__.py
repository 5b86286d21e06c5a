"""Code that runs before a training starts: checks of a launch, presets, the doctor's checks."""
