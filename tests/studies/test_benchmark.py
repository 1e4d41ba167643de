"""pahcl.studies.benchmark on made cycles: complete, resumed, side by side, with its mistakes said,
and with numbers that scikit-learn agrees with
"""
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import recall_score, roc_auc_score

from pahcl.core.basics import PahclError, read_json
from pahcl.core.config import _packaged_configs
from pahcl.data.tasks import Task
from pahcl.evaluate import pahcl_benchmark
from pahcl.evaluation.evaluator import evaluate
from pahcl.studies import benchmark_runs
from pahcl.studies.benchmark import run_benchmark
from pahcl.studies.benchmark_protocol import (
    _count_runs, _list_splits, _packaged_protocols, _read_protocol, _Split)
from pahcl.studies.benchmark_splits import _deal_split, _Places
from pahcl.studies.benchmark_table import _read_results
from pahcl.testing.made import _make_processed_folder, _make_recordings

TINY = dict(config='small_finetune', pretrained='none', change=dict(
    training=dict(num_epochs=1, warmup_epochs=0, cycles_per_recording=1, num_workers=0),
    model=dict(encoder_type='cnn', cnn_channels=[4, 4, 4, 4])))
PROTOCOL = dict(name='made', tasks=['circor_murmur'], seeds=[1], rules=['fitted', 'mean'],
                arms=dict(cnn=TINY))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    "Figures are looked at in test_evaluate.py; here they would take most of the time."
    monkeypatch.setattr('pahcl.evaluation.scoring.Evaluation.figures', lambda self: {})


