"""Every key of the fine-tuning configuration is changed once, and something that can be seen
changes; a new key without a case fails
"""
import functools
import json
import re

import pytest
import torch
from pahcl.core.basics import fingerprint, PahclError
from pahcl.core.config import load_config
from pahcl.core.config_checks import _LEGACY_KEYS
from pahcl.core.config_sections import _FinetuneConfig, _known_keys
from pahcl.training.finetuning import finetune
from pahcl.training.finetuning_data import CycleSampler
from pahcl.data.inputs import open_cycles
from pahcl.data.splitting import prepare
from pahcl.testing.made import _make_processed_folder, _make_recordings
from pahcl.models.checkpoints import load_checkpoint

TINY = {'model.encoder_type': 'cnn', 'model.cnn_channels': [4, 6], 'model.cnn_kernel_sizes': [7, 5],
        'model.cnn_strides': [8, 8]}
MAMBA = {**TINY, 'model.encoder_type': 'cnn_mamba', 'model.mamba_d_model': 8,
         'model.mamba_n_layers': 1, 'model.mamba_d_state': 4}
BASE = {'task': 'pascal', 'pretrained': 'none', 'classifier.hidden_dim': 8,
        'training.num_epochs': 2, 'training.warmup_epochs': 0, 'training.batch_size': 8,
        'training.num_workers': 0, 'training.early_stopping_patience': 0}
RESIDUAL = {'model.encoder_type': 'resnet34_1d', 'model.cnn_channels': None,
            'model.cnn_kernel_sizes': None, 'model.cnn_strides': None,
            'training.cycles_per_recording': 1, 'training.num_epochs': 1}
LOGMEL = {'model.encoder_type': 'logmel_cnn'}   # waveforms are refused for all of its keys
WINDOW, BEATS = {'data.unit': 'window', 'data.window_s': 2.}, {'data.unit': 'beats'}
MEL_CYCLES = {'data.frontend': 'logmel', 'model.cnn_strides': [2, 2]}
FOLDS = {'decision.folds': 2, 'training.num_epochs': 1}
BAGS, PACKAGED = {'training.aggregation': 'attention'}, {
    'pretrained': 'packaged', 'training.cycles_per_recording': 1, 'training.num_epochs': 1}

