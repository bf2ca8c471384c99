"""Embedders against plain calls of the libraries, and what they say where weights are missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model, SiglipConfig, SiglipModel

from emu_lightning.evaluation.generation import to_uint8
from emu_lightning.evaluation.metrics import (
    ModuleEmbedder,
    OpenClipEmbedder,
    TimmEmbedder,
    TransformersClip,
    TransformersVision,
)
from emu_lightning.evaluation.metrics.embedders import network_of
from emu_lightning.models.perceptual import PooledFeatures, RandomFeatures
from tests.evaluation.metrics.tiny_networks import (
    SIDE,
    make_dinov2,
    make_images,
    make_open_clip,
    make_pictures,
    make_timm,
    make_transformers_clip,
)
from tests.text_networks import make_t5

LONG = "a red ball lies in the snow " * 20
TEXTS = ["a red ball", "", LONG, "two dogs on a beach"]


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    return make_open_clip(tmp_path_factory.mktemp("open_clip") / "clip")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return make_transformers_clip(tmp_path_factory.mktemp("clip"))


def test_open_clip(open_clip_folder):
    embedder = OpenClipEmbedder(str(open_clip_folder), batch_size=2)
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    with torch.no_grad():
        images = network.eval().encode_image(torch.stack([transform(one) for one in make_pictures()]))
        texts = network.encode_text(tokenizer(TEXTS))
    np.testing.assert_allclose(embedder.embed_images(make_pictures()), images, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), texts, atol=1e-5)
    digest = hashlib.sha256((open_clip_folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert embedder.weights_sha256 == digest and embedder.name == "open_clip clip"
    assert json.loads(embedder.preprocess_id)["resize_mode"] == "shortest"


def test_open_clip_from_a_file_and_framed(open_clip_folder, tmp_path):
    """A checkpoint of training, as HPS is published: the state dict is one of its entries."""
    (tmp_path / "tiny_metrics.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    config = json.loads((tmp_path / "tiny_metrics.json").read_text())
    (tmp_path / "tiny_metrics.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "tiny_metrics.json")
    state = load_file(open_clip_folder / "open_clip_model.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.pt")
    weights = str(tmp_path / "weights.pt")
    embedder = OpenClipEmbedder(weights, model="tiny_metrics", resize_mode="longest")
    assert embedder.name == "open_clip tiny_metrics"
    wide = make_pictures()[0].resize((2 * SIDE, SIDE))
    framed = wide.resize((SIDE, SIDE // 2), 3)
    canvas = framed.crop((0, -SIDE // 4, SIDE, SIDE - SIDE // 4))  # black above and below
    np.testing.assert_allclose(embedder.embed_images([wide]), embedder.embed_images([canvas]), atol=1e-3)
    with pytest.raises(ValueError, match="name the architecture by model"):
        OpenClipEmbedder(weights).embed_images([wide])
    with pytest.raises(ValueError, match="leave out model"):
        OpenClipEmbedder(str(open_clip_folder), model="tiny_metrics").embed_images([wide])
    torch.save({"something": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not hold a network for open_clip tiny_metrics: .*Missing key"):
        OpenClipEmbedder(str(tmp_path / "other.pt"), model="tiny_metrics").embed_images([wide])


def test_transformers_clip(clip_folder):
    embedder = TransformersClip(str(clip_folder), batch_size=3)
    network = CLIPModel.from_pretrained(clip_folder).eval()
    processor, tokenizer = (one.from_pretrained(clip_folder) for one in (AutoImageProcessor, AutoTokenizer))
    with torch.no_grad():
        pixels = processor(images=make_pictures(), return_tensors="pt")
        images = network.get_image_features(**pixels).pooler_output
        tokens = [tokenizer(text, truncation=True, max_length=77, return_tensors="pt") for text in TEXTS]
        texts = torch.cat([network.get_text_features(**one).pooler_output for one in tokens])
    np.testing.assert_allclose(embedder.embed_images(make_pictures()), images, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), texts, atol=1e-5)  # each alone, with its mask
    assert embedder.logit_scale == pytest.approx(network.logit_scale.detach().exp().item())
    assert "CLIPImageProcessor" in embedder.preprocess_id


def test_siglip(tmp_path):
    make_t5(tmp_path)
    text = {
        "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    vision = {**text, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    network = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    (tmp_path / "model.safetensors").unlink()
    network.save_pretrained(tmp_path)
    size = {"height": SIDE, "width": SIDE}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": size})
    )
    embedder = TransformersClip(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a", "a red ball in the snow"]
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = network.get_text_features(ids).pooler_output
    np.testing.assert_allclose(embedder.embed_texts(texts), expected, atol=1e-5)
    assert embedder.cut(texts).tolist() == [False, True]
    assert embedder.embed_images(make_pictures(2)).shape == (2, 16)


def test_dinov2(tmp_path):
    embedder = TransformersVision(str(make_dinov2(tmp_path)), batch_size=2)
    network, processor = (
        Dinov2Model.from_pretrained(tmp_path).eval(),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    with torch.no_grad():
        tokens = network(**processor(images=make_pictures(), return_tensors="pt")).last_hidden_state
    np.testing.assert_allclose(embedder.embed_images(make_pictures()), tokens[:, 0], atol=1e-5)
    for ask in (embedder.embed_texts, embedder.cut):
        with pytest.raises(ValueError, match="reads no texts"):
            ask(["a"])


@pytest.mark.parametrize("as_file", [False, True])
def test_timm(as_file, tmp_path):
    folder = make_timm(tmp_path / "timm")
    weights, model = (str(folder / "model.safetensors"), "test_resnet") if as_file else (str(folder), None)
    if as_file:  # as many classes as timm knows of the architecture
        save_file(timm.create_model("test_resnet").state_dict(), weights)
    embedder = TimmEmbedder(weights, model)
    network = timm.create_model("test_resnet", num_classes=1000 if as_file else 10).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    settings = json.loads(embedder.preprocess_id)
    del settings["by"]
    transform = timm.data.create_transform(**settings)
    with torch.no_grad():
        pixels = torch.stack([transform(one) for one in make_pictures()])
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(embedder.embed_images(make_pictures()), expected, atol=1e-5)
    assert settings["input_size"][-1] == (160 if as_file else SIDE)


def test_any_module():
    module = PooledFeatures(RandomFeatures(seed=1))
    embedder = ModuleEmbedder(module, "random", batch_size=2)
    images = make_images()
    expected = module(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2))
    np.testing.assert_allclose(embedder.embed_images(images), expected, atol=1e-6)
    same, other = (ModuleEmbedder(PooledFeatures(RandomFeatures(seed=n)), "random") for n in (1, 2))
    assert same.weights_sha256 == embedder.weights_sha256 != other.weights_sha256
    assert network_of(embedder).name == "random"


def test_images_are_pictures_of_8_bits(open_clip_folder):
    from PIL import Image

    embedder, images = OpenClipEmbedder(str(open_clip_folder)), make_images()
    pictures = [Image.fromarray(picture) for picture in to_uint8(images)]
    assert (embedder.embed_images(images) == embedder.embed_images(pictures)).all()
    with pytest.raises(ValueError, match="nothing to embed"):
        embedder.embed_images([])


@pytest.mark.parametrize("kind", [OpenClipEmbedder, TransformersClip])
def test_a_long_text_is_cut_and_keeps_its_end(kind, open_clip_folder, clip_folder):
    """What stands behind the cut changes nothing; and without the end token the text would be another."""
    embedder = kind(str(open_clip_folder if kind is OpenClipEmbedder else clip_folder))
    assert embedder.cut(TEXTS).tolist() == [False, False, True, False]
    long, longer, short = embedder.embed_texts([LONG, LONG + " and a volcano", LONG[:40]])
    np.testing.assert_allclose(long, longer, atol=1e-6)
    assert np.abs(long - short).max() > 1e-3
    _ = embedder.preprocess_id
    ids = embedder._tokenize([LONG, "a"], 77)
    assert len(ids[0]) == 77 and ids[0, -1] == ids[0].max() == ids[1].max()  # the end has the highest id


@pytest.mark.parametrize("words, is_cut", [(75, False), (76, True)])
def test_the_last_text_that_fits(words, is_cut, open_clip_folder):
    assert OpenClipEmbedder(str(open_clip_folder)).cut([" ".join(["dog"] * words)]).tolist() == [is_cut]


# --- missing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OpenClipEmbedder, TransformersClip, TransformersVision, TimmEmbedder])
def test_missing_weights_name_the_remedy(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch it by `hf download nobody/nothing`$"):
        kind("nobody/nothing").embed_images(make_pictures(1))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no weights .*name the folder that does"):
        _ = kind(str(tmp_path)).weights_sha256


def test_a_folder_without_tokenizer_is_not_given_another(clip_folder, tmp_path):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        TransformersClip(str(tmp_path)).embed_texts(["a"])
    apart = TransformersClip(str(tmp_path), processor=str(clip_folder))
    np.testing.assert_array_equal(
        apart.embed_texts(TEXTS), TransformersClip(str(clip_folder)).embed_texts(TEXTS)
    )


def test_weights_that_transformers_would_make_up_are_an_error(clip_folder, tmp_path):
    for path in clip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(clip_folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, such as visual_projection.weight"):
        TransformersClip(str(tmp_path)).embed_images(make_pictures(1))


def test_the_hash_of_several_files_is_one(clip_folder, tmp_path):
    network = CLIPModel.from_pretrained(clip_folder)
    network.save_pretrained(tmp_path, max_shard_size="10KB")
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
    expected = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert TransformersVision(str(tmp_path)).weights_sha256 == expected
