"""Frozen CLIP and T5: their own networks' embeddings, whatever the batch, the padding and the length."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5EncoderModel

from emu_lightning.models import ClipText, JointTextEncoder, OpenClipText, SingleTextEncoder, T5Text, UNet
from emu_lightning.models.encoders import TextNetwork, share_networks, snapshot
from emu_lightning.modules import DiffusionModule, load_generator
from emu_lightning.modules.generator import build_learner
from emu_lightning.processes import Diffusion
from tests.text_networks import make_clip, make_open_clip, make_t5

TEXTS = ["a red ball", "", "a blue star at night, on the left!"]
LONG = "word " * 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    make_clip(folder / "clip")
    make_t5(folder / "t5")
    return folder


def clip(folder: Path, **options) -> ClipText:
    return ClipText(**{"path": str(folder / "clip"), "dim": 8, "precision": "float32", **options})


def t5(folder: Path, **options) -> T5Text:
    defaults = {"path": str(folder / "t5"), "dim": 8, "length": 48, "precision": "float32"}
    return T5Text(**{**defaults, **options})


def joint(folder: Path) -> JointTextEncoder:
    torch.manual_seed(0)
    return JointTextEncoder(clip(folder), t5(folder), dim=12)


@pytest.mark.parametrize(("network", "their_class"), [(clip, CLIPTextModel), (t5, T5EncoderModel)])
def test_tokens_are_embedded_as_transformers_embeds_a_lone_text_without_padding(network, their_class, folder):
    network = network(folder)
    embedded = network.embed(TEXTS)
    tokenizer, theirs = AutoTokenizer.from_pretrained(network.path), their_class.from_pretrained(network.path)
    for number, text in enumerate(TEXTS):
        with torch.no_grad():
            output = theirs(**tokenizer([text], return_tensors="pt"))
        length = output.last_hidden_state.shape[1]
        assert embedded["mask"][number].sum() == length
        assert_close(embedded["sequence"][number, :length], output.last_hidden_state[0], atol=1e-5, rtol=0)
        if "pooled" in embedded:
            assert_close(embedded["pooled"][number], output.pooler_output[0], atol=1e-5, rtol=0)
            assert_close(embedded["pooled"][number], output.last_hidden_state[0, -1], atol=1e-5, rtol=0)


def test_long_captions_keep_their_end_and_sizes_do_not_depend_on_the_texts(folder):
    for network, length in [(clip(folder), 77), (t5(folder), 48)]:
        ids, mask = network.tokenize([LONG, ""])
        end = AutoTokenizer.from_pretrained(network.path).eos_token_id
        assert ids.shape == mask.shape == (2, length)
        assert ids[0, -1] == end and (ids[0] == end).sum() == 1
        assert mask[0].all() and ids[1][mask[1]][-1] == end


def test_open_clip_and_transformers_agree_on_the_same_weights(tmp_path):
    weights = make_open_clip(tmp_path / "open", "tiny-open-clip")
    network = OpenClipText("tiny-open-clip", str(weights), dim=8, precision="float32")
    embedded, theirs = network.embed([*TEXTS, LONG]), as_transformers(network.frozen.network)
    ids, mask = network.tokenize([*TEXTS, LONG])
    output = theirs(ids)
    assert ids[3, -1] == 49_407 and mask[3].all()
    assert_close(embedded["sequence"], output.last_hidden_state, atol=1e-5, rtol=0)
    assert_close(embedded["pooled"], output.pooler_output, atol=1e-5, rtol=0)


def as_transformers(network) -> CLIPTextModel:
    """The text tower of a tiny open_clip network in transformers' class."""
    state: dict[str, Tensor] = {
        "embeddings.token_embedding.weight": network.token_embedding.weight,
        "embeddings.position_embedding.weight": network.positional_embedding,
        "final_layer_norm.weight": network.ln_final.weight,
        "final_layer_norm.bias": network.ln_final.bias,
    }
    for number, block in enumerate(network.transformer.resblocks):
        for kind in ("weight", "bias"):
            place = f"encoder.layers.{number}"
            for name, part in zip("qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3), strict=True):
                state[f"{place}.self_attn.{name}_proj.{kind}"] = part
            state[f"{place}.self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
            state[f"{place}.layer_norm1.{kind}"] = getattr(block.ln_1, kind)
            state[f"{place}.layer_norm2.{kind}"] = getattr(block.ln_2, kind)
            state[f"{place}.mlp.fc1.{kind}"] = getattr(block.mlp.c_fc, kind)
            state[f"{place}.mlp.fc2.{kind}"] = getattr(block.mlp.c_proj, kind)
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
        bos_token_id=49_406, eos_token_id=49_407,
    )  # fmt: skip
    theirs = CLIPTextModel(config).eval()
    theirs.load_state_dict(state)
    return theirs


def test_both_are_projected_and_joined_along_the_sequence(folder):
    encoder = joint(folder)
    embeddings, text = encoder.embed(TEXTS), encoder(TEXTS)
    assert {name: tuple(value.shape) for name, value in embeddings.items()} == {
        "clip": (3, 77, 8), "clip_mask": (3, 77), "clip_pooled": (3, 8), "t5": (3, 48, 8), "t5_mask": (3, 48),
    }  # fmt: skip
    assert text.sequence.shape == (3, 125, encoder.sequence_dim) and text.mask.shape == (3, 125)
    assert not text.sequence[~text.mask].any()
    clip_part = encoder.clip_projection(embeddings["clip"])[embeddings["clip_mask"]]
    t5_part = encoder.t5_projection(embeddings["t5"])[embeddings["t5_mask"]]
    assert_close(text.sequence[:, :77][text.mask[:, :77]], clip_part)
    assert_close(text.sequence[:, 77:][text.mask[:, 77:]], t5_part)
    assert_close(text.pooled, embeddings["clip_pooled"])


def test_one_alone_is_projected_and_pooled_is_the_mean_over_its_tokens(folder):
    encoder = SingleTextEncoder(t5(folder), dim=12)
    embeddings, text = encoder.embed(TEXTS), encoder(TEXTS)
    assert text.sequence.shape == (3, 48, encoder.sequence_dim) and torch.equal(text.mask, embeddings["mask"])
    assert not text.sequence[~text.mask].any()
    for number, mask in enumerate(text.mask):
        projected = encoder.projection(embeddings["sequence"][number, mask])
        assert_close(text.sequence[number, mask], projected)
        assert_close(text.pooled[number], projected.mean(0))
    assert sorted(encoder.state_dict()) == ["projection.bias", "projection.weight"]
    assert encoder.fingerprint() == t5(folder).fingerprint()


def test_networks_of_equal_settings_are_held_once_where_they_are_shared(folder):
    lengths = {"base": 48, "small": 48, "other": 40}
    encoders = {name: SingleTextEncoder(t5(folder, length=length)) for name, length in lengths.items()}
    stages = torch.nn.ModuleDict({**encoders, "joint": joint(folder)})
    before = {name: encoder.embed(TEXTS)["sequence"] for name, encoder in encoders.items()}
    share_networks(stages)
    base, small, other = (encoder.network.frozen.network for encoder in encoders.values())
    assert base is small is stages["joint"].t5.frozen.network and base is not other
    for name, encoder in encoders.items():
        assert torch.equal(encoder.embed(TEXTS)["sequence"], before[name])


def test_only_the_projections_are_trained_and_saved(folder):
    encoder = joint(folder)
    encoder(TEXTS).sequence.sum().backward()
    names = [f"{part}_projection.{kind}" for part in ("clip", "t5") for kind in ("weight", "bias")]
    assert sorted(encoder.state_dict()) == sorted(dict(encoder.named_parameters())) == sorted(names)
    assert all(weight.grad is not None for weight in encoder.parameters())


def test_bfloat16_embeddings_are_the_same_under_autocast_so_that_a_cache_may_hold_them(folder):
    encoder = JointTextEncoder(clip(folder, precision="bfloat16"), t5(folder, precision="bfloat16"), dim=12)
    outside = encoder.embed(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        within = encoder.embed(TEXTS)
    assert outside["t5"].dtype == torch.bfloat16
    assert all(torch.equal(outside[name], within[name]) for name in outside)
    assert_close(outside["t5"].float(), t5(folder).embed(TEXTS)["sequence"], atol=0.1, rtol=0.05)


def test_a_generator_is_built_from_its_description_without_the_networks_files(folder, tmp_path):
    unet = UNet(3, 8, (8, 16), 1, (0, 1), head_dim=8, sequence_dim=12, pooled_dim=8, norm_groups=4)
    generator = DiffusionModule(unet, joint(folder), Diffusion(), image_size=8, num_steps=2)
    for network in (generator.text_encoder.clip, generator.text_encoder.t5):
        assert not network.frozen.is_loaded
    described = generator.describe()
    again = build_learner(described, {"text_encoder.t5.path": "moved/away"})
    assert again.text_encoder.t5.path == "moved/away"
    assert build_learner(described).describe() == described
    generator.save_pretrained(tmp_path)
    assert torch.equal(
        generator.generate(TEXTS, range(3)), load_generator(tmp_path).generate(TEXTS, range(3))
    )


def test_the_fingerprint_is_that_of_contents_and_settings_not_of_places(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert joint(folder).fingerprint() == joint(tmp_path / "elsewhere").fingerprint()
    make_t5(tmp_path / "elsewhere" / "t5", seed=5)
    assert joint(folder).fingerprint() != joint(tmp_path / "elsewhere").fingerprint()
    settings: list[TextNetwork] = [t5(folder), t5(folder, length=40), t5(folder, precision="bfloat16")]
    assert len({network.fingerprint() for network in settings}) == 3


def test_what_is_not_there_or_something_else_is_named_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "t5", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    bare = tmp_path / "bare"
    shutil.copytree(folder / "t5", bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    for embed, message in [
        (lambda: snapshot("no/such/folder"), "no/such/folder is no folder"),
        (lambda: snapshot("some/repository"), "some/repository is no folder"),
        (
            lambda: OpenClipText("ViT-L-14", "nowhere.pt").embed([""]),
            "no checkpoint of ViT-L-14 at nowhere.pt",
        ),
        (lambda: OpenClipText("ViT-X", str(pickled / "config.json")).embed([""]), "does not hold a ViT-X"),
        (lambda: clip(folder, path=str(folder / "t5")).embed([""]), "does not hold a CLIPTextModel.*missing"),
        (
            lambda: t5(folder, path=str(folder / "clip")).embed([""]),
            "does not hold a T5EncoderModel.*missing",
        ),
        (lambda: t5(folder, dim=4096).embed([""]), "dim=4096, but its network is 8 wide"),
        (lambda: t5(folder, path=str(pickled)).embed([""]), "holds no .*safetensors"),
        (lambda: t5(folder, path=str(bare)).embed([""]), "holds no tokenizer"),
    ]:
        with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
            embed()
        assert "\n" not in str(error.value)


def test_the_networks_follow_to_a_device_unless_off_loaded(folder):
    for offload in (False, True):
        encoder = JointTextEncoder(clip(folder, offload=offload), t5(folder, offload=offload), dim=12)
        encoder.embed([""])
        encoder.to("meta")
        devices = {next(n.frozen.network.parameters()).device.type for n in (encoder.clip, encoder.t5)}
        assert devices == {"cpu" if offload else "meta"}
