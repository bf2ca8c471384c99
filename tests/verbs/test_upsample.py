"""`emu upsample`: what is raised, what stays as it is, and what the manifest says of both."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from emu_lightning import cli
from emu_lightning.data.manifest import Manifest, ManifestData
from emu_lightning.evaluation.generation import to_images, to_uint8
from emu_lightning.modules import CascadeModule, SuperResolutionModule, load_upsampler, weights_sha256
from emu_lightning.processes.seeding import next_seed
from emu_lightning.verbs.upsample import PROVENANCE, REPLACED, raise_images, way_up
from tests.data.tars import picture, write_tar
from tests.tiny import tiny_generator, tiny_upsampler

SIZES = {  # height and width
    "loose": (20, 28),
    "in_shard": (24, 18),
    "twin": (20, 28),
    "large": (40, 32),
    "too_small": (15, 60),
    "broken": (20, 28),
}


@pytest.fixture
def pool(in_tmp_path: Path) -> Path:
    """`in.parquet` and its pictures in `pool`, an `upsampler`, and a `cascade` with two."""
    contents = {
        uid: picture(seed, width=width, height=height)
        for seed, (uid, (height, width)) in enumerate(SIZES.items())
    }
    contents["broken"] = b"no picture"
    uris = {uid: f"deep/{uid}.jpg" for uid in SIZES} | {"in_shard": "a.tar#x/1.jpg", "twin": "a.tar#x/2.jpg"}
    write_tar(Path("pool/a.tar"), {"x/1.jpg": contents["in_shard"], "x/2.jpg": contents["twin"]})
    Path("pool/deep").mkdir()
    rows = []
    for uid, (height, width) in SIZES.items():
        if "#" not in uris[uid]:
            (Path("pool") / uris[uid]).write_bytes(contents[uid])
        named = {"uri": uris[uid], "uid": uid, "sha256": hashlib.sha256(contents[uid]).hexdigest()}
        about = {"caption": f"a picture, {uid}", "score": len(uid) / 2, "chosen": uid != "twin"}
        rows.append(named | {"height": height, "width": width} | about)
    write_rows("pool/in.parquet", rows)
    tiny_upsampler().save_pretrained("upsampler")
    stages = [tiny_upsampler(1), tiny_upsampler(2, image_size=32)]
    CascadeModule(tiny_generator(), stages).save_pretrained("cascade")
    return in_tmp_path


def write_rows(path: str, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def rows_of(path: str) -> list[dict]:
    return pq.read_table(path).to_pylist()


def run(
    *argv: str, manifest: str = "pool/in.parquet", model: str = "upsampler", out: str = "out"
) -> dict[str, dict]:
    """The rows of the result, by uid."""
    arguments = ["--manifest", manifest, "--model", model, "--out", out, "--size", "32", "--device", "cpu"]
    cli.main(["upsample", *arguments, *argv])
    return {row["uid"]: row for row in rows_of(f"{out}/manifest.parquet")}


def drawn(row: dict, out: str = "out") -> np.ndarray:
    return np.asarray(Image.open(Path(out) / row["uri"])).astype(int)


def files(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, **options: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*argv, **options)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- one command over a manifest ----------------------------------------------------------------------------


def test_small_pictures_are_raised_and_all_else_is_as_it_was(pool: Path, capsys) -> None:
    before, given = files("pool"), rows_of("pool/in.parquet")
    rows = run("--batch_size", "3")
    said = capsys.readouterr()
    assert files("pool") == before
    assert list(rows) == list(SIZES)  # all, in order
    raised = {"loose": (32, 45), "in_shard": (43, 32), "twin": (32, 45)}
    for was in given:
        now, uid = rows[was["uid"]], was["uid"]
        uri = f"{pool}/pool/{was['uri']}"
        assert all(now[name] == was[name] for name in was if name not in REPLACED)
        if uid not in raised:
            assert now["uri"] == uri and all(now[name] == was[name] for name in was if name != "uri")
            assert all(now[name] is None for name in PROVENANCE if name != "upsampler_error")
            continue
        content = (Path("out") / now["uri"]).read_bytes()
        assert content.startswith(b"\x89PNG") and drawn(now).shape == (*raised[uid], 3)
        assert (now["height"], now["width"]) == raised[uid]
        assert now["sha256"] == hashlib.sha256(content).hexdigest()
        assert now["original_uri"] == uri and now["original_sha256"] == was["sha256"]
        assert (now["original_height"], now["original_width"]) == SIZES[uid]
        assert now["upsampler_sha256"] == weights_sha256("upsampler")
        assert json.loads(now["upsampler_settings"])["size"] == 32 and now["upsampler_error"] is None
    errors = {
        "too_small": "15x60 pixels are too few: the stages raise 2 times",
        "broken": "UnidentifiedImageError: cannot identify image file",
    }
    assert {uid: row["upsampler_error"] for uid, row in rows.items() if row["upsampler_error"]} == errors
    assert all(f"not raised: {uid}: {error}\n" in said.out for uid, error in errors.items())
    assert "3 pictures raised, 2 could not be: out/manifest.parquet" in said.out
    assert "raising: 100%" in said.err


def test_what_is_made_is_what_the_stage_makes(pool: Path) -> None:
    made = run("--num_steps", "3", "--guidance_scale", "1.5", "--seed", "4", "--batch_size", "1")
    stage, source = load_upsampler("upsampler"), Manifest("pool/in.parquet")
    # 32 x 45 and 43 x 32 in multiples of 2 are 32 x 46 and 44 x 32, still of 20 x 28 and 24 x 18 pixels.
    for index, (uid, whole) in enumerate({"loose": (32, 46), "in_shard": (44, 32)}.items()):
        expected = stage.upsample(
            to_images(np.array(source[index].image)[None]),
            [f"a picture, {uid}"],
            [made[uid]["upsampler_seed"]],
            size=whole,
            num_steps=3,
            guidance_scale=1.5,
        )
        cut = to_uint8(expected)[0, : made[uid]["height"], : made[uid]["width"]]
        assert np.array_equal(drawn(made[uid]), cut)


def test_a_picture_depends_on_itself_and_the_settings_alone(pool: Path) -> None:
    together = run("--batch_size", "3")
    write_rows("pool/few.parquet", rows_of("pool/in.parquet")[2:0:-1])
    alone = run("--batch_size", "1", manifest="pool/few.parquet", out="few")
    seed = run("--seed", "1", manifest="pool/few.parquet", out="seed")
    level = run("--overrides", "{augmentation_level: 0.5}", manifest="pool/few.parquet", out="level")
    for uid in ("in_shard", "twin"):
        assert alone[uid]["uri"] == together[uid]["uri"]
        # In another batch the last bits of floats may be others, no more.
        assert abs(drawn(alone[uid], "few") - drawn(together[uid])).max() <= 1
        for other, out in ((seed[uid], "seed"), (level[uid], "level")):
            assert other["uri"] != alone[uid]["uri"]
            assert abs(drawn(other, out) - drawn(alone[uid], "few")).max() > 20
    (stage,) = json.loads(level["twin"]["upsampler_settings"])["stages"]
    assert stage["init_args"]["augmentation_level"] == 0.5


def test_a_killed_job_goes_on(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(out="whole")
    calls: list[int] = []
    upsample = SuperResolutionModule.upsample

    def killed_at_the_second(self, images, *args, **kwargs):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return upsample(self, images, *args, **kwargs)

    monkeypatch.setattr(SuperResolutionModule, "upsample", killed_at_the_second)
    with pytest.raises(SystemExit) as exit_:
        run()
    assert exit_.value.code == 130 and not Path("out/manifest.parquet").exists()
    damaged, good = made = files("out")  # the two of one size, which came first
    damaged.write_bytes(made[damaged][:-20])  # the disk's own mistake
    written = good.stat().st_mtime_ns
    resumed = run()
    assert calls[2:] == [1, 1]  # the damaged one, and the one of the other size
    assert good.stat().st_mtime_ns == written
    assert [row["uri"] for row in resumed.values()] == [row["uri"] for row in whole.values()]
    for uid in ("loose", "in_shard", "twin"):
        assert abs(drawn(resumed[uid]) - drawn(whole[uid], "whole")).max() <= 1
    calls.clear()
    assert run() == resumed and calls == []


def test_the_result_is_a_manifest_to_train_on(pool: Path) -> None:
    rows = run("--keep", "chosen", model="cascade")
    assert rows["twin"]["original_uri"] is None and rows["loose"]["original_uri"] is not None
    os.rename("out", "elsewhere")  # raised pictures move with their manifest
    data = ManifestData(
        manifest="elsewhere/manifest.parquet",
        keep="chosen",
        verify=True,
        resolution=32,
        batch_size=4,
        num_workers=0,
        val_fraction=0.0,
    )
    source = data.source("train")
    assert source is not None
    # The cascade's two stages reach what one did not.
    assert [source.size(i) for i in range(4)] == [(32, 45), (43, 32), (40, 32), (32, 128)]
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 32, 32) and set(batch.broken) <= {"broken"}


def test_pictures_go_through_as_many_stages_as_they_need(pool: Path) -> None:
    made = run("--num_steps", "1", model="[upsampler, upsampler]")["too_small"]
    assert made["upsampler_sha256"] == " ".join([weights_sha256("upsampler")] * 2)
    stage = load_upsampler("upsampler")
    images = to_images(np.array(Manifest("pool/in.parquet")[4].image)[None])
    seed, texts = made["upsampler_seed"], ["a picture, too_small"]
    images = raise_images(stage, images, (16, 64), texts, [seed], num_steps=1)
    images = raise_images(stage, images, (32, 128), texts, [next_seed(seed)], num_steps=1)
    assert np.array_equal(drawn(made), to_uint8(images)[0])


# --- its parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "target", "factors", "way"),
    [
        ((200, 300), 1024, (4, 4), [(256, 384), (1024, 1536)]),
        ((300, 200), 1024, (4, 4), [(384, 256), (1536, 1024)]),
        ((256, 256), 1024, (4, 4), [(1024, 1024)]),
        ((255, 255), 1024, (4, 4), [(256, 256), (1024, 1024)]),
        ((700, 1000), 1024, (4, 4), [(1024, 1463)]),
        ((64, 64), 1024, (4, 4), [(256, 256), (1024, 1024)]),
        ((63, 64), 1024, (4, 4), []),
        ((30, 40), 100, (2, 3), [(34, 45), (100, 133)]),  # 100 / 3, rounded up
    ],
)
def test_the_last_stages_are_taken_as_few_as_reach_the_size(size, target, factors, way) -> None:
    assert list(way_up(size, target, factors)) == way


class Enlarging:
    """A stage without a network: bilinear; remembers what it was given."""

    side_multiple = 16

    def upsample(self, images, prompts, seeds, *, size):
        self.given, self.size = images, size
        return interpolate(images, size, mode="bilinear")


@pytest.mark.parametrize(
    ("small", "size"), [((20, 30), (40, 60)), ((17, 40), (34, 80)), ((31, 43), (93, 129))]
)
def test_the_edge_is_continued_by_reflection_and_cut_away(small, size) -> None:
    """In whole ratios what is made lies where it would without; only the edge sees what follows it."""
    stage, images = Enlarging(), torch.rand(2, 3, *small, generator=torch.Generator().manual_seed(0))
    made = raise_images(stage, images, size, ["", ""], [0, 1])
    direct = interpolate(images, size, mode="bilinear")
    assert made.shape == direct.shape and all(side % 16 == 0 for side in stage.size)
    inside = (..., slice(0, -(size[0] // small[0])), slice(0, -(size[1] // small[1])))
    torch.testing.assert_close(made[inside], direct[inside], atol=1e-5, rtol=0)
    beyond = [(0, stage.given.shape[axis] - images.shape[axis]) for axis in range(4)]
    mirrored = np.pad(images.numpy(), beyond, mode="reflect")
    assert np.array_equal(stage.given.numpy(), mirrored)


def test_other_ratios_move_nothing_by_a_small_pixel() -> None:
    """A ramp of the picture's own coordinates, made larger, still tells them to within one pixel."""
    ramp = torch.arange(70.0).expand(1, 3, 50, 70)
    made = raise_images(Enlarging(), ramp, (73, 102), [""], [0])[0, 0, 0]
    true = (torch.arange(102) + 0.5) * 70 / 102 - 0.5
    assert (made - true).abs().max() < 1


