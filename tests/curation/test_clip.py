"""Clip, its heads and timm's concepts: tiny networks made here, against plain calls and formulas."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from emu_lightning.curation.head import fit_head, write_head
from emu_lightning.curation.scorer import Picture
from emu_lightning.curation.scorers import (
    AestheticHead,
    Clip,
    LearntHead,
    OffensiveHead,
    Probe,
    TimmConcept,
    ZeroShot,
)
from emu_lightning.curation.scorers.concept import parse_classes
from emu_lightning.curation.scoring import all_scores, plan

LENGTH, DIM = 12, 16
MODEL = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["a red star", None, "  ", "two dogs on a beach at night", "food"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A network as `open_clip` and `ContrastiveModule` leave one."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**MODEL).state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    """open_clip's own way to the network, its transform and its tokenizer."""
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return network.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def pictures(num: int = 5, seed: int = 0) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [
        Picture(
            b"", Image.fromarray(rng.integers(0, 256, (40 + n, 50, 3), dtype=np.uint8)), {"caption": text}
        )
        for n, text in zip(range(num), CAPTIONS * num, strict=False)
    ]


def embed(plain, images: list[Picture]) -> np.ndarray:
    network, transform, _ = plain
    pixels = torch.stack([transform(picture.image) for picture in images])
    with torch.no_grad():
        return network.encode_image(pixels, normalize=True).numpy()


def embed_text(plain, text: str) -> np.ndarray:
    network, _, tokenizer = plain
    with torch.no_grad():
        return network.encode_text(tokenizer([text]), normalize=True)[0].numpy()


def started(scorer):
    scorer.start()
    return scorer


def as_table(of, columns) -> pa.Table:
    """As the pass writes it: of the types that were promised."""
    return pa.table({name: pa.array(columns[name], type_) for name, type_ in of.columns.items()})


def all_columns(clip, some: list[Picture]) -> pa.Table:
    """Those of the started network, and those of its heads."""
    table = own = as_table(clip, clip.score(some))
    for head in clip.derived:
        for name, column in zip(head.columns, as_table(head, head.derive(own)).columns, strict=True):
            table = table.append_column(name, column)
    return table


def test_embeddings_and_scores_are_those_of_open_clip(folder, plain):
    clip = started(Clip(str(folder), batch_size=4))
    table = as_table(clip, clip.score(pictures()))
    assert table.schema.field("clip_embedding").type == pa.list_(pa.float16(), DIM)
    made = np.stack(table["clip_embedding"].to_pylist()).astype(np.float32)
    expected = embed(plain, pictures())
    np.testing.assert_allclose(made, expected, atol=1e-3)
    scores = table["clip_score"].to_pylist()
    assert [score is None for score in scores] == [False, True, True, False, False]
    for n in (0, 3, 4):
        assert scores[n] == pytest.approx(expected[n] @ embed_text(plain, CAPTIONS[n]), abs=1e-3)


def test_weights_may_be_a_file_beside_a_name(tmp_path, plain, folder):
    """A name that open_clip knows; the file has half the precision, or is a pickle of tensors."""
    config = {**open_clip.get_model_config("ViT-B-32")}
    torch.manual_seed(1)
    network = open_clip.CLIP(**config).half()
    state = network.state_dict()
    torch.save(state, tmp_path / "weights.pt")
    clip = started(Clip(str(tmp_path / "weights.pt"), model="ViT-B-32", batch_size=1))
    _, _, transform = open_clip.create_model_and_transforms("ViT-B-32", load_weights=False)
    (picture,) = pictures(1)
    with torch.no_grad():
        expected = network.float().eval().encode_image(transform(picture.image)[None], normalize=True)[0]
    made = clip.score([picture])["clip_embedding"][0]
    np.testing.assert_allclose(made.astype(np.float32), expected.numpy(), atol=1e-3)
    assert clip.columns["clip_embedding"].list_size == 512


