"""pahcl.studies.comparison, pahcl.studies.summary --compare and pahcl.studies.ensemble's weights:
properties, oracles, and runs that cannot be compared
"""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize

from pahcl.evaluation.statistics import delong_test, _placement_values
from pahcl.studies.paired_tests import bootstrap_experiment, _draw_run_weights
from pahcl.studies.disagreement import _mutual_information
from pahcl.studies.ensemble import _fit_member_weights
from pahcl.core.ranking import auroc, weighted_auroc
from pahcl.core.resampling import resampling_weights
from pahcl.evaluate import pahcl_summarize

scores = st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5)), min_size=6,
                  max_size=30).filter(lambda rows: 2 <= sum(r[0] for r in rows) <= len(rows)-2)


@given(scores)
@settings(max_examples=60, deadline=None)
def test_delong_pair_by_pair(rows):
    "Ties and all: the fast version is the paper's sum over pairs."
    positive, a, b = (np.array(c) for c in zip(*rows))
    positive = positive.astype(bool)
    psi = np.stack([(s[positive][:, None] > s[~positive])+.5*(s[positive][:, None] == s[~positive])
                    for s in (a.astype(float), b.astype(float))])
    for s, p in zip((a, b), psi):
        own, other = _placement_values(positive, s)
        assert (np.allclose(own, p.mean(1)) and np.allclose(other, p.mean(0))
                and own.mean() == pytest.approx(auroc(positive, s)))
    c = np.array([-1, 1])
    variance = c @ (np.cov(psi.mean(2))/positive.sum()+np.cov(psi.mean(1))/(~positive).sum()) @ c
    test, turned = delong_test(positive, a, b), delong_test(positive, b, a)
    assert (test['deviation']**2 == pytest.approx(variance, abs=1e-12) and test['difference']
            == pytest.approx(-turned['difference']) and test['p'] == pytest.approx(turned['p']))


def test_delong_of_persons_with_several_rows_agrees_with_the_bootstrap():
    "Both kinds of rows may be one person's, and rows of a person resemble each other."
    random = np.random.default_rng(0)
    person = np.repeat(np.arange(200), random.integers(1, 5, 200))
    positive = random.random(len(person)) < np.where(person % 3, .2, .9)
    own = random.normal(size=(2, 200))[:, person]
    a, b = positive*1.+own+.5*random.normal(size=own.shape)
    weights = resampling_weights(200, 1000)
    drawn = np.diff([weighted_auroc(positive, s, person, weights) for s in (a, b)], axis=0)[0][201:]
    clustered, alone = (delong_test(positive, a, b, person)['deviation'],
                        delong_test(positive, a, b)['deviation'])
    assert clustered == pytest.approx(drawn.std(), rel=.1) and alone < .8*clustered


def test_seeds_are_drawn_only_where_persons_are():
    weights = resampling_weights(5, draws=40)
    shares = _draw_run_weights(3, weights, seed=0)
    assert (np.allclose(shares[:6], 1/3) and np.allclose(shares.sum(1), 1)
            and (shares[6:]*3 == np.round(shares[6:]*3)).all() and shares[6:].std() > 0)
    assert ((_draw_run_weights(3, weights, seed=0) == shares).all()
            and np.allclose(_draw_run_weights(3, weights), 1/3))


def test_two_experiments_that_say_the_same_differ_in_no_draw():
    y, p = np.arange(30) % 3, np.random.default_rng(0).dirichlet(np.ones(3), (2, 30))
    weights, index = resampling_weights(15, draws=50), np.arange(30)//2
    one, two = (bootstrap_experiment(y, p, index, weights, seed=0) for _ in range(2))
    for score in one: assert np.array_equal(one[score], two[score], equal_nan=True)


