"The classifiers that come with the package: what the files hold, what they answer, whom they met."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pahcl.core.basics import PahclError, read_json
from pahcl.data.loader import Cycles
from pahcl.data.datasets import DATASETS, TASKS
from pahcl.data.simulation import simulate_dataset
from pahcl.evaluation.evaluator import note_trained_persons
from pahcl.models.checkpoints import load_checkpoint, load_classifier, persons_trained_on
from pahcl.models.classifier import predict_cycles
from pahcl.models.packaged import _save_packaged
from pahcl.models.pretrained import load_pretrained_encoder, resolve_checkpoint
from pahcl.segmentation.preprocessing import preprocess

find = lambda task: resolve_checkpoint('packaged', task=task)
PACKAGED = sorted(p.stem for p in find(None).parent.glob('*.pt') if p != find(None))


@pytest.fixture(scope='module')
def cycles(tmp_path_factory, quiet):
    folder = tmp_path_factory.mktemp('packaged')
    simulate_dataset(folder/'raw', 'circor', subjects=9, seed=0, seconds=3)
    preprocess(folder/'raw', folder/'processed', num_workers=1)
    return Cycles.from_processed(folder/'processed').subset(range(20))


@pytest.mark.parametrize('task', PACKAGED)
def test_a_file_and_its_card(task):
    saved = torch.load(find(task), weights_only=True)
    card = read_json(find(task).with_suffix('.json'))
    definition = TASKS[task]
    assert saved['task'] == card['task'] == task
    assert saved['label_map'] == card['label_map'] == definition.label_map
    assert (card['licence'], card['dataset']) == (DATASETS[definition.dataset].source.licence,
                                                  definition.dataset)
    assert 'optimiser' not in saved and 'training_state' not in saved
    # no path of the machine that made it
    assert not any(Path(p).is_absolute() for p in map(str, saved['config']['data'].values()))
    # the validation is whole, and of the epoch that the card says
    sizes, kept = card['splits']['val'], saved['validation']
    assert len(kept['recording']['label']) == sizes['recordings']
    assert len(kept['subject']['label']) == sizes['subjects']
    assert len(set(kept['subject']['person'].tolist())) == sizes['persons']
    for units in kept.values():
        p = units['probabilities']
        assert p.shape == (len(units['label']), len(definition.label_map))
        assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)
    best = max(card['tried'], key=lambda t: t['validation'][definition.primary_metric])
    assert best['variant'] == card['chosen'] and best['epoch'] == card['epoch'] == saved['epoch']
    # the card's validation score is that of the file
    from sklearn.metrics import f1_score, roc_auc_score
    y, p = (kept['subject'][k].numpy() for k in ('label', 'probabilities'))
    expected = (f1_score(y, p.argmax(1), average='macro') if definition.primary_metric == 'f1_macro'
                else roc_auc_score(y, p[:, 1]))
    assert best['validation'][definition.primary_metric] == pytest.approx(expected, abs=1e-4)
    # scores lie in their intervals
    for level, scored in card['test'].items():
        assert (scored['n'], scored['split']) == (card['splits']['test'][f'{level}s'], 'test')
        for name, (low, high) in scored['intervals'].items():
            assert low <= scored['metrics'][name] <= high


def test_all_of_them_are_small_and_no_other_is_known():
    assert PACKAGED == ['circor_murmur', 'circor_outcome', 'pascal', 'physionet2016']
    assert max(find(t).stat().st_size for t in PACKAGED) < 1.5e6
    assert sum(p.stat().st_size for p in find('pascal').parent.iterdir()) < 12e6
    assert resolve_checkpoint('packaged').stem == 'pretrained_small'
    assert resolve_checkpoint('a/b.pt', task='nonsense') == Path('a/b.pt')
    with pytest.raises(PahclError, match='no classifier of nonsense comes with pahcl, only of '
                                         +', '.join(PACKAGED)): find('nonsense')


@pytest.mark.parametrize('task', PACKAGED)
def test_answers_for_new_recordings(task, cycles):
    model, saved = load_classifier(find(task))
    answers = predict_cycles(model, cycles)
    if isinstance(answers, dict): answers = answers['subject']
    assert np.isfinite(answers).all() and answers.shape[1] == len(TASKS[task].label_map)
    assert answers.sum(1) == pytest.approx(1, abs=1e-5)
    # it serves as an encoder, too
    assert load_pretrained_encoder(find(task)).found['encoder_skipped'] == []


@pytest.mark.parametrize('task', PACKAGED)
def test_persons_met_are_named(task):
    saved, encoder = load_checkpoint(find(task)), load_checkpoint(resolve_checkpoint('packaged'))
    known = persons_trained_on(saved)
    assert persons_trained_on(encoder) <= known and saved['include_heldout_subjects']
    met = sorted(known)[0]
    table = pd.DataFrame(dict(subject_id=[met, 'new'], person_id=[met, 'new']))
    note, = note_trained_persons(saved, table)
    assert note.startswith('1 of 2 persons trained the model') and note.endswith(met)
    assert note_trained_persons(saved, table[1:]) == []


def test_the_same_content_has_the_same_bytes(tmp_path):
    "And what is in the package was written that way."
    saved = load_checkpoint(find('pascal'))
    _save_packaged(tmp_path/'other_name.pt', saved)
    assert (tmp_path/'other_name.pt').read_bytes() == find('pascal').read_bytes()
