"""One picture by a web address that stands in the data, and so may be hostile.

Only http and https, ports 80 and 443, public addresses. A host is looked up once an attempt, every address found is
checked, and the connection goes to a checked one, so that a second lookup cannot lead elsewhere; the certificate is
checked for the name. Redirects are followed a few times, each checked afresh. Nothing is sent along but the request:
no cookies, no credentials, and no proxy of the environment is used, since a proxy looks the name up by itself.

Knows nothing of rows, and nothing of what the bytes hold. No sentence here repeats an address: it may hold a secret.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from typing import Final
from urllib.parse import urljoin

import certifi
from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from guardalign.errors import ErrorKind, RowError
from guardalign.sources.public_net import is_public, resolve, within
from guardalign.version import VERSION

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
PORTS: Final = frozenset(DEFAULT_PORTS.values())
"""other ports belong to other services"""
MOST_REDIRECTS: Final = 3
ATTEMPTS: Final = 3
FIRST_WAIT: Final = 0.5
"""before the second attempt; it doubles [s]"""
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
PASSING: Final = frozenset({429, 500, 502, 503, 504})
"""answers that may be others a second later"""
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)
"""its warnings of odd headers repeat the whole address"""
_HEADERS: Final = {"User-Agent": f"guardalign/{VERSION}", "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"}
_PIECE: Final = 2**16


@dataclass(frozen=True, slots=True)
class WebLimits:
    """What one picture from the web may cost."""

    seconds: float
    """from the lookup to the last byte, redirects and further attempts included [s]"""
    most_bytes: int
    """of its file [bytes]"""


def is_url(reference: str) -> bool:
    """Whether a picture is named by a web address."""
    return re.match(r"https?://", reference, re.IGNORECASE) is not None


def fetch(url: str, sample_id: str, limits: WebLimits) -> bytes:
    """The encoded picture. Raises `RowError` ("image_missing", "image_too_large") where there is none to be had."""
    visit = _Visit(time.monotonic() + limits.seconds, limits)
    try:
        target = _target(url)
        for _ in range(MOST_REDIRECTS + 1):
            found = _patiently(target, visit)
            if isinstance(found, bytes):
                return found
            target = found
        raise _NoPictureError(f"is redirected more than {MOST_REDIRECTS} times")
    except _NoPictureError as reason:
        raise RowError(reason.kind, f"the picture of sample {sample_id} {reason}") from None


class _NoPictureError(Exception):
    """There will be no picture; the text goes on after "the picture of sample a17 "."""

    def __init__(self, text: str, kind: ErrorKind = "image_missing") -> None:
        super().__init__(text)
        self.kind = kind


class _PassingError(_NoPictureError):
    """Another attempt may fare better."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """One fetch under way."""

    deadline: float
    """on the monotonic clock [s]"""
    limits: WebLimits

    @property
    def left(self) -> float:
        """Seconds until the deadline; `_NoPictureError` once it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise _NoPictureError(f"did not arrive within {self.limits.seconds:g} s")
        return left

    def require_time(self) -> None:
        """`_NoPictureError` once the deadline has passed, which then is the reason of whatever went wrong."""
        _ = self.left


@dataclass(frozen=True, slots=True)
class _Target:
    """An address taken apart once; everything else works with the parts."""

    scheme: str
    host: str
    port: int
    path: str
    """with the query"""
    url: str
    """what a relative redirect is relative to"""

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def _target(url: str) -> _Target:
    try:
        parts = parse_url(url)
    except (HTTPError, ValueError):
        raise _NoPictureError("is named by a web address that is none") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise _NoPictureError("is redirected to something else than http or https")
    if parts.auth is not None:
        raise _NoPictureError("is named by a web address with a user in it; credentials in data are not used")
    host = (parts.host or "").removeprefix("[").removesuffix("]")
    if not host or "%" in host:
        raise _NoPictureError("is named by a web address without a proper host")
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    if port not in PORTS:
        raise _NoPictureError("is named by a web address with a port other than 80 and 443")
    return _Target(parts.scheme, host, port, parts.request_uri, parts.url)


