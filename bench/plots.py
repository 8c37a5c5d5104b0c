"""Pictures of the benches: each says in its title what it shows, and labels its marks directly.

The colours are Okabe and Ito's, which colour-blind readers tell apart; blue is the merged model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

MERGED, ADAPTED, AUTHORS, IMAGE = "#0072B2", "#56B4E9", "#D55E00", "#808080"
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#000000")
COLOURS = {
    "merged": MERGED,
    "adapted": ADAPTED,
    "authors": AUTHORS,
    "joint": OTHERS[0],
    "ST-Adapter": OTHERS[1],
    "AIM": OTHERS[2],
}
"""By what a contestant's name holds."""
IMAGE_VIT = "plain image ViT"
ZEROI2V, ADAPTED_ZEROI2V = "ZeroI2V, merged", "ZeroI2V, adapted"
SCALED = (IMAGE_VIT, "merged", "joint attention")
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
BACKENDS = {"triton", "matmul", "sdpa"}
"""Of our attention."""
DPI = 130


def where(results: dict) -> str:
    """A machine in a few words."""
    card = results["machine"]
    if card.get("kind") != "CPU":
        return card["name"]
    # Of one name there are machines with and without the wide instructions.
    return f"{card['name']}, {card['cores']} cores, {card['isa']}"


def draw(results: dict, folder: Path) -> list[str]:
    """Draws what was measured to `folder`; the names of the files."""
    slug = results["machine"]["slug"]
    pictures = {f"{slug}-{plot.__name__}.png": plot for plot in PLOTS}
    return [name for name, plot in pictures.items() if plot(results, folder / name)]


