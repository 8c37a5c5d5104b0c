"""Accelerated models: a graph is replayed where it gives what the model gives, and nowhere else."""

import copy
import io
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_graphs import Capture, Stream, fake_graphs
from models import build, small_config
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from videos import write_numbered

from zeroi2v import cli, evaluate, inference
from zeroi2v.data.annotations import Sample
from zeroi2v.data.views import ViewLoader
from zeroi2v.model import graphs
from zeroi2v.model.attention import set_backend
from zeroi2v.model.vit import VideoViT


@pytest.fixture
def made(monkeypatch) -> list:
    """The graphs that are captured, on a CPU that does so."""
    return fake_graphs(monkeypatch).made


@pytest.fixture
def model() -> VideoViT:
    return build(small_config(num_frames=4))


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 4, 32, 32, generator=generator)


def plain(model: VideoViT, video: torch.Tensor) -> torch.Tensor:
    """What the model gives op by op."""
    with torch.no_grad():
        return model._logits(video)


@torch.no_grad()
def test_what_comes_again_is_captured_once_and_replayed_into_memory_of_the_callers(model, made):
    assert model.accelerate() is model
    videos = [clips(seed=i) for i in range(4)]
    results = [model(videos[0])]
    assert not made
    results += [model(video) for video in videos[1:]]
    assert len(made) == 1 and made[0].replays == 3
    for video, result in zip(videos, results, strict=True):
        assert torch.equal(result, plain(model, video))
    strided = clips().transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(model(strided), plain(model, clips())) and made[0].replays == 4


def test_a_number_of_clips_that_is_announced_is_captured_at_once(model, made):
    model.accelerate(1, 3)
    assert len(made) == 2 and made[1].pool() is made[0]  # one memory
    with torch.inference_mode():
        for count in (1, 3):
            assert torch.equal(model(clips(count)), plain(model, clips(count)))
    assert len(made) == 2


def test_in_training_mode_nothing_is_run_ahead(model, made, monkeypatch):
    monkeypatch.setattr(model, "_logits", lambda video: pytest.fail("run"))
    model.train().accelerate(1)


def test_inference_mode_may_come_and_go(model, made):
    with torch.inference_mode():
        model.accelerate(2)
    for mode in (torch.inference_mode, torch.no_grad) * 3:
        with mode():
            assert torch.equal(model(clips()), plain(model, clips()))
    assert len(made) == 1 and made[0].replays == 7


@torch.no_grad()
def test_the_shape_that_was_not_used_for_longest_goes(model, made):
    model.accelerate(*range(1, graphs.KEPT + 1))
    assert len(made) == graphs.KEPT
    model(clips(1))
    model.accelerate(graphs.KEPT + 1)
    model(clips(1))
    assert len(made) == graphs.KEPT + 1
    for _ in range(2):  # the second was the oldest
        assert torch.equal(model(clips(2)), plain(model, clips(2)))
    assert len(made) == graphs.KEPT + 2


def replace_a_parameter(model):
    model.head.weight = nn.Parameter(torch.ones_like(model.head.weight))


def replace_data(model):
    model.transformer.resblocks[1].mlp.c_fc.weight.data = torch.ones_like(
        model.transformer.resblocks[1].mlp.c_fc.weight
    )


def assign(model):
    model.load_state_dict(build(model.config, seed=1).state_dict(), assign=True)


def replace_a_module(model):
    with torch.no_grad():
        head = nn.Linear(model.config.width, 3).eval()
    model.head = head


def add_a_module(model):
    model.ln_post = nn.Sequential(model.ln_post, nn.Tanh()).eval()


class Halved(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) / 2


def replace_a_class(model):
    """A module of the same parameters, the very same ones, and attributes."""
    norm = copy.copy(model.ln_post)
    norm.__class__ = Halved
    model.ln_post = norm


def transpose(model):
    """The same memory, read in another order."""
    weight = model.transformer.resblocks[0].attn.out_proj.weight
    weight.data = weight.data.t()


def narrow(model):
    """The same memory, less of it."""
    model.head.weight.data, model.head.bias.data = model.head.weight[:5], model.head.bias[:5]


def reinterpret(model):
    """The same memory, as numbers of another kind."""
    cls = model.class_embedding
    cls.fill_(1)
    cls.data = cls.data.view(torch.bfloat16)[: len(cls)]


def look_elsewhere(model):
    for block in model.transformer.resblocks:
        block.attn.head_offsets = block.attn.head_offsets[::-1]


