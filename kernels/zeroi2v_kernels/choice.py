"""What runs, by device, dtype and shape. Every such choice is made here.

    part                    CUDA with Triton         CPU                            otherwise
    attention               `triton` in half         `matmul` for bfloat16 if       `sdpa`
      `choose_backend`      precision, known head    `matmul_pays`, else `sdpa`
                            widths; else `sdpa`
    norms, activations,     our kernels, not in      PyTorch                        PyTorch
      adapters, rotary      float64, not exported
      positions
      `uses_kernels`
    linear layers           PyTorch (cuBLAS)         oneDNN for inference in        PyTorch
      `on_onednn`                                    float32, else PyTorch
    float8 linear layers    PyTorch (cuBLAS) from    float32 of float8 values likewise
      `on_fp8_units`        Ada and Hopper on
    int8 linear layers      float64, to test with    oneDNN, if its sums are  float64
                                                     `has_int8_products`
    patch embedding         a matrix product, not    PyTorch's convolution          likewise
      `patches_by_product`  exported
    a block whose backbone  our block, known head    our block                      PyTorch's
      is frozen             widths, not in float64                                  autograd
      `trains_by_block`
    adapters in training    merged into their layer where `merging_pays`, without dropout

A backend named by the user overrides `choose_backend`. PyTorch replaces a kernel that fails its
proof on a device (`proof.py`).
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from zeroi2v_kernels.device import HALF, TRITON_DTYPES, TRITON_WIDTHS, exporting

HAS_TRITON = find_spec("triton") is not None  # imported when a kernel is first used
# AVX-512's products of bfloat16, and not AMX's tiles.
HAS_FAST_BF16 = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
# What compiled models call for a linear layer on the CPU; not every build of PyTorch has it.
ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def choose_backend(x: Tensor) -> str:
    """The attention backend that None stands for, by `x`: `qkv` or, where kept apart, `query`.

    `triton` for half precision on CUDA; `matmul` where it pays, unless exported; else `sdpa`.
    """
    if x.is_cuda:
        fits = x.dtype in HALF and x.shape[-1] in TRITON_WIDTHS
        return "triton" if fits and HAS_TRITON else "sdpa"
    pays = matmul_pays(x.device, x.dtype, x.shape[2])
    return "matmul" if pays and not exporting() else "sdpa"


def matmul_pays(device: torch.device, dtype: torch.dtype, queries: int) -> bool:
    """True if backend `matmul` is faster than `sdpa`, for so many queries in a frame.

    That is the case in bfloat16 on a CPU with products of it but without tiles (with tiles
    PyTorch's attention is fast), and for enough queries to be worth the calls.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and HAS_FAST_BF16 and queries >= 64


def uses_kernels(x: Tensor) -> bool:
    """True if Triton's kernels compute norms, activations and adapters of `x`, in float32 inside.

    Not in an exported program, which other machines run.
    """
    fits = x.is_cuda and HAS_TRITON and x.dtype in TRITON_DTYPES
    return fits and not exporting()


def patches_by_product(video: Tensor) -> bool:
    """True if the patches of `video` are multiplied as a matrix, and not by a convolution."""
    return video.is_cuda and not exporting()


def on_onednn(x: Tensor) -> bool:
    """True if oneDNN multiplies `x`: float32 on the CPU, for inference, op by op."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or ONEDNN_LINEAR is None:
        return False
    fits = x.dtype == torch.float32 and x.device.type == "cpu"
    return fits and not torch.is_autocast_enabled("cpu")


def on_fp8_units(x: Tensor) -> bool:
    """True if the device of `x` multiplies e4m3 matrices; not in an exported program."""
    return x.is_cuda and has_fp8_units(x.device) and not exporting()


def has_fp8_units(device: torch.device) -> bool:
    """True for NVIDIA's GPUs of compute capability 8.9 on: Ada, Hopper, Blackwell."""
    return _look_for_fp8(device) if torch.compiler.is_compiling() else _known_fp8(device)


def _look_for_fp8(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) >= (8, 9)


_known_fp8 = functools.cache(_look_for_fp8)  # which a compiler does not look into


@functools.cache
def has_int8_products() -> bool:
    """True if PyTorch multiplies int8 matrices by oneDNN here, and gives the exact sums.

    That is tried once, for the largest numbers that `zeroi2v.model.int8` has. Some processors add
    pairs of products in 16 bits, and some libraries let them overflow.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    sign = torch.ones(96, 96).tril().mul(2).sub(1)  # every share of either sign in a row
    weight, values = (63 * sign).to(torch.int8), 127 * sign.flip(0)
    ones, zeros = torch.ones(96), torch.zeros(96, dtype=torch.int64)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        sums = torch.ops.onednn.qlinear_pointwise(
            (values + 128).to(torch.uint8), 1.0, 128, packed, ones, zeros, None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(sums, (values.double() @ weight.double().t()).float())


def trains_by_block(x: Tensor, num_heads: int, backend: str | None) -> bool:
    """True if the training block has its operators for `x [B, T, N, C]`.

    Attention must be left to it (`backend` None) or be asked of the backend that it uses: `triton`
    on CUDA, `sdpa` on the CPU.
    """
    if exporting() or backend not in (None, "triton" if x.is_cuda else "sdpa"):
        return False
    if x.is_cuda:
        return uses_kernels(x) and x.shape[-1] // num_heads in TRITON_WIDTHS
    return x.device.type == "cpu"


def merging_pays(num_rows: int, weight: Tensor) -> bool:
    """True if a layer of `weight` is cheaper with its adapter merged into it for `num_rows`."""
    out_features, in_features = weight.shape
    return in_features <= out_features and num_rows > 2 * out_features
