"""The benchmarks measure what they say; and what a step costs, counted rather than timed."""

import itertools
import json
import math
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.samplers import SAMPLERS, TimeShiftScheduler
from fewstep.samplers.fused import compiled
from fewstep.scripts.bench import accuracy, convergence, cuda, foreign, orders, step, traffic
from fewstep.scripts.bench.output import STABLE_DIFFUSION, table
from fewstep.scripts.cli import main

OPERATIONS = {
    "dpm++1": 4,
    "dpm++2": 5,
    "dpm++2-heun": 5,
    "dpm++3": 6,
    "sde-dpm++2": 7,
    "dpm2": 6,
    "dpm++2s": 5,
    "dpm++3s": 5,
    "deis2": 6,
    "deis3": 7,
    "unipc2": 9,
    "unipc3": 11,
    "dpm++2-flow": 4,
    "unipc2-flow": 8,
}
ELEMENTWISE = {"aten.mul.Tensor", "aten.add.Tensor", "aten.add_.Tensor", "aten.clone.default"}


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("name", step.PAIRS)
def test_operations_of_a_step(name):
    """One pass over the tensors for each term of the plan: no arithmetic on coefficients, nothing read back."""
    ours, theirs = step.PAIRS[name].build()
    inputs = step.Inputs.of((2, 3, 4, 4), step.PAIRS[name].stochastic)
    counted = step.count_operations(ours, inputs)
    assert set(counted) <= ELEMENTWISE
    assert sum(counted.values()) <= OPERATIONS[name] * step.STEPS
    assert sum(step.count_operations(theirs, inputs).values()) > 6 * sum(counted.values())


@pytest.mark.parametrize("name", step.PAIRS)
def test_pairs_are_the_same_sampler(name):
    pair = step.PAIRS[name]
    inputs = step.Inputs.of((2, 3, 4, 4), pair.stochastic)
    results = []
    for scheduler in pair.build():
        scheduler.set_timesteps(10)
        results.append(step.run(scheduler, list(scheduler.timesteps), inputs))
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4 * float(results[1].abs().max()))


