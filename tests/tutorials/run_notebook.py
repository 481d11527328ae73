"""Run a notebook's cells one after another, without a kernel: `python run_notebook.py FILE`. Ends with the first cell that fails."""

from __future__ import annotations

import codeop
import json
import linecache
import sys
import types
from pathlib import Path


def main(path: Path) -> None:
    """All cells in one module named __main__, as a kernel does it; future imports hold for the cells behind theirs."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    compile_cell = codeop.Compile()
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            text, name = "".join(cell["source"]) + "\n", f"<cell {number}>"
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
            exec(compile_cell(text, name, "exec"), vars(module))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
