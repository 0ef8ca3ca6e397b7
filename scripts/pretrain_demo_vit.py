"""Makes the small ViT that `fedlora demo` starts from: pretrained on drawn letters, never on a digit.

    python scripts/pretrain_demo_vit.py --out src/fedlora/tasks/demo_vit

Letters are drawn with the font that Pillow bundles, bent, thickened, blurred and brought to 8 x 8 by averaging blocks
of 4 x 4, as the UCI digits were. O, o, I and l are left out because they look like 0 and 1. The letter classifier is
thrown away. The same seed gives the same file on the same machine and versions.
"""

import argparse
import json
import math
import random
import string
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save_file
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

LETTERS = [letter for letter in string.ascii_letters if letter not in "OoIl"]
CANVAS, BLOCK = 32, 4
SHAPE = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 192, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def drawn(letter: str, draws: random.Random) -> numpy.ndarray:
    """One letter as 8 x 8 values in 0..1."""
    big = Image.new("L", (2 * CANVAS, 2 * CANVAS))
    font = ImageFont.load_default(draws.uniform(34, 46))
    ImageDraw.Draw(big).text(
        (CANVAS, CANVAS), letter, fill=255, font=font, anchor="mm", stroke_width=draws.choice((0, 0, 1, 2))
    )
    angle, shear = math.radians(draws.gauss(0, 9)), draws.gauss(0, 0.18)
    wide, high = draws.uniform(0.8, 1.3), draws.uniform(0.85, 1.15)
    a, b, d, e = wide * math.cos(angle), shear + math.sin(angle), -math.sin(angle), high * math.cos(angle)
    x, y = CANVAS + draws.gauss(0, 1.5), CANVAS + draws.gauss(0, 1.5)
    half = CANVAS / 2
    bent = big.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, (a, b, x - a * half - b * half, d, e, y - d * half - e * half),
        Image.Resampling.BILINEAR,
    ).filter(ImageFilter.GaussianBlur(draws.uniform(0, 1.2)))  # fmt: skip
    blocks = numpy.asarray(bent, dtype=numpy.float32).reshape(8, BLOCK, 8, BLOCK).mean((1, 3)) / 255
    return numpy.clip(blocks * draws.uniform(0.9, 1.3), 0, 1)


def alphabet(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` letters, normalised to about -1..1, and their numbers."""
    draws = random.Random(seed)
    labels = [draws.randrange(len(LETTERS)) for _ in range(rows)]
    pixels = torch.from_numpy(numpy.stack([drawn(LETTERS[label], draws) for label in labels]))
    return (pixels[:, None] - 0.5) / 0.5, torch.tensor(labels)


def pretrained(steps: int, seed: int, rows: int) -> tuple[ViTForImageClassification, float]:
    """The network, and its accuracy on 2,000 letters it has not seen."""
    torch.manual_seed(seed)
    network = ViTForImageClassification(ViTConfig(num_labels=len(LETTERS), **SHAPE))
    pixels, labels = alphabet(rows, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        at = torch.randint(rows, (128,))
        images = pixels[at] + 0.1 * torch.randn(128, 1, 8, 8)
        loss = functional.cross_entropy(network(images).logits, labels[at], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    network.eval()
    held, truth = alphabet(2000, seed + 1)
    with torch.inference_mode():
        return network, float((network(held).logits.argmax(-1) == truth).float().mean())


def main() -> None:
    """Trains, and writes the body in float16 with its configuration."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=3000)
    options.add_argument("--rows", type=int, default=30000)
    asked = options.parse_args()
    torch.set_num_threads(1)
    network, accuracy = pretrained(asked.steps, asked.seed, asked.rows)
    asked.out.mkdir(parents=True, exist_ok=True)
    body = {k: v.half().contiguous() for k, v in network.state_dict().items() if not k.startswith("classifier.")}
    save_file(body, asked.out / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", **SHAPE}
    (asked.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5], "image_std": [0.5],
    }  # fmt: skip
    (asked.out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    print(f"accuracy on 2,000 unseen letters ({len(LETTERS)} kinds): {accuracy:.3f}")


if __name__ == "__main__":
    main()
