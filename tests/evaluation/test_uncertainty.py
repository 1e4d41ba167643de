"Uncertainty, aggregation, calibration and baselines against plain loops and scikit-learn"
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from pahcl.evaluation.decisions import Decisions
from pahcl.evaluation.subject_rules import _apply_rules_to_both, best_rule, compare_rules
from pahcl.core.basics import UsageError
from pahcl.evaluation.calibration import (
    apply_temperature, _brier_score, _expected_calibration_error, _fit_temperature,
    _negative_log_likelihood)
from pahcl.evaluation.thresholds import _choose_threshold, decide_classes
from pahcl.evaluation.challenge_rules import _quality_weighted_mean, UNSURE
from pahcl.evaluation.baseline_features import _demographic_features
from pahcl.evaluation.baselines import (
    all_baseline_predictions, compare_with_baselines, _score_baselines)
from pahcl.core.metrics import CHALLENGE_METRICS, classification_metrics, METRICS
from pahcl.core.predictions import positive_class, Predictions
from pahcl.testing.made import _made_cycles
import pahcl.core.resampling as resampling
from pahcl.core.resampling import (
    bootstrap_interval, bootstrap_p_value, number_persons, resampling_weights)
from pahcl.data.tasks import Task
from pahcl.evaluation.coverage import _count_class_persons
from pahcl.evaluation.statistics import (
    _bootstrap_matrices, bootstrap_scores, _class_intervals, _matrix_scores, _score_intervals,
    _weighted_confusion_matrices)
from scipy import stats
from sklearn import metrics as sk


@st.composite
def cohort(draw):
    "Rows of a few persons, probabilities on a coarse grid (many ties), classes that may be absent."
    k, n = draw(st.integers(2, 3)), draw(st.integers(4, 40))
    person = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    y = draw(st.lists(st.integers(0, k-1), min_size=n, max_size=n))
    p = np.array(draw(st.lists(st.lists(st.integers(1, 4), min_size=k, max_size=k), min_size=n,
                               max_size=n)), float)
    return np.array(person), np.array(y), p/p.sum(1, keepdims=True), k


@settings(max_examples=60, deadline=None)
@given(cohort())
def test_every_row_of_weights_is_scored_literally(case):
    person, y, p, k = case
    index, persons = number_persons(person)
    weights = resampling_weights(persons, draws=6)
    assert ((weights[0] == 1).all() and (weights[1:1+persons].sum(0) == persons-1).all()
            and (weights[1+persons:].sum(1) == persons).all())
    matrices = _weighted_confusion_matrices(y, p.argmax(1), index, weights, k)
    ranked = bootstrap_scores(y, p, p.argmax(1), index, weights)
    fast = _matrix_scores(matrices) | {name: ranked[name] for name in ('auroc', 'auprc')}
    for d, w in enumerate(weights):
        rows = np.repeat(np.arange(len(y)), w[index].astype(int))
        if not len(rows): continue
        literal = classification_metrics(y[rows], p[rows], k)
        for name, values in fast.items():
            if literal[name] is None: assert np.isnan(values[d]), name
            else: assert values[d] == pytest.approx(literal[name], abs=2e-5, rel=1e-6), name


@settings(max_examples=30, deadline=None)
@given(cohort())
def test_shares_of_a_class_lie_in_their_intervals(case):
    person, y, p, k = case
    index, persons = number_persons(person)
    weights, decided = resampling_weights(persons, draws=200), p.argmax(1)
    found, scores = (_class_intervals(_bootstrap_matrices(y, decided, index, weights, k), persons),
                     classification_metrics(y, p, k))
    for name, pairs in found.items():
        for (low, high), share in zip(pairs, scores['per_class'][name]):
            assert (low is None or share is None
                    or -1e-6 <= low <= share+1e-6 and share-1e-6 <= high <= 1+1e-6)
    if k == 2 and persons > 1 and scores['recall'] is not None:
        ours, _ = _score_intervals(bootstrap_scores(y, p, decided, index, weights), scores, persons)
        assert found['recall'][1] == ours['recall']


@settings(max_examples=60, deadline=None)
@given(cohort(), st.integers(0, 99))
def test_intervals_hold_the_score_and_stay_in_its_range(case, seed):
    person, y, p, k = case
    index, persons = number_persons(person)
    official = 'murmur_weighted_accuracy' if k == 3 else 'outcome_cost'
    scores = (classification_metrics(y, p, k)
              | dict(official=METRICS[official].of_decisions(y, p.argmax(1))))
    values = bootstrap_scores(y, p, p.argmax(1), index,
                              resampling_weights(persons, 100, seed), official)
    found, why = _score_intervals(values, scores, persons)
    for name, (low, high) in found.items():
        if low is None: assert why[name]
        else:
            assert low-1e-5 <= scores[name] <= high+1e-5
            assert name == 'official' or (-1 if name == 'mcc' else 0)-1e-6 <= low <= high <= 1+1e-6


