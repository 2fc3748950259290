"""Tables, data sets and packs of clips."""
