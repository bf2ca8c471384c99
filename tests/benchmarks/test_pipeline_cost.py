"""The figures in the heads of the configurations that start from published pipelines."""

from __future__ import annotations

import re

import pytest

from benchmarks import pipeline_cost
from tests.shipped import CONFIGS, TINY_PIPELINES

NAMES = [
    pytest.param(path.name, marks=[] if path.name == "sd15.yaml" else pytest.mark.slow)
    for path in sorted((CONFIGS / "quality_tuning").glob("*.yaml"))
    if any(f"init_from: {hub_id}\n" in path.read_text() for hub_id in TINY_PIPELINES)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_says_what_is_computed(name: str) -> None:
    head = (CONFIGS / "quality_tuning" / name).read_text()
    command = re.search(r"python -m benchmarks\.pipeline_cost (.+)", head)
    assert command is not None
    for line in pipeline_cost.main(command[1].split()):
        assert f"#   {line}\n" in head


def test_sdxl_and_its_text_encoders_have_the_published_parameters() -> None:
    """2,567,463,684; CLIP ViT-L's text tower 123.06 M; bigG's 694.66 M with its projection."""
    head = (CONFIGS / "quality_tuning" / "sdxl.yaml").read_text()
    counts = re.search(r"([\d,]+) parameters trained, ([\d,]+) frozen", head)
    assert counts is not None
    trained, frozen = (int(count.replace(",", "")) for count in counts.groups())
    assert trained == 2_567_463_684
    assert frozen == pytest.approx(123.06e6 + 694.66e6 + 83.65e6, rel=1e-4)


def test_a_pipeline_that_is_not_known_is_refused() -> None:
    config = {"model": {"init_args": {"init_from": "someone/else"}}}
    with pytest.raises(ValueError, match="someone/else are not known"):
        pipeline_cost.cost_of(config)
