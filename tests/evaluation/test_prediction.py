"""Predictions of one's own recordings: the numbers of an evaluation, whose recordings they are,
what happens to files that cannot be read, and the scripts
"""
import io, json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, soundfile, torch
from hypothesis import given, strategies as st
from pandas.testing import assert_frame_equal
from pahcl.core.basics import PahclError, UsageError
from pahcl.cycles import pahcl_segment
from pahcl.data.audio_files import _assign_subjects, _match_files, _subjects_from_names
from pahcl.data.recordings import load_recordings, read_annotation
from pahcl.data.simulation import simulate_dataset
from pahcl.data.splitting import prepare
from pahcl.data.tasks import Task
from pahcl.evaluate import pahcl_predict
from pahcl.evaluation.evaluator import evaluate, open_model, open_split
from pahcl.evaluation.prediction import predict
from pahcl.models.checkpoints import classifier_checkpoint, save_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.encoders import build_encoder
from pahcl.models.pretrained import _WEIGHTS
from pahcl.segmentation.preprocessing import preprocess
from pahcl.segmentation.segmenter import segment

pytestmark = pytest.mark.usefixtures('quiet', 'one_thread')
PROBABILITIES = [f'probability_{c}' for c in ('Present', 'Absent', 'Unknown')]

def small_checkpoint(path, label_map, validation=None, task='circor_murmur', **head):
    torch.manual_seed(1)
    model = Classifier(build_encoder('cnn', cnn_channels=[4, 8, 8, 8]), len(label_map), **head)
    # far from even, so that classes differ between recordings
    torch.nn.init.normal_(list(model.classifier.parameters())[-2], std=2.)
    saved = classifier_checkpoint(model, task, label_map, {}, ['p1'])
    save_checkpoint(path, saved | (dict(validation=validation) if validation else {}))
    return path

@pytest.fixture(scope='module')
def house(tmp_path_factory, quiet):
    "CirCor's layout simulated, prepared, one recording silent; its test recordings in `clinic`"
    folder = tmp_path_factory.mktemp('predict')
    simulate_dataset(folder/'raw', 'circor', subjects=20, seconds=4, seed=2)
    soundfile.write(load_recordings(folder/'raw').path.iloc[-1], np.zeros(4*4000), 4000)
    preprocess(folder/'raw', folder/'processed', num_workers=1)
    prepare('circor', folder/'raw', folder/'processed', folder/'downstream')
    own = Task.open(folder/'downstream', 'circor_murmur').recordings.query('split == "test"')
    (folder/'clinic').mkdir()
    paths = load_recordings(folder/'raw').set_index('recording_id').path
    for name in own.recording_id: shutil.copy(paths[name], folder/'clinic')
    own.rename(columns=dict(subject_id='subject'))[['recording_id', 'subject', 'location']].assign(
        file=own.recording_id+'.wav').to_csv(folder/'who.csv', index=False)
    return folder

MURMUR = dict(Present=0, Absent=1, Unknown=2)

def test_as_the_files_of_an_evaluation(house, tmp_path):
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR)
    evaluate(best, 'circor_murmur', house/'downstream', output_dir=tmp_path/'e', draws=20)
    found = predict(house/'clinic', best, table=house/'who.csv', threshold='argmax')
    text = pd.read_csv(io.StringIO(found.to_csv()), dtype=str)
    for level in ('recording', 'subject'):
        theirs = pd.read_csv(tmp_path/'e'/f'predictions_{level}.csv', dtype=str)
        ours = text[text.level == level].set_index(f'{level}_id').loc[theirs[f'{level}_id']]
        assert ours[PROBABILITIES].to_numpy().tolist() == theirs[PROBABILITIES].to_numpy().tolist()
        said = ours.decision.notna().to_numpy()
        assert (ours.decision.to_numpy() == theirs.predicted_name)[said].all() and said.any()

