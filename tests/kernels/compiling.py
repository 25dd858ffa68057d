"""Compiles kernels for GPUs that are not here."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory of one program, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


def compile_for(
    target: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], *, warps: int = 4, stages: int = 2
) -> Any:
    """The compiled kernel; fails where it needs more shared memory than the target has.

    Args:
        types: of every argument that is not a constant, in Triton's words; a pointer and an integer named in `types`
            with a trailing "+" is a multiple of 16, as they are where they matter.
        constants: the others.
    """
    gpu, most = TARGETS[target]
    names = kernel.arg_names
    signature = {name: types[name].rstrip("+") if name in types else "constexpr" for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, type_ in types.items() if type_[-1] == "+"}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
    assert compiled.metadata.shared <= most, f"{kernel.__name__}: {compiled.metadata.shared} bytes of shared memory"
    return compiled
