"""Text from elsewhere, made fit to be stored: JSON and file names may hold halves of surrogate pairs, no file may."""


def encodable(text: str) -> str:
    """Return a text that UTF-8 can hold: pairs of surrogates become their character, halves U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