@pytest.mark.parametrize('head', [{}, dict(aggregation='attention'), dict(pooling='phases'),
                                  dict(aggregation='mean', bag_level='recording')])
def test_as_an_evaluation_to_the_bit(house, tmp_path, head):
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR, **head)
    cycles, task = open_split('circor_murmur', house/'downstream', 'test')
    levels = open_model(best, task).predict(cycles).at_levels()
    found = predict(house/'clinic', best, table=house/'who.csv', threshold='argmax')
    for table, level in ((found.recordings, 'recording'), (found.subjects, 'subject')):
        ours = table.set_index(f'{level}_id').loc[levels[level].table[f'{level}_id'].astype(str)]
        assert ours[PROBABILITIES].to_numpy().tolist() == levels[level].probabilities.tolist()

def test_neither_workers_nor_neighbours_change_anything(house, tmp_path):
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR)
    one = predict(house/'clinic', best, subject_from=r'^(\d+)_')
    two = predict(house/'clinic', tmp_path, subject_from=r'^(\d+)_', num_workers=2)
    assert one.to_csv() == two.to_csv() and one.to_json_lines() == two.to_json_lines()
    assert one.subjects.equals(two.subjects) and one.beats.equals(two.beats)
    for row in one.recordings.iloc[:1].itertuples():
        alone = predict(row.file, best).recordings.iloc[0]
        assert np.allclose(alone[PROBABILITIES].tolist(),
                           one.recordings.loc[row.Index, PROBABILITIES].tolist(), atol=3e-7)
        # several threads add in another order
        assert_frame_equal(segment(row.file), one.states[row.recording_id], rtol=1e-5)

def test_agreement_and_beats(house, tmp_path):
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR)
    found = predict(house/'clinic', best, threshold='argmax')
    beats = found.beats.groupby('recording_id')[PROBABILITIES]
    for r in found.recordings.itertuples():
        own = beats.get_group(r.recording_id).to_numpy()
        mean = own.mean(0)
        assert np.allclose(mean, [getattr(r, c) for c in PROBABILITIES])
        assert r.beats == len(own) and r.agreement == (own.argmax(1) == mean.argmax()).mean()
    assert np.isfinite(found.recordings[found.recordings.heartbeat].heart_rate).all()

def kept(label, probabilities):
    n = len(label)
    level = dict(label=torch.tensor(label), probabilities=torch.tensor(probabilities),
                 person=torch.arange(n))
    return dict(recording=level, subject=level)

def test_threshold_of_the_checkpoint(house, tmp_path, logged):
    p = np.array([.9, .8, .3, .2, .1], np.float32)
    rows = np.c_[p, 1-p, 0*p].astype(np.float32)
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR, kept([0, 0, 1, 1, 1], rows))
    chosen = predict(house/'clinic', best)
    line = chosen.operating_point.thresholds
    assert chosen.operating_point.how == 'cost' and .3 < line['subject'] < .8
    for table, level in ((chosen.recordings, 'recording'), (chosen.subjects, 'subject')):
        said = table[table.decision.notna()]
        assert ((said.probability_Present >= line[level]) == (said.decision == 'Present')).all()
    assert set(predict(house/'clinic', best, threshold='0').recordings.decision.dropna()) == {
        'Present'}
    rates = chosen.operating_point.error_rates().set_index(['level', 'rate']).value
    assert rates['subject', 'sensitivity'] == rates['subject', 'specificity'] == 1
    assert not logged
    old = small_checkpoint(tmp_path/'old.pt', MURMUR)
    assert predict(house/'clinic', old).operating_point.how == 'argmax'
    with pytest.raises(PahclError, match='keeps no predictions'):
        predict(house/'clinic', old, threshold='youden')
    one_class = small_checkpoint(tmp_path/'one.pt', MURMUR, kept([1]*5, rows))
    assert 'needs validation rows' in predict(house/'clinic', one_class).operating_point.notes[0]

