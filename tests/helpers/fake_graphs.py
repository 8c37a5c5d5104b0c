"""CUDA graphs on a CPU: what runs while one is captured is noted, and a replay does it again.

As on a GPU, a replay reads and writes the memory of the capture, and nothing but that: weights that
have been replaced since, or an attribute that was changed, it does not know of.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from zeroi2v.model import graphs


class FakeGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    made: list[FakeGraph]
    """All that were captured since `fake_graphs`."""

    def __init__(self) -> None:
        self.noted: list[tuple] = []
        self.replays = 0
        self.of = self

    def pool(self) -> FakeGraph:
        """The graph whose memory it takes."""
        return self.of

    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, outputs in self.noted:
            for old, new in zip(outputs, tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """In place of `torch.cuda.graph`."""

    fails: str = ""
    """What a capture raises, if anything."""

    def __init__(self, graph: FakeGraph, pool, stream, capture_error_mode: str):
        super().__init__()
        self.graph = graph
        if pool is not None:
            graph.of = pool
        assert stream is not None and capture_error_mode == "thread_local"

    def __enter__(self):
        FakeGraph.made.append(self.graph)
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.fails:
            raise RuntimeError(self.fails)
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        read = tree_map(_as_it_lies, (args, kwargs))
        self.graph.noted.append((operation, *read, tree_leaves(output)))
        return output


def _as_it_lies(x):
    """A weight's memory and layout of now, which a parameter may exchange for others."""
    return x.detach() if isinstance(x, torch.nn.Parameter) else x


class Stream:
    """In place of `torch.cuda.Stream`; notes what it has waited for."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


def fake_graphs(monkeypatch) -> type[FakeGraph]:
    """From now on the CPU is a device that captures; returns the class of its graphs."""
    current = Stream()
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(FakeGraph, "made", [], raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": Capture,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: current,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return FakeGraph
