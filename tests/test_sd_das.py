"""sd/das.py: rewards, loading, and z-scores of the production interface on a model whose answer is known.

The sampler is the text of toy/das.py and is tested there. Here a double with the call signature of the UNet gives the
exact noise of Gaussian latents, a linear decoder makes images of them, and prompts, guidance, scheduler, decoder,
chunks and reward go the way of Stable Diffusion. The exact answer comes from the steps of diffusers' own scheduler.
"""
import fractions
import io
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import SOURCE, load, planted
from PIL import Image

das = load("sd/das.py")
MINI = SOURCE / "sd/mini"
TINY = "--groups 2 --particles 4 --steps 3 --reference 10 --prompts cat tiger".split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(SOURCE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- a model with a known answer -------------------------------------------------------------------------------------


class GaussianUNet:
    """Exact noise of latents N(mean, 0.6), the mean (4,) being the first token of the prompt; calls as of a UNet."""

    def __init__(self, levels):
        self.levels, self.weight = levels, torch.zeros((), dtype=torch.float64)

    def parameters(self):
        return iter([self.weight])

    def __call__(self, x, t, encoder_hidden_states):
        abar, mean = self.levels[t][:, None, None, None], encoder_hidden_states[:, 0, :, None, None]
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * 0.6 + 1 - abar)
        return types.SimpleNamespace(sample=eps)


class LinearDecoder:
    """Latents (n, 4, 1, 1) -> pixels (n, 3, 2, 2) around 0, so small that nothing is clipped."""

    config = types.SimpleNamespace(scaling_factor=0.5)
    matrix = 0.1 * torch.randn(12, 4, generator=generator(1), dtype=torch.float64) * 0.5

    def parameters(self):
        return iter([self.matrix])

    def decode(self, latents):
        return types.SimpleNamespace(sample=(latents.flatten(1) @ self.matrix.T).view(-1, 3, 2, 2))


class Exact:
    """What six steps of diffusers' DDIM, at the times of the script, make of GaussianUNet, tilted by a reward that is linear in the pixels."""

    pixels = torch.randn(12, generator=generator(2), dtype=torch.float64)
    means = torch.tensor([[0.4, -0.2, 0.1, 0.6], [-0.5, 0.3, 0.2, 0.1]], dtype=torch.float64)  # of two prompts
    free = torch.tensor([0.1, 0.2, 0.3, -0.2], dtype=torch.float64)

    def __init__(self, args, number):
        from diffusers import DDIMScheduler
        self.scheduler = DDIMScheduler.from_pretrained(MINI / "scheduler")
        unet = GaussianUNet(self.scheduler.alphas_cumprod.double())
        mean = self.free + args.guidance * (self.means[number] - self.free)
        times = [*das.path_schedule(self.scheduler, args.steps)[0], 0]
        offset, factor, var = torch.zeros(4, dtype=torch.float64), 1.0, 1.0
        for t, end in zip(torch.tensor(times), times[1:]):
            self.scheduler.num_inference_steps = fractions.Fraction(1000, t.item() - end)  # its way to say t - end
            x = torch.stack([torch.zeros(4), torch.ones(4), torch.zeros(4)]).double()[:, :, None, None]
            eps = unet(x, t.expand(3), mean.expand(3, 1, 4)).sample
            z = torch.tensor([0.0, 0, 1]).double()[:, None, None, None].expand_as(x)
            x = self.scheduler.step(eps, t, x, eta=args.eta, variance_noise=z).prev_sample[:, :, 0, 0]
            factor, sigma = (x[1] - x[0])[0], (x[2] - x[0])[0]
            offset, var = factor * offset + x[0], factor**2 * var + sigma**2
        slope = self.pixels @ LinearDecoder.matrix / LinearDecoder.config.scaling_factor / 2  # of r in the latents
        level = 0.5 * self.pixels.sum() + slope @ offset
        self.sd = (var * slope @ slope).sqrt().item()
        self.base_mean, self.base_reward = offset, level.item()
        self.log_z = (level / args.kl_weight).item() + 0.5 * (self.sd / args.kl_weight) ** 2
        self.mean, self.reward = offset + var * slope / args.kl_weight, level.item() + self.sd**2 / args.kl_weight
        self.world = types.SimpleNamespace(
            unet=unet, scheduler=self.scheduler, shape=(4, 1, 1),
            cond=self.means[:, None], uncond=self.free[None, None],
            rewards=dict(linear=lambda images, number: images.flatten(1).double() @ self.pixels))


