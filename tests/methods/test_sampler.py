"""sampler.py on analytic fields: Algorithm 1 is exact for an average velocity, at any number of steps."""

import pytest
import torch

from teasr.diffusion.flow import per_sample
from teasr.methods.sampler import AnyStep, Dial, Restarts

SIGMA = 0.4
sample = AnyStep().sample


class GaussianField:
    """Data z0 ~ N(z_lq, sigma^2): the probability flow z_t - (1 - t) z_lq scales with its standard deviation."""

    def __init__(self, average: bool):
        self.average, self.calls = average, []

    def snap(self, t):
        return t

    def velocity(self, z_t, t_cur, condition):
        z_lq, t_tar = condition.z_lq, condition.t_tar
        self.calls.append((t_cur[0].item(), t_tar[0].item()))
        t, r = per_sample(t_cur.double(), z_t), per_sample(t_tar.double(), z_t)
        y = z_t - (1 - t) * z_lq
        if not self.average:
            return -z_lq + y * (t - (1 - t) * SIGMA**2) / self.std(t) ** 2
        return -z_lq + y * (1 - self.std(r) / self.std(t)) / (t - r)

    @staticmethod
    def std(t):
        return ((1 - t) ** 2 * SIGMA**2 + t**2).sqrt()


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 4, 4, generator=g, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("steps", range(1, 31))
def test_average_velocity_gives_the_exact_answer_at_any_step_count(pair, steps):
    z_lq, eps = pair
    field = GaussianField(average=True)
    assert torch.allclose(sample(field, z_lq, eps, steps), z_lq + SIGMA * eps, atol=1e-6)
    assert len(field.calls) == steps and field.calls[0][0] == 1.0 and field.calls[-1][1] == 0.0
    assert all(a[1] == b[0] for a, b in zip(field.calls, field.calls[1:], strict=False))


def test_instantaneous_velocity_converges_at_first_order(pair):
    z_lq, eps = pair
    errors = [
        (sample(GaussianField(average=False), z_lq, eps, n) - z_lq - SIGMA * eps).abs().max().item()
        for n in (8, 32, 128)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_callback_counts_steps_and_may_change_the_latents(pair):
    seen = []
    sample(GaussianField(average=True), *pair, 3, on_step=lambda i, n, z: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    z = sample(GaussianField(average=True), *pair, 3, on_step=lambda i, n, z: z * 0 if i == 3 else None)
    assert not z.any()


def test_fidelity_goes_from_the_sample_to_the_mean(pair):
    """With the instantaneous field, the first jump estimates the mean of all plausible results, which is z_lq.

    Fidelity interpolates linearly from the sample to this mean, without additional evaluations.
    """
    z_lq, eps = pair
    end = sample(GaussianField(average=False), z_lq, eps, 4)
    for fidelity in (0.0, 0.25, 1.0):
        field = GaussianField(average=False)
        z = sample(field, z_lq, eps, 4, {"fidelity": fidelity})
        assert torch.allclose(z, (1 - fidelity) * end + fidelity * z_lq, atol=1e-6) and len(field.calls) == 4
    for fidelity, steps in ((1.5, 4), (-0.1, 4), (0.5, 1)):
        with pytest.raises(ValueError, match="fidelity"):
            sample(GaussianField(average=True), z_lq, eps, steps, {"fidelity": fidelity})


class OneStep(AnyStep):
    """The sampler of a method that restores in one step, with its own dial."""

    step_counts = (1,)
    dials = (Dial("strength", 0.6, "from faithful to realistic"),)


def test_step_counts_and_dials_that_a_method_does_not_have_are_errors():
    assert AnyStep().check(4) == {"fidelity": 0.0} and AnyStep().check(4, {"fidelity": 0.5}) == {"fidelity": 0.5}
    with pytest.raises(ValueError, match="steps = 0"):
        AnyStep().check(0)
    with pytest.raises(ValueError, match="no setting strength: its settings are fidelity"):
        AnyStep().check(4, {"strength": 0.5})
    check = super(AnyStep, OneStep()).check
    assert check(1) == {"strength": 0.6} and check(1, {"strength": 0.1}) == {"strength": 0.1}
    with pytest.raises(ValueError, match=r"restores in 1 step\(s\)"):
        check(4)


def test_restarts_of_an_exact_model_stay_samples_of_the_data(pair):
    """With one step they are the same as Algorithm 1; more steps draw anew with the same mean and spread."""
    z_lq, eps = pair
    restarts, field = Restarts(), GaussianField(average=True)
    assert torch.equal(restarts.sample(field, z_lq, eps, 1), sample(field, z_lq, eps, 1))
    g = torch.Generator().manual_seed(1)
    z_lq, eps = torch.zeros(1, 3, 64, 64, dtype=torch.float64), torch.randn(1, 3, 64, 64, generator=g).double()
    for steps in (2, 4, 8):
        field.calls.clear()
        z = restarts.sample(field, z_lq, eps, steps)
        assert z.std() == pytest.approx(SIGMA, rel=0.03) and abs(z.mean()) < 0.02
        assert torch.equal(z, restarts.sample(field, z_lq, eps, steps))  # the fresh noise is a function of eps
        times = [t for t, _ in field.calls[:steps]]
        assert times[0] == 1 and all(t_tar == 0 for _, t_tar in field.calls)
        assert times[1:] == sorted(times[1:], reverse=True) and 0.0499 <= times[-1] <= times[1] <= 0.3
    assert not torch.equal(z, restarts.sample(field, z_lq, eps + 1e-6, 8))
    one = restarts.sample(field, z_lq, eps, 1)
    assert torch.allclose(restarts.sample(field, z_lq, eps, 4, {"fidelity": 1.0}), one)
