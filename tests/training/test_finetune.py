"""pahcl.finetune end to end on real recordings where PAHCL_RAW_DIR names them, else on simulated
ones: every mode, both kinds of checkpoints, both trackers, faults
"""
import pahcl.models.checkpoints
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pahcl.core.basics import PahclError, read_json
from pahcl.models.packaged import _strip_to_classifier
from pahcl.models.pretrained import resolve_checkpoint
from pahcl.models.encoders import build_encoder
from pahcl.evaluate import pahcl_evaluate
from pahcl.evaluation.evaluator import open_model, open_split
from pahcl.finetune import pahcl_finetune
from pahcl.training.finetuning import finetune
from pahcl.training.objective import _cycle_losses
from pahcl.pretrain import pahcl_pretrain
from pahcl.models.checkpoints import load_checkpoint, save_checkpoint

QUICK = {'training.cycles_per_recording': 1, 'training.num_workers': 0}
GUIDE = '''
experiment: {name: pahcl_finetune, description: everything that the guide's example sets}
task: {name: default, type: classification}
data: {base_dir: data/downstream, raw_dir: data/raw, processed_dir: data/processed, sample_rate: \
5000, target_length: 4000, num_substructures: 4}
model: {encoder_type: cnn_mamba, cnn_channels: [32, 64, 128, 256], cnn_kernel_sizes: [7, 5, 5, 3], \
cnn_strides: [2, 2, 2, 2], mamba_d_model: 256, mamba_n_layers: 4}
classifier: {hidden_dim: 128, dropout: 0.3}
downstream: {num_classes: 2, label_map: {normal: 0, abnormal: 1}, hidden_dim: 128, dropout: 0.3, \
num_epochs: 100, batch_size: 32, learning_rate: 1e-3, weight_decay: 1e-4, warmup_epochs: 5, \
early_stopping_patience: 15, label_smoothing: 0.1, use_class_weights: true}
training: {num_epochs: 100, batch_size: 32, learning_rate: 1e-3, weight_decay: 1e-4, \
warmup_epochs: 5, min_lr: 1e-7, encoder_lr_scale: 0.1, label_smoothing: 0.1, use_class_weights: \
true, early_stopping_patience: 15, grad_clip_norm: 1.0, num_workers: 4, use_amp: true, \
log_interval: 20, save_interval: 10}
pretrain: {checkpoint_path: checkpoints/pretrain/best_model.pt, load_encoder_only: true, \
freeze_encoder: false}
evaluation: {primary_metric: f1_macro, metrics: [accuracy, f1, f1_macro, auroc, precision, \
recall], save_confusion_matrix: true}
seed: 42
'''


@pytest.fixture(scope='module')
def pretrained(work):
    "A SimCLR and a MoCo checkpoint of one short epoch."
    small = work/'pretrain.yaml'
    small.write_text('model: {encoder_type: cnn_mamba_small}\ncontrast: {queue_size: 128}\n'
                     'training: {num_epochs: 1, warmup_epochs: 0, accumulation_steps: '
                     '1, cycles_per_recording: 1}\n')
    for name, flags in (('simclr', []), ('moco', ['--moco'])):
        assert pahcl_pretrain(['--config', str(small), '--processed_dir', str(work/'processed'),
                               '--downstream-dir', str(work/'downstream'), '--output-dir',
                               str(work/'outputs'), '--experiment_name', name, *flags]) == 0
    return {name: work/'outputs'/name/'best_model.pt' for name in ('simclr', 'moco')}


def tune(work, out, **given):
    return finetune(output_dir=work/out, **dict(data_dir=work/'downstream', epochs=1,
                                                **{'training.warmup_epochs': 0}) | QUICK | given)


def check_kept_validation(work, folder, task, names=('best_model', 'final_model')):
    "What a checkpoint keeps of the validation split is what an evaluation of it says."
    cycles, opened = open_split(task, work/'downstream', 'val')
    for name in names:
        kept = torch.load(folder/f'{name}.pt', weights_only=True)['validation']
        levels = open_model(folder/f'{name}.pt', opened).predict(cycles).at_levels()
        assert list(kept) == ['recording', 'subject']
        numbers = {}
        for level, units in kept.items():
            assert units['label'].dtype == units['person'].dtype == torch.int64
            assert units['probabilities'].dtype == torch.float32
            said = levels[level]
            assert units['label'].tolist() == said.table['label'].tolist()
            assert units['probabilities'].numpy() == pytest.approx(said.probabilities, abs=2e-6)
            for person, number in zip(said.persons, units['person'].tolist()):
                assert numbers.setdefault(person, number) == number
        assert sorted(numbers.values()) == list(range(len(numbers)))


