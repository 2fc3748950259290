"""Encoders of videos and captions, and the files of features they make."""