@pytest.fixture
def broken(house, tmp_path):
    "a folder with two good recordings, a silent one and files that cannot be used"
    folder = tmp_path/'mixed'
    folder.mkdir()
    good = sorted((house/'clinic').glob('*.wav'))
    for p in good[:2]: shutil.copy(p, folder)
    soundfile.write(folder/'silent.wav', np.zeros(4*4000), 4000)
    soundfile.write(folder/'empty.wav', np.zeros(0), 4000)
    soundfile.write(folder/'nan.wav', np.full(9000, np.nan), 4000, 'FLOAT')
    soundfile.write(folder/'short.wav', np.zeros(400), 4000)
    (folder/'text.wav').write_text('no sound')
    (folder/'cut.wav').write_bytes(good[0].read_bytes()[:-999])
    (folder/'folder.wav').mkdir()
    return folder

def test_bad_files_are_named_and_the_rest_goes_on(house, broken, tmp_path, logged):
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR)
    found = predict([broken, broken/'gone.wav'], best)
    table = found.recordings.set_index('recording_id')
    bad = {'empty': 'is empty', 'nan': 'no numbers', 'short': 'too short', 'text': 'as audio',
           'cut': 'truncated', 'gone': 'not found'}
    assert set(table.index[table.error.notna()]) == set(bad)
    for name, why in bad.items():
        assert why in table.error[name] and any(f'{name}.wav' in m for m in logged)
    silent = table.loc['silent']
    assert not silent.heartbeat and pd.isna(silent.decision) and 'no heartbeat' in silent.notes[0]
    assert silent[PROBABILITIES].notna().all()
    lines = [json.loads(line) for line in found.to_json_lines().splitlines()]
    assert len(lines) == len(table) and {r['recording_id'] for r in lines if r['error']} == set(bad)
    with pytest.raises(PahclError, match='none of 1 recordings'): predict(broken/'text.wav', best)
    with pytest.raises(PahclError, match='holds no audio'): predict(broken/'folder.wav', best)

def test_unreadable_file_and_foreign_checkpoint(house, tmp_path):
    with pytest.raises(PahclError, match='checkpoint not found'): predict(house/'clinic', 'no.pt')
    with pytest.raises(UsageError, match='--task'): predict(house/'clinic')

subject = st.text('abc1', min_size=1, max_size=3)

@given(st.lists(st.tuples(subject, st.sampled_from(['AV', 'MV'])), min_size=1, unique=True))
def test_subjects_from_names(parts):
    files = [f'x/{s}_{place}.wav' for s, place in parts]
    assert _subjects_from_names(files, r'^([^_]+)_') == [s for s, _ in parts]

@given(st.lists(st.lists(subject, min_size=1, max_size=3).map('/'.join), min_size=1, unique=True),
       st.randoms())
def test_table_joins(names, random):
    listed = [f'{n}.wav' for n in names]
    shuffled = random.sample(range(len(names)), len(names))
    files = [Path('/data/clinic')/listed[i] for i in shuffled]
    try: found = _match_files(files, listed)
    except PahclError as e:
        assert 'could be' in str(e)
        return
    assert found == shuffled

def test_tables_that_are_wrong(tmp_path):
    (tmp_path/'a.csv').write_text('file,subject\n1.wav,A\n2.wav,\n')
    with pytest.raises(PahclError, match='row 3 lacks'):
        _assign_subjects(['1.wav'], table=tmp_path/'a.csv')
    (tmp_path/'b.csv').write_text('name,subject\n1.wav,A\n')
    with pytest.raises(PahclError, match='no column file'):
        _assign_subjects(['1.wav'], table=tmp_path/'b.csv')
    with pytest.raises(UsageError, match='not both'):
        _assign_subjects(['1.wav'], '^(.)', tmp_path/'b.csv')

