"""pahcl.evaluate, pahcl.studies.ensemble and pahcl.studies.summary: seams, faults, and the console
scripts on simulated recordings
"""
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pahcl.evaluation.decisions import Decisions
from pahcl.core.basics import PahclError, write_json
from pahcl.evaluate import pahcl_ensemble
from pahcl.studies.ensemble import ensemble, _find_members
from pahcl.evaluate import pahcl_evaluate
from pahcl.evaluation.evaluator import evaluate
from pahcl.core.challenge_metrics import murmur_weighted_accuracy
from pahcl.core.predictions import Predictions
from pahcl.testing.made import _made_cycles
from pahcl.evaluation.report import Evaluation
from pahcl.evaluate import pahcl_summarize
from pahcl.data.tasks import Task
from pahcl.training.run_folders import _sort_files

MURMUR = {'Present': 0, 'Absent': 1, 'Unknown': 2}
FILES = {'metrics.json', 'report.html',
         *(f'predictions_{l}.csv' for l in ('cycle', 'recording', 'subject')),
         *(f'{n}.png'
           for n in ('confusion_matrix', 'confusion_matrix_recording', 'confusion_matrix_cycle',
                     'roc', 'precision_recall', 'reliability'))}


# tests that look at pictures
DRAWN = ('test_files_and_numbers', 'test_same_input_gives_the_same_files',
         'test_a_cost_never_stands_alone', 'test_ensemble', 'test_real_checkpoints_end_to_end')


@pytest.fixture(autouse=True)
def few_figures(request):
    if request.function.__name__ not in DRAWN: request.getfixturevalue('no_figures')