class Allocations(TorchDispatchMode):
    """Tensors that are no views or results in place of what went in."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(weakref.ref(result))
        return result


# Time-Shift also measures the sample.
PLAIN = [name for name, entry in SAMPLERS.items() if not issubclass(entry.scheduler, TimeShiftScheduler)]


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_allocates_only_what_it_returns_or_keeps(name):
    scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(6)
    x, noise = (torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    made = 0
    for t in scheduler.timesteps:
        u = torch.tanh(x)
        with Allocations() as allocations:
            result = scheduler.step(u, t, x, variance_noise=noise, return_dict=False)
        made += len(allocations.made)
        assert all(reference() is not None for reference in allocations.made)
        x = result[0]
        del result
    assert made >= len(scheduler.timesteps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_reads_no_value_of_a_tensor(name):
    """On the meta device there is none to be read."""
    scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(6, device="meta")
    x = noise = torch.empty(2, 3, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, variance_noise=noise, return_dict=False)[0]
    assert x.shape == (2, 3)


def test_measure_returns_both_sides():
    result = step.measure("unipc2", (1, 1, 2, 2), 0.0)
    assert result["runs"] == 3
    assert result["operations"][0] < result["operations"][1]
    ours, theirs = result["step_us"]
    assert ours > 0
    assert result["ratio"] == pytest.approx(theirs / ours)
    assert step.step_table([result]).splitlines()[1].startswith("unipc2")


def test_measure_on_request_compiles_diffusers_step_and_tells_the_limit(monkeypatch):
    monkeypatch.setattr(step, "STEPS", 2)
    result = step.measure("dpm++1", (1, 1, 2, 2), 0.0, bandwidth=1e9, compiles=True)
    assert result["compiled_us"] > 0
    # Reads sample and output, keeps nothing, writes the next sample: 3 tensors of 4 floats at a byte a nanosecond.
    assert result["limit_us"] == pytest.approx(3 * 4 * 4 * 1e-3)
    line = step.step_table([result]).splitlines()[1]
    assert "compiled" in line
    assert "% of copy" in line


@pytest.mark.skipif(compiled.missing_compiler(torch.device("cpu")) is not None, reason="there is no C++ compiler")
def test_compiled_steps_are_measured_and_not_counted(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(step, "STEPS", 2)
    counters.clear()
    result = step.measure("dpm++1", (1, 1, 2, 2), 0.0, backend="compile")
    assert counters["stats"]["unique_graphs"] >= 1
    assert result["operations"][0] is None
    assert "- / " in step.step_table([result])


def test_bytes_of_a_step_by_hand():
    scheduler = SAMPLERS["dpm++"].build(STABLE_DIFFUSION, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    # Each step reads sample and output and writes the next sample; the second also reads what the first kept (the last
    # is of first order). In half precision the unrounded sample is written thrice and read twice.
    floats = 3 * 3 + 1 + 1
    assert traffic.bytes_of_step(scheduler.plan, (2, 5)) == pytest.approx(10 * 4 * floats / 3)
    assert traffic.bytes_of_step(scheduler.plan, (2, 5), torch.float16) == pytest.approx(
        10 * (2 * 9 + 4 * 2 + 4 * 5) / 3
    )


def test_copies_have_a_bandwidth():
    assert 1e8 < traffic.copy_bandwidth("cpu", 0.0) < 1e13


def test_wrong_backend_is_refused():
    result = invoke("step", "--backend", "cuda")
    assert result.exit_code == 2
    assert "'cuda' is not one of 'torch', 'compile', 'triton'" in result.stderr


# ---------------------------------------------------------------- whole generations


def test_loop_command(tmp_path):
    file = tmp_path / "l.json"
    result = invoke("loop", "--steps", 2, "--batch", 2, "--seconds", 0, "--json", file)
    assert result.exit_code == 0, result.output
    (model,) = json.loads(file.read_text())["results"]
    assert list(model["latency_ms"]) == list(model["images_per_s"]) == ["diffusers", "ours in the pipeline", "our loop"]
    assert all(value > 0 for value in (*model["latency_ms"].values(), *model["images_per_s"].values()))
    assert "digits-small, our loop" in result.output


def test_ways_to_generate_make_the_same_images():
    from fewstep.scripts.bench import loop
    from fewstep.scripts.generation.model import load_model

    pipe = load_model("digits-small", "float32", "cpu").pipeline
    theirs, ours, own = (way() for way in loop._ways(pipe, {"class_labels": [3, 7]}, 3, "cpu").values())
    assert np.abs(theirs - ours).max() < 1e-3
    assert np.abs(ours - own).max() < 1e-5


# ---------------------------------------------------------------- CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "arguments", [("cuda", "--json", "c.json"), ("step", "--device", "cuda"), ("loop", "--device", "cuda")]
)
def test_cuda_is_refused_where_there_is_none(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "cuda" in result.output.lower()
    assert len(result.output.strip().splitlines()) == 1


def test_cuda_names_its_bars():
    cells = [
        {"shape": [1, 4, 64, 64], "ratio": 12.0, "step_us": [1, 12]},
        {"shape": [1, 4, 64, 64], "ratio": 9.0, "step_us": [1, 9]},
        {"shape": [64, 16, 128, 128], "ratio": 3.0, "step_us": [100.0, 300.0], "limit_us": 90.0},
    ]
    loops = [{"model": "digits-small", "latency_ms": {"diffusers": 60.0, "our graph": 15.0}}]
    found = list(cuda.bars({"steps": cells, "loops": loops}).values())
    assert found == [
        {"worst": 9.0, "bar": 10.0, "met": False},
        {"worst": 0.9, "bar": 0.85, "met": True},
        {"worst": 4.0, "bar": 3.0, "met": True},
    ]
    assert set(cuda.bars({"steps": {"failed": "x"}}).values()) == {"not measured"}


def test_cuda_runs_programs_and_the_sanitizer(tmp_path, monkeypatch):
    program = [sys.executable, "-c", "import os, sys; print(os.environ['TRITON_INTERPRET']); sys.exit(3)"]
    assert cuda.command(program, tmp_path) == {"passed": False, "timed_out": False, "last_lines": ["0"]}
    assert not cuda.command([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, timeout=0.5)["passed"]
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda.Path, "exists", lambda path: False)
    assert "left_out" in cuda.sanitized("memcheck", "tests/fused", tmp_path)
    monkeypatch.undo()
    slow = {"passed": False, "timed_out": True, "last_lines": ["stopped after 90 s"]}
    with monkeypatch.context() as patched:
        patched.setattr(cuda.shutil, "which", lambda name: "/bin/echo")
        patched.setattr(cuda, "command", lambda *args, **more: slow)
        assert cuda.sanitized("memcheck", "tests/fused", tmp_path) == {"left_out": "stopped after 90 s"}
    monkeypatch.setattr(cuda.shutil, "which", lambda name: "/bin/echo")
    result = cuda.sanitized("memcheck", "tests/fused", tmp_path)
    assert result["passed"]
    assert result["last_lines"][0].startswith("--tool memcheck --kernel-name kernel_substring=plan_call")


# ---------------------------------------------------------------- orders


def test_measured_order_is_the_slope_above_the_floor():
    errors = ((10, 1e-2), (20, 1e-2 / 8), (40, 1e-2 / 64), (80, 1e-12))
    measured = convergence.Convergence("cubic", "nobody", 3, errors, floor=1e-9)
    assert measured.order == pytest.approx(3.0)
    assert math.isnan(convergence.Convergence("rounding", "nobody", 3, errors[2:], floor=1e-9).order)


def test_exact_start_is_what_third_orders_need():
    """What Euler's first step adds to the error falls with order 2 only."""
    steps = (48, 96, 192)
    exact, ramp = (orders.measured_orders("dpm++3m", steps=steps, exact_start=start) for start in (True, False))
    assert exact.order == pytest.approx(3.0, abs=0.15)
    added = [(n, e - own) for (n, e), (_, own) in zip(ramp.errors, exact.errors, strict=True)]
    assert convergence.Convergence("start", "", 2, tuple(added), 0.0).order == pytest.approx(2.0, abs=0.25)


