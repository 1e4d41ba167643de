"""pahcl_represent and pahcl_evaluate --robustness on simulated recordings, and completeness of the
saliency of a real encoder
"""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from pahcl.data.inputs import open_cycles
from pahcl.data.signal import bandpass
from pahcl.data.tasks import Task
from pahcl.models.checkpoints import (
    classifier_checkpoint, load_classifier, save_checkpoint)
from pahcl.models.encoders import build_encoder
from pahcl.models.classifier import Classifier
from pahcl.evaluate import pahcl_evaluate
from pahcl.data.loader import Cycles
from pahcl.evaluate import pahcl_represent
from pahcl.studies.feature_map import _cycle_heart_rates
from pahcl.studies.perturbations import (
    _change_recordings, _list_conditions, _PerturbedCycles)
from pahcl.studies.robustness import evaluate_robustness
from pahcl.studies.saliency import _class_margin, _explain_cycles, _integrated_gradients
from pahcl.training.run_folders import _sort_files


@pytest.fixture(scope='module')
def trained(trained_on): return trained_on('pascal', 20, 2)


def test_represent(trained):
    best = trained/'outputs'/'pascal_downstream'/'best_model.pt'
    assert pahcl_represent(['--checkpoint', str(best), '--task', 'pascal', '--data-dir',
                            str(trained/'downstream'), '--processed-dir', str(trained/'processed'),
                            '--points', '40', '--cycles-per-recording', '2']) == 0
    folder = best.parent/'representation_pascal_test'
    assert {p.name for p in folder.iterdir()} == {'tsne.png', 'anomaly_subject.csv',
                                                  'representation.json', 'report.html',
                                                  'saliency.png', 'saliency.csv'}
    kept = json.loads((folder/'representation.json').read_text())
    assert ({a['detector'] for a in kept['anomaly']} == {'mahalanobis', 'cosine', 'neighbours'}
            and kept['saliency']['median_missing'] < .1)
    assert all(sum(s) == pytest.approx(1) for s in kept['saliency']['states'].values())


def test_heart_rates_agree_with_the_beats(trained):
    cycles = Cycles.from_task(trained/'downstream'/'pascal', 'train')
    alone, known = _cycle_heart_rates(cycles), _cycle_heart_rates(cycles, trained/'processed')
    both = ~np.isnan(alone)
    assert (not np.isnan(known).any() and both.any() and np.abs(alone[both]-known[both]).max() < 1
            and (known[~both] <= 76).all())


def test_completeness_of_an_encoder(trained):
    model, _ = load_classifier(trained/'outputs'/'pascal_downstream'/'best_model.pt')
    cycles = Cycles.from_task(trained/'downstream'/'pascal', 'test')
    b = cycles.batch(np.arange(2))
    answer = _class_margin(model, b['valid_length'], 1)
    # a hardly trained model: its answers are close to those to silence, and
    # small errors large beside them
    shares = _integrated_gradients(answer, b['x'], 128)
    with torch.no_grad(): whole = answer(b['x'])-answer(torch.zeros_like(b['x']))
    assert torch.allclose(shares.sum((1, 2)), whole, atol=.03*float(whole.abs().max()))
    assert not shares[:, 0][b['phases'] == 0].any()
    one, many = (_explain_cycles(model, cycles, [2], [1], 16).shares,
                 _explain_cycles(model, cycles, np.arange(4), [1]*4, 16, batch_size=3).shares)
    assert np.allclose(one[0], many[2], atol=1e-6)


def test_saliency_of_a_model_that_pools_by_state(trained):
    """Its answer hangs on the states of each cycle: shares add up to it, and a sample of padding
    has none.
    """
    torch.manual_seed(0)
    model = Classifier(load_classifier(trained/'outputs'/'pascal_downstream'/'best_model.pt')[0]
                       .encoder, 3, pooling='phases').eval()
    cycles = Cycles.from_task(trained/'downstream'/'pascal', 'test')
    found = _explain_cycles(model, cycles, np.arange(3), [0, 1, 2], 256)
    shares, phases = found.shares, found.phases
    b = cycles.batch(np.arange(3))
    for row, c in enumerate((0, 1, 2)):
        answer = _class_margin(model, b['valid_length'][[row]], c, b['phases'][[row]])
        with torch.no_grad():
            whole = float(answer(b['x'][[row]])-answer(torch.zeros_like(b['x'][[row]])))
        # against all sizes: the whole may be a small difference
        assert abs(shares[row].sum()-whole) < .03*np.abs(shares[row]).sum()
    assert not shares[phases == 0].any()


