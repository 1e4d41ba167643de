"""pretraining end to end on a tiny made folder: flags, levels, MoCo, resume, leakage, several
processes
"""
import pahcl.pretrain
import pahcl.training.pretraining_data
import json
import os
import re
import subprocess
import sys
import numpy as np, pytest, torch
from types import SimpleNamespace
import pahcl.training.pretraining as P
import pahcl.training.runs
import pahcl.training.trainer
from pahcl.core.basics import PahclError
from pahcl.core.config import load_config
from pahcl.core.config_sections import _ContrastSection, _TrainingSection
from pahcl.data.loader import Cycles
from pahcl.data.persons import find_held_out_persons
from pahcl.models.checkpoints import load_checkpoint

TINY = dict(model=dict(encoder_type='cnn', cnn_channels=[16, 16], cnn_kernel_sizes=[9, 5],
                       cnn_strides=[8, 4], mamba_d_model=8, dropout=0.0),
            contrast=dict(cycle_projector=[16, 8], substructure_projector=[16, 8], queue_size=32),
            training=dict(num_epochs=2, warmup_epochs=1, batch_size=16, accumulation_steps=1,
                          cycles_per_recording=2, num_workers=0, use_amp=False, learning_rate=5e-3))

@pytest.fixture(scope='session')
def root(pretraining_on): return pretraining_on(TINY)

def config_of(root, **flags):
    return load_config('pretrain', TINY, None, {'data.processed_dir': str(root/'processed'),
                                                'data.base_dir': str(root/'downstream')} | flags)
def run(root, out, **flags):
    where = {'data.processed_dir': str(root/'processed'), 'data.base_dir': str(root/'downstream')}
    return P.pretrain(root/'tiny.yaml', output_dir=out, **where | flags)
def script(root, *flags):
    return pahcl.pretrain.pahcl_pretrain(['--config', str(root/'tiny.yaml'), '--processed-dir',
                                          str(root/'processed'), '--downstream-dir',
                                          str(root/'downstream'), *flags])
def metrics(path): return json.loads((path.parent/'final_metrics.json').read_text())

# ---- the console script ----
def test_script_simclr(root, tmp_path):
    assert script(root, '--output_dir', str(tmp_path), '--tensorboard') == 0
    folder = tmp_path/'pahcl_pretrain'
    assert {p.name for p in folder.iterdir()} == {'config.yaml', 'inputs.json', 'train.log',
                                                  '.pahcl.json',
                                                  'status.json', 'tensorboard', 'best_model.pt',
                                                  'final_model.pt', 'final_metrics.json'}
    assert list((folder/'tensorboard').glob('events.out.tfevents.*'))
    saved, out = (load_checkpoint(folder/'best_model.pt', 'pretrain'),
                  find_held_out_persons(root/'downstream'))
    assert (saved['pretrain_persons'] and not set(saved['pretrain_persons']) & out
            and not saved['include_heldout_subjects'])
    assert saved['moco_metadata'] == dict(is_moco=False, momentum=None, queue_size=None)
    parts = {k.split('.')[3] for k in saved['model_state_dict'] if k.startswith('objectives.')}
    assert parts == {'cycle_projector', 'substructure_projector'}
    assert {k.split('.')[0] for k in saved['model_state_dict']} == {'encoder', 'objectives'}
    found = metrics(folder/'best_model.pt')
    assert (found['train_persons']+found['validation_persons'] == len(saved['pretrain_persons'])
            and found['heldout_persons'] == len(out))
    assert {'validation_loss', 'validation_loss_cycle', 'validation_loss_substructure',
            'validation_effective_rank', 'validation_alignment', 'validation_uniformity',
            'validation_embedding_std'} <= found.keys()
    assert 'left out: the' in (folder/'train.log').read_text()