def test_options_reach_the_sampler():
    assert orders.measured_orders("dpm++", steps=(48, 96), solver_order=1).order == pytest.approx(1.0, abs=0.1)


def test_drift_is_solved_exactly():
    """The closed form against fine steps of the third-order sampler."""
    drift = convergence.SineDrift()
    assert torch.equal(drift.exact(24, 0), drift.start)
    errors = dict(orders.measured_orders("sde-dpm++3m", steps=(96, 384)).errors)
    assert errors[384] < 2e-6


@pytest.mark.parametrize("name", orders.DIFFUSERS)
def test_orders_of_diffusers(name):
    """All reach what they state but the third order, where diffusers halves the second derivative (SDE: its sign)."""
    measured = orders.diffusers_orders(name, steps=(24, 48, 96))
    wrong = {"DPMSolverMultistep 3": 2.2, "DPMSolverMultistep 3 SDE": 1.1}
    if name in wrong:
        assert measured.order == pytest.approx(wrong[name], abs=0.25)
    else:
        assert measured.order > measured.stated - 0.2


def test_same_solver_same_errors():
    ours, theirs = orders.measured_orders("deis3", steps=(24,)), orders.diffusers_orders("DEISMultistep 3", steps=(24,))
    assert ours.errors[0][1] == pytest.approx(theirs.errors[0][1], rel=1e-3)


def test_grid_is_uneven_and_decreases():
    levels = convergence.grid(24)
    assert (np.diff(levels) < 0).all()
    assert levels[-1] == pytest.approx(1 / 8)
    steps = -np.diff(np.log(levels / (1 - levels)))
    assert steps.max() > 1.5 * steps.min()


def euler(model, x, sigmas, disable):
    for sigma, following in itertools.pairwise(sigmas):
        clean = model(x, sigma * x.new_ones(len(x)))
        x = x + (x - clean) / sigma * (following - sigma)
    return x


class AzulaDDIM:
    def __init__(self, denoiser, steps, silent, dtype):
        self.denoiser, self.times = denoiser, torch.linspace(1.0, 0.0, steps + 1, dtype=dtype)

    def __call__(self, x):
        for t, s in itertools.pairwise(self.times):
            (alpha, sigma), (alpha_s, sigma_s) = self.denoiser.schedule(t), self.denoiser.schedule(s)
            clean = self.denoiser(x, t).mean
            x = alpha_s * clean + sigma_s * (x - alpha * clean) / sigma
        return x


