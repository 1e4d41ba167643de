"""Whole cross-validations of small models on simulated recordings: everybody once, and each device
left out
"""
import json

import numpy as np
import pandas as pd
import pytest
from pahcl.core.basics import read_json
from pahcl.evaluation.thresholds import decide_classes
from pahcl.studies.cross_validation import cross_validate
from pahcl.studies.fold_plans import _assign_device_splits, _plan_folds
from pahcl.evaluate import pahcl_evaluate
from pahcl.training.finetuning import finetune
from pahcl.core.metrics import classification_metrics
from pahcl.core.ranking import auroc
from pahcl.data.task_folders import _accept_changes
from pahcl.data.tasks import Task
from pahcl.training.run_folders import _sort_files


@pytest.fixture(scope='module')
def trained(trained_on):
    "three cycles of each recording are enough here"
    folder = trained_on('physionet2016', 12, 1)
    task = folder/'downstream'/'physionet2016'
    for name in ('cycles', 'train', 'val', 'test'):
        lines = (task/f'{name}.csv').read_text().splitlines(keepends=True)
        (task/f'{name}.csv').write_text(
            ''.join(line for line in lines
                    if 'cycle_' not in line or any(f'cycle_00{i}.npy' in line for i in range(3))))
    _accept_changes(task)
    return folder


pytestmark = pytest.mark.usefixtures('no_figures')


def best_of(trained, name='downstream'):
    return trained/'outputs'/f'physionet2016_{name}'/'best_model.pt'


def copied_task(trained, folder):
    "The prepared task as tables and links, so that a test may change the tables."
    source, task = trained/'downstream'/'physionet2016', folder/'physionet2016'
    task.mkdir()
    for p in source.iterdir():
        if p.is_file(): (task/p.name).write_bytes(p.read_bytes())
        elif p.name[0] != '.': (task/p.name).symlink_to(p)
    return task


def persons_of_fold(folder, fold):
    "who trained a fold"
    from pahcl.models.checkpoints import load_classifier
    return load_classifier(folder/'folds'/f'physionet2016_{fold.replace(" ", "_")}'
                           /'best_model.pt')[1]['training_persons']


def test_everybody_is_tested_once_and_by_strangers(trained, capsys):
    best, data = best_of(trained), trained/'downstream'
    assert pahcl_evaluate(['--checkpoint', str(best), '--task', 'physionet2016', '--data-dir',
                           str(data), '--cross-validate', '3']) == 0
    folder = best.parent/'cross_validation_physionet2016_3'
    told, known = (pd.read_csv(folder/'predictions_subject.csv'),
                   pd.read_csv(data/'physionet2016'/'cycles.csv'))
    assert sorted(told['subject_id']) == sorted(known['subject_id'].unique())
    from pahcl.models.checkpoints import load_classifier
    for k in range(3):
        learnt = set(load_classifier(
            folder/'folds'/f'physionet2016_fold_{k}'/'best_model.pt')[1]['training_persons'])
        # two recordings each
        assert read_json(folder/'folds'/f'physionet2016_fold_{k}'/'final_metrics.json')[
            'training_subjects'] == 2*len(learnt) == 8
        assert not learnt & set(told.loc[told['fold'] == f'fold {k}', 'person_id'])
    kept = json.loads((folder/'metrics.json').read_text())
    assert not list(folder.glob('data_*')) and len(kept['folds']) == 3
    assert not _sort_files(best.parent)[1]   # all of it may be replaced
    assert set(kept['shortcuts']) == {'heart rate', 'folder letter', 'segmentation',
                                      'log-mel statistics', 'beat statistics'}
    assert all(f['train_subjects'] == 8 and 0 <= f['auroc'] <= 1
               for f in kept['shortcuts'].values())
    assert kept['levels']['subject']['auroc'] == pytest.approx(
        auroc(told['label'] == 1, told['probability_abnormal']), abs=1e-5)
    before = (folder/'folds'/'physionet2016_fold_0'/'best_model.pt').stat().st_mtime_ns
    cross_validate(best, 'physionet2016', 3, data, draws=10)   # finished runs are not repeated
    assert (folder/'folds'/'physionet2016_fold_0'/'best_model.pt').stat().st_mtime_ns == before


