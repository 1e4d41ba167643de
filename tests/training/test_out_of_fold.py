"""Out-of-fold training: nobody is predicted by a model that met them, a killed run goes on to the
bit, jobs change nothing; and the layer that comes of it decides alike in evaluations, predictions
and ensembles
"""
import json
import numpy as np, pandas as pd, pytest, torch, yaml
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError, UsageError
from pahcl.data.recordings import load_recordings
from pahcl.data.heart_sounds import simulate_recording
from pahcl.data.simulation import simulate_dataset
from pahcl.data.splitting import prepare
from pahcl.data.tasks import Task
from pahcl.evaluation.embedding import embed
from pahcl.evaluation.evaluator import _default_rule, evaluate, open_model, open_split
from pahcl.evaluation.prediction import predict
from pahcl.models.checkpoints import load_checkpoint, save_checkpoint
from pahcl.models.decision_layer import DecisionLayer
from pahcl.models.hub import from_pretrained
from pahcl.models.subject_evidence import _subject_evidence, _task_recording_facts
from pahcl.segmentation.preprocessing import preprocess
from pahcl.studies.ensemble import ensemble
from pahcl.testing.made import _made_cycles, _make_processed_folder, _make_recordings
from pahcl.training import out_of_fold
from pahcl.training.finetuning import finetune
from pahcl.training.out_of_fold import _average_folds, _deal_persons, _make_fold

pytestmark = pytest.mark.usefixtures('quiet', 'one_thread')
TINY = {'pretrained': 'none', 'encoder_type': 'cnn', 'model.cnn_channels': [4, 6],
        'model.cnn_kernel_sizes': [7, 5], 'model.cnn_strides': [8, 8], 'classifier.hidden_dim': 8,
        'training.num_epochs': 1, 'training.warmup_epochs': 0, 'training.batch_size': 16,
        'training.num_workers': 0, 'training.learning_rate': 1e-2, 'decision.folds': 2,
        'task': 'circor_murmur'}

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Thirty made children with two cycles a recording, and 2016 likewise."
    folder = tmp_path_factory.mktemp('folds')
    recordings = _make_recordings(('circor', 'physionet2016'), persons=30)
    _make_processed_folder(folder/'processed', recordings, cycles=2)
    prepare('all', folder/'no raw', folder/'processed', folder/'downstream')
    return folder

def tune(made, out, **more):
    return finetune({'data': {'processed_dir': str(made/'processed')}}, output_dir=out,
                    **{**TINY, 'data_dir': made/'downstream', **more})

@pytest.fixture(scope='module')
def first(made):
    tune(made, made/'first')
    return made/'first'/'circor_murmur_downstream'

def same(one, other):
    "Whether two checkpoints hold the same, to the bit."
    if isinstance(one, dict): return one.keys() == other.keys() and all(
        same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor): return torch.equal(one, other)
    return one == other

def weights_and_layer(run):
    saved = load_checkpoint(run/'best_model.pt')
    return {k: saved[k] for k in ('model_state_dict', 'decision_layer', 'validation')}

class TableOnly:
    def __init__(self, table): self.table = table.reset_index(drop=True)
    def subset(self, rows): return TableOnly(self.table.iloc[np.arange(len(self))[rows]])
    def __len__(self): return len(self.table)

@settings(deadline=None, max_examples=15)
@given(st.integers(2, 6), st.integers(24, 40), st.integers(0, 99), st.booleans())
def test_nobody_is_predicted_by_who_met_them(folds, subjects, seed, both):
    table = _made_cycles(subjects=subjects, cycles=2, seed=seed)[0]
    person = table['subject_id'].astype(int)//2   # of two visits each
    table = table.assign(person_id=person.astype(str))
    chooses = person % 4 == 3   # and trains as well, where both do
    data = dict(train=TableOnly(table if both else table[~chooses]), val=TableOnly(table[chooses]))
    dealt = _deal_persons(data['train'].table, folds, seed) if folds < 5 or both else None
    if dealt is None: return
    made = [_make_fold(data, dealt, k) for k in range(folds)]
    for fold in made:
        for cycles in fold.learn.values(): assert not {*cycles.table.person_id} & {*fold.persons}
    rows = np.concatenate([f.held.table['whole_row'] for f in made])
    assert sorted(rows) == list(range(len(data['train'])))

