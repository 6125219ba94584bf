"""The miniature Stable Diffusion: it loads, it draws what it is told, and its training goes on where it stopped."""
import json
import pathlib
import types

import numpy as np
import pytest
import torch
from conftest import SOURCE, load, planted
from PIL import Image, ImageDraw

pre = load("sd/pretrain.py")
MINI = SOURCE / "sd/mini"

@pytest.fixture(scope="module")
def pipe():
    pipe = pre.StableDiffusionPipeline.from_pretrained(MINI, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe

@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A folder of drawings: three discs each, that differ."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    for code in sum(pre.concepts().values(), []):
        image = Image.new("RGBA", (64, 64))
        for x, y, size, *color in rng.integers(0, 256, (3, 6)):
            box = x // 9 + 2, y // 9 + 2, x // 9 + size // 9 + 8, y // 9 + size // 9 + 8
            ImageDraw.Draw(image).ellipse([int(v) for v in box], fill=(*map(int, color), 255))
        image.save(folder / f"{code:x}.png")
    return folder

def images_of(pipe, prompts, seed=0):
    return pipe(prompts, num_inference_steps=8, guidance_scale=4.0, eta=1.0, output_type="pt",
                generator=torch.Generator().manual_seed(seed)).images

# ---- the folder that ships -------------------------------------------------------------------------------------------
def test_folder_is_small_and_has_no_artwork():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}

def test_one_token_for_a_known_word(pipe):
    words = {word for name in pre.concepts() for word in pre.caption(name).split()}
    for folder in ("tokenizer", "clip_reward", "clip_eval"):
        tokenizer = pre.CLIPTokenizer.from_pretrained(MINI / folder)
        ids = tokenizer(sorted(words)).input_ids
        assert {len(i) for i in ids} == {3} and len({i[1] for i in ids}) == len(words)
        assert tokenizer.eos_token_id == len(tokenizer) - 1  # CLIPTextModel finds the end as the largest id
        assert tokenizer("Tiger").input_ids == tokenizer("tiger").input_ids
        assert len(tokenizer("xylophone").input_ids) > 3  # an unknown word falls into pieces

def test_schedule_is_that_of_stable_diffusion(pipe):
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for scheduler in (pipe.scheduler, pre.SCHEDULE):
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - beta).cumprod(0), rtol=1e-5, atol=0)

def test_images_show_what_the_prompt_says(pipe):
    prompts = [pre.caption(name) for name in pre.ANIMALS]
    images, blind = images_of(pipe, prompts), images_of(pipe, [""] * len(prompts))
    ids = pre.token_ids(pipe.tokenizer, pre.ANIMALS)[0][:, 2]
    assert pipe.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == prompts[0]
    for name, least in (("clip_eval", 0.7), ("clip_reward", 0.15)):  # the reward's artist is a third one; chance: 0.02
        net = pre.CLIPModel.from_pretrained(MINI / name)
        with torch.no_grad():
            assert pre.recognised(*pre.embed(net, images, ids))["top1"] > least, name
            assert pre.recognised(*pre.embed(net, blind, ids))["top1"] < 0.2, name

# ---- its making ------------------------------------------------------------------------------------------------------
def test_every_animal_is_drawn():
    table = pre.concepts()
    codes = sum(table.values(), [])
    assert set(pre.ANIMALS) <= set(table) and len(pre.ANIMALS) == 45 and len(codes) == len(set(codes))
    assert table["cat"] == [0x1F408, 0x1F431] and table["red heart"] == [0x2764]
    assert pre.caption("elephant") == "a photo of an elephant" and pre.caption("unicorn", "a {}") == "a unicorn"

def test_tokenizer_of_any_words(tmp_path):
    letters = torch.randint(3, (60, 9), generator=torch.Generator().manual_seed(0)).tolist()  # merges collide
    words = {"".join("abn"[i] for i in word[: 1 + k % 9]) for k, word in enumerate(letters)} | {"banana", "ananas"}
    ids = pre.make_tokenizer(tmp_path, words)(sorted(words)).input_ids
    assert {len(i) for i in ids} == {3} and len({i[1] for i in ids}) == len(words)