def test_each_fold_chooses_on_its_own_validation_persons(trained):
    "the runs of the first test are used again"
    best, data = best_of(trained), trained/'downstream'
    results = cross_validate(best, 'physionet2016', 3, data, subject_rule='choose',
                             threshold='youden', draws=10)
    folder = best.parent/'cross_validation_physionet2016_3'
    told = pd.read_csv(folder/'predictions_subject.csv')
    for part in results['folds']:
        own, t = told[told['fold'] == part['fold']], part['chosen']['thresholds']['subject']
        # written with six digits
        assert own['predicted'].tolist() == decide_classes(
            own.filter(like='probability').to_numpy(), round(t, 6), 1).tolist()
        assert part['chosen']['subject_rule'] == max(part['chosen']['rules'],
                                                     key=lambda r: r['validation'])['rule']
        assert part['accuracy'] == pytest.approx((own['label'] == own['predicted']).mean())
    assert results['levels']['subject']['accuracy'] == pytest.approx(
        (told['label'] == told['predicted']).mean())
    page = (folder/'report.html').read_text()
    assert ('What each fold chose' in page and 'Each fold chose its own threshold' in page
            and 'choose, in each fold' in page)
    assert cross_validate(best, 'physionet2016', 3, data, subject_rule='learned',
                          draws=5)['subject_rule'] == 'learned, in each fold'


def test_a_recording_without_a_cycle_is_answered_and_counted(trained, tmp_path):
    task = copied_task(trained, tmp_path)
    known = pd.read_csv(task/'recordings.csv')
    known.loc[len(known)] = (known.iloc[0].to_dict()
                             | dict(recording_id='a9999', subject_id='a9999', person_id='a9999',
                                    folder='subject_a9999/rec_a9999', label=1, cycles=0))
    known.to_csv(task/'recordings.csv', index=False)
    _accept_changes(task)
    results = cross_validate(best_of(trained), 'physionet2016', 3, tmp_path,
                             tmp_path/'out', draws=5)
    told = pd.read_csv(tmp_path/'out'/'predictions_subject.csv').set_index('subject_id')
    train = known[known['person_id'].isin(
        persons_of_fold(tmp_path/'out', told.loc['a9999', 'fold'])) & (known['cycles'] > 0)]
    expected = (train['label'].sum() + 1)/(len(train) + 2)
    assert (results['fallback'] == 1 and results['n']['recording'] == len(known)
            and results['missing'] == dict(subjects=[], recordings=[]))
    assert (told.loc['a9999', 'probability_abnormal'] == pytest.approx(expected, abs=1e-6)
            and told.loc['a9999', 'units_below'] == 0)
    assert any('1 recordings without a cycle are answered' in n for n in results['notes'])


@pytest.mark.parametrize('aggregation', ['mean', 'attention'])
def test_models_of_bags(trained, tmp_path, aggregation):
    data = trained/'downstream'
    finetune(task='physionet2016', pretrained='none', data_dir=data, output_dir=tmp_path, epochs=1,
             encoder_type='cnn', experiment_name=aggregation,
             **{'training.aggregation': aggregation, 'training.bag_level': 'subject',
                'training.cycles_per_bag': 2})
    results = cross_validate(tmp_path/f'physionet2016_{aggregation}'/'best_model.pt',
                             'physionet2016', 3, data, draws=5)
    told = pd.read_csv(f'{results["output_dir"]}/predictions_subject.csv').set_index('subject_id')
    from pahcl.models.checkpoints import load_classifier
    from pahcl.models.classifier import predict_cycles
    from pahcl.data.loader import Cycles
    splits = [Cycles.from_task(data/'physionet2016', s) for s in ('train', 'val', 'test')]
    # the same answers as of the fold's model, asked about everybody
    for fold, own in told.groupby('fold'):
        model = load_classifier(f'{results["output_dir"]}'
                                f'/folds/physionet2016_{fold.replace(" ", "_")}/best_model.pt')[0]
        for cycles in splits:
            said = pd.Series(predict_cycles(model, cycles)['subject'][:, 1],
                             np.unique(cycles.table['subject_id'].astype(str)))
            asked = own.index.intersection(said.index)
            assert np.allclose(own.loc[asked, 'probability_abnormal'], said[asked], atol=1e-5)
    assert any(f'by {aggregation}' in n for n in results['notes'])


