"""sd/msdda.py: merge and C_t on Gaussian paths in closed form, the soups on the miniature, RGG and CoDe, bad input."""
import json
import math

import pytest
import torch
from conftest import load, planted

m = load("sd/msdda.py")
WEIGHTS = (0.3, 0.7)

class World:
    """The interface of Diffusion for data N(mean, 1) of the adapters a and b (no adapter: mean 0), exact forecasts.
    Their kernels differ by a constant, so C_t is one, and p_a^w p_b^(1 - w) / Z are the paths of N(w a + (1 - w) b, 1)."""
    _hf_peft_config_loaded, shape, means = True, (2, 1, 1), dict(a=(1.0, 0.2), b=(-0.5, 0.4))
    def __init__(self, steps=10):
        self.abar, self.times = torch.linspace(-4, 4, steps + 1).double().sigmoid().tolist(), range(steps)
        self.unet, self.on = self, {}
    enable_adapters = lambda self: None
    def disable_adapters(self):
        self.on = {}
    def set_adapters(self, names, scales):
        self.on = dict(zip(names, scales))
    def eps(self, x, i, number):
        a = self.abar[i]
        mean = sum((s * torch.tensor(self.means[k]) for k, s in self.on.items()), torch.zeros(2)).to(x).view(2, 1, 1)
        return (1 - a) ** 0.5 * (x - a**0.5 * mean)

@pytest.fixture
def args(tmp_path):
    args = m.parse_args(["--prompts", "one", "two", "--out", str(tmp_path)])
    args.size = (3, 4, 1)
    return args

def gains(x, number):
    return torch.stack([x[:, 0, 0, 0], -x.flatten(1).square().sum(1)], 1)

def draw(args, method, module=m, weights=WEIGHTS, world=None):
    (one, values), (two, _) = (module.sample(args, world or World(), gains, ["a", "b"], list(weights), method, k)
                               for k in range(2))
    return {key: torch.stack([one[key], two[key]]) for key in one} | values

def log_z(world, weights):
    """sum over steps of log C_t, from the shift of the kernels' means by the forecasts."""
    apart, total = (torch.tensor(world.means["a"]) - torch.tensor(world.means["b"])).square().sum().item(), 0
    for a, b in zip(world.abar, world.abar[1:]):
        sigma2 = (1 - b) / (1 - a) * (1 - a / b)
        total -= weights[0] * weights[1] * (b**0.5 * (1 - a / b)) ** 2 * apart / 2 / sigma2
    return total

def test_the_merge_is_here_the_soup(args):
    found = [draw(args, method)["x"] for method in ("msdda", "soup")]
    assert found[0].shape == (2, 3, 4, 2, 1, 1) and (found[0] - found[1]).abs().max() < 1e-5
    assert (found[0] - draw(args, "msdda", weights=(0.5, 0.5))["x"]).abs().max() > 0.1

def test_c_t_is_the_normaliser_of_the_product_of_kernels(args):
    out = draw(args, "msdda_ct")
    assert (out["log_w"] - log_z(World(), WEIGHTS)).abs().max() < 1e-3
    assert abs(out["effective_size"] - 4) < 1e-4
    assert not draw(args, "msdda")["log_w"].any()

@pytest.mark.parametrize("old, new", [("log_c * corrected", "-log_c * corrected"),
                                      ("/ sigma**2 / 2", "/ sigma**2"), ("/ sigma**2 / 2", "/ sigma / 2")])
def test_a_wrong_c_t_is_caught(args, old, new):
    out = draw(args, "msdda_ct", planted("sd/msdda.py", (old, new)))
    assert (out["log_w"] - log_z(World(), WEIGHTS)).abs().max() > 0.1

def test_samples_of_the_merge(args):
    """Linear-Gaussian paths: mean of x_0 by the recursion of the means, from noise."""
    args.size, world = (1, 20_000, 1), World()
    x, mean = draw(args, "msdda", world=world)["x"], torch.zeros(2)
    target = sum(w * torch.tensor(world.means[k]) for w, k in zip(WEIGHTS, "ab"))
    for a, b in zip(world.abar, world.abar[1:]):
        x0_hat = a**0.5 * mean + (1 - a) * target
        mean = (a / b) ** 0.5 * (1 - b) / (1 - a) * mean + b**0.5 * (1 - a / b) / (1 - a) * x0_hat
    assert ((x.flatten(0, 2).mean(0).flatten() - mean) * 40_000**0.5).abs().max() < 5

def test_rgg_moves_the_mean_along_the_gradient_and_code_keeps_the_best(args):
    base, rgg, code = (draw(args, method) for method in ("base", "rgg", "code"))
    assert rgg["gain"].mean() > base["gain"].mean() + 0.1 and code["gain"].mean() > base["gain"].mean()
    args.kl_weight = 1e9
    assert (draw(args, "rgg")["x"] - base["x"]).abs().max() < 1e-5
    best = code["log_w"].argmax(2) == code["gain"].argmax(2)
    assert best.all() and (code["log_w"].softmax(2).amax(2) > 0.99).all()
    assert (base["calls"], draw(args, "soup")["calls"], draw(args, "msdda")["calls"]) == (10, 10, 20)
    assert code["calls"] == 44  # ten steps and one look, by four particles for an image

def test_rgg_by_hand(args):
    """One step, the linear reward: the mean moves by strength sigma^2 / (sqrt(abar) kl_weight) times d x0_hat's reward."""
    args.size, args.kl_weight, args.gamma, args.steps = (1, 1, 1), 2.0, 0.5, 10
    world = World()
    plain, moved = (draw(args, method, weights=(1.0, 0.0), world=world)["x"] for method in ("base", "rgg"))
    keep, shift = 1.0, 0.0  # both are linear in x
    for i, (a, b) in enumerate(zip(world.abar, world.abar[1:])):
        slope, sigma = m.kernel(0.0, 1.0, a, b)
        keep = m.kernel(1.0, (1 - a) ** 0.5, a, b)[0]
        strength = min(1.5 ** (10 * i) - 1, 1)
        shift = keep * shift + strength * sigma**2 / a**0.5 / 2
    assert ((moved - plain)[..., 0, 0, 0] - shift).abs().max() < 1e-4 and (moved - plain)[..., 1, 0, 0].abs().max() < 1e-5

def test_quick_run(capsys, tmp_path):
    m.main(m.parse_args(["--quick", "--steps", "2", "--sweep", "0.5", "--out", str(tmp_path)]))
    torch.set_default_device("cpu")
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert capsys.readouterr().out.startswith("COARSE")
    assert len({(r["problem"], r["method"], r["quantity"]) for r in rows}) == len(rows)
    assert {r["method"] for r in rows} == {*m.METHODS, "base", "less_saturation", "contrast"}
    assert all(math.isfinite(r["estimate"]) for r in rows) and (tmp_path / "figure.png").stat().st_size > 10_000
