"""Switches Triton's interpreter on for the kernels only, and refuses a NumPy that it cannot work with."""

import importlib
import os
import sys

OPERATIONS = ("segment_norm", "policy_loss", "linear_logprob", "policy_head")


def unusable(numpy: str, triton: str) -> str:
    """One line if the interpreter of this Triton fails with this NumPy, otherwise an empty string."""

    def version(text: str) -> tuple[int, int]:
        major, minor = text.split(".")[:2]
        return int(major), int(minor)

    if version(numpy) < (2, 4) or version(triton) >= (3, 7):
        return ""
    return (
        f"NumPy {numpy} with Triton {triton}: without a GPU the kernels are tested in Triton's interpreter, and that of "
        "3.6 fails with NumPy 2.4 and newer. Install numpy<2.4 or triton>=3.7."
    )


def import_kernels() -> None:
    """Import Triton again as interpreter, for the kernels; processes of other tests keep the compiler.

    Triton makes this choice when it is imported, and importing verl imports Triton.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if before != "1":
        for name in list(sys.modules):
            if f"{name}.".startswith("triton.") and not name.startswith("triton._C"):
                del sys.modules[name]
    for operation in OPERATIONS:
        importlib.import_module(f"hapo_kernels.{operation}.kernel")
    patch_once_per_launch()
    if before is None:
        del os.environ["TRITON_INTERPRET"]


def patch_once_per_launch() -> None:
    """Let the interpreter replace the functions of Triton's language once per kernel launch.

    It does so at every call of a device function as well, hundreds of times in a launch, with the same result; that is
    40 % of the time of these tests. Functions that see other modules of the language are still patched at their call.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, launch, language = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.tl
    patched: set[frozenset[int]] = set()

    def patch_once(function):
        seen = {id(value) for value in function.__globals__.values() if value is language or value is language.core}
        if (modules := frozenset(seen)) in patched:
            return None  # A device function's call does not use it.
        patched.add(modules)
        return patch(function)

    def launch_and_patch(*arguments, **named):
        patched.clear()
        return launch(*arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_and_patch
