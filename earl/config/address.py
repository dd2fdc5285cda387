"""Where a judge server is and with which key it is asked.

`reward_function_api_base` is a URL, or a file that holds one, so that a run can be started before its server, on
another machine, without knowing where that will be.
"""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from earl.messages.errors import EarlError

DEFAULT_PORT = 4877
KEY = "EARL_JUDGE_API_KEY"
"""Environment variable with the server's key, if it wants one; never part of a configuration."""
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):\d{1,5}(/\S*)?")
_ENDPOINT = re.compile(r"/(chat/completions|completions|models)$")
_VERSION = re.compile(r"/v\d+[a-z0-9.]*(/|$)")


def key() -> str | None:
    """Return the judge server's key, white space around it left out; None where there is none.

    Raises:
        EarlError: it holds what no header can; the key itself is not shown.
    """
    found = os.environ.get(KEY, "").strip()
    wrong = next((index for index, one in enumerate(found) if not "!" <= one <= "~"), None)
    if wrong is not None:
        kind = "a line break" if found[wrong] in "\r\n" else "no printable ASCII character"
        raise EarlError(
            f"environment variable {KEY}: character {wrong + 1} is {kind}; a key is one line of ASCII without spaces"
        )
    return found or None


def check(api_base: str) -> None:
    """Look at a configured address without asking anyone.

    Raises:
        ValueError: it is no address, and cannot be meant as a file.
    """
    if not api_base.strip():
        raise ValueError("is empty; give the judge server's address, http://host:port, or a file that holds it")
    if _is_url(api_base):
        if "@" in urlsplit(api_base).netloc:
            raise ValueError(
                "holds a password, which would stand in the run's config.json; write the address into a file that "
                f"only you can read and give its path, or set {KEY} instead"
            )
        _versioned(api_base)
    elif _HOST_AND_PORT.fullmatch(api_base) and not Path(api_base).exists():
        raise ValueError(f"is {api_base!r}, which has no scheme; write http://{api_base}")


def resolve(api_base: str) -> str | None:
    """Return the URL below which ``/chat/completions`` lies; None while the file that is to hold it is not there.

    A path with a version in it (``/v1``, ``/api/v3``, ``/v1beta/openai``) is taken as it is; to any other, and where
    there is none, ``/v1`` is added. The endpoint itself may be given, too.

    Args:
        api_base: A URL, or the path of a file that holds one, ``host:port`` or ``host``.

    Raises:
        EarlError: the address, or what the file holds, is none.
    """
    try:
        if _is_url(api_base):
            return _versioned(api_base)
        check(api_base)
    except ValueError as error:
        raise EarlError(f"reward_function_api_base {api_base}: {error}") from error
    try:
        text = Path(api_base).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise EarlError(f"{api_base}: cannot be read ({error}); it should hold the judge server's address") from error
    if not text:
        return None
    if len(text.split()) != 1 or len(text) > 500:
        raise EarlError(f"{api_base}: should hold the judge server's address alone, as http://host:port or host:port")
    try:
        return _versioned(text if _is_url(text) else f"http://{_with_port(text)}")
    except ValueError as error:
        raise EarlError(f"{api_base}: the address in it {error}") from error


def in_url(host: str) -> str:
    """Return a host as it stands in a URL: an IPv6 address in brackets."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def _is_url(text: str) -> bool:
    return "://" in text or text.lower().startswith(("http:", "https:"))


def _with_port(text: str) -> str:
    """Add the port to a host that comes without one."""
    host = in_url(text)
    return host if ":" in host.rpartition("]")[2] else f"{host}:{DEFAULT_PORT}"


def _versioned(url: str) -> str:
    """Return an address with the version of the API; `ValueError` where it is none."""
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError(f"begins with {parts.scheme}:, but should begin with http:// or https://")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if port == -1 or not parts.hostname or re.search(r"\s", url) or parts.netloc.rpartition("@")[2].startswith(":"):
        raise ValueError(
            "is no address of the form http://host:port; an IPv6 address stands in brackets: http://[::1]:8000"
        )
    if parts.query or parts.fragment:
        raise ValueError("has a query (?...) or fragment (#...), to which no path can be added; leave it out")
    path = _ENDPOINT.sub("", parts.path.rstrip("/")).rstrip("/")
    return f"{parts.scheme.lower()}://{parts.netloc}{path}" + ("" if _VERSION.search(path) else "/v1")
