"""The page's server: its folder, its limits, its beginning and end."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from pathlib import Path

from wavflow.base.errors import InputError
from wavflow.base.interrupt import Interrupts
from wavflow.config.schema import Config
from wavflow.media import video_worker
from wavflow.pipeline.sampler import Sampler
from wavflow.serve.gate import Gate
from wavflow.serve.studio import Limits, Studio

log = logging.getLogger("wavflow")


def serve(
    checkpoint: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    device: str = "auto",
    dtype: str = "auto",
    ema: str = "ema1",
    config: Config | str | os.PathLike[str] | None = None,
    engine: str = "auto",
) -> None:
    """Serves the page until SIGINT or SIGTERM.

    Uploads and sounds are in a temporary folder, which is removed at the end.

    Args:
        checkpoint, device, dtype, ema, config, engine: as in :meth:`wavflow.Sampler.load`.
        host: address to listen at; 0.0.0.0 is every one that this machine has.
        port: port to listen at.
        limits: what requests may ask for.

    Raises:
        InputError: the port is taken, or Gradio is not installed; else as in `Sampler.load` and
            `Studio.warm_up`.
    """
    limits = limits or Limits()
    _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="wavflow-serve-") as name:
        folder = Path(name).resolve()
        # Gradio's own folders, which it reads when it is imported: what is in them can be fetched.
        os.environ |= {"GRADIO_TEMP_DIR": name, "GRADIO_EXAMPLES_CACHE": name}
        try:
            from starlette.middleware import Middleware

            from wavflow.serve.page import LOOK, build_page
        except ImportError as error:
            text = f"the page needs Gradio ({error}): pip install 'wavflow[serve]'"
            raise InputError(text) from None
        video_worker.start()
        sampler = Sampler.load(checkpoint, device, dtype, ema, config, engine)
        studio = Studio(sampler, folder, limits)
        studio.warm_up()
        page = build_page(studio)
        upload_bytes = limits.upload_mb * 10**6
        gate = Middleware(Gate, folder=folder, upload_bytes=upload_bytes)
        undocumented = {"docs_url": None, "redoc_url": None, "openapi_url": None}
        try:
            with Interrupts() as stop:
                _, url, _ = page.launch(
                    server_name=host,
                    server_port=port,
                    share=False,
                    quiet=True,
                    prevent_thread_lock=True,
                    max_file_size=upload_bytes,
                    enable_monitoring=False,
                    run_history=False,
                    ssr_mode=False,
                    pwa=False,
                    mcp_server=False,
                    footer_links=[],
                    app_kwargs={"middleware": [gate], **undocumented},
                    **LOOK,
                )
                log.info("%s: Ctrl-C ends it", url)
                while not stop.signal:
                    time.sleep(0.1)
        finally:
            studio.close()
            page.close(verbose=False)


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise InputError(f"host {host}, port {port}: {error.strerror}; wanted a free one") from None
