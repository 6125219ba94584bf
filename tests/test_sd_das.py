"""sd/das.py and the world of the folder: z-scores on a model whose answer is known, model folders, flags, processes.

A double with the call signature of the UNet gives the exact noise of Gaussian latents and a linear decoder makes images
of them; prompts, guidance, kernel, decoder, chunks and weights go the way of Stable Diffusion. The exact answer comes
from the steps of diffusers' own scheduler.
"""
import csv
import fractions
import json
import os
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import SOURCE, in_two_processes, load, planted
from PIL import Image

das, MINI = load("sd/das.py"), SOURCE / "sd/mini"
KL_WEIGHT, GUIDANCE, STEPS = 0.15, 1.7, 6

@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # scripts run from any folder

# ---- a model with a known answer -------------------------------------------------------------------------------------
class GaussianUNet:
    """Exact noise (or velocity) of latents N(mean, 0.6), the mean (4,) being the first token of the prompt."""

    def __init__(self, levels, velocity):
        self.levels, self.velocity = levels, velocity
    def __call__(self, x, t, texts):
        abar, mean = self.levels[t][:, None, None, None], texts[:, 0, :, None, None]
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * 0.6 + 1 - abar)
        v = (eps - (1 - abar).sqrt() * x) / abar.sqrt()
        return types.SimpleNamespace(sample=v if self.velocity else eps)

class LinearDecoder:
    """Latents (n, 4, 1, 1) -> pixels (n, 3, 2, 2) around 0, so small that nothing is clipped."""

    config, dtype = types.SimpleNamespace(scaling_factor=0.5), torch.float64
    matrix = 0.05 * torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    def decode(self, latents):
        return types.SimpleNamespace(sample=(latents.flatten(1) @ self.matrix.T).view(-1, 3, 2, 2))

PIXELS = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
MEANS = torch.tensor([[0.4, -0.2, 0.1, 0.6], [-0.5, 0.3, 0.2, 0.1]], dtype=torch.float64)  # of two prompts
FREE = torch.tensor([[0.1, 0.2, 0.3, -0.2]], dtype=torch.float64)

def double(module, velocity=False):
    """A Diffusion of the doubles at the steps that the miniature's schedule has."""
    from diffusers import DDIMScheduler
    scheduler, model = DDIMScheduler.from_pretrained(MINI / "scheduler"), object.__new__(module.Diffusion)
    levels = scheduler.alphas_cumprod.double()
    times = torch.tensor([999, 800, 600, 400, 200, 100, 0])
    model.unet, model.pipe = GaussianUNet(levels, velocity), types.SimpleNamespace(vae=LinearDecoder())
    model.cond, model.uncond, model.guidance = MEANS[:, None], FREE.expand(2, 4)[:, None], GUIDANCE
    model.velocity, model.times, model.abar, model.shape = velocity, times[:-1], levels[times].tolist(), (4, 1, 1)
    return model, scheduler, times

def exact(model, scheduler, times):
    """Mean and variance of the sampler's latents, by diffusers' steps, and of the reward; log Z -> dict."""
    mean, offset, factor, var = FREE[0] + GUIDANCE * (MEANS[1] - FREE[0]), torch.zeros(4).double(), 1.0, 1.0
    for t, end in zip(times, times[1:].tolist()):
        scheduler.num_inference_steps = fractions.Fraction(1000, t.item() - end)  # its way to say t - end
        x = torch.stack([torch.zeros(4), torch.ones(4), torch.zeros(4)]).double()[:, :, None, None]
        eps = GaussianUNet(model.unet.levels, False)(x, t.expand(3), mean.expand(3, 1, 4)).sample
        z = torch.tensor([0.0, 0, 1]).double()[:, None, None, None].expand_as(x)
        x = scheduler.step(eps, t, x, eta=1.0, variance_noise=z).prev_sample[:, :, 0, 0]
        factor, sigma = (x[1] - x[0])[0], (x[2] - x[0])[0]
        offset, var = factor * offset + x[0], factor**2 * var + sigma**2
    slope = PIXELS @ LinearDecoder.matrix / LinearDecoder.config.scaling_factor / 2  # of the reward in the latents
    level = PIXELS.sum() / 2 + slope @ offset
    return dict(log_z=level / KL_WEIGHT + var * slope @ slope / KL_WEIGHT**2 / 2, mean=offset + var * slope / KL_WEIGHT,
                reward=level + var * slope @ slope / KL_WEIGHT)