def test_pictures_smaller_than_the_network_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="makes sides of 16 pixels and more cannot make pictures of 8x8"):
        raise_images(Enlarging(), torch.zeros(1, 3, 4, 4), (8, 8), [""], [0])


# --- one line for what is wrong -----------------------------------------------------------------------------


def test_what_cannot_be_done_is_said(pool: Path, capsys) -> None:
    tiny_generator().save_pretrained("generator")
    assert "generator draws from text alone: name an upsampler" in refusal(capsys, model="generator")
    assert "there is no 'level'" in refusal(capsys, "--overrides", "{level: 0}")
    run("--num_steps", "1")
    message = refusal(capsys, manifest="out/manifest.parquet", out="again")
    assert "out/manifest.parquet was made by `emu upsample`: give the manifest of the originals" in message
    os.rename("pool/in.parquet", "pool/manifest.parquet")
    message = refusal(capsys, manifest="pool/manifest.parquet", out="pool")
    assert "pool/manifest.parquet is another manifest, which would be lost: name another --out" in message
    write_rows("pool/more.parquet", rows_of("pool/manifest.parquet"))
    assert "names 2 files: give one" in refusal(capsys, manifest="pool/*.parquet")


def test_a_stage_for_one_size_is_refused(pool: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuperResolutionModule, "low_size", 8)
    assert "upsampler takes pictures of 8x8 pixels and no others" in refusal(capsys)


def test_a_manifest_that_is_wrong_about_a_picture_is_told(pool: Path) -> None:
    rows = rows_of("pool/in.parquet")
    rows[0]["height"], rows[1]["sha256"] = 21, "0" * 64
    write_rows("pool/wrong.parquet", rows)
    made = run("--num_steps", "1", manifest="pool/wrong.parquet")
    assert made["loose"]["upsampler_error"] == "it is 20x28 pixels, the manifest says 21x28"
    assert made["in_shard"]["upsampler_error"] == "its sha256 is not that of the manifest"
    assert made["twin"]["upsampler_error"] is None
