"""sd/msdda.py: z-scores of the weighted merge on models whose product is known, adapters and soups, equal calls.

A double with the call signature of the UNet gives the exact noise of Gaussian latents; adapter i changes it to
(1 + stretch_i) noise + shift_i. Every reverse step is then affine in x, a path of latents is jointly Gaussian, and so
is the product of path laws: its integral and the law of its end come from the precision matrices of whole paths.
"""
import json
import math
import types

import pytest
import torch
from conftest import SOURCE, load, planted

msdda = load("sd/msdda.py")
D = torch.float64
MINI = SOURCE / "sd/mini"
TINY = "--prompts tiger --images 4 --particles 2 --steps 5 --weights 0,1 0.4,0.6".split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(SOURCE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- models with a known product -------------------------------------------------------------------------------------


ADAPTERS = {"one": (0.06, [0.1, -0.07, 0.03, 0.07]), "two": (-0.05, [-0.07, 0.03, 0.1, -0.1])}  # stretch, shift
VAR, LOOK = 0.6, 0.02 * torch.randn(12, 4, generator=generator(1), dtype=D)  # of the data; pixels of a latent


class GaussianUNet:
    """Exact noise of latents N(mean, VAR), the mean (4,) being the first token of the prompt, and adapters."""

    def __init__(self, levels):
        self.levels, self.scales, self.weight = levels, {}, torch.zeros((), dtype=D)

    def parameters(self):
        return iter([self.weight])

    def set_adapters(self, names, scales):
        self.scales = dict(zip(names, scales))

    def __call__(self, x, t, encoder_hidden_states):
        a, mean = self.levels[t][:, None, None, None], encoder_hidden_states[:, 0, :, None, None]
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * VAR + 1 - a)
        stretch = sum(scale * ADAPTERS[name][0] for name, scale in self.scales.items())
        shift = sum(scale * torch.tensor(ADAPTERS[name][1], dtype=D) for name, scale in self.scales.items())
        return types.SimpleNamespace(sample=(1 + stretch) * eps + shift[:, None, None])


