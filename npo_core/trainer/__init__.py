"""Slot replacement on TRL, and sampling outside of it."""
