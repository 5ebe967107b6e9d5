"""The demo's audio server: files below RAW_DIR/audio at /audio, with ranges and CORS."""

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles


async def _health(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def application() -> Starlette:
    """The application, for uvicorn's --factory."""
    audio = StaticFiles(directory=Path(os.environ["RAW_DIR"]) / "audio", follow_symlink=True)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["GET", "HEAD"],
        allow_headers=["Range"],
        expose_headers=["Content-Length", "Content-Range", "Accept-Ranges"],
    )
    return Starlette(routes=[Route("/health", _health), Mount("/audio", audio)], middleware=[cors])