def make_double():
    """A world of two prompts: latents (4, 1, 1), images (3, 2, 2) around 0.5, rewards linear in the pixels."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler.from_pretrained(MINI / "scheduler")
    rewards = {"one": lambda images, number: 5 * images[:, 0].mean((1, 2)) - 2 * images[:, 2, 0, 0],
               "two": lambda images, number: 4 * images[:, 1, 0, 1] - images[:, 0, 1, 0]}
    return types.SimpleNamespace(
        unet=GaussianUNet(scheduler.alphas_cumprod.double()), scheduler=scheduler, rewards=rewards, shape=(4, 1, 1),
        decode=lambda x: (0.5 + (x.flatten(1) @ LOOK.T).view(-1, 3, 2, 2)).clamp(0, 1),
        cond=torch.tensor([[[0.5, -0.3, 0.2, 0.1]], [[-0.4, 0.3, 0.6, -0.2]]], dtype=D),
        uncond=torch.tensor([[[0.1, 0.1, -0.2, 0.0]]], dtype=D), calls=0, names=["one", "two"], can_average=True,
        level={"one": torch.tensor([1.5, 1.4], dtype=D), "two": torch.tensor([1.5, 1.6], dtype=D)},
        spread={"one": 0.1, "two": 0.08})


def arguments(**changes):
    args = msdda.parse_args("--steps 5 --guidance 1.7 --prompts one other --images 128".split())
    return types.SimpleNamespace(**vars(args) | dict(particles=64, ess=0.995) | changes)


def chain(world, number, args, scales):
    """Steps of the model with these scales of its adapters: gain (T,), offset (T, 4), sigma (T,)."""
    world.unet.set_adapters(*zip(*scales.items()))
    timesteps, abar = msdda.path_schedule(world.scheduler, args.steps)
    cond = world.uncond[0] + args.guidance * (world.cond[number] - world.uncond[0])
    steps = []
    for t, a, b in zip(timesteps, abar, abar[1:]):
        x = torch.tensor([0.0, 1.0], dtype=D)[:, None, None, None].expand(2, 4, 1, 1)
        eps = world.unet(x, torch.tensor([t, t]), cond.expand(2, 1, 4)).sample
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        end = (b / a) ** 0.5 * (x - (1 - a) ** 0.5 * eps) + max(1 - b - sigma**2, 0.0) ** 0.5 * eps
        steps.append(((end[1] - end[0])[0, 0, 0], end[0, :, 0, 0], torch.tensor(sigma, dtype=D)))
    return [torch.stack(v) for v in zip(*steps)]


def product(world, number, args, weights):
    """Log of the integral of the product of path laws, mean (4,) and variance of its x_0: by precision matrices."""
    count = args.steps + 1
    precision, linear, constant = torch.zeros(count, count, dtype=D), torch.zeros(count, 4, dtype=D), 0.0
    models = [(w, {name: 1.0}) for name, w in zip(ADAPTERS, weights)] + [(1 - sum(weights), {"one": 0.0})]
    for w, scales in models:
        gain, offset, sigma = chain(world, number, args, scales)
        precision[0, 0] += w  # x_T is standard normal
        constant -= 2 * w * math.log(2 * math.pi)
        for i, (g, o, s) in enumerate(zip(gain, offset, sigma)):  # (x_{i+1} - g x_i - o)^2 / (2 s^2)
            row = torch.zeros(count, dtype=D)
            row[i], row[i + 1] = -g, 1.0
            precision += w / s**2 * row[:, None] * row
            linear += w / s**2 * row[:, None] * o
            constant -= w * (0.5 * (o**2).sum() / s**2 + 4 * s.log() + 2 * math.log(2 * math.pi)).item()
    mean = torch.linalg.solve(precision, linear)
    log_z = constant + 0.5 * (linear * mean).sum() + 2 * (count * math.log(2 * math.pi) - torch.logdet(precision))
    return log_z.item(), mean[-1], torch.linalg.inv(precision)[-1, -1].item()


def z_of(values):
    """Independent values (R, ...) with mean zero -> the largest |z|."""
    return (values.mean(0) / values.std(0) * len(values) ** 0.5).abs().max().item()


def smc_z(module, weights=(0.5, 0.5), seed=0, groups=64, **changes):
    """The largest |z| of Z, E[x_0] and E[x_0^2] by the weighted merge, through `methods_at`; and its output."""
    world, args, rng = make_double(), arguments(**changes), generator(seed)
    noise = torch.randn(groups * args.particles, 4, 1, 1, generator=rng, dtype=D)
    out = module.methods_at(world, args, 1, weights, rng)["msdda_smc"](noise)
    log_z, mean, var = product(world, 1, args, weights)
    z, w = (out["log_z"] - log_z).exp(), out["log_w"].softmax(1)
    x = out["x"].view(groups, args.particles, 4)
    first, second = (torch.einsum("gp,gpd->gd", w, value) for value in (x - mean, x**2 - mean**2 - var))
    return z_of(torch.cat([z[:, None] - 1, z[:, None] * first, z[:, None] * second], 1)), out


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (0.9, 0.6), (1.2, -0.2)])
def test_the_weighted_merge_is_the_product_of_paths(weights):
    z, out = smc_z(msdda, weights)
    assert sum(out["history"]) > 0.5, "resampling must happen, or nothing is tested"
    assert z <= 5


BUGS = {
    "log C_t missing": ('log_w=state["log_w"] + log_c)', 'log_w=state["log_w"])'),
    "log C_t averaged over the latent": ("return mean, variance, log_c.flatten(1).sum(1) / 2",
                                         "return mean, variance, log_c.flatten(1).mean(1) / 2"),
    "log C_t twice": ("return mean, variance, log_c.flatten(1).sum(1) / 2",
                      "return mean, variance, log_c.flatten(1).sum(1)"),
    "weights kept after resampling": ('state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()',
                                      'state["log_w"] = log_w.flatten()'),
    "log Z not accumulated": ("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass"),
    "latents not gathered": ("state = gather(state, (first_slot + ancestors).flatten())", "state = dict(state)"),
    "variance for standard deviation": ("variances = [sigma**2]", "variances = [sigma]"),
    "noise too small": ("state = dict(x=mean + sigma * z, log_w", "state = dict(x=mean + 0.8 * sigma * z, log_w"),
    "guidance ignored": ("world.uncond, args.guidance, args.chunk)", "world.uncond, 1.0, args.chunk)"),
    "first prompt for all": ("world.cond[number : number + 1], world.uncond", "world.cond[:1], world.uncond"),
    "one adapter for both": ("models = [with_adapters(world, args, number, scales) for scales in alone]",
                             "models = [with_adapters(world, args, number, alone[0]) for scales in alone]"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    assert smc_z(planted("sd/msdda.py", BUGS[bug]), groups=128)[0] > 5


def test_a_reference_with_a_wrong_share_is_caught():
    wrong = planted("sd/msdda.py", ("    rest = 1 - weights.sum()\n", "    rest = 1 - weights.sum() / 2\n"))
    assert smc_z(wrong, (0.9, 0.6))[0] > 5
    with pytest.raises(SystemExit):  # and on the simplex the merge asks for the reference
        smc_z(wrong)


def test_weights_that_do_not_sum_to_one_need_the_reference(capsys):
    wrong = planted("sd/msdda.py", ("reference=base if len(everyone) > 2 else None", "reference=None"))
    with pytest.raises(SystemExit):
        smc_z(wrong, (0.9, 0.6))
    assert "sum to 1.5 and not to 1" in capsys.readouterr().err


# ---- the merge is the blend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.1, -0.4)])
def test_with_equal_variances_the_merge_is_the_blend(weights):
    """Of the noise predictions; here, where it is linear in them, of the weights too."""
    world, args = make_double(), arguments()
    grid = msdda.path_schedule(world.scheduler, 5)
    models = [msdda.with_adapters(world, args, 0, {k: float(k == name) for k in world.names})
              for name in ("one", "two", "")]
    noise = torch.randn(50, 4, 1, 1, generator=generator(1), dtype=D)
    merged = msdda.merged_ddim(models[:2], weights, noise, *grid, generator(2), reference=(
        models[2] if sum(weights) != 1 else None))
    blended = msdda.blend(models, [*weights, 1 - sum(weights)])
    soup = msdda.with_adapters(world, args, 0, dict(zip(world.names, weights)))
    for model in (blended, soup):
        assert (msdda.sample_ddpm(model, noise, *grid, generator(2)) - merged["x"]).abs().max() < 1e-10
    assert merged["log_w"].isfinite().all() and (min(weights) < 0 or (merged["log_w"] < 0).all())


def test_plain_merge_follows_its_own_chain():
    world, args, groups = make_double(), arguments(), 64
    out = msdda.methods_at(world, args, 0, (0.3, 0.7), generator(3))["msdda"](
        torch.randn(groups * 64, 4, 1, 1, generator=generator(4), dtype=D))
    chains = [chain(world, 0, args, {name: 1.0}) for name in ADAPTERS]
    gain, offset = (0.3 * a + 0.7 * b for a, b in list(zip(*chains))[:2])
    mean, var = torch.zeros(4, dtype=D), torch.ones((), dtype=D)
    for g, o, s in zip(gain, offset, chains[0][2]):
        mean, var = g * mean + o, g**2 * var + s**2
    x = out.view(groups, 64, 4)
    assert z_of(torch.cat([(x - mean).mean(1), ((x - mean) ** 2 - var).mean(1)], 1)) <= 5
    exact = product(world, 0, args, (0.3, 0.7))
    assert (exact[1] - mean).abs().max() > 0.02, "the weights must matter, or the tests above show nothing"


def test_path_ratio_gives_z_without_a_merge():
    world, args, groups = make_double(), arguments(), 64
    models = [msdda.with_adapters(world, args, 1, {name: 1.0}) for name in world.names]
    grid = msdda.path_schedule(world.scheduler, 5)
    noise = torch.randn(groups * 64, 4, 1, 1, generator=generator(5), dtype=D)
    for k, w in ((0, 0.3), (1, 0.6)):  # of the other model
        ratio = msdda.path_ratio(models[k], models[1 - k], noise, *grid, generator(6))
        log_z = product(world, 1, args, (1 - w, w) if k == 0 else (w, 1 - w))[0]
        assert z_of((w * ratio - log_z).exp().view(groups, 64).mean(1)[:, None] - 1) <= 5


# ---- equal calls, baselines, chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights, per_step", [((0.5, 0.5), 2), ((1.0, 0.0), 2), ((0.9, 0.6), 3), ((1.2, -0.2), 2)])
def test_all_methods_make_the_same_number_of_calls(weights, per_step, monkeypatch):
    world, args = make_double(), arguments(steps=10)
    monkeypatch.setattr(msdda, "CANDIDATES", 5 * (per_step - 1))
    methods = msdda.methods_at(world, args, 0, weights, generator(7))
    assert ("single" in methods) == (weights == (1, 0)) == ("msdda" not in methods)
    assert ("switch" in methods) == (0 < min(weights) and sum(weights) == 1)
    for name, method in methods.items():
        if name != "soup_factor":  # it needs a network
            world.calls = 0
            method(torch.randn(128, 4, 1, 1, generator=generator(8), dtype=D))
            assert world.calls == 128 * 10 * per_step, name


def test_baselines_raise_what_they_optimise():
    world, args, weights = make_double(), arguments(kl_weight=1.0), (0.7, 0.3)
    reward = msdda.weighted_reward(world, 1, weights)
    noise = torch.randn(1000, 4, 1, 1, generator=generator(9), dtype=D)
    base = msdda.with_adapters(world, args, 1, {"one": 0.0})
    plain = reward(msdda.sample_ddpm(base, noise, *msdda.path_schedule(world.scheduler, 10), generator(9)))
    methods = msdda.methods_at(world, args, 1, weights, generator(9))
    for name in ("rgg", "code"):
        more = reward(methods[name](noise)) - plain
        assert more.mean() > 5 * more.std() / 1000**0.5, name


def test_switching_asks_by_weight():
    world, args = make_double(), arguments()
    asked = {name: 0 for name in world.names}
    models = [lambda x, t, name=name: asked.update({name: asked[name] + len(x)}) or x for name in world.names]
    msdda.switch(models, [0.3, 0.7], generator(1))(torch.zeros(4000, 4, 1, 1), 1)
    assert sum(asked.values()) == 4000 and abs(asked["one"] - 1200) < 5 * (4000 * 0.21) ** 0.5
    empty = msdda.with_adapters(world, args, 0, {"one": 1.0})(torch.zeros(0, 4, 1, 1), 1)
    assert empty.shape == (0, 4, 1, 1) and world.calls == 0


def test_chunks_do_not_change_the_answer():
    for name in ("x", "log_w", "log_z"):
        whole, parts = (smc_z(msdda, groups=4, chunk=chunk)[1][name] for chunk in (1000, 17))
        assert (whole - parts).abs().max() < 1e-10
    found = []
    for chunk in (1000, 17):
        methods = msdda.methods_at(make_double(), arguments(chunk=chunk), 0, (0.3, 0.7), generator(1))
        noise = torch.randn(64, 4, 1, 1, generator=generator(2), dtype=D)
        found.append(torch.stack([methods[name](noise) for name in ("soup", "rgg", "code")]))
    assert (found[0] - found[1]).abs().max() < 1e-10


# ---- adapters of a network -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Folders of two random adapters of rank 4, and one of rank 2."""
    draft, folders = load("sd/draft.py"), []
    pipe = draft.load_pipeline(MINI)
    for k, rank in enumerate((4, 4, 2)):
        rng = generator(k)
        for name, value in draft.fresh_adapter(pipe.unet, rank, rng).items():
            if "lora_B" in name:
                value.data = 0.05 * torch.randn(value.shape, generator=rng)
        folders.append(tmp_path_factory.mktemp(f"adapter{k}"))
        draft.save_adapter(pipe.unet, folders[-1])
    return [str(folder) for folder in folders]


