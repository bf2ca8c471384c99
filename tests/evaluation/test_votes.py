"""Win rates against scipy, the paper's published figures and simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import optimize, special, stats

from emu_lightning.evaluation.votes import (
    Judgement,
    append_judgements,
    benjamini_hochberg,
    holm,
    judge_pairs,
    majority_labels,
    position_bias,
    read_judgements,
    tango_ci95,
    vote_share,
    votes_by_prompt,
    wilson_ci95,
    win_rate,
    win_rates_by,
)


def labels_of(win: int, tie: int, lose: int) -> np.ndarray:
    return np.array(["B"] * win + ["Tie"] * tie + ["A"] * lose)


def vote(
    prompt: str,
    answer: str,
    rater: str,
    question: str = "appeal",
    kind: str = "person",
    left: str | None = None,
) -> Judgement:
    return Judgement(prompt, question, answer, rater, kind, left)  # type: ignore[arg-type]


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


def test_win_minus_lose_interval_of_a_published_table() -> None:
    """6 against 16 of 161, the R package contingencytables' example (Cavo 2012): Tango's interval there."""
    assert tango_ci95(6 / 161, 16 / 161, 161) == pytest.approx((-0.1240, -0.0054), abs=5e-5)


@pytest.mark.parametrize("win,tie,lose", [(17, 0, 3), (5, 13, 2), (40, 3, 17), (302, 31, 27)])
def test_the_ends_of_win_minus_lose_are_where_a_score_test_refuses(win: int, tie: int, lose: int) -> None:
    """The constrained maximum of the likelihood is searched here; the package has it in closed form."""
    num = win + tie + lose
    for end in win_rate(labels_of(win, tie, lose), of="B").win_minus_lose_ci95:

        def unlikely(q: float, d: float = end) -> float:
            return -float(special.xlogy([win, tie, lose], [q + d, 1 - 2 * q - d, q]).sum())

        bounds = (max(0.0, -end), (1 - end) / 2)
        q = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        score = (win - lose - num * end) / np.sqrt(num * (2 * q + end - end**2))
        assert abs(score) == pytest.approx(stats.norm.ppf(0.975), abs=1e-4)


@pytest.mark.parametrize("num", [20, 60, 360])
@pytest.mark.parametrize("win,tie,lose", [(0.83, 0.02, 0.15), (0.51, 0.19, 0.3), (0.1, 0.8, 0.1)])
def test_win_minus_lose_covers_the_truth_however_few_prompts(
    num: int, win: float, tie: float, lose: float
) -> None:
    """Each comparison drawn from a known truth; three standard errors below 94 % are left to chance."""
    num_runs = 2000
    drawn = np.random.default_rng(num).multinomial(num, (win, tie, lose), num_runs)
    kinds, counts = np.unique(drawn, axis=0, return_counts=True)
    ends = np.array([tango_ci95(wins / num, losses / num, num) for wins, _, losses in kinds])
    covers = (ends[:, 0] <= win - lose) & (win - lose <= ends[:, 1])
    assert counts @ covers / num_runs >= 0.94 - 3 * np.sqrt(0.94 * 0.06 / num_runs)


def test_win_minus_lose_interval_comes_close_to_its_bootstrap() -> None:
    win, tie, lose = 94, 108, 54
    rate = win_rate(labels_of(win, tie, lose), of="B")
    assert rate.win_minus_lose == pytest.approx((win - lose) / (win + tie + lose))
    assert rate.win_minus_lose_ci95 == pytest.approx(rate.win_minus_lose_bootstrap95, abs=0.008)
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


def test_the_vote_share_counts_votes_where_the_majority_counts_prompts() -> None:
    answers = {"p": "BBA", "q": "BBB", "r": "AAB", "s": "BAA"}
    records = [
        vote(prompt, answer, f"rater {i}") for prompt, row in answers.items() for i, answer in enumerate(row)
    ]
    share = vote_share([*records, vote("p", "A", "rater 0", "faithfulness")], "appeal", of="B")
    assert (share.win, share.tie, share.lose) == pytest.approx((7 / 12, 0, 5 / 12))
    assert share.num_labels == 12 and share.num_prompts == 4
    labels = list(majority_labels(records, "appeal").labels.values())
    assert win_rate(labels, of="B").win == 0.5


def test_the_two_way_interval_follows_resampled_rows_and_columns() -> None:
    rng = np.random.default_rng(3)
    num_prompts, num_raters = 60, 25
    chance = 1 / (1 + np.exp(-rng.normal(0, 1, (num_prompts, 1)) - rng.normal(0.4, 0.8, num_raters)))
    hits = rng.random(chance.shape) < chance
    prompts, raters = np.indices(hits.shape).reshape(2, -1).astype(str)
    rate = win_rate(
        np.where(hits, "B", "A").ravel(), of="B", prompts=prompts.tolist(), raters=raters.tolist()
    )
    means = [
        hits[rng.integers(num_prompts, size=num_prompts)][:, rng.integers(num_raters, size=num_raters)].mean()
        for _ in range(3000)
    ]
    factor = stats.t.ppf(0.975, num_raters - 1) * np.sqrt(num_raters / (num_raters - 1))
    for (low, high), scale in ((rate.two_way_ci95, 1), (rate.win_minus_lose_two_way95, 2)):  # type: ignore[misc]
        assert (high - low) / 2 == pytest.approx(scale * factor * np.std(means), rel=0.1)
    assert rate.two_way_ci95[0] < rate.ci95[0] and rate.two_way_ci95[1] > rate.ci95[1]  # type: ignore[index]


def test_without_a_second_rater_nothing_is_said_of_other_raters() -> None:
    records = [vote(prompt, answer, "ada") for prompt, answer in zip("pqr", "BAB", strict=True)]
    assert vote_share(records, "appeal", of="B").two_way_ci95 is None
    agreed = vote_share([vote(prompt, "B", rater) for prompt in "pqr" for rater in "xyz"], "appeal", of="B")
    assert agreed.two_way_ci95 == agreed.ci95 and agreed.ci95[0] < 0.7


@pytest.mark.parametrize("left,right,ties", [(60, 40, 7), (5, 0, 0), (12, 30, 1)])
def test_position_bias_equals_the_exact_binomial_test(left: int, right: int, ties: int) -> None:
    sides = ["left"] * left + ["right"] * right + ["tie"] * ties
    records = [
        vote(
            f"{i}",
            "Tie" if side == "tie" else shown if side == "left" else {"A": "B", "B": "A"}[shown],
            "ada",
            left=shown,
        )
        for i, side in enumerate(sides)
        for shown in ["AB"[i % 2]]
    ]
    bias = position_bias([*records, vote("unknown side", "A", "ada")], "appeal")
    reference = stats.binomtest(left, left + right)
    interval = reference.proportion_ci(0.95, method="wilson")
    assert bias is not None and bias.num_votes == left + right
    assert bias.left == pytest.approx(left / (left + right))
    assert bias.ci95 == pytest.approx((interval.low, interval.high))
    assert bias.p == pytest.approx(reference.pvalue)


def test_votes_without_sides_say_nothing_of_position() -> None:
    assert position_bias([vote("p", "A", "ada"), vote("q", "Tie", "ada", left="A")], "appeal") is None


# --- several comparisons ---------------------------------------------------------------------------------


def test_corrections_make_the_decisions_of_the_published_example() -> None:
    """Benjamini and Hochberg (1995), section 3.2: four found at 0.05, three with familywise control."""
    values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    values += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    p_values = {f"{i}": p for i, p in enumerate(values)}
    assert [name for name, q in benjamini_hochberg(p_values).items() if q <= 0.05] == ["0", "1", "2", "3"]
    assert [name for name, p in holm(p_values).items() if p <= 0.05] == ["0", "1", "2"]


def test_corrections_equal_their_definitions_in_any_order() -> None:
    values = np.random.default_rng(0).permutation([0.01, 0.01, 0.02, 0.03, 0.2, 0.9])
    p_values = {f"{i}": float(p) for i, p in enumerate(values)}
    q_values, adjusted = benjamini_hochberg(p_values), holm(p_values)
    assert list(q_values) == list(adjusted) == list(p_values)
    assert list(q_values.values()) == pytest.approx(stats.false_discovery_control(values))
    by_hand = {0.01: 0.06, 0.02: 0.08, 0.03: 0.09, 0.2: 0.4, 0.9: 0.9}
    assert list(adjusted.values()) == pytest.approx([by_hand[p] for p in values])
    assert holm({}) == benjamini_hochberg({}) == {}


def test_slices_are_judged_on_their_own() -> None:
    labels = np.array(["B", "A", "Tie", "B"])
    rates = win_rates_by(["star", "box", "box", "star"], labels, of="B", prompts=["p", "q", "r", "p"])
    assert list(rates) == ["box", "star"]
    assert rates["star"].win == 1 and rates["star"].num_prompts == 1
    assert rates["box"].lose == 0.5 and rates["box"].tie == 0.5


def test_one_set_of_labels_serves_every_kind_of_slice() -> None:
    answers = {"p": "B", "q": "A", "r": "Tie", "s": "B"}
    slices = {
        "category": {"p": "Animals", "q": "Food & Beverage", "r": "Animals", "s": "Animals"},
        "challenge": {"p": "Basic", "q": "Basic", "r": "Style & Format", "s": "Style & Format"},
        "stylized": {"p": "no", "q": "no", "r": "yes", "s": "yes"},
    }
    records = [vote(prompt, answer, rater) for prompt, answer in answers.items() for rater in "xyz"]
    labels = majority_labels(records, "appeal").labels
    wins = {
        "Animals": 2 / 3,
        "Food & Beverage": 0,
        "Basic": 0.5,
        "Style & Format": 0.5,
        "no": 0.5,
        "yes": 0.5,
    }
    for by in slices.values():
        rates = win_rates_by([by[prompt] for prompt in labels], list(labels.values()), of="B")
        assert {name: rate.win for name, rate in rates.items()} == {name: wins[name] for name in by.values()}
        assert sum(rate.num_prompts for rate in rates.values()) == len(labels)


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
    assert set(json.loads(before)) == {"prompt", "question", "answer", "rater", "rater_kind", "left"}


def test_records_without_the_side_are_read(tmp_path) -> None:
    path = tmp_path / "judgements.jsonl"
    append_judgements(path, [vote("p", "A", "ada", left="B")])
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "left"}
    path.write_text(path.read_text() + json.dumps(old) + "\n")
    assert [judgement.left for judgement in read_judgements(path)] == ["B", None]
    with pytest.raises(ValueError, match="left is 'left'"):
        vote("p", "A", "ada", left="left")


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
    assert tied.needs_rater == excluded.needs_rater == ()


@pytest.mark.parametrize(
    "answers,label",
    [("AABBT", None), ("AABBTA", "A"), ("AABBTT", None), ("AABBTTB", None), ("AABBTTBB", "B"), ("ABT", None)]
    + [("ABTT", "Tie"), ("AAABBB", None), ("AAABB", "A")],
)
def test_an_extra_rater_breaks_the_tie_or_another_is_asked_for(answers: str, label: str | None) -> None:
    records = [vote("p", {"T": "Tie"}.get(answer, answer), f"rater {i}") for i, answer in enumerate(answers)]
    majority = majority_labels([*records, vote("q", "B", "ada")], "appeal", "extra_rater")
    assert majority.labels == ({"p": label} if label else {}) | {"q": "B"}
    assert majority.needs_rater == majority.no_majority == (() if label else ("p",))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of tie, exclude, extra_rater"):
        majority_labels([vote("p", "A", "ada")], "appeal", "drop")  # type: ignore[arg-type]


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
