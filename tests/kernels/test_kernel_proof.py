"""Kernels prove themselves before they are used: what a proof finds, keeps, and does about it."""

import json
import logging
import os

import pytest
import torch
from triton_ops import DEVICE

pytest.importorskip("triton", reason="needs triton")
from zeroi2v_kernels import (
    activation,
    adapter_linear_triton,
    choice,
    norm,
    proof,
    shipped,
    stdha_launch,
    stdha_triton,
)
from zeroi2v_kernels.adapter_linear import Adapter, Dropout, adapt, adapt_grad
from zeroi2v_kernels.stdha import stdha

CPU = torch.device(DEVICE)
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def unproven(monkeypatch, tmp_path):
    """Nothing is proven yet, and the interpreter's kernels are to prove themselves too."""
    monkeypatch.setattr(proof, "INTERPRETED", True)
    monkeypatch.setattr(proof, "_VERDICTS", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)
    # a kernel that a test puts in another's place must not be remembered, nor the other one
    monkeypatch.setattr(stdha_launch, "_launches", stdha_launch._launches.__wrapped__)


class Miscompiled:
    """A kernel that does something else than its source says."""

    def __init__(self, kernel, fault: str):
        self.kernel, self.fault, self.runs = kernel, fault, 0

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.runs += 1
            if self.fault == "crash":
                raise RuntimeError("no registers left")
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            written = [x for x in tensors if x.isnan().any()]
            self.kernel[grid](*arguments, **options)
            for x in written:
                flat = x.view(-1)
                rows = slice(-min(16, flat.numel()), None)
                if self.fault == "tile":
                    flat[rows] = float("nan")
                elif self.fault == "address":
                    flat[rows] = flat[: min(16, flat.numel())].clone()
                elif self.fault == "luck" and self.runs % 2:  # in the last bit
                    flat[rows] = torch.nextafter(flat[rows], torch.zeros_like(flat[rows]))

        return launch


def rand(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def attention_forward():
    return [stdha(rand(1, 2, 20, 3, 2, 16, dtype=torch.float32), (1, 0))]


def attention_gradient():
    qkv = rand(1, 2, 20, 3, 2, 16, dtype=torch.float32).requires_grad_()
    out = stdha(qkv, (1, 0))
    return [out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))]


def adapter_forward():
    adapter = Adapter(rand(16, 32) / 6, rand(16), rand(32, 16) / 4, rand(32), 0.5)
    return list(adapt(rand(40, 32), adapter, Dropout(0.4, torch.tensor(3, device=DEVICE), 1)))


def adapter_gradient():
    adapter = Adapter(rand(16, 32) / 6, rand(16), rand(32, 16) / 4, rand(32), 0.5)
    drop = Dropout(0.4, torch.tensor(3, device=DEVICE), 1)
    *grads, sums = adapt_grad(rand(40, 32), adapter, drop)
    return [*grads, *sums]


def dropout():
    seed = torch.tensor(3, device=DEVICE)
    return list(adapter_linear_triton.dropout(rand(40, 48), 2**15, seed, 0))


def activation_forward():
    return [activation.activation_forward(rand(9, 64), rand(64), "quick_gelu")]


def activation_gradient():
    return [activation.activation_backward(rand(9, 64), rand(9, 64), rand(64), "gelu")]


def norm_inputs():
    return rand(9, 48), rand(9, 48, dtype=torch.float32), rand(48, dtype=torch.float32)


def norm_forward():
    x, residual, weight = norm_inputs()
    return list(norm.norm_forward(x, residual, weight, weight + 1, 1e-5, True, HALF))


def norm_gradient():
    grad, total, weight = norm_inputs()
    variance, mean = torch.var_mean(total, -1, correction=0)
    rstd = (variance + 1e-5).rsqrt()
    return list(norm.norm_backward(grad, total, total, mean, rstd, weight, True, True))


OPERATORS = {  # what is computed, the kernel that does, and where it is looked up
    "attention": (attention_forward, stdha_triton, "_forward_streamed_kernel"),
    "attention's gradient": (attention_gradient, stdha_triton, "_backward_key_value_kernel"),
    "adapter": (adapter_forward, adapter_linear_triton, "_up_kernel"),
    "adapter's gradient": (adapter_gradient, adapter_linear_triton, "_up_kernel"),
    "dropout": (dropout, adapter_linear_triton, "_dropout_kernel"),
    "activation": (activation_forward, activation, "_activation_fwd_kernel"),
    "activation's gradient": (activation_gradient, activation, "_activation_bwd_kernel"),
    "norm": (norm_forward, norm, "_norm_fwd_kernel"),
    "norm's gradient": (norm_gradient, norm, "_norm_bwd_kernel"),
}


