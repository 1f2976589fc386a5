"""What a guide is and where it comes from: trajectories, caches, sources, replay, verifiers."""