def test_scores_are_the_same_in_any_company(folder):
    """Bit by bit: else a run that was killed would end otherwise than one that was not."""
    heads = [ZeroShot({"food": ["food"], "animal": ["a dog", "a cat"]})]
    clip = started(Clip(str(folder), heads=heads, batch_size=8))
    many = pictures(20)
    together = all_columns(clip, many)
    alone = pa.concat_tables([all_columns(clip, [picture]) for picture in many])
    assert together.combine_chunks().equals(alone.combine_chunks())


def test_a_long_caption_is_read_to_its_end(folder, plain):
    clip = started(Clip(str(folder)))
    words = "the quick brown fox jumps over a lazy dog near some old grey wooden house".split()
    (picture,) = pictures(1)
    scores = {}
    for caption in (" ".join(words), " ".join([*words[:-1], "volcano"])):
        columns = clip.score([Picture(b"", picture.image, {"caption": caption})])
        scores[caption] = columns["clip_score"][0]
        parts = clip._parts(caption)
        assert " ".join(parts) == caption and len(parts) > 1
        image = embed(plain, [picture])[0]
        for part in parts:  # none is cut: its tokens end before the place of the last
            assert len(open_clip.SimpleTokenizer().encode(part)) + 2 <= LENGTH
        expected = np.average(
            [image @ embed_text(plain, part) for part in parts], weights=[len(part) for part in parts]
        )
        assert scores[caption] == pytest.approx(expected, abs=1e-3)
    assert len(set(scores.values())) == 2


def test_a_caption_that_just_fits_is_one_part(folder):
    clip = started(Clip(str(folder)))
    fits = " ".join(["dog"] * (LENGTH - 2))
    assert clip._parts(fits) == [fits]
    assert len(clip._parts(fits + " dog")) == 2


def test_bfloat16_is_near(folder, plain):
    clip = started(Clip(str(folder), precision="bf16"))
    made = np.stack(clip.score(pictures())["clip_embedding"]).astype(np.float32)
    assert (made * embed(plain, pictures())).sum(1).min() > 0.999


def test_fingerprints_follow_all_that_scores_depend_on(folder, tmp_path):
    concepts = {"food": ["food"], "animal": ["a dog"]}
    base = Clip(str(folder))
    same = Clip(str(folder), heads=[ZeroShot(concepts)], batch_size=7)
    assert base.fingerprint() == same.fingerprint()  # heads have their own
    assert ZeroShot(concepts).fingerprint() != ZeroShot(concepts | {"car": ["a car"]}).fingerprint()
    others = [Clip(str(folder), precision="bf16")]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = Clip(str(tmp_path))
    assert copy.fingerprint() == base.fingerprint()  # wherever it lies
    (tmp_path / "open_clip_config.json").write_text(
        (folder / "open_clip_config.json").read_text().replace("0.5", "0.4")
    )
    others.append(copy)
    prints = [one.fingerprint() for one in (base, *others)]
    assert len(set(prints)) == len(prints)


def test_weights_are_named_with_their_hashes(folder, classifier, tmp_path):
    save_file(nn.Linear(DIM, 1).state_dict(), tmp_path / "head.safetensors")
    head = str(tmp_path / "head.safetensors")
    files = {
        str(folder): folder / "open_clip_model.safetensors",
        head: Path(head),
        str(classifier): classifier / "model.safetensors",
    }
    clip = Clip(str(folder), heads=[AestheticHead(head), Probe("text", ["text"], ["none"])])
    written = all_scores([clip, TimmConcept(str(classifier), {"food": "0"})])
    every = [scores for own, derived in written.items() for scores in (own, *derived)]
    named = {name: digest for scores in every for name, digest in scores.weights.items()}
    assert named == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_a_scorer_travels_before_it_is_started(folder):
    clip = pickle.loads(pickle.dumps(Clip(str(folder), heads=[ZeroShot({"a": ["x"], "b": ["y"]})])))
    assert len(all_columns(started(clip), pictures(2))["concept"]) == 2


