"""Tables of text, and how Markdown writes them."""

# Head and rows.
Table = tuple[list[str], list[list[str]]]


def markdown(table: Table, names: int = 1) -> str:
    """The first columns, `names` of them, to the left, numbers to the right; no line end."""
    head, rows = table
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
