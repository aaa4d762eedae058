"""Tests that take too long for every change: many faults, random configurations, mutations.

`python -m tests.campaign` runs all of it, prints a table and writes what it found as JSON. See
CONTRIBUTING.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest does it for the tests


@dataclass
class Case:
    """The end of one case of a part.

    Attributes:
        finding: what went wrong, or None.
        figures: name -> number, for the reader of the table. Over all cases of a part, whole
            numbers are added up, and of the others the largest is taken.
    """

    finding: str | None = None
    figures: dict[str, int | float] = field(default_factory=dict)
