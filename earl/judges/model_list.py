"""What a server says it has: its list of models, ``GET /models``, in the several forms that servers give to it."""

import asyncio
from typing import Any

from earl.judges import transport
from earl.judges.transport import Busy, Failure, Page, Slow, Unreachable
from earl.messages.errors import EarlError


def names(listing: Any) -> list[str]:
    """Return the names of the models in a listing; none where it is of another form."""
    found = [entry.get("id", entry.get("name")) if isinstance(entry, dict) else entry for entry in _entries(listing)]
    return [name for name in found if isinstance(name, str)]


def has(listing: Any, model: str) -> bool:
    """Return whether a listing has a model by its name, with or without a folder before it."""
    return any(name == model or name.endswith(f"/{model}") for name in names(listing))


def is_vllm(listing: Any) -> bool:
    """Return whether vLLM wrote a listing."""
    return any(isinstance(entry, dict) and entry.get("owned_by") == "vllm" for entry in _entries(listing))


def shown(listing: Any) -> str:
    """Return the first names in a listing, for a person to read."""
    return ", ".join(names(listing)[:10]) or "no model"


def _entries(listing: Any) -> list[Any]:
    entries = listing.get("data", listing.get("models")) if isinstance(listing, dict) else listing
    return entries if isinstance(entries, list) else []


async def check_kind(url: str, error: Failure) -> None:
    """Raise where what a server says to begin with shows that it is another one, and will stay so.

    Raises:
        EarlError: a web page, or a server that speaks https.
    """
    if isinstance(error, Page):
        raise EarlError(
            f"{url}/models: a web page came instead of data ({error}): a login page, or another server? "
            "check reward_function_api_base"
        ) from error
    if url and not isinstance(error, Busy | Slow | Unreachable) and await transport.expects_tls(url):
        raise EarlError(f"{url}: the server speaks https; write https:// into reward_function_api_base") from error


def listed(url: str, seconds: float = 10.0) -> str:
    """Return the names of the models that the server at an address has, for a person to read.

    Raises:
        EarlError: why it does not say.
    """

    async def ask() -> Any:
        async with transport.client(1) as client:
            return await transport.fetch(client, "GET", f"{url}/models", seconds)

    try:
        return ", ".join(names(asyncio.run(ask()))) or "no model"
    except Failure as error:
        raise EarlError(f"{url}/models: {error}") from error