@pytest.mark.usefixtures('no_figures')
def test_the_kept_validation_is_what_the_command_writes(work):
    "A model of bags of recordings: its own answers, and subjects by the rule `mean`."
    tune(work, 'outputs', **{'task': 'pascal', 'pretrained': 'none', 'experiment_name': 'kept',
                             'encoder_type': 'cnn_mamba_small', 'training.cycles_per_bag': 2,
                             'training.aggregation': 'attention',
                             'training.bag_level': 'recording'})
    path = work/'outputs'/'pascal_kept'/'best_model.pt'
    assert pahcl_evaluate(['--checkpoint', str(path), '--task', 'pascal', '--split', 'val',
                           '--data-dir', str(work/'downstream')]) == 0
    for level, units in load_checkpoint(path)['validation'].items():
        said = pd.read_csv(path.parent/'evaluation_pascal_val'/f'predictions_{level}.csv')
        assert units['label'].tolist() == said['label'].tolist()
        assert units['probabilities'].numpy() == pytest.approx(
            said.filter(regex='^probability_').to_numpy(), abs=2e-6)
        same = np.equal.outer(said['person_id'].to_numpy(), said['person_id'].to_numpy())
        person = units['person'].numpy()
        assert (np.equal.outer(person, person) == same).all()


@pytest.mark.parametrize('task', ['circor_murmur', 'circor_outcome', 'physionet2016', 'pascal'])
def test_every_task_learns_from_a_pretrained_encoder(work, pretrained, task):
    metrics = tune(work, 'outputs', task=task, pretrained=pretrained['simclr'])
    folder = work/'outputs'/f'{task}_downstream'
    assert {'config.yaml', 'train.log', 'best_model.pt', 'final_model.pt', 'final_metrics.json',
            'confusion_matrix.csv'} <= {p.name for p in folder.iterdir()}
    assert {f'test_{m}'
            for m in ('accuracy', 'f1', 'f1_macro', 'auroc', 'precision', 'recall')} <= set(metrics)
    matrix = pd.read_csv(folder/'confusion_matrix.csv', index_col=0)
    test = pd.read_csv(work/'downstream'/task/'test.csv', dtype=str)
    assert (matrix.to_numpy().sum() == test['subject_id'].nunique()
            and metrics['loaded']['loaded'] == 40)
    if task == 'physionet2016': check_kept_validation(work, folder, task)


def test_moco_checkpoint_loads_and_the_log_says_what_it_found(work, pretrained):
    tune(work, 'outputs', task='pascal', pretrained=pretrained['moco'], experiment_name='moco')
    log = (work/'outputs'/'pascal_moco'/'train.log').read_text()
    # fitted to a run of an epoch
    used = read_json(pretrained['moco'].parent/'final_metrics.json')['moco_momentum']
    assert re.search(rf'MoCo detected: True, momentum {used}, queue size 128, \d+ MoCo parameters '
                     r'skipped, \d+ parameters of heads skipped, 40 parameters loaded', log)
    loaded, start = (load_checkpoint(p)['model_state_dict']
                     for p in (pretrained['moco'], work/'outputs'/'pascal_moco'/'final_model.pt'))
    # it learnt from there
    assert any(not torch.equal(loaded[k], v) for k, v in start.items() if k.startswith('encoder.'))