def test_a_mean_of_many_has_the_interval_of_scipys_bca():
    """Accuracy of 400 persons, a row each: there Student's quantiles are the normal ones and a mean
    has no bias.
    """
    for seed in range(5):
        right = (np.random.default_rng(seed).random(400) < .8).astype(float)
        theirs = stats.bootstrap((right,), np.mean, n_resamples=9999, method='BCa',
                                 rng=seed).confidence_interval
        y, p = np.zeros(400, int), np.stack([right, 1-right], 1)
        values = bootstrap_scores(y, p, p.argmax(1), np.arange(400),
                                  resampling_weights(400, 9999, seed))
        assert bootstrap_interval(values['accuracy'], 400) == pytest.approx(theirs, abs=.006)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 80), st.integers(0, 999))
def test_jackknife_is_that_of_the_books(n, seed):
    """Of a mean: influences are the deviations over n - 1, and the acceleration is a sixth of the
    skewness over the root of n.
    """
    values = np.random.default_rng(seed).exponential(size=n)
    d = resampling._jackknife_influences((values.sum()-values)/(n-1))
    assert d == pytest.approx((values-values.mean())/(n-1), abs=1e-9)
    assert resampling._acceleration(d) == pytest.approx(stats.skew(values)/(6*np.sqrt(n)))
    assert 2 <= resampling._degrees_of_freedom(d) <= max(n-1, 2) and resampling._degrees_of_freedom(
        3*d) == pytest.approx(resampling._degrees_of_freedom(d))


def test_p_value_is_students_where_that_is_right():
    random, weights = np.random.default_rng(0), resampling_weights(60, 4000)
    for shift in (0, .1, .2, .3, .4):
        gaps = random.normal(shift, 1, 60)
        assert bootstrap_p_value(weights @ gaps/60, 60) == pytest.approx(
            bootstrap_p_value(weights @ -gaps/60, 60), abs=.03)
        assert bootstrap_p_value(weights @ gaps/weights.sum(1),
                                 60) == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, abs=.03)


def test_the_same_persons_get_the_same_weights_at_every_level():
    table, p = _made_cycles(1, subjects=30)
    levels = Predictions(table, p).at_levels().values()
    numbered = [number_persons(own.persons) for own in levels]
    assert {n for _, n in numbered} == {30}
    for (index, _), own in zip(numbered, levels):
        assert (np.unique(table['person_id'])[index] == own.table['person_id']).all()
    assert not (resampling_weights(30, 50) == resampling_weights(30, 50, seed=1)).all()


def test_fifty_thousand_cycles_within_a_few_seconds():
    """2.0 s of one core here, a row for each person left out among them; the limit leaves room for
    slower machines.
    """
    table, p = _made_cycles(1, subjects=942, cycles=18)
    began = time.process_time()
    for own in Predictions(table, p).at_levels().values():
        rows, values = own.table, own.probabilities
        index, persons = number_persons(rows['person_id'])
        drawn = bootstrap_scores(rows['label'].to_numpy(), values, values.argmax(1), index,
                                 resampling_weights(persons))
        _score_intervals(drawn, dict.fromkeys(drawn, .5), persons)
    assert len(table) > 50_000 and time.process_time()-began < 20


def test_persons_of_a_class():
    assert _count_class_persons([0, 0, 1, 2, 2], [1, 1, 1, 0, 1], 3).tolist() == [1, 3, 0]


@settings(max_examples=60, deadline=None)
@given(cohort(), st.floats(.1, 8))
def test_calibration_against_sklearn(case, temperature):
    _, y, p, k = case
    if k == 2: assert _brier_score(y, p) == pytest.approx(2*sk.brier_score_loss(y, p[:, 1]))
    assert _negative_log_likelihood(y, p) == pytest.approx(sk.log_loss(y, p, labels=range(k)))
    warm = apply_temperature(p, temperature)
    assert np.allclose(warm.sum(1), 1) and (warm.argmax(1) == p.argmax(1)).all()
    assert np.allclose(apply_temperature(warm, 1/temperature), p, atol=1e-6)
    assert (_negative_log_likelihood(y, apply_temperature(p, _fit_temperature(y, p)))
            <= _negative_log_likelihood(y, p) + 1e-6)
    conf, right, gap = p.max(1), p.argmax(1) == y, 0   # the definition, bin by bin
    for b in range(10):
        inside = (np.minimum((conf*10).astype(int), 9) == b)
        if inside.any(): gap += inside.mean()*abs(conf[inside].mean()-right[inside].mean())
    assert _expected_calibration_error(y, p) == pytest.approx(gap)


@settings(max_examples=60, deadline=None)
@given(cohort(), st.sampled_from(['youden', 'f1', 'sensitivity=0.8']))
def test_no_threshold_is_better_than_the_chosen_one(case, how):
    _, y, p, k = case
    if not 0 < (y == 1).sum() < len(y): return
    rate = lambda z: ((z == 1)[y == 1].mean(), (z != 1)[y != 1].mean())
    goal = dict(youden=lambda z: sum(rate(z)), f1=lambda z: sk.f1_score(
        y == 1, z == 1, zero_division=0)).get(how, lambda z: rate(z)[1] if rate(z)[0] >= .8 else -1)
    chosen = goal(decide_classes(p, _choose_threshold(y, p, how, 1), 1))
    assert chosen >= max(goal(decide_classes(p, t, 1)) for t in [0, *np.unique(p[:, 1]), 2]) - 1e-9


