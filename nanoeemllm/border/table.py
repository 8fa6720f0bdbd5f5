"""A table as every command prints it."""

from collections.abc import Iterable


def print_table(rows: Iterable[dict[str, str]]):
    """Markdown, each row (column -> cell) as soon as it is known; the first one's keys are the
    heading."""
    for number, row in enumerate(rows):
        if number == 0:
            print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
        print(f"| {' | '.join(row.values())} |", flush=True)
