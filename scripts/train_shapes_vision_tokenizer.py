"""Train the vision tokenizer of the shapes world and write it where the package ships it.

    python scripts/train_shapes_vision_tokenizer.py [--out earl/shapes/vision_tokenizer]

A tiny `Emu3VQVAE` (0.23M parameters, 256 codes, 8x8 tokens for 64x64 pixels), trained in minutes on one thread:

1. some steps as a plain autoencoder, because a codebook fitted to an untrained encoder dies;
2. a codebook by k-means++ over the latents, then moving averages (VQ-VAE, van den Oord et al. 2017, appendix A.1), with
   codes that nothing uses put back onto latents of the batch;
3. a loss that asks the two images of an edit to have equal latents and to commit to one code where the pictures are
   equal: norms and attention see the whole image, and without this an edit in one corner changes tokens everywhere,
   which no policy can predict.

The model stays in eval mode (`Emu3VQVAE` has no training mode of use here) and `encode` returns ids only, so the
straight-through forward pass is spelled out below. Seeded; the same machine and thread count give the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from earl.emu3.models import Emu3VQVAE, Emu3VQVAEConfig
from earl.files import atomic, manifest
from earl.shapes import world
from earl.statistics import seeds

CODES, WIDTH = 256, 8
RAMP = 6.0
"""How much heavier agreement and commitment weigh at the end than at the beginning."""
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "earl" / "shapes" / "vision_tokenizer"


def build_model() -> Emu3VQVAE:
    """The class wants 32 norm groups, hidden_size = base_channels x last multiplier, embed_dim = latent_channels."""
    return Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=WIDTH,
            latent_channels=WIDTH,
            temporal_downsample_factor=1,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=0,
            attn_resolutions=[],
            hidden_size=32,
        )
    ).eval()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in -1..1, the range of the model."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_pairs(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` edits: images [2 count, 3, H, W], originals first, and where their tokens should agree [count, 8, 8]."""
    tasks = [world.TASKS[i] for i in rng.integers(len(world.TASKS), size=count)]
    edits = [world.draw_edit(rng, task, low=2, high=8) for task in tasks]
    return images_and_agreement(edits)


