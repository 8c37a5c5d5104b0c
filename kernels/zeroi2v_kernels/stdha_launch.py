"""Which Triton kernel runs head-shifted attention, with which tiles, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zeroi2v_kernels import bounds, proof, stdha_matmul
from zeroi2v_kernels import stdha_triton as kernels
from zeroi2v_kernels.device import (
    HALF,
    TRITON_DTYPES,
    TRITON_WIDTHS,
    arch,
    ceil_div,
    on_device,
    packed,
)
from zeroi2v_kernels.dot import INTERPRET
from zeroi2v_kernels.launch import Launcher

LOG2_E = 1.4426950408889634
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # in Triton


class Launch(NamedTuple):
    """Tile sizes in queries and keys, warps a program, stages of the loads ahead."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By compute capability: 8.0 and its kin, 9.0, 10.0; (name, D) goes before name.
# bench/compile_kernels.py compiles them: no spills, tensor cores, within shared memory, no
# register read unwritten. Run on a device: those of 9.0 on an H200 (driver 580, Triton 3.6.0) for
# heads of 64 in half precision, against float64 and twice the same bits, resident for 5 to 272
# tokens, streamed, query and key_value for 577, fused for 5 to 257; float32 and other widths in the
# test suite there. Those of 8.0 and 10.0 have been compiled only.
LAUNCH = {
    80: {
        "resident": Launch(64, 0, 4, 1),
        "streamed": Launch(128, 64, 8, 2),
        "fused": Launch(16, 0, 8, 1),
        "query": Launch(64, 64, 4, 2),
        ("query", 128): Launch(32, 64, 4, 2),
        "key_value": Launch(32, 64, 4, 2),
    },
    90: {
        "resident": Launch(64, 0, 4, 1),
        "streamed": Launch(128, 64, 8, 2),
        "fused": Launch(32, 0, 8, 1),
        "query": Launch(64, 64, 4, 2),
        "key_value": Launch(32, 128, 8, 2),
    },
    100: {
        "resident": Launch(64, 0, 4, 1),
        "streamed": Launch(128, 64, 8, 2),
        "fused": Launch(32, 0, 8, 1),
        "query": Launch(64, 64, 4, 2),
        "key_value": Launch(32, 128, 8, 2),
    },
}
# Float32 products are exact and run on the plain cores of any device.
LAUNCH_FLOAT32 = {
    "streamed": Launch(32, 64, 8, 1),
    ("streamed", 32): Launch(32, 64, 4, 1),
    ("streamed", 128): Launch(32, 64, 16, 1),
    "query": Launch(32, 32, 8, 1),
    ("query", 16): Launch(32, 32, 4, 1),
    ("query", 128): Launch(32, 32, 16, 1),
    "key_value": Launch(32, 32, 8, 1),
    ("key_value", 16): Launch(32, 32, 4, 1),
}


class Plan(NamedTuple):
    """A kernel ready for launch, except for its tensors."""

    kernel: triton.JITFunction
    programs: int  # of each head of each frame
    constants: dict[str, int | tuple]
    launch: Launch