def test_script_in_linear_mode_with_both_trackers(work, pretrained, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    arguments = ['--task', 'physionet2016', '--config', 'small_finetune', '--pretrained',
                 pretrained['simclr'], '--data_dir', work/'downstream', '--output-dir',
                 work/'outputs', '--experiment_name', 'linear',
                 '--linear_eval', '--epochs', '2', '--lr', '1e-2', '--batch_size', '16', '--seed',
                 '7', '--tensorboard', '--wandb', '--wandb-project', 'PA-HCL']
    assert pahcl_finetune(list(map(str, arguments))) == 0
    folder = work/'outputs'/'physionet2016_linear'
    before, after = (load_checkpoint(p)['model_state_dict']
                     for p in (pretrained['simclr'], folder/'final_model.pt'))
    encoder = {k for k in before if k.startswith('encoder.')}   # parameters and buffers
    assert (encoder == {k for k in after if k.startswith('encoder.')}
            and all(torch.equal(before[k], after[k]) for k in encoder))
    assert (list((folder/'tensorboard').glob('events.out.tfevents.*'))
            and list((folder/'wandb').glob('offline-run-*')))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tags = set(EventAccumulator(str(folder/'tensorboard')).Reload().Tags()['scalars'])
    assert ({f'train/{m}' for m in ('loss', 'accuracy', 'f1', 'precision', 'recall')}
            | {f'validation/{m}' for m in ('loss', 'accuracy', 'f1', 'auroc', 'auprc')}
            | {'learning_rate/classifier'} <= tags)
    config = yaml.safe_load((folder/'config.yaml').read_text())
    assert (config['training']['learning_rate'], config['training']['batch_size'], config['seed'],
            config['pretrain']['freeze_encoder']) == (1e-2, 16, 7, True)


def test_few_shot_is_nested_and_keeps_every_class(work):
    used = {}
    for ratio in (0.01, 0.5):
        metrics = tune(work, 'outputs', task='circor_murmur', pretrained='none',
                       encoder_type='cnn_mamba_small', experiment_name=f'few_{ratio}',
                       few_shot=True, shot_ratio=ratio)
        table = pd.read_csv(work/'outputs'/f'circor_murmur_few_{ratio}'/'few_shot.csv', dtype=str)
        used[ratio] = set(table['person_id'])
        assert (table['label'].nunique() == 3 and metrics['mode'] == 'fewshot'
                and metrics['training_subjects'] == table['subject_id'].nunique())
    assert used[0.01] < used[0.5]


def test_a_run_is_repeated_by_its_config_and_never_overwritten(work, capsys):
    given = dict(task='pascal', pretrained='none', encoder_type='cnn_mamba_small',
                 experiment_name='again')
    first = tune(work, 'outputs', **given)
    again = finetune(work/'outputs'/'pascal_again'/'config.yaml', output_dir=work/'repeated')
    assert first == again   # scores, history, all of it, to the last digit
    packaged = []           # and the file that would be packaged, to the last byte
    for out in ('outputs', 'repeated'):
        saved = load_checkpoint(work/out/'pascal_again'/'best_model.pt')
        save_checkpoint(work/out/'packaged.safetensors', _strip_to_classifier(saved))
        packaged.append((work/out/'packaged.safetensors').read_bytes())
    assert packaged[0] == packaged[1]
    assert pahcl_finetune(['--config', str(work/'outputs'/'pascal_again'/'config.yaml'),
                           '--output-dir', str(work/'outputs'), '--overwrite']) == 0
    assert json.loads((work/'outputs'/'pascal_again'/'final_metrics.json').read_text()) == first
    with pytest.raises(PahclError, match='training.learning_rate is 0.001 there and 0.01 here'):
        tune(work, 'outputs', **given, lr=1e-2)
    assert json.loads((work/'outputs'/'pascal_again'/'final_metrics.json').read_text()) == first
    assert tune(work, 'outputs', **given, lr=1e-2, overwrite=True) != first


# of PyTorch: gradients that lie otherwise than their weights, deprecated calls, a bad end
NOISE = r'Warning|strides|destroy_process_group|terminate called'

def test_two_processes_give_the_scores_of_one(work):
    given = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
             '--standalone', '-m', 'pahcl.finetune', '--task', 'pascal',
             '--config', work/'two.yaml', '--pretrained', 'none', '--data-dir', work/'downstream',
             '--epochs', '1']
    (work/'two.yaml').write_text('model: {encoder_type: cnn_mamba_small, dropout: 0.0}\n'
                                 'classifier: {dropout: 0.0}\ntraining: {cycles_per_recording: '
                                 '1, warmup_epochs: 0, batch_size: 7, use_amp: false, mixup: 0.3, '
                                 'ema_decay: 0.9}\naugmentation: {noise_probability: 0.5}\n')
    done = subprocess.run([*map(str, given), '--output-dir', str(work/'two')],
                          env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'test_f1_macro' in done.stderr and not re.search(NOISE, done.stderr), done.stderr
    assert pahcl_finetune(list(map(str, [*given[7:], '--output-dir', work/'one']))) == 0
    one, two = (json.loads((work/n/'pascal_downstream'/'final_metrics.json').read_text())
                for n in ('one', 'two'))
    assert '2 process(es)' in (work/'two'/'pascal_downstream'/'train.log').read_text()
    for key, value in one.items():
        if key.startswith('test_') and value is not None:
            assert two[key] == pytest.approx(value, abs=1e-6), key
    for key, value in one['history'][0].items():
        assert two['history'][0][key] == pytest.approx(value, abs=1e-6), key
    cycles = sum(not line.startswith(('#', 'subject_id'))
                 for line in (work/'downstream'/'pascal'/'test.csv').read_text().splitlines())
    assert one['levels']['cycle']['n'] == two['levels']['cycle']['n'] == cycles   # every cycle once
    assert two['levels']['cycle']['confusion_matrix'] == one['levels']['cycle']['confusion_matrix']
    check_kept_validation(work, work/'two'/'pascal_downstream', 'pascal')


def refused(capsys, *arguments, told):
    assert pahcl_finetune(list(map(str, arguments))) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('pahcl_finetune: error: ') and re.search(told, error), error


def test_checkpoints_that_do_not_fit(work, pretrained, tmp_path, capsys):
    given = ['--task', 'pascal', '--data-dir', work/'downstream', '--output-dir', tmp_path/'out']
    (tmp_path/'other.yaml').write_text('model: {encoder_type: cnn_mamba}')
    refused(capsys, *given, '--config', tmp_path/'other.yaml', '--pretrained', pretrained['simclr'],
            told='best_model.pt holds an encoder with encoder_type cnn_mamba_small, '
                 'but model.encoder_type is cnn_mamba')
    saved = load_checkpoint(pretrained['simclr'])
    for name, change, told in [('fewer', lambda s: s.pop('encoder.cnn.layers.0.conv.weight'),
                                'cnn.layers.0.conv.weight'),
                               ('more', lambda s: s.update({'backbone.weight': torch.zeros(1)}),
                                'backbone.weight')]:
        state = dict(saved['model_state_dict'])
        change(state)
        save_checkpoint(tmp_path/f'{name}.pt', saved | dict(model_state_dict=state))
        refused(capsys, *given, '--pretrained', tmp_path/f'{name}.pt', told=told)
    held = pd.read_csv(work/'downstream'/'pascal'/'test.csv', dtype=str)['subject_id'][0]
    person = pd.read_csv(work/'downstream'/'pascal'/'recordings.csv',
                         dtype=str).set_index('subject_id')['person_id'][[held]].iloc[0]
    save_checkpoint(tmp_path/'leak.pt', saved | dict(pretrain_persons=[person]))
    refused(capsys, *given, '--pretrained', tmp_path/'leak.pt',
            told=f'trained on 1 persons of the validation and test splits: {person}')
    known = pd.read_csv(work/'downstream'/'physionet2016'/'recordings.csv',
                        dtype=str).query('split == "val" and cycles != "0"')
    # older versions took a record for a person
    record, whose = known[['subject_id', 'person_id']].iloc[0]
    save_checkpoint(tmp_path/'older.pt', saved | dict(pretrain_persons=[record]))
    refused(capsys, '--task', 'physionet2016', *given[2:], '--pretrained', tmp_path/'older.pt',
            told=f'trained on 1 persons of the validation and test splits: {whose}')
    save_checkpoint(tmp_path/'on_purpose.pt',
                    saved | dict(pretrain_persons=[person], include_heldout_subjects=True))
    tune(work, tmp_path/'out', task='pascal', pretrained=tmp_path/'on_purpose.pt')
    assert 'no estimate for new persons' in (
        tmp_path/'out'/'pascal_downstream'/'train.log').read_text()


def test_the_guides_example_loads_as_it_stands(work, tmp_path, capsys):
    (tmp_path/'guide.yaml').write_text(GUIDE)
    given = ['--config', tmp_path/'guide.yaml', '--data-dir', work/'downstream', '--output-dir',
             tmp_path/'out']
    refused(capsys, *given, '--task', 'physionet2016',
            told='checkpoint not found: checkpoints/pretrain/best_model.pt')
    refused(capsys, *given, '--task', 'pascal', '--pretrained', 'none',
            told="downstream.label_map is .*, but the task pascal")
    (tmp_path/'guide.yaml').write_text(GUIDE.replace('save_interval', 'sa8e_interval'))
    refused(capsys, *given, '--task', 'physionet2016',
            told="guide.yaml: unknown key 'training.sa8e_interval'; the nearest valid one is "
                 "'training.save_interval'")
    (tmp_path/'guide.yaml').write_text(GUIDE.replace(
        'batch_size: 32, learning_rate: 1e-3, weight_decay: 1e-4, warmup_epochs: 5, min_lr',
        'batch_size: 64, learning_rate: 1e-3, weight_decay: 1e-4, warmup_epochs: 5, min_lr'))
    refused(capsys, *given, '--task', 'physionet2016',
            told='downstream.batch_size is 32 but training.batch_size is 64')


def test_a_person_in_two_splits_is_refused(work, tmp_path, capsys):
    shutil.copytree(work/'downstream'/'pascal', tmp_path/'pascal')
    path = tmp_path/'pascal'/'cycles.csv'
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    train, test = (table[table['split'] == s].iloc[0] for s in ('train', 'test'))
    table.loc[table['person_id'] == test['person_id'], 'person_id'] = train['person_id']
    table.to_csv(path, index=False)
    refused(capsys, '--task', 'pascal', '--pretrained', 'none', '--data-dir', tmp_path,
            '--output-dir', tmp_path/'out', told='cycles.csv says person_id')
    assert not (tmp_path/'out').exists()


@pytest.mark.usefixtures('no_figures')
def test_other_data_is_no_resume_and_no_test_of_the_same_run(work, tmp_path, capsys):
    """The split is dealt anew: a run that was made before is neither gone on with nor called
    finished, and evaluating its model says who is in it.
    """
    from pahcl.evaluation.evaluator import evaluate
    from pahcl.data.splitting import prepare
    shutil.copytree(work/'downstream'/'pascal', tmp_path/'downstream'/'pascal')
    given = dict(task='pascal', pretrained='none', encoder_type='cnn_mamba_small',
                 data_dir=tmp_path/'downstream')
    first = tune(work, tmp_path/'out', **given)
    assert evaluate(tmp_path/'out'/'pascal_downstream'/'best_model.pt', 'pascal',
                    tmp_path/'downstream', draws=5)['notes'] == []
    (tmp_path/'out'/'pascal_downstream'/'final_metrics.json').unlink()  # as if it had been killed
    prepare('pascal', tmp_path/'no raw', work/'processed', tmp_path/'downstream', seed=7)
    with pytest.raises(PahclError, match='made from other inputs: train has changed'):
        tune(work, tmp_path/'out', **given)
    notes = evaluate(tmp_path/'out'/'pascal_downstream'/'best_model.pt', 'pascal',
                     tmp_path/'downstream', draws=5)['notes']
    assert 'persons trained the model' in notes[0]
    with pytest.raises(PahclError,
                       match='was trained on .* persons of the validation and test splits'):
        tune(work, tmp_path/'out',
             **given | dict(pretrained=tmp_path/'out'/'pascal_downstream'/'best_model.pt',
                            experiment_name='next', encoder_type=None))
    assert tune(work, tmp_path/'out', **given, overwrite=True)['seed'] == first['seed']


def test_overwrite_leaves_what_is_not_ours(work, tmp_path):
    (tmp_path/'out'/'pascal_mine').mkdir(parents=True)
    (tmp_path/'out'/'pascal_mine'/'thesis.txt').write_text('mine')
    with pytest.raises(PahclError, match='does not carry the mark of a run of pahcl'):
        tune(work, tmp_path/'out', task='pascal', pretrained='none', encoder_type='cnn_mamba_small',
             experiment_name='mine', overwrite=True)
    assert (tmp_path/'out'/'pascal_mine'/'thesis.txt').exists()


def test_wandb_without_a_key_leaves_nothing(work, tmp_path, monkeypatch):
    def start(self): raise ValueError('api_key not configured (no-tty). Call wandb login.')
    monkeypatch.setattr('pahcl.training.trackers.WandBTracker.start', start)
    with pytest.raises(PahclError, match='wandb login, or set WANDB_MODE=offline'):
        tune(work, tmp_path/'out', task='pascal', pretrained='none', encoder_type='cnn_mamba_small',
             wandb=True)
    assert not list((tmp_path/'out').glob('*'))


def test_losses_add_up_over_any_split_of_a_batch():
    """The mean over cycles is the same whether batches or processes share them: the seam that
    distributed training stands on.
    """
    generator = torch.Generator().manual_seed(0)
    logits, labels, weights = (torch.randn(12, 3, generator=generator),
                               torch.randint(0, 3, (12,), generator=generator),
                               torch.tensor([.5, 2., 1.]))
    whole = _cycle_losses(logits, labels, weights, .1, 'focal').mean()
    parts = [_cycle_losses(logits[a:b], labels[a:b], weights, .1, 'focal').mean()*(b-a)/12
             for a, b in ((0, 5), (5, 6), (6, 12))]
    assert torch.allclose(whole, sum(parts))


def test_packaged_weights(work):
    metrics = tune(work, 'outputs', task='pascal', pretrained='packaged',
                   experiment_name='packaged', linear_eval=True)
    assert (metrics['encoder_type'], metrics['loaded']['loaded'],
            metrics['mode']) == ('cnn_mamba_small', 40, 'linear')
    check_kept_validation(work, work/'outputs'/'pascal_packaged', 'pascal')


def test_the_log_says_what_learns_and_what_chose_the_epoch(work, tmp_path, monkeypatch):
    """A frozen encoder does not count as learning; few shots from an epoch that labels chose are a
    warning.
    """
    monkeypatch.setattr('pahcl.models.mamba_block._find_library',
                        lambda: (None, 'WARNING: no compiled selective scan (a test)'))
    saved = load_checkpoint(resolve_checkpoint('packaged'))
    for name, facts, told in (('labels', dict(chosen_by='labels of pascal'), True),
                              ('loss', dict(chosen_by='contrastive loss'), False)):
        save_checkpoint(tmp_path/f'{name}.pt', saved | facts)
        given = dict(task='pascal', pretrained=tmp_path/f'{name}.pt',
                     experiment_name=name, epochs=1)
        few = tune(work, tmp_path, few_shot=True, shot_ratio=0.5, linear_eval=True, **given)
        assert few['loaded']['epoch_chosen_by'] == facts['chosen_by']
        lines = (tmp_path/f'pascal_{name}'/'train.log').read_text().splitlines()
        assert any('WARNING: the pretrained epoch was chosen by: labels of pascal; more labels' in l
                   for l in lines) == told
        assert any('WARNING: no compiled selective scan (a test)' in l for l in lines[:4])
        content = load_checkpoint(tmp_path/f'pascal_{name}'/'best_model.pt')['model_state_dict']
        counts = re.search(r'([0-9,]+) parameters learn, ([0-9,]+) are frozen', '\n'.join(lines))
        learning, frozen = (int(c.replace(',', '')) for c in counts.groups())
        assert frozen == sum(p.numel() for p in build_encoder('cnn_mamba_small').parameters())
        assert learning == sum(v.numel() for k, v in content.items() if k.startswith('classifier.'))

def test_linear_evaluation_asks_the_encoder_once(work, monkeypatch):
    """The second probe, with another learning rate, finds all features in the cache; a damaged
    cache is made again.
    """
    from pahcl.models.classifier import encode_cycles as encode
    calls = []
    monkeypatch.setattr('pahcl.training.finetuning_data.encode_cycles',
                        lambda *a, **k: calls.append(len(a[1])) or encode(*a, **k))
    shutil.copytree(work/'downstream'/'pascal', work/'cached'/'pascal',
                    ignore=shutil.ignore_patterns('.features'))
    given = dict(task='pascal', pretrained='packaged', linear_eval=True, epochs=3,
                 data_dir=work/'cached')
    first = tune(work, 'cached/out', **given, experiment_name='a')
    rows = [len(pd.read_csv(work/'cached'/'pascal'/f'{s}.csv', comment='#'))
            for s in ('train', 'val', 'test')]
    assert calls == rows   # one pass over each split, whatever the epochs
    again = tune(work, 'cached/out', **given, experiment_name='b')
    assert (calls == rows and again['history'] == first['history']
            and again['levels'] == first['levels'])
    for path in (work/'cached'/'pascal'/'.features').glob('*.npz'): path.write_bytes(b'damaged')
    assert (tune(work, 'cached/out', **given, experiment_name='c')['history'] == first['history']
            and calls == rows*2)


@pytest.mark.parametrize('linear_eval, aggregation', [(True, 'cycle'), (False, 'attention')])
def test_a_head_on_the_means_of_the_states(work, linear_eval, aggregation):
    """The model that was saved says of the test cycles what the run measured, from the states' own
    means, and its cached features are not those of cycles.
    """
    from pahcl.data.tasks import Task
    from pahcl.models.checkpoints import load_classifier
    from pahcl.models.classifier import predict_cycles
    from pahcl.core.config import load_config
    from pahcl.studies.cross_validation import _drop_unset_keys
    from pahcl.training.objective import _score_test_cycles
    from pahcl.data.loader import Cycles
    shutil.copytree(work/'downstream'/'pascal', work/f'states_{aggregation}'/'pascal',
                    ignore=shutil.ignore_patterns('.features'))
    given = dict(task='pascal', pretrained='packaged', linear_eval=linear_eval, epochs=2,
                 data_dir=work/f'states_{aggregation}', **{'training.aggregation': aggregation})
    tune(work, 'outputs', **given, experiment_name=f'means_{aggregation}')
    metrics = tune(work, 'outputs', **given, experiment_name=f'states_{aggregation}',
                   **{'classifier.pooling': 'phases'})
    model, saved = load_classifier(work/'outputs'/f'pascal_states_{aggregation}'/'best_model.pt')
    assert model.pooling == 'phases' and next(m.in_features for m in model.classifier if hasattr(
        m, 'in_features')) == 4*model.encoder.out_dim
    test = Cycles.from_task(work/f'states_{aggregation}'/'pascal', 'test')
    said = predict_cycles(model, test)
    assert metrics['levels']['subject']['auroc'] == pytest.approx(_score_test_cycles(
        test.table, said, Task.open(work/'downstream', 'pascal'),
        load_config('finetune', _drop_unset_keys(saved['config'])))['levels']['subject']['auroc'])


def test_the_linear_head_does_the_features_justice(work, monkeypatch):
    """scikit-learn's logistic regression on the same features, spoilt by scales from 0.001 to 1000,
    is the oracle: the head's loss comes close to its optimum.
    """
    import pahcl.models.classifier as classifier
    from pahcl.data.loader import Cycles
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    encode = classifier.encode_cycles
    def spoilt(encoder, *a, **k):
        features = encode(encoder, *a, **k)
        return (features*np.logspace(-3, 3, features.shape[1])+10).astype('float32')
    monkeypatch.setattr('pahcl.training.finetuning_data.encode_cycles', spoilt)
    shutil.copytree(work/'downstream'/'physionet2016', work/'spoilt'/'physionet2016',
                    ignore=shutil.ignore_patterns('.features'))
    options = {'training.cycles_per_recording': None, 'training.weight_decay': 0.,
               'training.use_class_weights': False, 'training.num_workers': 0}
    finetune(output_dir=work/'spoilt'/'out', task='physionet2016', pretrained='packaged',
             linear_eval=True, data_dir=work/'spoilt', epochs=100, **options)
    model, _ = pahcl.models.checkpoints.load_classifier(
        work/'spoilt'/'out'/'physionet2016_downstream'/'final_model.pt')
    cycles = Cycles.from_task(work/'spoilt'/'physionet2016', 'train')
    features, y = spoilt(model.encoder, cycles), cycles.table['label'].to_numpy()
    scaled = StandardScaler().fit_transform(features.astype(float))
    # few real persons can be told apart entirely: without a penalty there is
    # no optimum to come close to
    oracle = LogisticRegression(C=.1, max_iter=5000).fit(scaled, y).predict_proba(scaled)
    loss = lambda p: -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean()
    chance = loss(np.tile(np.bincount(y)/len(y), (len(y), 1)))
    head = loss(classifier.predict_probabilities(model, features))
    assert chance-head > .9*(chance-loss(oracle)), (chance, head, loss(oracle))


def same_validation(work, *folders, names=('best_model', 'final_model')):
    for name in names:
        one, two = (load_checkpoint(work/'outputs'/f/f'{name}.pt')['validation'] for f in folders)
        assert all(torch.equal(one[level][k], two[level][k]) for level in one for k in one[level])


def test_a_run_killed_before_its_last_file_keeps_its_validation(work, monkeypatch):
    "No epoch is left to be validated: what was said stands in `last.pt`, and only after an epoch."
    from pahcl.training import trainer
    given = {'task': 'pascal', 'pretrained': 'none', 'encoder_type': 'cnn_mamba_small',
             'experiment_name': 'last', 'training.save_steps': 1, 'training.batch_size': 8}
    real, within = trainer.save_checkpoint, []
    def save(path, content):
        if path.name == 'final_model.pt': raise KeyboardInterrupt
        if content.get('training_state', {}).get('part'): within.append('validation' in content)
        real(path, content)
    monkeypatch.setattr(trainer, 'save_checkpoint', save)
    with pytest.raises(KeyboardInterrupt): tune(work, 'outputs', **given)
    assert within and not any(within)   # an epoch's middle is not what was validated
    monkeypatch.setattr(trainer, 'save_checkpoint', real)
    tune(work, 'outputs', **given)
    check_kept_validation(work, work/'outputs'/'pascal_last', 'pascal')


def test_a_killed_run_ends_as_one_that_was_not(work, monkeypatch):
    import pahcl.training.finetuning as module
    given = {'task': 'pascal', 'pretrained': 'none', 'encoder_type': 'cnn_mamba_small', 'epochs': 3,
             'training.aggregation': 'attention', 'training.cycles_per_bag': 2}
    whole = tune(work, 'outputs', **given, experiment_name='whole')
    scores = module._select_validation_scores
    def killed(*a):
        if (work/'outputs'/'pascal_killed'/'last.pt').exists(): raise KeyboardInterrupt
        return scores(*a)
    monkeypatch.setattr(module, '_select_validation_scores', killed)
    with pytest.raises(KeyboardInterrupt): tune(work, 'outputs', **given, experiment_name='killed')
    assert json.loads((work/'outputs'/'pascal_killed'/'status.json').read_text()) == dict(
        state='failed', why='interrupted')
    with pytest.raises(PahclError, match='seed is 42 there and 1 here'):
        tune(work, 'outputs', **given, experiment_name='killed', seed=1)
    monkeypatch.setattr(module, '_select_validation_scores', scores)
    resumed = tune(work, 'outputs', **given, experiment_name='killed')
    assert resumed['history'] == whole['history'] and resumed['levels'] == whole['levels']
    same_validation(work, 'pascal_whole', 'pascal_killed')
    assert 'goes on after epoch 1' in (work/'outputs'/'pascal_killed'/'train.log').read_text()


@pytest.mark.parametrize(
    'error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
              RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                           "can't allocate memory: you tried to allocate 4 bytes"), MemoryError(),
              RuntimeError('could not create a primitive')])
