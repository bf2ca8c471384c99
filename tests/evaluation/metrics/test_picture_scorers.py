"""Scores of single pictures against their formulas on what the networks give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from emu_lightning.evaluation.metrics import (
    HPS,
    AestheticScore,
    ClipScore,
    ImageReward,
    OpenClipEmbedder,
    PickScore,
    TransformersClip,
    VisionLanguageModel,
    VQAScore,
    measure_pictures,
)
from tests.evaluation.metrics.tiny_networks import (
    DIM,
    WORDS,
    make_bert_tokenizer,
    make_images,
    make_llava,
    make_open_clip,
    make_pictures,
    make_transformers_clip,
)

LONG = "a red ball lies in the snow " * 20
PROMPTS = ["a red ball", "", LONG, "a red ball", "two dogs"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return make_transformers_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    return make_open_clip(tmp_path_factory.mktemp("open_clip") / "clip")


@pytest.fixture(scope="module")
def cosines(clip_folder) -> np.ndarray:
    """By transformers alone, one pair at a time."""
    network = CLIPModel.from_pretrained(clip_folder).eval()
    processor, tokenizer = (one.from_pretrained(clip_folder) for one in (AutoImageProcessor, AutoTokenizer))
    made = []
    for picture, prompt in zip(make_pictures(), PROMPTS, strict=True):
        tokens = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
        pixels = processor(images=picture, return_tensors="pt")
        with torch.no_grad():
            output = network(**tokens, **pixels)
        made.append(float((output.image_embeds * output.text_embeds).sum()))
    return np.array(made)


# --- cosines ------------------------------------------------------------------------------------------------


def test_clip_score_is_the_formula_for_each_picture(clip_folder, cosines):
    scorer = ClipScore(TransformersClip(str(clip_folder)))
    assert (cosines < 0).any() and (cosines > 0).any()  # else the clamp would not be seen
    assert scorer.score(make_pictures(), PROMPTS) == pytest.approx(2.5 * np.maximum(cosines, 0), abs=1e-5)
    assert scorer.cut(PROMPTS).tolist() == [False, False, True, False, False]
    (measured,) = measure_pictures([scorer], make_pictures(), PROMPTS)
    assert measured.value == pytest.approx(2.5 * np.maximum(cosines, 0).mean(), abs=1e-5)
    assert (measured.num, measured.details) == (5, {"prompts_cut": 1})
    (network,) = measured.networks
    assert network.weights_sha256 == scorer.weights_sha256 and "CLIPImageProcessor" in network.preprocess_id


def test_a_prefix_is_read_with_each_prompt(clip_folder):
    embedder, pictures = TransformersClip(str(clip_folder)), make_pictures(2)
    made = ClipScore(embedder, prefix="a photo depicts ").score(pictures, ["a dog", "x"])
    said = ClipScore(embedder).score(pictures, ["a photo depicts a dog", "a photo depicts x"])
    assert made.tolist() == said.tolist()


def test_hps_is_the_cosine(open_clip_folder):
    embedder = OpenClipEmbedder(str(open_clip_folder), resize_mode="longest")
    scorer, prompts = HPS(embedder, "v2.1"), PROMPTS
    images, texts = (
        torch.from_numpy(x) for x in (embedder.embed_images(make_pictures()), embedder.embed_texts(prompts))
    )
    expected = torch.cosine_similarity(images, texts)
    assert scorer.score(make_pictures(), prompts) == pytest.approx(expected.numpy(), abs=1e-5)
    assert scorer.name == "HPSv2.1" and HPS(embedder, "v2.0").name == "HPSv2.0"


def test_pick_score_is_the_scaled_cosine_and_a_probability_of_a_pair(clip_folder, cosines):
    scorer = PickScore(TransformersClip(str(clip_folder)))
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.detach().exp().item()
    scores = scorer.score(make_pictures(), PROMPTS)
    assert scores == pytest.approx(scale * cosines, abs=1e-4)
    shares = torch.tensor([scores[0], scores[3]]).softmax(0)  # two pictures of one prompt
    assert PickScore.preference(scores[:1], scores[3:4]) == pytest.approx(shares[:1].numpy())
    assert PickScore.preference(3.0, 3.0) == 0.5


def test_pictures_and_prompts_go_together(clip_folder):
    with pytest.raises(ValueError, match="5 pictures but 1 prompts"):
        ClipScore(TransformersClip(str(clip_folder))).score(make_pictures(), ["a"])


# --- aesthetics ---------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """LAION's improved aesthetic predictor as published, for embeddings of any width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 64), nn.Dropout(0.2), nn.Linear(64, 32), nn.Dropout(0.2),
            nn.Linear(32, 16), nn.Dropout(0.1), nn.Linear(16, 8), nn.Linear(8, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("head", [nn.Linear(DIM, 1), MLP(DIM)], ids=["v1", "v2"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_score_reads_embeddings_of_length_1(head, suffix, open_clip_folder, tmp_path):
    path = tmp_path / f"head{suffix}"
    (torch.save if suffix == ".pth" else save_file)(head.state_dict(), path)
    embedder = OpenClipEmbedder(str(open_clip_folder))
    scorer = AestheticScore(embedder, str(path))
    embeddings = torch.from_numpy(embedder.embed_images(make_pictures()))
    with torch.no_grad():
        expected, wrong = (head.eval()(x)[:, 0].numpy() for x in (normalize(embeddings), embeddings))
    scores = scorer.score(make_pictures(), PROMPTS)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.abs(scores - wrong).max() > 1e-3
    assert scorer.score(make_pictures(), [""] * 5).tolist() == scores.tolist() and not scorer.reads_prompts
    assert [network.name for network in scorer.networks] == ["open_clip clip", f"head head{suffix}"]
    assert len(scorer.weights_sha256) == 64 and scorer.weights_sha256 != embedder.weights_sha256


def test_an_aesthetic_score_out_of_range_is_an_error(open_clip_folder, tmp_path):
    embedder = OpenClipEmbedder(str(open_clip_folder))
    save_file({"weight": torch.zeros(1, DIM), "bias": torch.full((1,), 25.0)}, tmp_path / "far.safetensors")
    with pytest.raises(ValueError, match="aesthetic score is 25, where -10 to 20 is meant"):
        AestheticScore(embedder, str(tmp_path / "far.safetensors")).score(make_pictures(1), [""])
    save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="belongs to another CLIP"):
        AestheticScore(embedder, str(tmp_path / "other.safetensors")).score(make_pictures(1), [""])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        AestheticScore(embedder, str(tmp_path / "nowhere")).score(make_pictures(1), [""])


# --- ImageReward --------------------------------------------------------------------------------------------

WIDTH, TEXT_WIDTH, LAYERS = 128, 24, 2
MED = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "max_position_embeddings": 64, "vocab_size": 30, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "pad_token_id": 0, "type_vocab_size": 2, "add_cross_attention": True,
}  # fmt: skip


def reward_state() -> dict[str, torch.Tensor]:
    """Random numbers by the names of the published file, unused ones among them."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, WIDTH),
        "blip.visual_encoder.pos_embed": (1, 17, WIDTH),
        "blip.visual_encoder.patch_embed.proj.weight": (WIDTH, 3, 8, 8),
        "blip.visual_encoder.patch_embed.proj.bias": (WIDTH,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30, TEXT_WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, TEXT_WIDTH),
        "blip.vision_proj.weight": (4, WIDTH),
    }

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    add("blip.visual_encoder.norm", WIDTH)
    add("blip.text_encoder.embeddings.LayerNorm", TEXT_WIDTH)
    for n in range(LAYERS):
        block, layer = f"blip.visual_encoder.blocks.{n}", f"blip.text_encoder.encoder.layer.{n}"
        for name, *shape in (
            ("norm1", WIDTH), ("norm2", WIDTH), ("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH), ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):  # fmt: skip
            add(f"{block}.{name}", *shape)
        for attention, seen in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            add(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            add(f"{layer}.{attention}.self.key", TEXT_WIDTH, seen)
            add(f"{layer}.{attention}.self.value", TEXT_WIDTH, seen)
            add(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            add(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        add(f"{layer}.intermediate.dense", 48, TEXT_WIDTH)
        add(f"{layer}.output.dense", TEXT_WIDTH, 48)
        add(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    for n, (inputs, outputs) in {0: (TEXT_WIDTH, 8), 2: (8, 4), 7: (4, 1)}.items():
        add(f"mlp.layers.{n}", outputs, inputs)
    rng = torch.Generator().manual_seed(0)
    state = {name: 0.5 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return {**state, "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}


def attend(query, key, value, heads):
    split = [x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value)]
    shares = (split[0] @ split[1].transpose(1, 2) / split[0].shape[-1] ** 0.5).softmax(-1)
    return (shares @ split[2]).transpose(0, 1).flatten(1)


def plain_reward(state, pixels, ids, num_read):
    """BLIP and its head by hand, for one picture (3, H, W) and its prompt's ids (L,)."""

    def apply(name, x):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
    at = "blip.visual_encoder"
    x = patches @ state[f"{at}.patch_embed.proj.weight"].flatten(1).T + state[f"{at}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{at}.cls_token"][0], x]) + state[f"{at}.pos_embed"][0]
    for n in range(LAYERS):
        qkv = apply(f"{at}.blocks.{n}.attn.qkv", norm(f"{at}.blocks.{n}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + apply(f"{at}.blocks.{n}.attn.proj", attend(*qkv, WIDTH // 64))
        hidden = gelu(apply(f"{at}.blocks.{n}.mlp.fc1", norm(f"{at}.blocks.{n}.norm2", x, 1e-6)))
        x = x + apply(f"{at}.blocks.{n}.mlp.fc2", hidden)
    x = norm(f"{at}.norm", x, 1e-6)

    at = "blip.text_encoder.embeddings"
    words, places = (state[f"{at}.{name}_embeddings.weight"] for name in ("word", "position"))
    y = norm(f"{at}.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
    for n in range(LAYERS):
        at = f"blip.text_encoder.encoder.layer.{n}"
        for name, seen, read in (("attention", None, num_read), ("crossattention", x, len(x))):
            keys = (y if seen is None else seen)[:read]
            query, key, value = (f"{at}.{name}.self.{part}" for part in ("query", "key", "value"))
            made = attend(apply(query, y), apply(key, keys), apply(value, keys), 2)
            y = norm(f"{at}.{name}.output.LayerNorm", y + apply(f"{at}.{name}.output.dense", made), 1e-12)
        hidden = gelu(apply(f"{at}.intermediate.dense", y))
        y = norm(f"{at}.output.LayerNorm", y + apply(f"{at}.output.dense", hidden), 1e-12)
    y = y[0]
    for n in (0, 2, 7):
        y = apply(f"mlp.layers.{n}", y)
    return (float(y) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def reward_folders(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("reward")
    torch.save(reward_state(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    return str(folder), str(make_bert_tokenizer(tmp_path_factory.mktemp("bert")))


def test_image_reward_is_blip_written_out(reward_folders):
    scorer, images = ImageReward(*reward_folders, batch_size=2), make_images(3)
    prompts = ["a red ball", "snow is there", "yes or no " * 20]
    mean, deviation = (
        torch.tensor(x)[:, None, None]
        for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(word.lower() for word in WORDS)]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        words = [names.index(word) for word in prompt.split()][:33]  # 35 with start and end
        ids = torch.tensor([2, *words, 3, *[0] * (33 - len(words))])
        pixels = ((image + 1) / 2 - mean) / deviation
        expected.append(plain_reward(reward_state(), pixels, ids, len(words) + 2))
    assert scorer.score(images, prompts) == pytest.approx(expected, abs=1e-4)
    assert len({round(reward, 2) for reward in expected}) == 3
    assert scorer.cut(prompts).tolist() == [False, False, True]
    assert scorer.cut(["ball " * 33, "ball " * 34]).tolist() == [False, True]
    assert "35 tokens" in scorer.networks[0].preprocess_id


def test_a_state_dict_of_something_else_is_no_image_reward(reward_folders, tmp_path):
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    torch.save({"a": torch.ones(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="does not hold an ImageReward"):
        ImageReward(str(tmp_path), reward_folders[1]).score(make_images(1), ["a"])


# --- VQAScore -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> VisionLanguageModel:
    return VisionLanguageModel(str(make_llava(tmp_path_factory.mktemp("llava"))))


def next_words(llava: VisionLanguageModel, picture, text: str) -> torch.Tensor:
    """Probabilities of the first word of an answer, by one pass of the network and no generation."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    network = LlavaForConditionalGeneration.from_pretrained(llava.weights).eval()
    processor = AutoProcessor.from_pretrained(llava.weights)
    inputs = processor(images=picture, text=f"<image> {text} there", return_tensors="pt")
    with torch.no_grad():
        return network(**inputs).logits[0, -1].softmax(-1)


def test_vqa_score_is_the_probability_of_yes(llava):
    scorer, pictures = VQAScore(llava), make_pictures(2)
    prompts = ["a red ball", "snow"]
    scores = scorer.score(pictures, prompts)
    yes = 5 + WORDS.index("Yes")
    for score, picture, prompt in zip(scores, pictures, prompts, strict=True):
        words = next_words(llava, picture, f'Does this figure show "{prompt}"? Please answer yes or no.')
        assert score == pytest.approx(float(words[yes]), rel=1e-4)
    assert scores[0] != pytest.approx(scores[1], rel=1e-2)
    assert scorer.networks[0].name.startswith("transformers llava")
    with pytest.raises(ValueError, match="spells 'Yes No' by 2 tokens"):
        VQAScore(llava, answer="Yes No").score(pictures, prompts)
    with pytest.raises(ValueError, match="no {} for the prompt"):
        VQAScore(llava, question="is it there?")


def test_an_answer_is_the_most_probable_words(llava):
    (picture,) = make_pictures(1)
    first = next_words(llava, picture, "is a ball there")
    answer = llava.answer(picture, "is a ball there", max_tokens=1)
    assert answer == (["", "", "", "", "", *WORDS])[int(first.argmax())]