def forward(
    query: Tensor,
    key_value: Tensor,
    head_offsets: Sequence[int],
    scale: float,
    named: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention and what its backward needs; views into one packed tensor are read in place.

    Args:
        query: `[B, T, M, H, D]`, M = N or 1, float32, bfloat16 or float16; D 16, 32, 64 or 128.
        key_value: `[B, T, N, 2, H, D]`.
        head_offsets: H ints.
        scale: positive factor on the scores.
        named: whether the user asked for these kernels, so that nothing may take their place.

    Returns:
        out `[B, T, M, H, D]`, contiguous, and lse `[B, T, H, M]`, float32; NaN where PyTorch took
        the kernel's place, as `backward` then does without.

    Raises:
        ValueError: tensors on a CPU, where only Triton's interpreter could run.
        RuntimeError: as `proof.trusted`.
    """
    _check_device(query)
    batch, frames, num_queries, heads, _ = query.shape
    lse = query.new_empty(batch, frames, heads, num_queries, dtype=torch.float32)
    if not _trusted("forward", query, key_value, head_offsets, named):
        return stdha_matmul.forward(query, key_value, head_offsets, scale), lse.fill_(float("nan"))
    out = query.new_empty(query.shape)
    _run_forward(query, key_value, head_offsets, scale, out, lse)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey_value: Tensor,
    head_offsets: Sequence[int],
    scale: float,
    named: bool = False,
) -> None:
    """Writes every element of dquery and dkey_value, which may be views into one packed tensor.

    `grad` is that of `out`; `out` and `lse` are the forward's; the gradients are shaped as their
    inputs, aligned as those of a packed tensor are. Raises as `forward`.
    """
    _check_device(query)
    if _trusted("backward", query, key_value, head_offsets, named):
        inputs = (grad, query, key_value, out, lse)
        _run_backward(*inputs, head_offsets, scale, dquery, dkey_value)
    else:
        gradients = (dquery, dkey_value)
        stdha_matmul.backward(grad, query, key_value, *gradients, head_offsets, scale)


def _run_forward(query, key_value, head_offsets, scale, out, lse) -> None:
    query, key_value = _aligned(query), _aligned(key_value)
    tensors = (query, key_value)
    (launch,) = _launches("forward", *_layout(tensors), tuple(head_offsets), query.device)
    with on_device(query):
        launch(q_ptr=query, kv_ptr=key_value, out_ptr=out, lse_ptr=lse, scale_log2=scale * LOG2_E)


def _run_backward(
    grad, query, key_value, out, lse, head_offsets, scale, dquery, dkey_value
) -> None:
    query, key_value, grad = _aligned(query), _aligned(key_value), _aligned(grad)
    out, lse = packed(out), packed(lse)
    layout = _layout((query, key_value, grad, dquery, dkey_value))
    launches = _launches("backward", *layout, tuple(head_offsets), query.device)
    shared = dict(q_ptr=query, kv_ptr=key_value, lse_ptr=lse, grad_ptr=grad)
    shared |= dict(scale=scale, scale_log2=scale * LOG2_E)
    with on_device(query):
        if len(launches) == 1:
            launches[0](**shared, out_ptr=out, dq_ptr=dquery, dkv_ptr=dkey_value)
        else:
            delta = torch.empty_like(lse)  # from one kernel to the next
            launches[0](**shared, out_ptr=out, dq_ptr=dquery, delta_ptr=delta)
            launches[1](**shared, dkv_ptr=dkey_value, delta_ptr=delta)


def _layout(tensors: Sequence[Tensor]) -> tuple:
    """Dtype, shapes and strides: with offsets and device, all that launches depend on."""
    return tensors[0].dtype, *((x.shape, x.stride()) for x in tensors)


def _trusted(direction, query, key_value, head_offsets, named) -> bool:
    """Whether the kernels of a direction have been proven for such tensors."""
    shapes = (query.shape[2], key_value.shape[2], query.shape[4])
    key = (direction, query.device, query.dtype, *shapes, *head_offsets)
    return proof.trusted(
        key,
        query.device,
        lambda: configuration(direction, query.device, query.dtype, *shapes, head_offsets),
        named,
    )


def configuration(
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    num_queries: int,
    num_keys: int,
    width: int,
    head_offsets: Sequence[int],
) -> proof.Configuration:
    """What is to be proven of `forward`, or of `backward`, which takes the forward's results."""
    frames, heads = (2, 3), len(head_offsets)
    query = torch.empty(*frames, num_queries, heads, width, dtype=dtype, device="meta")
    key_value = query.new_empty(*frames, num_keys, 2, heads, width)
    plans = {"forward": plan_forward(query, key_value, head_offsets, arch(device))}
    if direction == "backward":
        plans |= plan_backward(query, key_value, head_offsets, arch(device))
    settings = tuple(
        (plan.kernel.fn.__name__, tuple(plan.constants.items()), plan.launch)
        for plan in plans.values()
    )
    kernels_run = [
        plan.kernel.fn.__name__.strip("_").removesuffix("_kernel") for plan in plans.values()
    ][direction == "backward" :]
    tokens = f"N={num_keys}" if num_queries == num_keys else f"M={num_queries} N={num_keys}"
    shifts = {offset: head_offsets.count(offset) for offset in head_offsets if offset}
    moved = ",".join(f"{offset:+}x{count}" for offset, count in shifts.items())
    name = f"stdha {'+'.join(kernels_run)} D={width} {tokens} {ELEMENTS[dtype]}"
    name += f" H={heads}" + f" offsets {moved}" * bool(moved)

    def trial(generator: torch.Generator) -> proof.Trial:
        scale = width**-0.5
        q, kv, grad = (proof.draw(generator, x.shape, dtype) for x in (query, key_value, query))
        out, dq, dkv = bounds.attention(q, kv, grad, head_offsets, scale)
        outputs = [torch.empty_like(x) for x in (q, q, kv)]

        def run(out: Tensor, *gradients: Tensor) -> None:
            lse = out.new_full((*frames, heads, num_queries), float("nan"), dtype=torch.float32)
            _run_forward(q, kv, head_offsets, scale, out, lse)
            if gradients:
                _run_backward(grad, q, kv, out, lse, head_offsets, scale, *gradients)

        if direction == "forward":
            return proof.Trial(outputs[:1], run, [out])
        return proof.Trial(outputs, run, [out, dq, dkv])

    return proof.Configuration(name, settings, trial)


def plan_forward(query: Tensor, key_value: Tensor, head_offsets: Sequence[int], arch: int) -> Plan:
    """The forward kernel for these shapes on `arch`, an entry of LAUNCH. Data are not looked at."""
    M, N, D = query.shape[2], key_value.shape[2], query.shape[-1]
    constants = dict(M=M, N=N, D=D, HEAD_OFFSETS=tuple(head_offsets))
    if _resident(query) and N <= 272:
        launch = LAUNCH[arch]["resident"]
        constants |= dict(BLOCK_M=launch.block_m, SEGMENTS=segments(N))
        return Plan(kernels._forward_resident_kernel, 1, constants, launch)
    launch = _launch_of(query, "streamed", arch)
    constants |= dict(BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, TAIL=_tail(N, launch.block_n))
    return Plan(kernels._forward_streamed_kernel, ceil_div(M, launch.block_m), constants, launch)


def plan_backward(
    query: Tensor, key_value: Tensor, head_offsets: Sequence[int], arch: int
) -> dict[str, Plan]:
    """The backward kernels for these shapes, in their order: fused, or query and key_value."""
    M, N, D = query.shape[2], key_value.shape[2], query.shape[-1]
    constants = dict(M=M, N=N, D=D, HEAD_OFFSETS=tuple(head_offsets))
    if _resident(query) and N <= 257:
        launch = LAUNCH[arch]["fused"]
        keys = min(max(triton.next_power_of_2(N), 64), 256)
        if keys == 64:
            # With one stage ptxas 12.8 for 9.0 reads an address of the dq product before it is
            # written, in the first turn of the loop: dq is wrong and differs from run to run.
            launch = launch._replace(warps=4, stages=2 if arch == 90 else 1)
        constants |= dict(BLOCK_M=launch.block_m, KEYS=keys)
        return {"fused": Plan(kernels._backward_fused_kernel, 1, constants, launch)}
    launch = _launch_of(query, "query", arch)
    tiles = dict(BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, TAIL=_tail(N, launch.block_n))
    tiles |= dict(RELOAD=query.dtype == torch.float32)
    programs = ceil_div(M, launch.block_m)
    by_query = Plan(kernels._backward_query_kernel, programs, constants | tiles, launch)
    launch = _launch_of(query, "key_value", arch)
    tiles = dict(BLOCK_M=launch.block_m, BLOCK_N=launch.block_n)
    programs = ceil_div(N, launch.block_n)
    by_key = Plan(kernels._backward_key_value_kernel, programs, constants | tiles, launch)
    return {"query": by_query, "key_value": by_key}


def segments(num_keys: int) -> tuple[tuple[int, int], ...]:
    """(first, size) of at most three tiles, powers of two, that hold `num_keys` keys."""
    sizes, rest = [], num_keys
    while rest > 0:
        size = max(16, 1 << (rest.bit_length() - 1))
        if len(sizes) == 2 and size < rest:
            size *= 2
        sizes.append(size)
        rest -= size
        while len(sizes) > 1 and sizes[-1] == sizes[-2]:
            sizes[-2:] = [2 * sizes[-1]]
    return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))


