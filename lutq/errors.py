"""What a user is meant to see: sentences that say what was wrong, with which value, and the remedy."""


class LutqError(ValueError):
    """Bad input or environment. The command line prints it without a traceback and exits with code 2."""


class LutqWarning(UserWarning):
    """What runs, but not as fast as it might. The command line prints the sentence alone."""
