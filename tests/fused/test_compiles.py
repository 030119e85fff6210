"""The kernel's machine code, which needs a compiler and no GPU: every tensor is read once and written once."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, so nothing is compiled"
)

ALIGNED = [["tt.divisibility", 16]]


def machine_code(capability: int, block: int = 1024, lanes: int = 1, clip: bool = False, **arguments: Any) -> str:
    """PTX for one kind of arguments: Triton's types of them, ``None`` for those left out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fewstep.samplers.fused.kernel import plan_call

    inputs, outputs = arguments["inputs"], arguments["outputs"]
    types: dict[str, Any] = {
        "outputs": outputs,
        "output_strides": ("i32",) * len(outputs),
        "inputs": inputs,
        "input_strides": ("i32",) * len(inputs),
        "ancestors": (None,) * len(inputs),
        **dict.fromkeys(("state", "state_ancestors", "new_state", "unconditional")),
        "unconditional_stride": "i32",
        **dict.fromkeys(("scale", "bound", "seeds")),
        **{"first_step": "i32", "table": "*fp32", "index": "*i32", "size": "i32", "blocks": "i32", "channels": None},
        **arguments,
    }
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for k, (name, kinds) in enumerate(types.items()):
        alone = not isinstance(kinds, tuple)
        made = []
        for j, kind in enumerate((kinds,) if alone else kinds):
            path = (k,) if alone else (k, j)
            if kind is None:
                constants[path] = None
            elif kind.startswith("*") or "stride" in name or name == "size":
                attributes[path] = ALIGNED
            made.append(kind or "constexpr")
        signature[name] = made[0] if alone else tuple(made)
    fixed = {"WIDTH": 20, "INDEX_STRIDE": 0, "CLIP": clip, "BLOCK": block, "LANES": lanes}
    for name, value in fixed.items():
        constants[len(signature),] = value
        signature[name] = "constexpr"
    source = ASTSource(fn=plan_call, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": True}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kind", "reads", "writes"),
    [
        # With 128 threads a program reads 1024 elements of float32 in two instructions, of half precision in one.
        ({"outputs": ("*fp32",) * 3, "inputs": ("*fp32",) * 3}, 6, 6),
        (
            {
                "outputs": ("*fp16", "*fp32", "*fp16"),
                "inputs": ("*fp16",) * 2,
                "unconditional": "*fp16",
                "scale": "*fp32",
            },
            3,
            4,
        ),
        (
            {
                "outputs": ("*bf16",),
                "inputs": ("*bf16", "*bf16", "*fp32"),
                "ancestors": (None, None, "*i64"),
                "state": "*fp32",
                "state_ancestors": "*i64",
                "new_state": "*fp32",
                "clip": True,
                "bound": "*fp32",
            },
            6,
            3,
        ),
        # The noise of 2048 elements costs no memory.
        ({"outputs": ("*fp32",), "inputs": ("*fp32",) * 2, "seeds": "*i64", "block": 512, "lanes": 4}, 8, 4),
    ],
    ids=["multistep", "guidance", "everything", "noise"],
)
def test_each_tensor_moves_once(kind: dict[str, Any], reads: int, writes: int, capability: int) -> None:
    code = machine_code(capability, **kind)
    instructions = Counter(re.findall(r"(ld|st)\.global(?:\.\w+)*\.v4", code))
    assert instructions == {"ld": reads, "st": writes}
    assert not re.search(r"\.local|st\.global(?:\.\w+)*\.b(8|16|32) ", code.replace(".v4.b32", ".v4"))