# key: (another value, what changes, what else the two runs have in common); a change that begins
# with 'refused: ' is an error with these words
CASES = {
    'experiment.name': ('other', 'folder'),
    'experiment.description': ('why this run was made', 'log'),
    'task.name': ('physionet2016', 'refused: task physionet2016 not found'),
    'task.type': ('regression', "refused: task.type is 'regression'"),
    'data.base_dir': ('elsewhere', 'refused: elsewhere/pascal'),
    'data.raw_dir': ('my_raw', 'refused: --raw-dir my_raw', {'task': 'physionet2016'}),
    'data.processed_dir': ('my_cycles', 'refused: --processed-dir my_cycles',
                           {'task': 'physionet2016'}),
    'data.sample_rate': (4000, 'refused: data.sample_rate is 4000'),
    'data.target_length': (3000, 'refused: data.target_length is 3000'),
    'data.length_mode': ('phase', 'refused: data.length_mode is phase'),
    'data.num_substructures': (3, 'log', PACKAGED),
    'data.frontend': ('logmel', 'shapes'), 'data.unit': ('window', 'losses'),
    'data.state_channels': (True, 'shapes'), 'data.window_s': (1., 'losses', WINDOW),
    'data.unit_beats': (2, 'losses', BEATS),
    'data.mel_bands': (20, 'shapes', MEL_CYCLES),
    'data.mel_range_hz': ([25, 400], 'losses', MEL_CYCLES),
    'data.mel_frame_s': (.1, 'losses', MEL_CYCLES),
    'data.mel_hop_s': (.02, 'losses', MEL_CYCLES),
    'model.encoder_type': ('cnn_mamba_small', 'shapes', {
        'model.cnn_channels': None, 'model.cnn_kernel_sizes': None, 'model.cnn_strides': None}),
    'model.cnn_channels': ([4, 8], 'shapes'), 'model.cnn_kernel_sizes': ([5, 5], 'shapes'),
    'model.cnn_strides': ([8, 4], 'losses'),
    'model.mamba_d_model': (16, 'shapes', MAMBA), 'model.mamba_n_layers': (2, 'shapes', MAMBA),
    'model.mamba_d_state': (8, 'shapes', MAMBA), 'model.mamba_d_conv': (2, 'shapes', MAMBA),
    'model.mamba_expand': (1, 'shapes', MAMBA), 'model.mamba_dt_rank': (3, 'shapes', MAMBA),
    'model.mamba_bidirectional': (True, 'shapes', MAMBA), 'model.dropout': (0.5, 'losses', MAMBA),
    'model.drop_path': (0.5, 'losses', MAMBA), 'model.channel_attention': (True, 'shapes', MAMBA),
    'model.in_channels': (2, 'refused: model.in_channels is 2, but the data have 1'),
    'model.mel_bands': (20, 'refused: model.mel_bands is 20, but the data have 40', LOGMEL),
    'model.mel_planes': (3, 'refused: mel_planes 3 of mel_bands 40', LOGMEL),
    'model.state_dropout': (1.5, 'refused: state_dropout is 1.5', LOGMEL),
    'model.norm': ('affine', 'weights', RESIDUAL), 'classifier.hidden_dim': (0, 'shapes'),
    'classifier.dropout': (0.9, 'losses'), 'classifier.attention_dim': (5, 'shapes', BAGS),
    'classifier.standardise': (True, 'shapes'), 'classifier.pooling': ('phases', 'shapes'),
    'downstream.num_classes': (2, 'refused: downstream.num_classes is 2'),
    'downstream.label_map': ({'a': 0, 'b': 1}, 'refused: downstream.label_map is'),
    'training.num_epochs': (3, 'epochs'), 'training.batch_size': (4, 'losses'),
    'training.learning_rate': (1e-2, 'rates'), 'training.weight_decay': (0.5, 'weights'),
    'training.warmup_epochs': (1, 'rates'),
    'training.min_lr': (1e-4, 'rates'), 'training.encoder_lr_scale': (0.5, 'rates', PACKAGED),
    'training.label_smoothing': (0.3, 'losses'), 'training.use_class_weights': (False, 'losses'),
    'training.use_balanced_sampling': (True, 'losses'), 'training.loss_type': ('focal', 'losses'),
    'training.early_stopping_patience': (1, 'epochs', {
        'training.num_epochs': 5, 'training.learning_rate': 1e-9, 'training.min_lr': 0.}),
    'training.grad_clip_norm': (1e-3, 'weights'), 'training.accumulation_steps': (2, 'weights'),
    'training.cycles_per_recording': (1, 'losses'), 'training.num_workers': (2, 'threads'),
    'training.use_amp': (False, 'precision'),
    'training.log_interval': (1, 'log'), 'training.save_interval': (1, 'files'),
    'training.save_steps': (1, 'saved'), 'training.aggregation': ('mean', 'losses'),
    'training.bag_level': ('recording', 'losses', {'task': 'circor_murmur', **BAGS}),
    'training.cycles_per_bag': (1, 'losses', BAGS),
    'training.use_murmur_locations': (False, 'log', {'task': 'circor_murmur'}),
    'pretrain.checkpoint_path': ('packaged', 'log', {
        'model.encoder_type': None, 'model.cnn_channels': None, 'model.cnn_kernel_sizes': None,
        'model.cnn_strides': None, 'training.cycles_per_recording': 1, 'training.num_epochs': 1}),
    'pretrain.load_encoder_only': (False, 'losses', 'own checkpoint'),
    'pretrain.freeze_encoder': (True, 'rates'), 'evaluation.primary_metric': ('accuracy', 'log'),
    'evaluation.metrics': (['accuracy', 'mcc'], 'metrics'),
    'evaluation.level': ('cycle', 'scores'), 'evaluation.save_confusion_matrix': (False, 'files'),
    'decision.folds': (2, 'files'), 'decision.penalty': (1., 'decision', FOLDS),
    'decision.goal': ('argmax', 'decision', FOLDS), 'decision.jobs': (2, 'log', FOLDS),
    'decision.networks': ('folds', 'files', FOLDS),
    'few_shot': (0.5, 'files'), 'seed': (7, 'weights')}
