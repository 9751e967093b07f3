"""The one error a user is meant to see: a sentence that says what was wrong, with which value, and the remedy."""


class LutqError(ValueError):
    """Bad input or environment. The command line prints it without a traceback and exits with code 2."""