def z_scores(module, groups=64, particles=64, chunk=4096, velocity=False, gradient=True):
    """Largest |z| of Z, the mean of the target and that of the reward, by das() in float64; how often it resampled."""
    torch.manual_seed(0)
    model, scheduler, times = double(module, velocity)
    truth, due = exact(model, scheduler, times), []
    args = types.SimpleNamespace(gamma=0.03, kl_weight=KL_WEIGHT, chunk=chunk)

    def gain(x, number):
        images = module.Diffusion.decode(model, x)
        return (images if gradient else images.detach()).flatten(1).double() @ PIXELS

    def watched(log_w, systematic=module.systematic):
        due.append((1 / log_w.softmax(1).square().sum(1) < particles / 2).double().mean().item())
        return systematic(log_w)

    module.systematic, original = watched, module.systematic
    torch.set_default_dtype(torch.float64)
    try:
        out = module.das(model, gain, 1, groups, particles, args, 0.3)
    finally:
        module.systematic = original
        torch.set_default_dtype(torch.float32)
    log_z, w = out["log_w"].logsumexp(1) - np.log(particles), out["log_w"].softmax(1)
    z = (log_z - truth["log_z"]).exp()
    x = torch.einsum("gp,gpd->gd", w, out["x"].flatten(2))
    values = [z - 1, *(z[:, None] * (x - truth["mean"])).T, z * ((w * out["gain"]).sum(1) - truth["reward"])]
    return max(abs((v.mean() / v.std() * groups**0.5).item()) for v in values), sum(due), out

@pytest.mark.parametrize("options", [{}, dict(velocity=True), dict(gradient=False)], ids=["noise", "velocity", "plain"])
def test_das_through_prompt_guidance_kernel_and_decoder_is_unbiased(options):
    z, due, _ = z_scores(das, **options)
    assert due > 1, "resampling must happen, or nothing is tested"
    assert z <= 5

BUGS = {
    "guidance ignored": ("self.guidance * (both", "1.0 * (both"),
    "first prompt for all": ("torch.cat([self.cond[number], self", "torch.cat([self.cond[0 * number], self"),
    "guidance the wrong way": ("out = both[len(x) :] +", "out = both[: len(x)] -"),
    "unscaled latents": ("x = (x / self.pipe.vae.config.scaling_factor)", "x = (x / 1)"),
    "images in [-1, 1]": (".sample.float() / 2 + 0.5).clamp(0, 1)", ".sample.float()).clamp(-1, 1)"),
    "reward temperature ignored": ("else x, number) / args.kl_weight", "else x, number)"),
    "noise of another step": ("for v in (number, self.times[i]))", "for v in (number, self.times[i] // 2))"),
    "shift forgotten": ("log_ratio = -(shift * (z + shift / 2))", "log_ratio = 0 * (shift * (z + shift / 2))"),
    "gradient left behind": ("torch.cat(v).unflatten(0, (groups", "torch.cat(v).roll(1, 0).unflatten(0, (groups"),
}

@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    assert not z_scores(planted("sd/das.py", BUGS[bug]))[0] <= 5  # or it is no number

def test_a_velocity_gives_the_same_noise():
    x, i = torch.randn(6, 4, 1, 1, dtype=torch.float64), torch.arange(6)
    torch.set_default_dtype(torch.float64)
    noise, velocity = (double(das, kind)[0].eps(x, i, i % 2) for kind in (False, True))
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(noise, velocity, rtol=1e-10, atol=1e-10)

def test_chunks_do_not_change_the_answer():
    whole, parts = (z_scores(das, 4, chunk=chunk)[2] for chunk in (4096, 17))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-10, atol=1e-10)

# ---- rewards ---------------------------------------------------------------------------------------------------------
def arguments(*flags):
    return das.parse_args(["--quick", "--out", "out", *flags])

def test_rewards_of_known_images(tmp_path):
    (tmp_path / "own.py").write_text("def red(images, prompts):\n    assert prompts == ['cat', 'dog', 'cat']\n"
                                     "    return images[:, 0].mean((1, 2))\n")
    names = ["saturation", "contrast", "jpeg", str(tmp_path / "own.py") + ":red"]
    args = arguments("--prompts", "cat", "dog", "--reward", *names)
    red, gray = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.5)
    red[0] = 0.8
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4).expand(3, 8, 8)
    saturation, contrast, jpeg, own = (f(torch.stack([red, gray, board]), torch.tensor([0, 1, 0]))
                                       for f in das.make_rewards(args, "cpu"))
    torch.testing.assert_close(saturation, torch.tensor([1.0, 0.0, 0.0]))
    assert contrast[0] < 1e-6 and contrast[1] < 1e-6 and 0.4 < contrast[2] < 0.5
    assert jpeg[1] > jpeg[2] and -1 < jpeg.min() < jpeg.max() < -0.1  # kilobytes
    torch.testing.assert_close(own, torch.tensor([0.8, 0.5, 0.5]))

