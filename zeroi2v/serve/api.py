"""The JSON API, and the files behind the page.

    curl --data-binary @clip.mp4 'http://127.0.0.1:7860/api/predict?name=clip.mp4&topk=5'
    curl -X POST 'http://127.0.0.1:7860/api/predict?path=clips/a.mp4&timeline=true'
    curl 'http://127.0.0.1:7860/api/about'

An answer is a JSON object; a request that is refused gets `{"error": one line}` and a status: 400
for a bad video or argument, 403 for a path outside the folder, 404 for none, 413 for what is too
large, 503 if too many wait, 504 if it takes too long.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from zeroi2v.serve.limits import Limits
from zeroi2v.serve.service import Problem, Service

READ = 4
"""How many times its limit an upload may be before the server stops listening to it."""


def build_app(service: Service, hosts: list[str]) -> FastAPI:
    """The FastAPI application of the API. `hosts` are the names it is called by."""
    app = FastAPI(title="zeroi2v", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(Problem)
    def problem(request: Request, error: Problem) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        limits = {name: getattr(service.limits, name) for name in Limits.__slots__}
        return {"models": service.worker.about, "limits": limits}

    @app.post("/api/predict")
    async def predict(request: Request) -> dict[str, Any]:
        query = request.query_params
        unknown = sorted(set(query) - {"name", "path", "topk", "timeline"})
        if unknown:
            raise Problem(400, f"query must be of name, path, topk, timeline: got {unknown[0]}")
        topk, wanted = query.get("topk", "5"), query.get("timeline", "false")
        if not topk.isdecimal() or not 1 <= int(topk) <= 1000:
            raise Problem(400, f"topk must be in 1..1000: got {topk}")
        if wanted not in ("true", "false"):
            raise Problem(400, f"timeline must be true or false: got {wanted}")
        more = (int(topk), wanted == "true")
        if "path" in query:
            path = service.within(query["path"])
            service.check_size(query["path"], os.path.getsize(path))
            return await run_in_threadpool(service.ask, query["path"], "classify", path, *more)
        name = Path(query.get("name", "video")).name or "video"
        most = 1e6 * service.limits.megabytes
        # What is a little too large is read to its end, for many clients listen only then.
        if int(request.headers.get("content-length", 0)) > READ * most:
            service.check_size(name, READ * most)
        suffix = Path(name).suffix  # by which FFmpeg knows a few formats
        suffix = suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", suffix) else ""
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            size = 0
            async for block in request.stream():
                size += len(block)
                if size <= most:
                    file.write(block)
                elif size > READ * most:
                    break
            service.check_size(name, size)
            if not size:
                raise Problem(400, "request must hold a video, or name one by path: got nothing")
            file.flush()
            return await run_in_threadpool(service.ask, name, "classify", file.name, *more)

    @app.get("/film/{token}")
    def film(token: str) -> Any:
        path = service.shown(token)
        if path is None:
            return JSONResponse({"error": "film is no longer kept: classify the video again"}, 404)
        kinds = {".webm": "video/webm", ".mkv": "video/webm"}
        return FileResponse(path, media_type=kinds.get(path.suffix.lower(), "video/mp4"))

    return app