@pytest.mark.parametrize('linear', [False, True])
def test_out_of_memory(work, tmp_path, monkeypatch, capsys, error, linear):
    """In training, or in the pass that computes features: exit code 1, the batch size and the flag,
    and the folder says why it ended.
    """
    def full(self, *a, **k): raise error
    monkeypatch.setattr('pahcl.models.encoder_base.Encoder.forward', full)
    shutil.copytree(work/'downstream'/'pascal', tmp_path/'data'/'pascal',
                    ignore=shutil.ignore_patterns('.features'))
    refused(capsys, '--task', 'pascal', '--pretrained', 'packaged',
            '--data-dir', tmp_path/'data', '--output-dir', tmp_path, '--batch-size',
            24, *(['--linear-eval', '--seed', '5'] if linear else []),
            told='out of memory with batch size 24. Give a smaller one, e.g. --batch-size 12')
    status = json.loads((tmp_path/'pascal_downstream'/'status.json').read_text())
    assert status['state'] == 'failed' and 'batch size 24' in status['why']


def test_one_line_an_epoch(work):
    metrics = tune(work, 'outputs', task='pascal', pretrained='none',
                   encoder_type='cnn_mamba_small', experiment_name='lines', epochs=3)
    lines = re.findall(r'epoch (\d)/3: loss (\S+), validation f1_macro (\S+), '
                       r'best (\S+) \(epoch (\d)\), at most \d:\d\d:\d\d left',
                       (work/'outputs'/'pascal_lines'/'train.log').read_text())
    assert [int(n) for n, *_ in lines] == [1, 2, 3]
    for (_, loss, score, best, at), row in zip(lines, metrics['history']):
        assert (loss, score) == (f'{row["train/loss"]:.4f}', f'{row["validation/f1_macro"]:.4f}')
        assert (best
                == f'{max(r["validation/f1_macro"] for r in metrics["history"][:row["epoch"]]):.4f}'
                == f'{metrics["history"][int(at)-1]["validation/f1_macro"]:.4f}')


