"""A run on disk and its settings: configuration, folder, checkpoints, presets, launchers."""
