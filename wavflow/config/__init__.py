"""Configurations: their sections, and how they are read."""