@pytest.mark.usefixtures('no_figures')
@pytest.mark.parametrize('aggregation, level', [('mean', 'subject'), ('attention', 'subject'),
                                                ('attention', 'recording')])
def test_a_model_of_bags_from_training_to_ensemble(work, aggregation, level):
    """Its recordings and subjects are its own answers, the same in training's end, in evaluation
    and by hand; an ensemble takes it beside a model of cycles.
    """
    from pahcl.models.checkpoints import load_classifier
    from pahcl.studies.ensemble import ensemble
    from pahcl.evaluation.evaluator import evaluate
    from pahcl.data.loader import Cycles
    name = f'{aggregation}_{level}'
    given = dict(task='circor_murmur', pretrained='none', encoder_type='cnn_mamba_small',
                 experiment_name=name)
    metrics = tune(work, 'bags', **given,
                   **{'training.aggregation': aggregation, 'training.bag_level': level,
                      'training.cycles_per_bag': 3})
    path = work/'bags'/f'circor_murmur_{name}'/'best_model.pt'
    results = evaluate(path, 'circor_murmur', work/'downstream', draws=5)
    for at in ('cycle', 'recording', 'subject'):
        assert (results['levels'][at]['accuracy'] == metrics['levels'][at]['accuracy']
                and results['levels'][at]['auroc'] == pytest.approx(metrics['levels'][at]['auroc']))
    assert any('bags of cycles that the model answers for itself' in note
               for note in results['notes'])
    check_kept_validation(work, path.parent, 'circor_murmur')
    model, _ = load_classifier(path)
    assert model.bag_levels == ['recording', 'subject'][:1+(level == 'subject')]
    cycles = Cycles.from_task(work/'downstream'/'circor_murmur', 'test')
    said = pd.read_csv(path.parent/'evaluation_circor_murmur_test'/f'predictions_{level}.csv',
                       dtype={f'{level}_id': str}).iloc[0]
    rows = np.flatnonzero(cycles.table[f'{level}_id'] == said[f'{level}_id'])
    batch = cycles.batch(rows)
    with torch.no_grad():
        h = model.encoder(batch['x'], batch['valid_length'])
        if aggregation == 'attention':   # equations 8 and 9, written out
            a = torch.softmax(torch.stack([model.attention.score.weight[0] @ (torch.tanh(
                model.attention.value(k))*torch.sigmoid(model.attention.gate(k))) for k in h]), 0)
            logits = model.classifier((a[:, None]*h).sum(0))
        else: logits = model.classifier(h).mean(0)
    assert said[['probability_Present', 'probability_Absent', 'probability_Unknown']].to_numpy(
        float) == pytest.approx(logits.softmax(-1).numpy(), abs=2e-6)
    if level == 'recording': return
    tune(work, 'bags', **given | dict(experiment_name='cycles'))
    both = ensemble([path, work/'bags'/'circor_murmur_cycles'/'best_model.pt'], 'circor_murmur',
                    work/'downstream', output_dir=work/'bags'/f'both_{name}', draws=5)
    table = pd.read_csv(work/'bags'/f'both_{name}'/'predictions_subject.csv',
                        dtype=dict(subject_id=str)).set_index('subject_id')['probability_Present']
    evaluate(work/'bags'/'circor_murmur_cycles'/'best_model.pt', 'circor_murmur',
             work/'downstream', draws=5)
    alone = [pd.read_csv(
        work/'bags'/f'circor_murmur_{n}'/'evaluation_circor_murmur_test'/'predictions_subject.csv',
        dtype=dict(subject_id=str)).set_index('subject_id')['probability_Present']
             for n in (name, 'cycles')]
    assert len(both['members']) == 2 and (table-(alone[0]+alone[1])/2).abs().max() < 2e-6