def _patiently(target: _Target, visit: _Visit) -> bytes | _Target:
    """The picture or where it is said to be; what may pass is tried again within the deadline."""
    wait = FIRST_WAIT
    for _ in range(ATTEMPTS - 1):
        try:
            return _attempt(target, visit)
        except _PassingError:
            if visit.left <= wait:
                raise
        time.sleep(wait)
        wait *= 2
    return _attempt(target, visit)


def _attempt(target: _Target, visit: _Visit) -> bytes | _Target:
    addresses = _checked_addresses(target, visit)
    try:
        with _connected(target, addresses, visit) as connection:
            connection.request(
                "GET",
                target.path,
                headers=_HEADERS | {"Host": target.host_header},
                preload_content=False,
                decode_content=False,
            )
            return _read(connection.getresponse(), target, visit)
    except ssl.SSLCertVerificationError:
        raise _NoPictureError("is on a server without a valid certificate for its name") from None
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        visit.require_time()
        raise _PassingError(f"could not be fetched ({type(error).__name__})") from None


def _checked_addresses(target: _Target, visit: _Visit) -> list[str]:
    try:
        found = within(visit.left, lambda: resolve(target.host, target.port))
    except (OSError, UnicodeError):
        visit.require_time()
        raise _PassingError("is on a host whose name leads nowhere") from None
    if not found or not all(is_public(address) for address in found):
        raise _NoPictureError("is at a private or local address; those are never asked")
    return found


@contextmanager
def _connected(target: _Target, addresses: list[str], visit: _Visit) -> Iterator[HTTPConnection]:
    """A connection to the first address that takes one; it is cut off at the deadline, however slowly bytes drip in."""
    connection = _connect(target, addresses, visit)
    opened = connection.sock
    assert opened is not None
    try:
        timer = threading.Timer(visit.left, _shut, [opened])
        timer.daemon = True
        timer.start()
        try:
            connection.timeout = visit.left + 1  # for every wait from here on: the timer comes first
            yield connection
        finally:
            timer.cancel()
    finally:
        connection.close()
        opened.close()


def _connect(target: _Target, addresses: list[str], visit: _Visit) -> HTTPConnection:
    for address in addresses[:-1]:
        connection = _connection(target, address, visit)
        try:
            connection.connect()
            return connection
        except (HTTPError, OSError):
            connection.close()
    connection = _connection(target, addresses[-1], visit)
    connection.connect()
    return connection


def _connection(target: _Target, address: str, visit: _Visit) -> HTTPConnection:
    patience = visit.left / 2  # an address that swallows everything leaves time for another
    if target.scheme == "http":
        return HTTPConnection(address, target.port, timeout=patience)
    name = target.host.rstrip(".")
    return HTTPSConnection(address, target.port, timeout=patience, ssl_context=_trust(), server_hostname=name)


@lru_cache(maxsize=1)
def _trust() -> ssl.SSLContext:
    """Certificates of this machine and of certifi; names are checked."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _shut(opened: socket.socket) -> None:
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _read(response: HTTPResponse, target: _Target, visit: _Visit) -> bytes | _Target:
    status = response.status
    if status in REDIRECTS:
        return _redirected(target, response.headers.get("Location"))
    if status != 200:
        trouble = _PassingError if status in PASSING else _NoPictureError
        raise trouble(f"could not be fetched: the server answered {status}")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise _NoPictureError("comes compressed, which was not asked for")
    return _body(response, visit)


def _redirected(target: _Target, location: str | None) -> _Target:
    if not location:
        raise _NoPictureError("is redirected to nowhere")
    try:
        joined = urljoin(target.url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    except ValueError:
        raise _NoPictureError("is redirected to a web address that is none") from None
    found = _target(joined)
    if (target.scheme, found.scheme) == ("https", "http"):
        raise _NoPictureError("is redirected from https to http")
    return found


def _body(response: HTTPResponse, visit: _Visit) -> bytes:
    most = visit.limits.most_bytes
    too_large = _NoPictureError(f"is larger than input.url_bytes allows ({most:,} bytes)", "image_too_large")
    if (response.length_remaining or 0) > most:
        raise too_large
    pieces, size = [], 0
    for piece in response.stream(_PIECE, decode_content=False):
        size += len(piece)
        if size > most:
            raise too_large
        visit.require_time()
        pieces.append(piece)
    visit.require_time()  # a body without a length ends where the connection was cut off
    return b"".join(pieces)
