"""Sound and video as files: decoding, encoding, muxing, loudness, pictures."""
