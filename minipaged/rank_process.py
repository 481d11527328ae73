"""One rank of several, in a process that rank 0 has started: `python -m minipaged.rank_process < ARGUMENTS` (execution/ranks.py).

It makes the same LLM as rank 0; LLM(...) sees by the environment which rank it is, serves, and ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> None:
    """Serve until rank 0 ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl+c in a terminal reaches every process; rank 0 decides
    arguments = json.load(sys.stdin)
    from minipaged.api import LLM
    from minipaged.errors import InputError

    try:
        LLM(**arguments)
    except (InputError, RuntimeError) as error:
        print(f"minipaged rank {os.environ.get('RANK')} ends: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
