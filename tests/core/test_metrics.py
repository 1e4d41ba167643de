"Oracles and properties of pahcl.core.metrics"
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError
from pahcl.evaluation.decisions import Decisions
from pahcl.studies.paired_tests import _paired_scores
from pahcl.core.config_checks import _validate_config
from pahcl.evaluation.scoring import Evaluation
from pahcl.core.aggregation import _aggregate_probabilities, _any_present_rule
from pahcl.core.challenge_metrics import (
    murmur_weighted_accuracy, outcome_cost, precision_sum, _sensitivity_specificity_mean)
from pahcl.core.metric_registry import confusion_matrix
from pahcl.core.metrics import (
    CHALLENGE_METRICS, classification_metrics, metric_names, METRICS, register_metric)
from pahcl.core.predictions import Predictions
from pahcl.core.standard_metrics import _class_recalls
from pahcl.evaluation.statistics import bootstrap
from pahcl.testing.made import _made_cycles
from pahcl.core.ranking import auprc, auroc
from pahcl.evaluation import report   # noqa: gives an evaluation its tables
from pahcl.evaluation.pages import _explain_words
from sklearn import metrics as sk


@st.composite
def answers(draw, classes=None, all_there=True):
    "Truth and probabilities on a coarse grid, so that ties are common."
    k = classes or draw(st.integers(2, 4))
    n = draw(st.integers(k, 40))
    y = draw(st.lists(st.integers(0, k-1), min_size=n, max_size=n))
    if all_there: y[:k] = range(k)
    p = np.array(draw(st.lists(st.lists(st.integers(1, 5), min_size=k, max_size=k), min_size=n,
                               max_size=n)), float)
    return np.array(y), p/p.sum(1, keepdims=True), k


def same(got, wanted): assert got == pytest.approx(wanted, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(answers())
def test_against_sklearn(case):
    y, p, k = case
    got, z = classification_metrics(y, p, k), p.argmax(1)
    binary = dict(average='binary') if k == 2 else dict(average='macro')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        same(got['accuracy'], sk.accuracy_score(y, z))
        same(got['f1'], sk.f1_score(y, z, zero_division=0, **binary))
        same(got['f1_macro'], sk.f1_score(y, z, average='macro', zero_division=0))
        same(got['f1_weighted'], sk.f1_score(y, z, average='weighted', zero_division=0))
        same(got['precision'], sk.precision_score(y, z, zero_division=0, **binary))
        same(got['recall'], sk.recall_score(y, z, **binary))
        same(got['uar'], sk.balanced_accuracy_score(y, z))
        same(got['mcc'], sk.matthews_corrcoef(y, z))
    score = p[:, 1] if k == 2 else p
    same(got['auroc'], sk.roc_auc_score(y, p[:, 1]) if k == 2
         else np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in range(k)]))
    same(got['auprc'], sk.average_precision_score(y, score) if k == 2
         else sk.average_precision_score(np.eye(k)[y], p, average='macro'))
    specificity = [sk.recall_score(y != c, z != c) for c in range(k)]
    same(got['specificity'], specificity[1] if k == 2 else np.mean(specificity))
    assert (got['confusion_matrix'] == sk.confusion_matrix(y, z, labels=range(k)).tolist()
            and got['support'] == np.bincount(y, minlength=k).tolist())


@settings(max_examples=60, deadline=None)
@given(answers(all_there=False))
def test_absent_classes_are_none_with_a_reason(case):
    y, p, k = case
    got = classification_metrics(y, p, k)
    for c in range(k):
        gone = c not in y
        assert all((got['per_class'][m][c] is None) == gone for m in ('precision', 'recall', 'f1'))
        assert any(f'class {c} is absent' in n for n in got['notes']) == gone
        assert (got['per_class']['auroc'][c] is None) == (gone or set(y) == {c})
    assert (got['uar'] is None) == (len(set(y)) < k)
    assert classification_metrics(y, p, k, absent='skip')['uar'] == pytest.approx(
        np.mean([(p.argmax(1)[y == c] == c).mean() for c in set(y)]))