def test_script_moco_and_every_flag(root, tmp_path):
    flags = ['--experiment-name', 'm', '--encoder-type', 'cnn', '--moco', '--epochs', '1',
             '--lr', '1e-3', '--batch-size', '8', '--seed', '7', '--include-heldout-subjects',
             '--output-dir', str(tmp_path)]
    assert script(root, *flags) == 0
    saved = load_checkpoint(tmp_path/'m'/'best_model.pt', 'pretrain')
    c = saved['config']
    assert (c['training']['num_epochs'], c['training']['learning_rate'],
            c['training']['batch_size'], c['seed'], c['contrast']['moco'],
            c['include_heldout_subjects']) == (1, 1e-3, 8, 7, True, True)
    found = metrics(tmp_path/'m'/'best_model.pt')
    assert saved['moco_metadata'] == dict(is_moco=True, momentum=found['moco_momentum'],
                                          queue_size=32) and 0 < found['moco_momentum'] < 0.95
    own = 'objectives.moco.model.'
    names = {k.removeprefix(own).split('.')[0] for k in saved['model_state_dict']}
    assert names > {'encoder', 'encoder_momentum', 'cycle_projector_momentum',
                    'substructure_projector_momentum', 'queue', 'queue_ptr'}
    assert (set(saved['pretrain_persons']) & find_held_out_persons(root/'downstream')
            and 'WARNING: include_heldout' in (tmp_path/'m'/'train.log').read_text())
    # another experiment is there
    assert script(root, *flags[:-3], '--output-dir', str(tmp_path)) == 1
    assert script(root, *flags[:-3], '--output-dir', str(tmp_path), '--overwrite') == 0
    assert not load_checkpoint(tmp_path/'m'/'best_model.pt')['include_heldout_subjects']
    from pahcl.models.pretrained import load_pretrained_encoder
    encoder, _, found = load_pretrained_encoder(tmp_path/'m'/'best_model.pt')
    assert found['moco'] and encoder.config['encoder_type'] == 'cnn'

