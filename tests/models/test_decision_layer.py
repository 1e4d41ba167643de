"""The decision layer: against scikit-learn, against every weight on a grid, against the challenges'
own formulas; and what it answers where there is little to go by
"""
import json
import numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from pahcl.core.basics import PahclError, UsageError
from pahcl.core.challenge_metrics import murmur_weighted_accuracy, outcome_cost
from pahcl.core.metrics import METRICS
from pahcl.core.predictions import Predictions
from pahcl.models.decision_layer import (
    _average_answers, _decide_weighted, _fit_and_answer, _fit_layer, _hold_out, DecisionLayer)
from pahcl.models.decision_weights import _choose_weights, _expected_matrices, _goal_values
from pahcl.models.subject_evidence import _subject_evidence
from pahcl.testing.made import _made_cycles

MURMUR, SICK = dict(Present=0, Absent=1, Unknown=2), dict(normal=0, abnormal=1)

def made(classes=3, subjects=60, seed=0, separation=1.):
    names = MURMUR if classes == 3 else SICK
    return Predictions(*_made_cycles(separation, subjects, classes, 4, seed), names)

def taught(predictions, **how):
    subjects = predictions.at_level('subject')
    return DecisionLayer.fit(_subject_evidence(predictions), subjects.table['label'],
                             subjects.persons, predictions.label_map, **how)

@pytest.mark.parametrize('classes', [2, 3])
@pytest.mark.parametrize('penalty', [.03, 1.])
def test_probabilities_are_those_of_a_pipeline(classes, penalty):
    predictions = made(classes)
    evidence, other = _subject_evidence(predictions), _subject_evidence(made(classes, seed=1))
    y = predictions.at_level('subject').table['label'].to_numpy()
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
    ours = _fit_layer(evidence, y, predictions.label_map, penalty).probabilities(other)
    assert np.allclose(ours, theirs.fit(evidence, y).predict_proba(other), atol=2e-3)

@pytest.mark.parametrize('goal', ['official', 'compromise'])
def test_no_weights_on_a_grid_promise_more(goal):
    official = METRICS['murmur_weighted_accuracy']
    p = softmax(np.random.default_rng(3).normal(size=(40, 3)), axis=1)
    found = _choose_weights(p, goal, official)
    line = np.exp(np.linspace(-2.5, 2.5, 41))
    grid = np.stack([*map(np.ravel, np.meshgrid(line, line)), np.ones(41*41)], 1)
    value = lambda w: _goal_values(_expected_matrices(p, w), goal, official)
    assert value(found[None])[0] >= value(grid).max()-2e-3

def test_weights_of_certain_probabilities_score_as_the_challenge_does():
    "Where probabilities are 0 or 1 what is promised is what is scored."
    y = np.random.default_rng(0).integers(0, 3, 50)
    sure, official = np.eye(3)[y], METRICS['murmur_weighted_accuracy']
    said = np.clip(sure+.8*np.random.default_rng(1).random((50, 3)), 0, None)
    weights = np.array([[1., 2., .5]])
    decided = _decide_weighted(said, weights)
    matrices = np.zeros((1, 3, 3))
    np.add.at(matrices[0], (y, decided), 1)
    promised = _goal_values(matrices, 'official', official)[0]
    assert promised == pytest.approx(murmur_weighted_accuracy(y, decided))

def test_the_cheapest_threshold_is_found():
    "Each threshold by the challenge's own function, averaged over drawn outcomes."
    random = np.random.default_rng(5)
    p = random.beta(2, 2, 30)
    weights = _choose_weights(np.c_[1-p, p], 'official', METRICS['outcome_cost'])
    drawn = random.random((400, 30)) < p
    cost = lambda decided: np.mean([outcome_cost(y.astype(int), decided) for y in drawn])
    ours = cost(_decide_weighted(np.c_[1-p, p], weights))
    assert ours <= min(cost((p > t).astype(int)) for t in np.linspace(0, 1, 41))*1.01

@settings(deadline=None, max_examples=10)
@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 99))
def test_nobody_is_answered_by_a_layer_that_met_them(persons, visits, seed):
    who = np.repeat([f'p{i}' for i in range(persons)], visits)
    labels = np.random.default_rng(seed).integers(0, 3, len(who))
    parts = _hold_out(labels, who, seed)
    assert all(not {*who[a]} & {*who[b]} for a, b in parts)
    assert sorted(np.concatenate([b for _, b in parts])) == list(range(len(who)))