CHANGES = {
    "parameter": replace_a_parameter,
    "data": replace_data,
    "state dict, assigned": assign,
    "bfloat16": lambda model: model.bfloat16(),
    "layout": lambda model: model.to(memory_format=torch.channels_last),
    "module": replace_a_module,
    "more modules": add_a_module,
    "class": replace_a_class,
    "transposed": transpose,
    "narrowed": narrow,
    "reinterpreted": reinterpret,
    "offsets": look_elsewhere,
    "backend": lambda model: set_backend(model, "reference"),
    "frozen": lambda model: model.freeze(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_model_is_captured_anew(model, made, change):
    model.accelerate(2)
    before = model(clips())
    CHANGES[change](model)
    for _ in range(3):
        result = model(clips())
        assert torch.equal(result, plain(model, clips()))
    assert len(made) == 2 and made[1].pool() is made[1] and made[1].replays == 2
    if change not in ("layout", "frozen", "backend"):
        assert result.shape != before.shape or not torch.allclose(result.float(), before, atol=1e-3)


@torch.no_grad()
def test_a_replay_runs_ahead_only_of_a_state_that_held_and_of_weights_that_lie_there(model, made):
    """The state is compared while the GPU is at work; then a result may turn out to be wrong."""
    model.accelerate(2)
    for _ in range(2):
        model(clips())
    (graph,) = made
    replays = graph.replays
    hook = model.head.register_forward_hook(lambda *_: None)
    for _ in range(3):  # the first replay is in vain, and teaches better
        assert torch.equal(model(clips()), plain(model, clips()))
    assert graph.replays == replays + 1
    hook.remove()
    for _ in range(2):
        assert torch.equal(model(clips()), plain(model, clips()))
    assert made == [graph] and graph.replays == replays + 3
    model.head.weight.data = model.head.weight.clone()  # its old memory may be gone
    assert torch.equal(model(clips()), plain(model, clips()))
    assert graph.replays == replays + 3


@torch.no_grad()
def test_weights_that_change_in_place_are_seen_by_the_graph(model, made):
    model.accelerate(2)
    before = model(clips())
    model.load_state_dict(build(model.config, seed=1).state_dict())
    assert torch.equal(model(clips()), plain(model, clips()))
    assert not torch.allclose(model(clips()), before)
    model.train().eval()
    model(clips())
    assert len(made) == 1


@torch.no_grad()
def test_weights_that_are_replaced_before_every_pass_are_not_worth_a_graph(model, made):
    model.accelerate()
    for _ in range(4):
        replace_a_parameter(model)
        assert torch.equal(model(clips()), plain(model, clips()))
    assert not made


@torch.no_grad()
def test_how_exact_float32_is_belongs_to_the_state(model, made):
    model.accelerate(2)
    exact = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        model(clips())
        model(clips())
    finally:
        torch.set_float32_matmul_precision(exact)
    assert len(made) == 2


def test_gradients_are_computed_op_by_op(model, made):
    model.accelerate(2)
    replays = made[0].replays
    model(clips()).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0
    model.requires_grad_(False)
    video = clips().requires_grad_()
    model(video).sum().backward()
    assert video.grad.abs().sum() > 0
    assert made[0].replays == replays
    for _ in range(2):
        assert not model(clips()).requires_grad  # nobody learns, so nobody wants a gradient
    assert made[0].replays + made[-1].replays > replays


def test_a_forward_gradient_is_computed_op_by_op(made):
    model = build(small_config(num_frames=4)).accelerate(2)
    set_backend(model, "reference")
    model.requires_grad_(False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(clips(), torch.ones_like(clips()))
        for _ in range(3):
            assert forward_ad.unpack_dual(model(dual)).tangent.abs().sum() > 0


@pytest.mark.parametrize("part", ["all", "dropout"])
@torch.no_grad()
def test_dropout_is_drawn_anew_in_training(made, part):
    model = build(small_config(num_frames=4, head_dropout=0.5)).accelerate(2)
    replays = made[0].replays
    (model if part == "all" else model.dropout).train()
    first, second, third = (model(clips()) for _ in range(3))
    assert not torch.equal(first, second) and not torch.equal(second, third)
    model.eval()
    model(clips())
    assert len(made) == 1 and made[0].replays == replays + 1


@torch.no_grad()
def test_autocast_is_obeyed(model, made):
    model.accelerate(2)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(model(clips()), model._logits(clips()))
            assert model(clips()).dtype == torch.bfloat16
    assert len(made) == 1 and made[0].replays == 1


@torch.no_grad()
def test_hooks_are_called(model, made):
    model.accelerate(2)
    called = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.ln_post, register)(lambda *_: called.append(1))
        for _ in range(3):
            model(clips())
        handle.remove()
    assert len(called) == 6
    model(clips())
    assert len(made) == 1 and made[0].replays == 2


class Subclass(torch.Tensor):
    """A tensor that something else computes with."""


@torch.no_grad()
def test_who_follows_the_operations_gets_them(model, made, monkeypatch):
    model.accelerate(2)
    with FlopCounterMode(display=False) as counter:
        model(clips())
    assert counter.get_total_flops() > 0
    model(clips().as_subclass(Subclass))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(clips()), plain(model, clips()))
    exported = torch.export.export(model, (clips(),)).module()
    torch.testing.assert_close(exported(clips(seed=1)), plain(model, clips(seed=1)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(model(clips()), plain(model, clips()))
    assert len(made) == 1 and made[0].replays == 1


@torch.no_grad()
def test_weights_that_are_no_plain_tensors_are_left_to_themselves(model, made):
    model.accelerate(2)
    model.head.register_buffer("odd", torch.ones(2).as_subclass(Subclass))
    for _ in range(3):
        model(clips())
    assert len(made) == 1 and made[0].replays == 1


@torch.no_grad()
def test_on_a_cpu_nothing_is_captured(model, monkeypatch):
    monkeypatch.setattr(graphs, "capture", lambda *_, **__: pytest.fail("captured"))
    model.accelerate(2)
    for _ in range(3):
        assert torch.equal(model(clips()), plain(model, clips()))


@torch.no_grad()
def test_what_cannot_be_captured_runs_op_by_op_and_one_line_says_why(
    model, made, monkeypatch, caplog
):
    monkeypatch.setattr(Capture, "fails", "out of memory\nmore")
    model.accelerate()
    for _ in range(4):
        assert torch.equal(model(clips()), plain(model, clips()))
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.WARNING,
            "a batch [2, 3, 4, 32, 32] of torch.float32 runs op by op, not as a CUDA graph: "
            "out of memory",
        )
    ]
    assert len(made) == 1
    monkeypatch.setattr(Capture, "fails", "")
    model.accelerate(1)  # another shape may succeed
    assert torch.equal(model(clips(1)), plain(model, clips(1)))
    assert len(made) == 2 and made[1].replays == 2


def test_the_models_own_errors_are_raised(model, made):
    model.accelerate()
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(ValueError, match="video must be"):
                model(clips()[:, :, :2])


@torch.no_grad()
def test_copies_capture_on_their_own_and_files_hold_no_graph(model, made, tmp_path):
    names = set(model.state_dict())
    model.accelerate(2)
    assert set(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        other.head.weight.zero_()
        for _ in range(3):
            assert torch.equal(other(clips()), other.head.bias.expand(2, -1))
        assert made[-1].replays == 2
    assert len(made) == 4
    assert torch.equal(model(clips()), plain(model, clips()))
    model.save_pretrained(tmp_path)
    other = VideoViT.from_pretrained(tmp_path)
    assert other.graphs is None and torch.equal(plain(other, clips()), model(clips()))


@torch.no_grad()
def test_a_launch_waits_for_the_one_before_on_another_stream(model, made, monkeypatch):
    model.accelerate(2)
    streams = [torch.cuda.current_stream(), Stream(), Stream()]
    for stream in streams[1:]:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None, s=stream: s)
        model(clips())
        model(clips())
    assert [stream.waited for stream in streams] == [[], streams[:1], streams[1:2]]


@torch.no_grad()
def test_threads_take_turns(model, made):
    model.accelerate()
    videos = [clips(seed=i) for i in range(8)]
    expected = [plain(model, video) for video in videos]

    def work(i):
        with torch.no_grad():
            return all(torch.equal(model(videos[i]), expected[i]) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert len(made) == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    build(small_config(num_frames=4)).save_pretrained(folder / "model")
    for i in range(7):
        write_numbered(folder / f"{i}.mp4", 9)
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(7)))
    return folder


