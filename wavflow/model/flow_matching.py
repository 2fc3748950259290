"""Flow matching, under the public system's module path."""

from wavflow.flow.matching import FlowMatching, log_normal_sample

__all__ = ["FlowMatching", "log_normal_sample"]
