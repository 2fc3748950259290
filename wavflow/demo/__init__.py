"""The demo: a toy world, a model trained on it, its sounds, and figures that judge them."""
