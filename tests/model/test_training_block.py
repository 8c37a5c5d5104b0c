"""The training block against plain autograd: the same gradients from much less memory."""

import copy
import dataclasses
import gc
from functools import partial

import pytest
import torch
from attention import packed_attention
from blocks import (
    POLICIES,
    assert_close,
    build_block,
    drawn_masks,
    run,
    tokens,
    trained,
    value_and_grads,
)
from covering import pairwise
from models import build, small_config
from rounding import excesses, values
from torch.func import functional_call
from triton_ops import DEVICE
from zeroi2v_kernels import choice

from bench.baselines import naive_block as naive_module
from bench.baselines.naive_block import naive_block
from bench.measure import run_counting_memory
from zeroi2v.config import RECIPES, AdapterConfig, ModelConfig
from zeroi2v.model import vit
from zeroi2v.model.training_block import block_backward, block_forward, can_train
from zeroi2v.model.vit import Block
from zeroi2v.processes import end_processes
from zeroi2v.train.distributed import start_processes
from zeroi2v.train.engine import trained_weights
from zeroi2v.train.prepare import gather_blocks_whole


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_every_gradient_equal_plain_autograd(memory, cls_only, activation, dropout):
    adapter = dict(ratio=0.25, scale=0.5, dropout=dropout)
    config = small_config("vit_b16_k400_8x16", activation=activation, adapter=adapter)
    block, x = build_block(config).double(), tokens(config)
    masks = drawn_masks(block, x, cls_only, seed=3)
    inputs = [x, *trained(block)]
    expected = value_and_grads(naive_block(block, x, cls_only, masks), inputs)
    assert_close(run(block, x, cls_only, memory, seed=3), expected, 1e-10)


@pytest.mark.parametrize("memory", POLICIES)
def test_adapters_merged_for_the_forward_change_no_gradient(memory):
    adapter = dict(ratio=0.25, scale=0.5, dropout=0.0)
    config = small_config("vit_b16_k400_8x16", adapter=adapter)
    block, x = build_block(config).double(), tokens(config, batch=10)
    rows, fc1 = x.shape[:3].numel(), block.mlp.c_fc.weight
    assert choice.merging_pays(rows, fc1)  # so it does for the narrower layers
    expected = value_and_grads(naive_block(block, x), [x, *trained(block)])
    assert_close(run(block, x, False, memory), expected, 1e-10)


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_by_matrix_products_gives_the_same_gradients(monkeypatch, cls_only, memory):
    monkeypatch.setattr(choice, "matmul_pays", lambda *_: True)
    config = small_config("vit_l14_k400_32x4", adapter=dict(ratio=0.25, scale=0.5, dropout=0.0))
    block, x = build_block(config).double(), tokens(config)
    expected = value_and_grads(naive_block(block, x, cls_only), [x, *trained(block)])
    assert_close(run(block, x, cls_only, memory), expected, 1e-10)


@pytest.fixture
def on_kernels(monkeypatch):
    """The GPU's path through the block, in Triton's interpreter."""
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)


@pytest.mark.parametrize(
    "dtype, cls_only, memory",
    [
        (torch.float32, False, "lean"),
        (torch.bfloat16, True, "save"),
        *((torch.bfloat16, False, memory) for memory in POLICIES),
    ],
)
def test_triton_kernels_compute_the_block_as_exactly(on_kernels, dtype, cls_only, memory):
    block = build_block(kernel_config()).to(DEVICE, dtype)
    x = tokens(kernel_config(), dtype, batch=1, device=DEVICE)
    masks = drawn_masks(block, x, cls_only, seed=3)
    assert_rounding_alone(block, x, cls_only, memory, dtype, masks)


