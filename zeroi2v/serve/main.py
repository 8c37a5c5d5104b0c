"""Serves a page and a JSON API on this machine.

    zeroi2v serve merged                        one model
    zeroi2v serve first/merged second/merged    two, side by side
    zeroi2v serve merged --folder clips         videos in that folder can be named by their path

It is reached from this machine alone, unless --host says otherwise; there is no password then.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
import tempfile
from pathlib import Path

from zeroi2v.cli import run
from zeroi2v.extras import require
from zeroi2v.serve.limits import Limits
from zeroi2v.serve.service import Service
from zeroi2v.serve.worker import Worker

MODELS = 2
"""Models that fit side by side."""


def main(argv: list[str]) -> None:
    """Serves until Ctrl-C. Raises ValueError or OSError on bad input."""
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="+", help="model or run folder, .onnx or .pt2 file")
    parser.add_argument("--folder", help="folder whose videos may be named by their path")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="0 for any free one (7860)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    for name, unit, of in (
        ("megabytes", float, "of an upload"),
        ("minutes", float, "that a video lasts"),
        ("megapixels", float, "of a frame"),
        ("seconds", float, "that a request may compute"),
        ("queue", int, "requests that may wait"),
    ):
        value = getattr(limits, name)
        parser.add_argument(f"--max-{name}", type=unit, default=value, help=f"{of} ({value:g})")
    args = parser.parse_args(argv)
    if len(args.model) > MODELS:
        raise ValueError(f"models must be at most {MODELS}: got {len(args.model)}")
    limits = Limits(**{name: getattr(args, f"max_{name}") for name in Limits.__slots__})
    folder = None if args.folder is None else Path(args.folder)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--folder must be a folder: got {folder}")
    require("the page", "gradio")
    with bound(args.host, args.port) as door, tempfile.TemporaryDirectory() as films:
        os.environ["GRADIO_TEMP_DIR"] = films  # before Gradio is imported
        worker = Worker(args.model, args.device, limits)
        try:
            serve(door, Service(worker, limits, folder, Path(films)), args.host)
        finally:
            worker.close()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ValueError if it can't be had."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be in 0..{2**16 - 1}: got {port}")
    try:
        return socket.create_server((host, port), family=family(host))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--host and --port must be free: got {host}:{port} ({reason})") from None


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(door: socket.socket, service: Service, host: str) -> None:
    """Serves at a socket until it is stopped."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    import uvicorn

    from zeroi2v.serve.api import build_app
    from zeroi2v.serve.page import CSS, build_page

    service.worker.wait()

    loopback = is_loopback(host)
    # Under another name a page of somebody else's could ask from within this machine's browser.
    app = build_app(service, ["127.0.0.1", "localhost", "[::1]", host] if loopback else ["*"])
    size = int(1e6 * service.limits.megabytes)
    # Fonts of the system: the theme's own would be fetched from elsewhere.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = gradio.mount_gradio_app(
        app,
        build_page(service),
        path="/",
        max_file_size=size,
        ssr_mode=False,
        theme=theme,
        css=CSS,
        footer_links=[],
    )
    name = f"[{host}]" if ":" in host else host
    print(f"serving     http://{name}:{door.getsockname()[1]}", flush=True)
    if not loopback:
        print("warning     whoever reaches this address can use it: there is no password")
    print("            Ctrl-C ends it", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[door])


if __name__ == "__main__":
    sys.exit(run(main))