@pytest.fixture
def by_itself(monkeypatch):
    """Attention on the CPU chooses Triton by itself, as on a GPU."""
    monkeypatch.setattr(choice, "choose_backend", lambda x: "triton")


@pytest.mark.parametrize(
    "name, fault",
    [
        *((name, "address") for name in OPERATORS),
        *((name, ("tile", "luck", "crash")[i % 3]) for i, name in enumerate(OPERATORS)),
    ],
)
def test_a_miscompiled_kernel_gives_way_to_pytorch_with_one_warning(
    name, fault, monkeypatch, caplog, by_itself
):
    compute, home, kernel = OPERATORS[name]
    expected = compute()
    assert not caplog.records and proof._VERDICTS
    assert all(verdict.passed for verdict in proof._VERDICTS.values())

    faulty = Miscompiled(getattr(home, kernel), fault)
    monkeypatch.setattr(home, kernel, faulty)
    monkeypatch.setattr(proof, "_VERDICTS", {})
    monkeypatch.setattr(proof, "_sources", lambda: "the same sources, compiled wrongly")
    with caplog.at_level(logging.WARNING):
        got = compute()
        runs = faulty.runs
        again = compute()
    assert len(caplog.records) == 1 and "PyTorch computes in its place" in caplog.text
    assert 0 < runs == faulty.runs  # it is tried, and then never used
    for one, other, want in zip(got, again, expected, strict=True):
        assert torch.equal(one, other) and one.dtype == want.dtype and one.shape == want.shape
        size = 1e-5 if want.dtype == torch.float32 else 0.02
        assert (one - want).abs().max() <= size * (1 + want.abs().max())


@pytest.mark.parametrize("compute", ["forward", "gradient"])
def test_a_miscompiled_kernel_asked_for_by_name_is_an_error(compute, monkeypatch):
    qkv = rand(1, 2, 20, 3, 2, 16, dtype=torch.float32).requires_grad_()
    kernel = {"forward": "_forward_streamed_kernel", "gradient": "_backward_query_kernel"}[compute]
    monkeypatch.setattr(stdha_triton, kernel, Miscompiled(getattr(stdha_triton, kernel), "tile"))
    rule = "backend 'triton' was asked for, but its kernel is wrong on this device: stdha .*: error"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rule):
            stdha(qkv, (1, 0), backend="triton").sum().backward()


def limits_exceeded(configuration: proof.Configuration, change) -> tuple[float, float]:
    """How many times the limit the worst error is, before and after `change` of the outputs."""
    trial = configuration.trial(torch.Generator(DEVICE).manual_seed(0))
    outputs = [torch.full_like(x, float("nan")) for x in trial.outputs]
    trial.run(*outputs)
    right = wrong = 0.0
    for x, (truth, limit) in zip(outputs, trial.truths, strict=True):
        right = max(right, ((x.double() - truth).abs() / limit).max().item())
        change(x)
        wrong = max(wrong, ((x.double() - truth).abs() / limit).max().item())
    return right, wrong


def small_configurations():
    device = CPU
    for direction in ("forward", "backward"):
        for tokens in ((33, 33), (1, 17)):
            for dtype in (torch.float32, HALF, torch.float16):
                yield stdha_launch.configuration(direction, device, dtype, *tokens, 64, (-1, 1, 0))
    for dtype in (HALF, torch.float16):
        for residual in (None, torch.float32):
            yield adapter_linear_triton._up_trial(device, dtype, 80, 48, False, residual)
        yield adapter_linear_triton._up_trial(device, dtype, 80, 48, True, None)
    for dtype in (torch.float32, HALF, torch.float16):
        yield adapter_linear_triton._dropout_trial(dtype, 48, 6554, 0)
        for kernel in (activation._activation_fwd_kernel, activation._activation_bwd_kernel):
            for kind in activation.KINDS:
                yield activation._configuration(kernel, dtype, dtype, 200, kind)
        for columns in (48, 768):
            for centres in (True, False):
                wide = (torch.float32,) * 3
                yield norm._forward_trial(dtype, *wide, centres, dtype, columns)
                rest = (centres, False, columns)
                yield norm._backward_trial(dtype, None, dtype, torch.float32, *rest)
    wide = (torch.float32,) * 3
    yield norm._backward_trial(HALF, *wide, True, True, 48)
    yield norm._backward_trial(HALF, *wide, False, True, 48)


def swapped(x: torch.Tensor) -> None:
    """The last 8 elements take the place of the first."""
    x.view(-1)[:8] = x.view(-1)[-8:].clone()


