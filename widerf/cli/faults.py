"""What a user's words, files and models can bring about, and how it is told."""

# Not TypeError: that is a fault of ours, and shows its place.
EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, MemoryError)


def in_a_line(error: BaseException) -> str:
    r"""Return the whole reason of an error, in one line.

    Example:
        >>> in_a_line(ValueError("two\nlines")), in_a_line(MemoryError())
        ('two lines', 'MemoryError')
    """
    return " ".join(str(error).split()) or type(error).__name__