def test_the_runs_of_the_folds(first):
    held = []
    for k in range(2):
        run = first/'folds'/f'fold_{k}'
        assert {'last.pt', 'final_model.pt'}.isdisjoint(p.name for p in run.iterdir())
        told = json.loads((run/'final_metrics.json').read_text())['held_out_persons']
        met = load_checkpoint(run/'best_model.pt')['training_persons']
        assert told and not {*told} & {*met} and {*told} | {*met} <= {
            *load_checkpoint(first/'best_model.pt')['training_persons']}
        held += told
    saved = load_checkpoint(first/'best_model.pt')
    assert sorted(held) == sorted(saved['training_persons'])
    assert same(saved['decision_layer'], load_checkpoint(first/'final_model.pt')['decision_layer'])
    layer = DecisionLayer.from_plain(saved['decision_layer'])
    assert layer.persons == len(held) and layer.folds == 2 and layer.official
    # what the checkpoint keeps is out of fold: all training subjects, by persons as numbers
    kept = saved['validation']['subject']
    assert len(set(kept['person'].tolist())) == len(held) and len(kept['label']) >= len(held)

def test_goes_on_where_it_was_killed(made, first, tmp_path, monkeypatch):
    "In the second fold, and after the folds: the end is the same to the bit."
    run, train = tmp_path/'circor_murmur_downstream', out_of_fold._save_predictions
    calls = []
    def die(path, answers):
        calls.append(path)
        if len(calls) == 2: raise KeyboardInterrupt
        train(path, answers)
    monkeypatch.setattr(out_of_fold, '_save_predictions', die)
    with pytest.raises(KeyboardInterrupt): tune(made, tmp_path)
    assert (run/'folds'/'fold_0'/'predictions.npz').exists() and not (run/'best_model.pt').exists()
    monkeypatch.setattr('pahcl.training.finetuning._test_best_epoch', die)
    with pytest.raises((KeyboardInterrupt, TypeError)): tune(made, tmp_path)
    assert len([c for c in calls if 'fold_0' in str(c)]) == 1   # was not trained again
    monkeypatch.undo()
    tune(made, tmp_path)
    assert same(weights_and_layer(run), weights_and_layer(first))

def test_jobs_change_nothing(made, first, tmp_path):
    tune(made, tmp_path, **{'decision.jobs': 2})
    run = tmp_path/'circor_murmur_downstream'
    assert same(weights_and_layer(run), weights_and_layer(first))
    tune(made, tmp_path)   # one at a time: still the same experiment, and it is finished
    # a key that an older version did not write means its default; another value is another run
    written = yaml.safe_load((run/'config.yaml').read_text())
    del written['decision']['penalty']
    (run/'config.yaml').write_text(yaml.safe_dump(written))
    tune(made, tmp_path)
    with pytest.raises(PahclError, match='decision.penalty is 0.03 there and 1.0 here'):
        tune(made, tmp_path, **{'decision.penalty': 1.})

@pytest.mark.parametrize('more', [
    {'pretrained': 'packaged', 'linear_eval': True, 'encoder_type': None,
     'model.cnn_channels': None, 'model.cnn_kernel_sizes': None, 'model.cnn_strides': None},
    {'training.aggregation': 'attention'}, {'few_shot': True, 'shot_ratio': .6},
    {'task': 'physionet2016'}])
def test_other_ways_of_training(made, tmp_path, more):
    given = {k: v for k, v in {**TINY, **more}.items() if v is not None}
    finetune(None, output_dir=tmp_path, data_dir=made/'downstream', **given)
    [run] = tmp_path.iterdir()
    layer = DecisionLayer.from_plain(load_checkpoint(run/'best_model.pt')['decision_layer'])
    assert layer.scores['subjects'] > 3
    if given['task'] == 'physionet2016':   # a recording is a subject: the layer's answer is its own
        found = evaluate(run/'best_model.pt', given['task'], made/'downstream', draws=10)
        assert found['subject_rule'] == 'fitted' and found['decision']['folds'] == 2
        levels = [pd.read_csv(f'{found["output_dir"]}/predictions_{l}.csv')
                  for l in ('recording', 'subject')]
        for column in ('predicted', 'probability_abnormal'):
            assert levels[0][column].tolist() == levels[1][column].tolist()

