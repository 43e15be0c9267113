"""Bytes from an address that a client names, without letting it reach what only this machine can.

A host has to be allowed by name (``audio-llm serve --allow-hosts``), and its name has to mean a public address at the
moment of the connection; a literal address of a private network is fetched where that very address is allowed. Nobody
is redirected, nothing is unpacked, and time and size have an end.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from audio_llm.errors import AudioLLMError


class FetchError(AudioLLMError):
    """Nothing came from an address; the message is for the log, clients are told less."""


class HostNotAllowed(AudioLLMError):
    """An address whose host is not among those that may be asked."""


def check_address(url: str, hosts: Collection[str]) -> SplitResult:
    """The parts of `url`, or :class:`HostNotAllowed`: another scheme or host, a name or password in it."""
    try:
        parts = urlsplit(url)
        host, odd = (parts.hostname or "").rstrip("."), parts.port == 0 or "@" in parts.netloc or "\\" in url
    except ValueError as error:
        raise HostNotAllowed("not an address") from error
    if parts.scheme not in ("http", "https") or odd or not url.isprintable() or " " in url or host not in hosts:
        raise HostNotAllowed("not one of the hosts that may be asked")
    return parts


def is_public(address: str) -> bool:
    """Whether an address is one of the public network: not loopback, private, link-local, multicast or reserved, in
    IPv4, IPv6 or one inside the other (mapped, 6to4, Teredo, NAT64)."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast and not found.is_reserved


class PublicResolver(AbstractResolver):
    """Names of public addresses only: asked for each connection, whose addresses are then those that were looked at."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await aiohttp.ThreadedResolver().resolve(host, port, family)
        if not found or not all(is_public(entry["host"]) for entry in found):
            raise OSError("a name of the private network")
        return found

    async def close(self) -> None:
        """Nothing is kept open."""


async def fetch(url: str, hosts: Collection[str], max_bytes: int, seconds: float) -> bytes:
    """The body of a reply with status 200. Raises :class:`HostNotAllowed`, and :class:`FetchError` for all else."""
    check_address(url, hosts)
    connector = aiohttp.TCPConnector(resolver=PublicResolver(), force_close=True, use_dns_cache=False)
    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False, auto_decompress=False) as web,
            web.get(url, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as reply,
        ):
            if reply.status != 200:
                raise FetchError(f"HTTP {reply.status}")
            body = bytearray()
            async for part in reply.content.iter_chunked(2**16):
                body += part
                if len(body) > max_bytes:
                    raise FetchError(f"more than {max_bytes} bytes")
            return bytes(body)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchError(f"{type(error).__name__}: {error}") from error
