"""Native operators and their plain-PyTorch twins."""

from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .native import NativeStatus, load_native

__all__ = ["NativeStatus", "load_native", "ms_deform_attn", "ms_deform_attn_fused"]