def test_what_cannot_be_is_said(made, tmp_path):
    with pytest.raises(PahclError, match='decision.folds is 15, but there are'):
        tune(made, tmp_path, **{'decision.folds': 15})
    with pytest.raises(UsageError, match='decision.folds is 1; give 0'):
        tune(made, tmp_path/'b', **{'decision.folds': 1})
    with pytest.raises(UsageError, match='decision.goal is'):
        tune(made, tmp_path/'c', **{'decision.goal': [1., 2.]})

def test_evaluations_use_the_layer(made, first, tmp_path):
    best, data = first/'best_model.pt', made/'downstream'
    found = evaluate(best, 'circor_murmur', data, output_dir=tmp_path/'e', draws=10)
    cycles, task = open_split('circor_murmur', data, 'test')
    model = open_model(best, task)
    evidence = _subject_evidence(model.predict(cycles), _task_recording_facts(task))
    table = pd.read_csv(tmp_path/'e'/'predictions_subject.csv', dtype=dict(subject_id=str))
    assert table['predicted'].tolist() == model.layer.decide(evidence).tolist()
    probabilities = table[[f'probability_{c}' for c in ('Present', 'Absent', 'Unknown')]]
    assert np.allclose(probabilities, model.layer.probabilities(evidence), atol=1e-6)
    assert any('layer fitted on' in note for note in found['notes'])
    assert {r['rule'] for r in found['rules']} >= {'mean', 'learned', 'fitted'}
    assert (_default_rule(model), _default_rule(model, 'mean')) == ('fitted', 'mean')

def test_the_average_of_the_folds(made, first, tmp_path):
    "Its log odds are the mean of theirs; evaluations, embeddings and the hub take it."
    path = _average_folds(first, tmp_path/'average.pt')
    members = [first/'folds'/f'fold_{k}'/'best_model.pt' for k in range(2)]
    cycles, task = open_split('circor_murmur', made/'downstream', 'test')
    said = lambda p: np.log(open_model(p, task).predict(cycles).probabilities)
    mean = np.mean([said(p) for p in members], 0)
    mean -= np.log(np.exp(mean).sum(1, keepdims=True))
    assert np.allclose(said(path), mean, atol=1e-5)
    model = open_model(path, task)
    whole = load_checkpoint(first/'best_model.pt')
    assert model.saved['training_persons'] == whole['training_persons']
    # who decides is the layer of the run, and a reader is told whose mean it is
    found = evaluate(path, 'circor_murmur', made/'downstream', output_dir=tmp_path/'e', draws=10)
    assert found['subject_rule'] == 'fitted'
    assert any('mean of 2 networks' in note for note in found['notes'])
    # features of both stand behind each other, also where a folder of the Hub is opened
    signal = simulate_recording(seconds=4, sample_rate=4000, seed=1)[0]
    each = [embed(signal, p, sample_rate=4000) for p in members]
    assert np.array_equal(embed(signal, path, sample_rate=4000), np.concatenate(each, 1))
    model.network.save_pretrained(tmp_path/'hub')
    again = from_pretrained(tmp_path/'hub')
    assert same(dict(again.state_dict()), dict(model.network.state_dict()))
    alone = from_pretrained(members[0], num_classes=0)
    assert from_pretrained(tmp_path/'hub', num_classes=0).out_dim == 2*alone.out_dim
    assert 'mean of 2 networks' in (tmp_path/'hub'/'README.md').read_text()
    with pytest.raises(PahclError, match='without decision.folds'):
        _average_folds(members[0].parent)
    with pytest.raises(UsageError, match='decision.folds is 0'):
        tune(made, tmp_path, **{'decision.networks': 'folds', 'decision.folds': 0})