@pytest.mark.parametrize("accelerated", [False, True])
def test_prediction_is_captured_before_decoding_and_serves_the_last_batch_too(
    place, model, made, monkeypatch, accelerated
):
    samples = [Sample(str(place / f"{i}.mp4"), 0) for i in range(7)]
    with monkeypatch.context() as patch:
        patch.setattr(inference, "RECURS", 5)
        expected = list(inference.predict_each(model, samples, views=(2, 1), batch_size=2))
    assert not made and model.graphs is None
    epoch = ViewLoader.epoch

    def begun(self):
        assert len(made) == 1
        return epoch(self)

    monkeypatch.setattr(ViewLoader, "epoch", begun)
    own = model.accelerate().graphs if accelerated else None
    results = list(inference.predict_each(model, samples, views=(2, 1), batch_size=2))
    assert results == expected and len(results) == 7
    assert len(made) == 1 and made[0].replays == 5 and model.graphs is own


def test_evaluate_is_captured_if_there_are_batches_enough(place, made, monkeypatch, capsys):
    words = [place / "model", "--list", place / "list.txt", "--root", place, "--views", "1x1"]
    printed = []
    for size, count in ((3, 0), (2, 1)):
        argv = [str(word) for word in (*words, "--batch-size", size)]
        assert cli.run(evaluate.main, argv) == 0
        assert len(made) == count
        printed.append([line for line in capsys.readouterr().out.splitlines() if "%" in line])
    assert printed[0] == printed[1] and made[0].replays == 5