def test_scripts(house, broken, tmp_path, capsys):
    best = str(small_checkpoint(tmp_path/'best_model.pt', MURMUR))
    clinic = str(house/'clinic')
    assert pahcl_predict([clinic, '--checkpoint', best, '--subject-from', r'^(\d+)_',
                          '--states-dir', str(tmp_path/'states')]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(table.level) == {'recording', 'subject'}
    for name in table.recording_id.dropna():
        assert len(read_annotation(tmp_path/'states'/f'{name}.tsv'))
    for end, read in (('csv', pd.read_csv), ('jsonl', lambda p: pd.read_json(p, lines=True))):
        out = tmp_path/f'out.{end}'
        assert pahcl_predict([clinic, '--checkpoint', best, '--table', str(house/'who.csv'),
                              '--output', str(out)]) == 0
        assert capsys.readouterr().out == ''
        own = read(out)
        assert np.allclose(own.probability_Present, table.probability_Present, atol=1e-6)
    assert pahcl_predict([str(broken/'text.wav'), '--checkpoint', best]) == 1
    assert pahcl_predict([str(broken), '--checkpoint', best]) == 0
    assert pahcl_predict([clinic+'/*.mp3', '--checkpoint', best]) == 1
    assert 'matches no recording' in capsys.readouterr().err
    assert pahcl_predict([clinic, '--checkpoint', best, '--output', 'x.xls']) == 2

def test_segment_script(house, broken, tmp_path, capsys):
    out = tmp_path/'states'
    assert pahcl_segment([str(broken), '--output-dir', str(out), '--figures']) == 0
    assert {p.suffix for p in out.iterdir()} == {'.tsv', '.png'}
    assert len(list(out.glob('*.tsv'))) == 3 and 'could not be read' in capsys.readouterr().out
    path = next(p for p in broken.glob('*_*.wav'))
    ours, theirs = read_annotation(out/f'{path.stem}.tsv'), segment(path)
    assert np.allclose(ours, theirs[['start_s', 'end_s', 'state']], atol=1e-6)
    assert pahcl_segment([str(broken/'text.wav'), '--output-dir', str(out)]) == 1

def test_a_dask_cluster_says_the_same(house, tmp_path):
    distributed = pytest.importorskip('dask.distributed', reason='Dask is not installed')
    best = small_checkpoint(tmp_path/'best_model.pt', MURMUR)
    here = predict(house/'clinic', best, subject_from=r'^(\d+)_')
    # in processes of their own (preprocessing is tested so) torch would be imported twice more
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=False,
                                  dashboard_address=None) as cluster:
        there = predict(house/'clinic', best, subject_from=r'^(\d+)_',
                        scheduler=cluster.scheduler_address)
    assert here.to_csv() == there.to_csv() and here.beats.equals(there.beats)

@pytest.mark.parametrize('task', ['circor_murmur', 'physionet2016', 'pascal'])
def test_packaged_models(house, task):
    path = sorted((house/'clinic').glob('*.wav'))[0]
    found = predict(path, task=task)
    assert found.operating_point.thresholds and found.recordings.decision.notna().all()
    assert found.model['task'] == task and found.model['training_persons'] > 50
    with pytest.raises(PahclError, match='no classifier of juggling'):
        predict(path, task='juggling')

def test_a_packaged_model_is_evaluated_outside_of_the_package(house, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('pahcl.evaluation.evaluator.all_baseline_predictions', lambda *a: {})
    before = sorted(_WEIGHTS.rglob('*'))
    results = evaluate('packaged', 'circor_murmur', house/'downstream', draws=20)
    folder = tmp_path/'outputs'/'circor_murmur_packaged'/'evaluation_circor_murmur_test'
    assert json.loads((folder/'metrics.json').read_text())['checkpoint'] == 'packaged'
    assert results['subject_rule'] == 'fitted' and sorted(_WEIGHTS.rglob('*')) == before
    with pytest.raises(PahclError, match='no classifier of no_task|no_task'):
        evaluate('packaged', 'no_task', house/'downstream')
