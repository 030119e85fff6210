"""The kernel's machine code, which needs a compiler and no GPU: every tensor is read once and written once."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
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
    one = {"outputs": ("*fp32",), "inputs": ("*fp32",) * 2, "input_strides": (1, 1), "size": 1}
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

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        assert len(grid) == 3  # which compiled kernels read

        def launch(*args: Any, **options: Any) -> Any:
            self.compiled.append(self._kernel.warmup(*args, grid=grid, **options))
            return OnlyCompiled(self._kernel)

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> OnlyCompiled:
    """Steps on the CPU take the kernel up to its launch."""
    from triton.runtime import driver

    from fewstep.samplers.fused import backend, launch

    kernel = OnlyCompiled(launch.plan_call)
    monkeypatch.setattr(launch, "plan_call", kernel)
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    driver.set_active(NoGPU())  # for good: where there is no GPU nobody misses another
    return kernel


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests launch these")


@NO_GPU
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4, 16, 16), torch.bfloat16), ((3, 1), torch.float32), ((1, 3, 5), torch.float16)], ids=str
)
def test_steps_up_to_the_launch(shape: tuple[int, ...], dtype: torch.dtype, kernel: OnlyCompiled) -> None:
    """Triton takes the arguments of whole runs, and compiles for them."""
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


ALWAYS_OF_ONE_DTYPE = ("bound", "seeds")
"""Of these only whether they are there differs between launches."""
FOLLOWS = ("new_state", "block", "lanes", "table", "row_index")
"""These do not differ, or not on their own."""


def variants(value: Any, name: str) -> Iterator[Any]:
    """Other values of an argument."""
    if isinstance(value, tuple):
        for k, element in enumerate(value):
            yield from ((*value[:k], other, *value[k + 1 :]) for other in variants(element, name))
    elif value is None:
        yield torch.zeros(16, dtype=torch.int64)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (1, 16, 17, *((2**31,) if "stride" in name else ()))
    else:
        if name not in ("inputs", "outputs"):
            yield None
        if name not in ALWAYS_OF_ONE_DTYPE:
            yield from (value.to(dtype) for dtype in (torch.float16, torch.int32, torch.int64))


@NO_GPU
def test_kinds_are_those_that_triton_tells_apart(kernel: OnlyCompiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of one kind skip Triton's own look at their arguments, so that it must not see a difference."""
    from fewstep.samplers.fused import launch

    launches: list[Any] = []
    monkeypatch.setattr(launch, "_launch", lambda grid, arguments: launches.append(arguments))
    for shape, dtype in itertools.product([(2, 4, 8, 8), (2, 1)], (torch.float32, torch.bfloat16)):
        for name, options in (("sde-dpm++", {}), ("unipc", {"thresholding": True, "sample_max_value": 2.0})):
            scheduler = SAMPLERS[name].build(STABLE_DIFFUSION, **options).set_backend("triton")
            scheduler.manual_seed(3, in_kernel=True).set_timesteps(3)
            x = torch.zeros(shape, dtype=dtype)
            for t in scheduler.timesteps:
                if scheduler.step_index == 2:
                    scheduler._run.reorder(torch.arange(len(x)))
                x = scheduler.step(GuidedOutput(x, x, 3.0) if scheduler.step_index == 2 else x, t, x)[0]
    launch.plan_call[1, 1, 1](*launches[0], enable_fp_fusion=True)
    *_, binder = kernel._kernel.device_caches[0]
    checked = 0
    for arguments in launches:
        triton_saw, kinds = str(binder(*arguments, debug=False)[1]), arguments.kinds()
        for name in set(arguments._fields) - set(FOLLOWS):
            for value in variants(getattr(arguments, name), name):
                other = arguments._replace(**{name: value})
                if str(binder(*other, debug=False)[1]) != triton_saw:
                    checked += 1
                    assert other.kinds() != kinds, name
    assert checked > 300


@NO_GPU
def test_tensors_that_begin_anywhere_are_left_to_triton(kernel: OnlyCompiled) -> None:
    from fewstep.samplers.fused import launch

    x = torch.zeros(2, 64)
    for moved in (x, torch.zeros(129)[1:].view(2, 64)):
        scheduler = SAMPLERS["dpm++"].build(STABLE_DIFFUSION).set_backend("triton")
        scheduler.set_timesteps(1)
        known = len(launch._COMPILED)
        scheduler.step(moved, scheduler.timesteps[0], x)
        assert len(launch._COMPILED) == known + (moved is x)