def test_drawings_stay_whole_and_on_white(drawings):
    found = pre.Drawings([pre.read_pictures(drawings)], "cpu")
    assert found.weights.sum() == pytest.approx(1) and found.pictures.shape[1:] == (3, 4, 32, 32)
    animal = torch.tensor([found.names[i] in pre.ANIMALS for i in found.concept])
    assert found.weights[animal].sum() == pytest.approx(0.5)
    for images in (found.place(torch.arange(40)), found.distort(torch.arange(40), 1.0)):
        assert images.shape == (40, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    for size, pictures in zip(pre.SIZES, found.pictures[:, :, 3].movedim(1, 0)):  # opacity: nothing beyond its size
        seen = torch.stack([torch.stack([line.nonzero()[0, 0], line.nonzero()[-1, 0]])
                            for d in (1, 2) for line in pictures.amax(d)]).view(2, -1, 2)
        assert ((seen[..., 1] - seen[..., 0]).amax(0) - size + 1).abs().max() <= 1

def test_recognised():
    unit = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0.6, 0.8], [0, 0, 1], [1, 0, 0]])
    wanted = dict(top1=3 / 6, right_score=3.6 / 6, wrong_score=(6.4 - 3.6) / 2 / 6, diversity=(1 + 0.4 + 1) / 3)
    assert pre.recognised(unit, torch.eye(3)) == pytest.approx(wanted)

def fit(module, folder, stop=None, saved=None):
    """train_network on a line, interrupted after `stop` steps -> weights."""
    calls, folder = [], pathlib.Path(folder)
    def loss(net):
        calls.append(1)
        if stop and len(calls) > stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 3)
        return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean()
    torch.manual_seed(0)
    args = types.SimpleNamespace(seed=0, out=folder)
    return module.train_network(args, "vae", torch.nn.Linear(3, 1), loss, 40, 0.1, 0.0, saved)

@pytest.mark.parametrize("stop", [3, 8])
def test_an_interrupted_training_gives_the_same_weights(stop, tmp_path):
    whole, record = fit(pre, tmp_path)
    assert record["steps"] == 40
    with pytest.raises(KeyboardInterrupt):
        fit(pre, tmp_path, stop)
    saved = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert saved["record"]["steps"] == stop // 2 * 2  # twenty checkpoints in forty steps
    assert torch.equal(fit(pre, tmp_path, saved=saved)[0].weight, whole.weight)
    for change in (('(optimizer, "optimizer")', '(net, "net")'), ("torch.manual_seed(10**6 *", "(10**6 *")):
        other = fit(planted("sd/pretrain.py", change), tmp_path, saved=saved)[0]
        assert not torch.equal(other.weight, whole.weight), change

def test_quick_run(tmp_path, drawings, capsys):
    flags = ["--quick", "--artists", str(drawings), "--out", str(tmp_path)]
    pre.main(pre.parse_args([*flags, "--stage", "vae"]))
    assert "has to be trained" in capsys.readouterr().out
    args = pre.parse_args([*flags, "--resume"])
    args.size = (4, 2, 2, 1)
    pre.main(args)
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    table = {(r["problem"], r["method"], r["quantity"]): r["estimate"] for r in rows}
    assert len(table) == len(rows) and all(np.isfinite(value) for value in table.values())
    assert 0 < table["emoji", "vae", "pixel_error"] < 1 and 0 < table["emoji", "unet", "noise_loss"] < 2
    record = json.loads((SOURCE / "sd/results/pretrain_seed0.json").read_text())["rows"]
    assert {*table} == {(r["problem"], r["method"], r["quantity"]) for r in record if r["problem"] not in (
        "twemoji", "fluent")}
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix not in (".md", ""))
             for folder in (tmp_path / "mini", MINI)]
    assert files[0] == files[1]
    for name in [name for name in files[0] if name.endswith("/config.json") and not name.startswith("vae")]:
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path / "mini", MINI))
        assert {**made, **{key: shipped[key] for key in shipped if key.endswith("_version")}} == shipped
    (tmp_path / "vae.pt").write_text("nothing")
    with pytest.raises(pre.Refused, match="vae.pt: "):
        pre.main(args)

def test_bad_input(tmp_path, capsys):
    for source, sentence in ((tmp_path / "font.ttf", "font.ttf: OSError"), (tmp_path, "no picture of U[+]1F400, rat")):
        with pytest.raises(pre.Refused, match=sentence):
            pre.read_pictures(source)
    with pytest.raises(SystemExit) as end:
        pre.parse_args(["--size", "0", "1", "1", "1"])
    assert end.value.code == 2 and "numbers of steps are above 0" in capsys.readouterr().err
    args = pre.parse_args(["--quick", "--stage", "unet", "--out", str(tmp_path)])
    drawn = {code: torch.zeros(3, 4, 32, 32, dtype=torch.uint8) for code in sum(pre.concepts().values(), [])}
    with pytest.raises(pre.Refused, match="the autoencoder comes first"):
        pre.train_networks(args, pre.make_tokenizer(tmp_path / "tokenizer", {"cat"}), [drawn])
