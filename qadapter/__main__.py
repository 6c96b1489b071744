"""`python -m qadapter`; see `qadapter/command`."""

from __future__ import annotations

import sys

from qadapter.command.parser import main

if __name__ == "__main__":
    sys.exit(main())
