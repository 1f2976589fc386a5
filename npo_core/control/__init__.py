"""Who decides: controllers that train, watch, roll back and replay."""
