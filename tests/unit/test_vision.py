"""Images are decoded by the vision tokenizer as the library does it, without the frames of a film that nobody sees."""

import numpy as np
import pytest
import torch

from earl.emu3 import vision
from earl.emu3.models import Emu3VQVAE
from earl.shapes import policy
from earl.stages import tokenise

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


def pictures(count: int, side: int = 2 * SIDE) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@torch.inference_mode()
def test_decoding_equals_the_first_frame_of_the_library(tokenizer):
    tokens = torch.from_numpy(np.stack(grids(3)))
    expected = tokenizer.decode(tokens)
    assert expected.std() > 0.1
    assert (vision.first_frames(tokenizer, tokens) - expected).abs().max() <= 1e-5
    rounded = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = np.stack(vision.decode(tokenizer, grids(3))).astype(float)
    assert np.abs(found - rounded).max() <= 0.5 + 1e-2


@torch.inference_mode()
def test_encoding_equals_that_of_the_library(tokenizer):
    pixels = pictures(3)
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = []
    with tokenizer.quant_conv.register_forward_hook(lambda module, inputs, output: latents.append(output)):
        expected = tokenizer.encode(scaled, image_sizes=torch.tensor([[2 * SIDE, 2 * SIDE]] * 3)).image_tokens
        found = vision.tokens_of(tokenizer, scaled)
    assert latents[0].shape == latents[1].shape
    assert latents[0].std() > 0.1
    assert (latents[0] - latents[1]).abs().max() <= 1e-5
    # Where two codes are equally near, rounding decides.
    assert (found == torch.stack(expected)).float().mean() > 0.95
    assert np.array_equal(np.stack(vision.encode(tokenizer, list(pixels.numpy()))), found.numpy())


def frames_at(layer: torch.nn.Module, call) -> int:
    """Return how many images, or frames of them, a layer computes in a call."""
    frames = []
    with layer.register_forward_hook(lambda module, inputs, output: frames.append(len(output))):
        call()
    (found,) = frames
    return found


def test_one_frame_of_each_image_is_computed_at_the_size_of_pixels(tokenizer):
    decoded = frames_at(tokenizer.decoder.conv_out, lambda: vision.decode(tokenizer, grids(5)))
    encoded = frames_at(tokenizer.encoder.conv_in, lambda: vision.encode(tokenizer, list(pictures(5).numpy())))
    assert (decoded, encoded) == (vision.BATCH, vision.BATCH)
    assert not tokenizer.encoder.time_conv or not tokenizer.encoder.time_conv[0]._forward_pre_hooks


def test_batches_of_large_images_are_small():
    """One of 256 x 256 pixels, for which the published tokenizer makes 1,024 tokens."""
    sizes = {}
    for side in (8, 16, 32, 64, 90):
        batches = vision._batches(grids(20, (side, side)))
        assert sorted(index for indices, _ in batches for index in indices) == list(range(20))
        (sizes[side],) = {len(batch) for _, batch in batches}
    assert sizes == {8: 16, 16: 4, 32: 1, 64: 1, 90: 1}
    ((_, pixels),) = vision._batches([np.zeros((256, 256, 3))], scale=8)
    assert len(pixels) == 1


def test_photographs_of_many_shapes_are_computed_once_each():
    """Of the area that experiments resize to, in the shapes of 64 cameras."""
    shapes = [tokenise.scaled_size(width, 480, 65536, 8) for width in range(300, 940, 10)]
    assert len(set(shapes)) > 20
    batches = vision._batches([np.zeros((height, width, 3), np.uint8) for width, height in shapes], scale=8)
    assert sum(len(batch) for _, batch in batches) == len(shapes)


def test_an_image_does_not_depend_on_its_batch():
    from earl.emu3.checkpoint import load_vision_tokenizer

    model = load_vision_tokenizer(policy.VISION_TOKENIZER, "cpu")
    tokens = list(np.random.default_rng(2).integers(0, 256, (20, 8, 8)))
    together = vision.decode(model, tokens)
    assert all(
        np.array_equal(vision.decode(model, [one])[0], image)
        for one, image in zip(tokens[::7], together[::7], strict=True)
    )
    found = vision.encode(model, together)
    assert all(
        np.array_equal(vision.encode(model, [one])[0], grid)
        for one, grid in zip(together[::7], found[::7], strict=True)
    )
