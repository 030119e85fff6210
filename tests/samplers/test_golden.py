"""Published and independently computed numbers: one-step coefficients and whole trajectories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analytic import MIXTURE, lambda_grid, run
from fewstep.samplers import deis, dpm_solver, unipc
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.multistep import multistep
from fewstep.samplers.weights import Node, Weights, phi

NODES = lambda_grid([-1.5, -0.9, -0.2, 0.6])
COMMON = {"lower_order_final": False, "euler_at_final": False}
DPM = {
    "measure": "data",
    "stochastic": False,
    "form": "midpoint",
    "order": 3,
    "diffusers_third_order": False,
    **COMMON,
}


def dpm(**options):
    return dpm_solver.predictor(NODES, **{**DPM, **options})


def deis_form(form, order):
    return deis.predictor(NODES, order=order, form=form, lower_order_final=False)


STEPS = {
    "DPM++1": (dpm(order=1), 0.621801973527, [0.482748766486], 0),
    "2M midpoint": (dpm(order=2), 0.621801973527, [0.758605204478, -0.275856437992], 0),
    "2M heun": (dpm(order=2, form="heun"), 0.621801973527, [0.794999617938, -0.312250851452], 0),
    "3M diffusers": (
        dpm(diffusers_third_order=True),
        0.621801973527,
        [1.031216174197, -0.824053390014, 0.275585982303],
        0,
    ),
    "3M": (dpm(), 0.621801973527, [1.099297656598, -0.971563268549, 0.355014378437], 0),
    "DDIM noise": (dpm(order=1, measure="noise"), 1.383845741502, [-0.589630674885], 0),
    "noise 2M": (dpm(order=2, measure="noise"), 1.383845741502, [-0.926562489105, 0.336931814220], 0),
    "noise 2M heun": (
        dpm(order=2, measure="noise", form="heun"),
        1.383845741502,
        [-0.882110252124, 0.292479577239],
        0,
    ),
    "DEIS logrho 2": (deis_form("logrho", 2), 1.383845741502, [-0.882110252124, 0.292479577239], 0),
    "DEIS logrho 3": (deis_form("logrho", 3), 1.383845741502, [-1.151198630505, 0.875504397066, -0.313936441445], 0),
    "rhoAB 1": (deis_form("rhoab", 2), 1.383845741502, [-0.749774530548, 0.160143855663], 0),
    "rhoAB 2": (deis_form("rhoab", 3), 1.383845741502, [-0.832619320790, 0.293717670582, -0.050729024677], 0),
    "tAB 1": (deis_form("tab", 2), 1.383845741502, [-0.861373586116, 0.271742911231], 0),
    "tAB 2": (deis_form("tab", 3), 1.383845741502, [-1.110773930337, 0.837394136126, -0.316250880673], 0),
    "iPNDM 2": (deis_form("ipndm", 2), 1.383845741502, [-0.884446012327, 0.294815337442], 0),
    "SDE 1": (dpm(order=1, stochastic=True), 0.279393636651, [0.699661769660], 0.429815281589),
    "SDE 2M": (dpm(order=2, stochastic=True), 0.279393636651, [1.099468495181, -0.399806725520], 0.429815281589),
    "SDE 2M heun": (
        dpm(order=2, stochastic=True, form="heun"),
        0.279393636651,
        [1.201795309192, -0.502133539532],
        0.429815281589,
    ),
    "SDE 3M": (
        dpm(stochastic=True),
        0.279393636651,
        [1.702467228643, -1.586922698342, 0.584117239359],
        0.429815281589,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_one_step(name):
    predictor, state, predictions, noise = STEPS[name]
    weights = predictor.rule(2, len(predictions))
    np.testing.assert_allclose(weights.state, state, atol=2e-12)
    np.testing.assert_allclose(weights.predictions, predictions, atol=3e-12)
    np.testing.assert_allclose(weights.noise, noise, atol=2e-12)


@pytest.mark.parametrize(
    ("order", "form", "expected"),
    [
        (1, "bh1", [0.350662181251, 0.132086585235]),
        (1, "bh2", [0.241374383243, 0.241374383243]),
        (2, "bh2", [0.230759345984, 0.300515305115, -0.048525884613]),
        (2, "bh1", [0.230759345984, 0.300515305115, -0.048525884613]),
        (3, "bh1", [0.207874240638, 0.379732977468, -0.140066305999, 0.035207854379]),
    ],
)
def test_one_correction(order, form, expected):
    weights = unipc.corrector(NODES, [order] * 3, [], measure="data", form=form)(2, 3)
    np.testing.assert_allclose(weights.state, 0.621801973527, atol=2e-12)
    np.testing.assert_allclose(weights.predictions, expected, atol=3e-12)


def test_unip_3_is_the_exact_third_order_and_unip_2_is_the_midpoint():
    for order, name in ((3, "3M"), (2, "2M midpoint")):
        ours = unipc.predictor(NODES, [order] * 3, measure="data", form="bh2").rule(2, order)
        np.testing.assert_allclose(ours.predictions, STEPS[name][2], atol=3e-12)


TRAJECTORY = lambda_grid(np.linspace(-2.5, 2.0, 7))


def multistep_run(predictor, corrector=None, form="classic"):
    plan = multistep(PlanBuilder(TRAJECTORY, "sample"), predictor, corrector, form=form)
    return float(run(plan, torch.ones(1, 1, dtype=torch.float64)))


def dpm_trajectory(**options):
    return multistep_run(dpm_solver.predictor(TRAJECTORY, **{**DPM, **options}))


def deis_trajectory(form, order):
    return multistep_run(deis.predictor(TRAJECTORY, order=order, form=form, lower_order_final=False))


def unipc_trajectory(order, form, measure="data", corrector_form="classic"):
    orders = unipc.step_orders(TRAJECTORY, order, 0, False)
    predictor = unipc.predictor(TRAJECTORY, orders, measure=measure, form=form)
    corrector = unipc.corrector(TRAJECTORY, orders, [], measure=measure, form=form)
    return multistep_run(predictor, corrector, corrector_form)


def singlestep_trajectory(order, form):
    """Six outer steps, the inner nodes at equal distances in lambda."""
    grid = lambda_grid(np.linspace(-2.5, 2.0, 6 * order + 1))
    options = {"measure": "data", "stochastic": False, "form": form, **COMMON}
    plan = dpm_solver.singlestep(PlanBuilder(grid, "sample"), order=order, diffusers_third_order=False, **options)
    return float(run(plan, torch.ones(1, 1, dtype=torch.float64)))


def runge_kutta_trajectory(order):
    return float(
        run(deis.runge_kutta(PlanBuilder(TRAJECTORY, "sample"), order=order), torch.ones(1, 1, dtype=torch.float64))
    )


# Values at lambda = 2 after six steps from x = 1 at lambda = -2.5.
TRAJECTORIES = [
    (lambda: dpm_trajectory(order=1), 0.946573210579),
    (lambda: dpm_trajectory(order=2), 1.076815086012),
    (lambda: dpm_trajectory(order=2, form="heun"), 1.095861010993),
    (lambda: dpm_trajectory(diffusers_third_order=True), 1.077524854755),
    (dpm_trajectory, 1.072606715397),
    (lambda: singlestep_trajectory(2, "midpoint"), 1.039337493034),
    (lambda: singlestep_trajectory(2, "heun"), 1.051537687658),
    (lambda: singlestep_trajectory(3, "heun"), 1.053590482874),
    (lambda: deis_trajectory("logrho", 2), 1.030245025927),
    (lambda: deis_trajectory("logrho", 3), 1.047907445330),
    (lambda: deis_trajectory("tab", 2), 1.019005402287),
    (lambda: deis_trajectory("tab", 3), 1.041550422586),
    (lambda: deis_trajectory("tab", 4), 1.045869396459),
    (lambda: deis_trajectory("rhoab", 2), 0.994797420423),
    (lambda: deis_trajectory("rhoab", 3), 1.006950906840),
    (lambda: deis_trajectory("rhoab", 4), 1.010522303285),
    (lambda: deis_trajectory("ipndm", 4), 1.059127582676),
    (lambda: runge_kutta_trajectory(2), 1.116969376071),
    (lambda: runge_kutta_trajectory(3), 1.048468176657),
    (lambda: runge_kutta_trajectory(4), 1.055321521207),
    (lambda: unipc_trajectory(1, "bh1"), 1.029539989077),
    (lambda: unipc_trajectory(1, "bh2"), 1.003098740540),
    (lambda: unipc_trajectory(2, "bh1"), 1.111956160321),
    (lambda: unipc_trajectory(2, "bh2"), 1.077876762826),
    (lambda: unipc_trajectory(3, "bh1"), 1.047268903369),
    (lambda: unipc_trajectory(3, "bh2"), 1.046310742035),
    (lambda: unipc_trajectory(3, "bh2", "noise"), 1.068530148130),
]


@pytest.mark.parametrize("k", range(len(TRAJECTORIES)))
def test_trajectory(k):
    compute, expected = TRAJECTORIES[k]
    assert compute() == pytest.approx(expected, abs=2e-11)


def test_the_delta_form_of_the_corrector_is_the_classic_one():
    for order in (1, 2, 3, 4):
        assert unipc_trajectory(order, "bh2", corrector_form="delta") == pytest.approx(
            unipc_trajectory(order, "bh2"), abs=1e-12
        )


def test_reference_solution_of_the_mixture():
    start, end = TRAJECTORY.nodes[0], TRAJECTORY.nodes[-1]
    x = MIXTURE.solve(torch.ones(1, 1), (start.alpha, start.sigma), (end.alpha, end.sigma))
    assert float(x) == pytest.approx(1.053096079036, abs=1e-9)


@pytest.mark.parametrize(
    ("order", "z", "value"),
    [
        (1, -0.8, 0.688338794853),
        (2, -0.8, 0.389576506433),
        (3, -0.8, 0.138029366959),
        (1, 0.8, 1.531926160616),
        (2, 0.8, 0.664907700769),
        (3, 0.8, 0.206134625962),
    ],
)
def test_phi(order, z, value):
    assert phi(order, z) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_phi_is_continuous_where_series_and_recursion_meet(order):
    for z in (-1.0, 1.0):
        assert phi(order, math.nextafter(z, 0)) == pytest.approx(phi(order, z), rel=1e-12)
    assert phi(order, 0.0) == 1 / math.factorial(order)


def test_weights_are_data_classes_over_nodes():
    node = Node(1.0, 0.0)
    assert node.half_logsnr == math.inf
    assert node.rho == 0.0
    assert Node(0.0, 1.0).half_logsnr == -math.inf
    assert Weights(1.0, (2.0,)).noise == 0.0
