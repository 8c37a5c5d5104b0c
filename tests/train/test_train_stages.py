"""ZeRO stages, processes and accumulation share the work out; what is learned is the same.

With `ZEROI2V_SOAK` set all of the matrix is run, else its corners.
"""

import os
from pathlib import Path

import pytest
import torch
from training import MODEL, Ranks, arguments, make_data

import zeroi2v.train.prepare
from zeroi2v import RECIPES, VideoViT
from zeroi2v.config import ModelConfig
from zeroi2v.processes import end_processes
from zeroi2v.reparam import DTYPES
from zeroi2v.train.config import OptimConfig
from zeroi2v.train.distributed import start_processes
from zeroi2v.train.engine import build_engine, deepspeed_config, trained_weights, update
from zeroi2v.train.log import read_log
from zeroi2v.train.prepare import gather_blocks_whole
from zeroi2v.train.state import StateFiles, save_state

# Number of processes -> (stage, forward passes of each per step).
MATRIX = {1: [(0, 1), (1, 2), (2, 1), (3, 2)], 2: [(0, 2), (1, 1), (2, 2), (3, 1)], 4: [(2, 1)]}
STEPS = 10
if "ZEROI2V_SOAK" in os.environ:
    STEPS = 20
    MATRIX = {n: [(stage, passes) for stage in range(4) for passes in (1, 2)] for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def losses(data, tmp_path_factory):
    """Losses of STEPS steps of 8 clips, by precision, processes, stage and passes."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for processes, cells in MATRIX.items():
        runs = {("fp32", processes, *cell): None for cell in cells}
        runs |= {("bf16", processes, *cell): None for cell in cells if cell[0]}
        words = [
            arguments(
                data, folder / "-".join(map(str, run)), f"optim.precision={run[0]}",
                f"optim.zero_stage={run[2]}", f"optim.micro_batch={8 // processes // run[3]}",
                "optim.batch_size=8", f"optim.epochs={STEPS // 2}", "data.val_list=null",
                "augment=null", "model.adapter.dropout=0", "model.head_dropout=0",
                f"data.cache={folder / 'cache'}", "run.log_every=20",
            )
            for run in runs
        ]  # fmt: skip
        with Ranks(*words, count=processes, output=folder / f"{processes}.txt") as ranks:
            assert set(ranks.wait(600)) == {0}, ranks.text()
        for run in runs:
            log = read_log(folder / "-".join(map(str, run)))
            found[run] = [line["loss"] for line in log]
    return found


@pytest.mark.timeout(1800)
def test_losses_in_fp32_agree_over_stages_processes_and_accumulation(losses):
    expected = losses["fp32", 1, 0, 1]
    assert len(expected) == STEPS and max(expected) - min(expected) > 0.05
    for run, actual in losses.items():
        if run[0] == "fp32":
            assert actual == pytest.approx(expected, rel=1e-5), run


@pytest.mark.timeout(1800)
def test_losses_in_bf16_agree_within_its_rounding(losses):
    expected = losses["fp32", 1, 0, 1]
    for run, actual in losses.items():
        if run[0] == "bf16":
            assert actual == pytest.approx(expected, rel=2**-7), run
            assert actual != expected


@pytest.fixture
def alone():
    yield start_processes()
    end_processes()


def engine_after_a_step(model: VideoViT, optim: OptimConfig):
    """The engine, whose optimizer has its moments."""
    size, frames = model.config.image_size, model.config.num_frames
    if optim.zero_stage == 3:
        gather_blocks_whole(model)
    engine = build_engine(model, optim, steps_per_epoch=10)
    video = torch.randn(1, 3, frames, size, size, dtype=DTYPES[optim.precision])
    engine.backward(engine(video).float().logsumexp(1).mean())
    update(engine)
    return engine


@pytest.mark.parametrize("stage", range(4))
def test_state_of_a_base_model_holds_its_trained_weights_twice_at_most_and_nothing_frozen(
    alone, tmp_path, stage
):
    """Beside the moments, 8 bytes for each trained weight. Images are small; all else is B/16."""
    config = ModelConfig.from_dict(
        {**RECIPES["vit_b16_k400_8x16"].model.to_dict(), "image_size": 32}
    )
    model = VideoViT(config).freeze()
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    engine = engine_after_a_step(model, OptimConfig(batch_size=1, micro_batch=1, zero_stage=stage))
    save_state(engine, tmp_path / "state", {"step": 1, "validated": 0})
    engine.destroy()
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    count = sum(trained.values())
    assert sum(f.stat().st_size for f in files) - 8 * count < 2.2 * 4 * count
    for file in files:
        if file.name.endswith("model_states.pt"):
            held = StateFiles().load(str(file), "cpu")["module"]
            assert not [n for n, t in held.items() if n in frozen and t.numel()]


def test_fp16_scales_its_loss_and_trains_and_keeps_to_the_schedule(alone, monkeypatch):
    """DeepSpeed refuses fp16 on a CPU, for its speed; the arithmetic is the GPU's."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    torch.manual_seed(0)
    model = VideoViT(ModelConfig.from_dict(MODEL)).freeze()
    optim = OptimConfig(
        batch_size=1, micro_batch=1, precision="fp16", zero_stage=2, warmup_epochs=0, lr=1e-2
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_after_a_step(model, optim)
    video = torch.randn(1, 3, 4, 32, 32).half()
    for _ in range(20):  # the first scales are too large: these steps are left out
        engine.backward(engine(video).float().logsumexp(1).mean())
        update(engine)
    assert engine.skipped_steps > 0 and engine.lr_scheduler.last_epoch == 21
    assert engine.optimizer.dynamic_loss_scale and engine.optimizer.cur_scale > 1
    after = trained_weights(engine)
    assert all(after[n].dtype == torch.float32 and after[n].isfinite().all() for n in before)
    assert any(not torch.equal(after[n], before[n]) for n in before)
    engine.destroy()


def test_offload_tells_deepspeed_to_keep_the_optimizer_on_the_cpu():
    optim = OptimConfig(batch_size=8, offload=True, zero_stage=2)
    config = deepspeed_config(optim, world_size=1, trainable=10)
    offload = config["zero_optimization"]["offload_optimizer"]
    assert offload == {"device": "cpu", "pin_memory": True}
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_tf32_is_used_only_when_asked_for():
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for tf32 in (True, False):
            zeroi2v.train.prepare.check_device(OptimConfig(tf32=tf32), torch.device("cuda"))
            assert [place.allow_tf32 for place in places] == [tf32, tf32]
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