def test_a_device_is_tested_by_models_that_never_heard_it(trained, capsys):
    best, data = best_of(trained), trained/'downstream'
    known = pd.read_csv(data/'physionet2016'/'recordings.csv')
    results = cross_validate(best, 'physionet2016', 'device', data, draws=20)
    folder = best.parent/'cross_validation_physionet2016_device'
    told = pd.read_csv(folder/'predictions_subject.csv')
    letters = sorted(known['recording_id'].str[0].unique())
    assert ([p['fold'] for p in results['folds']] == [f'folder {l}' for l in letters]
            and sorted(told['subject_id']) == sorted(known['subject_id']))
    for letter in letters:
        learnt = persons_of_fold(folder, f'folder {letter}')
        of = known.set_index('person_id')['recording_id'].str[0]
        assert learnt and letter not in set(of[list(learnt)])
    for p in results['folds']:
        own = told[told['fold'] == p['fold']]
        alone = classification_metrics(own['label'], own.filter(like='probability').to_numpy(), 2)
        assert all(p[m] == pytest.approx(alone[m], abs=1e-5) if alone[m] is not None else p[m]
                   is None and p['reasons'][m] for m in ('accuracy', 'auroc', 'uar', 'f1_macro'))
    assert ('never occurs in training' in results['shortcuts']['folder letter']['reason']
            and results['shortcuts']['heart rate']['auroc'] is not None)
    page = (folder/'report.html').read_text()
    assert ('each device left out of training' in page
            and all(f'folder {l}' in page for l in letters))


def test_a_class_that_a_device_lacks_is_empty_with_its_reason(trained, tmp_path):
    task = copied_task(trained, tmp_path)
    tables = {n: pd.read_csv(task/f'{n}.csv') for n in ('recordings', 'cycles')}
    letter = tables['recordings']['recording_id'].str[0].iloc[0]
    for name, table in tables.items():
        table[(table['recording_id'].str[0] != letter) | (table['label'] == 0)].to_csv(
            task/f'{name}.csv', index=False)
    kept = set(pd.read_csv(task/'cycles.csv')['subject_id'].astype(str))
    for name in ('train', 'val', 'test'):
        lines = (task/f'{name}.csv').read_text().splitlines(keepends=True)
        (task/f'{name}.csv').write_text(''.join(
            line for line in lines if 'cycle_' not in line or line.split(',')[0] in kept))
    _accept_changes(task)
    results = cross_validate(best_of(trained), 'physionet2016', 'device', tmp_path,
                             tmp_path/'out', draws=5)
    part = next(p for p in results['folds'] if p['fold'] == f'folder {letter}')
    assert (part['support'][1] == 0 and part['auroc'] is None and part['reasons']['auroc']
            == 'the truth has one class only' and part['accuracy'] is not None)
    assert json.loads((tmp_path/'out'/'metrics.json').read_text())['folds'][0]['auroc'] is None
    assert any(f'folder {letter}: auroc is undefined: the truth has one class only' in n
               for n in results['notes'])


