"""How good generated sounds are: distances of sets, scores of pairs, signals, the toy world."""