def scored(table, probabilities, **keys):
    return Evaluation.of(Decisions.of(Predictions(table, probabilities, MURMUR), 'circor_murmur'),
                         **keys)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A prepared task and checkpoints whose models answer what the test put there: only model and
    loader are replaced.
    """
    table, probabilities = _made_cycles(1., subjects=12, cycles=3)
    class Cycles:
        def __init__(self, table): self.table = table
        def __len__(self): return len(self.table)
    saved, empty = {}, []
    def load_model(path):
        if str(path) not in saved: raise PahclError(f'{path} is not a checkpoint.')
        return saved[str(path)]['answer'], saved[str(path)]
    evaluator = 'pahcl.evaluation.evaluator'
    for module in (evaluator, 'pahcl.studies.ensemble'):
        monkeypatch.setattr(f'{module}.open_cycles', lambda folder, split, data=None: Cycles(
            table[:0] if split in empty else table))
    for module in (evaluator, 'pahcl.studies.ensemble', 'pahcl.models.checkpoints'):
        monkeypatch.setattr(f'{module}.load_classifier', load_model, raising=False)
    monkeypatch.setattr(f'{evaluator}.predict_cycles',
                        lambda answer, cycles, batch_size=64: answer)
    def no_sounds(folder): raise PahclError('the house has no sounds.')
    monkeypatch.setattr('pahcl.evaluation.baseline_features._spectrum_features', no_sounds)
    def task(name='circor_murmur', label_map=MURMUR, **extra):
        folder = tmp_path/'downstream'/name
        folder.mkdir(parents=True)
        write_json(folder/'task_config.json',
                   dict(task_name=name, label_map=label_map,
                        split_subjects=dict(test=sorted(set(table['subject_id'])) + ['lost']),
                        sample_rate=5000, length_mode='pad', **extra))
        for split in ('val', 'test'):
            (folder/f'{split}.csv').write_text(
                'subject_id,file_path,label,label_name,location,split\n')
        table[['subject_id', 'person_id', 'recording_id', 'label']].drop_duplicates().assign(
            split='test').to_csv(folder/'recordings.csv', index=False)
        table[['subject_id', 'recording_id']].assign(s2_end=1500, valid_length=3000).to_csv(
            folder/'cycles.csv', index=False)
    def checkpoint(name='run', task='circor_murmur', label_map=MURMUR,
                   answer=probabilities, **data):
        path = tmp_path/'outputs'/name/'best_model.pt'
        path.parent.mkdir(parents=True)
        path.touch()
        saved[str(path)] = dict(task=task, label_map=label_map, encoder_type='cnn', answer=answer,
                                config=dict(data=data, experiment=dict(name='<b>bold</b>')))
        return path
    return types.SimpleNamespace(table=table, probabilities=probabilities, empty=empty,
                                 task=task, checkpoint=checkpoint, data=tmp_path/'downstream',
                                 outputs=tmp_path/'outputs')


def test_files_and_numbers(house):
    house.task()
    results = evaluate(house.checkpoint(), 'circor_murmur', house.data, draws=50)
    folder = house.outputs/'run'/'evaluation_circor_murmur_test'
    assert {p.name for p in folder.iterdir()} == FILES and results['output_dir'] == str(folder)
    kept = json.loads((folder/'metrics.json').read_text())
    subject = pd.read_csv(folder/'predictions_subject.csv')
    assert kept['official']['value'] == pytest.approx(
        murmur_weighted_accuracy(subject['label'], subject['predicted']))
    assert kept['levels']['subject']['accuracy'] == (
        subject['label'] == subject['predicted']).mean()
    cycle = pd.read_csv(folder/'predictions_cycle.csv')
    assert (np.allclose(cycle.filter(like='probability_'), house.probabilities, atol=1e-6)
            and cycle['file_path'].tolist() == house.table['file_path'].tolist())
    assert kept['missing'] == dict(subjects=['lost'], recordings=[])
    page = (folder/'report.html').read_text()
    assert 'lost' in page and '<b>bold' not in page and '&lt;b&gt;bold' in page


def test_same_input_gives_the_same_files(house, tmp_path):
    house.task()
    path = house.checkpoint()
    for out in ('a', 'b'):
        evaluate(path, 'circor_murmur', house.data, output_dir=tmp_path/out, draws=20)
    for name in FILES: assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes()


def test_recordings_without_cycles_are_counted(house):
    house.task()
    known = pd.read_csv(house.data/'circor_murmur'/'recordings.csv', dtype=str)
    known.loc[len(known)] = ['000', '000', '000_Phc', '0', 'test']
    known.loc[len(known)] = ['900', '900', '900_Phc', '1', 'train']
    known.loc[len(known)] = ['lost', 'lost', 'lost_AV', '2', 'test']
    known.loc[len(known)] = ['000', '000', '000_TV', '', 'test']
    known.to_csv(house.data/'circor_murmur'/'recordings.csv', index=False)
    results = evaluate(house.checkpoint(), 'circor_murmur', house.data, draws=5)
    # without a label there is nothing to compare with
    assert (results['missing'] == dict(subjects=[], recordings=['000_TV'])
            and results['fallback'] == 2)
    predicted = pd.read_csv(
        house.outputs/'run'/'evaluation_circor_murmur_test'/'predictions_recording.csv',
        dtype=dict(subject_id=str)).set_index('recording_id')
    assert predicted.loc[['000_Phc', 'lost_AV'], 'units_below'].tolist() == [0, 0]
    # one Absent in training, and one of each
    lost = predicted.loc['lost_AV'].filter(like='probability')
    assert np.allclose(lost.astype(float), [.25, .5, .25])
    one = ensemble(house.checkpoint('again'), 'circor_murmur', house.data, draws=5)
    assert {k: one[k] for k in ('n', 'levels', 'fallback', 'missing')} == {
        k: results[k] for k in ('n', 'levels', 'fallback', 'missing')}
    assert results['n']['subject'] == 13 and any('2 recordings without a cycle are answered' in n
                                                 for n in results['notes'])


def test_threshold_and_rule_are_chosen_on_validation(house):
    house.task()
    path = house.checkpoint()
    results = evaluate(path, 'circor_murmur', house.data, draws=20, threshold='sensitivity=1',
                       subject_rule='choose')
    subject = pd.read_csv(
        house.outputs/'run'/'evaluation_circor_murmur_test'/'predictions_subject.csv')
    t = results['thresholds']['subject']
    assert ((subject['probability_Present'] >= t) == (subject['predicted'] == 0)).all()
    # the house answers the same on both splits
    assert results['levels']['subject']['per_class']['recall'][0] == 1
    assert results['subject_rule'] == results['best_rule'] == max(
        results['rules'], key=lambda r: r['validation'])['rule']
    assert (results['calibration']['after']['surprise']
            <= results['calibration']['before']['surprise'] + 1e-9
            and 'calibrated_Present' in subject)
    page = (house.outputs/'run'/'evaluation_circor_murmur_test'/'report.html').read_text()
    assert ('sensitivity=1' in page and 'Temperature' in page
            and not re.search('src="(?!data:)', page) and 'width=device-width' in page)
    own = evaluate(path, 'circor_murmur', house.data, split='val', draws=5, threshold='f1')
    assert any('flatters' in n for n in own['notes']) and own['calibration']['temperature'] is None
    assert pahcl_evaluate(['--checkpoint', str(path), '--task', 'circor_murmur', '--data_dir',
                           str(house.data), '--threshold', 'best']) == 2


def test_a_result_below_its_baseline_is_marked_everywhere(house, capsys):
    house.task()
    path = house.checkpoint(answer=np.tile([.2, .3, .5], (len(house.table), 1)))
    assert pahcl_evaluate(['--checkpoint', str(path), '--task', 'circor_murmur', '--data_dir',
                           str(house.data)]) == 0
    folder = house.outputs/'run'/'evaluation_circor_murmur_test'
    kept = json.loads((folder/'metrics.json').read_text())
    assert ('all Present' in kept['below_floor']['auroc']
            and 'all Present' in kept['below_floor']['murmur_weighted_accuracy'])
    assert ('▼ not above its baseline' in capsys.readouterr().out
            and '▼' in (folder/'report.html').read_text())


def test_a_cost_never_stands_alone(house):
    house.table['label'] %= 2
    house.task('circor_outcome', dict(Normal=0, Abnormal=1), dataset='circor')
    p = np.eye(2)[house.table['label']]*.8 + .1
    official = evaluate(house.checkpoint('a', 'circor_outcome', dict(Normal=0, Abnormal=1), p),
                        'circor_outcome', house.data, draws=5)['official']
    assert (official['auroc'] == 1
            and official['value'] < official['blind']['cheapest'] <= official['blind']['at_random'])
    folder = house.outputs/'a'/'evaluation_circor_outcome_test'
    assert not _sort_files(folder.parent)[1]   # all of it may be replaced
    assert ((folder/'referral_cost.png').exists()
            and 'at random costs' in (folder/'report.html').read_text())
    # the demographics could not be computed, and the page says why
    assert '--raw-dir' in (folder/'report.html').read_text()


def test_across_data_sets_with_other_numbers(house):
    "A model that calls abnormal 0 must score the same as one that calls it 1."
    house.table['label'] %= 2
    p = np.eye(2)[house.table['label']]*.8 + .1
    p[:7] = p[:7, ::-1]
    house.task('physionet2016', dict(normal=0, abnormal=1))
    plain = evaluate(house.checkpoint('a', 'circor_outcome', dict(Normal=0, Abnormal=1), p),
                     'physionet2016', house.data, draws=5)
    turned = evaluate(house.checkpoint('b', 'circor_outcome', dict(Abnormal=0, Normal=1),
                                       p[:, ::-1]), 'physionet2016', house.data, draws=5)
    assert (plain['levels'] == turned['levels']
            and plain['official']['name'] == 'sensitivity_specificity_mean')
    assert 'Abnormal (circor_outcome) is abnormal (physionet2016)' in plain['notes'][0]


def test_other_classes_other_cut_other_task_are_refused(house):
    house.task()
    path = house.checkpoint('a', 'circor_outcome', dict(Normal=0, Abnormal=1))
    with pytest.raises(PahclError) as e: evaluate(path, 'circor_murmur', house.data)
    assert 'Abnormal' in str(e.value) and 'Unknown' in str(e.value)
    with pytest.raises(PahclError, match='length_mode is phase in the checkpoint but pad'):
        evaluate(house.checkpoint('b', length_mode='phase'), 'circor_murmur', house.data)
    with pytest.raises(PahclError, match='Prepared tasks .*: circor_murmur'):
        evaluate(path, 'pascal', house.data)
    with pytest.raises(PahclError, match='split valid of circor_murmur'):
        evaluate(path, 'circor_murmur', house.data, split='valid')
    assert not (house.outputs/'a'/'evaluation_circor_murmur_test').exists()


def test_foreign_checkpoint_is_one_sentence(house, capsys):
    house.task()
    (house.outputs).mkdir()
    (house.outputs/'foreign.pt').write_text('not a checkpoint')
    assert pahcl_evaluate(['--checkpoint', str(house.outputs/'foreign.pt'), '--task',
                           'circor_murmur', '--data_dir', str(house.data)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.count('\n') == 0 and 'is not a checkpoint' in error


def test_ensemble(house, capsys):
    house.task()
    random, members = np.random.default_rng(0), []
    for seed in range(3):
        p = house.probabilities*np.exp(random.normal(size=house.probabilities.shape))
        members.append(p/p.sum(1, keepdims=True))
        house.checkpoint(f'circor_murmur_ensemble_{seed}', answer=members[-1])
    pattern = str(house.outputs/'circor_murmur_ensemble_*'/'best_model.pt')
    results = ensemble(pattern, 'circor_murmur', house.data, draws=5)
    folder = house.outputs/'ensemble_circor_murmur_test'
    assert {p.name for p in folder.iterdir()} == FILES | {'disagreement_subject.csv'}
    assert results['levels'] == scored(house.table, np.mean(members, 0), draws=5).scores
    assert len(pd.read_csv(folder/'disagreement_subject.csv')) == 12
    other = house.checkpoint('circor_murmur_ensemble_odd', 'circor_outcome',
                             dict(Normal=0, Abnormal=1))
    with pytest.raises(PahclError) as e: ensemble(pattern, 'circor_murmur', house.data)
    assert str(other) in str(e.value)
    assert (pahcl_ensemble(['--checkpoints', 'no/*.pt', '--task', 'circor_murmur']) == 1
            and 'no/*.pt' in capsys.readouterr().err)
    assert pahcl_ensemble(['--task', 'circor_murmur']) == 2


def test_rules_that_a_task_does_not_have(house, capsys):
    """any_present speaks of murmurs, and would call normal Present where three classes mean
    something else; `model` is a model of bags' own answer.
    """
    names = dict(normal=0, murmur=1, extrasystole=2)
    house.task('pascal', names)
    path = str(house.checkpoint('heart', 'pascal', names))
    ask = lambda command, *more: command(['--task', 'pascal', '--data-dir', str(house.data), *more])
    for rule, why in (('any_present', 'here there are mean, logmean, trimmed'),
                      ('nonsense', 'here there are mean'), ('model', 'answers for cycles')):
        assert ask(pahcl_evaluate, '--checkpoint', path, '--subject-rule', rule) == 1
        assert why in capsys.readouterr().err
    assert (ask(pahcl_ensemble, '--checkpoints', path, '--subject-rule', 'choose') == 1
            and 'here there are mean, logmean, trimmed, fitted.' in capsys.readouterr().err)
    assert ask(pahcl_evaluate, '--checkpoint', path, '--cross-validate', '3', '--robustness') == 2


def test_a_task_without_validation_persons(house):
    house.task()
    house.empty.append('val')
    results = evaluate(house.checkpoint(), 'circor_murmur', house.data, draws=5)
    assert 'rules' not in results and results['subject_rule'] == 'mean'
    with pytest.raises(PahclError, match='needs a validation split'):
        evaluate(house.checkpoint('other'), 'circor_murmur', house.data, subject_rule='choose')


def test_the_same_member_twice_counts_once(house):
    path = house.checkpoint()
    assert _find_members([path, str(path)]) == [path]


def test_one_member_is_itself(house):
    house.task()
    path = house.checkpoint()
    alone, one = (evaluate(path, 'circor_murmur', house.data, draws=5),
                  ensemble(path, 'circor_murmur', house.data, draws=5))
    assert (all(alone[k] == one[k] for k in ('levels', 'shortcuts', 'below_floor', 'fallback'))
            and 'heart rate' in one['shortcuts'])
    assert one['agreement']['all_agree'] == 1 and 'this is no ensemble' in one['notes'][0]


def test_a_person_under_two_ids_is_resampled_as_one():
    table, p = _made_cycles(.5, subjects=12, cycles=2)
    paired = table.assign(person_id=[f'{int(s)//2:03d}' for s in table['subject_id']])
    apart, together = (scored(t, p, draws=100).scores['subject'] for t in (table, paired))
    assert apart['accuracy'] == together['accuracy']
    assert apart['intervals'] != together['intervals']


@pytest.mark.parametrize('trained', [dict(Normal=0), dict(Normal=0, Abnormal=1, Unknown=2),
                                     dict(Present=0, Absent=1)])
def test_match_refuses(trained):
    with pytest.raises(PahclError, match='do not agree'):
        Task('.', dict(task_name='circor_outcome',
                       label_map=dict(Normal=0, Abnormal=1))).match_columns(trained)


@pytest.mark.parametrize('content', ['', '[1]', '{"test_accuracy": "high"}',
                                     '{"test_accuracy": true}', '\xff\xfe'])
def test_broken_runs_stay_in_the_summary(tmp_path, content, capsys):
    for name, text in [('pascal_broken', content), (
            'pascal_fine', '{"task": "pascal", "experiment": "fine", "test_accuracy": 0.5}')]:
        (tmp_path/name).mkdir()
        (tmp_path/name/'final_metrics.json').write_bytes(text.encode('latin-1'))
    assert pahcl_summarize(['--output-dir', str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert 'broken: ' in shown and '0.5000' in shown
    assert len(pd.read_csv(tmp_path/'summary.csv')) == 2


def test_summary_reads_itself_no_second_time(tmp_path):
    (tmp_path/'pascal_fine').mkdir()
    (tmp_path/'pascal_fine'/'final_metrics.json').write_text('{"test_accuracy": 0.5}')
    for _ in range(2): assert pahcl_summarize(['--output-dir', str(tmp_path)]) == 0
    assert (len(pd.read_csv(tmp_path/'summary.csv')) == 1
            and 'Status' not in (tmp_path/'summary.md').read_text())


@pytest.mark.parametrize('name', ['evaluate', 'ensemble', 'summarize'])
def test_help_is_light(name):
    "`--help` imports none of the heavy libraries."
    code = (f'import sys; from pahcl.evaluate import pahcl_{name} as main\ntry: main(["--help"])\n'
            f'except SystemExit: pass\nassert not {{"torch", "numpy", "pandas", "matplotlib"}} & '
            'set(sys.modules), "heavy"')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and '--output-dir' in run.stdout, run.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Simulated recordings of two tasks with the same classes, and two members fine-tuned for one
    epoch on one of them.
    """
    from pahcl.segmentation.preprocessing import preprocess
    from pahcl.training.finetuning import finetune
    from pahcl.data.simulation import simulate_dataset
    from pahcl.data.splitting import prepare
    work = tmp_path_factory.mktemp('evaluate')
    for dataset in ('circor', 'physionet2016'):
        simulate_dataset(work/'raw', dataset, subjects=20, seed=0, seconds=4)
    preprocess(work/'raw', work/'processed', num_workers=1)
    prepare('all', work/'raw', work/'processed', work/'downstream')
    for seed in (1, 2):
        finetune(task='circor_outcome', pretrained='none', data_dir=work/'downstream',
                 output_dir=work/'outputs', experiment_name=f'member_{seed}', epochs=1, seed=seed,
                 encoder_type='cnn_mamba_small', **{'training.cycles_per_recording': 2})
    return work


