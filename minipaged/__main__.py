"""The way in, for `minipaged` and `python -m minipaged`: ctrl+c is answered from the first import on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end with its exit code."""
    try:
        from minipaged.cli import app, run_guarded

        code = run_guarded(app)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