def predictions(module, adapters, weights):
    """What `soup` and `soup_factor` predict with these adapters, through `methods_at`, at one step."""
    args = module.parse_args([*TINY, "--adapters", *adapters[:2]])
    world = module.load_world(args)
    module.load_adapters(world, args)
    module.average_factors(world, weights)
    seen = []
    module.sample_ddpm = lambda predict_noise, x, timesteps, abar, rng, **options: seen.append(predict_noise(x, 301))
    methods = module.methods_at(world, args, 0, weights, generator())
    x = torch.randn(2, 4, 8, 8, generator=generator(3))
    with torch.no_grad():
        for name in ("soup", "soup_factor"):
            methods[name](x)
    return seen, world, args, x


def by_hand(adapters, weights, world, args, x, factors):
    """The prediction of the base model with its matrices changed by sum w B A, or by (sum w B) (sum w A)."""
    from safetensors.torch import load_file
    states = [load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in adapters[:2]]
    pipe = msdda.load_pipeline(args.model)
    for key in [k for k in states[0] if k.endswith(".lora.down.weight")]:
        pairs = [(s[key.replace("lora.down", "lora.up")], s[key]) for s in states]
        up, down = (sum(w * pair[k] for w, pair in zip(weights, pairs)) for k in (0, 1))
        delta = up @ down if factors else sum(w * b @ a for w, (b, a) in zip(weights, pairs))
        pipe.unet.get_parameter(key.removeprefix("unet.").replace("lora.down.", "")).data += delta
    with torch.no_grad():
        return msdda.noise_predictor(pipe.unet, world.cond[:1], world.uncond, args.guidance)(x, 301)