def test_changed_cycles_do_not_depend_on_the_batch(trained):
    cycles = Cycles.from_task(trained/'downstream'/'pascal', 'test')
    for change in _list_conditions(cycles).values():
        if change is None: continue
        changed = _PerturbedCycles(cycles, change)
        whole, one = changed.batch(np.arange(5))['x'], changed.batch([3])['x']
        assert (torch.allclose(whole[3], one[0], atol=1e-5)
                and not whole[:, 0][cycles.batch(np.arange(5))['phases'] == 0].any())


def test_robustness_script(trained):
    best = trained/'outputs'/'pascal_downstream'/'best_model.pt'
    assert pahcl_evaluate(['--checkpoint', str(best), '--task', 'pascal', '--data-dir',
                           str(trained/'downstream'), '--robustness']) == 0
    folder = best.parent/'evaluation_pascal_test'
    table = pd.read_csv(folder/'robustness.csv')
    assert (table['kind'].value_counts().loc[['stored', 'noise', 'sample rate']].tolist()
            == [1, 4, 4] and {'device left out', 'device alone'} <= set(table['kind']))
    kept = json.loads((folder/'metrics.json').read_text())['levels']['subject']
    assert table.loc[0, 'accuracy'] == pytest.approx(kept['accuracy'])
    assert {f'robustness{e}'
            for e in ('.csv', '.md', '.tex', '.html', '.png')} <= {p.name for p in folder.iterdir()}
    assert not _sort_files(best.parent)[1]   # all of it may be replaced


@pytest.mark.parametrize('way', [
    dict(frontend='logmel', unit='window', window_s=1., mel_bands=20), dict(unit='beats')])
def test_recordings_are_changed_where_windows_are_heard(trained, way):
    "A change of nothing gives back what was packed; noise is as strong as it says."
    folder = trained/'downstream'/'pascal'
    windows = open_cycles(folder, 'test', way)
    windows = windows.subset(np.arange(3, len(windows)))
    rows = np.arange(len(windows))
    again = _change_recordings(windows, folder, lambda x, valid, rows, rate, heard: x)
    assert torch.equal(again.batch(rows)['x'], windows.batch(rows)['x'])
    change, ratios = _list_conditions(windows)['noise', '5 dB'], []
    def measure(x, valid, rows, rate, heard):
        noise = change(x, valid, rows, rate, heard)-x
        heart = bandpass(x[0], rate, *heard)
        ratios.append(10*np.log10(np.mean(heart**2., dtype=float)/np.mean(noise**2.)))
        return x+noise
    noisy = _change_recordings(windows, folder, measure)
    assert len(noisy) == len(windows) and np.abs(np.array(ratios)-5).max() < .05
    assert not torch.equal(noisy.batch(rows)['x'], windows.batch(rows)['x'])


def test_robustness_of_a_model_of_windows(trained, tmp_path):
    way = dict(frontend='logmel', unit='window', window_s=1.)
    torch.manual_seed(0)
    model = Classifier(build_encoder('logmel_cnn', cnn_channels=[4, 4, 4, 4]), 5)
    config, task = dict(data=way), Task.open(trained/'downstream', 'pascal')
    save_checkpoint(tmp_path/'best_model.pt', classifier_checkpoint(
        model, 'pascal', task.label_map, config, ['p1']))
    table = evaluate_robustness(tmp_path/'best_model.pt', 'pascal', trained/'downstream', draws=10)
    kinds = table['kind'].value_counts().loc[['stored', 'noise', 'sample rate']]
    assert kinds.tolist() == [1, 4, 4]
    page = (tmp_path/'evaluation_pascal_test'/'robustness.html').read_text()
    assert 'over each recording' in page and 'over each cycle' not in page


def test_shares_are_those_of_captum(trained):
    """captum is no dependency: where it is installed it is an independent oracle, with the same
    rule and the same steps.
    """
    attr = pytest.importorskip('captum.attr', reason='captum is not installed')
    model, _ = load_classifier(trained/'outputs'/'pascal_downstream'/'best_model.pt')
    b = Cycles.from_task(trained/'downstream'/'pascal', 'test').batch(np.arange(4))
    answer = _class_margin(model, b['valid_length'], 1)
    theirs = attr.IntegratedGradients(
        lambda x: _class_margin(model, b['valid_length'].repeat(len(x)//4), 1)(x)).attribute(
            b['x'], n_steps=12, method='riemann_middle')
    assert torch.allclose(_integrated_gradients(answer, b['x'], 12, power=1), theirs,
                          atol=1e-5*float(theirs.abs().max()))
