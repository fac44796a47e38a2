"""Tables of text, and how Markdown writes them."""

# Head and rows.
Table = tuple[list[str], list[list[str]]]


def markdown(table: Table) -> str:
    """The first column to the left, numbers to the right; no line end."""
    head, rows = table
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