def _resident(query: Tensor) -> bool:
    return query.shape[-1] == 64 and query.dtype in HALF


def _launch_of(query: Tensor, name: str, arch: int) -> Launch:
    table = LAUNCH_FLOAT32 if query.dtype == torch.float32 else LAUNCH[arch]
    return table.get((name, query.shape[-1]), table[name])


def _tail(num_keys: int, block: int) -> int:
    """Size of the tile of the keys that are left over by full blocks; 0 without any."""
    rest = num_keys % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


@functools.lru_cache(1024)
def _launches(direction: str, dtype: torch.dtype, *what) -> list[Callable[..., None]]:
    """The kernels of a direction, in their order, ready but for tensors and scale.

    `what` is shapes and strides of `_layout`, then offsets and device.
    """
    *layout, head_offsets, device = what
    like = [torch.empty_strided(*x, dtype=dtype, device="meta") for x in layout]
    query, key_value = like[:2]
    given = dict(T=query.shape[1])
    for name, x in zip(("q", "k", "g", "dq", "dk"), like, strict=False):
        given |= _strides(name, x)
    if direction == "forward":
        plans = [plan_forward(query, key_value, head_offsets, arch(device))]
    else:
        plans = plan_backward(query, key_value, head_offsets, arch(device)).values()
    launches = []
    for plan in plans:
        options = dict(num_warps=plan.launch.warps, num_stages=plan.launch.stages)
        launcher = Launcher(plan.kernel, plan.constants, **options)
        taken = {name: given[name] for name in plan.kernel.arg_names if name in given}
        launches.append(functools.partial(launcher, _grid(plan, query, device), **taken))
    return launches


