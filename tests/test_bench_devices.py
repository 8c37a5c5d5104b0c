"""Benches leave nothing on the CPU when they run on a GPU, shown on one that is not there.

What is left to a real one: gradients, and with them attention's bench; dropout's mask.
"""

import pytest
import torch
from fake_gpu import fake_gpu
from models import small_config

from bench import (
    bench_adapter_linear,
    bench_rivals,
    bench_scaling,
    bench_zero_cost,
    cases,
)
from bench.baselines.image_models import IMAGE_MODELS
from zeroi2v import VideoViT

BENCHES = {
    "zero_cost": bench_zero_cost.bench_zero_cost,
    "throughput": bench_zero_cost.bench_zero_cost_throughput,
    "rivals": bench_rivals.bench_rivals,
    "scaling": bench_scaling.bench_scaling,
    "adapter_linear": bench_adapter_linear.bench_adapter_linear,
}
ARGUMENTS = {
    "throughput": dict(batch=4),
    "scaling": dict(frames=4),
    "adapter_linear": dict(model="L/14", place="after proj", dropout=0.0),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BENCHES)
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
    if name == "adapter_linear":
        given["direction"] = "forward"
    with fake_gpu(monkeypatch):
        if name in ("zero_cost", "throughput", "rivals"):
            given["case"] = cases.build("B/16", 8, timed=False, device="cuda")
        BENCHES[name](**given)
    assert len(ran) >= 3


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_model_has_parameters_and_buffers_where_the_weights_are(name, monkeypatch):
    config = small_config("vit_b16_k400_8x16", adapter=None)
    with fake_gpu(monkeypatch):
        with torch.device("cuda"):
            image = VideoViT(config)
        theirs = IMAGE_MODELS[name](image)
        held = [*theirs.named_parameters(), *theirs.named_buffers()]
        assert {tensor.device.type for _, tensor in held} == {"cuda"}