def test_scores_do_not_flatter():
    "Labels without any relation to the evidence: chance is reported, though the fit looks good."
    evidence = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 20))).add_prefix('e')
    persons, truth = np.arange(60).astype(str), np.arange(60) % 2
    fitted = _fit_and_answer(evidence, truth, persons, SICK, penalty=10., goal='argmax')
    assert (fitted.layer.decide(evidence) == truth).mean() > .7
    assert fitted.layer.scores['uar'] < .65

def test_a_layer_learns_what_the_mean_does_not_know():
    "Only a poor recording means Unknown, and no probability says so."
    predictions = made(3, 60, separation=0.)
    subjects = predictions.at_level('subject')
    label = subjects.table.set_index('subject_id')['label']
    ids = predictions.table[['recording_id', 'subject_id']].drop_duplicates()
    facts = ids.assign(confidence=np.where(ids.subject_id.map(label) == 2, .5, .9), seconds='12')
    evidence = _subject_evidence(predictions, facts)
    layer = DecisionLayer.fit(evidence, label.to_numpy(), subjects.persons, MURMUR)
    assert (layer.decide(evidence)[label == 2] == 2).all()
    assert 'confidence' in next(iter(layer.describe(evidence.iloc[2:3]).values()))

def test_through_a_checkpoint_to_the_bit(tmp_path):
    predictions = made()
    for goal in ('compromise', [5., 1.2, 9.]):
        layer = taught(predictions, goal=goal, official=METRICS['murmur_weighted_accuracy'])
        torch.save(dict(decision_layer=layer.to_plain()), tmp_path/'saved.pt')
        plain = torch.load(tmp_path/'saved.pt', weights_only=True)['decision_layer']
        for found in (plain, json.loads(json.dumps(plain))):
            back, evidence = DecisionLayer.from_plain(found), _subject_evidence(predictions)
            assert np.array_equal(back.probabilities(evidence), layer.probabilities(evidence))
            assert np.array_equal(back.decide(evidence), layer.decide(evidence))

def test_strange_evidence_gets_an_answer_and_a_note():
    predictions = made()
    layer = replace(taught(predictions), places=('AV', 'MV', 'PV', 'TV'))
    elsewhere = replace(predictions, table=predictions.table.assign(location='back'))
    assert 'never met (back)' in layer.answer(elsewhere).notes[0]
    assert layer.answer(predictions).notes == ()
    nothing = replace(predictions, probabilities=np.full((len(predictions), 3), np.nan))
    answers = layer.answer(nothing)
    assert np.isfinite(answers.probabilities).all() and 'lacks evidence' in answers.notes[0]
    far = _subject_evidence(predictions).assign(recordings=1e9)
    assert np.isfinite(layer.logits(far)).all() and np.abs(layer.standardise(far)).max() <= 5

def test_one_person_or_one_class_is_enough_for_an_answer():
    predictions = made()
    evidence = _subject_evidence(predictions)
    alone = DecisionLayer.fit(evidence.iloc[:1], [2], ['a'], MURMUR)
    assert alone.decide(evidence).tolist() == [2]*60
    two = DecisionLayer.fit(evidence.iloc[:4], [0, 1, 1, 1], list('abcd'), MURMUR)
    assert two.probabilities(evidence)[:, 2].max() < 1e-6

def test_a_goal_that_is_none_is_a_usage_error():
    for goal in ('accuracy', [1., 2.], [1., -1., 2.]):
        with pytest.raises(UsageError, match='decision.goal is'): taught(made(), goal=goal)
    with pytest.raises(PahclError, match='has no features'): DecisionLayer.from_plain({})

def test_members_are_averaged():
    layers = [taught(made(seed=s)) for s in (1, 2)]
    predictions = made(seed=3)
    answers = [layer.answer(predictions) for layer in layers]
    mean = _average_answers(answers, [.25, .75])
    expected = .25*answers[0].probabilities+.75*answers[1].probabilities
    assert np.allclose(mean.probabilities, expected) and mean.ids == answers[0].ids