def test_what_does_not_fit_is_named(folder, tmp_path):
    file = str(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="name the architecture by model"):
        Clip(file).fingerprint()
    with pytest.raises(ValueError, match="leave out model"):
        Clip(str(folder), model="ViT-B-32").fingerprint()
    with pytest.raises(ValueError, match="does not hold a ViT-B-32"):
        Clip(file, model="ViT-B-32").start()
    with pytest.raises(ValueError, match="knows no model ViT-Z"):
        Clip(file, model="ViT-Z").start()
    with pytest.raises(ValueError, match="tokenizer of its own"):
        Clip(file, model="ViT-B-16-SigLIP").start()
    with pytest.raises(FileNotFoundError, match="open_clip_config.json"):
        Clip(str(tmp_path)).start()
    with pytest.raises(ValueError, match="the column concept"):
        plan(tmp_path, [], [Clip(str(folder), heads=[ZeroShot({"a": ["x"], "b": ["y"]})] * 2)])


# --- heads --------------------------------------------------------------------------------------------------


def unit(num: int = 6, dim: int = DIM, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def no_texts(texts):
    raise AssertionError("this head reads no text")


def test_concepts_are_those_of_open_clips_classifier(folder, plain):
    network, _, tokenizer = plain
    names, templates = ["dog", "red car", "pasta"], ["a photo of a {}.", "{} at night"]
    concepts = {name: [template.format(name) for template in templates] for name in names}
    clip = started(Clip(str(folder), heads=[ZeroShot(concepts)]))
    columns = all_columns(clip, pictures()).to_pydict()
    classifier = open_clip.build_zero_shot_classifier(network, tokenizer, names, templates)
    shares = (100 * torch.tensor(embed(plain, pictures())) @ classifier).softmax(1)
    assert columns["concept"] == [names[n] for n in shares.argmax(1)]
    np.testing.assert_allclose(columns["concept_probability"], shares.max(1).values, atol=0.02)


def test_a_probe_is_the_probability_of_one_of_two(folder, plain):
    clip = started(Clip(str(folder), heads=[Probe("overlay", ["a watermark", "text"], ["a photo"])]))
    either = started(
        Clip(str(folder), heads=[ZeroShot({"y": ["a watermark", "text"], "n": ["a photo"]}, "overlay")])
    )
    made = all_columns(clip, pictures()).to_pydict()["overlay"]
    answers = all_columns(either, pictures()).to_pydict()
    for share, answer, best in zip(made, answers["overlay"], answers["overlay_probability"], strict=True):
        assert share == pytest.approx(best if answer == "y" else 1 - best, abs=1e-6)


class MLP(nn.Module):
    """LAION's improved aesthetic predictor as published, for embeddings of any width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("network", [nn.Linear(DIM, 1), MLP(DIM)], ids=["v1", "v2"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_scores_are_laions(network, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(network.state_dict(), path)
    head = AestheticHead(str(path))
    head.start(no_texts, DIM, "clip")
    with torch.no_grad():
        expected = network.eval()(torch.tensor(unit()))[:, 0]
    np.testing.assert_allclose(head.score(unit())["aesthetic"], expected, atol=1e-5)


def test_an_aesthetic_score_out_of_range_is_an_error(tmp_path):
    save_file({"weight": torch.full((1, DIM), 50.0), "bias": torch.zeros(1)}, tmp_path / "w.safetensors")
    head = AestheticHead(str(tmp_path / "w.safetensors"))
    head.start(no_texts, DIM, "clip")
    with pytest.raises(ValueError, match="belongs to another CLIP"):
        head.score(unit())


class NSFW(nn.Module):
    """LAION's CLIP-based detector in torch: AutoKeras' normalisation, then four dense layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.randn(dim) * 0.1)
        self.norm.register_buffer("variance", torch.rand(dim) + 0.1)
        self.linear_1, self.linear_2 = nn.Linear(dim, 64), nn.Linear(64, 512)
        self.linear_3, self.linear_4 = nn.Linear(512, 256), nn.Linear(256, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.norm.mean) / self.norm.variance.sqrt()
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            x = layer(x).relu()
        return self.linear_4(x).sigmoid()


