"""`python -m qadapter`: the command `qadapter` (`qadapter/command`)."""

from __future__ import annotations

import sys

from qadapter.command.parser import main

if __name__ == "__main__":
    sys.exit(main())
