"""Baselines without a network: a made murmur and an unsure segmenter are found, as
scikit-learn finds them by hand
"""
import numpy as np
import pandas as pd
import pytest
from pahcl.core.basics import read_json
from pahcl.evaluation.baseline_features import _segmentation_features
from pahcl.evaluation.baselines import (
    all_baseline_predictions, _PENALTY_STRENGTHS, _score_baselines, _subject_labels)
from pahcl.core.predictions import Predictions
from pahcl.evaluation.spectrum_baseline import _spectrum_features
from pahcl.data.splitting import prepare
from pahcl.data.tasks import _PREPARE_AGAIN, Task
from pahcl.testing.made import _make_processed_folder, _make_recordings
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

NAMES = ['Present', 'Absent', 'Unknown']


def murmur_in_systole(folder, length_mode):
    "A tone of 200 Hz from the end of S1 to the start of S2, as it lies in the stored cycle."
    for row in pd.read_csv(folder/'cycles.csv').dropna(subset='file').itertuples():
        sound = np.load(folder/row.file)
        rate = 4000/(row.offset_s-row.onset_s) if length_mode == 'phase' else 5000
        start, end = (round(rate*(at-row.onset_s)) for at in (row.s1_end_s, row.s2_start_s))
        sound[start:end] += .05*np.sin(2*np.pi*200/5000*np.arange(end-start, dtype=np.float32))
        np.save(folder/row.file, sound)


@pytest.fixture(scope='module', params=['pad', 'phase'])
def task(request, tmp_path_factory):
    "Murmurs are tones in systole; of Unknown the segmenter was less sure."
    root = tmp_path_factory.mktemp('baselines')
    recordings = _make_recordings(('circor',), persons=48)
    _make_processed_folder(root/'processed', recordings, cycles=2, length_mode=request.param)
    for row in recordings.itertuples():
        place = root/'processed'/row.folder
        if row.murmur == 'Present': murmur_in_systole(place, request.param)
        if row.murmur == 'Unknown':
            beats = pd.read_csv(place/'cycles.csv')
            beats.assign(confidence=.5).to_csv(place/'cycles.csv', index=False)
    prepare('circor', root/'no raw', root/'processed', root/'downstream')
    return root/'downstream'/'circor_murmur'


@pytest.fixture(scope='module')
def levels(task):
    cycles = pd.read_csv(task/'cycles.csv', dtype=dict(subject_id=str))
    test = cycles[cycles['split'] == 'test']
    return Predictions(test, np.full((len(test), 3), 1/3)).at_levels()


def score(task, levels):
    subjects = levels['subject'].table['subject_id']
    return _score_baselines(levels, all_baseline_predictions(task, subjects))


def test_each_baseline_finds_what_it_can_know(task, levels):
    baselines = score(Task.open(task.parent, task.name), levels)
    assert list(baselines) == ['heart rate', 'demographics', 'segmentation', 'log-mel statistics',
                               'beat statistics']
    area = {name: s['per_class']['auroc'] for name, s in baselines.items() if 'reason' not in s}
    assert area['log-mel statistics'][0] == 1 and area['segmentation'][2] == 1
    assert area['beat statistics'][0] == area['beat statistics'][2] == 1
    assert abs(area['segmentation'][0]-.5) < .4 and abs(area['heart rate'][0]-.5) < .4
    assert (baselines['log-mel statistics']['without'] == 0
            and baselines['log-mel statistics']['strength'] in _PENALTY_STRENGTHS)


def test_by_hand(task, levels):
    "Standardise, balanced logistic regression, the penalty with the best validation AUROC."
    prepared = Task.open(task.parent, task.name)
    train, val = (_subject_labels(prepared, s) for s in ('train', 'val'))
    x = _spectrum_features(task)
    ids = levels['subject'].table['subject_id']
    filled = SimpleImputer(strategy='median').fit(x.loc[train.index])
    scaled = StandardScaler().fit(filled.transform(x.loc[train.index]))
    ready = lambda who: scaled.transform(filled.transform(x.loc[who]))
    models = {c: LogisticRegression(C=c, class_weight='balanced',
                                    max_iter=2000).fit(ready(train.index), train)
              for c in _PENALTY_STRENGTHS}
    areas = {c: np.mean([roc_auc_score(val == k, m.predict_proba(ready(val.index))[:, k])
                         for k in range(3)]) for c, m in models.items()}
    opened = Task.open(task.parent, task.name)
    predicted = all_baseline_predictions(opened, ids)['log-mel statistics']
    assert areas[predicted['strength']] == max(areas.values())
    assert predicted['probabilities'] == pytest.approx(
        models[predicted['strength']].predict_proba(ready(ids)), abs=1e-6)


def test_a_task_of_an_older_version_says_what_is_missing(task, levels, tmp_path):
    config = read_json(task/'task_config.json')
    cycles, recordings = (pd.read_csv(task/f'{name}.csv', dtype=str)
                          for name in ('cycles', 'recordings'))
    cycles.drop(columns=['confidence', 'quality']).to_csv(tmp_path/'cycles.csv', index=False)
    recordings.to_csv(tmp_path/'recordings.csv', index=False)
    baselines = score(Task(tmp_path, config), levels)
    assert (baselines['segmentation']['reason'].endswith(_PREPARE_AGAIN.rstrip('.'))
            and 'confidence, quality' in baselines['segmentation']['reason'])
    assert ('auroc' in baselines['heart rate']
            and 'task_config.json' in baselines['log-mel statistics']['reason'])
    cycles.to_csv(tmp_path/'cycles.csv', index=False)
    assert 'auroc' in score(Task(tmp_path, config), levels)['segmentation']


def test_traits_are_those_of_the_tables(task):
    traits, cycles = (_segmentation_features(Task.open(task.parent, task.name)),
                      pd.read_csv(task/'cycles.csv', dtype=dict(subject_id=str)))
    by = cycles.groupby('subject_id')['confidence']
    assert (np.allclose(traits['beats_confidence_mean'], by.mean().reindex(traits.index))
            and np.allclose(traits['cycles'], by.size().reindex(traits.index)))
