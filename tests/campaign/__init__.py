"""What takes too long for every change: faults in great number, random configurations, mutations.

`python -m tests.campaign` runs all of it, prints a table and writes what it found as JSON. See
CONTRIBUTING.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest does it for the tests


@dataclass
class Part:
    """What one part of the campaign did.

    Attributes:
        name: of the part.
        tried: how many cases were run.
        findings: a line for each case that went wrong.
        notes: what else the reader of the table has to know.
    """

    name: str
    tried: int = 0
    findings: list[str] = field(default_factory=list)
    notes: str = ""
