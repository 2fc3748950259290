"""Flow matching as mathematics: paths, times, solvers, guidance."""
