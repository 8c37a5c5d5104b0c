"""The Triton kernels and the flash-attn path of head-shifted attention, without a GPU.

Kernels run in Triton's interpreter. The yardstick is the definition in float64, with the budget of
`rounding.py`. New tensors hold NaN until they are written.
"""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from attention import attention, packed_attention
from models import build, small_config
from rounding import assert_within_budget
from torch.nn.functional import scaled_dot_product_attention
from zeroi2v_kernels import choice, stdha_flash
from zeroi2v_kernels.choice import choose_backend
from zeroi2v_kernels.stdha import (
    _announce,
    stdha,
    stdha_backward_op,
    stdha_op,
    stdha_split,
    stdha_split_backward_op,
    stdha_split_op,
)

from zeroi2v.config import RECIPES
from zeroi2v.model.attention import set_backend
from zeroi2v.model.training_block import can_train
from zeroi2v.reparam import merge

stdha_launch = pytest.importorskip("zeroi2v_kernels.stdha_launch", reason="needs triton")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or stdha_launch.INTERPRET), reason="needs Triton's interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPE_OFFSETS = sorted({r.model.head_offsets for r in RECIPES.values()})
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

DTYPES = (BF16, FP16, FP32)
# In the interpreter a shorter clip that leaves the same rest in every tile, of 128 and less.
LONGEST = 577 if DEVICE == "cuda" else 321
LONGEST_FP32 = 577 if DEVICE == "cuda" else 129  # tiles of 64 and less
CASES = [  # T, N, D, dtype, head_offsets
    # every recipe's heads in clips long enough for all of its offsets, the most in shorter ones
    *((4, 5, 16, DTYPES[i % 3], offsets) for i, offsets in enumerate(RECIPE_OFFSETS)),
    (2, 5, 64, FP32, max(RECIPE_OFFSETS, key=len)),
    # every clip length, offsets inside and beyond it
    *((frames, 5, 64, DTYPES[frames % 3], (9, -9, 1, -3)) for frames in range(1, 9)),
    *((frames, 5, 64, DTYPES[frames % 2], (1, -2)) for frames in (2, 3, 5)),
    # all equal, inside and beyond the clip
    *((4, 17, 64, (BF16, FP32)[i % 2], (offset,) * 2) for i, offset in enumerate((-5, -3, 0, 1))),
    # every number of tokens and head width in each dtype
    *((2, tokens, 64, dtype, (-1, 1)) for tokens in (5, 17, 33, 50) for dtype in DTYPES),
    *((2, 33, width, dtype, (1, 0)) for width in (16, 32, 128) for dtype in DTYPES),
    # the real numbers of tokens, and one of the longest
    *((2, 197, 64, dtype, (1, -1)) for dtype in (BF16, FP16)),
    *((2, 197, 64, FP32, (1,)), (2, 257, 64, BF16, (1, -1)), (2, 257, 64, FP16, (-1,))),
    (2, LONGEST, 64, BF16, (0, -1)),
    *((1, LONGEST, 64, FP16, (1,)), (1, LONGEST_FP32, 64, FP32, (0,))),
    *((1, 64, 64, BF16, (0,)), (1, 129, 64, BF16, (0,)), (2, 197, 128, FP16, (-1,))),
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """Fills what the launchers allocate with NaN, so that an element nobody writes shows."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        allocate = getattr(owner, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


def random_qkv(frames, tokens, heads, width, dtype=FP32, clips=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (clips, frames, tokens, 3, heads, width)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def with_gradient(function, inputs, weight):
    """The output and the gradients of `inputs`, as a list."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


@pytest.mark.parametrize("frames, tokens, width, dtype, offsets", CASES)
def test_kernels_compute_the_definition_and_its_gradient(frames, tokens, width, dtype, offsets):
    qkv = random_qkv(frames, tokens, len(offsets), width, dtype)
    assert_within_budget(
        lambda x: stdha(x, offsets, backend="triton"),
        lambda x: packed_attention(x, offsets),
        [qkv],
    )


@pytest.mark.parametrize("tokens, dtype", [(197, BF16), (50, FP16), (300, BF16), (33, FP32)])
def test_cls_alone_asks(tokens, dtype):
    offsets = (1, -1)
    query = random_qkv(3, 1, 2, 64, dtype, seed=1)[:, :, :, 0]
    key_value = random_qkv(3, tokens, 2, 64, dtype)[:, :, :, 1:]
    assert_within_budget(
        lambda q, kv: stdha_split(q, kv, offsets, backend="triton"),
        lambda q, kv: attention(q, kv, offsets),
        [query, key_value],
    )


@pytest.mark.parametrize("dtype", [BF16, FP32])  # fused backward; streamed and split kernels
def test_several_clips_and_their_edges_stay_apart(dtype):
    offsets = (-1, 2)
    qkv = random_qkv(3, 5, 2, 64, dtype, clips=2)
    weight = random_qkv(3, 5, 2, 64, dtype, clips=2, seed=1)[:, :, :, 0]
    whole = with_gradient(lambda x: stdha(x, offsets, backend="triton"), [qkv], weight)
    for clip in range(2):
        one = slice(clip, clip + 1)
        alone = with_gradient(
            lambda x: stdha(x, offsets, backend="triton"), [qkv[one]], weight[one]
        )
        assert all(torch.equal(a[one], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_two_runs_give_the_same_bits(dtype):
    qkv, offsets = random_qkv(3, 17, 2, 64, dtype), (1, -1)
    weight = random_qkv(3, 17, 2, 64, dtype, seed=1)[:, :, :, 0]
    first, second = (
        with_gradient(lambda x: stdha(x, offsets, backend="triton"), [qkv], weight)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keys_that_nobody_reads_get_zero_gradients():
    qkv = random_qkv(4, 5, 1, 64, BF16)
    weight = torch.ones_like(qkv[:, :, :, 0])
    _, gradient = with_gradient(lambda x: stdha(x, (2,), backend="triton"), [qkv], weight)
    assert torch.count_nonzero(gradient[:, :2, :, 1:]) == 0  # frames 0 and 1 look ahead by two
    assert torch.count_nonzero(gradient[:, 2:, :, 2]) > 0


def test_strided_inputs_are_read_in_place_and_unaligned_ones_copied():
    wide = random_qkv(3, 17, 4, 64, BF16)
    strided = wide[:, :, 1:, :, 1:3]  # no first token, two of four heads
    shifted = random_qkv(3, 17, 2, 72, BF16)[..., :64]  # rows start at odd multiples of 8
    for qkv, in_place in ((strided, True), (shifted, False)):
        query = qkv[:, :, :, 0]
        assert (stdha_launch._aligned(query) is query) == in_place
        out = stdha(qkv, (1, -1), backend="triton")
        assert torch.equal(out, stdha(qkv.contiguous(), (1, -1), backend="triton"))
        weight = torch.ones_like(out)[:, :, :, :1].expand_as(out)  # a gradient without strides
        gradients = [
            with_gradient(lambda x: stdha(x, (1, -1), backend="triton"), [x], weight)[1]
            for x in (qkv, qkv.contiguous())
        ]
        assert torch.equal(*gradients)


def test_scale_reaches_forward_and_backward():
    qkv, offsets = random_qkv(2, 17, 2, 64, BF16), (1, 0)
    assert_within_budget(
        lambda x: stdha(x, offsets, 0.3, backend="triton"),
        lambda x: packed_attention(x, offsets, 0.3),
        [qkv],
    )


def test_large_scores_do_not_overflow():
    for dtype in (BF16, FP32):
        qkv = random_qkv(2, 17, 1, 64, dtype) * 30
        weight = torch.ones_like(qkv[:, :, :, 0])
        for x in with_gradient(lambda x: stdha(x, (1,), backend="triton"), [qkv], weight):
            assert x.isfinite().all()


def test_sharing_out_the_queries_of_one_head_changes_nothing(monkeypatch):
    qkv = random_qkv(1, 197, 1, 64, BF16)
    expected, asked = stdha(qkv, (0,), backend="triton"), []
    monkeypatch.setattr(stdha_launch, "_launches", stdha_launch._launches.__wrapped__)
    monkeypatch.setattr(stdha_launch, "_wanted_programs", lambda device: asked.append(device) or 3)
    assert torch.equal(stdha(qkv, (0,), backend="triton"), expected) and asked


def test_segments_cover_the_keys_with_little_waste():
    assert stdha_launch.segments(197) == ((0, 128), (128, 64), (192, 16))
    assert stdha_launch.segments(257) == ((0, 256), (256, 16))
    for tokens in range(1, 273):
        pieces = stdha_launch.segments(tokens)
        ends = [first + size for first, size in pieces]
        assert [first for first, _ in pieces] == [0, *ends[:-1]] and len(pieces) <= 3
        assert ends[-1] - tokens < max(16, tokens / 7)
        assert all(end <= tokens for end in ends[:-1])  # only the last is masked


def test_operators_are_well_formed():
    qkv = random_qkv(2, 5, 2, 16).requires_grad_()
    query = random_qkv(2, 1, 2, 16)[:, :, :, 0].requires_grad_()
    key_value = random_qkv(2, 5, 2, 16)[:, :, :, 1:].requires_grad_()
    torch.library.opcheck(stdha_op.op, (qkv, [1, -1], 0.25))
    torch.library.opcheck(stdha_split_op.op, (query, key_value, [1, -1], 0.25))
    with torch.no_grad():
        out, lse = stdha_op(qkv, [1, -1], 0.25)
        args = (out, qkv.detach(), out, lse, [1, -1], 0.25)
        torch.library.opcheck(stdha_backward_op.op, args)
        out, lse = stdha_split_op(query, key_value, [1, -1], 0.25)
        args = (out, query.detach(), key_value.detach(), out, lse, [1, -1], 0.25)
        torch.library.opcheck(stdha_split_backward_op.op, args)


def test_backends_that_can_not_run_say_what_they_need(monkeypatch):
    def refused(message, qkv, backend):
        with pytest.raises(ValueError, match=message):
            stdha(qkv, (0, 0), backend=backend)

    refused("'triton' needs float32 or half precision: got torch.float64",
            random_qkv(1, 5, 2, 16).double(), "triton")  # fmt: skip
    refused(r"'triton' needs heads of \(16, 32, 64, 128\): got 24",
            random_qkv(1, 5, 2, 24), "triton")  # fmt: skip
    refused("'flash' needs half precision on CUDA: got torch.float32",
            random_qkv(1, 5, 2, 16), "flash")  # fmt: skip
    monkeypatch.setattr(choice, "HAS_TRITON", False)
    refused("needs the package triton: pip install", random_qkv(1, 5, 2, 16), "triton")
    monkeypatch.undo()
    monkeypatch.setattr(stdha_launch, "INTERPRET", False)
    refused("'triton' needs a CUDA device, or TRITON_INTERPRET=1", random_qkv(1, 5, 2, 16).cpu(),
            "triton")  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice on a CPU")
def test_none_chooses_sdpa_on_a_cpu_and_says_so_once(caplog):
    _announce.cache_clear()
    qkv = random_qkv(2, 5, 2, 16)
    assert choose_backend(qkv) == "sdpa"
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(stdha(qkv, (1, 0)), stdha(qkv, (1, 0), backend="sdpa"))
    assert caplog.messages == ["attention on cpu: backend sdpa"]


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice on a CPU")
def test_a_cpu_multiplies_bfloat16_frame_by_frame_where_that_is_faster(monkeypatch):
    qkv, few = random_qkv(2, 64, 2, 16, BF16), random_qkv(2, 63, 2, 16, BF16)
    for fast, chosen in ((True, "matmul"), (False, "sdpa")):
        monkeypatch.setattr(choice, "HAS_FAST_BF16", fast)
        assert choose_backend(qkv) == chosen
        assert choose_backend(few) == choose_backend(qkv.float()) == "sdpa"


def test_clips_and_frames_may_be_one_axis():
    qkv, offsets = random_qkv(3, 5, 2, 64, BF16, clips=2), (-1, 2)
    for backend in ("triton", "matmul", "sdpa", "reference"):
        expected = stdha(qkv, offsets, backend=backend)
        out = stdha(qkv.flatten(0, 1), offsets, backend=backend, num_frames=3)
        assert torch.equal(out, expected.flatten(0, 1))
    with pytest.raises(
        ValueError, match=r"qkv must be \[B\*4, N, 3, H, D\]: got \[6, 5, 3, 2, 64\]"
    ):
        stdha(qkv.flatten(0, 1), offsets, num_frames=4)


def test_queries_and_keys_of_two_dtypes_are_refused():
    query, key_value = random_qkv(1, 5, 2, 64).split((1, 2), dim=3)
    with pytest.raises(
        ValueError, match="key_value must be torch.float32 on .* got torch.bfloat16"
    ):
        stdha_split(query.squeeze(3), key_value.bfloat16(), (0, 0))


def test_scale_must_be_positive():
    with pytest.raises(ValueError, match="scale must be positive: got 0"):
        stdha(random_qkv(1, 5, 2, 16), (0, 0), scale=0.0)


def plain_attention(query, key, value):
    """flash-attn's function as PyTorch has it: `[X, M, h, D]` -> `[X, M, h, D]`."""
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return out.transpose(1, 2)


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
@pytest.mark.parametrize("offsets", [*RECIPE_OFFSETS, (9, -9, 1, -1), (2,) * 4, (0, 1, 0, -2)])
def test_grouping_of_the_flash_backend_is_exact(frames, offsets):
    qkv = random_qkv(frames, 5, len(offsets), 4, clips=2).double()
    weight = torch.randn_like(qkv[:, :, :, 0])
    query, key_value = qkv[:, :, :, 0], qkv[:, :, :, 1:]

    def grouped(q, kv):
        return stdha_flash.attend_grouped(q, kv, offsets, plain_attention)

    got = with_gradient(grouped, [query, key_value], weight)
    expected = with_gradient(
        lambda q, kv: stdha_split(q, kv, offsets, backend="reference"), [query, key_value], weight
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_flash_backend_asks_for_views_and_once_for_all_spatial_heads():
    qkv = random_qkv(8, 5, 12, 4, clips=2)
    calls = []

    def attend(query, key, value):
        shared = {x.untyped_storage().data_ptr() for x in (query, key, value)}
        assert shared == {qkv.untyped_storage().data_ptr()}
        calls.append((query.shape[0], query.shape[2]))
        return plain_attention(query, key, value)

    query, key_value = qkv[:, :, :, 0], qkv[:, :, :, 1:]
    stdha_flash.attend_grouped(query, key_value, (-1, 1) + (0,) * 10, attend)
    assert calls == [(15, 1), (2, 1), (15, 1), (2, 1), (16, 10)]  # inner and edge; inner and edge


def test_flash_backend_takes_the_newest_function_that_fits_or_says_what_to_install(monkeypatch):
    asked = []

    def find(home):
        asked.append(home)
        raise ImportError(home)

    monkeypatch.setattr(stdha_flash, "import_module", find)
    for major, homes in (
        (8, ["flash_attn"]),
        (9, ["flash_attn_interface", "flash_attn.cute", "flash_attn"]),
        (10, ["flash_attn.cute", "flash_attn"]),
    ):
        asked.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
        package = "flash-attn" if major == 8 else "flash-attn-4"
        with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}"):
            stdha_flash.flash_attention(torch.device("cuda"))
        assert asked == homes


def flash_attn_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    """`flash_attn.cute.flash_attn_func` of flash-attn-4 4.0.0b36, as far as it is used."""
    assert qv is None and gather_kv_indices is None and not causal and not deterministic
    assert q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[2:] == k.shape[2:]
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    scores = softmax_scale * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2), None


def test_flash_attn_4_is_called_as_it_is_written(monkeypatch):
    def find(home):
        if home != "flash_attn.cute":
            raise ImportError(home)
        return SimpleNamespace(flash_attn_func=flash_attn_4)

    monkeypatch.setattr(stdha_flash, "import_module", find)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    qkv, offsets = random_qkv(4, 5, 4, 16, clips=2).double(), (-1, 1, 0, 0)
    attend = partial(stdha_flash.flash_attention(torch.device("cuda")), softmax_scale=0.3)
    query, key_value = qkv[:, :, :, 0], qkv[:, :, :, 1:]
    weight = torch.randn_like(query)
    got, expected = (
        with_gradient(function, [query, key_value], weight)
        for function in (
            lambda q, kv: stdha_flash.attend_grouped(q, kv, offsets, attend),
            lambda q, kv: stdha_split(q, kv, offsets, 0.3, backend="reference"),
        )
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation, adapter", [("quick_gelu", {}), ("gelu", None)])
def test_model_runs_on_the_kernels_in_training_and_compiled_as_one_graph(
    monkeypatch, activation, adapter
):
    """All of the kernels: attention, norms and activations."""
    changes = dict(num_frames=2, width=32, num_heads=2, head_offsets=(-1, 1), depth=2)
    changes |= dict(activation=activation, adapter=adapter)
    config = small_config("vit_b16_k400_8x16", **changes)
    model = build(config).to(DEVICE).eval()
    video = torch.randn(1, 3, 2, config.image_size, config.image_size, device=DEVICE)
    results = {}
    for backend in ("reference", "triton"):
        set_backend(model, backend)
        monkeypatch.setattr(choice, "uses_kernels", lambda _, on=backend == "triton": on)
        model.zero_grad()
        logits = model(video)
        logits.square().sum().backward()
        results[backend] = [logits.detach(), *(p.grad for p in model.parameters())]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(video), logits.detach(), rtol=1e-5, atol=1e-5)
        with torch.autocast(DEVICE, BF16):
            narrow = model(video).float()
            torch.testing.assert_close(compiled(video).float(), narrow, rtol=0.02, atol=0.02)
    assert (narrow - logits).norm() <= 0.05 * logits.norm()


def test_autocast_casts_for_every_backend_as_pytorch_does_for_its_attention():
    qkv, offsets = random_qkv(2, 5, 2, 64), (1, -1)
    for backend in ("triton", "matmul", "sdpa", "reference"):
        expected = stdha(qkv.to(BF16), offsets, backend=backend)
        with torch.autocast(DEVICE, BF16):
            assert torch.equal(stdha(qkv, offsets, backend=backend), expected)
            split = stdha_split(qkv[:, :, :, 0], qkv[:, :, :, 1:], offsets, backend=backend)
            assert split.dtype == BF16
            assert stdha(qkv.double(), offsets, backend="reference").dtype == torch.float64


def test_a_backend_asked_for_is_not_replaced_by_the_training_block(monkeypatch):
    """The block that keeps little has its own attention, of which it makes no secret."""
    model = build(small_config("vit_b16_k400_8x16", depth=1)).freeze()
    block = model.transformer.resblocks[0]
    x = torch.randn(1, 8, 5, model.config.width)
    for backend, trained in ((None, True), ("sdpa", True), ("reference", False), ("flash", False)):
        set_backend(model, backend)
        assert can_train(block, x) == trained
    with pytest.raises(ValueError, match="'flash' needs half precision on CUDA"):
        block(x)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_cuda_graph_of_the_merged_model_gives_what_it_gives(dtype):
    config = small_config("vit_b16_k400_8x16", num_frames=2, width=12 * 64, depth=2)
    model = merge(build(config)).to(DEVICE, dtype)
    shape = (1, 3, 2, config.image_size, config.image_size)
    videos = [torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2)]
    with torch.no_grad():
        expected = [model(video) for video in videos]
        video = videos[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(video)
        for source, logits in zip(videos, expected, strict=True):
            video.copy_(source)
            graph.replay()
            assert torch.equal(out, logits)


def test_unknown_backend_of_a_model_is_refused():
    with pytest.raises(ValueError, match="backend must be one of triton, .* or None: got 'x'"):
        set_backend(torch.nn.Identity(), "x")
