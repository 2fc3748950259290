"""Whole jobs: captions and files in, sounds and runs out."""
