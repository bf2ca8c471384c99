"""What counts: decisions, captions and votes, against what people were made to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_lightning.annotation.derive import decisions, judgements, pseudonym
from emu_lightning.annotation.exchange import EXPORTS
from emu_lightning.annotation.questions import Photography
from emu_lightning.annotation.store import Batch, GivenAnswer, NewItem, Store
from emu_lightning.evaluation.votes import Judgement, majority_labels

GOOD = {**dict.fromkeys(Photography.criteria, 2), "accept": True, "reasons": ["exceptional"], "comment": ""}
POOR = {**dict.fromkeys(Photography.criteria, 1), "accept": False, "reasons": ["too dark"], "comment": "dim"}


@pytest.fixture
def ask(sqlite_store: Store, picture_files: list[Path]):
    def asked(batch: Batch, answers: Mapping[str, Sequence[Any]], **fields: Any) -> None:
        """Adds an item of each name, and its answers, in slots: the first by person 0, and so on."""
        pictures: Any = {
            slot: (picture_files[0], f"model {slot}") for slot in "AB"[: batch.asks.num_pictures]
        }
        known = {person.name: person.id for person in sqlite_store.people()}
        for number in range(max(map(len, answers.values()))):
            name = f"person {number}"
            known[name] = known.get(name) or sqlite_store.add_person(name, batch.asks.roles[0]).id
        texts = {"prompt": "a fox"} if batch.asks.shows_prompt else {}
        texts |= {"caption": "As written."} if batch.asks.shows_caption else {}
        sqlite_store.add_items(batch, [NewItem(name, pictures, **{**texts, **fields}) for name in answers])
        given = []
        for item in sqlite_store.items(batch):
            for number, answer in enumerate(answers.get(item.name, ())):
                given.append(GivenAnswer(item, known[f"person {number}"], answer))
        sqlite_store.import_answers(batch, given)

    return asked


def rows(store: Store, batch: Batch) -> dict[str, dict[str, Any]]:
    return {row.pop("uid"): row for row in decisions(store, batch).to_pylist()}


def test_screening_loses_as_little_as_it_can(sqlite_store: Store, ask) -> None:
    """Every outcome of up to three people: kept unless most reject, and unsure is no rejection.

    Two who differ wait for a third.
    """
    batch = sqlite_store.add_batch("screening", "s")
    outcomes = [o for num in (1, 2, 3) for o in product(("keep", "unsure", "reject"), repeat=num)]
    ask(batch, {"-".join(o): [{"choice": choice} for choice in o] for o in outcomes})
    found = rows(sqlite_store, batch)
    for outcome in outcomes:
        name, votes = "-".join(outcome), ["reject" if choice == "reject" else "keep" for choice in outcome]
        if len(votes) == 1 or (len(votes) == 2 and len(set(votes)) == 2):
            assert name not in found
        else:
            assert found[name]["keep"] == (votes.count("reject") < 2)
            assert found[name]["num_unsure"] == outcome.count("unsure")


def test_specialists_accept_together_or_the_lead_decides(sqlite_store: Store, ask) -> None:
    batch = sqlite_store.add_batch("photography", "p")
    ask(batch, {"both": [GOOD, GOOD], "none": [POOR, POOR], "split": [GOOD, POOR], "half": [GOOD]})
    found = rows(sqlite_store, batch)
    assert {name: row["accept"] for name, row in found.items()} == {"both": True, "none": False}
    assert found["both"]["story"] == 2.0 and found["none"]["reasons"] == "too dark"
    lead = sqlite_store.add_person("lead", "lead")
    (split,) = (item for item in sqlite_store.items(batch) if item.name == "split")
    for verdict in (POOR, GOOD):  # the later decision replaces the first
        sqlite_store.adjudicate(lead, split, verdict)
        assert rows(sqlite_store, batch)["split"] == {
            "accept": verdict["accept"],
            **{criterion: float(verdict[criterion]) for criterion in Photography.criteria},
            "reasons": verdict["reasons"][0],
        }


def test_marks_are_means_over_the_specialists(sqlite_store: Store, ask) -> None:
    batch = sqlite_store.add_batch("photography", "p")
    ask(batch, {"one": [GOOD, GOOD | {"lighting": 1, "reasons": ["seen better"]}]})
    row = rows(sqlite_store, batch)["one"]
    assert (row["lighting"], row["colour"]) == (1.5, 2.0)
    assert row["reasons"] == "exceptional; seen better"


def test_the_verifiers_edit_wins(sqlite_store: Store, ask) -> None:
    batch = sqlite_store.add_batch("verification", "v")
    edit = {"verdict": "edit", "text": "As edited."}
    ask(batch, {"a": [{"verdict": "accept"}], "e": [edit], "r": [{"verdict": "reject"}]})
    assert rows(sqlite_store, batch) == {
        "a": {"caption": "As written.", "caption_verdict": "accept"},
        "e": {"caption": "As edited.", "caption_verdict": "edit"},
        "r": {"caption": None, "caption_verdict": "reject"},
    }
    written = sqlite_store.add_batch("caption", "c")
    ask(written, {"a": [{"text": "A fox."}]})
    assert rows(sqlite_store, written) == {"a": {"caption": "A fox."}}


def test_known_answers_decide_nothing(sqlite_store: Store, ask) -> None:
    for question, answer in {"screening": {"choice": "keep"}, "appeal": {"choice": "A"}}.items():
        batch = sqlite_store.add_batch(question, question)
        ask(batch, {"known": [answer] * 3}, gold=answer)
        assert len(sqlite_store.answers(batch)) == 3
    assert judgements(sqlite_store, batch) == []
    assert rows(sqlite_store, sqlite_store.batches()[0]) == {}


def test_a_batch_without_answers_has_typed_columns(sqlite_store: Store) -> None:
    table = decisions(sqlite_store, sqlite_store.add_batch("screening", "s"))
    assert len(table) == 0 and table.schema.field("keep").type == pa.bool_()


def test_votes_name_the_model_and_the_side_but_no_person(sqlite_store: Store, ask) -> None:
    batch = sqlite_store.add_batch("faithfulness", "f")
    choices = ["A", "Both", "A", "B"]
    ask(batch, {"p1": [{"choice": choice} for choice in choices]}, prompt="a fox")
    found = judgements(sqlite_store, batch)
    raters = [pseudonym(person) for person in sorted(sqlite_store.people(), key=lambda person: person.name)]
    assert len(set(raters)) == 4 and not any("person" in rater for rater in raters)
    assert found == [
        Judgement("a fox", "faithfulness", choice, rater, "person", left="A")
        for choice, rater in zip(choices, raters, strict=True)
    ]
    assert majority_labels(found, "faithfulness").no_majority == ("a fox",)


def test_votes_on_pictures_of_one_prompt_stay_apart(sqlite_store: Store, ask) -> None:
    """Two seeds of a prompt: no rater's second vote may replace the first."""
    batch = sqlite_store.add_batch("appeal", "a")
    ask(batch, {"0": [{"choice": "A"}], "1": [{"choice": "B"}]}, prompt="a fox")
    ask(batch, {"2": [{"choice": "A"}]}, prompt="a hare")
    ask(batch, {"3": [{"choice": "Tie"}]})
    found = {j.prompt: j.answer for j in judgements(sqlite_store, batch)}
    assert found == {"a fox [0]": "A", "a fox [1]": "B", "a hare": "A", "3": "Tie"}


