"""The mapping that info() and explain() return: a dict that prints as indented lines."""

from typing import Any


class Report(dict[str, Any]):
    """A dict for reading: `print` shows one line per entry, nested ones indented."""

    def __repr__(self) -> str:
        return "\n".join(_lines(self, 0))


def _lines(entries: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in entries.items():
        start = "  " * depth + f"{name}:"
        if isinstance(value, dict) and value:
            lines += [start, *_lines(value, depth + 1)]
        else:
            lines.append(f"{start} {_text(value)}")
    return lines


def _text(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
