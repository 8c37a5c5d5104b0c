"""What the benches measured, as Markdown: a page for each machine, and a summary of them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Any, NamedTuple

from bench.plots import where

CASES = (("B/16", 8), ("L/14", 8), ("L/14", 32))
DTYPES = {"CPU": ("float32", "bfloat16"), "GPU": ("float32", "bfloat16", "float16")}
IMAGE = "plain image ViT"
PUBLISHED_GMACS = {("B/16", 8): 422, ("L/14", 32): 7783}
"""10^9 multiply-adds of three views, as the paper prints them."""


def _number(scale: float = 1.0, digits: int = 1) -> Callable[[float], str]:
    return lambda value: f"{value * scale:,.{digits}f}"


def _small(value: float) -> str:
    return f"{value:.1e}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


# Header and format of what a row may hold, in the order of the columns.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("ms", lambda value: f"{1e3 * value:,.{3 if value < 1e-3 else 1}f}"),
    "ratio": ("time ÷ baseline", _number(digits=3)),
    "against": ("ratio to", lambda value: f"{value['ratio']:.3f} × {value['name']}"),
    "clips_per_s": ("clips/s", _number(digits=2)),
    "peak_bytes": ("peak, MiB", _number(2**-20)),
    "widths_saved": ("saved widths a token", _number(digits=2)),
    "joules": ("joules", _number(digits=2)),
    "parameters": ("parameters, M", _number(1e-6)),
    "flops": ("GFLOP", _number(1e-9)),
    "flops_by_formula": ("GFLOP by formula", _number(1e-9)),
    "flops_per_s": ("TFLOP/s", _number(1e-12, 3)),
    "flops_of_ceiling": ("of matmul", _percent),
    "bytes_per_s": ("GB/s", _number(1e-9)),
    "bytes_of_ceiling": ("of copy", _percent),
    "error": ("error", _small),
    "agreement": ("top-1 agreement", _percent),
    "top1": ("published top-1", _number()),
    "unpruned_gmacs": ("GMACs, all blocks whole", _number(digits=0)),
    "gmacs": ("published GMACs", _number(digits=0)),
}
HIDDEN = {"seconds_quartiles", "ratio_quartiles", "bytes", "clips", "absent"}
ABOUT = {"bench", "rows", "commit", "command", "date"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, padded so that it also reads as text."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) + " |" for x in lines
    ]
    out.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(out)


def ratio(row: dict, key: str = "ratio") -> str:
    """A ratio with its quartiles; that of the baseline to itself has none."""
    low, high = row[f"{key}_quartiles"]
    if low == high == row[key] == 1:
        return "1"
    return f"{row[key]:.2f} [{low:.2f}, {high:.2f}]"


def page(results: dict) -> str:
    """Everything that one machine measured."""
    card = dict(results["machine"])
    ceilings, packages = card.pop("ceilings"), card.pop("packages")
    title = f"# Benches on {where(results)}"
    lines = [title, "", "Written by `python -m bench.report`; times are medians of interleaved"]
    lines += ["rounds, ratios are taken within a round, quartiles in brackets."]
    minutes = sum(bench["took"] for bench in results["benches"].values()) / 60
    lines += [f"All benches together take {minutes:.0f} minutes.", ""]
    facts = [(key.replace("_", " "), str(value)) for key, value in card.items() if key != "slug"]
    facts += [
        (f"{name} matmul", f"{ceilings[name] / 1e12:.2f} TFLOP/s")
        for name in ceilings
        if name != "copy"
    ]
    facts += [("copy, read and written", f"{ceilings['copy'] / 1e9:.1f} GB/s")]
    facts += list(packages.items())
    lines += ["## Machine", "", table(("", ""), facts), ""]
    stems = dict.fromkeys(bench["bench"] for bench in results["benches"].values())
    for stem in sorted(stems):
        lines += [f"## {stem.replace('_', ' ')}", ""]
        for name, bench in results["benches"].items():
            if bench["bench"] == stem:
                lines += [*_bench(name, bench), ""]
    return "\n".join(lines).rstrip() + "\n"


def _bench(name: str, bench: dict) -> list[str]:
    facts = {k: v for k, v in bench.items() if k not in ABOUT and not isinstance(v, dict)}
    facts["took"] = f"{bench['took']:.0f} s"
    told = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in facts.items())
    rows = bench["rows"]
    keys = list(dict.fromkeys(key for row in rows.values() for key in row if key not in HIDDEN))
    keys.sort(key=lambda key: list(COLUMNS).index(key) if key in COLUMNS else len(COLUMNS))
    header = ["", *(COLUMNS[k][0] if k in COLUMNS else k.replace("_", " ") for k in keys)]
    cells = [[row, *(_cell(figures, key) for key in keys)] for row, figures in rows.items()]
    lines = [
        f"**{name}**: {told}.",
        f"Commit {bench['commit']}, {bench['date']}: `{bench['command']}`",
    ]
    if cells:
        lines += ["", table(header, cells)]
    for pair, goal in bench.get("goals", {}).items():
        if "ratio" in goal:
            met = "met" if goal["ratio"] <= goal["goal"] else "missed"
            lines += ["", f"Goal: {pair} at most {goal['goal']}; it is {ratio(goal)}: {met}."]
    absent = [f"{row}: {figures['absent']}" for row, figures in rows.items() if "absent" in figures]
    return lines + (["", f"Not measured: {'; '.join(absent)}."] if absent else [])


def _cell(figures: dict, key: str) -> str:
    value = figures.get(key)
    if value is None:
        return ""
    if f"{key}_quartiles" in figures and key == "ratio":
        return ratio(figures)
    return COLUMNS[key][1](value) if key in COLUMNS else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).removeprefix("torch.")


class Section(NamedTuple):
    """A table of the summary: one line for each row of the benches of one function."""

    title: str
    bench: str
    case: str
    """What tells the benches apart; empty if there is only one."""
    text: str
    columns: tuple[str, ...]
    only: dict[str, Any] = {}  # noqa: RUF012  (a tuple's default is shared, and never written)
    """Facts of the benches that are shown."""
    picture: tuple[str, str] | None = None
    """Plot and its description."""


SECTIONS = (
    Section(
        "From the call to the answer", "bench_latency", "model, frames",
        "One clip on a GPU in bfloat16, called op by op as Python does it, until the logits are in"
        " the host's memory: the merged model, the same after `accelerate()`, and in a CUDA graph"
        " around all.",
        ("seconds", "ratio", "against", "error"),
    ),
    Section(
        "The host's part of a pass", "bench_host", "",
        "The time that Python, Triton and PyTorch need to launch five passes op by op, measured"
        " without a GPU: Triton's driver launches nothing, and the model is so small that PyTorch"
        " computes in almost no time. Last, the same with every kernel called as a PyTorch"
        " operator, as training does.",
        ("seconds", "ratio"),
    ),
    Section(
        "The host's part of a training step", "bench_host_training", "",
        "The same for the forward and backward passes of five steps, with plain autograd (naive)"
        " and with the training block.",
        ("seconds", "ratio"),
    ),
    Section(
        "Beside other methods", "bench_rivals", "model, frames, precision",
        "The same backbone with the blocks of other methods, written from their papers"
        " (`bench/baselines/`), in bfloat16. Times are measured here; accuracies and GMACs (10⁹"
        " multiply-adds of three views) are those published for Kinetics-400. None of these models"
        " was trained here. ZeroI2V's case is cost, not the top accuracy.",
        ("ratio", "clips_per_s", "peak_bytes", "unpruned_gmacs", "gmacs", "top1"),
        {"dtype": "bfloat16"},
        ("accuracy", "published accuracy over measured speed"),
    ),
    Section(
        "A training step", "bench_training_block", "recipe, clips",
        "Forward and backward with trainable adapters: plain autograd"
        " (naive), and the three memory policies of the training block. *Saved* is what a block"
        " keeps for backward, without weights, in units of the width.",
        ("seconds", "ratio", "clips_per_s", "peak_bytes", "widths_saved", "joules"),
    ),
    Section(
        "8-bit weights", "bench_quantization", "model, frames",
        "One clip by the merged model with wide weights, and with 8-bit ones (`reparam --dtype`):"
        " int8 on CPUs beside float32, on GPUs float8 beside bfloat16. What int8 gains depends on"
        " the processor's instructions. Errors are those of random weights, relative to float64.",
        ("seconds", "ratio", "error"),
    ),
    Section(
        "Decoding", "bench_decoding", "frames from keyframe to keyframe",
        "8 frames, 16 apart, of a 300-frame H.264 video; one thread.",
        ("ratio", "clips_per_s"),
    ),
    Section(
        "Merging", "bench_reparam", "model",
        "`python -m zeroi2v.reparam` from start to end, with its proof, and the peak memory of the"
        " process; beside it, only reading and writing the model.",
        ("seconds", "peak_bytes"),
    ),
    Section(
        "The first answer", "bench_predict", "",
        "`python -m zeroi2v.predict` on one video in a fresh process, for each kind of model file.",
        ("seconds",),
    ),
)  # fmt: skip


def summary(machines: list[dict], files: Collection[str], folder: str) -> str:
    """The tables of all machines, and those of the pictures that are among `files`, of `folder`."""
    parts = [_zero_cost(machines, files, folder), _operations(machines)]
    parts += [_section(section, machines, files, folder) for section in SECTIONS]
    parts += _ops(machines, files, folder)
    pages = [f"[{where(m)}]({folder}/{m['machine']['slug']}.md)" for m in machines]
    parts.append(f"All figures, with the card of the machine: {', '.join(pages)}.")
    return "\n\n".join(part for part in parts if part)


def find(results: dict, name: str, **facts) -> dict:
    """The bench called `name` that was run with these facts; without rows if it was not."""
    for key, bench in results["benches"].items():
        if key.split("[")[0] == name and all(bench.get(k) == v for k, v in facts.items()):
            return bench
    return {"rows": {}}


def _zero_cost(machines: list[dict], files: Collection[str], folder: str) -> str:
    header = ["machine", "model, frames", "precision", "merged, ms a clip", "÷ transformers CLIP"]
    header += ["÷ authors' way", "adapted ÷ merged", "error"]
    rows, missing = [], []
    for results in machines:
        for (model, frames), dtype in product(CASES, DTYPES[results["machine"]["kind"]]):
            bench = find(results, "bench_zero_cost", model=model, frames=frames, dtype=dtype)
            case = [where(results), f"{model}, {frames}", dtype]
            if "seconds" in bench["rows"].get("merged", {}):
                rows.append([*case, *_merged(bench["rows"]), _source(bench)])
            else:
                missing.append(" ".join(case[1:]) + f" on {case[0]}")
    text = (
        "The time of one clip in the merged video model, divided by the time of CLIP's image model"
        " (Hugging Face transformers) on the same frames, and by the time of the same network with"
        " the authors' way of shifting keys and values; and the time of the adapted model before"
        " merging, divided by that of the merged one. Medians over paired runs, quartiles in"
        " brackets. *Error* is that of the outputs, relative to float64. On a CPU in float32 ours"
        " multiplies with oneDNN and transformers with MKL, PyTorch's default. This gain is in the"
        " ratio to transformers, but not in the ratio to the authors' way, which uses our linear"
        " layers. The authors' attention rounds its scores in half precision, ours does not;"
        " *fused* in the picture is theirs without that rounding."
    )
    parts = ["## Zero cost", text, _sourced(header, rows)]
    parts += [f"Not measured: {'; '.join(missing)}."] if missing else []
    told = "time of a clip beside CLIP's image model"
    parts += _figures(machines, files, folder, "latency", told)
    parts += _figures(machines, files, folder, "scaling", "speed over batch, time over frames")
    return "\n\n".join(parts)


def _merged(rows: dict[str, dict]) -> list[str]:
    merged, adapted = rows["merged"], rows["adapted"]
    return [
        _cell(merged, "seconds"),
        ratio(merged),
        ratio(merged["against"]) if "against" in merged else "",
        f"{adapted['ratio'] / merged['ratio']:.2f}",
        _cell(merged, "error"),
    ]


def _operations(machines: list[dict]) -> str:
    header = ["model, frames", "parameters: image ViT, merged", "published", "all blocks whole"]
    header += ["merged, as it runs"]
    rows = []
    for model, frames in CASES:
        found = [find(m, "bench_zero_cost", model=model, frames=frames) for m in machines]
        bench = next((bench for bench in found if bench["rows"]), None)
        if bench is None:
            continue
        whole, merged, image = (bench["rows"].get(n, {}) for n in ("authors' way", "merged", IMAGE))
        counts = [f"{r['parameters'] / 1e6:.1f} M" for r in (image, merged) if "parameters" in r]
        gmacs = [f"{3 * r['flops'] / 2e9:,.0f}" if "flops" in r else "" for r in (whole, merged)]
        published = str(PUBLISHED_GMACS.get((model, frames), ""))
        rows.append([f"{model}, {frames}", ", ".join(counts), published, *gmacs, _source(bench)])
    text = (
        "10⁹ multiply-adds of three views (papers call them GFLOPs), counted while the model runs"
        " and by formula. Only the CLS token leaves the last block, so the other tokens' queries,"
        " projection and MLP are not computed there, with the same result."
    )
    return "\n\n".join(["## Parameters and operations", text, _sourced(header, rows)])


def _section(section: Section, machines: list[dict], files: Collection[str], folder: str) -> str:
    cases = [section.case] if section.case else []
    header = ["machine", *cases, "", *(COLUMNS[key][0] for key in section.columns)]
    rows, missing = [], []
    for results in machines:
        before = len(rows)
        for name, bench in results["benches"].items():
            shown = all(bench.get(key) == value for key, value in section.only.items())
            if name.split("[")[0] != section.bench or not shown:
                continue
            case = [name[len(section.bench) + 1 : -1].replace("-", ", ")] if cases else []
            for row, figures in bench["rows"].items():
                cells = [_cell(figures, key) for key in section.columns]
                if "absent" in figures:
                    missing.append(f"{where(results)}, {', '.join([*case, row])}: "
                                   f"{figures['absent']}")  # fmt: skip
                else:
                    rows.append([where(results), *case, row, *cells, _source(bench)])
        if len(rows) == before:
            missing.append(where(results))
    parts = [f"## {section.title}", section.text]
    parts += [_sourced(header, rows)] if rows else []
    parts += [f"Not measured on {'; '.join(missing)}."] if missing else []
    parts += _figures(machines, files, folder, *section.picture) if section.picture else []
    return "\n\n".join(parts)


def _ops(machines: list[dict], files: Collection[str], folder: str) -> list[str]:
    figures = _figures(machines, files, folder, "roofline", "operations a second of attention")
    text = (
        "Attention, forward and with backward, on every backend that runs there: how near it comes"
        " to a large matmul and a large copy, both measured in the same run."
        f" [What the Triton kernels compile to]({folder}/kernels.md) on each kind of GPU."
    )
    return ["## Attention", text, *figures]


def _figures(
    machines: list[dict], files: Collection[str], folder: str, plot: str, told: str
) -> list[str]:
    names = [(f"{results['machine']['slug']}-{plot}.png", where(results)) for results in machines]
    return [f"![{told}, {w}]({folder}/{n})" for n, w in names if n in files]


class Run(NamedTuple):
    """What measured a row."""

    commit: str
    command: str


def _source(bench: dict) -> Run:
    return Run(bench["commit"], bench["command"])


def _sourced(header: list[str], rows: list[list]) -> str:
    """A table whose rows end in what measured them, by its number, and beneath it what that was."""
    runs = list(dict.fromkeys(row[-1] for row in rows))
    lines = [[*row, str(runs.index(run) + 1)] for *row, run in rows]
    told = [f"run {i}: commit {run.commit}, `{run.command}`" for i, run in enumerate(runs, 1)]
    return table([*header, "run"], lines) + f"\n\nMeasured by {'; '.join(told)}."