def test_offensive_scores_are_laions(tmp_path):
    torch.manual_seed(0)
    network = NSFW(DIM)
    save_file(network.state_dict(), tmp_path / "nsfw.safetensors")
    head = OffensiveHead(str(tmp_path / "nsfw.safetensors"))
    head.start(no_texts, DIM, "clip")
    with torch.no_grad():
        expected = network(torch.tensor(unit()))[:, 0]
    np.testing.assert_allclose(head.score(unit())["offensive"], expected, atol=1e-5)


@pytest.mark.parametrize("head", [AestheticHead, OffensiveHead])
def test_heads_for_other_embeddings_are_refused(head, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({**NSFW(24).state_dict(), **{"a.weight": torch.ones(1, 24), "a.bias": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match="embeddings of 16 numbers"):
        head(str(path)).start(no_texts, DIM, "clip")
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no tensors that can be read"):
        head(str(path)).start(no_texts, DIM, "clip")


def test_a_pickle_of_more_than_tensors_is_not_run(tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(ValueError, match="no tensors that can be read"):
        AestheticHead(str(tmp_path / "weights.pth")).start(no_texts, DIM, "clip")


def test_a_learnt_head_gives_what_was_fitted_and_knows_its_clip(tmp_path):
    path = tmp_path / "head.safetensors"
    labels = unit(200) @ unit(1, seed=1)[0] > 0
    fitted = fit_head(unit(200).astype(np.float64), labels)
    write_head(path, fitted, "clip")
    head = LearntHead("liked", str(path))
    head.start(no_texts, DIM, "clip")
    logits = unit(9, seed=2) @ fitted.weight + fitted.bias
    np.testing.assert_allclose(head.score(unit(9, seed=2))["liked"], 1 / (1 + np.exp(-logits)), rtol=1e-6)
    with pytest.raises(ValueError, match="another CLIP"):
        head.start(no_texts, DIM, "another")
    save_file({"weight": torch.ones(1, DIM)}, path)
    with pytest.raises(ValueError, match="no head that `emu head` wrote"):
        head.start(no_texts, DIM, "clip")


def test_zero_shot_needs_a_choice():
    with pytest.raises(ValueError, match="two concepts"):
        ZeroShot({"food": ["food"]})


# --- timm ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, 64, 64], "num_classes": 10, "crop_pct": 1.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_concept_is_the_sum_of_its_classes(classifier):
    scorer = TimmConcept(str(classifier), {"animal": "0-3", "food": "5, 7"}, batch_size=4)
    scorer.start()
    columns = scorer.score(pictures(3))
    network = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    with torch.no_grad():
        shares = network(torch.stack([transform(p.image) for p in pictures(3)])).softmax(1)
    sums = torch.stack([shares[:, :4].sum(1), shares[:, [5, 7]].sum(1), shares[:, [4, 6, 8, 9]].sum(1)], 1)
    assert columns["concept"] == [["animal", "food", "other"][n] for n in sums.argmax(1)]
    np.testing.assert_allclose(columns["concept_probability"], sums.max(1).values, atol=1e-5)
    alone = [scorer.score([picture]) for picture in pictures(3)]
    assert [one["concept_probability"][0] for one in alone] == columns["concept_probability"]


@pytest.mark.parametrize("text", ["", "a", "3-", "5-2"])
def test_classes_that_are_none_are_named(text):
    with pytest.raises(ValueError, match="concept food"):
        parse_classes(text, "food")


def test_a_class_belongs_to_one_concept(classifier):
    with pytest.raises(ValueError, match="class 3 belongs to two concepts, animal and food"):
        TimmConcept(str(classifier), {"animal": "0-3", "food": "3"})
    with pytest.raises(ValueError, match="knows 0 to 9"):
        TimmConcept(str(classifier), {"animal": "0-10"}).start()
