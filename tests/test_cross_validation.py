"A whole cross-validation of a small model on simulated recordings"
import json

import pandas as pd
import pytest
from pahcl.basics import read_json
from pahcl.cross_validation import cross_validate
from pahcl.evaluate import pahcl_evaluate


@pytest.fixture(scope='module')
def trained(trained_on): return trained_on('physionet2016', 12, 1)


def test_everybody_is_tested_once_and_by_strangers(trained, capsys):
    best, data = trained/'outputs'/'physionet2016_downstream'/'best_model.pt', trained/'downstream'
    assert pahcl_evaluate(['--checkpoint', str(best), '--task', 'physionet2016', '--data-dir', str(data), '--cross-validate', '3']) == 0
    folder = best.parent/'cross_validation_physionet2016_3'
    told, known = pd.read_csv(folder/'predictions_subject.csv'), pd.read_csv(data/'physionet2016'/'cycles.csv')
    assert sorted(told['person_id']) == sorted(known['person_id'].unique())
    from pahcl.classifier import load_model
    for k in range(3):
        learnt = set(load_model(folder/'folds'/f'physionet2016_fold_{k}'/'best_model.pt')[1]['training_persons'])
        config = read_json(folder/'folds'/f'physionet2016_fold_{k}'/'final_metrics.json')
        assert config['training_subjects'] == len(learnt) == 4
    assert not list(folder.glob('data_*')) and len(json.loads((folder/'metrics.json').read_text())['folds']) == 3
    before = (folder/'folds'/'physionet2016_fold_0'/'best_model.pt').stat().st_mtime_ns
    cross_validate(best, 'physionet2016', 3, data, draws=10)   # finished runs are not repeated
    assert (folder/'folds'/'physionet2016_fold_0'/'best_model.pt').stat().st_mtime_ns == before


def test_what_cannot_be_cross_validated_is_said(trained, monkeypatch, capsys):
    best, data = trained/'outputs'/'physionet2016_downstream'/'best_model.pt', str(trained/'downstream')
    run = lambda *flags: pahcl_evaluate(['--checkpoint', str(best), '--task', 'physionet2016', '--data-dir', data, *flags])
    assert run('--cross-validate', '2') == 2 and run('--cross-validate', '3', '--subject-rule', 'choose') == 2 and run('--cross-validate', '3', '--threshold', 'f1') == 2
    everybody = set(pd.read_csv(trained/'downstream'/'physionet2016'/'cycles.csv')['person_id'].astype(str))
    monkeypatch.setattr('pahcl.cross_validation.pretraining_persons', lambda saved: (everybody, ''))
    assert run('--cross-validate', '3') == 1 and 'took part in pretraining' in capsys.readouterr().err
