"""What every client here does alike: a proxy that cannot work is named before it is used, and a failure is one line."""

import json
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from earl.messages.errors import EarlError

PROXIES = tuple(name for one in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY") for name in (one, one.lower()))
"""Environment variables that send requests through a proxy."""
CHECK_HUB = "check the name, the network (HF_ENDPOINT and proxies included) and the token (`hf auth whoami`)"
NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
"""What OpenSSL, in its several versions, says to a server that answers without TLS."""


def check_proxies() -> None:
    """Raise where a proxy that the environment names cannot be used.

    Raises:
        EarlError: naming the variable and the remedy.
    """
    import httpx2

    try:
        httpx2.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)).close()
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        socks = isinstance(error, ImportError)
        names = [name for name in PROXIES if os.environ.get(name)]
        if socks:
            names = [name for name in names if os.environ[name].lower().startswith("socks")]
        given = ", ".join(f"{name}={os.environ[name]}" for name in names)
        remedy = "pip install 'httpx2[socks]'" if socks else "give it as http://host:port"
        what = "a SOCKS proxy, for which a package is missing" if socks else f"no proxy that can be used ({error})"
        raise EarlError(f"the environment names {what}: {given}; {remedy}, or unset the variable") from error


def hopeless(error: BaseException) -> str | None:
    """Return why a connection will fail every time, or None where it may go well later."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = getattr(cause, "verify_message", cause)
            return (
                f"its certificate is not trusted ({why}); set SSL_CERT_FILE to a file with the "
                "certificate of the authority that signed it"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in NO_TLS:
            return "nothing speaks https at this port; an http:// address?"
    return None


def speaks_tls(host: str, port: int) -> bool:
    """Return whether a server that gives no answer to http expects https; takes up to 5 seconds."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), 5) as plain, context.wrap_socket(plain, server_hostname=host):
            return True
    except (OSError, ValueError):
        return False


def reason(error: BaseException) -> str:
    """Return what went wrong as one line, by the first of its causes that says it."""
    if found := hopeless(error):
        return found
    causes = list(_causes(error))
    if any(isinstance(cause, UnicodeEncodeError) for cause in causes):
        return "the token or the address holds what is not ASCII"
    if any(isinstance(cause, json.JSONDecodeError) for cause in causes):
        return "the answer is no JSON: a login page, or another server?"
    said = [" ".join(str(cause).split()) or type(cause).__name__ for cause in (causes[0], causes[-1])]
    return said[0] if said[1] in said[0] else f"{said[0]} ({said[1]})"


@contextmanager
def failures(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a client of the hub raises into one line.

    Raises:
        EarlError: ``<what>: <reason>; <remedy>``.
    """
    import httpx2

    try:
        yield
    except (ImportError, OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        check_proxies()
        raise EarlError(f"{what}: {reason(error)}; {remedy}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