class Naive(torch.nn.Module):
    """The naive block as a module, whose parameters `functional_call` can replace."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(self, x, cls_only, masks):
        return naive_block(self.block, x, cls_only, masks)


def assert_rounding_alone(block, x, cls_only, memory, dtype, masks=None):
    """Output and gradients of the training block are those of the naive one, but for rounding."""
    names = [name for name, p in block.named_parameters() if p.requires_grad]
    naive = Naive(copy.deepcopy(block).double())

    def run_block(x, *parameters):
        torch.manual_seed(3)
        assert can_train(block, x)
        return functional_call(block, dict(zip(names, parameters, strict=True)), (x, cls_only))

    def run_naive(x, *parameters):
        replaced = {f"block.{n}": p for n, p in zip(names, parameters, strict=True)}
        drawn = masks and [mask.double() for mask in masks]
        return functional_call(naive, replaced, (x, cls_only, drawn))

    block.memory = memory
    inputs = [x, *trained(block)]
    actual = values(run_block, inputs)
    assert [t.dtype for t in actual] == [x.dtype, *(t.dtype for t in inputs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive_module, "stdha", lambda x, offsets, **_: packed_attention(x, offsets))
        found = excesses(actual, run_naive, inputs, dtype)
    assert max(found) <= 1, f"times the budget: {[f'{excess:.3g}' for excess in found]}"


def test_a_float32_residual_stream_may_run_on_half_precision_kernels(on_kernels):
    """Autocast with float32 tokens: x, the sums and the gradient of x stay in float32."""
    config = kernel_config()
    block = build_block(config).to(DEVICE)
    x = tokens(config, torch.float32, batch=1, device=DEVICE)
    masks = drawn_masks(block, x, False, seed=3)
    expected = value_and_grads(naive_block(block, x, masks=masks), [x, *trained(block)])
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(block, x, False, "save", seed=3)
    for actual, truth in zip(ours, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - truth).norm() <= 0.04 * truth.norm()  # the interpreter cuts, not rounds


def test_block_on_kernels_is_a_well_formed_operator(on_kernels):
    config = kernel_config()
    block, x = build_block(config).to(DEVICE), tokens(config, torch.bfloat16, 1, device=DEVICE)
    args = forward_arguments(block.bfloat16(), x, cls_only=False)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(block_forward, args, test_utils=utilities)


def kernel_config() -> ModelConfig:
    """The narrowest model that all kernels take."""
    return ModelConfig(
        width=32, depth=1, num_heads=2, num_frames=2, image_size=32, patch_size=16,
        head_offsets=(-1, 1), adapter=AdapterConfig(ratio=0.5, scale=0.5, dropout=0.3),
    )  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_offsets_of_every_recipe(recipe):
    config = small_config(recipe)
    block, x = build_block(config).double().eval(), tokens(config, batch=1)
    expected = value_and_grads(naive_block(block, x), [x, *trained(block)])
    assert_close(run(block, x, False, "save"), expected, 1e-10)


@pytest.mark.parametrize("frames, offsets", [(1, (-1, 1)), (2, (5, -5)), (5, (3, 3)), (3, (-2, 2))])
def test_offsets_up_to_and_beyond_the_clip(frames, offsets):
    config = small_config("vit_b16_k400_8x16", num_frames=frames, head_offsets=offsets * 6)
    block, x = build_block(config).double().eval(), tokens(config)
    expected = value_and_grads(naive_block(block, x), [x, *trained(block)])
    assert_close(run(block, x, False, "lean"), expected, 1e-10)


@pytest.mark.parametrize("memory", POLICIES)
def test_a_block_without_adapters_passes_gradients_on(memory):
    config = small_config(adapter=None)
    block, x = build_block(config).double(), tokens(config)
    expected = value_and_grads(naive_block(block, x), [x])
    assert_close(run(block, x, False, memory), expected, 1e-10)


@pytest.mark.parametrize("memory", POLICIES)
def test_a_block_whose_input_needs_no_gradient_gives_the_same_ones(memory):
    config = small_config()
    block, x = build_block(config), tokens(config, torch.float32)
    _, _, *expected = run(block, x, False, memory)
    actual = value_and_grads(block(x.detach(), False), trained(block))[1:]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# In what dtype the weights are, and to what autocast takes the products.
PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "autocast to bf16": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize(
    *pairwise(
        precision=(*PRECISIONS, "bf16, attention by matrix products"),
        cls_only=(False, True),
        memory=POLICIES,
    )
)
def test_rounding_errors_are_those_of_plain_autograd(monkeypatch, precision, cls_only, memory):
    if precision not in PRECISIONS:
        monkeypatch.setattr(choice, "matmul_pays", lambda *_: True)
    dtype, autocast = PRECISIONS[precision.split(",")[0]]
    config = small_config("vit_b16_k400_8x16", adapter=dict(ratio=0.25, scale=0.5, dropout=0.0))
    block, x = build_block(config).to(dtype), tokens(config, dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert_rounding_alone(block, x, cls_only, memory, autocast or dtype)


def widths_kept(block, x, make) -> float:
    """Bytes kept by the graph of `make()`, weights aside, in widths per token of x."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = make()
    del out
    return sum(storage.nbytes() for storage in kept.values()) / (x.numel() * x.element_size())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_widths_kept_for_backward_on_a_narrow_vit_b16(precision):
    """Half as wide, in heads too: what is kept is counted in widths of a token."""
    dtype, autocast = PRECISIONS[precision]
    config = dataclasses.replace(
        RECIPES["vit_b16_k400_8x16"].model,
        width=384, num_heads=6, head_offsets=(-1, 1, 0, 0, 0, 0), num_frames=4,
    )  # fmt: skip
    block, x = build_block(config).to(dtype), tokens(config, autocast or dtype, batch=1)
    block.train()
    limits = {"save": 14, "lean": 12, "recompute": 1.5}
    claimed = {"save": 12, "lean": 11.25, "recompute": 1.25}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        for memory, limit in limits.items():
            block.memory = memory
            widths = widths_kept(block, x, lambda: block(x))
            assert widths <= limit
            assert widths == pytest.approx(claimed[memory], abs=0.05)  # the softmax's sums
        naive = widths_kept(block, x, lambda: naive_block(block, x))
        assert naive == pytest.approx(22, abs=0.05) or (autocast and naive > 22)
        block.eval()  # without dropout
        block.memory = "lean"
        assert widths_kept(block, x, lambda: block(x)) == pytest.approx(11, abs=0.05)


