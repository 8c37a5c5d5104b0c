"""Matrix product of the Triton kernels, and whether they run in Triton's interpreter.

Float32 products are exact ("ieee", no TF32) and sums are float32. Triton's interpreter multiplies
bfloat16 wrongly without a word, so there the operands are widened first; products of halves are
exact in float32, so the results are those of the tensor cores up to the order of summation.

The interpreter (`TRITON_INTERPRET=1` set before triton is imported) runs kernels on CPU tensors.
Importing this module imports triton; the package does so only when a kernel is first used.
"""

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def _dot(a, b):
    """`a [M, K] @ b [K, N]` -> float32 `[M, N]`."""
    if _INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