def test_weights_are_the_optimum():
    random = np.random.default_rng(0)
    y = random.integers(3, size=80)
    members = np.stack([.6*np.eye(3)[y]*random.random((80, 1))+.4*random.dirichlet(np.ones(3), 80)
                        for _ in range(3)])
    members /= members.sum(-1, keepdims=True)
    true = members[:, range(80), y]
    best = minimize(lambda v: -np.log(np.exp(v)/np.exp(v).sum() @ true).mean(), np.zeros(3))
    w = _fit_member_weights(members, y, steps=3000)
    assert (-np.log(w @ true).mean() == pytest.approx(best.fun, abs=1e-5)
            and w.sum() == pytest.approx(1))


def test_mutual_information_is_between_0_and_the_members_entropy():
    p = np.random.default_rng(0).dirichlet(np.ones(3), (5, 50))
    between, shared = _mutual_information(p)
    assert (between >= 0).all() and (between <= np.log2(5)).all() and (shared <= np.log2(3)).all()


def run(folder, name, people=20, task='pascal', evaluated=True, shift=0.):
    random = np.random.default_rng(0)
    path = folder/f'{task}_{name}'
    path.mkdir(parents=True)
    (path/'final_metrics.json').write_text(json.dumps(dict(task=task, experiment=name, seed=42,
                                                           test_accuracy=.5)))
    label = np.arange(people) % 2
    p = np.clip(.5+.2*(2*label-1)*shift+.2*random.normal(size=people), .01, .99)
    table = pd.DataFrame(dict(subject_id=[f'{s:03d}' for s in range(people)], label=label,
                              label_name='x', probability_normal=1-p, probability_murmur=p))
    if evaluated:
        (path/f'evaluation_{task}_test').mkdir()
        table.to_csv(path/f'evaluation_{task}_test'/'predictions_subject.csv', index=False)
    return path


def test_script(tmp_path, capsys):
    run(tmp_path, 'a')
    run(tmp_path, 'b', shift=2.)
    assert pahcl_summarize(['--output-dir', str(tmp_path), '--compare', 'a', 'b']) == 0
    table = pd.read_csv(tmp_path/'compare_a_b.csv').set_index('score')
    assert (table.loc['auroc', 'b'] == 1 and table.loc['auroc', 'low'] > 0
            and table.loc['auroc', 'p_delong'] < .01)
    assert {p.suffix for p in tmp_path.glob('compare_a_b.*')} == {'.csv', '.md', '.tex', '.html'}
    assert (pahcl_summarize(['--output-dir', str(tmp_path)]) == 0
            and len(pd.read_csv(tmp_path/'summary.csv')) == 2)


@pytest.mark.parametrize('other, said', [
    (dict(people=18), '2 are in pascal_a only (018, 019)'),
    (dict(evaluated=False), 'pahcl_evaluate --checkpoint'),
    (dict(task='circor_outcome'), 'no task in common: a is of pascal, b of circor_outcome')])
def test_runs_that_cannot_be_compared(tmp_path, capsys, other, said):
    run(tmp_path, 'a')
    run(tmp_path, 'b', **other)
    assert (pahcl_summarize(['--output-dir', str(tmp_path), '--compare', 'a', 'b']) == 1
            and said in capsys.readouterr().err)
    assert not list(tmp_path.glob('compare_*'))


def test_two_runs_of_one_name_and_seed_are_not_seeds_of_one_experiment(tmp_path):
    from pahcl.studies.summary import _group_seeds
    runs = pd.DataFrame([dict(folder=f'pascal_{n}', task='pascal', experiment='downstream', seed=42,
                              status='finished') for n in ('downstream', 'packaged')])
    for folder, rate in zip(runs['folder'], (.1, .2)):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/'config.yaml').write_text(f'training: {{learning_rate: {rate}}}\n'
                                                   'seed: 42\n')
    assert _group_seeds(runs, tmp_path) == ['pascal_downstream', 'pascal_packaged']
    assert _group_seeds(runs[:1], tmp_path) == ['downstream']
    seeds = runs.assign(experiment=['full_seed42', 'full_seed43'], seed=[42, 43])
    (tmp_path/'pascal_packaged'/'config.yaml').write_text(
        'training: {learning_rate: 0.1}\nseed: 43\n')
    assert _group_seeds(seeds, tmp_path) == ['full', 'full']
