"""Functions that make the cells of tables from rows of results."""


def key(row: dict) -> tuple:
    """Return what tells measurements apart; a row of the same key is measured anew."""
    return tuple(row.get(name) for name in ("bench", "config", "shape", "variant", "provider"))


def find(rows: list[dict], row: dict, *providers: str) -> dict:
    """Return what `row` measures by the first of `providers` that was measured, or {}."""
    for provider in providers:
        for other in rows:
            if key(other) == key(row | {"provider": provider}) and "error" not in other:
                return other
    return {}


def number(value: float | None) -> str:
    """Format a number to three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.{max(0, 3 - len(str(int(value)).lstrip('0')))}f}"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
