"""sd/draft.py, ddpo.py and constrained_alignment.py: gradients against closed forms, multipliers, adapters, resumption.

The double has linear noise predictions, those of its adapter with another slope and shift. Then latents stay Gaussian,
and the mean of a linear reward and the KL of the paths follow from means and variances, here by the kernel's formulas.
"""
import json
import math
import pathlib
import types

import pytest
import torch
from accelerate import Accelerator
from conftest import in_two_processes, load, planted
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from scipy.optimize import minimize

SCRIPTS = ["draft", "ddpo", "constrained_alignment"]
KL_WEIGHT, BATCH = 0.3, 2000

@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

class Double:
    """A world of two prompts and latents (2, 1, 1): eps = slope x + offset of the prompt; adapter: two more slopes and
    two more offsets for the start and the end of the path."""
    abar, shape = [0.05, 0.3, 0.7, 0.99], (2, 1, 1)
    def __init__(self, weights=((0.1, -0.2, 0.1), (-0.05, 0.15, 0.2), (0.1, 0.05, -0.3))):
        self.slope, self.reward = torch.tensor([0.9, 0.7, 0.4]), torch.tensor([0.8, -0.5])
        self.offset = torch.tensor([[0.2, -0.1], [-0.4, 0.3]])
        self.weights, self.on, self.unet = torch.tensor(weights, requires_grad=True), True, self
    def enable_adapters(self, on=True):
        self.on = on
    def disable_adapters(self):
        self.on = False
    def eps(self, x, i, number):
        number = torch.as_tensor(number).expand(len(x))
        slope, *shift = self.weights[i] * self.on
        return (self.slope[i] + slope) * x + (self.offset[number] + torch.stack(shift))[..., None, None]
    def gain(self, x, number):
        return x.flatten(1) @ self.reward

def exact(world):
    """Mean gain (2,) of the prompts, mean KL of the paths, with a gradient."""
    mean, var, kl = torch.zeros(2, 2), torch.tensor(1.0), 0
    for i, (a, b) in enumerate(zip(world.abar, world.abar[1:])):
        sigma2 = (1 - b) / (1 - a) * (1 - a / b)
        move = (1 - b - sigma2) ** 0.5 - (b * (1 - a) / a) ** 0.5  # what the noise prediction is times
        slope, *shift = world.weights[i]
        apart = slope * mean + torch.stack(shift)
        kl = kl + move**2 / (2 * sigma2) * (apart.square().sum(1).mean() + 2 * slope**2 * var)
        mean = (b / a) ** 0.5 * mean + move * (world.slope[i] * mean + world.offset + apart)
        var = ((b / a) ** 0.5 + move * (world.slope[i] + slope)) ** 2 * var + sigma2
    return mean @ world.reward, kl

def flags(**changes):
    return types.SimpleNamespace(**dict(steps=3, chunk=700, prompts=["a", "b"], kl_weight=KL_WEIGHT, parts=1,
                                        clip_ratio=0.2, lag=1.0, resume=False) | changes)

def z_of_gradient(script, module, groups=30, kl_weight=KL_WEIGHT):
    """Largest z of the gradient (3, 3) that an update of the script leaves, of kl_weight KL - E[gain]."""
    args, found, world = flags(), [], Double()
    gain, kl = exact(world)
    wanted = torch.autograd.grad(kl_weight * kl - gain.mean(), world.weights)[0]
    torch.manual_seed(0)
    def step():
        found.append(world.weights.grad.clone())
        world.weights.grad = None
    for _ in range(groups):
        if script == "draft":
            module.draft_update(args, world, world.gain, step, BATCH, back=3, kl=True)
        elif script == "ddpo":
            module.ddpo_update(args, world, world.gain, step, BATCH, kl_weight)
        else:
            gains = lambda x, number: torch.stack([x[:, 0, 0, 0], x[:, 1, 0, 0]], 1)
            module.lagrangian_update(args, Accelerator(cpu=True), world, gains, step, BATCH, world.reward / KL_WEIGHT)
            found[-1] *= KL_WEIGHT
    found = torch.stack(found)
    return ((found.mean(0) - wanted) / (found.std(0) / groups**0.5)).abs().max().item()

@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_is_that_of_the_objective(script):
    assert z_of_gradient(script, load(f"sd/{script}.py")) < 5
    assert script != "ddpo" or z_of_gradient(script, load("sd/ddpo.py"), kl_weight=0) < 5