@pytest.fixture(scope='module', autouse=True)
def calm(one_thread, quiet): pass


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Cycles of 24 persons and two splits; three test children have no recording here. In torn.csv
    person 1023 is in test, and as 9023 in training.
    """
    work = tmp_path_factory.mktemp('benchmark')
    _make_processed_folder(work/'processed', _make_recordings(['circor'], 24), cycles=1)
    # of three persons, one a class
    blocks = ['train', 'test', 'val', 'train', 'test', 'train', 'val', 'test']
    sets = {str(1000+i): blocks[i//3] for i in range(24)}
    sets |= {'7001': 'test', '7002': 'test', '7003': 'test'}
    text = 'patient_id,split\n'+''.join(f'{k},{v}\n' for k, v in sets.items())
    (work/'mine.csv').write_text(text)
    (work/'torn.csv').write_text(text+'9023,train\n')
    return work


def given(made, name='mine', **leaky): return dict(given=str(made/f'{name}.csv'), **leaky)

def run(made, folder, protocol, **keys):
    return run_benchmark(protocol, folder, made/'raw', made/'processed', draws=50, **keys)

def without_minutes(folder):
    "What a benchmark says, apart from times and its own place."
    told = json.loads((folder/'results.json').read_text().replace(str(folder.parent), '…'))
    for r in told['runs']: r.pop('minutes')
    return told


@pytest.fixture(scope='module')
def first(made):
    "The results of both forms of the split, one process."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('pahcl.evaluation.scoring.Evaluation.figures', lambda self: {})
        protocol = PROTOCOL | dict(splits={'leak-free': given(made),
                                           'as published': given(made, 'torn', leaky=True)})
        run(made, made/'one', protocol)
    return protocol, made/'one'/'made'


def test_every_result_is_there(made, first):
    _, folder = first
    rows, runs = _read_results(folder/'results.csv'), pd.read_csv(folder/'runs.csv')
    whole = rows[rows['split'] == 'all']
    metrics = {'murmur_weighted_accuracy', 'accuracy', 'f1_macro', 'auroc', 'uar'}
    for group in ('leak-free', 'as published'):
        own = whole[whole['group'] == group]
        assert {*zip(own['arm'], own['rule'])} >= {
            ('cnn', 'fitted'), ('cnn', 'mean'), ('log-mel statistics', '–'), ('all Absent', '–')}
        assert set(own['metric']) == metrics and own['value'].notna().all()
    inside = whole.dropna(subset='low')
    assert len(inside) and ((inside['low'] <= inside['value'])
                            & (inside['value'] <= inside['high'])).all()
    # who has been met, and who is missing
    models = whole[whole['kind'] == 'model'].groupby('group')['met'].max()
    assert models.to_dict() == {'leak-free': 0, 'as published': 1}
    missing = pd.read_csv(folder/'missing.csv', dtype=str)
    assert (sorted(set(missing['id'])) == ['7001', '7002', '7003']
            and set(missing['set']) == {'test'})
    told = read_json(folder/'results.json')
    assert any('3 of 12 have no recording here: 7001, 7002, 7003' in n for n in told['notes'])
    # how it was made
    assert (runs['minutes'].notna().all() and runs['inputs'].notna().all()
            and runs['failed'].isna().all() and told['made_with']['torch']
            and told['data']['processed'] and len(told['runs']) == 2)
    for command in runs['command']:
        assert (command.startswith('pahcl_prepare --dataset circor')
                and '; pahcl_finetune --config ' in command
                and '--subject-rule learned --threshold cost' in command)
    leaky = runs[runs['split'] == 'torn-leaky']['command'].iloc[0]
    assert '--leaky-splits' in leaky and '--leaky-splits' not in runs['command'].iloc[0]
    page = (folder/'report.html').read_text()
    assert all(text in page for text in ('7001', 'log-mel statistics', 'pahcl_finetune'))


def test_numbers_are_those_of_scikit_learn(first):
    _, folder = first
    rows = _read_results(folder/'results.csv').query('split == "mine" and arm == "cnn"')
    for rule in ('fitted', 'mean'):
        told = pd.read_csv(folder/'runs'/'mine'/'circor_murmur_cnn_seed1'/'evaluation'/rule
                           /'predictions_subject.csv')
        ours = rows[rows['rule'] == rule].set_index('metric')['value']
        p = told[[f'probability_{n}' for n in ('Present', 'Absent', 'Unknown')]].to_numpy()
        y, decided = told['label'], told['predicted']
        areas = [roc_auc_score(y == c, p[:, c]) for c in range(3)]
        assert ours['auroc'] == pytest.approx(np.mean(areas))
        assert ours['uar'] == pytest.approx(recall_score(y, decided, average='macro'))
        weight = y.map({0: 5, 1: 1, 2: 3})   # the challenge's
        assert ours['murmur_weighted_accuracy'] == pytest.approx(
            (weight*(y == decided)).sum()/weight.sum())


def test_rows_are_what_an_evaluation_of_the_checkpoint_says(made, tmp_path):
    from pahcl.evaluation.subject_rules import RULES
    arm = TINY | dict(change=TINY['change'] | dict(decision=dict(folds=2)))
    rules = ['fitted', 'any_present', 'mean']
    rows = run(made, tmp_path, PROTOCOL | dict(splits={'mine': given(made)}, rules=rules,
                                               arms=dict(layer=arm)))
    folder = tmp_path/'made'
    checkpoint = folder/'runs'/'mine'/'circor_murmur_layer_seed1'/'best_model.pt'
    assert '--subject-rule fitted' in pd.read_csv(folder/'runs.csv')['command'].iloc[0]
    # nobody names a rule: the decision layer decides
    asked = dict(fitted={}) | {r: dict(zip(('rule', 'subject_rule'), RULES[r])) for r in rules[1:]}
    known = rows.query('split == "mine" and arm == "layer"').set_index(['rule', 'metric'])['value']
    for rule, how in asked.items():
        own = evaluate(checkpoint, 'circor_murmur', folder/'data'/'circor'/'mine',
                       output_dir=tmp_path/'evaluation'/rule, draws=20, **how)
        subject = own['levels']['subject']
        assert own['subject_rule'] == rule
        assert known[rule, 'murmur_weighted_accuracy'] == pytest.approx(own['official']['value'])
        for metric in ('uar', 'auroc'):
            assert known[rule, metric] == pytest.approx(subject[metric], abs=2e-6), metric
    assert known['fitted', 'auroc'] != known['mean', 'auroc']   # another answer, not the same three


def test_the_command_of_a_run_repeats_it(first, tmp_path):
    from pahcl.finetune import pahcl_finetune
    _, folder = first
    run = folder/'runs'/'mine'/'circor_murmur_cnn_seed1'
    assert pahcl_finetune(['--config', str(run/'config.yaml'), '--output-dir', str(tmp_path)]) == 0
    scores = [read_json(f/'final_metrics.json')
              for f in (run, tmp_path/'circor_murmur_cnn_seed1')]
    assert scores[0]['test_auroc'] == scores[1]['test_auroc']


def test_killed_and_resumed(made, first, tmp_path, monkeypatch):
    protocol, folder = first
    evaluated, trained = [], []
    def dies(checkpoint, *arguments, **keys):
        evaluated.append(checkpoint)
        if len(evaluated) == 2: raise KeyboardInterrupt
        return open_model(checkpoint, *arguments, **keys)
    def counts(*arguments, **keys):
        trained.append(arguments)
        return finetune(*arguments, **keys)
    open_model, finetune = benchmark_runs.open_model, benchmark_runs.finetune
    monkeypatch.setattr(benchmark_runs, 'open_model', dies)
    monkeypatch.setattr(benchmark_runs, 'finetune', counts)
    with pytest.raises(KeyboardInterrupt): run(made, tmp_path, protocol)
    assert len(trained) == 2 and not (tmp_path/'made'/'results.csv').exists()
    stamp = (tmp_path/'made'/'runs'/'mine'/'circor_murmur_cnn_seed1'/'best_model.pt').stat()
    run(made, tmp_path, protocol)
    again = (tmp_path/'made'/'runs'/'mine'/'circor_murmur_cnn_seed1'/'best_model.pt').stat()
    assert len(trained) == 3 and again.st_mtime_ns == stamp.st_mtime_ns   # the second one only
    assert without_minutes(tmp_path/'made')['results'] == without_minutes(folder)['results']
    # nothing is left to do, and another arm is the only thing that is trained
    run(made, tmp_path, protocol)
    assert len(trained) == 3


def test_two_at_once_say_the_same(made, first, tmp_path):
    protocol, folder = first
    shutil.copytree(folder/'baselines', tmp_path/'made'/'baselines')   # two processes are enough
    run(made, tmp_path, protocol, jobs=2)
    assert without_minutes(tmp_path/'made')['results'] == without_minutes(folder)['results']
    assert (tmp_path/'made'/'logs'/'mine'/'circor_murmur_cnn_seed1.log').exists()


def test_everybody_is_tested_once(made, tmp_path):
    rows = run(made, tmp_path, PROTOCOL | dict(folds=3, rules=['mean'],
                                               splits={'seed 42': dict(seed=42)}),
               cross_validate=True)
    whole = rows[(rows['split'] == 'all') & (rows['metric'] == 'uar')]
    assert ((whole['persons'] == 24).all() and (whole['runs'] == 1).all()
            and (whole['met'] == 0).all())
    told = pd.concat([pd.read_csv(p) for p in tmp_path.glob(
        'made-cross-validated/runs/*/*/evaluation/mean/predictions_subject.csv')])
    assert len(told) == told['subject_id'].nunique() == 25   # one person has two ids
    assert whole[whole['arm'] == 'cnn']['value'].iloc[0] == pytest.approx(
        recall_score(told['label'], told['predicted'], average='macro'))


def test_nobody_to_test_is_reported_and_no_error(made, tmp_path, capsys):
    (tmp_path/'other.csv').write_text('patient_id,split\n1000,train\n1001,val\n5000,test\n')
    protocol = PROTOCOL | dict(splits=dict(other=dict(given=str(tmp_path/'other.csv'))))
    run(made, tmp_path, protocol)
    assert 'other: nobody to test: of 1 in test none has a labelled' in capsys.readouterr().out
    page = (tmp_path/'made'/'report.html').read_text()
    assert 'Nothing was tested.' in page and 'nobody to test' in page and '5000' in page


def test_what_failed_is_named_and_the_others_stand(made, tmp_path):
    protocol = PROTOCOL | dict(splits={'mine': given(made)}, rules=['mean'], arms=dict(
        cnn=TINY, lost=TINY | dict(pretrained=str(tmp_path/'no.pt'))))
    (tmp_path/'no.pt').write_text('no checkpoint')
    with pytest.raises(PahclError, match='1 of 3 pieces of work failed: mine: .*lost_seed1'):
        run(made, tmp_path, protocol)
    rows = _read_results(tmp_path/'made'/'results.csv')
    assert 'cnn' in set(rows['arm']) and 'lost' not in set(rows['arm'])
    runs = pd.read_csv(tmp_path/'made'/'runs.csv').set_index('arm')
    assert 'no.pt' in runs.loc['lost', 'failed'] and 'FAILED' in (
        tmp_path/'made'/'report.html').read_text()


def test_few_persons_are_nested_and_a_folder_is_left_out(tmp_path):
    recordings = _make_recordings(['physionet2016'], 30)
    letter = ['abe'[i % 3] for i in range(30)]
    for column in ('recording_id', 'subject_id', 'person_id', 'folder'):
        recordings[column] = [v.replace('a0', f'{l}0') for v, l in zip(recordings[column], letter)]
    _make_processed_folder(tmp_path/'processed', recordings, cycles=1)
    places = _Places(tmp_path/'raw', tmp_path/'processed', tmp_path/'benchmark')
    def persons(split, what='train'):
        dealt = _deal_split(split, places)
        if dealt.empty: return dealt.empty
        return set(Task.open(dealt.data_dir, split.task).config['split_persons'][what])
    splits = _list_splits(_read_protocol(PROTOCOL | dict(
        tasks=['physionet2016'], splits=dict(few=dict(persons_per_class=[1, 2, 5], draws=2)))))
    drawn = [persons(s) for s in splits]
    assert [len(d) for d in drawn] == [2, 2, 4, 4, 10, 10]
    assert drawn[0] < drawn[2] < drawn[4] and drawn[1] < drawn[3] < drawn[5]
    assert drawn[0] != drawn[1] and not drawn[4] & persons(splits[4], 'test')
    out = _Split('without-b', 'g', 'physionet2016', without='folder b')
    assert persons(out, 'test') == {p for p in recordings['person_id'] if p[0] == 'b'}
    assert not {p for p in persons(out) | persons(out, 'val') if p[0] == 'b'}
    missing = _Split('without-f', 'g', 'physionet2016', without='folder f')
    assert persons(missing) == ('nobody to test: no folder f here, only folder a, folder b, '
                                'folder e')


def test_another_task_is_tested_and_signal_quality_counts(tmp_path):
    recordings = _make_recordings(['circor', 'physionet2016'], 24)
    of_2016 = recordings['dataset'] == 'physionet2016'
    recordings['signal_quality'] = np.where(of_2016, np.where(of_2016.index % 3 == 0, 'poor',
                                                              'good'), None)
    _make_processed_folder(tmp_path/'processed', recordings, cycles=1)
    protocol = PROTOCOL | dict(tasks=['physionet2016', 'circor_outcome'], rules=['mean'], splits={
        'own': dict(tasks='physionet2016'),
        'strange': dict(tasks='circor_outcome', test_on='physionet2016')})
    rows = run(tmp_path, tmp_path, protocol)
    assert not rows.query('group == "strange" and kind == "baseline"').size   # not comparable
    assert (rows['runs'] == rows['planned']).all() and (rows['task'] == 'physionet2016').all()
    for split in ('seed42', 'seed42-on-physionet2016'):
        trained = 'physionet2016' if split == 'seed42' else 'circor_outcome'
        checkpoint = tmp_path/'made'/'runs'/split/f'{trained}_cnn_seed1'/'best_model.pt'
        own = evaluate(checkpoint, 'physionet2016', tmp_path/'made'/'data'/'physionet2016'/'seed42',
                       output_dir=tmp_path/'evaluation', draws=50)['official']
        told = rows.query(f'split == "{split}" and arm == "cnn"').set_index('metric')['value']
        assert own['rule'] == 'signal quality' and told[own['name']] == own['value']


@pytest.mark.parametrize('content, told', [
    ('taks: [pascal]', r"my\.yaml: unknown key 'taks'; the nearest valid one is 'tasks'"),
    ('tasks: [pascall]', r"my\.yaml: tasks: unknown task 'pascall'; .* is 'pascal'"),
    ('rules: [any_presnt]', "unknown rule 'any_presnt'; the nearest valid one is 'any_present'"),
    ('splits: {a: {gven: published1}}', r"splits\.a: unknown key 'gven'; .* is 'given'"),
    ('splits: {a: {seed: 1, leaky: true}}', 'leaky keeps what a given split separates'),
    ('splits: {a: {folds: 2}}', 'folds is 2; give 3 or more'),
    ('splits: {}', r'my\.yaml: splits is empty'), ('arms: {}', 'arms is empty'),
    ('arms: {a: {pretrained: none, confg: linear}}', r"arms\.a: unknown key 'confg'"),
    ('arms: {a: {config: no_such, pretrained: none}}', r'arms\.a: no configuration no_such'),
    ('arms: {a: {config: linear}}', r'arms\.a: pretrained is missing'),
    ('minutes: soon', 'minutes is soon; give how many a run takes'),
    ('arms: {a: {pretrained: none, minutes: 0}}', r'arms\.a: minutes is 0; give how many'),
    ('arms: {a/b: {pretrained: none}}', "'a/b' is no name for an arm"),
    ('arms: {a: {pretrained: none, change: {training: {epocs: 1}}}}',
     "unknown key 'training.epocs'"),
    ('seeds: [1, 1]', 'seeds is'), ('seeds: many', 'seeds is many; give how many'),
    ('quick: {arm: [a]}', r"quick: unknown key 'arm'; the nearest valid one is 'arms'")])
def test_a_mistake_is_one_sentence(tmp_path, capsys, content, told):
    sound = yaml.safe_dump({k: v for k, v in dict(
        PROTOCOL, splits=dict(a=dict(seed=1))).items() if k not in yaml.safe_load(content)})
    (tmp_path/'my.yaml').write_text(sound+content)
    quick = ['--quick'] if content.startswith('quick') else []
    code = pahcl_benchmark([str(tmp_path/'my.yaml'), '--output-dir', str(tmp_path/'out'), *quick])
    said = ' '.join(capsys.readouterr().err.split())
    assert code in (1, 2) and not (tmp_path/'out').exists()
    assert re.search(told, said) and str(tmp_path/'my.yaml') in said


@pytest.mark.parametrize('name', _packaged_protocols())
def test_packaged_protocols_are_sound(name):
    content = yaml.safe_load(_packaged_protocols()[name].read_text(encoding='utf-8'))
    lacking = {a.get('config') for a in content['arms'].values()}-{None, *_packaged_configs()}
    if lacking: pytest.skip(f'{lacking} is not packaged yet')
    whole, quick = (_read_protocol(name, quick=q) for q in (False, True))
    assert whole.about and 0 < _count_runs(quick) <= 8 < _count_runs(whole)
    assert _read_protocol(name, cross_validate=True, seeds='2').seeds == [42, 43]
    names = [s.name+s.task for s in _list_splits(whole)]
    assert len(set(names)) == len(names)