def test_soups_are_averages_of_products_and_of_factors(adapters):
    weights = (0.3, 0.7)
    seen, world, args, x = predictions(planted("sd/msdda.py"), adapters, weights)
    exact = [by_hand(adapters, weights, world, args, x, factors) for factors in (False, True)]
    assert (exact[0] - exact[1]).abs().max() > 0.02
    for found, truth in zip(seen, exact):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)
    bug = planted("sd/msdda.py", ('"soup": lambda x: sample_ddpm(soup, x', '"soup": lambda x: sample_ddpm(factors, x'))
    assert (predictions(bug, adapters, weights)[0][0] - exact[0]).abs().max() > 0.02


def test_an_adapter_is_alone_and_zero_is_the_base_model(adapters):
    args = msdda.parse_args([*TINY, "--adapters", *adapters[:2]])
    world = msdda.load_world(args)
    x = torch.randn(2, 4, 8, 8, generator=generator(3))

    @torch.no_grad()
    def predict(world):
        return msdda.noise_predictor(world.unet, world.cond[:1], world.uncond, args.guidance)(x, 301)

    base = predict(world)
    msdda.load_adapters(world, args)
    with torch.no_grad():
        found = [msdda.with_adapters(world, args, 0, scales)(x, 301) for scales in (
            {"saturation": 1.0}, {"contrast": 1.0}, dict(saturation=0.0, contrast=0.0), {"saturation": 1.0})]
    for k in (0, 1):
        alone = msdda.load_world(msdda.parse_args([*TINY, "--lora", adapters[k]]))
        torch.testing.assert_close(found[k], predict(alone), rtol=0, atol=1e-5)
    assert (found[2] - base).abs().max() < 1e-6 and torch.equal(found[3], found[0])