def test_limits_hold_for_right_kernels_and_are_far_below_a_wrong_address():
    seen = []
    for configuration in small_configurations():
        right, wrong = limits_exceeded(configuration, swapped)
        seen.append((configuration.name, round(right, 3), round(wrong, 1)))
        assert right <= 1, seen[-1]
        assert wrong > 20, seen[-1]
    assert len({name for name, *_ in seen}) == len(seen) > 30


def verdicts(**changes) -> list[proof.Verdict]:
    configuration = stdha_launch.configuration(
        "forward", CPU, torch.float32, 17, 17, 16, changes.pop("offsets", (1, 0))
    )
    return [proof.prove(configuration, CPU, **changes)]


def test_a_verdict_is_kept_for_sources_compiler_device_and_configuration(monkeypatch, tmp_path):
    assert [v.cached for v in verdicts() + verdicts()] == [False, True]
    assert not verdicts(fresh=True)[0].cached
    assert not verdicts(offsets=(0, 1))[0].cached  # another configuration
    monkeypatch.setattr(proof, "_sources", lambda: "others")
    assert not verdicts()[0].cached
    monkeypatch.setattr(proof, "_platform", lambda device: ("another compiler",))
    assert not verdicts()[0].cached
    files = list((tmp_path / "zeroi2v/proofs").iterdir())
    assert len(files) == 4 and all(json.loads(f.read_text()) == {"message": ""} for f in files)
    for file in files:
        file.write_text("{")
    assert not verdicts()[0].cached  # a damaged file is as good as none
    assert verdicts()[0].cached


def test_a_failed_proof_is_kept_too_but_not_that_a_kernel_could_not_be_run(monkeypatch):
    for fault, kept in (("tile", True), ("crash", False)):
        kernel = Miscompiled(stdha_triton._forward_streamed_kernel, fault)
        with monkeypatch.context() as patch:
            patch.setattr(proof, "_sources", lambda fault=fault: fault)
            patch.setattr(stdha_triton, "_forward_streamed_kernel", kernel)
            first, second = verdicts() + verdicts()
        assert not first.passed and not second.passed and second.cached == kept
        assert first.message == second.message != ""


def test_without_a_place_for_the_cache_kernels_are_proven_each_time(monkeypatch, tmp_path):
    (tmp_path / "zeroi2v").write_text("a file where the folder should be")
    assert [(v.passed, v.cached) for v in verdicts() + verdicts()] == [(True, False)] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="of Triton's interpreter")
def test_the_interpreter_proves_nothing_unless_asked(monkeypatch):
    monkeypatch.setattr(proof, "INTERPRETED", False)
    stdha(rand(1, 2, 20, 3, 2, 16, dtype=torch.float32), (1, 0), backend="triton")
    assert not proof._VERDICTS


def test_a_proof_leaves_the_users_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert verdicts()[0].passed
    assert torch.equal(torch.rand(3), expected)


def test_nothing_is_proven_while_a_graph_is_captured(monkeypatch):
    configuration = stdha_launch.configuration("forward", CPU, torch.float32, 17, 17, 16, (1, 0))
    monkeypatch.setattr(proof, "_platform", lambda device: ("a GPU",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="which cannot be while a CUDA graph is captured: run"):
        proof.prove(configuration, torch.device("cuda"))


def test_what_is_proven_on_a_device_covers_every_kernel():
    names = " ".join(configuration.name for configuration in shipped.configurations(CPU))
    for part in ("forward_resident", "forward_streamed", "backward_fused", "backward_query+"
                 "backward_key_value", "adapter forward", "adapter backward", "adapter dropout",
                 "quick_gelu backward", "gelu forward", "layer norm forward",
                 "layer norm backward", "quantize rows", "D=128", "N=577", "M=1 N=50",
                 "H=16"):  # fmt: skip
        assert part in names, part


def test_proofs_are_shared_by_processes_in_order():
    wanted = shipped.configurations(CPU)
    for number, configuration in enumerate(wanted):  # kept already, for they take minutes
        proof._write(proof._path(configuration, CPU), "wrong" * (number == 5))
    verdicts = list(shipped.prove_shipped(CPU, processes=2))
    assert [verdict.name for verdict in verdicts] == [c.name for c in wanted]
    assert [i for i, verdict in enumerate(verdicts) if not verdict.passed] == [5]


@pytest.mark.skipif(
    not os.environ.get("ZEROI2V_PROVE_ALL"), reason="minutes long: set ZEROI2V_PROVE_ALL"
)
def test_all_that_is_shipped_passes():
    for verdict in shipped.prove_shipped(CPU, fresh=True):
        assert verdict.passed, verdict
