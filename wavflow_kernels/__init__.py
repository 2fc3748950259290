"""Fused kernels for generating audio in waveform space by flow matching.

Public functions only. Every one takes torch tensors, runs on CPU and CUDA, and works under
``torch.compile(fullgraph=True)``, autocast and ``torch.inference_mode``.
"""

from ._attention_window import AttentionWindow
from ._backend import BackendError, use_backend
from ._registry import REGISTRY
from ._rows import TokenRows, token_rows
from .ops.adaln import adaln
from .ops.conv1d import conv1d
from .ops.conv_swiglu import conv_swiglu
from .ops.flow_loss import flow_loss
from .ops.flow_mix import flow_mix, philox_normal
from .ops.gated_residual_adaln import gated_residual_adaln
from .ops.lift_patchify import lift_patchify
from .ops.ode_step import ode_step, ode_step_
from .ops.prepared_conv import PreparedConv, prepare_conv
from .ops.qkv_rope import qkv_rope, rope_table
from .ops.rope_attention import rope_attention
from .ops.swiglu import swiglu
from .ops.unpatchify import unpatchify

__all__ = [
    "REGISTRY",
    "AttentionWindow",
    "BackendError",
    "PreparedConv",
    "TokenRows",
    "adaln",
    "conv1d",
    "conv_swiglu",
    "flow_loss",
    "flow_mix",
    "gated_residual_adaln",
    "lift_patchify",
    "ode_step",
    "ode_step_",
    "philox_normal",
    "prepare_conv",
    "qkv_rope",
    "rope_attention",
    "rope_table",
    "swiglu",
    "token_rows",
    "unpatchify",
    "use_backend",
]