def test_what_a_question_does_not_give(sqlite_store: Store) -> None:
    with pytest.raises(ValueError, match="export its decisions"):
        judgements(sqlite_store, sqlite_store.add_batch("screening", "s"))
    with pytest.raises(ValueError, match="export its votes"):
        decisions(sqlite_store, sqlite_store.add_batch("appeal", "a"))


def test_a_curation_selects_by_the_decisions(sqlite_store: Store, ask, tmp_path: Path) -> None:
    """Through the real selection: screened, reviewed, and with the final caption beside the original."""
    pytest.importorskip("duckdb")
    from emu_lightning.curation.filters import Where
    from emu_lightning.curation.selection import Balance, ScoredPool, ScoreTable, read_decisions

    screening = sqlite_store.add_batch("screening", "s")
    keep, reject = {"choice": "keep"}, {"choice": "reject"}
    ask(screening, {"a": [keep, keep], "b": [reject, reject], "c": [keep, keep], "d": [keep, reject]})
    review = sqlite_store.add_batch("photography", "p")
    ask(review, {"a": [GOOD, GOOD], "c": [POOR, POOR]})
    check = sqlite_store.add_batch("verification", "v")
    ask(check, {"a": [{"verdict": "edit", "text": "A fox in snow."}]})
    files = []
    for batch in (screening, review, check):
        files.append(tmp_path / f"{batch.question}.parquet")
        files[-1].write_bytes(EXPORTS["decisions"].make(sqlite_store, batch))

    uids = ["a", "b", "c", "d", "e"]
    pq.write_table(pa.table({"uid": uids, "uri": uids, "caption": ["old"] * 5}), tmp_path / "pool.parquet")
    read = {"sha256": uids, "height": [8] * 5, "width": [8] * 5, "error": pa.nulls(5, pa.string())}
    scores = ScoreTable(
        "read", pa.table({"uid": uids, **read}), {k: pa.table(read).schema.field(k).type for k in read}, "0"
    )
    pool = ScoredPool([tmp_path / "pool.parquet"], [scores, *read_decisions(files)])
    for name, filters, selected in [
        ("stage1", {"screened": Where("keep")}, ["a", "c"]),
        ("stage2", {"screened": Where("keep"), "accepted": Where("accept")}, ["a"]),
    ]:
        assert pool.select(filters, Balance(), tmp_path / name).uids == selected
    manifest = {row["uid"]: row for row in pq.read_table(tmp_path / "stage2/manifest.parquet").to_pylist()}
    assert manifest["a"]["caption"] == "old" and manifest["a"]["edited_caption"] == "A fox in snow."
    assert [manifest[uid]["rejected_by"] for uid in uids] == [
        None,
        "screened",
        "accepted",
        "screened",
        "screened",
    ]