@settings(max_examples=40, deadline=None)
@given(answers(classes=2), st.randoms())
def test_order_of_rows_and_monotone_scores_change_nothing(case, random):
    y, p, _ = case
    order = list(range(len(y)))
    random.shuffle(order)
    for area in (auroc, auprc):
        same(area(y[order] == 1, p[order, 1]), area(y == 1, p[:, 1]))
        same(area(y == 1, np.log(p[:, 1])), area(y == 1, p[:, 1]))
    same(auroc(y == 0, p[:, 0]), auroc(y == 1, p[:, 1]))


@settings(max_examples=40, deadline=None)
@given(answers(classes=3))
def test_murmur_weighted_accuracy_is_the_published_formula(case):
    y, p, _ = case
    m = confusion_matrix(y, p.argmax(1), 3).T  # the paper's matrix: rows are the classifier
    (pp, pa, pu), (ap, aa, au), (up, ua, uu) = m
    formula = (5*pp + 3*uu + aa)/(5*(pp+ap+up) + 3*(pu+au+uu) + (pa+aa+ua))
    same(murmur_weighted_accuracy(y, p.argmax(1)), formula)


def test_trivial_predictors_on_the_public_labels():
    murmur = np.repeat([0, 2, 1], [179, 68, 695])
    outcome = np.concatenate([np.repeat([1, 0], c) for c in [(150, 29), (43, 25), (263, 432)]])
    assert [round(murmur_weighted_accuracy(murmur, np.full(942, c)), 3)
            for c in (0, 1, 2)] == [0.499, 0.387, 0.114]
    assert [round(outcome_cost(outcome, z)) for z in (np.ones(942), outcome)] == [14851, 5286]
    assert _sensitivity_specificity_mean(outcome, np.ones(942)) == 0.5
    same(_sensitivity_specificity_mean(outcome, (murmur != 1).astype(int)), (193/456 + 432/486)/2)


def test_outcome_cost_by_hand():
    # four subjects, two ill; one ill and one healthy referred: r = 1/2
    expert = 25 + 397/2 - 1718/4 + 11296/16
    same(outcome_cost([1, 1, 0, 0], [1, 0, 1, 0]), 10 + expert + (10_000 + 50_000)/4)


def test_undefined_official_scores():
    assert (_sensitivity_specificity_mean([1, 1], [1, 0]) is None
            and precision_sum([0, 1], [0, 1]) is None)
    assert set(CHALLENGE_METRICS) == {'circor_murmur', 'circor_outcome', 'physionet2016', 'pascal'}


@settings(max_examples=60, deadline=None)
@given(answers(classes=3))
def test_any_present_decides_as_the_rule_says(case):
    _, p, _ = case
    p = p + np.array([0, 1e-6, 2e-6])  # no ties
    z = p.argmax(1)
    assert _any_present_rule(p).argmax() == (0 if 0 in z else 2 if 2 in z else 1)


@settings(max_examples=40, deadline=None)
@given(answers(), st.randoms())
def test_aggregate(case, random):
    y, p, k = case
    groups = [random.choice('abc') for _ in y]
    order = random.sample(range(len(y)), len(y))
    for rule in ('mean', 'logmean'):
        q, ids = _aggregate_probabilities(p, groups, rule)
        assert ids.tolist() == sorted(set(groups)) and np.allclose(q.sum(1), 1)
        same(q, _aggregate_probabilities(p[order], [groups[i] for i in order], rule)[0])
    same(_aggregate_probabilities(p, range(100, 100+len(y)))[0], p)
    for i, g in enumerate(ids):
        same(_aggregate_probabilities(p, groups)[0][i], p[[h == g for h in groups]].mean(0))