BUGS = [
    ("draft", "(args.kl_weight * path_kl - r)", "(args.kl_weight * path_kl + r)"),
    ("draft", "return (mean / sigma) ** 2 * apart", "return (mean / sigma) * apart"),
    ("ddpo", "advantage = r - kl_weight", "advantage = r + kl_weight"),
    ("ddpo", "((kl_weight * kl_now", "((2 * kl_weight * kl_now"),
    ("ddpo", "sigma).flatten(1).square().sum(1) / 2", "sigma).flatten(1).square().mean(1) / 2"),
    ("ddpo", ".sum() / len(part))", ".sum() / len(index))"),
    ("constrained_alignment", "kl = kl + step_kl", "kl = step_kl"),
    ("constrained_alignment", "(kl - r @", "(kl + r @"),
]

@pytest.mark.parametrize("script, old, new", BUGS)
def test_a_planted_bug_shows_in_the_gradient(script, old, new):
    assert not z_of_gradient(script, planted(f"sd/{script}.py", (old, new))) < 5

@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("change, back", [(None, True), (("torch.minimum(ratio", "torch.maximum(ratio"), False)])
def test_a_ratio_moves_no_further_to_its_own_advantage(sign, change, back):
    """Between two parts the weights move up or down the gradient. Where the clip is narrow, only ratios that moved to
    their disadvantage are left, whose gradient undoes the move."""
    module, world, found = planted("sd/ddpo.py", *[change] * (change is not None)), Double(), []
    def step():
        found.append(world.weights.grad)
        world.weights.grad = None
        with torch.no_grad():
            world.weights += sign * 0.1 * found[0] / found[0].norm()
    torch.manual_seed(0)
    share = module.ddpo_update(flags(parts=2, clip_ratio=0.001), world, world.gain, step, BATCH, 0)[2]
    assert 0.4 < share <= 0.5  # none of the first part, nearly all of the second
    assert ((sign * found[0] * found[1]).sum() > 0) == back

def test_sampled_paths_have_the_kl_of_the_closed_form():
    module, world = load("sd/ddpo.py"), Double()
    torch.manual_seed(0)
    *_, r, kl = module.collect(flags(), world, world.gain, torch.arange(20_000) % 2, 1.0)
    gain, wanted = exact(world)
    assert abs((kl.mean() - wanted) / kl.std() * len(kl) ** 0.5) < 5
    assert abs((r.mean() - gain.mean()) / r.std() * len(r) ** 0.5) < 5

# ---- multipliers -----------------------------------------------------------------------------------------------------
def least_kl(world, b):
    """Weights of the double's adapter with mean coordinates b of x_0 above the start's -> multipliers (2,), KL."""
    def mean_and_kl(v):
        world.weights = torch.tensor(v).view(3, 3).requires_grad_(True)
        world.reward = torch.eye(2)
        mean, kl = exact(world)
        return mean.mean(0), kl
    start = mean_and_kl([0.0] * 9)[0].detach()
    def gradients(v):
        mean, kl = mean_and_kl(v)
        return [torch.autograd.grad(value, world.weights, retain_graph=True)[0].flatten() for value in (kl, *mean)]
    found = minimize(lambda v: mean_and_kl(v)[1].item(), [0.0] * 9, jac=lambda v: gradients(v)[0].numpy(), tol=1e-12,
                     constraints=dict(type="eq", fun=lambda v: (mean_and_kl(v)[0] - start - b).detach().numpy(),
                                      jac=lambda v: torch.stack(gradients(v)[1:]).numpy()), method="SLSQP")
    of_kl, *of_mean = gradients(found.x)
    return start, torch.linalg.lstsq(torch.stack(of_mean, 1), of_kl[:, None]).solution[:, 0], found.fun

def train_with(step):
    """A train that keeps nothing."""
    def train(args, accelerator, model, name, rounds, update):
        trace = []
        return [trace.append(update(step, trace)) or trace[-1] for _ in range(rounds)]
    return train

def test_multipliers_are_those_of_the_least_kl():
    b = torch.tensor([0.3, 0.2])
    start, wanted, kl = least_kl(Double(), b)
    assert wanted.min() > 0.1
    world, module = Double(torch.zeros(3, 3).tolist()), planted("sd/constrained_alignment.py")
    optimizer = torch.optim.Adam([world.weights], 0.01)
    module.train = train_with(lambda: (optimizer.step(), optimizer.zero_grad()))
    gains = lambda x, number: x.flatten(1) - start
    torch.manual_seed(0)
    weights, r, kls = module.align(flags(out=pathlib.Path("x"), lag=10.0, size=(400, 300, 0)),
                                   Accelerator(cpu=True), world, gains, "x", torch.zeros(2), b)
    assert ((weights[200:].mean(0) - wanted) / wanted).abs().max() < 0.1, (weights[200:].mean(0), wanted)
    assert (r[200:].mean(0) - b).abs().max() < 0.02 and abs(kls[200:].mean() / kl - 1) < 0.15

