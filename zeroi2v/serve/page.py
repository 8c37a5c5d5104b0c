"""The page: a clip from a file, a path or the webcam; classes, what happens when, where heads look.

Gradio brings upload, webcam, queue and the bars; the player with its timeline is HTML of our own.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from zeroi2v.serve.api import Problem, Service

TOPK = 5
COLOURS = "#4e79a7 #f28e2b #59a14f #b6992d #e15759 #499894 #d37295 #9d7660 #79706e #b07aa1".split()
CSS = """
.gradio-container { max-width: 1100px !important; width: 100% !important;
  margin: 0 auto !important; }
#clip video { max-height: 258px; }  /* leaves room for Gradio's icons below it */
.z-line button, .z-part { margin: 0 !important; }
.z-player video { width: 100%; max-height: 420px; background: #000; border-radius: 8px; }
.z-line { display: flex; height: 34px; margin: 4px 0 6px; border-radius: 6px; overflow: hidden; }
.z-line button { border: 0; border-right: 1px solid rgba(255, 255, 255, 0.6); padding: 0 2px;
  min-width: 3px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
  color: #fff; font-size: 12px; cursor: pointer; }
.z-line button:focus-visible, .z-part:focus-visible { outline: 3px solid var(--color-accent);
  outline-offset: -3px; }
.z-parts { display: flex; flex-wrap: wrap; gap: 6px; max-height: 180px; overflow-y: auto; }
.z-part { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 3px 8px;
  color: var(--body-text-color); background: var(--background-fill-secondary);
  font-size: 13px; cursor: pointer; }
.z-part i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; }
.z-soft { color: var(--body-text-color); opacity: 0.75; font-size: 14px; }
.z-problem { border-left: 4px solid #d64545; border-radius: 4px; padding: 8px 12px;
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
footer { display: none !important; }
"""
_MOMENT = """(shown, number) =>
  [shown, number, document.querySelector('.z-player video')?.currentTime || 0]"""
_SEEK = "const v=document.querySelector('.z-player video');if(v){{v.pause();v.currentTime={:.3f}}}"


def build_page(service: Service) -> Any:
    """The page as Gradio's Blocks."""
    import gradio as gr

    models = service.worker.about
    heads = [number for number, model in enumerate(models) if model["attention"]]
    limits, folder = service.limits, service.folder
    with gr.Blocks(title="zeroi2v", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# What happens in this video?\n{' and '.join(_described(m) for m in models)}")
        shown = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=300):
                clip = gr.Video(
                    label="Drop a clip here, or record one",
                    sources=["upload", "webcam"],
                    elem_id="clip",
                    height=300,
                )
                path = gr.Textbox(
                    label="or a path on the server",
                    placeholder="clip.mp4",
                    info=f"in {folder}" if folder else None,
                    visible=folder is not None,
                    elem_id="path",
                )
                go = gr.Button("Classify", variant="primary", elem_id="go")
                gr.Markdown(
                    f"At most {limits.megabytes:g} MB, {limits.minutes:g} minutes, "
                    f"{limits.megapixels:g} megapixels a frame.",
                    elem_classes="z-soft",
                )
            with gr.Column(min_width=300, scale=2):
                with gr.Row():
                    bars = [
                        gr.Label(
                            label=model["name"], num_top_classes=TOPK, min_width=240, visible=False
                        )
                        for model in models
                    ]
                player = gr.HTML("<p class='z-soft'>The answer appears here.</p>", elem_id="result")
        with gr.Group(visible=False) as look:
            which = gr.Radio(
                [(models[n]["name"], n) for n in heads],
                value=heads[0] if heads else None,
                label="Model",
                visible=len(heads) > 1,
            )
            ask = gr.Button("Where does it look at the moment the player shows?", elem_id="look")
            picture = gr.HTML(elem_id="picture")

        for model in models:
            title = f"The {model['classes']} classes that {model['name']} knows"
            with gr.Accordion(title, open=False):
                gr.Markdown(_plain(", ".join(model["labels"])) or "They have numbers, no names.")

        def classify(video: str | None, typed: str) -> Iterator[list[Any]]:
            hidden = [gr.update(visible=False)] * len(models)
            yield [
                None,
                "<p class='z-soft'>Classifying …</p>",
                *hidden,
                gr.update(visible=False),
                "",
            ]
            try:
                name, file = _chosen(service, video, typed)
                found = service.ask(name, "classify", file, TOPK, True)
                text = _player(service.film(name, file), found)
            except Problem as problem:
                yield [None, _problem(problem), *hidden, gr.update(visible=False), ""]
                return
            results = [
                gr.update(
                    value={r["label"]: r["probability"] for r in result["topk"]}, visible=True
                )
                for result in found["results"]
            ]
            yield [(name, file), text, *results, gr.update(visible=bool(heads)), ""]

        def attention(shown: tuple[str, str] | None, number: int, moment: float) -> str:
            if shown is None:
                return ""
            try:
                png = service.ask(shown[0], "attention", shown[1], number, float(moment or 0))
            except Problem as problem:
                return _problem(problem)
            data = base64.b64encode(png).decode()
            return (
                "<div style='overflow-x:auto'><img alt='what the heads read' "
                f"style='min-width:700px;width:100%' src='data:image/png;base64,{data}'></div>"
            )

        outputs = [shown, player, *bars, look, picture]
        for event in (go.click, path.submit):
            event(
                classify, [clip, path], outputs, api_visibility="private", show_progress="minimal"
            )
        moment = gr.Number(0, visible=False)
        ask.click(attention, [shown, which, moment], picture, js=_MOMENT, api_visibility="private")
    page.queue(max_size=limits.queue, default_concurrency_limit=4)
    return page


def _described(model: dict[str, Any]) -> str:
    return f"**{_plain(model['name'])}** ({model['classes']} classes, {model['frames']} frames)"


def _plain(text: str) -> str:
    """Text without what Markdown takes for markup."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+!|~&" else c for c in text)


def _chosen(service: Service, video: str | None, typed: str) -> tuple[str, str]:
    """Name and file of what is to be classified: a typed path goes first. Raises Problem."""
    if typed and typed.strip():
        name, file = typed.strip(), service.within(typed.strip())
    elif video:
        name, file = Path(video).name, video
    else:
        raise Problem(
            400, "no video yet: drop a clip, record one" + ", or give a path" * bool(service.folder)
        )
    service.check_size(name, os.path.getsize(file))
    return name, file


def _problem(problem: Problem) -> str:
    return f"<p class='z-problem' role='alert'>{html.escape(str(problem))}</p>"


def _player(film: str | None, found: dict[str, Any]) -> str:
    """The player, and below it a line of parts for each model of a long video."""
    text = "<div class='z-player'>"
    if film is None:
        text += "<p class='z-soft'>The browser has no player for this video.</p>"
    else:
        text += f"<video src='{film}' controls muted playsinline preload='auto'></video>"
    size = f"{found['width']} x {found['height']}"
    text += f"<p class='z-soft'>{found['seconds']:.1f} s, {size} pixels</p>"
    several, colours = len(found["results"]) > 1, {}
    for result in found["results"]:
        if result["timeline"] is not None:
            title = f"{html.escape(result['model'])}: " if several else ""
            text += f"<p class='z-soft'>{title}what happens when; a click goes there</p>"
            text += _timeline(result["timeline"], colours)
    return text + "</div>"


def _timeline(line: dict[str, Any], colours: dict[str, str]) -> str:
    """A bar of parts, and the same as words. `colours` of labels are added to."""
    parts = parts_of(line)
    for _, _, label, _ in parts:
        colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])
    bar, words = "", ""
    for start, end, label, probability in parts:
        name, seek = html.escape(label), _SEEK.format(start)
        about = f"{clock(start)} to {clock(end)}: {name}, {probability:.0%}"
        bar += (
            f"<button style='flex:{end - start:.3f};background:{colours[label]}' title='{about}' "
            f'onclick="{seek}">{name}</button>'
        )
        words += (
            f"<button class='z-part' onclick=\"{seek}\"><i style='background:{colours[label]}'></i>"
            f"{clock(start)} {name} <span class='z-soft'>{probability:.0%}</span></button>"
        )
    return f"<div class='z-line'>{bar}</div><div class='z-parts'>{words}</div>"


def parts_of(line: dict[str, Any]) -> list[tuple[float, float, str, float]]:
    """Stretches of a timeline's windows with one label: start, end, label, mean probability.

    Between two windows that overlap, the middle of what they share is the border.
    """
    parts, windows = [], line["windows"]
    best = [
        w["topk"][0] if "topk" in w else {"label": "unreadable", "probability": 0} for w in windows
    ]
    edges = [0.0]
    edges += [(a["end"] + b["start"]) / 2 for a, b in pairwise(windows)]
    edges.append(line["seconds"])
    for label, run in groupby(range(len(windows)), key=lambda i: best[i]["label"]):
        own = list(run)
        mean = sum(best[i]["probability"] for i in own) / len(own)
        parts.append((edges[own[0]], edges[own[-1] + 1], label, mean))
    return parts


def clock(seconds: float) -> str:
    """`75.2` -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