def arguments(**changes):
    args = das.parse_args("--steps 6 --guidance 1.7 --eta 0.8 --gamma 0.03".split())
    return types.SimpleNamespace(**vars(args) | dict(kl_weight=0.15, prompts=["one", "other"]) | changes)


def run_double(module, seed=0, groups=64, particles=64, ess=0.9, **changes):
    args = arguments(**changes)
    exact = Exact(args, 1)
    exact.world.decode = module.image_decoder(LinearDecoder(), args.chunk)
    reward = module.total_reward(exact.world, 1, dict(linear=0.0), dict(linear=1.0))
    rng = generator(seed)
    out = module.sample_aligned(exact.world, args, 1, reward, groups, particles, rng, ess=ess, max_shift=0.3)
    z = (out["log_z"] - exact.log_z).exp().double()
    w = out["log_w"].softmax(1).double()
    x = torch.einsum("gp,gpd->gd", w, out["x"].view(groups, particles, 4).double())
    r = (w * out["reward"].view(groups, particles)).sum(1)
    values = [z - 1, *(z[:, None] * (x - exact.mean)).T, z * (r - exact.reward)]
    return max(abs((v.mean() / v.std() * groups**0.5).item()) for v in values), out


@pytest.mark.parametrize("temper, guided", [("schedule", True), ("schedule", False), ("none", True)])
def test_das_through_prompt_guidance_scheduler_and_decoder_is_unbiased(temper, guided, monkeypatch):
    if not guided:
        monkeypatch.setattr(das, "das", lambda *args, das=das.das, **options: das(*args, guided=False, **options))
    z, out = run_double(das, temper=temper)
    assert sum(share for _, _, share in out["history"]) > 1, "resampling must happen, or nothing is tested"
    assert z <= 5


