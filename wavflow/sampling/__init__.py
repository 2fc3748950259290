"""From noise to tokens: solver steps on a network, in batches and in windows."""
