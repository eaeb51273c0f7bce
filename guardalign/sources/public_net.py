"""Which network addresses belong to the public net, and looking a name up in limited time.

Stricter than `ipaddress.is_global`, which differs between Python's minor versions and lets multicast through. A
network's own NAT64 prefix (RFC 6052) cannot be told from any other public address.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import threading
from collections.abc import Callable
from typing import Final

UNASKED: Final = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
"""addresses that Python calls global, and that lead to a cloud's own services or to nobody"""
GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
NOT_UNICAST: Final = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
"""within `GLOBAL_UNICAST`: special purposes (Teredo among them) and documentation"""


def is_public(address: str) -> bool:
    """Whether `address` is a machine of the public net, also where IPv6 wraps IPv4 (mapped, 6to4, NAT64)."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return _is_public_v4(found)
    if found.scope_id is not None:
        return False
    wrapped = found.ipv4_mapped or found.sixtofour
    if wrapped is None and found in NAT64:
        wrapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if wrapped is not None:
        return _is_public_v4(wrapped)
    return found.is_global and found in GLOBAL_UNICAST and not any(found in network for network in NOT_UNICAST)


def _is_public_v4(address: ipaddress.IPv4Address) -> bool:
    return address.is_global and not address.is_multicast and not any(address in network for network in UNASKED)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host` in the order in which they should be tried; `OSError` without any."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def within(seconds: float, lookup: Callable[[], list[str]]) -> list[str]:
    """`lookup()` in a thread that is left alone when it is late, since a lookup cannot be stopped."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(lookup())
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer
