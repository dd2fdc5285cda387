"""Keys and passwords do not leave this process in words: one function, applied wherever words leave.

`earl.messages.errors.EarlError` applies it to its message, `earl.messages.console` to what goes to standard error, and
the judge's client to the errors that are kept beside scores.
"""

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

HIDDEN = "[hidden]"
VARIABLES = ("EARL_JUDGE_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secrets."""
SHORTEST = 4
"""Characters of the shortest secret that is looked for; a shorter one would be found in every other word."""
_PATTERNS = (
    # user:password@ in an address; a password may hold an unescaped slash, but a port that ends in one is a port.
    re.compile(r"(?<=://)(?:[^\s/?#@:]*:(?!\d+[/\s]))\S*(?=@)"),
    re.compile(r"(?<=://)[^\s/?#]+(?=@)"),
    re.compile(r"(?i)(?<=[?&])((?:api[-_]?)?key|(?:access[-_]?)?token|password|sig(?:nature)?)=[^\s&#'\"]+"),
    re.compile(r"(?i)(?<=\bbearer )(?=\S*\d)[A-Z0-9._~+/-]{16,}=*"),
    # JSON web tokens
    re.compile(r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]{8,}){1,4}"),
    re.compile(
        r"(?<![A-Za-z0-9])(?:"
        r"(?:hf_|gsk_|gh[oprsu]_)[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"  # Hugging Face, Groq, GitHub
        # OpenAI and others; names that people give have no capitals and digits, nor a part as long.
        r"|(?:sk|xai|nvapi|pplx)-(?=[\w-]*\d)(?=[\w-]*(?:[A-Z]|[a-z0-9]{16}))[A-Za-z0-9_-]{16,}"
        r"|AIza[A-Za-z0-9_-]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]))"  # Google, AWS
    ),
)


def redacted(text: str) -> str:
    """Return ``text`` with `HIDDEN` in the place of secrets.

    Secrets are the values of `VARIABLES`, whole, in parts where they hold white space, and escaped as Python, JSON and
    addresses do; passwords and keys in addresses; and what has the form of a key of well-known services.
    """
    for form in sorted(_forms(), key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda found: f"{found[1]}={HIDDEN}" if found.re.groups else HIDDEN, text)
    return text


def _forms() -> set[str]:
    secrets = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
    parts = {part for secret in secrets for part in (secret, secret.strip(), *secret.split()) if len(part) >= SHORTEST}
    return {form for part in parts for form in _spellings(part)}


def _spellings(secret: str) -> Iterator[str]:
    data = secret.encode("utf-8", "surrogateescape")
    yield secret
    yield repr(secret)[1:-1]
    yield ascii(secret)[1:-1]
    yield repr(data)[2:-1]
    yield json.dumps(secret)[1:-1]
    yield quote(data)
    yield quote(data, safe="")
