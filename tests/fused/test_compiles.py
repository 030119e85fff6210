"""The kernel's machine code, which needs a compiler and no GPU: every tensor is read once and written once."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.samplers import SAMPLERS, GuidedOutput

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, so nothing is compiled"
)

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ALIGNED = [["tt.divisibility", 16]]


def machine_code(capability: int, block: int = 1024, lanes: int = 1, clip: bool = False, **arguments: Any) -> str:
    """PTX for one kind of arguments: Triton's types of them, ``None`` for those left out, or 1."""
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
            if kind is None or kind == 1:
                constants[path] = kind
            elif kind.startswith("*") or "stride" in name or name == "size":
                attributes[path] = ALIGNED
            made.append("constexpr" if path in constants else kind)
        signature[name] = made[0] if alone else tuple(made)
    fixed = {"WIDTH": 20, "INDEX_STRIDE": 0, "CLIP": clip, "BLOCK": block, "LANES": lanes}
    for name, value in fixed.items():
        constants[len(signature),] = value
        signature[name] = "constexpr"
    source = ASTSource(fn=plan_call, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": True}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


@pytest.mark.parametrize("seeds", [None, "*i64"])
def test_samples_of_one_element(seeds: str | None) -> None:
    """Triton takes a 1 as a constant."""
    one = {"outputs": ("*fp32",), "inputs": ("*fp32",) * 2, "input_strides": (1, 1), "output_strides": (1,), "size": 1}
    assert "st.global" in machine_code(90, **one, seeds=seeds)


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


class NoGPU:
    """What Triton asks of a GPU to compile for it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class OnlyCompiled:
    """The kernel, whose launches end before the GPU."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.compiled.append(self._kernel.warmup(*args, grid=grid, **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests launch these")
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4, 16, 16), torch.bfloat16), ((3, 1), torch.float32), ((1, 3, 5), torch.float16)], ids=str
)
def test_steps_up_to_the_launch(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the arguments of whole runs, and compiles for them."""
    from triton.runtime import driver

    from fewstep.samplers.fused import backend, launch

    kernel = OnlyCompiled(launch.plan_call)
    monkeypatch.setattr(launch, "plan_call", kernel)
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    driver.set_active(NoGPU())  # for good: where there is no GPU nobody misses another
    for name, options in (("sde-dpm++", {}), ("dpm++", {"thresholding": True, "sample_max_value": 2.0})):
        scheduler = SAMPLERS[name].build(STABLE_DIFFUSION, **options)
        scheduler.set_backend("triton").manual_seed(3, in_kernel=True).set_timesteps(3)
        x = torch.zeros(shape, dtype=dtype)
        for t in scheduler.timesteps:
            if scheduler.step_index:
                scheduler._run.reorder(torch.arange(len(x)))
            x = scheduler.step(GuidedOutput(x, x, 3.0), t, x, return_dict=False)[0]
    assert len(kernel.compiled) == 6
    assert all("st.global" in compiled.asm["ptx"] for compiled in kernel.compiled)