def test_real_checkpoints_end_to_end(trained, capsys):
    best, data = (str(trained/'outputs'/'circor_outcome_member_1'/'best_model.pt'),
                  str(trained/'downstream'))
    assert pahcl_evaluate(['--checkpoint', best, '--task', 'circor_outcome', '--data-dir',
                           data]) == 0
    kept = json.loads(
        (Path(best).parent/'evaluation_circor_outcome_test'/'metrics.json').read_text())
    final = json.loads((Path(best).parent/'final_metrics.json').read_text())
    assert (kept['levels']['subject']['accuracy'] == pytest.approx(final['test_accuracy'])
            and kept['official']['name'] == 'outcome_cost')
    assert pahcl_evaluate(['--checkpoint', best, '--task', 'physionet2016', '--data-dir', data,
                           '--output-dir', str(trained/'across')]) == 0
    assert json.loads((trained/'across'/'metrics.json').read_text())['matched'] == [
        'Normal (circor_outcome) is normal (physionet2016)',
        'Abnormal (circor_outcome) is abnormal (physionet2016)']
    assert pahcl_evaluate(['--checkpoint', best, '--task', 'circor_murmur', '--data-dir',
                           data]) == 1
    assert 'the classes do not agree' in capsys.readouterr().err
    assert pahcl_ensemble(['--checkpoints',
                           str(trained/'outputs'/'circor_outcome_member_*'/'best_model.pt'),
                           '--task', 'circor_outcome', '--data-dir', data]) == 0
    assert ({p.name for p in (trained/'outputs'/'ensemble_circor_outcome_test').iterdir()} == FILES
            | {'disagreement_subject.csv', 'referral_cost.png'})
    assert pahcl_summarize(['--output-dir', str(trained/'outputs')]) == 0
    assert pd.read_csv(trained/'outputs'/'summary.csv')['experiment'].tolist() == [
        'member_1', 'member_2']
