"""The ops of MoleGrad with types and documentation: `torch.ops.molegrad.<name>` is the same thing.

One file a family: each op's formula in plain torch, schema, argument check, fake kernel, backward
and documented wrapper stand side by side there, bound by one call of `registry.op`. To add an op,
write them into its family's file, a native kernel of its name if it pays (csrc/cpu, csrc/cuda), and
its samples into tests/ops/samples.py.

Notation of all files: T tokens, n in_features, m out_features, A (T, n) a layer's input, B (T, m)
the gradient of its output, G = BᵀA (m, n) the weight gradient, which none of the ops forms, k the
rank, U (m, k) the left basis, V (n, k) the right basis, Y = G V (m, k), W = Gᵀ U (n, k).
"""

from molegrad import _native
from molegrad.ops.float8 import add_quantized_ as add_quantized_
from molegrad.ops.float8 import quantize_rows as quantize_rows
from molegrad.ops.float8 import quantize_tensor as quantize_tensor
from molegrad.ops.orth import orthonormalize as orthonormalize
from molegrad.ops.orth import polar_factor as polar_factor
from molegrad.ops.power import lowrank_grad as lowrank_grad
from molegrad.ops.random import rademacher as rademacher
from molegrad.ops.registry import OPS as OPS
from molegrad.ops.sampled import sampled_grad_ as sampled_grad_
from molegrad.ops.sketch import sketch as sketch
from molegrad.ops.sketch import sketch_accumulate_ as sketch_accumulate_
from molegrad.ops.sketch import sketch_accumulate_many_ as sketch_accumulate_many_
from molegrad.ops.update import lowrank_update_ as lowrank_update_
from molegrad.ops.update import lowrank_update_many_ as lowrank_update_many_

_native.load()
