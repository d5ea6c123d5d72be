"""Objects in S3 and Google Cloud Storage, through obstore.

In:   urls `s3://name/key`, `gs://name/key`; credentials and endpoints from the environment (see `_HINTS`).
Out:  ObjectClient: head, get, range, put, conditional put, list, delete; ObjectStorage, the Storage made of it.
Cost: one request each, on pooled connections. A service that is silent, refuses connections or asks to come again (5xx,
      429) is given up after about a minute.
Errors: of the client, FileNotFoundError for what is not there and OSError in one line for anything else; of the
      storage, UnitError, since another try may go through; UsageError without obstore.

obstore's threads do not survive a fork: a process that talked to it must start others by spawning them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.errors import UnitError, UsageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_HINTS = {
    "s3": "credentials are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role, not from "
    "~/.aws; see also AWS_REGION, AWS_ENDPOINT_URL, and AWS_SKIP_SIGNATURE=true for public data",
    "gs": "credentials are read from the file that GOOGLE_APPLICATION_CREDENTIALS names, or the machine's account",
}
REMOTE_SCHEMES = tuple(_HINTS)
# A put of a unit (64 MB) has to end within the timeout. It and the retries are shorter than the time that decoding may
# take at least (60 s by default): a service that fails is then told as such, and not as a clip's timeout.
_CLIENT_OPTIONS: ClientConfig = {"allow_http": True, "connect_timeout": "5s", "timeout": "50s"}
_BEYOND_THE_END = "416 Range Not Satisfiable"  # where the range begins
# The time is the limit; it takes about 20 tries. A pause is drawn from the shortest one to `base` times the one before:
# with the default base of 2 they hardly grow.
_RETRIES: RetryConfig = {
    "backoff": {"init_backoff": dt.timedelta(seconds=0.2), "max_backoff": dt.timedelta(seconds=5), "base": 3},
    "max_retries": 1000,
    "retry_timeout": dt.timedelta(seconds=45),
}


def client_of(url: str) -> tuple[ObjectClient, str]:
    """The client for a url, and the name of the object (or prefix) that the url means to it.

    Raises:
        UsageError: the url names no bucket, or obstore is not installed.
    """
    scheme, _, rest = url.partition("://")
    host, _, name = rest.partition("/")
    if not host:
        raise UsageError(f"{url!r} names no place: write {scheme}://NAME/KEY")
    return _connect(scheme, host), name.strip("/")


@functools.lru_cache(maxsize=64)
def _connect(scheme: str, host: str) -> ObjectClient:
    return ObjectClient(scheme, host)


def open_obstore(url: str) -> Any:
    """What obstore itself opens at a url, for libraries that take that.

    Raises:
        UsageError: obstore is not installed, or cannot read the url.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(f"{url} needs the extra 's3': pip install 'latentmill[s3]'") from error
    try:
        return from_url(url, client_options=_CLIENT_OPTIONS, retry_config=_RETRIES)
    except (BaseError, ValueError) as error:
        raise UsageError(f"{url} cannot be opened: {_first_line(error)}") from error


class ObjectClient:
    """obstore's functions on the objects of one bucket, with errors that a person can read. Thread-safe."""

    def __init__(self, scheme: str, host: str) -> None:
        self._scheme, self._url = scheme, f"{scheme}://{host}"
        self._store = open_obstore(self._url)
        import obstore

        self._obstore: Any = obstore

    def head(self, name: str) -> tuple[int, str]:
        """Size in bytes, and the etag."""
        with self._readable_errors(name):
            meta = self._obstore.head(self._store, name)
            return int(meta["size"]), str(meta["e_tag"])

    def get(self, name: str) -> bytes:
        """The whole object."""
        with self._readable_errors(name):
            return bytes(self._obstore.get(self._store, name).bytes())

    def get_range(self, name: str, offset: int, size_bytes: int) -> tuple[bytes, int]:
        """Those of the bytes [offset, offset + size_bytes) that are there, and the size of the whole object."""
        from obstore.exceptions import BaseError

        with self._readable_errors(name):
            try:
                part = self._obstore.get(self._store, name, options={"range": (offset, offset + size_bytes)})
                return bytes(part.bytes()), int(part.meta["size"])
            except BaseError as error:
                if _BEYOND_THE_END not in str(error):
                    raise
                return b"", int(self._obstore.head(self._store, name)["size"])

    def put(self, name: str, data: bytes) -> None:
        """Write or replace, whole."""
        with self._readable_errors(name):
            self._obstore.put(self._store, name, data, use_multipart=False)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write with If-None-Match: *; False when something is there."""
        from obstore.exceptions import AlreadyExistsError

        with self._readable_errors(name):
            try:
                self._obstore.put(self._store, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        """Names of all objects below a folder; "" for all."""
        with self._readable_errors(prefix):
            for chunk in self._obstore.list(self._store, prefix=prefix or None):
                yield from (str(meta["path"]) for meta in chunk)

    def delete(self, name: str) -> None:
        """Remove an object."""
        with self._readable_errors(name):
            self._obstore.delete(self._store, name)

    @contextlib.contextmanager
    def _readable_errors(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no {self._url}/{name}") from error
        except (BaseError, OSError) as error:
            raise OSError(f"{_first_line(error)} ({_HINTS[self._scheme]})") from error


class ObjectStorage:
    """A Storage below a prefix of an object store; commits are conditional puts (If-None-Match)."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._client, self._prefix = client_of(url)

    @property
    def url(self) -> str:
        return self._url

    def read(self, name: str) -> bytes:
        with self._store_errors("read", name):
            return self._client.get(self._name(name))

    def exists(self, name: str) -> bool:
        with self._store_errors("read", name):
            try:
                self._client.head(self._name(name))
            except FileNotFoundError:
                return False
        return True

    def put(self, name: str, data: bytes) -> None:
        with self._store_errors("write", name):
            self._client.put(self._name(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._store_errors("write", name):
            return self._client.put_if_absent(self._name(name), data)

    def list(self, prefix: str) -> list[str]:
        skip = len(self._prefix) + 1 if self._prefix else 0
        with self._store_errors("list", prefix):
            return sorted(name[skip:] for name in self._client.list(self._name(prefix)))

    def delete(self, name: str) -> None:
        with self._store_errors("delete", name), contextlib.suppress(FileNotFoundError):
            self._client.delete(self._name(name))

    def _name(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextlib.contextmanager
    def _store_errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if verb == "read" and isinstance(error, FileNotFoundError):
                raise
            # The client has retried for a minute; a unit may still be luckier later, so it is not the job's end.
            raise UnitError(f"cannot {verb} {self._url}/{name}: {error}") from error


def _first_line(error: Exception) -> str:
    """Obstore adds a dump of its own objects below."""
    return (str(error).splitlines() or [type(error).__name__])[0]