def test_pretraining_persons_are_neither_trained_on_nor_tested_where_their_device_is(trained):
    known = pd.read_csv(trained/'downstream'/'physionet2016'/'recordings.csv')
    met = set(known.loc[known['split'] == 'train', 'person_id'].iloc[:2])
    planned = _plan_folds('device', known, Task.open(trained/'downstream', 'physionet2016'), met)
    for device, fold in planned.items():
        own = set(known.loc[known['recording_id'].str[0] == device[-1], 'person_id'])
        assert ({p for p, s in fold.items() if s == 'test'} == own - met
                and not (met & own) & set(fold))
        assert all(fold[p] == 'train' for p in met - own)
    everybody_of = {p for p in known.loc[known['recording_id'].str[0] == sorted(planned)[0][-1],
                                         'person_id']}
    device, own = (dict(zip(known['person_id'], 'folder '+known['recording_id'].str[0])),
                   dict.fromkeys(known['person_id'], 'val'))
    # nobody of it may be tested
    assert sorted(planned)[0] not in _assign_device_splits(device, own, everybody_of)


def test_what_cannot_be_cross_validated_is_said(trained, monkeypatch, capsys):
    best, data = best_of(trained), str(trained/'downstream')
    run = lambda *flags: pahcl_evaluate(['--checkpoint', str(best), '--task', 'physionet2016',
                                         '--data-dir', data, *flags])
    for flags, why in [(['2'], 'give 3 or more'), (['folder'], "is 'folder'"),
                       (['3', '--threshold', 'best'], '--threshold is best'),
                       (['3', '--threshold', 'cost'], 'has a cost')]:
        assert run('--cross-validate', *flags) == 2 and why in capsys.readouterr().err
    assert (run('--cross-validate', '3', '--subject-rule', 'any_present') == 1
            and 'any_present' in capsys.readouterr().err)
    monkeypatch.setattr('pahcl.studies.fold_plans._assign_fold_splits',
                        lambda *args: {'fold 0': {'2016-a-C1': 'val', '2016-a-C4': 'test'}})
    assert (run('--cross-validate', '3', '--subject-rule', 'learned') == 1
            and 'the validation persons of fold 0 are all of class' in capsys.readouterr().err)
    everybody = set(
        pd.read_csv(trained/'downstream'/'physionet2016'/'cycles.csv')['person_id'].astype(str))
    monkeypatch.undo()
    monkeypatch.setattr('pahcl.studies.cross_validation._pretraining_persons',
                        lambda saved: (everybody, ''))
    assert (run('--cross-validate', '3') == 1
            and 'took part in pretraining' in capsys.readouterr().err)
    assert (run('--cross-validate', 'device') == 1
            and 'nobody is left to choose the epoch' in capsys.readouterr().err)


def test_a_task_with_one_device_is_refused(monkeypatch, tmp_path, capsys):
    "CirCor, before anything is trained"
    task = tmp_path/'circor_murmur'
    task.mkdir()
    pd.DataFrame(dict(recording_id=['2530_AV'], subject_id=['2530'], person_id=['2530'], label=[0],
                      split=['train'])).to_csv(task/'recordings.csv', index=False)
    (task/'task_config.json').write_text(
        json.dumps(dict(task_name='circor_murmur', dataset='circor',
                        label_map=dict(Present=0, Absent=1, Unknown=2))))
    (tmp_path/'model.pt').touch()
    saved = dict(task='circor_murmur', config=dict(pretrain=dict(checkpoint_path='none')))
    monkeypatch.setattr('pahcl.studies.cross_validation.load_classifier',
                        lambda path: (None, saved))
    assert pahcl_evaluate(['--checkpoint', str(tmp_path/'model.pt'), '--task', 'circor_murmur',
                           '--data-dir', str(tmp_path), '--cross-validate', 'device']) == 2
    told = capsys.readouterr().err
    assert 'circor_murmur was recorded with one device' in told and '--cross-validate 5' in told
