"""One request to a server: bounded in time and space, and every way in which it may fail told apart.

`Busy` says nothing about what was asked, `Faulty` may go well another time, `Refused` will not. What would befall every
request is an `earl.messages.errors.EarlError`.
"""

import asyncio
import json
import re
import ssl
import zlib
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from earl.config import address
from earl.messages import network
from earl.messages.errors import EarlError
from earl.messages.redaction import redacted

if TYPE_CHECKING:
    import httpx2

LARGEST = 8 * 2**20
"""Bytes of a response that are read at most; a response with log-probabilities has up to 1 MiB."""
SHOWN, KEPT = 300, 4000
"""Characters of a server's words that a message shows, and bytes of them that are looked at."""
ANSWER = {200, 201, 202, 203}
"""HTTP statuses that come with an answer."""
BUSY = {429, 502, 503, 504, 529}
"""HTTP statuses that say: not now."""
AGAIN = {408, 409, 425}
"""HTTP statuses below 500 that may pass by themselves."""
PAYMENT = 402
"""HTTP status of an account without money, whatever status its server gives."""
EVERYONE = {401, PAYMENT, 403, 404, 405, 407}
"""HTTP statuses that every question would meet."""
ACCOUNT = {401, PAYMENT, 407}
"""Those of them that are about the key or the account."""
FORM = {400, 415, 422, 501}
"""HTTP statuses that a request gets for its form."""
_NO_MONEY = re.compile(r"insufficient[_ ](quota|balance|credits?|funds)|exceeded your current quota", re.IGNORECASE)
LONGEST_WISH = 24 * 3600.0
"""Seconds of the longest wait that a server is believed to mean."""


class Failure(Exception):
    """A request without the response that was wanted. The message holds no secrets."""

    def __init__(self, message: str, status: int | None = None, wish: float | None = None, said: str = "") -> None:
        super().__init__(redacted(message))
        self.status = status
        self.wish = wish
        """Seconds after which the server wants to be asked again, where it says so."""
        self.said = said
        """All that the server said, as far as it is kept."""


class Busy(Failure):
    """The server has no time."""


class Faulty(Failure):
    """Something that may go well when it is tried again."""


class Slow(Faulty):
    """No whole response in time."""


class Unreachable(Faulty):
    """No connection at all."""


class Page(Faulty):
    """A web page where data should be."""


class Refused(Failure):
    """The server does not take this request."""


def client(connections: int) -> "httpx2.AsyncClient":
    """Return a client for so many connections, with the judge server's key.

    Raises:
        EarlError: the key cannot be sent, or a proxy cannot be used.
    """
    import httpx2

    network.check_proxies()
    key = address.key()
    return httpx2.AsyncClient(
        # Uncompressed, so that what is read is no larger than what was sent.
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        # The whole try is timed, in `fetch`: these would start anew with every byte.
        timeout=None,
        follow_redirects=False,
    )


async def fetch(client: "httpx2.AsyncClient", method: str, url: str, seconds: float, body: dict | None = None) -> Any:
    """Return the JSON of a response.

    Raises:
        Failure: of one of its kinds.
        EarlError: every request would fail: the certificate, a redirection.
    """
    import httpx2

    try:
        async with asyncio.timeout(seconds), client.stream(method, url, json=body) as response:
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > LARGEST:
                    raise Faulty(f"the response has more than {LARGEST} bytes")
    except TimeoutError as error:
        raise Slow(f"no whole response within {seconds:g} s") from error
    except (httpx2.ConnectError, httpx2.ProxyError) as error:
        if why := network.hopeless(error):
            raise EarlError(f"{url}: {why}; check reward_function_api_base") from error
        raise Unreachable(f"no connection: {network.reason(error)}") from error
    except (httpx2.TransportError, ssl.SSLError) as error:
        raise Faulty(f"broken connection: {type(error).__name__}: {error}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    return _content(response, _unpacked(bytes(data), response.headers.get("Content-Encoding", "")), url)


async def expects_tls(url: str) -> bool:
    """Return whether an http:// address leads to a server that speaks https."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        return False
    return await asyncio.to_thread(network.speaks_tls, parts.hostname, parts.port or 80)


def failed(status: int, said: str, wish: float | None = None) -> Failure:
    """Return what a status without an answer means; ``said`` are the server's words."""
    if status == PAYMENT or (status in (400, 403, 429) and _NO_MONEY.search(said)):
        return Refused(f"HTTP {status}: {said[:SHOWN]}", PAYMENT, wish, said)
    kind = Busy if status in BUSY else Faulty if (status >= 500 and status not in FORM) or status in AGAIN else Refused
    return kind(f"HTTP {status}: {said[:SHOWN]}", status, wish, said)


def everyone(url: str, refusal: Refused) -> EarlError:
    """Return the error for what every question would meet."""
    if refusal.status == PAYMENT:
        return EarlError(
            f"{url}: {refusal}; pay for more, or ask with the key of another account ({address.KEY}); what the server "
            "answered before is kept"
        )
    return EarlError(
        f"{url}: {refusal}; check reward_function_api_base, reward_function_api_model_name and the environment "
        f"variable {address.KEY}"
    )


def _content(response: "httpx2.Response", data: bytes, url: str) -> Any:
    status, said = response.status_code, redacted(data[:KEPT].decode(errors="replace"))
    if 300 <= status < 400:
        to = response.headers.get("Location", "").partition("?")[0]
        raise EarlError(
            f"{url}: HTTP {status}, which leads to {to or 'nowhere'}: a login page, or another address? "
            "check reward_function_api_base"
        )
    if status not in ANSWER:
        raise failed(status, said, _wish(response))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        if status != 200:
            raise failed(status, said, _wish(response)) from error
        is_page = re.match(r"\s*<(!doctype|html|\?xml|head|body)", said, re.IGNORECASE)
        raise (Page if is_page else Faulty)(f"the response is not JSON: {said[:100]!r}") from error


def _unpacked(data: bytes, encoding: str) -> bytes:
    """Undo gzip or deflate, of servers that compress although they were asked not to."""
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        return data
    unpacking = zlib.decompressobj(wbits=47)
    try:
        content = unpacking.decompress(data, LARGEST + 1)
    except zlib.error as error:
        raise Faulty(f"the response is not {encoding}: {error}") from error
    if len(content) > LARGEST:
        raise Faulty(f"the response has more than {LARGEST} bytes")
    if not unpacking.eof:
        raise Faulty("the response is cut off")
    return content


def _wish(response: "httpx2.Response") -> float | None:
    """Seconds until the server wants to be asked again: ``Retry-After`` as seconds or date, or the same in ms."""
    said = response.headers.get("Retry-After", "")
    try:
        seconds = float(said) if "retry-after-ms" not in response.headers else _milliseconds(response)
    except ValueError:
        try:
            # By the server's own clock, where it tells the time.
            now = response.headers.get("Date")
            since = parsedate_to_datetime(now) if now else datetime.now(UTC)
            seconds = (parsedate_to_datetime(said) - since).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_WISH) if abs(seconds) < 1e9 else None


def _milliseconds(response: "httpx2.Response") -> float:
    return float(response.headers["retry-after-ms"]) / 1000