def test_peak_memory_of_a_step_is_a_third_in_bf16_and_two_thirds_in_fp32_of_naive_fp32():
    """A narrow ViT-B/16: as deep, as many tokens, so that widths compare as in the wide one."""
    config = dataclasses.replace(
        RECIPES["vit_b16_k400_8x16"].model, width=192, num_frames=2, num_classes=4
    )
    model = build(config).freeze().train()
    video = torch.randn(1, 3, 2, 224, 224)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def peak_bytes(run):
        return run_counting_memory(run, "cpu")[1]

    def step():
        torch.autograd.grad(model(video).float().sum(), parameters)

    peaks = {}
    for memory in POLICIES:
        model.set_memory(memory)
        peaks[memory] = peak_bytes(step)
    for block in model.transformer.resblocks:
        block.forward = partial(naive_block, block)
    naive = peak_bytes(step)
    for block in model.transformer.resblocks:
        del block.forward
    model.bfloat16().set_memory("lean")
    assert peak_bytes(step) <= 0.35 * naive
    assert peaks["recompute"] < 0.2 * naive < peaks["lean"] < peaks["save"] < 0.66 * naive


def test_recomputing_keeps_nothing_else_alive_between_forward_and_backward():
    """What the hooks don't see: tensors held by the operator's context, or by other outputs."""
    config = small_config()
    block, x = build_block(config), tokens(config, torch.float32)
    block.memory = "recompute"
    gc.collect()
    before = alive()
    out = block(x)
    kept = sum(size for data, size in alive().items() if data not in before)
    assert kept <= 1.25 * out.nbytes + 64  # out itself, a bottleneck, the seed


def alive() -> dict[int, int]:
    """Address and bytes of the storage of every tensor that Python knows."""
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_a_trainable_backbone_is_trained_by_plain_autograd():
    config = small_config(adapter=dict(ratio=0.25, scale=0.5, dropout=0.0))
    block, x = build_block(config).double(), tokens(config)
    block.mlp.c_fc.weight.requires_grad = True
    assert not can_train(block, x)
    inputs = [x, *trained(block)]
    assert any(p is block.mlp.c_fc.weight for p in inputs)
    expected = value_and_grads(naive_block(block, x), inputs)
    assert_close(value_and_grads(block(x), inputs), expected, 1e-10)


def test_freezing_chooses_the_training_block_and_nothing_else_does(monkeypatch):
    used = []
    monkeypatch.setattr(vit, "training_block", lambda block, x, _: used.append(block.memory) or x)
    model = build(small_config())
    video = torch.zeros(1, 3, model.config.num_frames, *2 * [model.config.image_size])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "_adapter." in name
    model.tokens(video)
    assert used == []
    model.freeze().tokens(video)
    assert used == ["save"] * model.config.depth
    model.set_memory("lean").freeze().tokens(video)
    assert used[model.config.depth :] == ["lean"] * model.config.depth


