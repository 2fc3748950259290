"""Words that configurations may hold and code acts on; importing them needs no torch."""

from __future__ import annotations

#: Solvers with fixed steps (`wavflow.flow.solvers.SOLVERS`).
FIXED_STEP = ("euler", "midpoint", "heun", "rk4", "ab2", "2m")
#: All ways to integrate the flow.
METHODS = (*FIXED_STEP, "adaptive")
#: Times at which a solver evaluates the flow (`wavflow.flow.times.sampling_times`).
TIMES = ("even", "sigmoid", "log-snr")
#: Ways to extend rotary positions beyond the lengths of training
#: (`wavflow.layers.embeddings.rope_scale`).
ROPE_SCALINGS = ("none", "linear", "ntk")