def test_threshold_mistakes_are_usage_errors():
    assert (positive_class(dict(Present=0, Absent=1)) == 0
            and positive_class(dict(normal=0, murmur=1)) == 1)
    for how in ('sensitivity', 'sensitivity=2', 'sensitivity=x', 'Youden'):
        with pytest.raises(UsageError, match='argmax, youden'):
            _choose_threshold([0, 1], np.eye(2), how, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 1, UNSURE]), st.booleans()),
                min_size=4, max_size=30))
def test_quality_rules_are_the_published_formula(rows):
    y, z, noisy = map(np.array, zip(*rows))
    rates = []
    for c in (1, 0):
        n = [((y == c) & (noisy == q)).sum() for q in (False, True)]
        if not sum(n): return
        clean = ((y == c) & ~noisy & (z == c)).sum()/n[0] if n[0] else 0
        poor = ((y == c) & noisy & ((z == c) | (z == UNSURE))).sum()/n[1] if n[1] else 0
        rates.append((n[0]*clean + n[1]*poor)/sum(n))
    assert tuple(_quality_weighted_mean(y, z, noisy).values()) == pytest.approx(
        (sum(rates)/2, *rates))


def task_on_disk(folder, persons=60):
    "A 2016-like task whose folder letter gives the class away and whose heart rate does not."
    random = np.random.default_rng(0)
    label = np.arange(persons) % 2
    ids = [f'{"ae"[c]}{i:04d}' for i, c in enumerate(label)]
    recordings = pd.DataFrame(dict(recording_id=ids, subject_id=ids, person_id=ids, label=label,
                                   split=np.where(np.arange(persons) < persons//2,
                                                  'train', 'test')))
    recordings.to_csv(folder/'recordings.csv', index=False)
    cycles = recordings.loc[recordings.index.repeat(3)].assign(
        s2_end=random.integers(1200, 1800, 3*persons),
        valid_length=random.integers(2500, 4001, 3*persons))
    cycles.to_csv(folder/'cycles.csv', index=False)
    test = cycles[cycles['split'] == 'test']
    return (dict(dataset='physionet2016', label_map=dict(normal=0, abnormal=1)),
            Predictions(test, np.full((len(test), 2), .5)).at_levels())


def score(task, levels, official=None):
    subjects = levels['subject'].table['subject_id']
    return _score_baselines(levels, all_baseline_predictions(task, subjects), official)


def test_the_folder_letter_is_found_out(tmp_path):
    task, levels = task_on_disk(tmp_path)
    baselines = score(Task(tmp_path, task), levels,
                                official=CHALLENGE_METRICS['physionet2016'])
    assert (set(baselines) == {'heart rate', 'folder letter', 'segmentation', 'log-mel statistics',
                               'beat statistics'}
            and baselines['folder letter']['auroc'] == baselines['folder letter']['official'] == 1)
    assert abs(baselines['heart rate']['auroc']-.5) < .25
    assert compare_with_baselines(dict(auroc=.95), baselines,
                                  ['auroc']) == dict(auroc=['folder letter'])
    assert ('no column confidence, quality. Make it again' in baselines['segmentation']['reason']
            and all('task_config.json' in baselines[f'{name} statistics']['reason']
                    for name in ('log-mel', 'beat')))
    assert 'hides the rate' in score(Task(tmp_path, task | dict(length_mode='phase')),
                                                  levels)['heart rate']['reason']
    assert '--raw-dir' in score(Task(tmp_path, task | dict(dataset='circor')),
                                             levels)['demographics']['reason']


def test_demographics_are_those_of_the_table(raw):
    people = _demographic_features(raw)
    table = pd.read_csv(raw/'circor'/'training_data.csv', dtype=str).set_index('Patient ID')
    assert (list(people.index) == list(table.index)
            and (people['female'] == (table['Sex'] == 'Female')).all())
    heights = pd.to_numeric(table['Height'], errors='coerce')
    assert np.allclose(people['height'], heights, equal_nan=True)


def test_rules_are_chosen_on_validation_only():
    "What is chosen does not change when the reported split's labels do."
    val, reported, murmur = (_made_cycles(1, seed=1), _made_cycles(1, seed=2),
                         dict(Present=0, Absent=1, Unknown=2))
    turned = reported[0].assign(label=(reported[0]['label']+1) % 3)
    a, b = (compare_rules(_apply_rules_to_both(Predictions(*val, murmur),
                                               Predictions(t, reported[1], murmur)),
                          'f1_macro') for t in (reported[0], turned))
    assert (best_rule(a) == best_rule(b) and [r['validation'] for r in a]
            == [r['validation'] for r in b] and [r['value'] for r in a] != [r['value'] for r in b])


def test_nobody_silent_changes_nothing():
    table, p = _made_cycles(1)
    decisions = Decisions(Predictions(table, p).at_levels())
    assert decisions.add_class_priors(table[:0], [1, 0, 0]) is decisions