CASES |= {
    'training.balance_exponent': (1., 'losses'), 'training.rows_per_epoch': (10, 'losses'),
    'training.mixup': (.3, 'losses'), 'training.ema_decay': (.9, 'weights'),
    'training.epoch_choice': ('last', 'best epoch', {
        'training.learning_rate': 1e-9, 'training.min_lr': 0.}),
    'training.include_validation': (True, 'losses', {'training.epoch_choice': 'last'})}
# how rows are changed is seen in a batch, without a training
FRAMES = {'data.frontend': 'logmel', 'data.unit': 'window', 'data.window_s': 1.,
          'data.state_channels': True}
SOUND = dict(
    time_shift=.2, time_stretch=.2, polarity_probability=1., noise_probability=1.,
    noise_snr_db=[0., 5.], noise_colour=2., respiration_probability=1., respiration_depth=.3,
    time_mask_probability=1., time_mask_fraction=.4, frequency_mask_probability=1.,
    frequency_mask_width_hz=150., band_filter_probability=1., band_filter_low_hz=[80., 90.],
    band_filter_high_hz=[100., 150.])
OF_FRAMES = dict(
    window_shift=.25, rate_probability=1., rate_change=.3, equaliser_probability=1.,
    equaliser_db=6., equaliser_waves=2, noise_floor_probability=1., noise_floor_db=[5., 6.],
    spec_augment_probability=1., spec_augment_masks=1, spec_augment_time=.4,
    spec_augment_bands=.5)
for given, common in ((SOUND, {}), (OF_FRAMES, FRAMES)):
    chances = [k for k in given if k.endswith('_probability')]
    for key, value in given.items():
        on = [k for k in chances if key.startswith(k.removesuffix('probability')) and k != key]
        CASES[f'augmentation.{key}'] = (value, 'batch', common | {f'augmentation.{k}': 1.
                                                                   for k in on})
CASES |= {old: CASES[new] for old, new in _LEGACY_KEYS.items()}


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    "Two small tasks of made cycles; the murmurs are heard in one place of two."
    folder = tmp_path_factory.mktemp('keys')
    recordings = _make_recordings(('circor', 'pascal'), persons=24)
    recordings['murmur_locations'] = recordings['murmur'].map(dict(Present='AV'))
    _make_processed_folder(folder/'processed', recordings, cycles=2, signals=True)
    prepare('all', folder/'no raw', folder/'processed', folder/'downstream')
    return folder


def observe(folder, metrics):
    ends = (p for n in ('final', 'best') if (p := folder/f'{n}_model.pt').exists())
    saved, history = load_checkpoint(next(ends)), metrics['history']
    state = saved['model_state_dict']
    lines = [re.sub(r'^\S+ \S+ |/\S+|at most \S+ left', '', line)
             for line in (folder/'train.log').read_text().splitlines()]
    return dict(folder=folder.name, log=lines, files={p.name for p in folder.iterdir()},
                decision=saved.get('decision_layer'), shapes={k: v.shape for k, v in state.items()},
                weights={k: v.tolist() for k, v in state.items()},
                losses=[h['train/loss'] for h in history],
                rates=[{k: v for k, v in h.items() if 'rate' in k} for h in history],
                epochs=len(history), **{'best epoch': metrics['best_epoch']},
                metrics={k for k in metrics if k.startswith('test_')},
                scores={k: v for k, v in metrics.items() if k.startswith('test_')})


@pytest.fixture(scope='module')
def run(tasks):
    "A run of the base configuration with something changed; the same one is made once."
    @functools.lru_cache(None)
    def cached(settings):
        given, out = json.loads(settings), tasks/'runs'/fingerprint(settings)
        metrics = finetune({'data': {'processed_dir': str(tasks/'processed')}}, output_dir=out,
                           **{'data_dir': str(tasks/'downstream'), **given})
        [folder] = out.iterdir()
        return observe(folder, metrics), folder
    return lambda **given: cached(json.dumps(given, sort_keys=True))


