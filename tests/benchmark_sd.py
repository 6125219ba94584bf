"""Time and memory of the methods of sd/ on a Stable Diffusion v1.5 of true size with random weights: no download.

    python tests/benchmark_sd.py --device cuda                    512 x 512, bfloat16
    python tests/benchmark_sd.py --device cpu --tiny --steps 3    only checks that it runs

A line for each method and chunk, of DAS, a training step of DRaFT and DDPO, an E-step of DAV (two children a state) and
a dual step of the product of three adapters, which decodes nothing: seconds per image, predictions of the UNet per
image (two with guidance), share of the time spent outside UNet, decoder and reward, peak memory. It has been checked at
the tiny size on a CPU alone: the time and memory at true size were not measured. Outside is what this repository's own
text costs; it should be at most 10%.
"""
import argparse
import time
import types
import warnings

import peft
import torch
from conftest import load
from torch.utils.checkpoint import set_checkpoint_early_stop

UNET = dict(sample_size=64, cross_attention_dim=768)  # the defaults of UNet2DConditionModel are those of v1.5
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
              image_size=224, projection_dim=768)  # CLIP ViT-L/14
TINY = dict(unet=dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4,
                      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32),
            vae=dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1, sample_size=64),
            vision=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
                        image_size=32, projection_dim=32))


