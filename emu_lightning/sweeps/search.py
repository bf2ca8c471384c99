"""What a random or Bayesian search tries next, by Optuna, from nothing but the runs so far.

Nothing is kept between two proposals, so that a search goes on after a kill as if there had been none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from emu_lightning.sweeps.definition import Choice, Parameters, Space, Sweep
from emu_lightning.sweeps.records import Run

if TYPE_CHECKING:
    import optuna

MOST_TRIES = 100  # to find parameters that no run has had


def propose(sweep: Sweep, runs: Sequence[Run]) -> Parameters | None:
    """Parameters that none of ``runs`` has had; None where there seem to be no others.

    `random` draws them, a function of how many runs there are. `bayes` is Optuna's tree-structured Parzen
    estimator (Watanabe 2023): it knows of runs that have ended, and keeps away from those that are under way.

    Raises:
        ValueError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError(
            f"{sweep.path}: method {sweep.method} needs Optuna: pip install 'emu_lightning[sweeps]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    taken = {run.name for run in runs}
    distributions = {name: _distribution(space) for name, space in sweep.parameters.items()}
    for seed in range(len(runs), len(runs) + MOST_TRIES):
        study = optuna.create_study(
            direction="maximize" if sweep.maximize else "minimize",
            sampler=optuna.samplers.RandomSampler(seed=seed)
            if sweep.method == "random"
            else optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        )
        study.add_trials(_trials(sweep, runs, distributions))
        drawn = study.ask(distributions).params
        parameters = {name: _value(space, drawn[name]) for name, space in sweep.parameters.items()}
        if sweep.run_name(parameters) not in taken:
            return parameters
    return None


def _trials(
    sweep: Sweep, runs: Iterable[Run], distributions: dict[str, Any]
) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState, create_trial

    states = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL}
    trials = []
    for run in runs:
        state = states.get(run.state, TrialState.RUNNING)
        if state == TrialState.COMPLETE and run.metric is None:
            state = TrialState.FAIL  # nothing to be learnt
        trials.append(
            create_trial(
                state=state,
                value=run.metric if state == TrialState.COMPLETE else None,
                params={
                    name: _drawn(space, run.parameters[name]) for name, space in sweep.parameters.items()
                },
                distributions=distributions,
            )
        )
    return trials


def _distribution(space: Space) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(space, Choice):
        return CategoricalDistribution(range(len(space.values)))  # Optuna takes no lists
    if space.is_integer:
        return IntDistribution(int(space.low), int(space.high))
    return FloatDistribution(space.low, space.high, log=space.is_log)


def _value(space: Space, drawn: Any) -> Any:
    return space.values[drawn] if isinstance(space, Choice) else space.written(drawn)


def _drawn(space: Space, value: Any) -> Any:
    return space.values.index(value) if isinstance(space, Choice) else value
