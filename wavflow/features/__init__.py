"""Video decoding and the encoders that turn frames and captions into features."""