def _grid(plan: Plan, query: Tensor, device: torch.device) -> tuple[int, ...]:
    """A program or more for each head of all frames; few of them share out their queries."""
    batch, frames, num_queries, heads, _ = query.shape
    heads = batch * frames * heads
    if plan.kernel is not kernels._forward_resident_kernel:
        return (heads * plan.programs,)
    tiles = ceil_div(num_queries, plan.launch.block_m)
    return heads * plan.programs, min(tiles, ceil_div(_wanted_programs(device), heads))


def _wanted_programs(device: torch.device) -> int:
    """Programs that fill `device` twice over; 1 in the interpreter, where each costs the same."""
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _check_device(x: Tensor) -> None:
    if not (x.is_cuda or INTERPRET):
        raise ValueError(
            "backend 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set before triton is "
            f"imported: got a tensor on {x.device}"
        )


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if its rows allow loads of 16 bytes, else a copy."""
    if x.data_ptr() % 16 == 0 and _rows_align(x.shape, x.stride()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(1024)
def _rows_align(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    *steps, last = ((stride, size) for stride, size in zip(strides, shape, strict=True))
    return last[0] == 1 and all(stride % 16 == 0 for stride, size in steps if size > 1)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """`stride_<name>b` of clips, `t` frames, `n` tokens, `h` heads, and if keys and values are in
    one, `v` from a key to its value; 0 along one element, so that all are multiples of 16."""
    axes = "btnhd" if x.ndim == 5 else "btnvhd"
    return {
        f"stride_{name}{axis}": stride if size > 1 else 0
        for axis, stride, size in zip(axes, x.stride(), x.shape, strict=True)
        if axis != "d"
    }


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves of attention."""
    for num_queries, num_keys, width, dtype, offsets in usual_shapes():
        for direction in ("forward", "backward"):
            shape = (num_queries, num_keys, width)
            yield configuration(direction, device, dtype, *shape, offsets)


def usual_shapes() -> list[tuple[int, int, int, torch.dtype, tuple[int, ...]]]:
    """Queries, keys, width and dtype of a head, and offsets, that stand for all that is used."""
    heads = {768: (-1, 1) + (0,) * 10, 1024: (-1, -1, 1, 1, -2, -2) + (0,) * 10}
    tokens = {50: 768, 101: 768, 197: 768, 257: 1024}  # of a frame, and the model's width
    shapes = [(n, n, 64, dtype, heads[width]) for n, width in tokens.items() for dtype in HALF]
    shapes += [(n, n, 64, torch.bfloat16, heads[768]) for n in (5, 16, 17, 33, 64, 65, 145)]
    shapes += [(1, n, 64, torch.bfloat16, heads[width]) for n, width in (tokens | {5: 768}).items()]
    shapes += [(5, 5, width, dtype, heads[768]) for width in (32, 128) for dtype in HALF]
    shapes += [(1, 577, 64, torch.bfloat16, heads[1024]), (197, 197, 64, torch.float32, heads[768])]
    shapes += [
        (577, 577, width, dtype, heads[1024]) for width in TRITON_WIDTHS for dtype in TRITON_DTYPES
    ]
    return shapes
