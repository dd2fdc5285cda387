"""Whether the judge answers."""

from earl.doctor.wanted import Wanted
from earl.messages.errors import EarlError


def check(wanted: Wanted) -> tuple[bool | None, str]:
    """Ask the judge's server which models it has."""
    if wanted.judge is None:
        return None, "no address was given"
    from earl.config import address
    from earl.judges import model_list

    try:
        url = address.resolve(wanted.judge)
        if url is None:
            return False, f"{wanted.judge}: the file is not there yet; start one with `earl judge serve`"
        return True, f"{url}: {model_list.listed(url)}"
    except EarlError as error:
        return False, str(error)
