"""WavFlow: sound from video and text by flow matching on raw audio."""
