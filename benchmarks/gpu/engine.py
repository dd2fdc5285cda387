"""The torch engine around a policy of `models`, which samples visual tokens from the second token on."""

import torch

from benchmarks.gpu import models
from earl.emu3 import grid
from earl.emu3.models import Emu3ForCausalLM
from earl.engines.torch_engine import TorchEngine


def around(model: Emu3ForCausalLM, batch_size: int) -> TorchEngine:
    """Return an engine that holds a model in memory, without a folder.

    A random policy would not begin an image; the constraint leaves it no other first token here.
    """
    engine = TorchEngine(model.device, model.dtype, batch_size, model.config.max_position_embeddings, constrained=True)
    engine.policy, engine.vocabulary = model, models.vocabulary(model.config)
    engine.forbidden = grid.forbidden_table(engine.vocabulary, model.config.vocab_size).to(model.device)
    only_img = torch.ones_like(engine.forbidden[grid.TEXT])
    only_img[engine.vocabulary.img] = False
    engine.forbidden[grid.TEXT] = only_img
    return engine
