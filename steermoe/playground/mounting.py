"""Puts the page beside the API: one process, one key, no request to any other host."""

import os
from typing import TYPE_CHECKING, Any

from steermoe.errors import SteerMoEError

if TYPE_CHECKING:
    from fastapi import FastAPI

OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False"}
MOST_UPLOAD = 1 << 20
"""Bytes of a file that a page could upload; it uploads none."""


def require_gradio() -> None:
    """Raise SteerMoEError if Gradio is missing, before a model is loaded."""
    os.environ.update(OFFLINE)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SteerMoEError(
            f"the page needs Gradio ({error}): pip install 'steermoe[play]', or serve without it with --no-page"
        ) from error


def mount(app: "FastAPI", model: str | None = None) -> Any:
    """Mount the page of an application at /; its other routes stay.

    Args:
        app: from `serving.app.create_app`, complete; the page takes every path that has no route.
        model: how commands name the model; by default as the service does.

    Returns:
        the `Page`.

    Raises:
        SteerMoEError: Gradio is missing.
    """
    require_gradio()
    import gradio as gr

    from steermoe.playground.page import Page, css, head, theme

    page = Page(app.state.service, model)
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
