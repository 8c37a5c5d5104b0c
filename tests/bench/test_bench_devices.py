"""Benches leave nothing on the CPU when they run on a GPU, shown on one that is not there.

What is left to a real one: gradients, and with them attention's bench; dropout's mask.
"""

import dataclasses

import pytest
import torch
from fake_gpu import fake_gpu
from models import small_config

from bench import (
    bench_rivals,
    bench_scaling,
    bench_stdha,
    bench_zero_cost,
    cases,
    measure,
)
from bench.baselines.image_models import IMAGE_MODELS
from zeroi2v import VideoViT, merge
from zeroi2v.reparam import seeded_clips

BENCHES = {
    "zero_cost": bench_zero_cost.bench_zero_cost,
    "throughput": bench_zero_cost.bench_zero_cost_throughput,
    "rivals": bench_rivals.bench_rivals,
    "scaling": bench_scaling.bench_scaling,
}
ARGUMENTS = {
    "throughput": dict(batch=4),
    "scaling": dict(frames=4),
}


@pytest.mark.parametrize(
    "name, dtype", [*((name, "bfloat16") for name in BENCHES), ("throughput", "float16")]
)
def test_bench_has_all_of_its_tensors_on_the_gpu(name, dtype, monkeypatch):
    ran = []

    def compare(contestants, baseline, check=None, **facts):
        assert baseline in contestants
        for contestant, run in contestants.items():
            output = run()
            tensors = output if isinstance(output, list) else [output]
            assert {tensor.device.type for tensor in tensors} == {"cuda"}, contestant
            if check is not None:
                check(contestant, output)
            ran.append(contestant)

    given = dict(ARGUMENTS.get(name, {}), compare=compare, device="cuda")
    if name not in ("throughput", "rivals"):
        given["timed"] = False
    if name != "scaling":
        given["dtype"] = dtype
    if name == "zero_cost":
        given["monkeypatch"] = monkeypatch
    monkeypatch.setattr(bench_zero_cost, "need_memory", lambda wanted, device: None)
    with fake_gpu(monkeypatch):
        if name in ("zero_cost", "throughput", "rivals"):
            given["case"] = cases.build("B/16", 8, timed=False, device="cuda")
        BENCHES[name](**given)
    assert len(ran) >= 3


@pytest.mark.parametrize("timed", [False, True])
def test_flex_attention_is_compiled_only_to_be_timed(timed, monkeypatch):
    """It takes many seconds a case, and there are 42."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function))
    monkeypatch.setattr(bench_stdha, "block_mask", lambda *_: None)
    with fake_gpu(monkeypatch):
        qkv = torch.empty(1, 2, 5, 3, 2, 16, dtype=torch.bfloat16, device="cuda:0")
        monkeypatch.setattr(bench_stdha, "flash_attention", lambda device: None)
        for backward in (False, True):
            functions, absent = bench_stdha.line_up(qkv, (1, 0), backward, timed)
            assert ("FlexAttention" in functions) == (timed or not backward)
            assert ("FlexAttention" in absent) != ("FlexAttention" in functions)
    assert len(compiled) == (2 if timed else 0)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_model_has_parameters_and_buffers_where_the_weights_are(name, monkeypatch):
    config = small_config("vit_b16_k400_8x16", adapter=None)
    with fake_gpu(monkeypatch):
        with torch.device("cuda"):
            image = VideoViT(config)
        theirs = IMAGE_MODELS[name](image)
        held = [*theirs.named_parameters(), *theirs.named_buffers()]
        assert {tensor.device.type for _, tensor in held} == {"cuda"}


@torch.no_grad()
def test_memory_of_a_forward_is_foreseen():
    case = cases.build("B/16", 8, timed=False, device="cpu")
    size = dict(width=192, image_size=64, head_offsets=(1, -1, 0), num_heads=3)
    adapted = cases.adapted_model(dataclasses.replace(case.adapted.config, **size), "cpu")
    models = (adapted, merge(adapted), merge(adapted))
    video = seeded_clips(adapted, count=4)
    _, contestants, _ = bench_zero_cost.line_up(*models, video)
    wanted = bench_zero_cost.forward_bytes(models[1].config, 4, torch.float32)
    peaks = {n: measure.run_counting_memory(run, "cpu")[1] for n, run in contestants.items()}
    largest = max(peaks["transformers CLIP"], peaks["merged"], peaks["plain image ViT"])
    assert 0.8 * wanted < largest <= wanted, (wanted, peaks)


def test_a_gpu_without_the_memory_skips_the_bench_and_says_both_figures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(2e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(1.5e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(1e9))
    bench_zero_cost.need_memory(int(2.5e9), "cuda")
    with pytest.raises(pytest.skip.Exception, match="about 2.6 GB of GPU memory: 2.5 free"):
        bench_zero_cost.need_memory(int(2.6e9), "cuda")
