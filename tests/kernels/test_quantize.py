"""Rows in float8: Triton's kernel gives the numbers of the definition."""

import pytest
import torch
from triton_ops import DEVICE, DTYPES, poisoned
from zeroi2v_kernels import bounds, proof, quantize_triton
from zeroi2v_kernels.quantize_reference import quantize_rows_reference
from zeroi2v_kernels.quantize_triton import quantize_forward


def rows(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 100
    return (x * 2.0 ** torch.arange(shape[-2])[:, None]).to(dtype).to(DEVICE)


def wide(outputs):
    """For PyTorch compares no float8; zeros of either sign are one number."""
    return [x.float() for x in outputs]


@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (2, 3, 768), (7, 3072)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_the_numbers_of_the_definition(shape, dtype):
    x = rows(shape, dtype)
    with poisoned():
        found = quantize_forward(x)
    expected = quantize_rows_reference(x)
    for one, other in zip(wide(found), wide(expected), strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


def test_every_e4m3_number_and_the_middles_between_them_are_rounded_right():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([middles * (1 + sign * 2.0**-20) for sign in (-1, 1)])
    x = torch.cat([numbers, middles, near])
    x = torch.cat([x, -x, torch.zeros(-2 * len(x) % 16)]).to(DEVICE)[None]
    (values, scale), expected = quantize_forward(x), quantize_rows_reference(x)
    assert scale.item() == 1 and torch.equal(wide([values])[0], wide(expected)[0])
    assert torch.equal(values[0, : len(numbers)].float().cpu(), numbers)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_zeros_stay_and_bad_numbers_leave_a_nan():
    x = torch.zeros(4, 32, device=DEVICE)
    x[1, 3], x[2, 5], x[3] = torch.inf, torch.nan, 1.0
    values, scale = quantize_forward(x)
    assert torch.equal(values[[0]].float(), x[[0]]) and scale[0] > 0
    assert torch.equal(values[3].float() * scale[3], x[3])
    assert values[1:3].float().isnan().any(-1).all()


def test_strided_rows_and_none_are_read_right():
    x = rows((8, 32), torch.float32)
    for part in (x[::2], x[:, :16], x[:0]):
        found, expected = quantize_forward(part), quantize_rows_reference(part.clone())
        for one, other in zip(wide(found), wide(expected), strict=True):
            assert torch.equal(one, other)


def test_it_proves_itself_and_a_fault_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configuration = quantize_triton._configuration(torch.bfloat16, 48)
    assert proof.prove(configuration, torch.device(DEVICE), fresh=True).passed
    right = quantize_triton._run

    def whole(x, values, scale):  # one scale for all rows
        right(x, values, scale)
        values.copy_(values.float() * scale / scale.amax())
        scale.fill_(scale.amax())

    monkeypatch.setattr(quantize_triton, "_run", whole)
    assert not proof.prove(configuration, torch.device(DEVICE), fresh=True).passed


def test_bounds_hold_the_definition_and_are_tight():
    x = rows((5, 64), torch.float32)
    ratios = []
    for found, (truth, limit) in zip(quantize_rows_reference(x), bounds.quantized(x), strict=True):
        ratios.append(((found.double() - truth).abs() / limit).max().item())
    assert 0.9 < ratios[0] <= 1 and ratios[1] <= 1


def test_operator_is_sound():
    torch.library.opcheck(quantize_forward.op, (rows((3, 32), torch.float32),),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
