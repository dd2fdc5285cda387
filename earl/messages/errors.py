"""The one exception for mistakes that a user can mend."""

from earl.messages.redaction import redacted


class EarlError(Exception):
    """Bad input, configuration or state. The message names the file, the field and the remedy.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback. Keys and passwords in the
    message are hidden, wherever it is written.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))