BUGS = {
    "guidance ignored": ("world.cond[number : number + 1], world.uncond, args.guidance)",
                         "world.cond[number : number + 1], world.uncond)"),
    "first prompt for all": ("noise_predictor(world.unet, world.cond[number : number + 1]",
                             "noise_predictor(world.unet, world.cond[:1]"),
    "guidance the wrong way": ("return free + guidance * (eps - free)", "return eps + guidance * (free - eps)"),
    "unscaled latents": ("(latents / vae.config.scaling_factor)", "latents"),
    "images in [-1, 1]": (".sample.float() / 2 + 0.5).clamp(0, 1)", ".sample.float()).clamp(-1, 1)"),
    "reward temperature ignored": ("args.kl_weight, args.eta", "1.0, args.eta"),
    "noise of the kernel ignored": ("args.kl_weight, args.eta", "args.kl_weight, 1.0"),
    "noise of another step": ("return unet(x.to(dtype), t, enc", "return unet(x.to(dtype), t // 2, enc"),
    "scale twice": ("sum(scale * (world", "sum(2 * scale * (world"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    assert run_double(planted("sd/das.py", BUGS[bug]))[0] > 5


def test_chunks_do_not_change_the_answer():
    (_, whole), (_, parts) = (run_double(das, 3, groups=4, chunk=chunk) for chunk in (4 * 64, 17))
    for name in ("x", "log_w", "log_z"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-6)


def test_without_a_reward_it_is_the_plain_sampler():
    args = arguments()
    world = Exact(args, 0).world
    plain = das.sample_base(world, args, 0, 8, generator(5))
    rng = generator(5)
    noise = torch.randn(8, 4, 1, 1, generator=rng)
    predict_noise = das.noise_predictor(world.unet, world.cond[:1], world.uncond, args.guidance)
    out = das.das(predict_noise, lambda x: torch.zeros(len(x)), noise, *das.path_schedule(world.scheduler, 6), rng, 4,
                  eta=args.eta, guided=False)
    assert torch.equal(out["x"], plain) and (out["log_z"] == 0).all()


def test_rows_of_the_base_model_agree_with_the_closed_form():
    """Mean and spread of the base reward, log Z by importance sampling, best of 16, all of unit-variance rewards."""
    args = arguments(groups=64, particles=16, reference=4096, reward=[("linear", 1.0)], select="draw",
                     max_shift=0.5, kl_weight=1.0)
    exact = [Exact(args, number) for number in (0, 1)]
    world = exact[0].world
    world.decode = das.image_decoder(LinearDecoder())
    results, levels, scales = das.run_methods(world, args, generator(7))
    assert scales["linear"] == pytest.approx(1 / exact[0].sd, rel=0.05)
    for number in (0, 1):
        assert levels[number]["linear"] == pytest.approx(exact[number].base_reward, abs=5 * exact[0].sd / 4096**0.5)
        for method, z, tolerance in (("reference", 0.5, 0.12), ("importance", 0.5, 0.2), ("das", 0.5, 0.2)):
            out = results[method][number]
            log_z = out["log_z"] if method != "reference" else out["log_w"]
            value, se = das.log_mean_and_se(log_z.flatten())
            assert abs(value - z) < 5 * se and se < tolerance / 4, method
        best = (results["best_of_n"][number]["w"].flatten() * results["best_of_n"][number]["reward"]).sum() / 64
        assert best.item() == pytest.approx(1.766, abs=5 * 0.55 / 8)  # E of the largest of 16 standard normals
        gain = (results["das"][number]["w"].flatten() * results["das"][number]["reward"]).sum() / 64
        assert gain.item() == pytest.approx(1.0, abs=0.25)  # a tilted standard normal


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_jpeg_is_the_size_of_the_file():
    images = torch.rand(3, 3, 16, 24, generator=generator())
    images[1] = 0.25
    for image, reward in zip(images, das.jpeg_reward(images)):
        file = io.BytesIO()
        Image.fromarray(np.uint8(np.round(255 * image.permute(1, 2, 0).numpy()))).save(file, "JPEG", quality=95)
        assert reward.item() == pytest.approx(-len(file.getvalue()) / 1000)
    assert das.jpeg_reward(images)[1] > das.jpeg_reward(images)[0]


def test_saturation_and_contrast_of_known_images():
    colors = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0], [0.8, 0.6, 0.4]])
    flat = colors[:, :, None, None].expand(4, 3, 6, 6)
    torch.testing.assert_close(das.saturation_reward(flat), torch.tensor([1, 0, 0, 0.5]), rtol=0, atol=1e-6)
    assert das.contrast_reward(flat).abs().max() < 1e-6
    board = ((torch.arange(6)[:, None] + torch.arange(6)) % 2).float().expand(1, 3, 6, 6)
    line = [math.exp(-0.5 * d * d) for d in range(-2, 3)]
    other = sum(line[1::2]) / sum(line)  # weight of the pixels of the other kind, in one direction
    torch.testing.assert_close(das.contrast_reward(board), torch.tensor([2 * other * (1 - other)]), rtol=1e-4, atol=0)


