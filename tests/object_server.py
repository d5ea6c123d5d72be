"""An S3 service for tests: moto on 127.0.0.1, in a thread.

In:   nothing.
Out:  `object_server()`: a context in which the environment points to the service, and `s3://latents` and
      `s3://videos` are there, empty.
Cost: about half a second to import, a few milliseconds per request.
Errors: none.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import pytest

from pipeline import object_store

BUCKETS = ("latents", "videos")


@contextlib.contextmanager
def object_server() -> Iterator[str]:
    """The service's address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        boto3 = pytest.importorskip("boto3")
        server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        object_store._connect.cache_clear()
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        for name in BUCKETS:
            client.create_bucket(Bucket=name)
        try:
            yield address
        finally:
            object_store._connect.cache_clear()
            server.stop()
