"""`python -m quartet` is the command line."""

import sys

from quartet.cli import main

if __name__ == "__main__":
    sys.exit(main())