def test_rewards_of_clip_models_are_those_of_transformers():
    args = das.parse_args(["--prompts", "a photo of a cat", "tiger", "--reward", "clip", "pickscore", "--pickscore",
                           str(MINI / "clip_eval")])
    rewards, images = das.load_rewards(["clip", "pickscore"], args), torch.rand(3, 3, 32, 32, generator=generator())
    for name, folder in (("clip", args.clip), ("pickscore", args.pickscore)):
        clip = das.load_clip(folder)
        ids = torch.tensor(das.tokenize(clip.tokenizer, args.prompts))
        mean, std = (torch.tensor(v)[:, None, None] for v in (das.CLIP_MEAN, das.CLIP_STD))
        logits = clip.net(input_ids=ids, pixel_values=(images - mean) / std).logits_per_image
        expected = logits if name == "pickscore" else logits / clip.net.logit_scale.exp()
        for number in (0, 1):
            torch.testing.assert_close(rewards[name](images, number), expected[:, number], rtol=1e-4, atol=1e-5)
        mixed = rewards[name](images, torch.tensor([1, 0, 1]))
        torch.testing.assert_close(mixed, expected[range(3), [1, 0, 1]], rtol=1e-4, atol=1e-5)


def test_aesthetic_head_is_its_layers_one_after_the_other(tmp_path, capsys):
    sizes = [64, 12, 9, 7, 5, 1]  # the file has 768, 1024, 128, 64, 16, 1
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    state = {f"layers.{i}.{key}": value for i, layer in zip((0, 2, 4, 6, 7), layers)
             for key, value in layer.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    clip, images = das.load_clip(MINI / "clip_reward"), torch.rand(3, 3, 32, 32, generator=generator())
    score = das.aesthetic_reward(clip, tmp_path / "head.pth")(images)
    torch.testing.assert_close(score, torch.nn.Sequential(*layers)(das.clip_images(clip, images))[:, 0])
    state["layers.0.weight"] = torch.zeros(12, 63)
    torch.save(state, tmp_path / "other.pth")
    for path in (tmp_path / "nothing.pth", tmp_path / "other.pth", MINI / "model_index.json"):
        ends_with(capsys, "needs LAION's file sac+logos+ava1-l14-linearMSE.pth", das.aesthetic_reward, clip, path)


@pytest.mark.parametrize("name", ["saturation", "contrast", "clip"])
def test_gradients_of_rewards(name):
    args = das.parse_args(["--prompts", "cat", "--reward", name])
    reward = das.load_rewards([name], args)[name]
    x = torch.rand(2, 3, 32, 32, generator=generator()).mul(0.8).add(0.1).requires_grad_()
    grad = torch.autograd.grad(reward(x, 0).sum(), x)[0]
    with torch.no_grad():
        change = reward(x + 1e-3 * grad / grad.norm(), 0).sum() - reward(x - 1e-3 * grad / grad.norm(), 0).sum()
    assert change.item() == pytest.approx(2e-3 * grad.norm().item(), rel=0.05)


@pytest.mark.parametrize("name", ["jpeg", "saturation", "contrast", "clip"])
def test_rewards_take_images_in_range_only(name):
    reward = das.load_rewards([name], das.parse_args(["--reward", name]))[name]
    for wrong in (torch.full((1, 3, 32, 32), 1.5), torch.full((1, 3, 32, 32), -1.0)):
        with pytest.raises(AssertionError, match="not within"):
            reward(wrong, 0)


# ---- measures --------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_pairs_of_groups():
    unit = torch.nn.functional.normalize(torch.randn(12, 5, generator=generator()), dim=1)
    w = torch.rand(3, 4, generator=generator(1))
    w = w / w.sum(1, keepdim=True)
    pairs = [sum((w[a, i] * w[b, j] * (1 - unit[4 * a + i] @ unit[4 * b + j])).item() for i in range(4)
                 for j in range(4)) for a in range(3) for b in range(3) if a != b]
    assert das.diversity(w, unit) == pytest.approx(sum(pairs) / 6, abs=1e-6)


def test_diversity_of_the_target_is_the_mean_over_pairs_of_images():
    unit = torch.nn.functional.normalize(torch.randn(12, 5, generator=generator()), dim=1)
    w = torch.rand(12, generator=generator(1)).pow(3)
    weights = [(w[i] * w[j]).item() for i in range(12) for j in range(12) if i != j]
    far = [(1 - unit[i] @ unit[j]).item() for i in range(12) for j in range(12) if i != j]
    wanted = sum(a * b for a, b in zip(weights, far)) / sum(weights)
    assert das.target_diversity(w / w.sum(), unit) == pytest.approx(wanted, abs=1e-6)


def test_truncated_entropy_is_that_of_a_gaussian():
    x = torch.randn(4000, 6, generator=generator(), dtype=torch.float64) * torch.tensor([3.0, 2, 1, 0.5, 0.1, 0.1])
    exact = torch.distributions.Normal(0.0, torch.tensor([3.0, 2, 1, 0.5])).entropy().sum()
    assert das.truncated_entropy(x, 4) == pytest.approx(exact.item(), abs=0.1)
    with pytest.raises(AssertionError, match="needs more than"):
        das.truncated_entropy(x[:4], 4)


def test_surrogate_is_ridge_regression():
    clip = das.load_clip(MINI / "clip_reward")
    images, labels = torch.rand(20, 3, 32, 32, generator=generator()), torch.randn(20, generator=generator(1))
    surrogate = das.Surrogate(clip, "ucb", generator(2))
    surrogate.add(images[:12], labels[:12])
    surrogate.add(images[12:], labels[12:])
    f = surrogate.embed(images)
    residual = f.T @ (labels - f @ surrogate.weights) - surrogate.ridge * surrogate.weights  # of the normal equations
    assert residual.abs().max() < 1e-3
    bonus = surrogate(images) - f @ surrogate.weights
    assert (bonus > 0).all()
    for _ in range(30):
        surrogate.add(images, labels)
    assert (surrogate(images) - surrogate.embed(images) @ surrogate.weights).max() < bonus.min() / 2  # well known now


# ---- the script ------------------------------------------------------------------------------------------------------


def run_main(out, *flags):
    numbers = das.main(das.parse_args([*TINY, "--out", str(out), *flags]))
    record = json.loads((out / "sd_das/numbers.json").read_text())
    assert [r["name"] for r in record["rows"]] == list(numbers)
    assert all(np.isfinite(value) for value in numbers.values())
    return numbers


def test_same_seed_same_bytes(tmp_path):
    first, again = (run_main(tmp_path / name) for name in ("first", "again"))
    same = {name for name in first if not name.endswith("seconds")}
    assert {name: first[name] for name in same} == {name: again[name] for name in same}
    assert (tmp_path / "first/sd_das/figure.png").read_bytes() == (tmp_path / "again/sd_das/figure.png").read_bytes()
    assert first["base.all.evaluations"] == first["guidance.all.evaluations"] == first["das.all.evaluations"] == 48
    assert first["reference.cat.ess"] <= 10 and abs(first["base.all.gain"]) < 2


def test_several_rewards_without_gradient_and_the_black_box(tmp_path):
    numbers = run_main(tmp_path, "--reward", "jpeg=-0.5", "saturation", "--online", "ucb", "--rounds", "1")
    assert "guidance.all.gain" not in numbers and {"das.all.jpeg", "das.all.saturation"} <= set(numbers)
    assert numbers["round_001.online.queries"] == 4 and -3 < numbers["base.all.jpeg"] < -0.3


def test_chunks_on_the_miniature():
    args = das.parse_args([*TINY, "--chunk", "3"])
    world = das.load_world(args)
    reward = das.total_reward(world, 1, dict(clip=0.0), dict(clip=5.0))
    outs = []
    for args.chunk in (3, 64):
        outs.append(das.sample_aligned(world, args, 1, reward, 2, 4, generator(), ess=0, max_shift=0.5))
    for name in ("x", "log_w", "log_z"):
        torch.testing.assert_close(outs[0][name], outs[1][name], rtol=1e-3, atol=1e-3)


def test_adapter_is_loaded_and_frozen(tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    world = das.load_world(das.parse_args(["--prompts", "cat"]))
    x, base = torch.randn(2, 4, 8, 8, generator=generator()), das.noise_predictor(world.unet, world.cond)
    before = base(x, 301)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    world.unet.add_adapter(config, adapter_name="mine")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(world.unet, adapter_name="mine"))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    other = das.load_world(das.parse_args(["--prompts", "cat", "--lora", str(tmp_path)]))
    after = das.noise_predictor(other.unet, other.cond)(x, 301)
    torch.testing.assert_close(after, base(x, 301), rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-3
    assert not any(p.requires_grad for p in other.unet.parameters())


def test_the_old_layout_of_tokenizers_loads(tmp_path):
    shutil.copytree(MINI, tmp_path / "mini")
    for path in tmp_path.glob("mini/*/tokenizer.json"):
        path.unlink()  # Stable Diffusion v1.5 has vocab.json and merges.txt alone
    prompts = ["a photo of a tiger", "xylophone"]
    texts = [das.clip_text(das.load_clip(folder / "clip_eval"), prompts) for folder in (MINI, tmp_path / "mini")]
    assert torch.equal(*texts)
    cond = [das.encode_prompts(das.load_pipeline(folder), prompts) for folder in (MINI, tmp_path / "mini")]
    assert torch.equal(*cond)


# ---- bad input -------------------------------------------------------------------------------------------------------


def ends_with(capsys, sentence, function, *args, **options):
    with pytest.raises(SystemExit) as end:
        function(*args, **options)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and sentence in message


@pytest.mark.parametrize("flags, sentence", [
    (["--reward", "beauty"], "there is no reward 'beauty', only jpeg, saturation"),
    (["--reward", "jpeg=much"], "the weight of 'jpeg=much' is no number"),
    (["--prompts", "empty.txt"], "holds no prompt"),
    (["--prompts", " "], "holds no prompt"),
    (["--prompts", "missing.txt"], "cannot be read"),
    (["--particles", "0"], "must be above zero"),
    (["--steps", "1001"], "at most 1000"),
    (["--groups", "1"], "at least 2"),
    (["--online", "greedy"], "invalid choice"),
    (["--dtype", "float8"], "invalid choice"),
])
def test_bad_flags(flags, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    ends_with(capsys, sentence, das.parse_args, flags)


def test_cuda_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    ends_with(capsys, "is no device of this machine", das.parse_args, ["--device", "cuda"])


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("cat\n\n a photo of a dog \n")
    args = das.parse_args(["--prompts", "tiger", str(tmp_path / "prompts.txt")])
    assert args.prompts == ["tiger", "cat", "a photo of a dog"]


def test_missing_models(capsys, tmp_path):
    for flags, sentence in ((["--model", str(tmp_path)], "is no Stable Diffusion model"),
                            (["--clip-eval", str(tmp_path)], "is no CLIP model"),
                            (["--lora", str(tmp_path)], "holds no LoRA weights"),
                            (["--reward", "pickscore"], "yuvalkirstain/PickScore_v1 is no CLIP model")):
        ends_with(capsys, sentence, das.load_world, das.parse_args([*TINY, *flags]))


def test_a_reward_that_is_no_number(capsys):
    args = arguments()
    world = Exact(args, 0).world
    world.decode = das.image_decoder(LinearDecoder())
    for reward in (lambda images: images.flatten(1).sum(1) * math.nan, lambda images: images.mean((2, 3))):
        ends_with(capsys, "one finite number per sample", das.sample_aligned, world, args, 0, reward, 2, 4, generator(),
                  ess=0.5, max_shift=0.5)
    ends_with(capsys, "no gradient", das.sample_aligned, world, args, 0, das.jpeg_reward, 2, 4, generator(), ess=0.5,
              max_shift=0.5)
