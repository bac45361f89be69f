"""Every figure and table of the pages in results/, from the tables in results/data:

    python -m studies.evidence     # half a minute; results/tables.md and results/figures

Four figures are not made here, since they show single tokens and need the model: idea.png
(`python -m studies.idea`) and the three that `studies.diagnose` leaves as tokens.png.
"""

from __future__ import annotations

from studies.data import RESULTS
from studies.tables import all_tables


def main() -> None:
    (RESULTS / "tables.md").write_text(all_tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
