"""Entry of `python -m tests.campaign`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, where pytest imports from too
    from campaign.command import main

    main()