def test_other_libraries_solve_the_same_problem(monkeypatch):
    """Stand-ins of their interfaces that hold Euler's method: its errors are those of DDIM."""
    modules = {
        "k_diffusion.sampling": types.SimpleNamespace(sample_euler=euler),
        "azula.sample": types.SimpleNamespace(DDIMSampler=AzulaDDIM),
        "azula.noise": types.SimpleNamespace(Schedule=object),
        "azula.denoise": types.SimpleNamespace(
            Denoiser=torch.nn.Module, DiracPosterior=lambda mean: types.SimpleNamespace(mean=mean)
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(foreign, "missing", list)
    monkeypatch.setattr(foreign, "K_DIFFUSION", {"sample_euler": (1, {})})
    monkeypatch.setattr(foreign, "AZULA", {"DDIMSampler": ("DDIMSampler", 1, {})})
    measured = list(foreign.foreign_orders())
    assert [result.library for result in measured] == ["k-diffusion", "azula"]
    expected = orders.measured_orders("ddim").errors
    for result in measured:
        assert [e for _, e in result.errors] == pytest.approx([e for _, e in expected], rel=1e-6)


def test_orders_command_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(orders, "SAMPLERS", {"ddim": SAMPLERS["ddim"]})
    monkeypatch.setattr(orders, "DIFFUSERS", {})
    monkeypatch.setattr(foreign, "missing", lambda: ["k-diffusion", "azula"])
    result = invoke("orders", "--json", tmp_path / "o.json", "--markdown", tmp_path / "o.md")
    assert result.exit_code == 0, result.output
    assert "left out: azula is not installed" in result.output
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["missing"] == ["k-diffusion", "azula"]
    assert report["results"][0]["measured"] == pytest.approx(1.0, abs=0.05)
    assert (tmp_path / "o.md").read_text().splitlines()[2].startswith("| ddim")


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("name", accuracy.SAMPLER_NAMES)
def test_accuracy_agrees_with_diffusers_and_grows_with_the_calls(name, guidance):
    reference = accuracy.Reference(guidance, noises=8)
    ours = SAMPLERS[name].build(STABLE_DIFFUSION)
    theirs = getattr(accuracy.diffusers, accuracy.THEIRS[name])(**STABLE_DIFFUSION)
    results = {n: reference.error(ours, n) for n in (8, 30, 200)}
    assert [calls for calls, _ in results.values()] == [8, 30, 200]
    assert results[8][1] > results[30][1] > results[200][1]
    assert reference.error(theirs, 8)[1] == pytest.approx(results[8][1], rel=1e-3)


def test_calls_are_counted_not_steps():
    """Runge-Kutta of order 4 takes four calls a step."""
    reference = accuracy.Reference(1.0, noises=4)
    calls, error = reference.error(SAMPLERS["deis-rk4"].build(STABLE_DIFFUSION), 10)
    assert calls == 40
    assert error < 0.1


def curves():
    errors = ((5, 0.1), (10, 0.01))
    variants = accuracy.VARIANTS
    return [
        accuracy.Curve(s, v, g, errors) for g in accuracy.GUIDANCE for s in accuracy.SAMPLER_NAMES for v in variants
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_accuracy_command_writes_table_figures_and_plot(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(accuracy, "accuracy_curves", curves)
    plot = tmp_path / f"a{suffix}"
    result = invoke("accuracy", "--json", tmp_path / "a.json", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "guidance 7.5" in result.output
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["curves"]) == 2 * 3 * 3
    assert report["curves"][0]["errors"] == [[5, 0.1], [10, 0.01]]
    assert plot.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("step", "--samplers", "dpm++2,unipcc"), "unipc2"),
        (("step", "--json", "/nowhere/at/all.json"), "no folder"),
        (("orders", "--markdown", "/"), "is a folder"),
        (("accuracy", "--plot", "a.bmp"), ".png"),
        (("step", "--seconds", "-1"), "--seconds"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_step_command(tmp_path):
    file = tmp_path / "s.json"
    result = invoke("step", "--samplers", "dpm++1", "--seconds", "0", "--json", file)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert [tuple(r["shape"]) for r in report["results"]] == list(step.SHAPES)
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["torch_threads"] == torch.get_num_threads()


def test_help_lists_all_measurements():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("step", "orders", "accuracy", "digits"):
        assert f"  {name} " in result.output


def test_markdown_table():
    assert table(["a", "b"], [["x", "10"]], markdown=True).splitlines() == ["| a |  b |", "| - | -: |", "| x | 10 |"]
