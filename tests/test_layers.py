"""The layers of the house: which part may import which. Imports inside functions count as well: a circle that is lazy is a circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kernels": "minipaged.kernels", "tui": "minipaged.tui", "minipaged": "minipaged"}
TOP = {  # modules that stand beside the parts, and the part that they count as
    "config": "config", "errors": "config", "engine": "engine", "assembly": "engine", "api": "engine",
    "rank_process": "engine", "laws": "cli", "__init__": "engine", "__main__": "cli",
}  # fmt: skip

# A part may import itself, and the parts named in its line. Lines stand in order: each names only parts above itself.
MAY_IMPORT = {
    "config": "",
    "kernels": "",
    "memory": "config",
    "model": "kernels config",
    "scheduling": "memory config",
    "text": "config",
    "execution": "scheduling memory model kernels config",
    "trace": "scheduling memory text config",
    "page": "trace text config",
    "engine": "scheduling execution page text trace memory model kernels config",
    "baselines": "engine scheduling trace memory config",
    "serving": "engine scheduling page trace text config",
    "learn": "engine serving trace memory config",
    "lab": "baselines serving engine execution scheduling trace memory model text kernels config",
    "tui": "baselines serving engine scheduling trace memory model text config",
    "cli": "page tui lab learn baselines serving engine scheduling trace memory model text kernels config",
}
# The rooms of the lab, in the same form. `formats` is one module beside them: how numbers are written.
ROOMS_OF_LAB = {
    "formats": "",
    "simulation": "",
    "measure": "simulation",
    "advise": "simulation formats",
    "paper": "advise measure simulation",
    "report": "paper advise measure simulation formats",
}
WITHOUT_TORCH = ("config", "memory", "scheduling", "text", "trace")


def part_of(module: str) -> str:
    """The part a module belongs to: minipaged.memory.swap -> memory."""
    names = module.split(".")
    if len(names) == 1:
        return "engine"
    return TOP.get(names[1], names[1])


def imports_of(path: Path, module: str, modules: set[str]) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of ours in a file, wherever it stands, those for type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{path}: imports are written out in full"
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in modules else base, node.lineno)


def all_modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_symlink():
                continue
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = all_modules()
IMPORTS = {name: list(imports_of(path, name, set(MODULES))) for name, path in MODULES.items()}


def test_every_part_is_in_the_table_and_arrows_point_down() -> None:
    assert {part_of(name) for name in MODULES} == set(MAY_IMPORT)
    seen: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= seen, f"{part} imports a part that stands below it"
        seen.add(part)


def test_parts_import_only_what_the_table_allows() -> None:
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line} ({part_of(name)}) imports {target} ({part_of(target)})"
        for name, targets in IMPORTS.items()
        for target, line in targets
        if target.split(".")[0] == "minipaged"
        and part_of(target) not in {part_of(name), *MAY_IMPORT[part_of(name)].split()}
        and target != "minipaged"
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_the_lab_import_only_what_their_table_allows() -> None:
    def room_of(module: str) -> str:
        return [*module.split("."), ""][2]

    lab = {name for name in MODULES if name.startswith("minipaged.lab.")}
    assert {room_of(name) for name in lab} == set(ROOMS_OF_LAB)
    seen: set[str] = set()
    for room, allowed in ROOMS_OF_LAB.items():
        assert set(allowed.split()) <= seen, f"lab/{room} imports a room that stands below it"
        seen.add(room)
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}"
        for name in lab
        for target, line in IMPORTS[name]
        if target.startswith("minipaged.lab.")
        and room_of(target) not in {room_of(name), *ROOMS_OF_LAB[room_of(name)].split()}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Depth first over all imports; type checking and lazy ones included."""
    state: dict[str, int] = {}

    def visit(name: str, way: list[str]) -> None:
        state[name] = 1
        for target, _ in IMPORTS.get(name, []):
            if target not in MODULES or target == name:
                continue
            if state.get(target) == 1:
                pytest.fail(
                    "a circle: " + " -> ".join([*way[way.index(target) :], target] if target in way else [*way, target])
                )
            if target not in state:
                visit(target, [*way, target])
        state[name] = 2

    sys.setrecursionlimit(10_000)
    for name in MODULES:
        if name not in state:
            visit(name, [name])


def test_the_control_plane_never_imports_torch() -> None:
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line}"
        for name, targets in IMPORTS.items()
        if part_of(name) in WITHOUT_TORCH
        for target, line in targets
        if target.split(".")[0] in ("torch", "triton")
    ]
    assert not wrong, "\n".join(wrong)
