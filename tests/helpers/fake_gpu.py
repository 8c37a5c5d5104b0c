"""A GPU that is not there: tensors without data that know their device.

An operation on tensors of two devices raises on them as on a real GPU, so they show what was left
on the CPU. Who asks for a number is told `number`.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

_TO, _CONTIGUOUS = Tensor.to, torch.contiguous_format


@contextmanager
def fake_gpu(monkeypatch, number: float = 0.0):
    """Tensors made inside have no data, and `cuda` is a device they may be on."""
    with monkeypatch.context() as patch, FakeTensorMode():
        patch.setattr(Tensor, "uniform_", lambda self, *_, **__: self)  # asks PyTorch's CUDA build
        patch.setattr(Tensor, "copy_", lambda self, *_, **__: self)  # likewise; devices may differ
        patch.setattr(Tensor, "item", lambda self: number)
        patch.setattr(Tensor, "__bool__", lambda self: True)
        patch.setattr(Tensor, "to", _to)
        patch.setattr(Tensor, "contiguous", lambda self: self.clone(memory_format=_CONTIGUOUS))
        patch.setattr(Tensor, "__getitem__", _get)
        patch.setattr(Tensor, "__setitem__", lambda self, at, value: None)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(FakeTensorMode, "avoid_device_init", True)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
        yield


def _to(self: Tensor, *args, **kwargs) -> Tensor:
    """Names the GPU by its number: which one is current, a build without CUDA can't tell."""
    args = tuple("cuda:0" if str(arg) == "cuda" else arg for arg in args)
    kwargs = {key: "cuda:0" if str(arg) == "cuda" else arg for key, arg in kwargs.items()}
    return _TO(self, *args, **kwargs)


def _get(self: Tensor, at) -> Tensor:
    """Indexing by steps, none of which asks which GPU is current."""
    at = at if isinstance(at, tuple) else (at,)
    if ... in at:
        i = at.index(...)
        at = at[:i] + (slice(None),) * (self.ndim - len(at) + 1) + at[i + 1 :]
    dim = 0
    for place in at:
        if isinstance(place, int):
            self = self.select(dim, place)
            continue
        if isinstance(place, slice):
            start, stop, step = place.indices(self.shape[dim])
            self = torch.ops.aten.slice(self, dim, start, stop, step)
        elif place is None:
            self = self.unsqueeze(dim)
        else:
            self = self.index_select(dim, torch.as_tensor(place, device=self.device))
        dim += 1
    return self


def _apply(self: nn.Module, function, recurse: bool = True) -> nn.Module:
    """PyTorch's own puts data into the parameters there are, which these can't take."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
    return self
