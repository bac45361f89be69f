"""Every figure and table of the pages in results/, from the tables in results/data:

    python -m studies.evidence     # half a minute; results/figures and results/tables.md

Four figures are not made here, since they show single tokens and need the model: idea.png
(`python -m studies.idea`) and three that `studies.diagnose` leaves as tokens.png.
"""

from __future__ import annotations

from studies.data import RESULTS
from studies.figures import draw_all
from studies.tables import all_tables


def main() -> None:
    """Draw and write."""
    draw_all()
    (RESULTS / "tables.md").write_text(all_tables(), encoding="utf-8")
    print(f"{RESULTS / 'figures'} and {RESULTS / 'tables.md'} are up to date")


if __name__ == "__main__":
    main()