# ---- the script ------------------------------------------------------------------------------------------------------


def run_main(out, *flags):
    numbers = msdda.main(msdda.parse_args([*TINY, "--out", str(out), *flags]))
    record = json.loads((out / "sd_msdda/numbers.json").read_text())
    assert [r["name"] for r in record["rows"]] == list(numbers)
    assert all(math.isfinite(value) for value in numbers.values())
    return numbers


def test_same_seed_same_bytes(tmp_path, adapters):
    flags = ["--adapters", *adapters[:2]]
    first, again = (run_main(tmp_path / name, *flags) for name in ("first", "again"))
    same = {name for name in first if not name.endswith("seconds")}
    assert {name: first[name] for name in same} == {name: again[name] for name in same}
    figures = [(tmp_path / name / "sd_msdda/figure.png").read_bytes() for name in ("first", "again")]
    assert figures[0] == figures[1]
    assert first["blend.all.difference"] < 1e-3 and first["msdda_smc.w40_60.log_z"] < 0
    assert len({value for name, value in first.items() if name.endswith("all.calls")}) == 1
    assert first["single.w0_100.weighted"] == first["single.w0_100.contrast"]
    total = 0.4 * first["soup.w40_60.saturation"] + 0.6 * first["soup.w40_60.contrast"]
    assert first["soup.w40_60.weighted"] == pytest.approx(total, abs=1e-5) == first["soup.all.weighted"]


def test_other_ranks_and_the_reference(tmp_path, adapters):
    numbers = run_main(tmp_path, "--adapters", *adapters[1:], "--weights", "0.9,0.6", "--reward", "jpeg=1", "clip",
                       "--lora", adapters[0])
    assert "soup_factor.all.weighted" not in numbers and "switch.all.weighted" not in numbers
    assert "rgg.all.weighted" not in numbers  # jpeg has no gradient


def ends_with(capsys, sentence, function, *args, **options):
    with pytest.raises(SystemExit) as end:
        function(*args, **options)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and sentence in message


@pytest.mark.parametrize("flags, sentence", [
    (["--reward", "clip"], "takes two names"),
    (["--reward", "clip", "clip"], "takes two names"),
    (["--reward", "clip=2", "jpeg"], "without weights"),
    (["--weights", "0.5"], "two numbers like 0.5,0.5"),
    (["--weights", "0.5,nan"], "two numbers like 0.5,0.5"),
    (["--weights", "0.5,much"], "invalid"),
    (["--weights", "0,1", "1,0"], "nothing is merged"),
    (["--images", "24"], "must be a multiple of --particles 16, at least twice"),
    (["--images", "16"], "must be a multiple of --particles 16, at least twice"),
    (["--steps", "7"], "must be a multiple of 5"),
    (["--steps", "505"], "at most 300"),
    (["--ess", "1.5"], "--ess lies between 0 and 1"),
    (["--adapters", "sd/mini"], "expected 2 arguments"),
])
def test_bad_flags(flags, sentence, capsys):
    ends_with(capsys, sentence, msdda.parse_args, flags)


def test_missing_adapters(capsys, tmp_path):
    args = msdda.parse_args([*TINY, "--adapters", str(tmp_path), str(tmp_path)])
    ends_with(capsys, "holds no LoRA weights", msdda.load_adapters, msdda.load_world(args), args)