def test_a_reward_without_a_threshold_keeps_its_weight():
    module, world = planted("sd/constrained_alignment.py"), Double()
    module.train = train_with(lambda: None)
    gains = lambda x, number: x.flatten(1)
    run = lambda b: module.align(flags(out=pathlib.Path("x"), size=(3, 50, 0)), Accelerator(cpu=True), world, gains,
                                 "x", torch.tensor([2.0, 0.0]), torch.tensor(b))[0]
    assert run([-math.inf, 9.0])[:, 0].tolist() == [2, 2, 2] and (run([-math.inf, 9.0])[:, 1].diff() > 0).all()
    assert run([-math.inf, -math.inf]).tolist() == [[2, 0]] * 3

# ---- training of adapters of the miniature ---------------------------------------------------------------------------
@pytest.fixture
def mini(tmp_path):
    """arguments, model of the miniature and `run`: 4 rounds of random gradients by train of draft.py."""
    torch.set_default_dtype(torch.float32)
    module = load("sd/draft.py")
    args = module.parse_args(["--steps", "2", "--prompts", "a photo of a cat", "--out", str(tmp_path)])
    model = module.Diffusion(args, "cpu")
    def run(name, fail_at=99, **changes):
        done = []
        def update(step, _):
            if len(done) == fail_at:
                raise InterruptedError
            for p in model.unet.parameters():
                if p.requires_grad:
                    p.grad = torch.randn_like(p)
            step()
            return float(torch.rand(())), len(done)
        return module.train(types.SimpleNamespace(**vars(args) | changes), Accelerator(cpu=True), model, name, 4,
                            lambda step, trace: done.append(update(step, trace)) or done[-1])
    return args, model, run

def test_an_interrupted_training_ends_as_an_uninterrupted_one(mini):
    args, model, run = mini
    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("parts", fail_at=2)
    assert [row[0] for row in run("parts", resume=True)] == [row[0] for row in whole]
    one, two = (load_file(args.out / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(load("sd/draft.py").Refused, match="other flags"):
        run("parts", resume=True, lr=0.5)

def test_plain_diffusers_loads_the_adapter(mini):
    args, model, run = mini
    run("adapter")
    x, text = torch.randn(1, *model.shape), model.cond
    with torch.no_grad():
        ours = model.unet(x, model.times[0], text).sample
        pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, feature_extractor=None)
        before = pipe.unet(x, model.times[0], text).sample
        pipe.load_lora_weights(args.out / "adapter")
        theirs = pipe.unet(x, model.times[0], text).sample
    assert torch.equal(ours, theirs) and not torch.equal(ours, before)

@pytest.mark.parametrize("script", ["ddpo", "constrained_alignment"])
def test_a_whole_run_and_the_same_again(script, tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    module, rows = load(f"sd/{script}.py"), []
    words = ["--problem", "learned", "--threshold", "0.5"] if script != "ddpo" else ["--methods", "ddpo_kl"]
    for i in range(2):
        args = module.parse_args([*words, "--steps", "2", "--prompts", "cat", "fish", "--out", str(tmp_path / str(i))])
        args.size = (1, 2, 2)
        module.main(args)
        rows.append(json.loads((args.out / "numbers.json").read_text())["rows"])
        assert all((args.out / name).exists() for name in ("figure.png", "latents.pt", "images.csv"))
    keys = [(r["problem"], r["method"], r["quantity"]) for r in rows[0]]
    assert rows[0] == rows[1] and len({*keys}) == len(keys) and capsys.readouterr().out.startswith("COARSE")

def test_two_processes_keep_one_adapter(tmp_path):
    """Each draws paths of its own, gradients are averaged: the adapters stay the same to the last bit."""
    in_two_processes("sd/draft.py", *"--quick --steps 2 --methods draft_1 --prompts cat --out".split(), tmp_path)
    first, second = (torch.load(tmp_path / f"draft_1_{k}.pt") for k in (0, 1))
    assert first["trace"] != second["trace"]
    assert all(torch.equal(first["adapter"][name], second["adapter"][name]) for name in first["adapter"])
    assert any(value.abs().sum() > 0 for name, value in first["adapter"].items() if "lora_B" in name)
    assert torch.load(tmp_path / "latents.pt")["draft_1"]["x"].shape[:2] == (1, 8)  # four images from each