def test_the_score_of_clip_is_that_of_transformers():
    from transformers import CLIPModel, CLIPTokenizer
    args = arguments("--prompts", "a photo of a cat", "a photo of a fish")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net, words = (c.from_pretrained(MINI / "clip_reward") for c in (CLIPModel, CLIPTokenizer))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073),
                                                          (0.26862954, 0.26130258, 0.27577711)))
    tokens = words(args.prompts, padding="max_length", return_tensors="pt").input_ids
    logits = net(input_ids=tokens, pixel_values=(images - mean) / std).logits_per_image / net.logit_scale.exp()
    score = das.make_rewards(args, "cpu")[0](images, torch.tensor([0, 1]))
    torch.testing.assert_close(score, logits.diagonal(), rtol=1e-4, atol=1e-5)

def test_rewards_that_are_refused(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "head.pth").write_bytes(b"not a file of torch")
    for flags in (["--reward", "beauty"], ["--reward", "broken.py:f"], ["--reward", "none.py:f"],
                  ["--reward", "aesthetic", "--aesthetic-head", "head.pth"], ["--clip", "no/such/folder"]):
        with pytest.raises(das.Refused) as error:
            das.make_rewards(arguments(*flags), "cpu")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400

# ---- model folders ---------------------------------------------------------------------------------------------------
def edited(folder, part, **changes):
    """A copy of the miniature whose <part>/config has the changes."""
    shutil.copytree(MINI, folder, copy_function=os.link)
    name = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(name.read_text()) | changes
    name.unlink()
    name.write_text(json.dumps(config))
    return folder

def opened(folder, *flags):
    return das.Diffusion(arguments("--model", str(folder), "--reward", "saturation", "--prompts", "cat", *flags), "cpu")

def test_half_precision_alone_bin_files_and_parts_named_but_absent(tmp_path):
    from diffusers import UNet2DConditionModel
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x.repeat(1, 1, 4, 4)[:, :, : opened(MINI).shape[1], : opened(MINI).shape[2]]
    expected = opened(MINI).eps(x, 3, 0)
    folder = edited(tmp_path / "half", "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index |= dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
                  feature_extractor=["transformers", "CLIPImageProcessor"])
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, name in dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model").items():
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.fp16.safetensors")
    torch.testing.assert_close(opened(folder).eps(x, 3, 0), expected)
    for kind, options in dict(bin=dict(safe_serialization=False), shards=dict(max_shard_size="2MB")).items():
        folder = edited(tmp_path / kind, "unet")
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        UNet2DConditionModel.from_pretrained(MINI / "unet").save_pretrained(folder / "unet", **options)
        torch.testing.assert_close(opened(folder).eps(x, 3, 0), expected)

REFUSED = {
    "inpainting": ("unet", dict(in_channels=9), "latents alone|size|shape"),
    "lcm": ("unet", dict(time_cond_proj_dim=256), "time and text|time_embedding"),
    "oblong": ("unet", dict(sample_size=[8, 16]), "square"),
    "sample": ("scheduler", dict(prediction_type="sample"), "noise or velocity"),
    "zero": ("scheduler", dict(rescale_betas_zero_snr=True), "between 0 and 1"),
    "short": ("scheduler", dict(num_train_timesteps=8), "fewer --steps"),
}

@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_refused(kind, tmp_path):
    part, changes, words = REFUSED[kind]
    with pytest.raises(das.Refused, match=words) as error:
        opened(edited(tmp_path / kind, part, **changes))
    assert "\n" not in str(error.value)

