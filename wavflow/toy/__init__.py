"""The toy world: videos of things that are struck, their sounds and captions."""