class Clock:
    """Seconds inside each part of the model, forward and backward, the device being waited for at every edge."""

    def __init__(self, device):
        self.device, self.seconds, self.depth, self.begin, self.latents = device, {}, {}, {}, 0

    def now(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def edge(self, part, enters):
        depth = self.depth[part] = self.depth.get(part, 0) + (1 if enters else -1)
        if enters and depth == 1:
            self.begin[part] = self.now()
        elif not enters and depth == 0:
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - self.begin[part]


class Edge(torch.autograd.Function):
    """Passes a tensor on and tells the clock; the backward pass leaves a part where the forward pass entered it."""

    @staticmethod
    def forward(ctx, x, clock, part, enters):
        ctx.args = clock, part, enters
        clock.edge(part, enters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        clock, part, enters = ctx.args
        clock.edge(part, not enters)
        return gradient, None, None, None


def timed(function, clock, part):
    """function(x, ...) with its edges told to the clock; its result is a tensor or has one as `sample`."""

    def call(x, *args, **kwargs):
        if part == "unet":
            clock.latents += len(x)
        if torch.is_grad_enabled() and not x.requires_grad:  # so that the backward pass reaches the edge
            x = x.detach().requires_grad_()
        out = function(Edge.apply(x, clock, part, True), *args, **kwargs)
        if torch.is_tensor(out):
            return Edge.apply(out, clock, part, False)
        out.sample = Edge.apply(out.sample, clock, part, False)
        return out

    return call


def build(args, script):
    """A world as of load_world with random weights, one prompt, the CLIP score as reward, and its clock."""
    import diffusers
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    diffusers.utils.logging.set_verbosity_error()
    sizes = TINY if args.tiny else dict(unet={}, vae={}, vision={})
    torch.manual_seed(0)
    with torch.device(args.device):
        unet = UNet2DConditionModel(**UNET | sizes["unet"])
        vae = AutoencoderKL(**VAE | sizes["vae"])
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | sizes["vision"]))
    for net in (unet, vae, vision):
        net.requires_grad_(False).to(args.device, getattr(torch, args.dtype)).eval()
    clock = Clock(args.device)
    unet.forward, vae.decode = timed(unet.forward, clock, "unet"), timed(vae.decode, clock, "decoder")
    clip = types.SimpleNamespace(net=types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=vision.config), dtype=vision.dtype, vision_model=vision.vision_model,
        visual_projection=vision.visual_projection))
    score = timed(lambda images: script.clip_images(clip, images)[:, 0], clock, "reward")
    levels = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scheduler = DDIMScheduler(trained_betas=levels.tolist(), clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    text = torch.randn(2, 1, 77, width, device=args.device, dtype=getattr(torch, args.dtype))
    return types.SimpleNamespace(
        unet=unet, scheduler=scheduler, decode=script.image_decoder(vae, args.chunk), shape=(4, size, size),
        clock=clock, cond=text[0], uncond=text[1], rewards={"clip": lambda images, number: score(images)},
        level={"clip": torch.zeros(1, device=args.device)}, spread={"clip": 0.05})


def das_run(args):
    """DAS on one group of args.batch particles: the function to time, its world, the images that it gives."""
    das = load("sd/das.py")
    world, rng = build(args, das), torch.Generator(args.device).manual_seed(0)
    predict_noise = das.noise_predictor(world.unet, world.cond, world.uncond, args.guidance)

    def run():
        noise = torch.randn(args.batch, *world.shape, generator=rng, device=args.device)
        das.das(predict_noise, lambda x: world.rewards["clip"](world.decode(x), 0), noise,
                *das.path_schedule(world.scheduler, args.steps), rng, args.batch, 0.025, max_shift=0.5,
                chunk=args.chunk)

    return run, world, 1


def training_run(name):
    """One round of a training script, with KL: a function like das_run."""

    def make(args):
        script = load(f"sd/{name}.py")
        world, rng = build(args, script), torch.Generator(args.device).manual_seed(0)
        weights = script.fresh_adapter(world.unet, 4, rng)
        optimizer = torch.optim.Adam(weights.values(), 1e-4)
        update = (script.draft_update(world, args, 0.5, args.steps) if name == "draft" else
                  script.ddpo_update(world, args, 0.5))
        return lambda: update(rng, lambda: (optimizer.step(), optimizer.zero_grad()), {}), world, args.batch

    return make


def dav_run(args):
    """One E-step of DAV, args.batch paths of which each state has two children: a function like das_run."""
    dav = load("sd/dav.py")
    world, rng = build(args, dav), torch.Generator(args.device).manual_seed(0)
    dav.fresh_adapter(world.unet, 4, rng)
    world.unet.requires_grad_(False)  # the search has a gradient of the latents, not of weights
    return lambda: dav.e_step(world, args, 0, args.batch, rng), world, args.batch


def and_run(args):
    """One dual step of the product of three adapters, args.batch paths: a function like das_run."""
    land = load("sd/and_composition.py")
    world, rng = build(args, land), torch.Generator(args.device).manual_seed(0)
    names = ("first", "second", "third")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft is surprised that there is more than one
        for name in names:
            world.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), name)
    world.unet.requires_grad_(False).to(args.device, getattr(torch, args.dtype))
    policy = land.prompted(world, args, torch.zeros(args.batch, dtype=torch.long, device=args.device), args.chunk)
    models = [land.with_adapter(world.unet, name, policy) for name in names]
    schedule = land.path_schedule(world.scheduler, args.steps)

    def run():
        equal = torch.full((3,), 1 / 3, dtype=torch.float64)
        noise = land.path_noise(world, args, args.batch, rng)
        _, kl, log_z = land.product_paths(models, equal, noise, *schedule, args.batch, rng, args.eta, 0.5)
        gap = (kl.mean(1) - log_z.mean()).double().cpu()
        raw, _ = land.dual_update(equal, gap / max(gap.mean().item(), 1.0), torch.zeros(3, dtype=torch.float64), 0.15)
        return land.project_to_simplex(raw)

    return run, world, args.batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to check that the script runs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="particles of DAS, paths of a step of the others")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu --tiny checks that the script runs")
    args.guidance, args.eta, args.reward, args.per_prompt, args.minibatches = 5.0, 1.0, [("clip", 1.0)], 2, 1
    args.fraction, args.clip_range = 1.0, 0.2
    args.search, args.children, args.gradient, args.discount = "local", 2, "on", 1.0
    args.max_shift, args.kl_weight = 3.0, 0.1
    print("method  chunk  s/image  UNet/image   unet  decoder  reward  outside  peak GiB")
    with set_checkpoint_early_stop(False):  # else what is computed again ends before its last edge
        measure(args)


def measure(args):
    """A line for each method and chunk."""
    methods = {"das": das_run, "draft": training_run("draft"), "ddpo": training_run("ddpo"), "dav": dav_run,
               "and": and_run}
    for name, make in methods.items():
        for args.chunk in args.chunks:
            run, world, images = make(args)
            run()  # warms up
            clock = world.clock
            clock.seconds, clock.latents = {}, 0
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            start = clock.now()
            run()
            total = clock.now() - start
            shares = [clock.seconds.get(part, 0.0) / total for part in ("unet", "decoder", "reward")]
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if args.device != "cpu" else "-"
            assert not any(clock.depth.values()), clock.depth
            print(f"{name:6}  {args.chunk:5}  {total / images:7.2f}  {clock.latents / images:10.0f}",
                  *(f"{share:6.1%}" for share in (*shares, 1 - sum(shares))), f"{peak:>8}", sep="  ", flush=True)
            del run, world


if __name__ == "__main__":
    main()
