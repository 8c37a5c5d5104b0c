"""What the host leaves out of a call: layers around operators (PyTorch) and kernels (Triton)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="needs triton")
from zeroi2v_kernels.device import operator
from zeroi2v_kernels.launch import Launcher

RUNS = []


@operator("zeroi2v_tests::double")
def double(x: torch.Tensor, times: int) -> torch.Tensor:
    """2 `times` x, in an operator."""
    RUNS.append(torch.compiler.is_compiling())
    return x * (2 * times)


@double.op.register_fake
def _(x, times):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.times = inputs[1]


double.op.register_autograd(lambda ctx, grad: (double(grad, ctx.times), None), setup_context=_save)


def asked_of_pytorch(x: torch.Tensor) -> bool:
    """Whether a call goes through PyTorch's dispatcher, as a profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = double(x, 3)
    assert out.shape == x.shape
    return any(event.name == "zeroi2v_tests::double" for event in profile.events())


def test_an_operator_nobody_watches_is_called_at_once():
    x = torch.ones(3)
    assert asked_of_pytorch(x)
    for alone in (torch.no_grad, torch.inference_mode):
        with alone():
            assert not asked_of_pytorch(x)
            assert torch.equal(double(torch.nn.Parameter(x), 3), 6 * x)


def test_whoever_watches_an_operator_sees_it():
    x = torch.ones(3)
    grown = double(x.requires_grad_(), 3)
    grown.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 6.0))
    x = x.detach()
    with torch.no_grad():
        RUNS.clear()
        with FakeTensorMode() as mode:
            assert double(mode.from_tensor(x), 3).shape == (3,)
            assert double(torch.empty(5), 3).shape == (5,)
        assert not RUNS, "data that are not there were computed with"
        with FlopCounterMode(display=False):
            assert asked_of_pytorch(x)
        compiled = torch.compile(lambda x: double(x, 3) + 1, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), torch.full((3,), 7.0)) and RUNS[-1] is False
        program = torch.export.export(Doubled(), (x,))
        assert "zeroi2v_tests.double" in str(program.graph)
        RUNS.clear()
        assert torch.equal(
            torch.vmap(lambda row: double(row, 3))(torch.ones(2, 3)), 6 * x.expand(2, 3)
        )
        assert len(RUNS) == 2  # row by row, as PyTorch runs operators that know of no batch
    torch.library.opcheck(double.op, (x, 3))


class Doubled(torch.nn.Module):
    def forward(self, x):
        return double(x, 3)


class Kernel:
    """Stands in for a kernel: notes what it is launched with, compiled or not."""

    arg_names = ("x_ptr", "out_ptr", "num_rows", "C", "BLOCK")

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launches.append((grid, arguments))
            return Compiled(self.launches)

        return launch


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, values))


def test_a_launcher_compiles_once_and_keeps_the_order_of_arguments():
    kernel = Kernel()
    launcher = Launcher(kernel, dict(BLOCK=16, C=64), num_warps=4)
    for rows in (3, 5):
        launcher((rows,), out_ptr="out", num_rows=rows, x_ptr="x")
    first, second = kernel.launches
    constants = dict(C=64, BLOCK=16, num_warps=4)
    assert first == ((3,), dict(x_ptr="x", out_ptr="out", num_rows=3) | constants)
    assert second == ((5, 1, 1), ("x", "out", 5, 64, 16))
    with pytest.raises(KeyError, match="num_rows"):
        launcher((1,), x_ptr="x", out_ptr="out")