def test_files_that_are_broken_pass_on_the_library(tmp_path):
    for kind, content in dict(truncated=(MINI / "unet/diffusion_pytorch_model.safetensors").read_bytes()[:5000],
                              pointer=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n").items():
        folder = edited(tmp_path / kind, "unet")
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(content)
        with pytest.raises(das.Refused) as error:
            opened(folder)
        assert str(folder) in str(error.value) and "hf download" not in str(error.value)
    with pytest.raises(das.Refused, match="nowhere"):
        opened(tmp_path / "nowhere")

# ---- flags and whole runs --------------------------------------------------------------------------------------------
BAD = ["--reward clip clip=2", "--reward clip=much", "--prompts none.txt", "--prompts empty.txt", "--prompts cat cat",
       "--steps 0", "--guidance nan", "--kl-weight inf", "--seed -1", "--device tpu", "--out file", "--model photos",
       "--chunk -2"]
OWN = """ddpo --parts 0; ddpo --methods draft; constrained_alignment --reward jpeg clip; constrained_alignment --lag -1
dav --rounds 0; dav --children -1; dav --methods dave; dav --lr nan; msdda --sweep 0.5 1.5; msdda --reward clip
msdda --reward clip clip; and_composition --lora a b; and_concepts --prompts cat; and_concepts --prompts cat+
or_composition --prompts cat; das --gamma 0; das_online --methods das; and_concepts --model photos --clip photos
and_concepts --model photos --reward jpeg --clip-eval photos""".replace("\n", "; ").split("; ")
FLAGGED = [p.stem for p in sorted((SOURCE / "sd").glob("*.py")) if "checked(parser" in p.read_text()]

@pytest.mark.parametrize("line", OWN + [f"{script} {flags}" for script in FLAGGED for flags in BAD])
def test_bad_flags_are_one_sentence(line, capsys, tmp_path):
    script, *flags = line.split()
    [(tmp_path / name).write_text("\n") for name in ("empty.txt", "file")]
    if flags[0] == "--kl-weight" and script in ("and_composition", "and_concepts", "or_composition") or flags[0] in (
            "--reward", "--model") and script == "or_composition" or line == "msdda --model photos":
        pytest.skip("has no such flag, or no reward by CLIP")
    with pytest.raises((SystemExit, load(f"sd/{script}.py").Refused)) as end:
        load(f"sd/{script}.py").parse_args(flags)
    text = capsys.readouterr().err.strip().splitlines() or str(end.value).splitlines()
    assert getattr(end.value, "code", 2) == 2 and flags[0].strip("-") in text[-1] and len(text[-1]) < 300

def whole_run(out, *flags):
    das.main(das.parse_args(["--quick", "--steps", "3", "--methods", "das", "--out", str(out), *flags]))
    return json.loads((out / "numbers.json").read_text()), torch.load(out / "latents.pt")

def test_a_prompt_can_be_made_again_alone_and_files_are_complete(tmp_path, capsys):
    prompts = ["a photo of a cat", "\u732b", "\u72ac"]
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n".join(prompts) + "\n\n", encoding="utf-8")
    record, latents = whole_run(tmp_path / "all", "--prompts", "prompts.txt", "--seed", "1")
    assert capsys.readouterr().out.startswith("COARSE")
    assert len({(r["problem"], r["method"], r["quantity"]) for r in record["rows"]}) == len(record["rows"])
    assert {r["problem"] for r in record["rows"]} == {"all", *prompts}
    _, alone = whole_run(tmp_path / "alone", "--prompts", prompts[1], "--seed", "101")
    for key in alone["das"]:
        torch.testing.assert_close(latents["das"][key][1:2], alone["das"][key], rtol=0, atol=1e-3)  # of other sums in float32
    with open(tmp_path / "all/images.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 3 and {line["prompt"] for line in lines} == set(prompts)
    line = next(line for line in lines if line["method"] == "das" and line["prompt"] == prompts[2])
    assert Image.open(tmp_path / "all" / line["file"]).size == (32, 32) and line["seed"] == "201"
    assert min(abs(float(line["gain"]) - v) for v in latents["das"]["gain"][2].flatten().tolist()) < 1e-6

def test_two_processes_draw_groups_of_their_own(tmp_path):
    flags = "--quick --steps 2 --methods das --prompts cat --out".split()
    assert in_two_processes("sd/das.py", *flags, tmp_path / "two").count("COARSE") == 1
    _, one = whole_run(tmp_path / "one", "--steps", "2", "--prompts", "cat")
    two = torch.load(tmp_path / "two/latents.pt")
    assert two["das"]["x"].shape == one["das"]["x"].shape  # two groups of four particles, one from each process
    assert not torch.equal(two["das"]["x"][0, 0], two["das"]["x"][0, 1])
