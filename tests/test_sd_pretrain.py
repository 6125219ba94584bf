"""The miniature Stable Diffusion: it loads, it draws what it is told, the shared functions do what diffusers does."""
import copy
import json
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import SOURCE, load, planted

pre = load("sd/pretrain.py")
MINI = SOURCE / "sd/mini"


@pytest.fixture(scope="module")
def pipe():
    return pre.load_pipeline(MINI)


@pytest.fixture(scope="module")
def clips():
    return {name: pre.load_clip(MINI / name) for name in ("clip_reward", "clip_eval")}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def animals(pipe):
    """One image of each of DDPO's animals (45, 3, 32, 32), 10 steps with guidance."""
    cond = pre.encode_prompts(pipe, [pre.caption(name) for name in pre.ANIMALS])
    predict_noise = pre.noise_predictor(pipe.unet, cond, pre.encode_prompts(pipe, [""]), 4.0)
    with torch.no_grad():
        x = pre.ddim_sample(predict_noise, torch.randn(45, 4, 8, 8, generator=generator()),
                            *pre.ddim_schedule(pipe.scheduler, 10), generator(1))
        return pre.image_decoder(pipe.vae)(x)


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_folder_is_small_and_has_no_artwork():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}


def test_plain_diffusers_loads_it_offline():
    from diffusers import StableDiffusionPipeline
    plain = StableDiffusionPipeline.from_pretrained(MINI, safety_checker=None)
    plain.set_progress_bar_config(disable=True)

    def draw():
        return plain(["cat", "a photo of a tiger"], num_inference_steps=4, guidance_scale=4.0, eta=1.0,
                     generator=generator(), output_type="np").images

    images = draw()
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    assert images.tobytes() == draw().tobytes()


def test_one_token_for_a_known_word(pipe):
    from transformers import CLIPTokenizer
    words = {word for name in pre.concepts() for word in pre.caption(name).split()}
    for tokenizer in (pipe.tokenizer, *(CLIPTokenizer.from_pretrained(MINI / name) for name in
                                        ("tokenizer", "clip_reward", "clip_eval"))):
        ids = tokenizer(sorted(words)).input_ids
        assert {len(i) for i in ids} == {3} and len({i[1] for i in ids}) == len(words)
        assert {i[0] for i in ids} == {tokenizer.bos_token_id} and {i[2] for i in ids} == {tokenizer.eos_token_id}
        assert tokenizer.eos_token_id == len(tokenizer) - 1  # CLIPTextModel finds the end as the largest id
        assert tokenizer("Tiger").input_ids == tokenizer("tiger").input_ids
        assert len(tokenizer("xylophone").input_ids) > 3  # an unknown word falls into pieces
    assert pre.tokenize(pipe.tokenizer, ["a " * 40])[0][-1] == pipe.tokenizer.eos_token_id


def test_tokenizer_of_any_words(tmp_path):
    letters = torch.randint(3, (60, 9), generator=generator()).tolist()  # three letters: merges collide all the time
    words = {"".join("abn"[i] for i in word[: 1 + k % 9]) for k, word in enumerate(letters)} | {"banana", "ananas"}
    ids = pre.make_tokenizer(tmp_path, words)(sorted(words)).input_ids
    assert {len(i) for i in ids} == {3} and len({i[1] for i in ids}) == len(words)


def test_schedule_is_that_of_stable_diffusion(pipe):
    levels = pipe.scheduler.alphas_cumprod
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(levels.double(), (1 - beta).cumprod(0), rtol=1e-5, atol=0)
    timesteps, abar = pre.ddim_schedule(pipe.scheduler, 20)
    assert timesteps[:2] == [951, 901] and timesteps[-1] == 1 and abar[-1] == pytest.approx(levels[0].item())


# ---- the shared functions against diffusers and transformers ---------------------------------------------------------


def own_images(module, pipe):
    cond, uncond = module.encode_prompts(pipe, ["a cat", "red heart"]), module.encode_prompts(pipe, [""])
    x = torch.randn(2, 4, 8, 8, generator=generator())
    predict_noise = module.noise_predictor(pipe.unet, cond, uncond, 3.0)
    x = module.ddim_sample(predict_noise, x, *module.ddim_schedule(pipe.scheduler, 5), generator(), eta=0.0)
    with torch.no_grad():
        return module.image_decoder(pipe.vae)(x)


