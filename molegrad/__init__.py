"""Estimated weight gradients, of low rank or sampled, for training language models on one GPU.

    import molegrad
    model = molegrad.convert(model, molegrad.MoleGradConfig.preset("lowrank"))

`torch.ops.molegrad.*` (documented in `molegrad.ops`) are the ops; `MoleLinear` is the layer,
`molegrad.estimators` the estimators, `molegrad.optim` the optimizers, `molegrad.gpt` a complete
training pipeline.
"""

from molegrad import ops  # noqa: I001  (registers torch.ops.molegrad before anything uses it)
from molegrad._native import build_info
from molegrad.chunked import in_chunks
from molegrad.config import MoleGradConfig
from molegrad.convert import ConversionPlan, convert, plan, revert
from molegrad.estimators import Estimator, Exact, LowRank, Sampled
from molegrad.linear import MoleLinear
from molegrad.optim.clip import clip_grad_norm_
from molegrad.state import bases_state_dict, ignored_by_ddp, load_bases_state_dict

__all__ = [
    "ConversionPlan",
    "Estimator",
    "Exact",
    "LowRank",
    "MoleGradConfig",
    "MoleLinear",
    "Sampled",
    "bases_state_dict",
    "build_info",
    "clip_grad_norm_",
    "convert",
    "ignored_by_ddp",
    "in_chunks",
    "load_bases_state_dict",
    "ops",
    "plan",
    "revert",
]
