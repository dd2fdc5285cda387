"""Images are decoded by the vision tokenizer as the library does it, without the frames of a film that nobody sees."""

import numpy as np
import pytest
import torch

from earl.emu3 import vision
from earl.emu3.models import Emu3VQVAE
from earl.shapes import policy

SIDE = 4


@pytest.fixture(scope="module", params=[1, 2, 4])
def tokenizer(request):
    """Untrained, of the published one's shape but for its size: it makes `param` frames of one grid."""
    from transformers import Emu3VQVAEConfig

    torch.manual_seed(0)
    sizes = {"codebook_size": 64, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32}
    fields = {"embed_dim": 4, "latent_channels": 4, "num_res_blocks": 1, "attn_resolutions": []}
    model = Emu3VQVAE(Emu3VQVAEConfig(**sizes, **fields, temporal_downsample_factor=request.param)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def grids(count: int, shape: tuple[int, int] = (SIDE, SIDE)) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 64, (count, *shape)))


def test_decoding_equals_the_first_frame_of_the_library(tokenizer):
    tokens = grids(3)
    with torch.inference_mode():
        pixels = tokenizer.decode(torch.from_numpy(np.stack(tokens)))
    expected = ((pixels + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    found = np.stack(vision.decode(tokenizer, tokens)).astype(float)
    assert found.shape == (3, 2 * SIDE, 2 * SIDE, 3)
    assert found.std() > 10
    assert np.abs(found - expected).max() <= 1  # where a value is all but half-way between two


def test_one_frame_of_each_image_is_computed_at_the_size_of_pixels(tokenizer):
    frames = []
    hook = tokenizer.decoder.conv_out.register_forward_hook(lambda module, inputs, output: frames.append(len(output)))
    vision.decode(tokenizer, grids(5))
    hook.remove()
    assert frames == [vision.BATCH]


def test_batches_of_large_images_are_small():
    """Four of 256 x 256 pixels, for which the published tokenizer makes 1,024 tokens each."""
    sizes = {}
    for side in (8, 16, 32, 64, 90):
        batches = vision._batches(grids(20, (side, side)))
        assert sorted(index for indices, _ in batches for index in indices) == list(range(20))
        (sizes[side],) = {len(batch) for _, batch in batches}
    assert sizes == {8: 16, 16: 16, 32: 4, 64: 1, 90: 1}
    ((_, pixels),) = vision._batches([np.zeros((256, 256, 3))], scale=8)
    assert len(pixels) == 4


def test_an_image_does_not_depend_on_its_batch():
    from earl.emu3.checkpoint import load_vision_tokenizer

    model = load_vision_tokenizer(policy.VISION_TOKENIZER, "cpu")
    tokens = list(np.random.default_rng(2).integers(0, 256, (20, 8, 8)))
    together = vision.decode(model, tokens)
    assert all(
        np.array_equal(vision.decode(model, [one])[0], image) for one, image in zip(tokens, together, strict=True)
    )
    found = vision.encode(model, together)
    assert all(np.array_equal(vision.encode(model, [one])[0], grid) for one, grid in zip(together, found, strict=True))