@pytest.fixture(scope="module")
def diffusers_images(pipe):
    images = pipe(["a cat", "red heart"], num_inference_steps=5, guidance_scale=3.0, eta=0.0, output_type="np",
                  latents=torch.randn(2, 4, 8, 8, generator=generator())).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_images_equal_those_of_diffusers(pipe, diffusers_images):
    torch.testing.assert_close(own_images(pre, pipe), diffusers_images, rtol=0, atol=1e-5)


BUGS = {
    "unscaled latents": ("(latents / vae.config.scaling_factor)", "latents"),
    "guidance the wrong way": ("return free + guidance * (eps - free)", "return eps + guidance * (free - eps)"),
    "no guidance": ("return free + guidance * (eps - free)", "return eps"),
    "images in [-1, 1]": (".sample.float() / 2 + 0.5).clamp(0, 1)", ".sample.float()).clamp(0, 1)"),
    "last level 1": ("for t in timesteps), float(scheduler.final_alpha_cumprod)]", "for t in timesteps), 1.0]"),
    "levels of the next step": ("*(levels[t] for t in timesteps)", "*(levels[t - 1] for t in timesteps)"),
}


@pytest.mark.parametrize("change", BUGS.values(), ids=BUGS)
def test_planted_bugs_are_seen(change, pipe, diffusers_images):
    images = own_images(planted("sd/pretrain.py", change), pipe)
    assert (images - diffusers_images).abs().max() > 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_kernel_equals_the_step_of_diffusers(pipe, eta):
    timesteps, abar = pre.ddim_schedule(pipe.scheduler, 7)
    x, eps, z = torch.randn(3, 2, 4, 8, 8, generator=generator(), dtype=torch.float64)
    for i, t in enumerate(timesteps):
        mean, sigma = pre.ddim_kernel((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i], abar[i + 1], eta)
        step = pipe.scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(mean + sigma * z, step, rtol=1e-5, atol=1e-5)  # theirs rounds the levels to float32


def test_prompt_embeddings_equal_those_of_diffusers(pipe):
    cond, uncond = pipe.encode_prompt(["a cat", "cactus"], "cpu", 1, True)
    torch.testing.assert_close(pre.encode_prompts(pipe, ["a cat", "cactus"]), cond, rtol=0, atol=0)
    torch.testing.assert_close(pre.encode_prompts(pipe, [""]), uncond[:1], rtol=0, atol=0)


