"""The public system's module paths."""