def test_silent_places_are_not_trained_as_present(work, tmp_path):
    """The recordings left out are those of Present subjects where CirCor names no murmur;
    validation and test stay whole; a folder of an older version asks the processed one.
    """
    folder = work/'downstream'/'circor_murmur'
    recordings = pd.read_csv(folder/'recordings.csv', dtype=str)
    ill = recordings[(recordings['label'] == '0') & (recordings['split'] == 'train')]
    silent = [r.recording_id for r in ill.itertuples() if isinstance(r.murmur_locations, str)
              and r.location not in r.murmur_locations.split('+')]
    given = {'task': 'circor_murmur', 'pretrained': 'none', 'encoder_type': 'cnn_mamba_small',
             'training.cycles_per_recording': 1}
    heard, everything = tune(work, 'murmurs', **given), tune(work, 'murmurs', **given | {
        'training.use_murmur_locations': False, 'experiment_name': 'all'})
    cycles = pd.read_csv(folder/'cycles.csv', dtype=str)
    lost = cycles['recording_id'].isin(silent).sum()
    assert (everything['training_cycles']-heard['training_cycles'] == lost
            and everything['levels']['cycle']['n'] == heard['levels']['cycle']['n'])
    log = (work/'murmurs'/'circor_murmur_downstream'/'train.log').read_text()
    assert (f'use_murmur_locations: {len(silent)} recordings ({lost:,} cycles) of {len(ill)} '
            'recordings' in log)
    shutil.copytree(folder, tmp_path/'circor_murmur')
    recordings.drop(columns='murmur_locations').to_csv(tmp_path/'circor_murmur'/'recordings.csv',
                                                       index=False)
    about = tmp_path/'circor_murmur'/'task_config.json'   # an older version's had no manifest
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items()
                                 if k != 'manifest'}))
    older = dict(given, data_dir=tmp_path)
    assert tune(work, 'murmurs', **older, experiment_name='older',
                **{'data.processed_dir': str(work/'processed')})['history'] == heard['history']
    with pytest.raises(PahclError,
                       match='Prepare the task again with pahcl_prepare, or train on all places'):
        tune(work, 'murmurs', **older, experiment_name='lost',
             **{'data.processed_dir': str(tmp_path)})
    with pytest.raises(PahclError, match='do not say where a murmur was heard'):
        tune(work, 'murmurs', **given | {'task': 'pascal', 'training.use_murmur_locations': True})
    tune(work, 'murmurs', **given, **{'training.aggregation': 'mean', 'experiment.name': 'bags'})
    assert 'the label is true of the bag' in (
        work/'murmurs'/'circor_murmur_bags'/'train.log').read_text()