def test_noise_in_chunks_and_with_a_prompt_for_each_latent(pipe):
    cond, uncond = pre.encode_prompts(pipe, ["cat", "dog", "red heart"]), pre.encode_prompts(pipe, [""])
    x = torch.randn(3, 4, 8, 8, generator=generator(), requires_grad=True)

    def noise_and_gradient(chunk, guidance=3.0, cond=cond):
        eps = pre.noise_predictor(pipe.unet, cond, uncond, guidance, chunk)(x, 301)
        return eps.detach(), torch.autograd.grad((eps**2).sum(), x)[0]

    whole = noise_and_gradient(None)
    for chunk in (1, 2):
        for a, b in zip(noise_and_gradient(chunk), whole):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    alone = noise_and_gradient(None, cond=cond[1:2])[0]  # the second prompt for all latents
    torch.testing.assert_close(alone[1], whole[0][1], rtol=1e-4, atol=1e-5)
    assert (alone[0] - whole[0][0]).abs().max() > 0.01
    plain = pipe.unet(x, 301, encoder_hidden_states=cond).sample
    torch.testing.assert_close(noise_and_gradient(None, 1.0)[0], plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 prompts for 2 latents"):
        pre.noise_predictor(pipe.unet, cond)(x[:2], 301)


def test_clip_score_equals_that_of_transformers(clips):
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor
    images = torch.rand(2, 3, 32, 32, generator=generator())
    pixels = (images * 255).round()
    for name, clip in clips.items():
        processor, tokenizer = (kind.from_pretrained(MINI / name) for kind in (CLIPImageProcessor, AutoTokenizer))
        pictures = [Image.fromarray(p.byte().permute(1, 2, 0).numpy()) for p in pixels]
        inputs = tokenizer(["a photo of a cat", "dog"], padding="max_length", return_tensors="pt")
        logits = clip.net(input_ids=inputs.input_ids, **processor(pictures, return_tensors="pt")).logits_per_image
        score = pre.clip_images(clip, pixels / 255) @ pre.clip_text(clip, ["a photo of a cat", "dog"]).T
        torch.testing.assert_close(score, logits / clip.net.logit_scale.exp(), rtol=0, atol=1e-5)
        large = torch.nn.functional.interpolate(pixels / 255, scale_factor=4, mode="bicubic").clamp(0, 1)
        assert ((pre.clip_images(clip, large) * pre.clip_images(clip, pixels / 255)).sum(1) > 0.9).all()


# ---- what it learned -------------------------------------------------------------------------------------------------


def test_images_show_what_the_prompt_says(animals, clips):
    prompts = [pre.caption(name) for name in pre.ANIMALS]
    for name, least in (("clip_eval", 0.7), ("clip_reward", 0.15)):  # the reward's artist is a third one; chance: 0.02
        score = pre.clip_images(clips[name], animals) @ pre.clip_text(clips[name], prompts).T
        right, order = score.diagonal(), torch.roll(score, 1, 1).diagonal()
        assert (score.argmax(1) == torch.arange(45)).float().mean() > least, name
        assert (right > order).float().mean() > 0.85, name


def test_images_do_not_show_it_without_the_prompt(pipe, clips):
    with torch.no_grad():
        predict_noise = pre.noise_predictor(pipe.unet, pre.encode_prompts(pipe, [""]))
        x = pre.ddim_sample(predict_noise, torch.randn(45, 4, 8, 8, generator=generator()),
                            *pre.ddim_schedule(pipe.scheduler, 10), generator(1))
        images = pre.image_decoder(pipe.vae)(x)
    texts = pre.clip_text(clips["clip_eval"], [pre.caption(name) for name in pre.ANIMALS])
    assert pre.recognised(pre.clip_images(clips["clip_eval"], images), texts)[0] < 0.2


def test_adapters(pipe, tmp_path):
    from peft import LoraConfig
    unet = copy.deepcopy(pipe.unet)
    x, cond = torch.randn(2, 4, 8, 8, generator=generator()), pre.encode_prompts(pipe, ["cat"])
    base = pre.noise_predictor(pipe.unet, cond)(x, 501)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    unet.add_adapter(config, adapter_name="a")
    predict_noise = pre.noise_predictor(unet, cond)
    assert all(("lora" in name) == p.requires_grad for name, p in unet.named_parameters())
    changed = predict_noise(x, 501)
    assert (changed - base).abs().max() > 1e-3
    unet.disable_adapters()
    assert torch.equal(predict_noise(x, 501), base)
    unet.enable_adapters()
    unet.save_lora_adapter(tmp_path, adapter_name="a")
    other = copy.deepcopy(pipe.unet)
    other.load_lora_adapter(tmp_path, adapter_name="b", prefix=None, use_safetensors=True)
    torch.testing.assert_close(pre.noise_predictor(other, cond)(x, 501), changed, rtol=0, atol=1e-6)


# ---- its training ----------------------------------------------------------------------------------------------------


def test_every_animal_is_drawn():
    table = pre.concepts()
    codes = sum(table.values(), [])
    assert set(pre.ANIMALS) <= set(table) and len(pre.ANIMALS) == 45 and len(codes) == len(set(codes))
    assert table["cat"] == [0x1F408, 0x1F431] and table["red heart"] == [0x2764]
    assert pre.caption("elephant") == "a photo of an elephant" and pre.caption("unicorn", "a {}") == "a unicorn"


def test_recognised_and_pair_distance():
    texts = torch.eye(3)
    unit = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0.6, 0.8], [0, 0, 1], [1, 0, 0]])
    assert pre.recognised(unit, texts) == pytest.approx([3 / 6, 3.6 / 6, (6.4 - 3.6) / 2 / 6])
    assert pre.pair_distance(unit.view(3, 2, 3)) == pytest.approx((1 + 0.4 + 1) / 3)


