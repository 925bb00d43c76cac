"""Serves the page to this machine only, and keeps page and server from reaching any other."""

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from flowturbo_jax.demo import limits, page
from flowturbo_jax.interfaces import InputError

if TYPE_CHECKING:
    import gradio as gr

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]  # what a browser may call it; another name is somebody's trick
GOODBYE_SECONDS = 1  # until open connections are cut
# A browser that is told so asks no other machine for anything.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)


def reserve(port: int) -> socket.socket:
    """A socket on a port of this machine, so that nobody else takes it.

    Args:
      port: which; 0 for any free one.

    Raises:
      InputError: it is no port, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port is {port}; it must lie between 0 and {2**16 - 1}")
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((HOST, port))
        place.listen()
    except OSError as error:
        place.close()
        raise InputError(
            f"port {port} cannot be used: {error.strerror}; choose another --port, or 0 for any"
        ) from error
    return place


def silence(folder: str) -> None:
    """Tells Gradio, before it is imported, to ask and tell nobody, and where to put its files."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # such as GRADIO_SHARE, GRADIO_ALLOWED_PATHS
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": folder,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def serve(blocks: "gr.Blocks", place: socket.socket) -> None:
    """Serves a page until Ctrl-C or SIGTERM.

    Args:
      blocks: the page.
      place: where, as `reserve` gives it.
    """
    import fastapi
    import gradio as gr
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES)
    gr.mount_gradio_app(
        app,
        blocks,
        path="",
        server_name=HOST,
        server_port=place.getsockname()[1],
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=limits.MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **page.look(),
    )
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=GOODBYE_SECONDS, lifespan="on"
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            # An open page is cut off, which is no error to print a traceback for.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    Server(config).run(sockets=[place])


class _Policy:
    """Adds the content security policy to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy)
