"""What there is to compile: every shipped kernel, in every configuration that models use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
from zeroi2v_kernels import activation, norm, stdha_launch
from zeroi2v_kernels import adapter_linear_triton as adapter_linear
from zeroi2v_kernels import quantize_triton as quantize
from zeroi2v_kernels import rotary_triton as rotary


class Case(NamedTuple):
    """A kernel and what it is compiled for."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    """Of each argument that is no constant."""
    constants: dict[str, object]
    options: dict[str, int]
    tensor_cores: bool
    """Whether its products should run on them."""


def cases(arch: int) -> list[Case]:
    """All that is shipped for compute capability `arch`, such as 90."""
    found = [*attention(arch), *adapter(arch), *activations(), *norms(), *rotations()]
    return [*found, *quantizations()] if arch >= 90 else found  # there are no float8 units on 80


def attention(arch: int) -> Iterator[Case]:
    for num_queries, num_keys, width, dtype, offsets in stdha_launch.usual_shapes():
        frames = (1, 8)
        query = torch.empty(*frames, num_queries, len(offsets), width, dtype=dtype, device="meta")
        key_value = query.new_empty(*frames, num_keys, 2, len(offsets), width)
        plans = [stdha_launch.plan_forward(query, key_value, offsets, arch)]
        plans += stdha_launch.plan_backward(query, key_value, offsets, arch).values()
        for plan in plans:
            kernel = plan.kernel.fn.__name__.strip("_").removesuffix("_kernel")
            names = [name for name in plan.kernel.arg_names if name not in plan.constants]
            element = stdha_launch.ELEMENTS[dtype]
            yield Case(
                name=f"stdha {kernel} M={num_queries} N={num_keys} D={width} {element}",
                kernel=plan.kernel,
                types={name: _type_of(name, element) for name in names},
                constants=plan.constants,
                options=dict(num_warps=plan.launch.warps, num_stages=plan.launch.stages),
                tensor_cores=dtype != torch.float32,
            )


def _type_of(argument: str, element: str) -> str:
    if argument.endswith("_ptr"):
        return "*fp32" if argument in ("lse_ptr", "delta_ptr") else f"*{element}"
    return "fp32" if argument.startswith("scale") else "i32"


def adapter(arch: int) -> Iterator[Case]:
    for width, rank, element in adapter_linear.SHAPES:
        for backward, residual in adapter_linear.KINDS:
            constants, options = adapter_linear.plan_up(
                width, rank, backward, residual is not None, arch
            )
            types = dict.fromkeys(adapter_linear._up_kernel.arg_names, f"*{element}")
            types |= dict(sums_ptr="*fp32", num_rows="i32", scale="fp32")
            if residual == "fp32":
                types |= dict(residual_ptr="*fp32", out_ptr="*fp32")
            absent = ["bias_ptr"] if backward else ["sums_ptr"]
            absent += ["residual_ptr"] * (residual is None)
            constants |= dict.fromkeys(absent)
            yield Case(
                name=f"adapter {'backward' if backward else 'forward'} C={width} R={rank} "
                f"{element}{f' residual {residual}' * bool(residual)}",
                kernel=adapter_linear._up_kernel,
                types={name: kind for name, kind in types.items() if name not in constants},
                constants=constants,
                options=options,
                tensor_cores=True,
            )
    for element in ("bf16", "fp16", "fp32"):
        rows, columns = adapter_linear.DROPOUT_BLOCK
        types = dict(x_ptr=f"*{element}", seed_ptr="*i64", out_ptr=f"*{element}")
        yield Case(
            name=f"adapter dropout R=192 {element}",
            kernel=adapter_linear._dropout_kernel,
            types=types | dict(sums_ptr="*fp32", num_rows="i32"),
            constants=dict(R=192, PLACE=0, DROPPED=6554, BLOCK_M=rows, BLOCK_R=columns),
            options=dict(num_warps=4),
            tensor_cores=False,
        )


def activations() -> Iterator[Case]:
    for kernel, direction in (
        (activation._activation_fwd_kernel, "forward"),
        (activation._activation_bwd_kernel, "backward"),
    ):
        for kind, has_bias, element in product(
            activation.KINDS, (False, True), ("bf16", "fp16", "fp32")
        ):
            constants = dict(
                COLUMNS=3072, HAS_BIAS=has_bias, KIND=kind,
                BLOCK_ROWS=activation.BLOCK[0], BLOCK_COLUMNS=activation.BLOCK[1],
            )  # fmt: skip
            constants |= {} if has_bias else {"bias_ptr": None}
            names = [name for name in kernel.arg_names if name not in constants]
            yield Case(
                name=f"{kind} {direction} {element}{' of a sum' * has_bias}",
                kernel=kernel,
                types={n: f"*{element}" if n.endswith("_ptr") else "i32" for n in names},
                constants=constants,
                options=dict(num_warps=activation.WARPS),
                tensor_cores=False,
            )


def norms() -> Iterator[Case]:
    dtypes = [  # of the branch and what is normalised, and of the residual stream
        *(("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32")),
    ]
    kinds = [(True, 768), (True, 1024), (False, 1024)]
    for (centres, width), (element, stream), is_sum in product(kinds, dtypes, (False, True)):
        tile = dict(C=width, ROWS=norm.TILE_ROWS, BLOCK_C=triton.next_power_of_2(width))
        tile |= dict(CENTRES=centres)
        absent = [] if is_sum else ["residual_ptr"]
        forward = dict(HAS_RESIDUAL=is_sum, **dict.fromkeys(absent)) | tile
        absent = [] if is_sum else ["total_grad_ptr"]
        backward = dict(HAS_TOTAL_GRAD=is_sum, SUMS=is_sum, **dict.fromkeys(absent)) | tile
        streams = ["residual_ptr", "total_ptr", "total_grad_ptr", "out_ptr"]
        streams += [] if is_sum else ["x_ptr"]
        for kernel, constants in (
            (norm._norm_fwd_kernel, forward),
            (norm._norm_bwd_kernel, backward),
        ):
            types = dict.fromkeys(kernel.arg_names, "*fp32")  # weights, statistics, sums
            types |= dict.fromkeys(("x_ptr", "normed_ptr", "grad_ptr"), f"*{element}")
            types |= dict.fromkeys(streams, f"*{stream}") | dict(num_rows="i32", eps="fp32")
            names = [name for name in kernel.arg_names if name not in constants]
            direction = "forward" if kernel is norm._norm_fwd_kernel else "backward"
            yield Case(
                name=f"{'layer' if centres else 'RMS'} norm {direction}{' of a sum' * is_sum} "
                f"C={width} {element}, residual {stream}",
                kernel=kernel,
                types={name: types[name] for name in names},
                constants=constants,
                options=dict(num_warps=norm.SUMMER_WARPS if constants.get("SUMS") else norm.WARPS),
                tensor_cores=False,
            )


def rotations() -> Iterator[Case]:
    for (tokens, heads), back, element in product(
        [(201, 12), (197, 12), (577, 16)], (False, True), ("bf16", "fp16", "fp32")
    ):
        places = 576 if tokens == 577 else 196
        constants = dict(
            TOKENS=tokens, PLACES=places, WIDTH=3 * heads * 64, HALF=32, PAIRS=2 * heads * 32,
            BACK=back, BLOCK_ROWS=rotary.BLOCK[0], BLOCK_PAIRS=rotary.BLOCK[1],
        )  # fmt: skip
        yield Case(
            name=f"rotary {'back ' * back}N={tokens} P={places} H={heads} {element}",
            kernel=rotary._turn_kernel,
            types=dict(x_ptr=f"*{element}", table_ptr="*fp32", num_rows="i32"),
            constants=constants,
            options=dict(num_warps=rotary.WARPS),
            tensor_cores=False,
        )


def quantizations() -> Iterator[Case]:
    for width, element in product(quantize.WIDTHS, ("bf16", "fp16", "fp32")):
        types = dict(x_ptr=f"*{element}", out_ptr="*fp8e4nv", scale_ptr="*fp32", num_rows="i32")
        yield Case(
            name=f"quantize rows C={width} {element}",
            kernel=quantize._quantize_kernel,
            types=types,
            constants=quantize.constants_of(width),
            options=dict(num_warps=quantize.WARPS),
            tensor_cores=False,
        )
