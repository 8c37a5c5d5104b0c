"""How contestants are checked, timed in turns, rated and shown, as `conftest.compare` does."""

from __future__ import annotations

import copy
import cProfile
import gc
import time
from collections.abc import Callable

import torch

from bench import measure


def warm_up(contestants, rows, check, device, graph, memory) -> dict[str, Callable]:
    """Runs and checks each contestant once; returns them, captured in graphs if that is wanted.

    Adds peak bytes and whether there is a graph to `rows`. Graphs share their memory, so what a
    replay returns holds until the next one.
    """
    ready, pool = {}, torch.cuda.graph_pool_handle() if graph else None
    for name, contestant in contestants.items():
        output, ready[name] = None, contestant
        if memory:
            output, rows[name]["peak_bytes"] = measure.run_counting_memory(contestant, device)
        if graph:  # after memory is counted: a replay allocates nothing
            output, ready[name] = None, _graph(name, contestant, rows[name], pool)
        if output is None:
            output = ready[name]()
        if check is not None:
            check(name, output)
        del output
    return ready


def _graph(name: str, contestant: Callable, row: dict, pool: tuple[int, int]) -> Callable:
    try:
        replay = measure.captured(contestant, pool)
    except RuntimeError as error:
        print(f"{name} can't be captured in a CUDA graph: {str(error).splitlines()[0]}")
        row["graph"] = False
        return contestant
    row["graph"] = True
    return replay


def interleave(config, benchmark, contestants, device, rounds) -> dict[str, list[float]]:
    """Interleaved rounds with pytest-benchmark's timer and its choice about garbage collection."""
    collects = gc.isenabled()
    if benchmark is not None and benchmark._disable_gc:
        gc.disable()
    try:
        return measure.interleave(
            contestants,
            device,
            config.getoption("--rounds") or rounds,
            config.getoption("--seconds"),
            time.perf_counter if benchmark is None else benchmark._timer,
            exact=config.getoption("--rounds") is not None,
        )
    finally:
        if collects:
            gc.enable()


def ratio_of(seconds: dict[str, list[float]], this: str, that: str) -> dict:
    """Median and quartiles of the ratio within a round; nothing if one of them was not here."""
    if this not in seconds or that not in seconds:
        return {}
    summary = measure.summary(seconds[this], seconds[that])
    return {key: summary[key] for key in ("ratio", "ratio_quartiles")}


def reached(pair: str, seconds: dict[str, list[float]], rows: dict[str, dict]) -> dict:
    """The ratio that a goal is about; nothing if it was not measured."""
    this, that = pair.split(" / ")
    if not this.startswith("peak of "):
        return ratio_of(seconds, this, that)
    this, that = (rows.get(name, {}) for name in (this.removeprefix("peak of "), that))
    if "peak_bytes" not in this or "peak_bytes" not in that:
        return {}
    ratio = this["peak_bytes"] / that["peak_bytes"]
    return dict(ratio=ratio, ratio_quartiles=[ratio, ratio])


def rates(row: dict, ceilings: dict[str, float]) -> dict[str, float]:
    """What a row achieved a second, and which share of the machine's ceiling that is."""
    found = {}
    peak = ceilings.get(str(row.get("dtype", "float32")).removeprefix("torch."))
    for key, ceiling in (("flops", peak), ("bytes", ceilings["copy"]), ("clips", None)):
        if key in row:
            found[f"{key}_per_s"] = row[key] / row["seconds"]
            if ceiling is not None:
                found[f"{key}_of_ceiling"] = found[f"{key}_per_s"] / ceiling
    return found


def hand_over(benchmark, node, contestants, seconds, rows, facts) -> None:
    """Gives pytest-benchmark a group of one row for each contestant."""
    for name, times in seconds.items():
        row = copy.copy(benchmark)
        row.name, row.fullname, row.group = name, f"{node.nodeid} {name}", node.name
        row.extra_info = {**facts, **rows[name]}
        stats = row._make_stats(iterations=1)
        for value in times:
            stats.update(value)
        if row.cprofile:
            profile = cProfile.Profile()
            profile.runcall(contestants[name])
            row._save_cprofile(profile)


def show(request, baseline: str, rows: dict[str, dict], facts: dict) -> None:
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        rounds = facts["rounds"]
        print(f"\n{request.node.name}, {rounds} round{'s' if rounds > 1 else ''}")
        for name, row in rows.items():
            if "absent" in row:
                print(f"  {name:<28} not measured: {row['absent']}")
                continue
            low, high = row["ratio_quartiles"]
            print(
                f"  {name:<28} {1e3 * row['seconds']:10.2f} ms   "
                f"{row['ratio']:.3f} x {baseline}  [{low:.3f}, {high:.3f}]"
            )
            if other := row.get("against"):
                print(f"  {'':<28} {'':10}      {other['ratio']:.3f} x {other['name']}")
        for pair, goal in facts.get("goals", {}).items():
            print(f"  {pair}: {goal.get('ratio', float('nan')):.3f}, at most {goal['goal']} wanted")
