"""A CLIP's loss against the paper's own lines, and what it hands over."""

from __future__ import annotations

import math
from pathlib import Path

import open_clip
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader

from emu_lightning.modules import ContrastiveModule
from tests.tiny import make_batch, make_trainer

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def make() -> ContrastiveModule:
    torch.manual_seed(0)
    return ContrastiveModule(CONFIG, optimizer=lambda weights: torch.optim.AdamW(weights, lr=0.1))


def test_its_loss_is_that_of_the_paper() -> None:
    """Radford et al. 2021, figure 3."""
    module, batch = make(), make_batch(0, size=5, side=32)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = module.validation_step(batch, 0)
    tokens = module.tokenizer(batch.texts)
    images, texts = module.clip.encode_image(batch.images), module.clip.encode_text(tokens)
    images, texts = images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)
    logits = images @ texts.T * module.clip.logit_scale.exp()
    labels = torch.arange(5)
    assert_close(loss, (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2)


def test_it_learns_with_a_scale_of_at_most_a_hundred_and_open_clip_loads_it(tmp_path: Path) -> None:
    module = make()
    with torch.no_grad():
        module.clip.logit_scale.fill_(4.7)
    before = {name: value.clone() for name, value in module.clip.state_dict().items()}
    batches = DataLoader([make_batch(place, side=32) for place in (0, 4)], batch_size=None)
    make_trainer(tmp_path, max_steps=2).fit(module, batches)
    assert module.clip.logit_scale.exp() <= 100 * (1 + 1e-6)
    assert math.log(100) < 4.7
    moved = [name for name, value in module.clip.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) == len(list(module.clip.named_parameters()))

    folder = module.save_pretrained(tmp_path / "clip", torch.float32)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = make_batch(1, size=2, side=32).images
    assert_close(loaded.eval().encode_image(images), module.clip.eval().encode_image(images))
