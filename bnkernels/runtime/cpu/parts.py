"""Parts of kernels, which only kernels call: their LLVM is optimised and made machine code within kernels alone.

Numba optimises and assembles every function by itself, and all that it calls again with each of its callers. Here a
function that Python cannot call is only typed and lowered; the kernel that it ends up in is compiled once, and kept on
disk. That takes half the time.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

LONG = 500  # instructions before any optimisation


class _PartLibrary(JITCodeLibrary):
    """LLVM of a function that is linked into the libraries of kernels, and never executed in its own."""

    codegen = SimpleNamespace(set_env=lambda name, environment: None)  # as Numba sets it where there is machine code

    def add_ir_module(self, ir_module: Any) -> None:
        """Take the LLVM of the function, of which LLVM makes no copies in its callers if it is long."""
        for function in ir_module.functions:
            size = sum(len(block.instructions) for block in function.blocks)
            if size > LONG and "alwaysinline" not in function.attributes:
                function.attributes.add("noinline")
        super().add_ir_module(ir_module)

    def add_llvm_module(self, ll_module: Any) -> None:
        """Take it as it is."""
        self._final_module.link_in(ll_module)

    def finalize(self) -> None:
        """Take the LLVM of what it calls."""
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Return that there is no machine code."""
        self._ensure_finalized()
        return 0


class PartCompiler(Compiler):
    """Compiler of Numba's that leaves a function in LLVM."""

    def define_pipelines(self) -> list[Any]:
        """Return Numba's passes."""
        self.state.library = _PartLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()
