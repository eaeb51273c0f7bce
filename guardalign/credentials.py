"""Addresses in settings: one that holds what could be a secret is refused, for settings enter run.json and sentences.

Knows nothing of what an address leads to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from guardalign.errors import require

_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://.+", re.DOTALL)
_TEXTS: Final = re.compile(r"(^|[._])(prompt|prefix|instruction|(judge|caption|answer|verdict)_template)$")
"""settings that hold words for a model: an address among them is quoted, unless the text is nothing else"""
_CHAIN: Final = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::|$))")
"""between the file systems of a chain; a password may hold two colons"""
_PASSWORD: Final = re.compile(r"[^/@:]*:(?!\d+(/|$))[^@]*@")
"""USER:PASSWORD@ at the beginning; HOST:9000/ is none, and a password may hold a slash"""
_KEY: Final = re.compile(r"[?#&;][^/=&]*(signature|token|sig|key|password|secret)=", re.IGNORECASE)
"""a part of a query that is a key; a slash before it is a folder like ?/key=3, which a glob may name"""
_WEB: Final = ("http", "https")
_COLON_IS_PLAIN: Final = ("github",)
"""protocols that write OWNER:REPOSITORY@COMMIT"""


def refuse_credentials(setting: str, address: str) -> None:
    """`ConfigError`, which does not repeat the address, where it holds a password, or a web address a user or a query.

    A user without a password may stay where it is no secret: abfs://CONTAINER@ACCOUNT, sftp://USER@HOST. Under other
    protocols "?" may belong to a glob, so a query is refused there by the names that keys have.
    """
    for link in _CHAIN.split(address):
        protocol, _, rest = link.strip().partition("://")
        protocol = protocol.lower()
        user_in_web = protocol in _WEB and "@" in re.split(r"[/?#\\]", rest)[0]
        password = bool(protocol) and protocol not in _COLON_IS_PLAIN and _PASSWORD.match(rest) is not None
        advice = "credentials belong into the environment, or into the file system's own configuration"
        require(not (user_in_web or password), f"{setting} must hold neither user nor password: {advice}")
        query = _KEY.search(rest) is not None or (protocol in _WEB and re.search("[?#]", rest) is not None)
        require(not query, f"{setting} must not hold a query, which may be a key: {advice}")


def refuse_credentials_in(settings: Mapping[str, Any], above: str = "") -> None:
    """`refuse_credentials` for every address among nested settings, blanks around or within it or not."""
    for setting, value in _strings(settings, above):
        address = value.strip()
        quoted = _TEXTS.search(setting) is not None and len(address.split()) > 1
        if _ADDRESS.fullmatch(address) and not quoted:
            refuse_credentials(setting, address)


def _strings(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part, name)