def test_wandb_offline(root, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for name, value in dict(WANDB_MODE='offline', WANDB_SILENT='true').items():
        monkeypatch.setenv(name, value)
    seen = {}
    class Fake:
        name = 'wandb'
        def __init__(self, project, **rest):
            seen.update(project=project, **rest)
            self.tracker = self
            self.run = SimpleNamespace(summary=seen.setdefault('summary', {}))
        def start(self): pass
        def watch(self, *a, **k): pass
        def log(self, values, step): seen.setdefault('logged', {}).update(values)
        def finish(self): pass
    monkeypatch.setattr('pahcl.training.trackers.WandBTracker', Fake)
    assert script(root, '--output-dir', str(tmp_path), '--epochs', '1', '--wandb',
                  '--wandb-project', 'hearts', '--wandb-entity', 'us') == 0
    assert any(k.startswith('final') for k in seen['summary'])
    assert (seen['project'], seen['entity'], seen['group']) == ('hearts', 'us', 'pretrain') and {
        'train/loss', 'validation/effective_rank', 'learning_rate/encoder'} <= seen['logged'].keys()

def test_help_is_fast(tmp_path):
    out = subprocess.run([sys.executable,
                          '-c', 'import sys; from pahcl.pretrain import pahcl_pretrain; '
                                'assert "torch" not in sys.modules; pahcl_pretrain(["--help"])'],
                         capture_output=True, text=True)
    assert out.returncode == 0 and '--include-heldout-subjects' in out.stdout, out.stderr

# ---- levels ----
@pytest.mark.parametrize('flags,there', [
    ({'contrast.lambda_cycle': 0.0}, {'substructure'}),
    ({'contrast.lambda_substructure': 0.0}, {'cycle'}),
    ({'data.num_substructures': 3}, {'cycle', 'substructure'}),
    ({'contrast.moco': True, 'contrast.lambda_cycle': 0.0, 'data.num_substructures': 1},
     {'substructure'}), ({'contrast.moco': True, 'contrast.lambda_substructure': 0.0}, {'cycle'})])
def test_levels(root, tmp_path, flags, there):
    found = metrics(run(root, tmp_path, **flags | {'training.num_epochs': 1}))
    assert ({k.removeprefix('train_loss_') for k in found if k.startswith('train_loss_')} == there
            and np.isfinite(found['train_loss']))
    config = config_of(root, **flags)
    model = P._build_pretraining_model(config)
    pair = P._make_pair_batcher(Cycles.from_processed(root/'processed'), config, 'cpu')
    # with MoCo the queue is filled the second time
    for epoch in range(2): model(pair(np.arange(0, 48, 3), epoch))[0].backward()
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    own = 'objectives.moco.model.' if config.contrast.moco else 'objectives.simclr.model.'
    names = {n.removeprefix(own).split('.')[0].removesuffix('_projector') for n in learning}
    assert names == {'encoder', *there}
    assert [n for n in learning if (g := model.get_parameter(n).grad) is None or not g.any()] == []

def test_small_mamba_is_trained_whole_by_substructures_alone(root):
    config = config_of(root, **{'contrast.lambda_cycle': 0.0})
    config.model = type(config.model)(encoder_type='cnn_mamba_small')
    model = P._build_pretraining_model(config)
    model(P._make_pair_batcher(Cycles.from_processed(root/'processed'), config,
                               'cpu')(np.arange(0, 24, 3), 0))[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

# ---- every key has an effect ----
CHANGED = dict(temperature=0.5, lambda_cycle=0.5, lambda_substructure=0.5,
               positives='subject', cycle_projector=[12, 8], substructure_projector=[12, 8],
               moco=True, moco_momentum=0.5,
               moco_half_life=0.5, moco_momentum_end=0.5, queue_size=8, second_view='other')
@pytest.mark.parametrize('key', CHANGED)
def test_every_key_of_contrast_has_an_effect(root, key):
    # negatives: test_objectives.test_batches_of_one_device
    assert CHANGED.keys() | {'negatives'} == _ContrastSection.model_fields.keys()
    def loss(**changed):
        config = config_of(root, **{f'contrast.{k}': v for k, v in changed.items()})
        model, pair = (P._build_pretraining_model(config),
                       P._make_pair_batcher(Cycles.from_processed(root/'processed'), config, 'cpu'))
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model.set_pace(400, 12)
        for epoch in range(4):
            out = model(pair(np.arange(0, 36, 3), epoch))[0]
            optimiser.zero_grad(); out.backward(); optimiser.step(); model.follow((epoch+1)/4)
        return out.item()
    of_moco = key in ('moco_momentum', 'moco_half_life', 'moco_momentum_end', 'queue_size')
    # what a key needs to matter
    base = dict(moco=True) if of_moco else dict(positives='subject') if key == 'second_view' else {}
    assert loss(**base | {key: CHANGED[key]}) != loss(**base)

@pytest.fixture(scope='module')
def plain(root, tmp_path_factory): return run(root, tmp_path_factory.mktemp('plain'))

def last_weights(best):
    return torch.cat([v.flatten().float() for v in load_checkpoint(
        best.parent/'final_model.pt')['model_state_dict'].values()])

WEIGHTS = dict(num_epochs=3, batch_size=8, learning_rate=1e-3, weight_decay=0.1, warmup_epochs=0,
               min_lr=1e-3, grad_clip_norm=0.1, accumulation_steps=2, cycles_per_recording=1)
# seen by the tests after this one
OTHERWISE = {'early_stopping_patience', 'num_workers', 'use_amp', 'log_interval', 'save_interval',
             'save_steps'}
def test_no_key_of_training_is_forgotten():
    assert {*WEIGHTS, *OTHERWISE,
            *pahcl.training.pretraining_data._UNUSED_KEYS} == set(_TrainingSection.model_fields)

@pytest.mark.parametrize('key', WEIGHTS)
def test_key_of_training_changes_the_weights(root, tmp_path, plain, key):
    assert not torch.equal(last_weights(run(root, tmp_path, **{f'training.{key}': WEIGHTS[key]})),
                           last_weights(plain))

def test_keys_that_change_what_is_kept(root, tmp_path, plain):
    best = run(root, tmp_path, **{'training.save_interval': 1, 'training.log_interval': 1})
    assert (best.parent/'epoch_1.pt').exists() and not (plain.parent/'epoch_1.pt').exists()
    assert ('step 1: loss' in (best.parent/'train.log').read_text()
            and 'step 1: loss' not in (plain.parent/'train.log').read_text())
    assert torch.equal(last_weights(best), last_weights(plain))

def test_save_steps(root, tmp_path, monkeypatch):
    written, real = [], pahcl.training.trainer.save_checkpoint
    monkeypatch.setattr('pahcl.training.trainer.save_checkpoint', lambda path, content: (
        written.append((path.name, content.get('training_state', {}).get('part'))),
        real(path, content)))
    for steps, within in ((0, []), (2, [2])):
        written.clear()
        run(root, tmp_path/str(steps), **{'training.save_steps': steps, 'training.num_epochs': 1})
        assert [part['steps'] for name, part in written if name == 'last.pt' and part] == within

@pytest.mark.parametrize('workers', [0, 3])
def test_num_workers(root, tmp_path, plain, monkeypatch, workers):
    seen, real = [], pahcl.training.trainer._prefetch
    monkeypatch.setattr('pahcl.training.trainer._prefetch', lambda make, items, threads:
                        (seen.append(threads), real(make, items, threads))[1])
    assert torch.equal(last_weights(run(root, tmp_path, **{'training.num_workers': workers})),
                       last_weights(plain)) and set(seen) == {workers}

@pytest.mark.parametrize('wanted', [True, False])
def test_use_amp_is_handed_on(root, tmp_path, monkeypatch, wanted):
    seen, real = [], pahcl.training.runs.Run.__init__
    monkeypatch.setattr(
        'pahcl.training.runs.Run.__init__',
        lambda self, folder, config, seed, overwrite, use_amp, **rest:
        (seen.append(use_amp), real(self, folder, config, seed, overwrite, False, **rest))[1])
    run(root, tmp_path, **{'training.use_amp': wanted, 'training.num_epochs': 1})
    assert seen == [wanted]

@pytest.mark.parametrize('patience,epochs', [(0, 5), (2, 3)])
def test_early_stopping(root, tmp_path, monkeypatch, patience, epochs):
    monkeypatch.setattr(P._PretrainRecipe, 'validate',
                        lambda self, epoch: dict(score=-float(epoch), loss=1.))
    found = metrics(run(root, tmp_path,
                        **{'training.early_stopping_patience': patience, 'training.num_epochs': 5}))
    assert (found['epochs'], found['best_epoch']) == (epochs, 1)

# ---- the probe ----
JUDGED = {'validation_fraction': 0.4, 'training.num_epochs': 3}
def test_the_probe_chooses_the_best_epoch_and_is_tracked(root, tmp_path):
    best = run(root, tmp_path, tensorboard=True, **JUDGED)
    found, log = metrics(best), (best.parent/'train.log').read_text()
    assert found['probe_tasks'] and load_checkpoint(best)['probe_tasks'] == found['probe_tasks']
    assert (found['chosen_by'] == load_checkpoint(best)['chosen_by']
            == f'labels of {", ".join(found["probe_tasks"])}')
    names = [f'validation/probe_{t}_{k}' for t in found['probe_tasks'] for k in ('knn', 'linear')]
    config = config_of(root, **JUDGED)
    persons = {p.name: p.scored.sum()
               for p in P._select_probes(config, P._load_pretrain_data(config)).probes}
    weight = [persons[t] for t in found['probe_tasks'] for _ in range(2)]
    scores = [sum(w*h[n] for w, n in zip(weight, names))/sum(weight) for h in found['history']]
    assert (found['best_epoch'] == 1+int(np.argmax(scores))
            and found['validation_score'] == pytest.approx(max(scores)))
    assert ('the best epoch is chosen by the labels of persons kept for validation' in log
            and f'probe_{found["probe_tasks"][0]}_knn ' in log)
    for sign in ('effective_rank', 'embedding_std', 'alignment', 'uniformity'):
        assert f'{sign} ' in log
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(best.parent/'tensorboard')).Reload()
    assert {*names, 'validation/effective_rank', 'validation/embedding_std', 'validation/alignment',
            'validation/uniformity'} <= set(events.Tags()['scalars'])
    assert [e.value for e in events.Scalars(names[0])] == pytest.approx(
        [h[names[0]] for h in found['history']])

def test_who_is_asked(root):
    from pahcl.training.probe import _make_probes
    config = config_of(root, **JUDGED)
    splits = P._load_pretrain_data(config).splits
    persons = {k: set(c.table['person_id']) for k, c in splits.items()}
    probes, _ = _make_probes(config, persons)
    assert probes
    for p in probes:
        table = p.cycles.table.iloc[p.rows]
        scored = p.scored[p.group]
        assert (set(table['person_id'][scored]) <= persons['validation']
                and set(table['person_id'][~scored]) <= persons['train']
                and not set(table['person_id']) & find_held_out_persons(root/'downstream'))
        assert (table['label'].to_numpy() == p.label[p.group]).all()

def test_every_key_of_probe_has_an_effect(root, tmp_path):
    base = metrics(run(root, tmp_path/'base', **JUDGED))
    one = metrics(run(root, tmp_path/'one', **JUDGED, **{'probe.tasks': base['probe_tasks'][:1]}))
    assert one['probe_tasks'] == base['probe_tasks'][:1]
    none = run(root, tmp_path/'none', **JUDGED, **{'probe.tasks': []})
    assert metrics(none)['chosen_by'] == load_checkpoint(none)['chosen_by'] == 'contrastive loss'
    assert (metrics(none)['probe_tasks'] == []
            and metrics(none)['validation_score'] == -metrics(none)['validation_loss']
            and 'chosen without labels' in (none.parent/'train.log').read_text())
    with pytest.raises(PahclError, match='probe.tasks names pascal'):
        run(root, tmp_path/'other', **JUDGED, **{'probe.tasks': ['pascal']})
    seldom = metrics(run(root, tmp_path/'seldom', **JUDGED, **{'probe.every': 2}))
    asked = [any(k.startswith('validation/probe_') for k in h) for h in seldom['history']]
    assert asked == [False, True, True] and seldom['best_epoch'] > 1
    name = f'validation/probe_{base["probe_tasks"][0]}_knn'
    knn = lambda **more: [h[name] for h in metrics(run(root, tmp_path/str(more), **JUDGED,
                                                       **more))['history']]
    assert knn(**{'probe.neighbours': 1}) != (before := [h[name] for h in base['history']]) != knn(
        **{'probe.cycles_per_recording': 1})

def test_too_few_persons_to_judge(root, tmp_path):
    best = run(root, tmp_path, **{'training.num_epochs': 1})
    assert ('WARNING: no task can judge the epochs' in (best.parent/'train.log').read_text()
            and metrics(best)['probe_tasks'] == [])

# ---- learnt from on purpose ----
def test_fine_tuning_warns_of_heldout_subjects(root, tmp_path):
    from pahcl.training.finetuning import finetune
    best = run(root, tmp_path, include_heldout_subjects=True, **{'training.num_epochs': 1})
    assert load_checkpoint(best)['include_heldout_subjects']
    finetune(None, task='circor_murmur', pretrained=best, data_dir=root/'downstream',
             output_dir=tmp_path, **{'training.num_epochs': 1, 'training.warmup_epochs': 0})
    assert 'Its test scores are no estimate for new persons' in (
        tmp_path/'circor_murmur_downstream'/'train.log').read_text()

# ---- what belongs together ----
@pytest.mark.parametrize('positives', ['view', 'recording', 'subject'])
def test_positives_and_negatives_against_brute_force(root, positives):
    from pahcl.training.contrast import _make_rows, _pair_masks
    cycles = Cycles.from_processed(root/'processed')
    # a person with two subject ids
    double = cycles.table['person_id'][cycles.table['person_id']
                                       != cycles.table['subject_id']].iloc[0]
    rows = np.append(np.random.default_rng(0).integers(0, len(cycles), 25),
                     np.flatnonzero(cycles.table['person_id'] == double)[-5:])
    person, group = (c[rows]
                     for c in pahcl.training.pretraining_data._group_ids(cycles.table, positives))
    both = _make_rows(torch.randn(60, 3), person.repeat(2), group.repeat(2))
    positive, negative = _pair_masks(both, both, torch.arange(60))
    table = cycles.table.iloc[np.tile(rows, 2)]
    for i in range(60):
        for j in range(60):
            a, b = table.iloc[i], table.iloc[j]
            same = dict(view=rows[i % 30] == rows[j % 30],
                        recording=(a.subject_id, a.recording_id) == (b.subject_id, b.recording_id),
                        subject=a.person_id == b.person_id)[positives]
            assert (positive[0, i, j] == (i != j and same)
                    and negative[0, i, j] == (a.person_id != b.person_id))
    assert table['subject_id'][table['person_id'] == double].nunique() == 2

# ---- data ----
def test_views_do_not_depend_on_the_batch(root):
    config = config_of(root)
    pair = P._make_pair_batcher(Cycles.from_processed(root/'processed'), config, 'cpu')
    rows = np.random.default_rng(0).permutation(20)
    whole, parts = pair(rows, 3), [pair(r, 3) for r in np.split(rows, [3, 11])]
    for k in whole: assert torch.equal(whole[k], torch.cat([p[k] for p in parts])), k
    assert (not torch.equal(whole['x1'], whole['x2'])
            and not torch.equal(whole['x1'], pair(rows, 4)['x1']))

@pytest.mark.parametrize('positives', ['recording', 'subject'])
def test_second_view_of_another_cycle(root, positives):
    plain, other = ({'contrast.positives': positives, 'contrast.second_view': second} | {
        f'augmentation.{k}': 0
        for k in ('time_shift', 'time_stretch', 'polarity_probability', 'noise_probability',
                  'respiration_probability', 'time_mask_probability', 'frequency_mask_probability',
                  'band_filter_probability')} for second in ('same', 'other'))
    cycles, rows = Cycles.from_processed(root/'processed'), np.arange(30)
    same, pair = (P._make_pair_batcher(cycles, config_of(root, **flags), 'cpu')(rows, 5)
                  for flags in (plain, other))
    assert torch.equal(same['x1'], same['x2']) and torch.equal(pair['x1'], same['x1'])
    name = cycles.table[dict(recording='recording_id', subject='person_id')[positives]].to_numpy()
    sounds = cycles.batch(np.arange(len(cycles)))['x']
    # without augmentations the second view is a stored cycle: of the same
    # group, but not the same one
    for row, sound in zip(rows, pair['x2']):
        shown = (sounds == sound).all(-1)[:, 0].nonzero()[:, 0].tolist()
        assert shown and all(name[i] == name[row] and i != row for i in shown)
    parts = [P._make_pair_batcher(cycles, config_of(root, **other), 'cpu')(r, 5)['x2']
             for r in np.split(rows, [7])]
    assert torch.equal(torch.cat(parts), pair['x2'])

def test_nobody_held_out_and_never_a_person_in_both(root):
    splits = P._load_pretrain_data(config_of(root)).splits
    persons = {k: set(c.table['person_id']) | set(c.table['subject_id']) for k, c in splits.items()}
    assert not persons['train'] & persons['validation'] and not (
        persons['train'] | persons['validation']) & find_held_out_persons(root/'downstream')

def test_without_prepared_tasks_it_refuses(root, tmp_path):
    (tmp_path/'empty').mkdir()
    for folder in (tmp_path/'nothing', tmp_path/'empty'):
        where = {'data.base_dir': str(folder)}
        with pytest.raises(PahclError, match='not known who is held out. Run pahcl_prepare first, '
                                             'or give --include-heldout'):
            P._load_pretrain_data(config_of(root, **where))
        data = P._load_pretrain_data(config_of(root, **where, include_heldout_subjects=True))
        assert ('WARNING' in data.message and len(data.facts['pretrain_persons']) == 24
                and data.facts['heldout_persons'] == 0)
    assert script(root, '--output-dir', str(tmp_path/'out'), '--downstream-dir',
                  str(tmp_path/'nothing')) == 1 and not (tmp_path/'out').exists()

def test_without_validation_persons(root, tmp_path):
    best = run(root, tmp_path, validation_fraction=0.0)
    assert metrics(best)['best_epoch'] == 2 and metrics(best)['validation_persons'] == 0

@pytest.mark.parametrize('flags,words', [
    ({'data.sample_rate': 4000}, 'data.sample_rate is 4000, but the cycles'),
    ({'data.length_mode': 'phase'}, 'data.length_mode is phase'),
    ({'training.loss_type': 'focal'}, 'training.loss_type is focal, but has no effect'),
    ({'data.processed_dir': 'nowhere'}, 'nowhere'),
    ({'contrast.lambda_cycle': 0.0, 'contrast.lambda_substructure': 0.0}, 'both 0'),
    ({'validation_fraction': 0.97}, 'fewer than two'),
    ({'contrast.cycle_projector': [16]}, 'contrast.cycle_projector'),
    ({'contrast.second_view': 'other'}, 'contrast.positives is view'),
    ({'model.encoder_type': 'transformer9'}, 'transformer9')])
def test_mistakes(root, tmp_path, flags, words):
    with pytest.raises(PahclError, match=words): run(root, tmp_path, **flags)

# ---- what the log says first ----
def test_accumulated_batches_are_no_negatives_and_the_log_says_so(root, tmp_path, monkeypatch):
    import pahcl.training.contrast
    seen, real = [], pahcl.training.contrast._info_nce
    monkeypatch.setattr('pahcl.training.contrast._info_nce', lambda query, key, *a, **k:
                        (seen.append(len(key.z)), real(query, key, *a, **k))[1])
    keys = {}
    for batches in (1, 3):
        seen.clear()
        best = run(root, tmp_path/str(batches),
                   **{'training.num_epochs': 1, 'training.accumulation_steps': batches,
                      'validation_fraction': 0.})
        keys[batches] = set(seen)
        log = (best.parent/'train.log').read_text()
        assert 'negatives of a cycle: other persons in its batch of 16' in log
        assert ('accumulation_steps 3 makes a step of 48 cycles, but no more negatives' in log) == (
            batches == 3)
    # two views of 16 cycles, however many batches a step has
    assert keys[1] == keys[3] and max(keys[1]) == 32

def test_a_scan_that_was_not_compiled_is_in_the_first_lines(root, tmp_path, monkeypatch):
    monkeypatch.setattr('pahcl.models.mamba_block._find_library',
                        lambda: (None, 'WARNING: no compiled selective scan (a test)'))
    for name, told in (('cnn_mamba_small', True), ('cnn', False)):
        model = dict(encoder_type=name, cnn_channels=[8, 8], cnn_kernel_sizes=[9, 5],
                     cnn_strides=[8, 8], mamba_d_model=8) | (dict(mamba_n_layers=1) if told else {})
        best = run(root, tmp_path/name, **{f'model.{k}': v for k, v in model.items()},
                   **{'training.num_epochs': 1})
        lines = (best.parent/'train.log').read_text().splitlines()
        assert (['no compiled' in l for l in lines[:3]] == [False, False, told]
                and sum('no compiled' in l for l in lines) == told)

def test_momentum_is_fitted_to_the_run_and_the_log_says_so(root, tmp_path):
    best = run(root, tmp_path, **{'contrast.moco': True, 'contrast.queue_size': 500})
    log, momentum = (best.parent/'train.log').read_text(), metrics(best)['moco_momentum']
    steps = int(log.split(' optimiser steps: at the end')[0].split()[-1])
    assert (momentum == pytest.approx(2**(-1/(0.1*steps)), abs=1e-6)
            and f'would have left {0.999**steps:.0%}' in log)
    assert 'contrast.queue_size 500 holds the keys of' in log and "epochs of" in log
    slow = run(root, tmp_path,
               **{'experiment.name': 'slow', 'contrast.moco': True, 'contrast.moco_half_life': 0.0})
    assert metrics(slow)['moco_momentum'] == 0.999
    share = lambda path: apart(load_checkpoint(path.parent/'final_model.pt')['model_state_dict'])
    assert share(slow) > 5*share(best)   # how far the keys' encoder is from the one that learns

def apart(state):
    "Norm of the difference between encoder and momentum encoder."
    slow = lambda k: state['objectives.moco.model.'+k.replace('encoder.', 'encoder_momentum.', 1)]
    return sum((state[k]-slow(k)).float().square().sum()
               for k in state if k.startswith('encoder.')).sqrt()

# ---- resume ----
def test_a_killed_run_goes_on_to_the_same_end(root, tmp_path, monkeypatch):
    flags = {'training.num_epochs': 4, 'contrast.moco': True}
    whole = run(root, tmp_path/'a', **flags)
    real = P._PretrainRecipe.validate
    def killed(self, epoch):
        if epoch == 2: raise KeyboardInterrupt
        return real(self, epoch)
    monkeypatch.setattr(P._PretrainRecipe, 'validate', killed)
    with pytest.raises(KeyboardInterrupt): run(root, tmp_path/'b', **flags)
    monkeypatch.setattr(P._PretrainRecipe, 'validate', real)
    again = run(root, tmp_path/'b', **flags)
    assert 'goes on after epoch 2' in (again.parent/'train.log').read_text()
    a, b = (load_checkpoint(p.parent/'final_model.pt')['model_state_dict'] for p in (whole, again))
    assert (all(torch.equal(a[k], b[k]) for k in a)
            and metrics(whole)['history'] == metrics(again)['history'])
    stamp = again.stat().st_mtime_ns
    assert run(root, tmp_path/'b', **flags).stat().st_mtime_ns == stamp  # finished: nothing is done
    with pytest.raises(PahclError, match='seed is 42 there and 1 here'):
        run(root, tmp_path/'b', seed=1, **flags)

# ---- several processes ----
START = """
import sys
from pahcl.pretrain import pahcl_pretrain
for config in sys.argv[2:]:
    assert pahcl_pretrain(['--config', config, '--output-dir', sys.argv[1]]) == 0
"""
def test_two_processes_learn_the_same(root, tmp_path):
    "SimCLR and MoCo, with a batch that cannot be shared equally"
    one = {name: run(root,
                     tmp_path/'one', **{'experiment.name': name, 'contrast.moco': name == 'moco',
                                        'training.batch_size': 15, 'training.num_epochs': 1})
           for name in ('simclr', 'moco')}
    (tmp_path/'start.py').write_text(START)
    command = ['-m', 'torch.distributed.run',
               '--standalone', '--nproc_per_node=2', str(tmp_path/'start.py'), str(tmp_path/'two'),
               *(str(p.parent/'config.yaml') for p in one.values())]
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'))
    assert out.returncode == 0, out.stderr[-3000:]
    assert not re.search(r'Warning:|strides|destroy_process_group|terminate called', out.stderr), (
        out.stderr)
    for name, path in one.items():
        two = tmp_path/'two'/name/'best_model.pt'
        assert '2 process(es)' in (two.parent/'train.log').read_text()
        for k in ('validation_loss', 'validation_effective_rank'):
            assert metrics(path)[k] == pytest.approx(metrics(two)[k], rel=1e-3)
        a, b = (load_checkpoint(p)['model_state_dict'] for p in (path, two))
        for k in a: assert torch.allclose(a[k].float(), b[k].float(), atol=1e-4), (name, k)
