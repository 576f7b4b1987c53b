"""Numbers of bytes in words, in one convention everywhere: binary units, with a decimal."""


def readable_bytes(num_bytes: int) -> str:
    """A number of bytes in the largest binary unit in which it is at least 1.

    Example:
        >>> readable_bytes(640), readable_bytes(188_743_680)
        ('640 B', '180.0 MiB')
    """
    size, units = float(num_bytes), iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "B"
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def written_round(num_bytes: float) -> str:
    """`readable_bytes` of a tick of an axis, without a decimal that is 0.

    Example:
        >>> written_round(2.0**21), written_round(1536.0)
        ('2 MiB', '1.5 KiB')
    """
    return readable_bytes(round(num_bytes)).replace(".0 ", " ")


def unit_of(num_bytes: int) -> int:
    """The binary unit that `readable_bytes` writes a number in.

    Example:
        >>> unit_of(640), unit_of(188_743_680)
        (1, 1048576)
    """
    return 1 << 10 * min(4, max(0, num_bytes.bit_length() - 1) // 10)
