"""Reading what the kernel tells in /proc and /sys: None where it does not tell. Takes the standard library only."""

from pathlib import Path

ROOT = Path("/")


def text(path: Path) -> str | None:
    """The file's content without the white space around it; None where it is empty or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The file's only content, a whole number."""
    return whole(text(path))


def whole(written: str | None) -> int | None:
    """The whole number that is written there, None where it is none."""
    try:
        return None if written is None else int(written)
    except ValueError:
        return None


def field(path: Path, key: str, separator: str) -> str | None:
    """The first value of `key` in a file of `key separator value` lines."""
    for line in (text(path) or "").splitlines():
        name, _, value = line.partition(separator)
        if name.strip() == key:
            return value.strip()
    return None


def listed(written: str | None) -> list[int]:
    """The numbers of a list as the kernel writes it: "0-2,8" are 0, 1, 2 and 8."""
    numbers: list[int] = []
    for part in (written or "").split(","):
        first, _, last = part.partition("-")
        if first.strip().isdigit():
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