def latency(results: dict, path: Path) -> bool:
    """Bars of the time of a clip, as a ratio to CLIP's image model; False if it isn't measured."""
    benches = _named(results, "bench_zero_cost")
    if not benches:
        return False
    cases = list(dict.fromkeys((b["model"], b["frames"]) for b in benches))
    dtypes = list(dict.fromkeys(b["dtype"] for b in benches))
    pyplot = _pyplot()
    size = (2.0 + 4.2 * len(dtypes), 1.1 + 2.3 * len(cases))
    figure, grid = pyplot.subplots(
        len(cases), len(dtypes), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for bench in benches:
        place = cases.index((bench["model"], bench["frames"])), dtypes.index(bench["dtype"])
        axes = grid[place]
        axes.set_visible(True)
        _latency_bars(axes, bench)
        axes.set_title(_case(bench), fontsize=10)
        if place[1]:
            axes.set_yticklabels([])
    ratios = [f"{b['rows']['merged']['ratio']:.2f}" for b in benches]
    span = " to ".join(dict.fromkeys((min(ratios), max(ratios))))
    figure.suptitle(
        f"A merged video model takes {span} × the time\nof CLIP's image model on its frames",
        fontweight="bold",
    )
    figure.supxlabel(
        f"time of one clip ÷ transformers CLIP, lower is faster   ({where(results)})", fontsize=9
    )
    return _save(figure, results, path)


def _latency_bars(axes, bench: dict) -> None:
    rows = {name: row for name, row in bench["rows"].items() if "seconds" in row}
    names = list(rows)[::-1]
    for i, name in enumerate(names):
        row = rows[name]
        low, high = row["ratio_quartiles"]
        axes.barh(i, row["ratio"], color=_colour(name), height=0.72)
        axes.plot([low, high], [i, i], color="black", linewidth=1)
        axes.text(
            0.02, i, f"{row['ratio']:.2f}  ({_milliseconds(row['seconds'])})",
            va="center", fontsize=8, color="white", fontweight="bold" if name == "merged" else None,
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    _bare(axes, "bottom")


def accuracy(results: dict, path: Path) -> bool:
    """Published accuracy over measured clips a second; False if the rivals are not measured."""
    benches = [b for b in _named(results, "bench_rivals") if any("top1" in r for r in _rows(b))]
    if not benches:
        return False
    dtype = "bfloat16" if any(b["dtype"] == "bfloat16" for b in benches) else "float32"
    benches = [bench for bench in benches if bench["dtype"] == dtype]
    figure, axes = _pyplot().subplots(figsize=(8.4, 4.6), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = {}
    findings = []
    for bench in sorted(benches, key=lambda b: b["rows"][ZEROI2V]["seconds"]):
        case = f"ViT-{bench['model']}, {bench['frames']} frames"
        for name, row in bench["rows"].items():
            if row.get("top1"):
                points.setdefault(name, []).append((row["clips_per_s"], row["top1"]))
        for name, (x, y) in ((name, found[-1]) for name, found in points.items()):
            row, ours = bench["rows"][name], name == ZEROI2V
            if "adapted" in name or not row.get("top1"):
                continue
            told = case if ours else f"{name}: {row['ratio']:.2f} × the time"
            axes.annotate(
                f"{told}\n{y:.1f} %", (x, y), xytext=(8, 3) if ours else (-9, -3),
                textcoords="offset points", color=_colour(name), fontsize=8,
                ha="left" if ours else "right", va="bottom" if ours else "top",
            )  # fmt: skip
            if y > bench["rows"][ZEROI2V]["top1"]:
                gain = y - bench["rows"][ZEROI2V]["top1"]
                findings.append(f"{name} publishes {gain:.1f} points more on {bench['model']}")
                findings[-1] += f" and takes {row['ratio']:.2f} × the time"
    for name, found in points.items():
        label = {ZEROI2V: "ZeroI2V, merged", ADAPTED_ZEROI2V: "ZeroI2V before merging"}.get(name)
        style = dict(color=_colour(name), marker="o", markersize=8, linewidth=1)
        axes.plot(*zip(*found, strict=True), label=label or name, **style)
    axes.set(
        xscale="log", xlabel="clips a second, measured", ylabel="Kinetics-400 top-1, published"
    )
    axes.xaxis.set_major_locator(_pyplot().LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.minorticks_off()
    axes.margins(x=0.28, y=0.15)
    place = dict(loc="outside lower center", ncols=len(points), frameon=False, fontsize=9)
    figure.legend(**place)
    axes.grid(alpha=0.25)
    _bare(axes, "bottom", "left")
    title = findings[0] if findings else "Published accuracy, and the speed measured here"
    axes.set_title(
        f"{title}\n({dtype}, {where(results)})", fontweight="bold", fontsize=11, loc="left"
    )
    return _save(figure, results, path)


def roofline(results: dict, path: Path) -> bool:
    """Operations a second over operations a byte, beneath the machine's measured ceilings."""
    points = [
        (bench["bench"] if name == _ours(bench) else "", _dtype(bench, row), row)
        for bench in results["benches"].values()
        for name, row in bench["rows"].items()
        if "bytes_per_s" in row and "flops_per_s" in row
    ]
    if not points:
        return False
    reached, measured = results["machine"]["ceilings"], {dtype for _, dtype, _ in points}
    copy, ceilings = reached["copy"], {k: v for k, v in reached.items() if k in measured}
    figure, axes = _pyplot().subplots(figsize=(8.6, 5), layout="constrained")
    at = [row["flops_per_s"] / row["bytes_per_s"] for _, _, row in points]
    left = min([*at, min(ceilings.values()) / copy]) / 4
    right = 3 * max([*at, max(ceilings.values()) / copy])
    for name, peak in ceilings.items():
        axes.plot([left, peak / copy, right], [left * copy, peak, peak], color="#555555", lw=1)
        told = f"{name} matmul\n {peak / 1e12:.3g} TFLOP/s"
        axes.text(right, peak, f" {told}", va="center", fontsize=8)
    stems = list(dict.fromkeys(stem for stem, _, _ in points if stem))
    colours = dict(zip(stems, (MERGED, AUTHORS, *OTHERS), strict=False))
    for (stem, dtype, row), x in zip(points, at, strict=True):
        style = dict(color=colours[stem], s=30) if stem else dict(color="#BBBBBB", s=12)
        axes.scatter(x, row["flops_per_s"], marker=MARKERS[dtype], zorder=3 if stem else 2, **style)
    axes.scatter([], [], color="#BBBBBB", s=12, label="others")
    for stem in stems:
        axes.scatter([], [], color=colours[stem], label=stem.replace("_", " "))
    for dtype in dict.fromkeys(dtype for _, dtype, _ in points):
        axes.scatter([], [], color="#555555", marker=MARKERS[dtype], label=dtype)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    bottom = min([left * copy, *(row["flops_per_s"] / 2 for _, _, row in points)])
    top = max([*ceilings.values(), *(row["flops_per_s"] for _, _, row in points)])
    axes.set(ylim=(bottom, 2.5 * top))
    axes.set(xlabel="operations for each byte moved", ylabel="operations a second")
    axes.annotate(
        f"copy, {copy / 1e9:.0f} GB/s", (2 * left, 2 * left * copy), xytext=(8, -4),
        textcoords="offset points", va="top", fontsize=8,
    )  # fmt: skip
    best = {
        stem: max(row["flops_of_ceiling"] for s, _, row in points if s == stem) for stem in stems
    }
    told = ", ".join(f"{stem.replace('_', ' ')} {share:.0%}" for stem, share in best.items())
    axes.set_title(
        f"Share of what a large matmul reaches, at best: {told}\n({where(results)})",
        fontweight="bold", fontsize=10, loc="left",
    )  # fmt: skip
    _bare(axes, "bottom", "left")
    return _save(figure, results, path)


def scaling(results: dict, path: Path) -> bool:
    """Frames a second over the clips in a batch, and over the frames of a clip.

    Not drawn before a model has been measured at two sizes.
    """
    benches = _named(results, "bench_zero_cost", "bench_zero_cost_throughput", "bench_scaling")
    dtypes = [bench["dtype"] for bench in benches]
    if not dtypes:
        return False
    dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
    benches = [bench for bench in benches if bench["dtype"] == dtype]
    by_batch = [b for b in benches if b["frames"] == 8 and b["bench"] != "scaling"]
    by_frames = [b for b in benches if b["batch"] == 1]
    if max(_most_sizes(by_batch, "batch"), _most_sizes(by_frames, "frames")) < 2:
        return False
    figure, panels = _pyplot().subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    _scaling_panel(panels[0], by_batch, "batch")
    _scaling_panel(panels[1], by_frames, "frames")
    panels[0].set(xlabel="clips in a batch, of 8 frames", ylabel="frames a second")
    panels[1].set(xlabel="frames in a clip, one clip")
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    place = dict(loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    figure.legend(lines.values(), lines.keys(), **place)
    long = [
        b
        for b in benches
        if b["model"] == "B/16" and b["frames"] == 32 and IMAGE_VIT == b["baseline"]
    ]
    told = [f"{name} {row['ratio']:.2f} ×" for b in long for name, row in b["rows"].items()]
    title = f"Time of 32 frames: {', '.join(told)}" if told else "Frames a second"
    figure.suptitle(f"{title}\n({dtype}, {where(results)})", fontweight="bold", fontsize=11)
    return _save(figure, results, path)


def _most_sizes(benches: list[dict], key: str) -> int:
    """At how many sizes that model was measured which was at most."""
    sizes = {(bench["model"], bench[key]) for bench in benches}
    return max(Counter(model for model, _ in sizes).values(), default=0)


def _scaling_panel(axes, benches: list[dict], key: str) -> None:
    """Lines of frames a second over the fact `key`, one for each model and contestant."""
    for model in dict.fromkeys(bench["model"] for bench in benches):
        top = []
        for name in SCALED:
            found = {
                bench[key]: bench["batch"] * bench["frames"] / bench["rows"][name]["seconds"]
                for bench in benches
                if bench["model"] == model and "seconds" in bench["rows"].get(name, {})
            }
            if found:
                xs, ys = zip(*sorted(found.items()), strict=True)
                axes.plot(xs, ys, color=_colour(name), marker="o", markersize=4, label=name)
                top.append((xs[0], ys[0]))
        if top:
            place = min(top)[0], max(y for _, y in top)
            axes.annotate(
                f"ViT-{model}", place, xytext=(0, 8), textcoords="offset points", fontsize=9
            )
    axes.set(xscale="log", yscale="log")
    ticks = sorted({bench[key] for bench in benches})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(_pyplot().LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)  # else the scale magnifies what is nearly the same
    axes.grid(alpha=0.25)
    _bare(axes, "bottom", "left")


PLOTS = (latency, scaling, accuracy, roofline)


def _named(results: dict, *names: str) -> list[dict]:
    found = [bench for key, bench in results["benches"].items() if key.split("[")[0] in names]
    return [bench for bench in found if _rows(bench)]


def _case(bench: dict) -> str:
    return f"ViT-{bench['model']}, {bench['frames']} frames, {bench['dtype']}"


def _dtype(bench: dict, row: dict) -> str:
    return str(row.get("dtype", bench.get("dtype", "float32"))).removeprefix("torch.")


def _ours(bench: dict) -> str | None:
    """The backend of ours that stands for the op: the fastest."""
    ours = {k: r["seconds"] for k, r in bench["rows"].items() if k in BACKENDS and "seconds" in r}
    return min(ours, key=ours.get, default=None)


def _rows(bench: dict) -> list[dict]:
    return [row for row in bench["rows"].values() if "seconds" in row]


def _colour(name: str) -> str:
    for part, colour in COLOURS.items():
        if part in name:
            return colour
    return IMAGE


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _bare(axes, *kept: str) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side in kept)
    axes.tick_params(left=False)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, results: dict, path: Path) -> bool:
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=DPI, format="png", metadata={"Description": digest(results)})
    _pyplot().close(figure)
    temporary.replace(path)
    return True


def digest(results: dict) -> str:
    """Tells whether a picture was drawn from these results, by this file."""
    drawn = json.dumps(results, sort_keys=True) + Path(__file__).read_text()
    return hashlib.sha256(drawn.encode()).hexdigest()
