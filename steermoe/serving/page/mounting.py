"""Puts the page beside the API: one process, one key, no request to any other host."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from steermoe.errors import SteerMoEError, reason

if TYPE_CHECKING:
    from fastapi import FastAPI

    from steermoe.serving.page.building import Topics

OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False"}
LIBRARIES = ("fastapi", "prometheus_client", "uvicorn", "gradio")
MOST_BODY = 4 << 20
"""Bytes of what the page sends at once."""
MOST_UPLOAD = 1
"""Bytes of a file that is uploaded: the page uploads none."""
EVENTS = "/gradio_api/"
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def require_gradio() -> None:
    """Raise SteerMoEError if Gradio, or what the server needs, is missing: before a model is loaded."""
    os.environ.update(OFFLINE)
    try:
        for name in LIBRARIES:
            import_module(name)
    except ImportError as error:
        raise SteerMoEError(
            f"the page needs {name} ({reason(error)}): pip install 'steermoe[play]', or serve without it with --no-page"
        ) from error


def mount(app: "FastAPI", model: str | None = None, topics: "Topics | None" = None) -> Any:
    """Mount the page of an application at /; its other routes stay.

    Args:
        app: from `serving.app.create_app`, complete; the page takes every path that has no route.
        model: how commands name the model; by default as the service does.
        topics: builds vectors of new topics; without it the page has no such form.

    Returns:
        the `Page`.

    Raises:
        SteerMoEError: Gradio is missing.
    """
    require_gradio()
    import gradio as gr

    from steermoe.serving.page.blocks import Page, css, head, theme

    _keep_errors(app)
    app.add_middleware(Limited)
    page = Page(app.state.service, model, topics)
    gr.mount_gradio_app(
        app,
        page.blocks(),
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MOST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=css(),
        head=head(),
    )
    return page


def _keep_errors(app: "FastAPI") -> None:
    """Answer wrong paths of the API as before, where the page would otherwise take them."""
    from starlette.exceptions import HTTPException

    known = {getattr(route, "path", "") for route in app.routes}

    async def missing(request: Any) -> None:
        raise HTTPException(405 if request.url.path in known else 404)

    for path in ("/v1/{rest:path}", "/api/{rest:path}"):
        app.add_route(path, missing, methods=METHODS)


class Limited:
    """Reads no more than MOST_BODY bytes of what the page sends at once.

    Args:
        app: the application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(EVENTS):
            await self._app(scope, receive, send)
            return
        size = 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return {"type": "http.disconnect"} if size > MOST_BODY else message

        await self._app(scope, limited, send)
