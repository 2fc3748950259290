"""The trainer: steps, averages, checkpoints, logs; it knows no system."""
