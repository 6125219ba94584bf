"""Time and memory of sd/das.py, draft.py and ddpo.py on Stable Diffusion v1.5's shapes: random weights, no download.

    python tests/benchmark_sd.py                 a CPU: one step of DAS on one particle at 32 x 32 latents; minutes
    python tests/benchmark_sd.py --device cuda   512 x 512: DAS, 16 particles, 50 steps; an update of DRaFT and of DDPO

First, by counting shapes at 64 x 64 latents in bfloat16, what a backward pass keeps of UNet and decoder: the memory
that --chunk sets, with no GPU at hand. Then for each method and chunk: seconds, and those inside UNet, decoder and
reward, backward passes included (outside is what this repository costs), and images through the UNet, two each.
"""
import argparse
import tempfile
import time
import torch
from accelerate import Accelerator
from conftest import SOURCE, load
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = dict(cross_attention_dim=768)  # the other defaults of UNet2DConditionModel are those of v1.5
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
DEFAULTS = dict(methods=(["das"], ["das", "draft", "ddpo"]), chunk=([1], [1, 2, 4]), latent=(32, 64), steps=(1, 50),
                particles=(1, 16), dtype=("float32", "bfloat16"))  # on a CPU, on a GPU

class Edge(torch.autograd.Function):
    """Passes x on and calls tell(True); the backward pass, tell(False): it leaves where the forward pass entered."""
    @staticmethod
    def forward(ctx, x, tell, enters):
        ctx.args = tell, enters
        tell(enters)
        return x.view_as(x)
    @staticmethod
    def backward(ctx, gradient):
        tell, enters = ctx.args
        tell(not enters)
        return gradient, None, None

class Clock:
    """Seconds inside a module and images that entered it. Its tensor is argument `key`, its result may be a field."""
    def __init__(self, module, key=0, field=None):
        self.seconds, self.images, self.start, function = 0.0, 0, 0.0, module.forward
        def call(*args, **kwargs):
            where = kwargs if key else (args := list(args))
            x, self.images = where[key], self.images + len(where[key])
            if torch.is_grad_enabled() and not x.requires_grad:  # so that the backward pass reaches the edge
                x = x.detach().requires_grad_()
            where[key] = Edge.apply(x, self.tell, True)
            out = function(*args, **kwargs)
            if field:
                out[field] = Edge.apply(out[field], self.tell, False)
            return out if field else Edge.apply(out, self.tell, False)
        module.forward = call
    def tell(self, enters):
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        self.seconds, self.start = self.seconds + (not enters) * (time.perf_counter() - self.start), time.perf_counter()

def measure(name, chunk, args):
    """Rows of one method with one --chunk."""
    script, mini = load(f"sd/{name}.py"), SOURCE / "sd/mini"
    tokenizer = CLIPTokenizer.from_pretrained(mini / "tokenizer", model_max_length=77)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=768))
    pipe = StableDiffusionPipeline(
        AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT)), tokenizer, UNet2DConditionModel(
            sample_size=args.latent, **UNET), DDIMScheduler.from_pretrained(mini / "scheduler"), None, None)
    for kind, found in ((StableDiffusionPipeline, pipe), (CLIPModel, clip), (CLIPTokenizer, tokenizer)):
        give = staticmethod(lambda *_, found=found, **__: found)
        setattr(script, kind.__name__, type(kind.__name__, (kind,), dict(from_pretrained=give)))
    flags = dict(model="random", clip="random", prompts="a cat", steps=args.steps, guidance=7.5, chunk=chunk,
                 device=args.device, out=tempfile.mkdtemp())
    flags = script.parse_args([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    accelerator = Accelerator(cpu=args.device == "cpu")
    if name == "das":
        pipe.to(getattr(torch, args.dtype))
    model = script.Diffusion(flags, accelerator.device)
    torch.set_default_device(accelerator.device)
    (reward,) = script.make_rewards(flags, accelerator.device)
    gain = lambda x, number: torch.cat([reward(model.decode(v), 0) for v in x.split(chunk)])
    clocks = dict(unet=Clock(pipe.unet, 0, "sample"), decoder=Clock(pipe.vae.decoder),
                  reward=Clock(clip, "pixel_values", "image_embeds"))
    train = lambda update, *last: script.train(
        flags, accelerator, model, name, 1, lambda step, _: update(flags, model, gain, step, args.particles, *last))
    begin = time.perf_counter()
    with set_checkpoint_early_stop(False):  # else what is computed again ends before its last edge
        dict(das=lambda: script.das(model, gain, 0, 1, args.particles, flags, 0.5),
             draft=lambda: train(script.draft_update, flags.steps, True),
             ddpo=lambda: train(script.ddpo_update, flags.kl_weight))[name]()
    total = time.perf_counter() - begin
    rows = dict(seconds=total, **{f"seconds_{part}": clock.seconds for part, clock in clocks.items()},
                seconds_outside=total - sum(v.seconds for v in clocks.values()), unet_images=clocks["unet"].images)
    torch.set_default_device("cpu")
    peak = dict(peak_gib=torch.cuda.max_memory_allocated() / 2**30) if args.device == "cuda" else {}
    torch.cuda.reset_peak_memory_stats() if peak else None
    return rows | dict(seconds_an_image=total / args.particles) | peak

def activations(name, chunk, args):
    """Rows: GiB that the backward pass keeps of UNet (two images each, for guidance) and decoder; shapes alone."""
    kept, rows = {}, {}
    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes() / 2**30
        return x
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet, vae = UNet2DConditionModel(**UNET).requires_grad_(False), AutoencoderKL(**VAE).requires_grad_(False)
        x = torch.randn(chunk, 4, 64, 64, requires_grad=True)
        out = unet(x.repeat(2, 1, 1, 1), torch.ones(2 * chunk), torch.randn(2 * chunk, 77, 768)).sample
        for part, net in dict(unet=unet, decoder=vae).items():  # out lives, and with it all that is kept
            out = out if net is unet else vae.decode(x - out[:chunk]).sample
            weights = {p.untyped_storage()._cdata for p in net.parameters()}
            rows[f"{part}_gib"] = sum(v for key, v in kept.items() if key not in weights)
            kept.clear()
    torch.set_default_dtype(torch.float32)
    return rows

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    parser.add_argument("--methods", nargs="*", choices=["das", "draft", "ddpo"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of DAS; the others need float32")
    for flag in ("chunk", "latent", "steps", "particles"):  # particles of DAS, or paths of an update
        parser.add_argument(f"--{flag}", type=int, nargs="+" if flag == "chunk" else None)
    args = parser.parse_args()
    for key, values in DEFAULTS.items():
        if getattr(args, key) is None:
            setattr(args, key, values[args.device == "cuda"])
    print("problem method quantity estimate")
    for name, chunk in [("shapes", c) for c in (1, 2, 4)] + [(m, c) for m in args.methods for c in args.chunk]:
        for quantity, value in (activations if name == "shapes" else measure)(name, chunk, args).items():
            print(f"chunk_{chunk}", name, quantity, f"{value:.2f}", flush=True)