def test_nothing_is_kept_where_no_gradient_is_wanted():
    config = small_config()
    block, x = build_block(config).requires_grad_(False), tokens(config)
    assert not can_train(block, x.detach())
    with torch.no_grad():
        assert not can_train(build_block(config), x)


@pytest.mark.parametrize("memory", POLICIES)
def test_same_seed_same_bits_and_another_seed_another_dropout(memory):
    config = small_config("vit_b16_k400_8x16")
    block, x = build_block(config), tokens(config, torch.float32)
    one, two, other = (run(block, x, False, memory, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_dropout_follows_the_random_state_as_resumed_runs_need():
    config = small_config("vit_b16_k400_8x16")
    block, x = build_block(config), tokens(config, torch.float32)
    state = torch.get_rng_state()
    first = block(x)
    assert not torch.equal(first, block(x))
    torch.set_rng_state(state)
    assert torch.equal(first, block(x))


@pytest.mark.parametrize("memory", POLICIES)
def test_trains_under_compile_in_one_graph(memory):
    config = small_config("vit_b16_k400_8x16", head_dropout=0.0)
    model = build(config).freeze().train().set_memory(memory)
    video = torch.randn(1, 3, config.num_frames, config.image_size, config.image_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        torch.manual_seed(0)
        results.append(value_and_grads(function(video), parameters))
    assert_close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("cls_only", [False, True])
def test_block_is_a_well_formed_operator(memory, cls_only):
    config = dataclasses.replace(small_config("vit_b16_k400_8x16"), num_frames=2)
    block, x = build_block(config), tokens(config, torch.float32, batch=1)
    block.memory = memory
    args = forward_arguments(block, x, cls_only)
    torch.library.opcheck(block_forward, args)
    with torch.no_grad():
        out, *kept = block_forward(*args)
        torch.library.opcheck(block_backward, (out, x.detach(), kept, *args[1:], True))


def forward_arguments(block, x, cls_only) -> tuple:
    """What a call of the block passes to its operator."""
    calls = []

    def record(*args):
        calls.append(args)
        return block_forward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeroi2v.model.training_block.is_followed", lambda x: True)
        patch.setattr("zeroi2v.model.training_block.block_forward", record)
        block(x, cls_only)
    return calls[0]


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("cls_only", [False, True])
def test_the_block_gives_the_same_bits_as_an_operator_and_without_its_layers(
    memory, cls_only, monkeypatch
):
    config = small_config("vit_b16_k400_8x16")
    block = build_block(config)
    block.memory = memory
    x = tokens(config, torch.float32).requires_grad_()
    parameters = [x, *(p for p in block.parameters() if p.requires_grad)]
    results = []
    for followed in (False, True):
        monkeypatch.setattr(
            "zeroi2v.model.training_block.is_followed", lambda x, answer=followed: answer
        )
        torch.manual_seed(0)
        out = block(x, cls_only)
        assert ("_Block" in type(out.grad_fn).__name__) == (not followed)
        results.append(value_and_grads(out, parameters))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_unknown_policy_is_refused():
    model = build(small_config())
    with pytest.raises(ValueError, match="memory must be one of save, lean, recompute: got 'all'"):
        model.set_memory("all")


@pytest.mark.parametrize("memory", POLICIES)
def test_zero_stage_3_gathers_the_weights_of_a_block_when_it_needs_them(memory):
    """Every weight is spread out between uses, small ones too."""
    config = small_config("vit_b16_k400_8x16", head_dropout=0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # DeepSpeed takes a GPU by itself
    size = config.image_size
    video = torch.randn(2, 3, config.num_frames, size, size, device=device)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 2**31,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,  # AdamW would blow rounding up
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    start_processes()
    try:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ends = []
        for use_engine in (False, True):
            model = build(config).to(device).freeze().train().set_memory(memory)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            if use_engine:
                gather_blocks_whole(model)
                engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
                assert model.transformer.resblocks[0].mlp.c_fc.weight.numel() == 0
            torch.manual_seed(0)
            for _ in range(2):
                if use_engine:
                    engine.backward(engine(video).sum())
                    engine.step()
                else:
                    model(video).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            if use_engine:
                ends.append(trained_weights(engine))
                engine.destroy()
            else:
                ends.append(
                    {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
                )
    finally:
        end_processes()
    assert_close(ends[1].values(), ends[0].values(), 1e-5)
