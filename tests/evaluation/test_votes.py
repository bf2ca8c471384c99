"""Win rates against scipy, the paper's published figures and simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from emu_lightning.evaluation.votes import (
    Judgement,
    append_judgements,
    judge_pairs,
    majority_labels,
    read_judgements,
    votes_by_prompt,
    wilson_ci95,
    win_rate,
    win_rates_by,
)


def labels_of(win: int, tie: int, lose: int) -> np.ndarray:
    return np.array(["B"] * win + ["Tie"] * tie + ["A"] * lose)


def vote(prompt: str, answer: str, rater: str, question: str = "appeal", kind: str = "person") -> Judgement:
    return Judgement(prompt, question, answer, rater, kind)  # type: ignore[arg-type]


# --- shares and intervals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "win,tie,lose", [(1353, 28, 251), (599, 690, 343), (5, 0, 0), (0, 3, 4), (1, 1, 1), (0, 9, 0)]
)
def test_shares_interval_and_sign_test_equal_scipy(win: int, tie: int, lose: int) -> None:
    num = win + tie + lose
    rate = win_rate(labels_of(win, tie, lose), of="B")
    reference = stats.binomtest(win, num).proportion_ci(0.95, method="wilson")
    assert rate.win + rate.tie + rate.lose == pytest.approx(1)
    assert rate.win_rate == pytest.approx(win / num)
    assert rate.ci95 == pytest.approx((reference.low, reference.high))
    assert rate.sign_test_p == pytest.approx(stats.binomtest(win, win + lose).pvalue if win + lose else 1.0)
    if win + lose == 0:
        assert rate.ties_excluded is None and rate.ties_excluded_ci95 is None
    else:
        decided = stats.binomtest(win, win + lose).proportion_ci(0.95, method="wilson")
        assert rate.ties_excluded == pytest.approx(win / (win + lose))
        assert rate.ties_excluded_ci95 == pytest.approx((decided.low, decided.high))


@pytest.mark.parametrize(
    "share,num,low,high", [(0.829, 1632, 81.0, 84.7), (0.684, 1632, 66.1, 70.6), (0.713, 2100, 69.3, 73.2)]
)
def test_wilson_gives_the_known_intervals_of_published_shares(
    share: float, num: int, low: float, high: float
) -> None:
    wins = round(share * num)  # a share published with three digits is a whole number of prompts
    assert tuple(round(100 * end, 1) for end in wilson_ci95(wins / num, num)) == (low, high)


def test_win_minus_lose_interval_follows_its_formula_and_its_bootstrap() -> None:
    win, tie, lose = 94, 108, 54
    num = win + tie + lose
    rate = win_rate(labels_of(win, tie, lose), of="B")
    difference = (win - lose) / num
    half = stats.norm.ppf(0.975) * np.sqrt(((win + lose) / num - difference**2) / num)
    assert rate.win_minus_lose == pytest.approx(difference)
    assert rate.win_minus_lose_ci95 == pytest.approx((difference - half, difference + half))
    signs = np.repeat([1, 0, -1], [win, tie, lose])
    plain = stats.bootstrap(
        (signs,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1), batch=500
    ).confidence_interval
    assert rate.win_minus_lose_bootstrap95 == pytest.approx((plain.low, plain.high), abs=0.012)


def test_the_other_model_sees_the_mirror_image() -> None:
    labels = labels_of(30, 20, 10)
    ours, theirs = win_rate(labels, of="B"), win_rate(labels, of="A")
    assert (ours.win, ours.tie, ours.lose) == (theirs.lose, theirs.tie, theirs.win)
    low, high = theirs.win_minus_lose_ci95
    assert ours.win_minus_lose_ci95 == pytest.approx((-high, -low))
    assert ours.sign_test_p == theirs.sign_test_p


@pytest.mark.parametrize("labels", [labels_of(40, 0, 0), labels_of(0, 40, 0)])
def test_unanimous_labels_still_leave_doubt(labels: np.ndarray) -> None:
    rate = win_rate(labels, of="B")
    for low, high in (rate.win_minus_lose_ci95, rate.win_minus_lose_bootstrap95):
        assert high - low > 0.05 and low <= rate.win_minus_lose <= high


@pytest.mark.parametrize("share,num", [(0.5, 60), (0.83, 60), (0.95, 100)])
def test_wilson_covers_the_truth_on_average_over_all_outcomes(share: float, num: int) -> None:
    wins = np.arange(num + 1)
    covers = [low <= share <= high for low, high in (wilson_ci95(k / num, num) for k in wins)]
    assert stats.binom.pmf(wins, num, share) @ np.array(covers) > 0.925


# --- several labels on one prompt ------------------------------------------------------------------------


def test_repeating_every_label_does_not_narrow_the_intervals() -> None:
    labels = labels_of(60, 30, 30)
    prompts = [f"prompt {i}" for i in range(len(labels))]
    once, copied = win_rate(labels, of="B"), win_rate(np.tile(labels, 5), of="B", prompts=prompts * 5)
    assert copied.num_labels == 600 and copied.num_prompts == 120
    assert copied.ci95 == pytest.approx(once.ci95)
    assert copied.ties_excluded_ci95 == pytest.approx(once.ties_excluded_ci95)
    assert copied.win_minus_lose_ci95 == pytest.approx(once.win_minus_lose_ci95)
    assert copied.win_minus_lose_bootstrap95 == pytest.approx(once.win_minus_lose_bootstrap95)
    assert copied.sign_test_p == once.sign_test_p


def test_clustered_intervals_cover_where_independent_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    num_prompts, num_votes, num_trials = 80, 5, 200
    prompts = [str(i // num_votes) for i in range(num_prompts * num_votes)]
    covered = {"clustered": 0, "independent": 0, "difference": 0}
    for _ in range(num_trials):
        chance = rng.beta(0.6, 0.4, num_prompts)  # how much each prompt favours B; 0.6 on average
        labels = np.where(rng.random((num_prompts, num_votes)) < chance[:, None], "B", "A").ravel()
        clustered, independent = win_rate(labels, of="B", prompts=prompts), win_rate(labels, of="B")
        covered["clustered"] += clustered.ci95[0] <= 0.6 <= clustered.ci95[1]
        covered["difference"] += clustered.win_minus_lose_ci95[0] <= 0.2 <= clustered.win_minus_lose_ci95[1]
        covered["independent"] += independent.ci95[0] <= 0.6 <= independent.ci95[1]
    assert min(covered["clustered"], covered["difference"]) >= 0.90 * num_trials
    assert covered["independent"] < 0.80 * num_trials


def test_slices_are_judged_on_their_own() -> None:
    labels = np.array(["B", "A", "Tie", "B"])
    rates = win_rates_by(["star", "box", "box", "star"], labels, of="B", prompts=["p", "q", "r", "p"])
    assert list(rates) == ["box", "star"]
    assert rates["star"].win == 1 and rates["star"].num_prompts == 1
    assert rates["box"].lose == 0.5 and rates["box"].tie == 0.5


# --- scores to labels ------------------------------------------------------------------------------------


def test_score_differences_within_the_margin_are_ties() -> None:
    labels = judge_pairs([0.5, 0.5, 0.5, 0.5], [0.5, 0.75, 1.0, 0.0], margin=0.25)
    assert labels.tolist() == ["Tie", "Tie", "B", "A"]


@pytest.mark.parametrize(
    "a,b,margin,match",
    [([0.1], [float("nan")], 0, "finite"), ([0.1], [0.1, 0.2], 0, "shape"), ([0.1], [0.2], -1, "margin")],
)
def test_scores_that_cannot_be_compared_are_refused(a: list, b: list, margin: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        judge_pairs(a, b, margin)


# --- records ---------------------------------------------------------------------------------------------


def test_records_survive_the_file_and_are_only_appended(tmp_path) -> None:
    path = tmp_path / "judgements.jsonl"
    first, second = vote("a “red”\u2028 ball\n", "B", "ada"), vote("a box", "Neither", "emil", "faithfulness")
    append_judgements(path, [first])
    before = path.read_bytes()
    append_judgements(path, [second])
    assert path.read_bytes().startswith(before)
    assert read_judgements(path) == [first, second]
    assert set(json.loads(before)) == {"prompt", "question", "answer", "rater", "rater_kind"}


def test_a_torn_line_is_named(tmp_path) -> None:
    path = tmp_path / "judgements.jsonl"
    append_judgements(path, [vote("p", "A", "ada")])
    with path.open("a") as file:
        file.write('{"prompt": "q"')
    with pytest.raises(ValueError, match=r"judgements\.jsonl:2 is not a judgement"):
        read_judgements(path)


@pytest.mark.parametrize("question,answer", [("appeal", "Both"), ("faithfulness", "C"), ("beauty", "A")])
def test_answers_must_belong_to_their_question(question: str, answer: str) -> None:
    with pytest.raises(ValueError, match="use one of"):
        vote("p", answer, "ada", question)


def test_the_latest_answer_of_a_rater_counts_and_both_is_a_tie() -> None:
    votes = votes_by_prompt(
        [
            vote("p", "A", "ada", "faithfulness"),
            vote("p", "A", "emil"),
            vote("p", "Both", "ada", "faithfulness"),
        ],
        "faithfulness",
    )
    assert votes == {"p": ["Tie"]}


def test_people_and_models_are_never_pooled() -> None:
    with pytest.raises(ValueError, match="never pooled"):
        majority_labels([vote("p", "A", "ada"), vote("p", "A", "clip", kind="model")], "appeal")


@pytest.mark.parametrize(
    "answers,label", [("AAABB", "A"), ("BBBTT", "B"), ("TTTAB", "Tie"), ("AABBT", None), ("AB", None)]
)
def test_a_majority_is_more_than_half(answers: str, label: str | None) -> None:
    records = [vote("p", {"T": "Tie"}.get(answer, answer), f"rater {i}") for i, answer in enumerate(answers)]
    tied, excluded = majority_labels(records, "appeal"), majority_labels(records, "appeal", "exclude")
    assert tied.labels == {"p": label or "Tie"}
    assert excluded.labels == ({"p": label} if label else {})
    assert tied.no_majority == excluded.no_majority == (() if label else ("p",))


# --- the result ------------------------------------------------------------------------------------------


def test_results_hold_the_interval_of_their_headline() -> None:
    rate = win_rate(labels_of(30, 20, 10), of="B")
    appeal, faithfulness = rate.to_dict("win_rate"), rate.to_dict("win_minus_lose")
    assert appeal["ci95"] == list(rate.ci95) and faithfulness["ci95"] == list(rate.win_minus_lose_ci95)
    assert json.loads(json.dumps(appeal)) == appeal


@pytest.mark.parametrize(
    "labels,prompts,match",
    [([], None, "no label"), (["B", "win"], None, "'win'"), (["A", "B"], ["p"], "one prompt for each")],
)
def test_labels_that_make_no_sense_are_refused(labels: list, prompts: list | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        win_rate(labels, of="B", prompts=prompts)