def spied(monkeypatch):
    """What a test cannot see in the folder: threads that read ahead, and the precision where a GPU
    has bfloat16.
    """
    import pahcl.training.runs as runs
    import pahcl.training.trainer as training
    seen = dict(threads=set(), precision=set(), saved=set())
    ahead, accelerator, save = training._prefetch, runs.Accelerator, training.save_checkpoint
    monkeypatch.setattr('pahcl.training.trainer._prefetch', lambda make, items, threads=0:
                        seen['threads'].add(threads) or ahead(make, items, threads))
    def made(mixed_precision, cpu):
        seen['precision'].add(mixed_precision)
        return accelerator(mixed_precision='no', cpu=True)
    monkeypatch.setattr('pahcl.training.runs.Accelerator', made)
    monkeypatch.setattr('pahcl.training.trainer.save_checkpoint', lambda path, content: (
        seen['saved'].add(bool(content.get('training_state', {}).get('part'))),
        save(path, content)))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *a: (8, 0))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    return seen


def batch_of(tasks, given):
    "The sound, or frames, of the first rows of an epoch, as they are learnt."
    config = load_config('finetune', None, overrides={'data_dir': str(tasks/'downstream'), **given})
    folder = tasks/'downstream'/config.task.name
    rows = CycleSampler(config, open_cycles(folder, 'train', config.data), 'cpu')
    return rows.batch(rows.rows_of(0)[:8], 0)['x'].tolist()


def test_every_key_has_a_case(): assert set(CASES) == set(_known_keys(_FinetuneConfig))


@pytest.mark.parametrize('key', CASES)
def test_every_key_is_seen(key, tasks, run, monkeypatch):
    value, changes, common = (*CASES[key], {})[:3]
    if common == 'own checkpoint':
        common = {'pretrained': str(run(**BASE, **TINY)[1]/'best_model.pt')}
    base = {k: v for k, v in {**BASE, **({} if common.get('pretrained') == 'packaged' else TINY),
                              **common}.items() if v is not None}
    flag = {'task.name': 'task', 'data.base_dir': 'data_dir',
            'pretrain.checkpoint_path': 'pretrained'}.get(key, _LEGACY_KEYS.get(key, key))
    given = {k: v for k, v in base.items() if k != flag}
    if changes.startswith('refused: '):
        with pytest.raises(PahclError, match=re.escape(changes.removeprefix('refused: '))):
            run(**given, **{flag: value})
    elif changes == 'batch':
        assert batch_of(tasks, base) != batch_of(tasks, {**given, flag: value})
    elif changes in ('threads', 'precision', 'saved'):
        first = spied(monkeypatch)[changes]
        finetune(output_dir=tasks/'spied'/key/'a', data_dir=tasks/'downstream', **base)
        # the second spy reports to the first one too
        seen = [set(first), spied(monkeypatch)[changes]]
        finetune(output_dir=tasks/'spied'/key/'b', data_dir=tasks/'downstream', **given,
                 **{flag: value})
        assert seen[0] and seen[1] and seen[0] != seen[1]
    else:
        before, after = run(**base)[0][changes], run(**given, **{flag: value})[0][changes]
        assert before and after and before != after, changes


@pytest.mark.parametrize('old, new', _LEGACY_KEYS.items())
def test_older_spellings_do_what_the_newer_ones_do(old, new):
    from pahcl.core.config import load_config
    value = CASES[old][0]
    def with_key(key):
        section, name = key.split('.')
        return load_config('finetune', {section: {name: value}}).model_dump()
    assert with_key(old) == with_key(new) != load_config('finetune').model_dump()


def test_without_a_change_nothing_changes(run):
    first, again = run(**BASE, **TINY)[0], run(**BASE, **TINY, **{'experiment.name': 'again'})[0]
    assert {k for k in first if first[k] != again[k]} <= {'folder', 'log'}


def test_weights_and_balance_at_once_warn(run):
    log = run(**BASE, **TINY, **{'training.use_balanced_sampling': True})[0]['log']
    assert any('use_class_weights and use_balanced_sampling are both on' in line for line in log)


def test_smoothing_goes_with_weights(run):
    "Both at once is neither alone: four different losses."
    losses = [run(**BASE, **TINY, **{'training.use_class_weights': w,
                                     'training.label_smoothing': s})[0]['losses'][0]
              for w in (True, False) for s in (0., .2)]
    assert len(set(losses)) == 4