def images_and_agreement(edits: list[world.Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of edits [2 N, 3, H, W], originals first, and the tokens whose cell is the same in both [N, 8, 8]."""
    originals = np.stack([world.render(e.original) for e in edits])
    edited = np.stack([world.render(e.edited) for e in edits])
    cell = world.CELL
    equal = (originals == edited).reshape(len(edits), world.GRID, cell, world.GRID, cell, 3).all(axis=(2, 4, 5))
    agree = torch.from_numpy(equal).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return to_tensor(np.concatenate([originals, edited])), agree


def latents(model: Emu3VQVAE, images: torch.Tensor) -> torch.Tensor:
    """What the codebook quantises: [N, 8, 8, WIDTH]."""
    hidden = model.encoder(images.unsqueeze(1)).permute(0, 2, 1, 3, 4)
    return model.quant_conv(hidden).squeeze(2).permute(0, 2, 3, 1)


def decode(model: Emu3VQVAE, quantised: torch.Tensor) -> torch.Tensor:
    """[N, 8, 8, WIDTH] -> images [N, 3, H, W]; the decoder also takes the code vectors themselves, for its norms."""
    code = quantised.permute(0, 3, 1, 2).unsqueeze(2)
    hidden = model.post_quant_conv(code).permute(0, 2, 1, 3, 4)
    return model.decoder(hidden, code.permute(0, 2, 1, 3, 4))


class Codebook:
    """The code vectors and the moving averages they come from; writes through to the model's embedding."""

    def __init__(self, model: Emu3VQVAE, samples: torch.Tensor, decay: float = 0.95) -> None:
        self.vectors = model.quantize.embedding.weight.requires_grad_(False)
        self.decay = decay
        centres, sizes = k_means(samples, CODES)
        self.vectors.copy_(centres)
        self.counts = sizes * (512 / sizes.sum())
        self.sums = centres * self.counts[:, None]

    @torch.no_grad()
    def update(self, latent: torch.Tensor, ids: torch.Tensor, revive: bool) -> None:
        """One moving-average step over a batch of latents [n, WIDTH] and their nearest codes [n]."""
        used = torch.bincount(ids, minlength=CODES).float()
        sums = torch.zeros_like(self.sums).index_add_(0, ids, latent)
        self.counts.mul_(self.decay).add_(used, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = self.counts < 0.05
        if revive and dead.any():
            self.sums[dead] = latent[torch.randint(len(latent), (int(dead.sum()),))]
            self.counts[dead] = 1.0
        self.vectors.copy_(self.sums / self.counts.clamp_min(1e-4)[:, None])


def k_means(samples: torch.Tensor, count: int, rounds: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means++ start and Lloyd rounds over samples [n, d]: centres [count, d] and how many samples each holds."""
    chosen = [samples[torch.randint(len(samples), (1,))]]
    distance = ((samples - chosen[0]) ** 2).sum(1)
    for _ in range(count - 1):
        chosen.append(samples[torch.multinomial(distance + 1e-9, 1)])
        distance = torch.minimum(distance, ((samples - chosen[-1]) ** 2).sum(1))
    centres = torch.cat(chosen)
    for _ in range(rounds):
        nearest = torch.cdist(samples, centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=count).float()
        sums = torch.zeros_like(centres).index_add_(0, nearest, samples)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres, sizes


def disagreement(latent: torch.Tensor, agree: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the pair's latents where they should agree, in units of the latents' variance."""
    original, edited = latent.chunk(2)
    distance = ((original - edited) ** 2).sum(-1)
    scale = latent.detach().var(dim=(0, 1, 2)).sum()
    return (distance * agree).sum() / agree.sum().clamp_min(1) / scale


def shared(latent: torch.Tensor, agree: torch.Tensor) -> torch.Tensor:
    """The latents, those of a pair replaced by their mean where they should agree: both then commit to one code."""
    middle = sum(latent.chunk(2)) / 2
    return torch.where(agree.repeat(2, 1, 1)[..., None], middle.repeat(2, 1, 1, 1), latent)


def nearest_codes(model: Emu3VQVAE, latent: torch.Tensor) -> torch.Tensor:
    """Code ids [N, 8, 8] of latents [N, 8, 8, WIDTH]."""
    return model.quantize(latent.permute(0, 3, 1, 2).unsqueeze(1)).squeeze(1)


def train(args: argparse.Namespace) -> Emu3VQVAE:
    torch.manual_seed(args.seed)
    rng = seeds.generator("shapes vision tokenizer", args.seed)
    model = build_model()
    codebook: Codebook | None = None
    kept: list[torch.Tensor] = []
    model.quantize.embedding.weight.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0)
    started = time.process_time()
    for step in range(args.steps):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, (step + 1) / 20) * decay
        images, agree = draw_pairs(rng, args.pairs)
        latent = latents(model, images)
        flat = latent.detach().flatten(0, 2)
        # Colours and shapes first, equal tokens later: asked for at once, the latents of small objects merge.
        share = 1 + (RAMP - 1) * step / args.steps
        loss = share * args.agreement * disagreement(latent, agree)
        quantised = latent
        if args.autoencoder_steps - 20 <= step < args.autoencoder_steps:
            kept.append(flat)
        if step >= args.autoencoder_steps:
            codebook = codebook or Codebook(model, torch.cat(kept))
            ids = nearest_codes(model, latent)
            quantised = latent + (codebook.vectors[ids] - latent).detach()
            common = codebook.vectors[nearest_codes(model, shared(latent.detach(), agree))]
            loss = loss + share * args.commitment * (latent - common).square().mean()
            codebook.update(flat, ids.flatten(), revive=step % 20 == 0 and step < 0.8 * args.steps)
        error = decode(model, quantised) - images
        loss = loss + error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.process_time() - started
            figures = json.dumps(measure(model, 64)) if codebook else ""
            print(f"step {step + 1} cpu {seconds:.0f} s loss {loss.item():.4f} {figures}", flush=True)
    return model


def encode(model: Emu3VQVAE, images: torch.Tensor) -> torch.Tensor:
    """Token ids [N, 8, 8] by the model's own `encode`."""
    sizes = torch.full((len(images), 2), world.SIZE)
    return torch.stack(model.encode(images, image_sizes=sizes).image_tokens)


@torch.no_grad()
def measure(model: Emu3VQVAE, count: int = 210) -> dict[str, float]:
    """Quality on held-out edits: PSNR in dB; share of objects whose colour, and whose colour and shape, survive
    encoding and decoding; share of tokens that stay the same from original to edited where the picture does."""
    edits = [world.edit(seeds.seed("shapes vision tokenizer", "held out"), i) for i in range(count)]
    images, agree = images_and_agreement(edits)
    tokens = encode(model, images)
    output = torch.cat([model.decode(part) for part in tokens.split(64)]).float().clamp(-1, 1)
    psnr = -10 * torch.log10(((output - images) / 2).square().mean(dim=(1, 2, 3)))
    scenes = [e.original for e in edits] + [e.edited for e in edits]
    colours, objects = recognised(output, scenes)
    originals, edited = tokens.chunk(2)
    return {
        "psnr_db": round(psnr.mean().item(), 2),
        "colours": round(colours, 4),
        "objects": round(objects, 4),
        "stable_tokens": round((originals == edited)[agree].float().mean().item(), 4),
        "codes_used": len(tokens.unique()),
    }


def recognised(output: torch.Tensor, scenes: list[world.Scene]) -> tuple[float, float]:
    """Share of the objects whose nearest cell picture (on the scene's background) has the right colour; is right."""
    grid, cell = world.GRID, world.CELL
    cells = output.permute(0, 2, 3, 1).reshape(-1, grid, cell, grid, cell, 3).transpose(2, 3).flatten(3)
    right_colour, right, total = 0, 0, 0
    for picture, scene in zip(cells.flatten(1, 2), scenes, strict=True):
        known = torch.from_numpy(world.CELL_IMAGES[scene.background]).float().flatten(1) / 127.5 - 1
        nearest = torch.cdist(picture, known).argmin(1).tolist()
        for where in scene.occupied():
            seen, true = nearest[where], scene.cells[where]
            right += seen == true
            right_colour += seen > 0 and (seen - true) % len(world.COLOURS) == 0
            total += 1
    return right_colour / total, right / total


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--measure", type=Path, help="only print the quality of this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--autoencoder-steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--agreement", type=float, default=1.0)
    parser.add_argument("--commitment", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(Emu3VQVAE.from_pretrained(args.measure, dtype=torch.float32).eval())))
        return
    model = train(args)
    with atomic.folder(args.out) as folder:
        model.half().save_pretrained(folder)
        manifest.seal(folder)
    print(json.dumps(measure(Emu3VQVAE.from_pretrained(args.out, dtype=torch.float32).eval())))


if __name__ == "__main__":
    main()
