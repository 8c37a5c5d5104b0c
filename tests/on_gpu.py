"""What only a GPU can show, in small: run by `make check-gpu`, one test a process.

Without a GPU the same tests run on the CPU, and leave out, by name, the parts that need CUDA.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from coloured import write_tagged
from models import FAMILIES, build, family_config, small_config
from training import assert_same_run, command, environment, finish, make_data
from training import weights as weights_of
from videos import numbered_frame, write_numbered, write_video
from zeroi2v_kernels import choice
from zeroi2v_kernels.quantize import quantize_rows
from zeroi2v_kernels.quantize_reference import UNIT, quantize_rows_reference

from zeroi2v import cli, evaluate, export, inference, merge, predict, reparam
from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.augment import KINDS, AugmentConfig
from zeroi2v.data.clip_worker import ClipSource
from zeroi2v.data.colours import MATRIX_TAGS
from zeroi2v.data.pipeline import ClipLoader
from zeroi2v.model.attention import set_backend
from zeroi2v.model.fp8 import fp8_linear
from zeroi2v.model.quantization import quantized
from zeroi2v.storage.checkpoint import load
from zeroi2v.train.log import read_log

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def left_out(*parts: str) -> None:
    """Says which parts need a GPU that is not there."""
    if not HAS_GPU:
        print("left out, for they need CUDA:", ", ".join(parts))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).float().norm() / other.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_eager_graph_compiled_and_merged_agree(dtype):
    changes = dict(num_frames=4, width=12 * 64, depth=2, image_size=64)
    config = small_config("vit_b16_k400_8x16", **{k: v for k, v in changes.items() if k != "width"})
    config = ModelConfig.from_dict(config.to_dict() | changes)
    adapted = build(config)
    merged = merge(adapted)
    model = merged.to(DEVICE, dtype)
    video = torch.randn(2, 3, 4, 64, 64, device=DEVICE).to(dtype)
    limit = 1e-4 if dtype == torch.float32 else 0.03
    with torch.inference_mode():
        eager = model(video)
        assert torch.equal(eager, model(video)), "two runs differ"
        ways = {"adapted": adapted.to(DEVICE, dtype)(video)}
        for backend in ("triton", "sdpa") if HAS_GPU else ("sdpa",):
            set_backend(model, backend)
            ways[backend] = model(video)
        set_backend(model, None)
        if HAS_GPU:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                model(video)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(video)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, eager), "the graph's bits differ"
            ways["compiled"] = torch.compile(model)(video)
    left_out("CUDA graph", "torch.compile", "backend triton")
    errors = {name: apart(output, eager) for name, output in ways.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert all(error < limit for error in errors.values()), errors


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_model_of_every_family_agrees_with_float64(family):
    config = family_config(family, width=4 * 64, head_offsets=(-1, 1, 0, 0))
    adapted = build(config)
    video = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    truth = copy.deepcopy(adapted).double()(video.double())
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        for model in (copy.deepcopy(adapted), merge(adapted)):
            found = model.to(DEVICE, dtype)(video.to(DEVICE, dtype)).cpu()
            error = apart(found, truth)
            print(f"{family} {dtype}: {error:.1e}")
            assert error < limit
    left_out("the kernels of every family")


def graphs_of(model) -> int:
    """How many graphs an accelerated model holds."""
    return len([graph for graph in model.graphs._graphs.values() if graph is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 1 + HAS_GPU])
@torch.no_grad()
def test_model_accelerated_gives_the_same_bits(dtype, caplog):
    changes = dict(num_frames=4, depth=2, image_size=64)
    changes |= dict(width=12 * 64) if HAS_GPU else {}
    config = ModelConfig.from_dict(small_config("vit_b16_k400_8x16").to_dict() | changes)
    adapted = build(config)
    plain, other = (merge(build(config, seed)).to(DEVICE, dtype) for seed in (0, 1))
    model = merge(adapted).to(DEVICE, dtype).accelerate(1)
    videos = {n: torch.randn(n, 3, 4, 64, 64, device=DEVICE).to(dtype) for n in (1, 5)}

    def assert_same(count: int) -> None:
        kept = []
        for _ in range(3):
            for video in videos.values():
                kept.append((model(video), plain(video)))
        assert all(torch.equal(one, expected) for one, expected in kept)
        assert graphs_of(model) == (count if HAS_GPU else 0), caplog.text

    assert_same(2)
    for one in (model, plain):  # in place: the same graphs
        one.load_state_dict(other.state_dict())
    assert_same(2)
    graphs = list(model.graphs._graphs.values())
    for one in (model, plain):
        one.head.weight = torch.nn.Parameter(torch.ones_like(one.head.weight))
    assert_same(2)
    for one in (model, plain):
        set_backend(one, "sdpa")
    assert_same(2)
    for one in (model, plain):
        one.to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    assert_same(2)
    assert not HAS_GPU or not {id(graph) for graph in graphs} & {
        id(graph) for graph in model.graphs._graphs.values()
    }
    with torch.inference_mode():
        assert_same(2)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        assert_same(2)
    if HAS_GPU:
        stream = torch.cuda.Stream()
        expected = plain(videos[5])
        torch.cuda.synchronize()
        for i in range(20):  # graphs of one memory, on two streams
            with torch.cuda.stream(stream if i % 2 else torch.cuda.default_stream()):
                model(videos[1])
                results = model(videos[5])
        torch.cuda.synchronize()
        assert torch.equal(results, expected)
        before = torch.cuda.memory_allocated()
        del model, one, graphs
        assert torch.cuda.memory_allocated() < before, "a deleted model keeps its memory"
    left_out("CUDA graphs of an accelerated model")


@torch.no_grad()
def test_model_in_float8_computes_the_reference():
    """Rounding is the same bit for bit, products but for their sums, models but for bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(197, 768, generator=generator).bfloat16()
    x[:, [5, 99]] *= 100
    weight, scale = quantize_rows(torch.randn(2304, 768, generator=generator))
    bias = torch.randn(2304, generator=generator).bfloat16()
    for one, other in zip(quantize_rows_reference(x), quantize_rows(x.to(DEVICE)), strict=True):
        assert torch.equal(one.float(), other.cpu().float())
    given = (x, weight, scale.squeeze(-1), bias)
    expected = fp8_linear(*given).double()
    found = fp8_linear(*(tensor.to(DEVICE) for tensor in given)).cpu().double()
    values, factors = (part.double() for part in quantize_rows(x))
    terms = (values.abs() @ weight.double().abs().T) * factors * scale.T.double()
    # float8 units align products to 13 bits and add them in float32; both results are stored
    limit = 2.0**-12 * terms + 2 * torch.finfo(torch.bfloat16).eps * expected.abs()
    print(f"product: {((found - expected).abs() / limit).max():.2f} of its limit")
    assert ((found - expected).abs() <= limit).all()

    changes = dict(num_frames=4, width=12 * 64, depth=2, image_size=64)
    config = ModelConfig.from_dict(small_config("vit_b16_k400_8x16").to_dict() | changes)
    merged = merge(build(config))
    here, model = quantized(merged), quantized(merged).to(DEVICE)
    video = torch.randn(2, 3, 4, 64, 64, generator=generator).bfloat16()
    eager = model(video.to(DEVICE))
    ways = {"reference": here(video), "cast": copy.deepcopy(model).float()(video.to(DEVICE))}
    if HAS_GPU:
        assert torch.equal(copy.deepcopy(model).accelerate(2)(video.to(DEVICE)), eager)
        ways["compiled"] = torch.compile(model)(video.to(DEVICE))
    errors = {name: apart(output.cpu(), eager.cpu()) for name, output in ways.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    # where bfloat16 rounds otherwise, some numbers are rounded to the next e4m3 number
    assert all(error < UNIT for error in errors.values()), errors
    assert reparam.verify(merged.to(DEVICE), model, video.float()).passed
    if HAS_GPU:
        assert choice.has_fp8_units(torch.device(DEVICE)), "no float8 units were tried"
    left_out("torch._scaled_mm on float8 units", "a CUDA graph and torch.compile of float8")


class Asking(torch.nn.Module):
    """Waits for a number, which no capture allows."""

    def forward(self, x):
        return x * (2 if x.sum().item() > 0 else 3)


@torch.no_grad()
def test_model_that_cannot_be_captured_runs_op_by_op(caplog):
    plain = merge(build(small_config(num_frames=4))).to(DEVICE)
    model = merge(build(small_config(num_frames=4))).to(DEVICE)
    head, video = model.head, torch.randn(2, 3, 4, 32, 32, device=DEVICE)
    expected = Asking()(plain(video))
    model.head = torch.nn.Sequential(head, Asking()).eval()
    model.accelerate(2)
    for _ in range(3):
        assert torch.equal(model(video), expected)
    model.head = head
    model.accelerate(2)
    assert torch.equal(model(video), plain(video))
    if HAS_GPU:
        (said,) = [record.getMessage() for record in caplog.records]
        print(said)
        assert "op by op" in said and "captur" in said.split("CUDA graph: ")[1]
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert graphs_of(model) == 1
    left_out("a failed capture")


def test_model_predicts_files_alike_with_and_without_graphs(tmp_path, monkeypatch, caplog):
    model = merge(build(small_config(num_frames=4))).to(DEVICE)
    samples = [Sample(write_numbered(tmp_path / f"{i}.mp4", 9 + i), 0) for i in range(7)]
    rows = {}
    for worth in (99, 2):
        monkeypatch.setattr(inference, "RECURS", worth)
        results = inference.predict_each(model, samples, batch_size=2)
        rows[worth] = [next(results)]
        assert (model.graphs is None) == (worth == 99)
        if worth == 2 and HAS_GPU:
            assert graphs_of(model) == 1
        rows[worth] += results
    assert rows[2] == rows[99] and len(rows[2]) == 7
    assert model.graphs is None and not caplog.records
    left_out("CUDA graphs of predict")


def video_config() -> ModelConfig:
    return ModelConfig.from_dict(
        dict(image_size=64, patch_size=16, num_frames=4, num_classes=4,
             preprocess=dict(sampling="uniform", val_short_side=64))
    )  # fmt: skip


def test_data_is_augmented_as_on_the_cpu(tmp_path):
    """Every kind of RandAugment, erasing and mixing: the same draws on both devices."""
    samples = [Sample(write_numbered(tmp_path / f"{i}.mp4", 12), i % 4) for i in range(16)]
    seen: set[str] = set()
    worst = 0.0
    for number, mixing in enumerate(({}, {"mixup": 0.8}, {"cutmix": 1.0})):
        augment = AugmentConfig(rand_augment_ops=4, erasing=0.5, **mixing)
        loaders = [
            ClipLoader(samples, video_config(), batch_size=8, augment=augment, seed=number,
                       device=device, decoder="pyav")
            for device in ("cpu", DEVICE)
        ]  # fmt: skip
        source = ClipSource(loaders[0].plan, 0, 0)
        for i in range(16):
            info = type("Info", (), dict(epoch_idx=0, iteration=i // 8, idx_in_batch=i % 8))
            seen |= {KINDS[int(row[0])] for row in source(info)[4]}
        for one, other in zip(*(loader.epoch() for loader in loaders), strict=True):
            assert torch.equal(one.index, other.index)
            assert torch.allclose(one.target.float(), other.target.cpu().float())
            for a, b in zip(one.video, other.video.cpu(), strict=True):
                worst = max(worst, (a - b).abs().mean().item())
    print(f"{len(seen)} kinds of {len(KINDS)}; clips differ by {worst:.4f} deviations at most")
    assert worst < 0.05 and seen == set(KINDS)
    left_out("DALI's graph on a GPU")


def coloured(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Frames that move, in colours that two matrices would tell apart."""
    tint = np.array([[[1.0, 0.45, 0.3]], [[0.35, 0.9, 0.4]]]).repeat(size[0] // 2, 0)
    return [(numbered_frame(i, *size) * tint).astype(np.uint8) for i in range(count)]


def test_data_of_ten_files_is_the_same_by_both_decoders(tmp_path):
    made = [("libx264", "mp4", {"g": "12", "bf": "2"}), ("libx265", "mp4", {}),
            ("libvpx-vp9", "webm", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
            ("libsvtav1", "mkv", {"g": "12", "preset": "12"}), ("mjpeg", "avi", {})]  # fmt: skip
    made[1][2]["x265-params"] = "keyint=12:open-gop=0:log-level=none"
    samples = []
    for size in ((144, 176), (240, 320)):
        for codec, suffix, options in made:
            path = tmp_path / f"{codec}_{size[0]}.{suffix}"
            samples.append(Sample(write_video(path, coloured(24, size), codec, **options), 0))
    batches, by = {}, {}
    for decoder in ("pyav", "dali"):
        loader = ClipLoader(samples, video_config(), batch_size=5, device=DEVICE, decoder=decoder)
        batches[decoder] = torch.cat([batch.video.cpu() for batch in loader.epoch()])
        by[decoder] = dict(loader.decoded_by)
        assert not loader.bad_files
    levels = (batches["pyav"] - batches["dali"]).abs().flatten(1).mean(1) * 68
    print(f"{by['dali']}; levels apart: {[round(x, 2) for x in levels.tolist()]}")
    assert by["dali"].get("dali", 0) >= (6 if HAS_GPU else 4)
    assert levels.max() < 2
    left_out("NVDEC")


@pytest.mark.parametrize("size", [(144, 176), (720, 1280)] if HAS_GPU else [(144, 176)])
def test_data_of_every_colour_tag_is_the_same_by_both_decoders(tmp_path, size):
    samples = []
    for tag in (None, *MATRIX_TAGS):
        for full in (False, True):
            path = write_tagged(tmp_path / f"{tag}_{full}.mp4", "libx264", tag, full, size)
            samples.append(Sample(path, 0))
    batches, by = {}, {}
    for decoder in ("pyav", "dali"):
        loader = ClipLoader(samples, video_config(), batch_size=4, device=DEVICE, decoder=decoder)
        found = [(batch.index, batch.video.cpu()) for batch in loader.epoch()]
        order = torch.cat([index for index, _ in found]).argsort()
        batches[decoder] = torch.cat([video for _, video in found])[order]
        by[decoder] = dict(loader.decoded_by)
    levels = (batches["pyav"] - batches["dali"]).abs().flatten(1).mean(1) * 68
    print(f"{by['dali']}; levels apart: {[round(x, 2) for x in levels.tolist()]}")
    assert by["dali"].get("dali", 0) == (len(samples) // 2 if HAS_GPU else 0)
    assert levels.max() < 2
    left_out("NVDEC")


RUNS = {  # overrides, whether they need CUDA
    "fp32 stage 0": (["optim.zero_stage=0"], False),
    "bf16 stage 1": (["optim.precision=bf16"], False),
    "bf16 stage 2": (["optim.precision=bf16", "optim.zero_stage=2"], True),
    "bf16 stage 3": (["optim.precision=bf16", "optim.zero_stage=3"], True),
    "fp16 stage 1": (["optim.precision=fp16"], True),
    "fp32 stage 2, offload": (["optim.zero_stage=2", "optim.offload=true"], True),
    "bf16 stage 1, lean": (["optim.precision=bf16", "optim.memory=lean"], True),
    "bf16 stage 1, recompute": (["optim.precision=bf16", "optim.memory=recompute"], True),
}


def test_train_in_every_precision_and_stage(tmp_path):
    data = make_data(tmp_path)
    todo = {name: words for name, (words, needs_gpu) in RUNS.items() if HAS_GPU or not needs_gpu}
    left_out(*(name for name in RUNS if name not in todo))

    def go(name: str) -> str:
        folder = tmp_path / name.replace(" ", "_").replace(",", "")
        words = ["optim.epochs=1", "run.max_steps=3", *todo[name]]
        done = finish([sys.executable, *command(data, folder, *words)], env=environment())
        assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == 3
        losses = [line["loss"] for line in read_log(folder) if "loss" in line]
        assert len(losses) == 3 and np.isfinite(losses).all(), (name, losses)
        assert all(w.isfinite().all() for w in weights_of(folder).values())
        return f"{name}: loss {losses[-1]:.3f}"

    with ThreadPoolExecutor(4 if HAS_GPU else 1) as pool:
        for line in pool.map(go, todo):
            print(line)


def test_train_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    data = make_data(tmp_path)
    words = ["optim.precision=bf16", "run.save_every=1"] if HAS_GPU else ["run.save_every=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pool = ThreadPoolExecutor(1)  # beside it
    undisturbed = pool.submit(
        finish, [sys.executable, *command(data, whole, *words)], env=environment()
    )
    process = subprocess.Popen(
        [sys.executable, *command(data, broken, *words)], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (broken / "state" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish([sys.executable, *command(data, broken, *words, "run.resume=auto")], env=environment())
    undisturbed.result()
    assert_same_run(whole, broken)
    print("killed after its first save; the same bits")


def test_artefacts_give_the_same_top5(tmp_path, capsys):
    adapted, merged = tmp_path / "adapted", tmp_path / "merged"
    build(small_config(num_frames=4, labels=tuple(map(str, range(11))))).save_pretrained(adapted)
    for i in range(4):
        write_numbered(tmp_path / f"{i}.mp4", 9 + 3 * i)
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(4)))

    def verb(module, *words) -> None:
        assert cli.run(module.main, list(map(str, words))) == 0, capsys.readouterr().err

    verb(reparam, adapted, "--out", merged)
    verb(export, merged, "--format", "onnx", "--out", tmp_path / "x.onnx")
    verb(export, merged, "--format", "torch-export", "--out", tmp_path / "x.pt2")
    top, accuracy = {}, {}
    for model in (adapted, merged, tmp_path / "x.onnx", tmp_path / "x.pt2"):
        out = tmp_path / f"{model.name}.jsonl"
        verb(predict, model, "--list", tmp_path / "list.txt", "--root", tmp_path, "--out", out)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        rows = [row for row in rows if "topk" in row]
        top[model.name] = [[entry["index"] for entry in row["topk"]] for row in rows]
        out = tmp_path / f"{model.name}.json"
        verb(evaluate, model, "--list", tmp_path / "list.txt", "--root", tmp_path, "--out", out)
        accuracy[model.name] = json.loads(out.read_text())["top1"]
    with capsys.disabled():
        print(f"{len(top)} artefacts on {DEVICE}, top-1 {accuracy['merged']:.0f} %")
    assert len(top["adapted"]) == 4
    assert all(rows == top["adapted"] for rows in top.values()), top
    assert len(set(accuracy.values())) == 1
    assert load(merged).config.adapter is None


def test_flash_attention_agrees():
    from zeroi2v_kernels.stdha import stdha, stdha_reference
    from zeroi2v_kernels.stdha_flash import flash_attention

    if not HAS_GPU:
        pytest.skip("backend flash needs CUDA")
    try:
        flash_attention(torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))
    offsets = (-1, 1) + (0,) * 10
    for tokens in (50, 197, 257):
        qkv = torch.randn(2, 8, tokens, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
        qkv.requires_grad_()
        out = stdha(qkv, offsets, backend="flash")
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        wide = qkv.detach().double().requires_grad_()
        expected = stdha_reference(wide, offsets)
        (truth,) = torch.autograd.grad(expected, wide, torch.ones_like(expected))
        errors = apart(out, expected), apart(gradient, truth)
        print(f"N={tokens}: out {errors[0]:.1e}, gradient {errors[1]:.1e}")
        assert max(errors) < 0.02
