"""The one exception for mistakes that a user can mend."""


class EarlError(Exception):
    """Bad input, configuration or state. The message names the file, the field and the remedy.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback.
    """