@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_training_gives_the_same_bytes(stop, tmp_path):
    args = types.SimpleNamespace(seed=0, quick=True, device="cpu")

    def loss(net, rng):
        x = torch.randn(8, 3, generator=rng)
        return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean()

    def run(folder, loss=loss, resume=False):
        torch.manual_seed(0)
        folder.mkdir(exist_ok=True)
        return pre.train("net", torch.nn.Linear(3, 1), loss, 40, 0.1, 0.0, args, folder, generator(), resume)

    calls = []

    def interrupted(net, rng):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return loss(net, rng)

    whole = run(tmp_path / "whole")[0]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", interrupted)
    assert torch.load(tmp_path / "parts/net.pt")["step"] == stop // 2 * 2  # twenty checkpoints in forty steps
    resumed, record = run(tmp_path / "parts", resume=True)
    again, same = run(tmp_path / "parts", resume=True)  # finished: returns what is stored
    for a, b, c in zip(whole.parameters(), resumed.parameters(), again.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert record == same and record["steps"] == 40
    args.seed = 1
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", resume=True)


def test_quick_run(tmp_path, capsys):
    args = pre.parse_args(["--quick", "--out", str(tmp_path)])
    if not args.font.exists():
        pytest.skip(f"the drawings are not installed (Debian package fonts-noto-color-emoji: {args.font})")
    args.stage = "vae"
    pre.main(args)
    assert "Still to train" in capsys.readouterr().out
    args = pre.parse_args(["--quick", "--resume", "--out", str(tmp_path)])
    numbers = pre.main(args)
    assert all(np.isfinite(value) for value in numbers.values())
    assert 0 < numbers["vae.emoji.pixel_error"] < 1 and 0 < numbers["unet.emoji.noise_loss"] < 2
    record = json.loads((tmp_path / "sd_pretrain/numbers.json").read_text())
    assert [r["name"] for r in record["rows"]] == list(numbers)
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".md")
             for folder in (tmp_path / "sd_pretrain/mini", MINI)]
    assert files[0] == files[1]
    for name in [name for name in files[0] if name.endswith("/config.json") and not name.startswith("vae")]:
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path / "sd_pretrain/mini", MINI))
        assert {**made, **{key: shipped[key] for key in shipped if key.endswith("_version")}} == shipped


# ---- bad input -------------------------------------------------------------------------------------------------------


def ends_with(capsys, sentence, function, *args):
    with pytest.raises(SystemExit) as end:
        function(*args)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and sentence in message


def test_bad_input(capsys, tmp_path):
    ends_with(capsys, "is no Stable Diffusion model", pre.load_pipeline, tmp_path / "nothing")
    ends_with(capsys, "is no Stable Diffusion model", pre.load_pipeline, MINI / "clip_eval")
    ends_with(capsys, "is no CLIP model", pre.load_clip, tmp_path)
    ends_with(capsys, "must be above zero", pre.parse_args, ["--unet-steps", "0"])
    ends_with(capsys, "there is only one size", pre.parse_args, ["--paper"])
    ends_with(capsys, "neither a font nor a folder", pre.read_pictures, tmp_path / "font.ttf")
    ends_with(capsys, "has no picture of U+1F400, rat", pre.read_pictures, tmp_path)
    for images in (torch.full((1, 3, 2, 2), 1.1), torch.full((1, 3, 2, 2), -0.1), torch.full((1, 3, 2, 2), torch.nan)):
        with pytest.raises(AssertionError, match="not within"):
            pre.images_in_range(images)
    with pytest.raises(AssertionError, match="shape"):
        pre.images_in_range(torch.zeros(3, 2, 2))


def test_another_kind_of_model_is_refused(tmp_path, capsys):
    shutil.copytree(MINI, tmp_path / "mini")
    path = tmp_path / "mini/scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    ends_with(capsys, "does not predict the noise", pre.load_pipeline, tmp_path / "mini")


def test_a_foreign_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "net.pt").write_text("nothing")
    ends_with(capsys, "is no checkpoint of this script", pre.read_checkpoint, tmp_path / "net.pt", "", "cpu")
