"""Maximise a black-box reward of images with few queries: DAS samples an optimistic surrogate that learns from them.
Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803, its online experiment. figure.png: the best image found, and the mean of a round, by queries.
Run    python sd/das_online.py                 miniature model, compressibility; 2 CPU minutes, --quick: 20 s
       python sd/das_online.py --reward my.py:function      any reward: it is only ever queried
       python sd/das_online.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --steps 50
           --reward aesthetic --clip openai/clip-vit-large-patch14 --chunk 1
Read first: Surrogate, main. It is das.py in a loop: sampler, model, rewards and files are imported from there.
Notation (here -> paper): gain, the reward in standard deviations of the base model's images of the prompt; kl_weight ->
    alpha; queries: true rewards, with noise of standard deviation 0.1, that the method has seen
Algorithm, in every round
    1. sample images of every prompt by DAS with the surrogate's optimistic guess as reward             `das`
    2. query the true reward of them, and refit the surrogate to all queries so far                     `Surrogate`
Ours: the paper's surrogate is a network without nonlinearities on CLIP features, hence affine: here in closed form.
    Beside it `random`: as many queries of the base model's own images, the baseline that costs no sampling by DAS.
What you should see (seed 0): after 28 queries a prompt the best image has a gain of 2.6 (ucb, bootstrap; se .4), of
    random images 2.1; the last round gains .5 on average, where the surrogate promises 1.2. To try: --kl-weight 0.5.
"""
import math, os, pathlib, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from das import (MINI, Diffusion, Refused, checked, common_flags, das, draw_images, load_clip, make_gain, report,
                 sample_prompts, save_samples)
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import trange

METHODS = ["ucb", "bootstrap", "random"]

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(6, 4, 4), quick=(2, 2, 4), paper=(256, 4, 4))  # rounds, images, particles
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="kind of optimism, or no surrogate")
    add("--kl-weight", type=float, default=0.2, help="reward temperature, in standard deviations")
    add("--gamma", type=float, default=0.008, help="growth of the temper in a hundredth of the steps")
    add("--max-shift", type=float, default=0.5, help="cap of the guidance, in standard deviations of the kernel")
    parser.set_defaults(reward=["jpeg"], out=pathlib.Path("out/sd_das_online"))
    args = checked(parser, parser.parse_args(argv))
    if pathlib.Path(args.model).resolve() != MINI and MINI in pathlib.Path(args.clip).resolve().parents:
        parser.error("--model: the surrogate sees with the miniature's CLIP model; name another one by --clip")
    return args

# ---- the method ------------------------------------------------------------------------------------------------------
class Surrogate:
    """Ridge regression of queried gains on the CLIP features of images and on their prompt, in an optimistic form: ucb
    adds the standard error of the prediction, bootstrap takes the largest of 4 fits to resampled queries."""
    def __init__(self, embed, kind, prompts):
        self.embed, self.kind, self.prompts, self.features, self.answers = embed, kind, prompts, [], []
    def look(self, images, number):
        """Images (n, 3, H, W), number () or (n,) of the prompt -> features (n, d)."""
        return torch.cat([self.embed(images), F.one_hot(torch.as_tensor(number).expand(len(images)), self.prompts)], 1)
    def add(self, images, number, answers):
        """More queried gains (n,) of images; refits."""
        self.features.append(self.look(images, number).detach())
        self.answers.append(answers)
        f, y = torch.cat(self.features), torch.cat(self.answers)
        def fit(f, y, ridge=0.1):
            inverse = torch.linalg.inv(f.T @ f + ridge * torch.eye(f.shape[1]))
            return inverse @ f.T @ y, inverse
        self.weights, self.inverse = fit(f, y)
        self.heads = torch.stack([fit(f[i], y[i])[0] for i in torch.randint(len(y), (4, len(y)))], 1)
        self.noise = (f @ self.weights - y).std()
    def __call__(self, images, number):
        """The optimistic gain of images (n, 3, H, W) -> (n,), with a gradient."""
        f = self.look(images, number)
        if self.kind == "bootstrap":
            return (f @ self.heads).amax(1)
        return f @ self.weights + self.noise * ((f @ self.inverse) * f).sum(1).clamp(min=1e-12).sqrt()

# ---- figure, main ----------------------------------------------------------------------------------------------------
def draw(rows, sheets):
    """Lines of images of the last round; best of all queries and mean of a round by number of queries."""
    n, figure = len(sheets), Figure(figsize=(9, 0.6 * len(sheets) + 2.6), layout="constrained")
    axes = figure.subplot_mosaic([[m] * 2 for m in sheets] + [["best", "mean"]], height_ratios=[0.6] * n + [2.6])
    for method, images in sheets.items():
        draw_images(axes[method], images, method)
        for quantity in ("best", "mean"):
            line = [(int(r[0].split("_")[0]), r[3].item()) for r in rows if r[1:3] == (method, quantity)]
            axes[quantity].plot(*zip(*line), ".-", label=method)
            axes[quantity].set_title(f"{quantity} gain, by queries of a prompt", fontsize=9)
    axes["best"].legend(fontsize=8)
    return figure

def main(args):
    started, accelerator, (rounds, images, particles) = time.time(), Accelerator(cpu=args.device == "cpu"), args.size
    model, K, rows, found = Diffusion(args, accelerator.device), len(args.prompts), [], {}
    print("COARSE: numbers mean nothing" if rounds < 5 else "best: gain of all queries of a prompt so far; mean: of a "
          "round; promised: by the surrogate; se: over prompts")
    torch.set_default_device(accelerator.device)
    base, _ = sample_prompts(args, accelerator, model, max(32, images * (rounds + 1)))
    gain = make_gain(args, accelerator, model, base)
    embed, _ = load_clip(args.clip, args.prompts, accelerator.device)
    for method in args.methods:
        surrogate, best = Surrogate(embed, method, K), torch.full((K,), -math.inf)
        guess = lambda x, number: surrogate(model.decode(x), number)
        for i in trange(rounds + 1, desc=method):
            drawn, promised = base[:, i * images : (i + 1) * images].clone(), []
            for k in range(K if i and method != "random" else 0):
                torch.manual_seed(args.seed + 100 * k + 1000 * i)
                out = das(model, guess, k, images, particles, args, args.max_shift)
                pick = torch.arange(images), out["log_w"].softmax(1).multinomial(1)[:, 0]
                drawn[k] = out["x"][pick]
                promised.append(out["gain"][pick].mean())
            with torch.no_grad():
                true = torch.stack([gain(v, k) for k, v in enumerate(drawn)])  # (K, images)
                for k, v in enumerate(drawn):
                    surrogate.add(model.decode(v), k, true[k] + 0.1 * torch.randn(images))
            best = torch.maximum(best, true.amax(1))
            values = dict(best=best, mean=true.mean(1)) | (dict(promised=torch.stack(promised)) if promised else {})
            rows += [(f"{(i + 1) * images}_queries", method, quantity, v.mean(), v.std() / K**0.5, None)
                     for quantity, v in values.items()]
        found[method] = dict(x=drawn[:, :, None], gain=true[..., None], log_w=0 * true[..., None])
    report(args, rows, started, lambda: draw(rows, save_samples(args, model, found)))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
