"The signal quality of 2016's recordings, from the raw folder to the challenge's score"
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from pahcl.evaluation.challenge_rules import _quality_weighted_mean, _resolve_unsure, UNSURE
from pahcl.segmentation.preprocessing import preprocess
from pahcl.evaluation.evaluator import score_split
from pahcl.evaluation.scoring import Evaluation
from pahcl.evaluation.baseline_features import _heart_rate_features
from pahcl.core.challenge_metrics import _sensitivity_specificity_mean
from pahcl.core.predictions import Predictions
from pahcl.data.simulation import simulate_dataset
from pahcl.data.splitting import prepare
from pahcl.data.tasks import Task

LABELS = dict(normal=0, abnormal=1)


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "raw, processed and prepared recordings of 2016 of which training-a has quality labels"
    folder = tmp_path_factory.mktemp('quality')
    simulate_dataset(folder/'raw', 'physionet2016', subjects=12, seed=0)
    place = folder/'raw'/'physionet2016'/'training-a'
    rows = [line.split(',') for line in (place/'REFERENCE.csv').read_text().split()]
    (place/'REFERENCE-SQI.csv').write_text(
        ''.join(f'{r},{l},{i % 2}\n' for i, (r, l) in enumerate(rows)))
    preprocess(folder/'raw', folder/'processed', num_workers=1)
    prepare('all', folder/'raw', folder/'processed', folder/'downstream')
    return folder, {r: ('poor', 'good')[i % 2] for i, (r, _) in enumerate(rows)}


def test_quality_comes_with_the_processed_data_and_the_task(house):
    folder, quality = house
    for path in (folder/'processed'/'recordings.csv',
                 folder/'downstream'/'physionet2016'/'recordings.csv'):
        known = pd.read_csv(path, dtype=str).set_index('recording_id')['signal_quality']
        assert known.dropna().to_dict() == quality and known.isna().any()


def test_whole_cycles_come_with_the_task(house):
    folder, task = house[0], house[0]/'downstream'/'physionet2016'
    cycles = pd.read_csv(task/'cycles.csv')
    for path, own in itertools.islice(cycles.assign(folder=[
            p.split('/', 1)[1].rsplit('/', 1)[0] for p in cycles['file_path']]).groupby('folder'),
                                      4):
        found = pd.read_csv(folder/'processed'/path/'cycles.csv')
        found = found[found['file'].notna()]
        assert np.allclose(own['duration_s'], found['offset_s']-found['onset_s'], atol=1e-4)
    assert np.allclose(_heart_rate_features(cycles)['length'].sort_index(),
                       cycles.groupby('subject_id')['duration_s'].median().sort_index())


def made_task(folder, quality):
    """four abnormal and four normal recordings, the last of each without a cycle; what a model says
    of the six others
    """
    ids = [f'a000{i}' for i in range(8)]
    known = pd.DataFrame(dict(recording_id=ids, subject_id=ids, person_id=ids, label=[1]*4+[0]*4,
                              split='test', signal_quality=quality))
    train = pd.DataFrame(dict(recording_id=['b1', 'b2', 'b3'], subject_id=['b1', 'b2', 'b3'],
                              person_id=['b1', 'b2', 'b3'], label=[1, 1, 0], split='train'))
    pd.concat([known, train]).to_csv(folder/'recordings.csv', index=False)
    heard = known.drop(index=[3, 7])
    heard.assign(s2_end=1500, valid_length=3000,
                 duration_s=.8).to_csv(folder/'cycles.csv', index=False)
    abnormal = np.array([.9, .8, .2, .1, .6, .3])
    return (heard.reset_index(drop=True), np.stack([1-abnormal, abnormal], 1)), ids


def score(folder, quality):
    told, ids = made_task(folder, quality)
    config = dict(task_name='physionet2016', dataset='physionet2016', label_map=LABELS,
                  split_subjects=dict(test=ids))
    return score_split(Predictions(*told, LABELS), Task(folder, config), 'test', draws=50).results


def test_the_rule_by_hand(tmp_path):
    """Abnormal: two clean ones found, one clean one missed, one noisy one not heard, which is
    right: Se = 3/4·2/3 + 1/4·1/1 = 3/4.

    Normal: one clean one right, one clean one wrong, one noisy one right, one clean one not heard,
    which is wrong: Sp = 3/4·1/3 + 1/4·1/1 = 1/2.
    """
    results = score(tmp_path, ['good', 'good', 'good', 'poor', 'good', 'good', 'poor', None])
    official = results['official']
    assert (official['rule'] == 'signal quality' and official['value'] == pytest.approx((3/4+1/2)/2)
            and results['fallback'] == 2)
    assert official['quality'] == dict(
        unsure=2,
        unlabelled=1, good=dict(recordings=6, score=pytest.approx((2/3+1/3)/2),
                                sensitivity=pytest.approx(2/3), specificity=pytest.approx(1/3)),
        poor=dict(recordings=2, score=1., sensitivity=1., specificity=1.))
    assert official['low'] <= official['value'] <= official['high']
    told = ' '.join(Evaluation(results).official_lines())
    assert ('By the signal-quality rule of the challenge: 6 good recordings 0.500' in told
            and '1 without a label count as good' in told)
    json.dumps(official)


def test_without_labels_the_plain_mean_and_the_page_says_so(tmp_path):
    # the two that were not heard are answered abnormal, as most in training are
    results = score(tmp_path, [None]*8)
    assert (results['official']['value'] == pytest.approx((3/4+2/4)/2)
            and results['official']['rule'] == 'plain')
    assert 'The plain (Se + Sp)/2: no signal-quality labels were used.' in Evaluation(
        results).official_lines()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 1, UNSURE]), st.booleans()),
                min_size=2, max_size=20))
def test_unsure_answers_may_be_written_as_decisions(rows):
    "the plain mean of `_resolve_unsure` is the rule with the shares of the recordings at hand"
    y, z, noisy = map(np.array, zip(*rows))
    rule, plain = (_quality_weighted_mean(y, z, noisy)['score'],
                   _sensitivity_specificity_mean(y, _resolve_unsure(y, z, noisy)))
    assert rule == plain if rule is None else rule == pytest.approx(plain)


def test_labels_that_came_after_preprocessing_are_missed(house, tmp_path, caplog):
    folder = house[0]
    late = tmp_path/'processed'
    late.mkdir()
    for name in ('recordings.csv', 'processing_stats.json'):
        (late/name).write_bytes((folder/'processed'/name).read_bytes())
    for path in (folder/'processed').glob('subject_*'): (late/path.name).symlink_to(path)
    pd.read_csv(late/'recordings.csv',
                dtype=str).drop(columns='signal_quality').to_csv(late/'recordings.csv', index=False)
    prepare('all', folder/'raw', late, tmp_path/'downstream')
    assert 'Run pahcl_preprocess again: nothing is cut anew' in caplog.text
