"""Work that the rollouts of a prompt share is done once."""
