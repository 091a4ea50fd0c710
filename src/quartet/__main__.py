"""`python -m quartet` is the command line."""

import sys

from quartet.cli import command

if __name__ == "__main__":
    sys.exit(command())
