"""Estimated weight gradients, sampled or of low rank, for training language models on one GPU.

    import molegrad
    model = molegrad.convert(model, molegrad.MoleGradConfig.preset("balanced"))

`torch.ops.molegrad.*` (documented in `molegrad.ops`) are the ops; `MoleLinear` is the layer,
`molegrad.optim` the optimizers, `molegrad.gpt` a complete training pipeline.
"""

from molegrad import ops  # noqa: I001  (registers torch.ops.molegrad before anything uses it)
from molegrad._native import build_info
from molegrad.optim.clip import clip_grad_norm_
from molegrad.config import MoleGradConfig
from molegrad.convert import ConversionPlan, convert, plan, revert
from molegrad.linear import MoleLinear, bases_state_dict, ignored_by_ddp, load_bases_state_dict
from molegrad.streaming import stream

__all__ = [
    "ConversionPlan",
    "MoleGradConfig",
    "MoleLinear",
    "bases_state_dict",
    "build_info",
    "clip_grad_norm_",
    "convert",
    "ignored_by_ddp",
    "load_bases_state_dict",
    "ops",
    "plan",
    "revert",
    "stream",
]