@settings(max_examples=40, deadline=None)
@given(answers(classes=3), st.randoms())
def test_the_two_loudest_places_speak(case, random):
    """In any order of the recordings; of two it is their mean, and a third that is less suspicious
    changes nothing.
    """
    _, p, _ = case
    order = random.sample(range(len(p)), len(p))
    said = _aggregate_probabilities(p, ['a']*len(p), 'two_loudest')[0]
    same(said, _aggregate_probabilities(p[order], ['a']*len(p), 'two_loudest')[0])
    assert said[0, 0] == pytest.approx(np.sort(p[:, 0])[-2:].mean())
    same(said, _aggregate_probabilities(np.vstack([p, [[0, .5, .5]]]), ['a']*(len(p)+1),
                                        'two_loudest')[0] if len(p) > 1 else said)
    same(_aggregate_probabilities(p[:2], ['a']*len(p[:2]), 'two_loudest')[0][0], p[:2].mean(0))
    with pytest.raises(PahclError, match='needs the murmur classes'):
        _aggregate_probabilities(p[:, :2], ['a']*len(p), 'two_loudest')


def test_levels_weigh_recordings_alike_and_survive_any_order():
    table, p = _made_cycles(1, subjects=9)
    keep = np.random.default_rng(0).permutation(len(table))[:150]
    a, b = (Predictions(table, p).at_level('subject'),
            Predictions(table.iloc[np.arange(len(table))[::-1]], p[::-1]).at_level('subject'))
    same(a.probabilities, b.probabilities)
    assert a.table['subject_id'].tolist() == b.table['subject_id'].tolist()
    some = Predictions(table.iloc[keep], p[keep]).at_level('recording').table
    for _, row in some.iterrows():
        assert row['rows'] == (table.iloc[keep]['recording_id'] == row['recording_id']).sum()
    long = table.assign(copy=0)
    first = table['recording_id'] == table['recording_id'].iloc[0]
    # one location recorded twice as long
    twice = np.concatenate([np.arange(len(table)), np.flatnonzero(first)])
    same(Predictions(long.iloc[twice], p[twice]).at_level('subject').probabilities, a.probabilities)
    numbers = Predictions(table, p).scores()
    assert [numbers[k]['n'] for k in ('cycle', 'recording', 'subject')] == [
        len(table), table['recording_id'].nunique(), 9]


def test_bootstrap_resamples_whole_groups():
    seen, groups = [], np.repeat(['a', 'b', 'c'], [1, 2, 3])
    bootstrap(lambda g, _: seen.append(g) or 0., groups, groups, groups, draws=20)
    assert len(seen) == 1+3+20 and (seen[0] == groups).all()
    for rows in seen:
        drawn = [(rows == g).sum()/n for g, n in zip('abc', (1, 2, 3))]
        assert (sum(drawn) == (2 if any(rows is s for s in seen[1:4]) else 3)
                and all(d == int(d) for d in drawn))


def test_bootstrap_interval_covers():
    "About 95 % of the intervals hold the true mean; binomial limits for 200 trials."
    random, inside = np.random.default_rng(1), 0
    for trial in range(200):
        own = random.normal(size=40)
        # 40 subjects, 5 cycles each, true mean 0
        values = np.repeat(own, 5) + random.normal(size=200)/2
        low, high = bootstrap(lambda _, v: v.mean(), values, values, np.repeat(np.arange(40), 5),
                              draws=200, seed=trial)
        inside += low <= 0 <= high
    assert 176 <= inside <= 199


def test_bootstrap_leaves_undefined_draws_out():
    y, p, g = [0, 0, 0, 1], np.array([.1, .2, .3, .9]), 'abcd'
    low, high = bootstrap(lambda y, p: auroc(y == 1, p), y, p, list(g), draws=400)
    assert (low, high) == (1., 1.)
    assert bootstrap(lambda y, p: None, y, p, list(g), draws=10) == (None, None)
    with pytest.raises(PahclError, match='differ in length'):
        bootstrap(lambda y, p: 0., y, p, ['a'])


@pytest.mark.parametrize(
    'y, p, message', [([], np.zeros((0, 2)), 'at least one'), ([0, 1], np.zeros((2, 3)), 'need'),
                      ([0, 2], np.ones((2, 2)), 'holds 2'), ([0, -1], np.ones((2, 2)), 'holds -1'),
                      ([0, 1], np.array([[.5, .5], [np.nan, 1]]), 'row 1')])
