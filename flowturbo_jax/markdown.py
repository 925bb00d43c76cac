"""Tables in Markdown, as commands print them and documents quote them."""

from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without a newline at its end.

    Args:
      heading: of each column.
      rows: as many cells each. None has a line break in it, and a | only behind a backslash.
    """
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
