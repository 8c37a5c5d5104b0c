"""A model's inference as CUDA graphs: the host launches one graph instead of each operation.

A pass through a ViT is some hundred kernels. For a few clips the GPU is done with each before the
host has launched the next, so that a pass takes as long as the host needs. A graph is captured once
and launched whole. For large batches, where the GPU is the slower one, it gains nothing and costs
nothing but that the memory of a pass stays taken.

A graph repeats what was launched while it was captured. It reads the weights where they lie, so
changes in place are seen; whatever else a pass depends on is compared during each replay, whose
result goes nowhere if something has changed.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

DEVICE = "cuda"
"""The type of device that captures."""
KEPT = 4
"""Graphs of a model, of as many shapes; the one not used for longest goes."""

log = logging.getLogger(__name__)
# A process captures one at a time, and graphs that share memory take turns.
_LOCK = threading.RLock()
_PLAIN = {Tensor, nn.Parameter}
Compute = Callable[[Tensor], Tensor]


class Graphs:
    """The CUDA graphs of one model, by shape, dtype and device of its input.

    What comes for the first time runs op by op, and is captured when it comes again. All graphs
    take their memory from one pool. Copies and pickles are empty, and capture on their own.
    """

    def __init__(self) -> None:
        self._state: list[Any] = []
        """That of the model which the graphs are of."""
        self._weights: list[Tensor] = []
        self._pointers: list[int] = []
        """Where these were when the graphs were captured, which read them there."""
        self._held = False
        """Whether the state was still that when it was last compared."""
        self._graphs: dict[tuple, Graph | None] = {}
        """The last one used is last; None where a capture has failed."""
        self._seen: deque[tuple] = deque(maxlen=KEPT)
        """What came once."""
        self._stream: torch.cuda.Stream | None = None
        """Where the last graph was launched."""

    def __reduce__(self):
        return Graphs, ()

    def __call__(
        self, model: nn.Module, compute: Compute, video: Tensor, recurs: bool = False
    ) -> Tensor:
        """`compute(video)`, by a graph where that gives the same.

        Args:
            model: all that `compute` depends on, beside its input.
            compute: a forward pass that launches the same operations for every input of a shape.
            video: its input.
            recurs: whether more of its shape will come, so that it is captured at once.
        Returns:
            Memory of the caller's own, which later calls leave alone.
        """
        if not can_replay(model, video):
            return compute(video)
        key = (video.shape, video.dtype, video.device)
        with _LOCK:
            output = self._run_ahead(key, video)
            state = state_of(model)  # compared while the GPU is at work
            self._held = state == self._state
            if self._held and output is not None:
                return output
            if state is not None:
                if not self._held:
                    self._begin(model, state)
                graph = self._find(compute, key, recurs)
                if graph is not None:
                    return self._launch(graph, video)
        return compute(video)

    def _begin(self, model: nn.Module, state: list[Any]) -> None:
        """Forgets the graphs of another state."""
        self._state, self._weights = state, [*model.parameters(), *model.buffers()]
        self._pointers = [weight.data_ptr() for weight in self._weights]
        self._graphs.clear()
        self._seen.clear()

    def _run_ahead(self, key: tuple, video: Tensor) -> Tensor | None:
        """The result of a graph that does no harm, as its weights are still there.

        Whether it is the right one, the state of the model must tell.
        """
        graph = self._graphs.get(key)
        if (
            graph is None
            or not self._held
            or [w.data_ptr() for w in self._weights] != self._pointers
        ):
            return None
        self._graphs[key] = self._graphs.pop(key)
        return self._launch(graph, video)

    def _find(self, compute: Compute, key: tuple, recurs: bool) -> Graph | None:
        """The graph of that key, captured if it is due."""
        if key in self._graphs:
            graph = self._graphs.pop(key)
        elif recurs or key in self._seen:
            graph = self._capture(compute, key)
        else:
            self._seen.append(key)
            return None
        self._graphs[key] = graph
        return graph

    def _capture(self, compute: Compute, key: tuple) -> Graph | None:
        if len(self._graphs) >= KEPT:
            del self._graphs[next(iter(self._graphs))]
        alive = next((graph for graph in self._graphs.values() if graph is not None), None)
        try:
            return capture(compute, *key, beside=alive)
        except RuntimeError as error:  # out of memory, or an operation that can't be captured
            cause = error.__context__ or error  # ending the capture fails too, and says less
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            said = "a batch %s of %s runs op by op, not as a CUDA graph: %s"
            log.warning(said, list(key[0]), key[1], reason)
            return None

    def _launch(self, graph: Graph, video: Tensor) -> Tensor:
        """Graphs share memory, so each waits for the one before, on whatever stream that was."""
        stream = torch.cuda.current_stream(video.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
        graph.input.record_stream(stream)
        graph.input.copy_(video)
        graph.graph.replay()
        return graph.output.clone()


class Graph(NamedTuple):
    """A captured pass; a replay reads `input` and writes `output`."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    """Where it was captured."""
    input: Tensor
    output: Tensor


def capture(
    compute: Compute,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    beside: Graph | None = None,
) -> Graph:
    """Captures `compute` on zeros of that shape, after a run: kernels prove themselves in it.

    It takes its memory from the pool of `beside`. Other threads may go on with their work on the
    device, but must not synchronise it. Raises RuntimeError if it can't be captured.
    """
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        stream = torch.cuda.Stream() if beside is None else beside.stream
        stream.wait_stream(torch.cuda.current_stream())
        graph, pool = torch.cuda.CUDAGraph(), None if beside is None else beside.graph.pool()
        with torch.cuda.stream(stream):  # left again whatever happens, unlike that of a capture
            compute(zeros)
            gc.collect()  # what waits for it may call CUDA when it goes, which ends a capture
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                output = compute(zeros)
    return Graph(graph, stream, zeros, output)


def can_replay(model: nn.Module, video: Tensor) -> bool:
    """Whether nothing but the numbers of `model(video)` is wanted, so that a graph may give them.

    Not for gradients of either direction, dropout, autocast, or who follows the operations: a
    tracer, compiler or capture.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(video) is not Tensor or video.device.type != DEVICE or model.training:
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch.cuda.is_current_stream_capturing()
    if watched or torch.is_autocast_enabled(DEVICE) or unpack_dual(video).tangent is not None:
        return False
    if not torch.is_grad_enabled():
        return True
    return not (video.requires_grad or any(p.requires_grad for p in model.parameters()))


def state_of(model: nn.Module) -> list[Any] | None:
    """All that a forward pass of `model` depends on beside its input and the values of its weights.

    That is where the weights lie and in which layout, the modules with their attributes (an
    attention's backend), and how exact float32 is. Other global settings of PyTorch are not in it.
    None if the pass can't be in a graph: a part is in training mode, has hooks, or weights that are
    no plain tensors. It is compared at each replay, so it must be quick.
    """
    modules = [model]
    for module in modules:
        modules += [part for part in module._modules.values() if part is not None]
    parts = [vars(module) for module in modules]
    if any(p["training"] or p["_forward_hooks"] or p["_forward_pre_hooks"] for p in parts):
        return None
    tensors = [x for p in parts for k in ("_parameters", "_buffers") for x in p[k].values()]
    weights = [weight for weight in tensors if weight is not None]
    if not _PLAIN.issuperset(map(type, weights)):
        return None
    state = [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
    for fact in (Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype")):
        state += map(fact, weights)
    state += modules[1:]  # the model itself holds what holds this
    for part in parts[1:]:
        state += part.values()
    return state