def test_wrong_input_is_named(y, p, message):
    with pytest.raises(PahclError, match=message): classification_metrics(y, p, 2)


@pytest.fixture
def made_up():
    "Two metrics that somebody writes in a module of his own."
    @register_metric('geometric_mean', 'matrices', 'root of the product of the recalls')
    def geometric_means(matrices):
        return _class_recalls(matrices).prod(1)**(1/matrices.shape[1])
    mean = lambda own, index, weights: weights @ np.bincount(index, own)/(
        weights @ np.bincount(index))
    trust = lambda y, p: p[np.arange(len(y)), y]
    @register_metric('trust', 'probabilities', 'mean probability of the truth',
                     roles=('interval', 'paired'),
                     weighted=lambda y, p, index, weights: mean(trust(y, p), index, weights))
    def trusts(y_true, probabilities): return float(trust(y_true, probabilities).mean())
    yield 'geometric_mean', 'trust'
    for name in ('geometric_mean', 'trust'): del METRICS[name]


def test_a_new_metric_is_known_everywhere_and_stands_in_no_list(made_up):
    table, p = _made_cycles(1)
    scored = Evaluation.of(Decisions.of(Predictions(table, p, dict(a=0, b=1, c=2))), draws=100)
    results = scored.results
    for scores in results['levels'].values():
        for name in made_up:
            low, high = scores['intervals'][name]
            assert 0 < low < scores[name] < high < 1
    scores, y, z = results['levels']['cycle'], table['label'].to_numpy(), p.argmax(1)
    same(scores['geometric_mean'], np.prod(sk.recall_score(y, z, average=None))**(1/3))
    same(scores['trust'], p[np.arange(len(y)), y].mean())
    assert list(scored.tables()[0].index)[-2:] == list(made_up)
    assert results['floors']['subject']['geometric_mean'] == 0 and 'trust' in _paired_scores()
    assert 'geometric_mean: root of the product of the recalls' in _explain_words(
        'geometric_mean 0.5')
    config = _validate_config(dict(evaluation=dict(primary_metric='geometric_mean',
                                                   metrics=['f1', 'geometric_mean'])))
    assert config.evaluation.primary_metric == 'geometric_mean'
    with pytest.raises(PahclError, match="'geometric_mean' is expected"):
        _validate_config(dict(evaluation=dict(primary_metric='trust')))


def test_a_metric_that_cannot_be_is_refused():
    nothing = lambda matrices: 0
    for message, keys in [('two metrics', dict(name='f1')), ('no such kind', dict(kind='rows')),
                          ('no such role', dict(roles=['best'])),
                          ('no interval', dict(kind='ranking')),
                          ('less of it is better', dict(higher_is_better=False))]:
        with pytest.raises(PahclError, match=message):
            register_metric(**dict(name='made up', kind='matrices', meaning='') | keys)(nothing)
    assert 'made up' not in METRICS


def test_lists_and_orders_that_files_rely_on():
    every = ['accuracy', 'f1', 'f1_macro', 'f1_weighted', 'auroc', 'auprc', 'precision', 'recall',
             'specificity', 'uar', 'mcc']
    assert metric_names('interval') == metric_names('primary') == every
    assert metric_names('compare') == [m for m in every
                                       if m not in ('precision', 'recall', 'specificity')]
    assert metric_names('tracked') == ['accuracy', 'f1', 'f1_macro', 'auroc', 'auprc',
                                       'precision', 'recall']
    assert (metric_names('paired') == ['accuracy', 'f1_macro', 'auroc', 'uar']
            and _paired_scores() == ['accuracy', 'f1_macro', 'uar', 'auroc'])
    assert list(classification_metrics([0, 1], np.eye(2), 2))[:11] == every
    assert {task: m.name for task, m in CHALLENGE_METRICS.items()} == dict(
        circor_murmur='murmur_weighted_accuracy', circor_outcome='outcome_cost',
        physionet2016='sensitivity_specificity_mean', pascal='precision_sum')