def test_other_classes_are_decided_by_the_mean(made, first, tmp_path):
    saved = load_checkpoint(first/'best_model.pt')
    swapped = dict(Absent=0, Present=1, Unknown=2)   # the same names, other numbers
    save_checkpoint(tmp_path/'other.pt', saved | dict(label_map=swapped))
    found = evaluate(tmp_path/'other.pt', 'circor_murmur', made/'downstream',
                     output_dir=tmp_path/'e', draws=10)
    assert found['subject_rule'] == 'mean'
    assert any('the decision layer of the checkpoint is of' in note for note in found['notes'])
    with pytest.raises(PahclError, match='none for these classes'):
        evaluate(tmp_path/'other.pt', 'circor_murmur', made/'downstream', subject_rule='fitted')

def test_ensembles_average_layers(made, first, tmp_path):
    tune(made, tmp_path, seed=7)
    other = tmp_path/'circor_murmur_downstream'/'best_model.pt'
    paths = sorted([first/'best_model.pt', other])
    found = ensemble(paths, 'circor_murmur', made/'downstream', output_dir=tmp_path/'e', draws=10)
    assert found['subject_rule'] == 'fitted' and any('decision layers' in n for n in found['notes'])
    cycles, task = open_split('circor_murmur', made/'downstream', 'test')
    facts, values = _task_recording_facts(task), []
    for path in paths:
        model = open_model(path, task)
        values.append(model.layer.probabilities(_subject_evidence(model.predict(cycles), facts)))
    table = pd.read_csv(tmp_path/'e'/'predictions_subject.csv')
    assert np.allclose(table['probability_Present'], np.mean(values, 0)[:, 0], atol=1e-6)

@pytest.fixture(scope='module')
def heard(tmp_path_factory):
    "Twenty simulated children, prepared."
    folder = tmp_path_factory.mktemp('heard')
    simulate_dataset(folder/'raw', 'circor', subjects=20, seconds=4, seed=2)
    preprocess(folder/'raw', folder/'processed', num_workers=1)
    prepare('circor', folder/'raw', folder/'processed', folder/'downstream')
    return folder

WINDOWS = {'data.frontend': 'logmel', 'data.unit': 'window', 'data.window_s': 1.,
           'model.cnn_strides': [2, 2], 'decision.networks': 'folds'}

@pytest.mark.parametrize('more', [{}, WINDOWS], ids=['cycles', 'windows'])
def test_predictions_and_evaluations_agree(heard, tmp_path, more):
    "The same children, once prepared and once as files of one's own."
    tune(heard, tmp_path/'out', **more)
    best = tmp_path/'out'/'circor_murmur_downstream'/'best_model.pt'
    evaluate(best, 'circor_murmur', heard/'downstream', output_dir=tmp_path/'e', draws=10)
    theirs = pd.read_csv(tmp_path/'e'/'predictions_subject.csv', dtype=dict(subject_id=str))
    own = Task.open(heard/'downstream', 'circor_murmur').recordings.query('split == "test"')
    paths = load_recordings(heard/'raw').set_index('recording_id').path
    own.rename(columns=dict(subject_id='subject'))[['recording_id', 'subject', 'location']].assign(
        file=[paths[r] for r in own.recording_id]).to_csv(tmp_path/'who.csv', index=False)
    found = predict([paths[r] for r in own.recording_id], best, table=tmp_path/'who.csv')
    ours = found.subjects.set_index('subject_id').loc[theirs['subject_id']]
    for name in ('Present', 'Absent', 'Unknown'):
        assert np.allclose(ours[f'probability_{name}'], theirs[f'probability_{name}'], atol=1e-6)
    said = ours['decision'].notna().to_numpy()
    assert said.any() and (ours['decision'].to_numpy() == theirs['predicted_name'])[said].all()
    assert ours['evidence'][said].str.contains('for it').all()
    assert 'layer fitted on' in found.model['decisions']
    forced = predict([paths[r] for r in own.recording_id], best, table=tmp_path/'who.csv',
                     threshold=0.)
    assert (forced.subjects['decision'].dropna() == 'Present').all()
    assert 'evidence' not in forced.subjects
