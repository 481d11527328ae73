"""A kernel that is launched while the one before it still runs touches nothing before it waits, weights excepted.

Pages of the cache above all: a sequence may attend to blocks that another sequence of the same step has just written, so no page is old
enough to be read early. Here the kernels' source is read; test_compiles.py looks at the machine code.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
WEIGHTS = {"weight_ptr", "up_ptr", "words_ptr", "scales_ptr"}  # written once, when the model is loaded


def early_pointers(source: str) -> dict[str, set[str]]:
    """Kernel -> pointers that it names before it waits, for every kernel that can be launched dependently."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "DEPENDENT" in {argument.arg for argument in node.args.args}:
            if node.name == "wait_for_previous":
                continue
            early: set[str] = set()
            for statement in node.body:
                names = {name.id for name in ast.walk(statement) if isinstance(name, ast.Name)}
                if "wait_for_previous" in names:
                    assert isinstance(statement, ast.Expr), f"{node.name} must wait on every way through it"
                    break
                early |= {name for name in names if name.endswith("_ptr")}
                returns = any(isinstance(inner, ast.Return) for inner in ast.walk(statement))
                assert not returns, f"{node.name} may end without having waited"
            else:
                raise AssertionError(f"{node.name} never waits")
            found[node.name] = early
    return found


def test_nothing_but_weights_is_touched_before_the_wait() -> None:
    found: dict[str, set[str]] = {}
    for path in KERNELS.rglob("*.py"):
        found |= early_pointers(path.read_text(encoding="utf-8"))
    assert {"_decode_kernel", "reduce_kernel", "_prefill_kernel", "_rope_write_kernel"} <= set(found)
    assert {name: early for name, early in found.items() if not early <= WEIGHTS} == {}
    assert any(found.values()), "one row's weights are read early: else the test no longer sees anything"


WAITS_LATE = """
def kernel(out_ptr, key_ptr, DEPENDENT):
    key = load_tile(key_ptr)
    wait_for_previous(DEPENDENT)
"""
WAITS_SOMETIMES = """
def kernel(out_ptr, key_ptr, DEPENDENT):
    if program_id(0):
        wait_for_previous(DEPENDENT)
    key = load_tile(key_ptr)
"""
LEAVES_FIRST = """
def kernel(out_ptr, num_rows, DEPENDENT):
    if program_id(0) >= num_rows:
        return
    wait_for_previous(DEPENDENT)
"""
NEVER = """
def kernel(out_ptr, key_ptr, DEPENDENT):
    key = load_tile(key_ptr)
"""


def test_an_early_read_is_found() -> None:
    assert early_pointers(WAITS_LATE) == {"kernel": {"key_ptr"}}


@pytest.mark.parametrize("source", [WAITS_SOMETIMES, LEAVES_FIRST, NEVER])
def test_a_kernel_that_may_not_wait_is_found(source: str) -> None:
    with pytest.raises(AssertionError, match="wait"):
        early_pointers(source)
