"""The package's own errors: each message says what is wrong, where, what was expected and how to mend it."""


class MiniClipError(Exception):
    """Base of all errors that the package raises for its user's input."""


class DataError(MiniClipError, ValueError):
    """A data set, a caption file or an image is not as expected."""


class UsageError(MiniClipError, ValueError):
    """A flag, a recipe key or a combination of them is wrong."""
