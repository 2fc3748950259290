"""The systems that can be trained and sampled."""
