"""Objectives of pretraining on windows: each learns, resumes and is refused where the data cannot
answer; the contrast is what it was before it stood among others
"""
import json
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest, torch
import pahcl.training.pretraining as P
from pahcl.core.basics import PahclError
from pahcl.core.config import load_config
from pahcl.data.loader import Cycles
from pahcl.data.windows import Windows
from pahcl.models.checkpoints import load_checkpoint
from pahcl.models.encoders import build_encoder
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.training.contrastive_model import ContrastiveModel
from pahcl.training.objectives import _HeardBatch, Objective, OBJECTIVES, register_objective
from pahcl.training.pretraining_data import (
    _load_pretrain_data, _make_pair_batcher, _sample_positives)
from pahcl.training.pretraining_model import _build_pretraining_model
from pahcl.training.state import _seeded_weights

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = {'model.cnn_channels': [4, 8], 'model.cnn_kernel_sizes': [3, 3],
         'model.cnn_strides': [2, 2], 'data.window_s': 1.6, 'training.num_epochs': 2,
         'training.warmup_epochs': 0, 'training.batch_size': 8, 'training.use_amp': False}

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    from pahcl.data.splitting import prepare
    from pahcl.testing.made import _make_processed_folder, _make_recordings
    folder = tmp_path_factory.mktemp('windows')
    _make_processed_folder(folder/'processed', _make_recordings(['circor'], 24), signals=True)
    prepare('circor', folder/'raw', folder/'processed', folder/'downstream')
    return folder

def config_of(root, objectives=None, **more):
    asked = dict(objectives=objectives) if objectives else {}
    where = {'data.processed_dir': str(root/'processed'), 'data.base_dir': str(root/'downstream')}
    return load_config('pretrain', 'pretrain_window', None, SMALL | asked | where | more)

@pytest.fixture(scope='module')
def rows(root): return _load_pretrain_data(config_of(root)).train

def batch_of(config, model, rows, numbers, epoch=0):
    return _make_pair_batcher(rows, config, 'cpu', model.views, model.targets(rows))(
        np.asarray(numbers), epoch)

def test_the_old_recipe_is_the_same_to_the_bit(root):
    "As one of the objectives, contrast has the weights, the loss and the gradients of its own."
    config = load_config('pretrain', None, None, {
        'model.encoder_type': 'cnn_mamba_small', 'data.processed_dir': str(root/'processed')})
    cycles = Cycles.from_processed(root/'processed')
    batch = _make_pair_batcher(cycles, config, 'cpu')(np.arange(0, 48, 6), 0)
    for moco in (False, True):
        config.contrast.moco = moco
        model = _build_pretraining_model(config, cycles)
        with _seeded_weights(config.seed):
            alone = ContrastiveModel(build_encoder(config.model), config.contrast, 4)
        assert list(model.parts()) == list(alone.parts())
        for m in (model, alone): torch.manual_seed(0); m.train()
        torch.manual_seed(0); (loss, values) = model(batch)
        torch.manual_seed(0); (other, expected) = alone({k: batch[k] for k in (
            'x1', 'x2', 'phases1', 'phases2', 'person', 'group')})
        assert torch.equal(loss, other) and values.keys() == expected.keys()
        loss.backward(), other.backward()
        for (name, part), (_, same) in zip(model.parts().items(), alone.parts().items()):
            for p, q in zip(part.parameters(), same.parameters()):
                assert torch.equal(p, q) and torch.equal(p.grad, q.grad), name

@pytest.mark.parametrize('name', [n for n in OBJECTIVES])
def test_every_objective_trains_the_encoder_and_its_head(root, rows, name):
    config = config_of(root, {name: 1.}, **({'contrast.moco': True} if name == 'moco' else {}))
    model = _build_pretraining_model(config, rows)
    for epoch in range(2):   # with MoCo the queue is filled the second time
        loss, values = model(batch_of(config, model, rows, range(0, 40, 4), epoch))
        loss.backward()
    assert loss.isfinite() and loss > 0 and all(v.isfinite() for v in values.values())
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in learning.items() if p.grad is None or not p.grad.any()] == []
    model.eval()
    batch = batch_of(config, model, rows, range(0, 40, 4))
    parts = [model.embed({k: v[i:j] for k, v in batch.items()}) for i, j in ((0, 3), (3, 10))]
    found = model.validation_losses({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, 10)
    whole = model.validation_losses(model.embed(batch), 10)
    assert found == pytest.approx(whole, abs=1e-4) and np.isfinite(found['loss'])

@pytest.mark.parametrize('name', [n for n, o in OBJECTIVES.items() if o.needs_states])
def test_rows_without_states_do_not_count(root, rows, name):
    config = config_of(root, {name: 1.})
    model = _build_pretraining_model(config, rows).eval()
    batch = batch_of(config, model, rows, range(6))
    losses, counted = model.objectives[name].row_losses(_HeardBatch(model.encoder, batch))
    unknown = dict(batch)
    for k in batch:
        if k.startswith('phases'): unknown[k] = batch[k].clone().index_fill_(0, torch.arange(3), 0)
        if k.startswith('target'): unknown[k] = batch[k].index_fill(0, torch.arange(3), torch.nan)
    some, known = model.objectives[name].row_losses(_HeardBatch(model.encoder, unknown))
    assert not known[:3].any() and known.any() and torch.equal(known[3:], counted[3:])
    torch.testing.assert_close(some[known], losses[known])
    torch.testing.assert_close(model(unknown)[0], losses[known].mean())

def test_several_objectives_from_end_to_end(root, tmp_path, monkeypatch):
    "Log, metrics, checkpoint; killed after the first epoch it goes on to the same weights."
    asked = dict(systole_minus_diastole=1., heart_states=.5, simclr=.1, masked_frames=0.)
    flags = SMALL | {'training.batch_size': 24} | dict(
        objectives=asked, objective_weights='uncertainty', tensorboard=True,
        processed_dir=root/'processed', downstream_dir=root/'downstream')
    best = P.pretrain('pretrain_window', output_dir=tmp_path/'whole', **flags)
    found = json.loads((best.parent/'final_metrics.json').read_text())
    assert found['objectives'] == {k: v for k, v in asked.items() if v}
    assert {'train_loss_heart_states', 'train_gradient_share_simclr', 'validation_loss_cycle',
            'train_gradient_cosine_systole_minus_diastole'} <= found.keys()
    weight = found['train_weight_heart_states']   # is learnt: near where it began
    assert weight != .5 and weight == pytest.approx(.5, rel=.1)
    assert load_pretrained_encoder(best).encoder.out_dim == 16
    shares = [v for k, v in found.items() if k.startswith('train_gradient_share')]
    assert len(shares) == 3 and sum(shares) == pytest.approx(1)
    log = (best.parent/'train.log').read_text()
    assert 'share of the gradient' in log and 'heart_states × 0.5' in log
    assert 'learnt weights: systole_minus_diastole' in log
    real, calls = P._PretrainRecipe.validate, []
    def dies(self, epoch):
        if epoch == 1: raise KeyboardInterrupt
        return real(self, epoch)
    monkeypatch.setattr(P._PretrainRecipe, 'validate', dies)
    with pytest.raises(KeyboardInterrupt):
        P.pretrain('pretrain_window', output_dir=tmp_path/'killed', **flags)
    monkeypatch.setattr(P._PretrainRecipe, 'validate', real)
    again = P.pretrain('pretrain_window', output_dir=tmp_path/'killed', **flags)
    weights = [load_checkpoint(b.parent/'final_model.pt')['model_state_dict']
               for b in (best, again)]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    # and the window recipe begins from it
    from pahcl.training.finetuning import finetune
    small = {k: v for k, v in SMALL.items() if k != 'training.use_amp'}
    finetune('window', task='circor_outcome', pretrained=best, data_dir=root/'downstream',
             output_dir=tmp_path, **small | {'training.num_epochs': 1, 'decision.folds': 0,
                                             'training.rows_per_epoch': 16})
    log = (tmp_path/'circor_outcome_window'/'train.log').read_text()
    assert 'parameters of heads skipped' in log and 'parameters loaded' in log

def refused(root, told, objectives=None, **more):
    with pytest.raises(PahclError, match=told):
        config = config_of(root, objectives, **more)
        _build_pretraining_model(config, _load_pretrain_data(config).train)

def test_settings_that_cannot_be_are_told(root):
    refused(root, "objectives: unknown key 'simclear'; the nearest valid one is 'simclr'",
            {'simclear': 1.})
    refused(root, 'names none with a weight above 0', {'simclr': 0.})
    refused(root, r'objectives\.simclr is -1', {'simclr': -1.})
    refused(root, 'objectives does not name moco', {'simclr': 1.}, **{'contrast.moco': True})
    refused(root, 'needs the four heart states', **{'data.num_substructures': 3})
    refused(root, 'data.state_channels is on', **{'data.state_channels': True})
    refused(root, 'augmentation.noise_probability cannot change',
            **{'augmentation.noise_probability': .5})
    with pytest.raises(PahclError, match='needs log-mel frames, but data.frontend is waveform'):
        config = load_config('pretrain', dict(objectives=dict(masked_frames=1.)))
        _build_pretraining_model(config, Cycles.from_processed(root/'processed'))

def test_recordings_without_states_are_refused(root, rows):
    config = config_of(root)
    silent, steps = rows.subset(np.arange(len(rows))), rows.steps
    silent.steps = replace(steps, states=np.zeros_like(steps.states))
    with pytest.raises(PahclError, match='systole_minus_diastole needs heart states, and none'):
        _build_pretraining_model(config, silent)
    _build_pretraining_model(config_of(root, {'masked_frames': 1.}), silent)

def test_windows_do_not_depend_on_the_batch(root, rows):
    config = config_of(root, {'simclr': 1., 'systole_minus_diastole': 1.})
    model = _build_pretraining_model(config, rows)
    whole = batch_of(config, model, rows, range(12), 3)
    parts = [batch_of(config, model, rows, r, 3) for r in (range(5), range(5, 12))]
    for k in whole: assert torch.equal(whole[k], torch.cat([p[k] for p in parts])), k
    assert isinstance(rows, Windows) and not torch.equal(whole['x1'], whole['x2'])
    recording = rows.table['folder'].to_numpy()
    assert (recording[_sample_positives(rows.table, 'recording', 0, 3)] == recording).all()

def test_an_objective_of_ones_own(root, rows):
    class Loud(Objective):
        "How loud is it?"
        def __init__(self, encoder, config):
            super().__init__(encoder, config)
            self.head = torch.nn.Linear(encoder.out_dim, 1)
        def row_losses(self, heard):
            truth = heard['x1'].mean((1, 2))
            return (self.head(heard.features())[:, 0]-truth)**2, truth > -99
    try:
        register_objective('loud')(Loud)
        config = config_of(root, {'loud': 1., 'heart_rate': 2.})
        model = _build_pretraining_model(config, rows)
        loss, values = model(batch_of(config, model, rows, range(8)) | dict(measured=True))
        assert loss.item() == pytest.approx(
            values['loss_loud'].item()+2*values['loss_heart_rate'].item())
        assert {'gradient_share_loud', 'gradient_cosine_heart_rate'} <= values.keys()
    finally: del OBJECTIVES['loud']

def test_batches_of_one_device(root):
    "Each whole batch is of one device, all rows of the epoch are there, and MoCo is refused."
    from pahcl.training.epoch_order import _EpochOrder, _name_devices
    config = config_of(root, dict(simclr=1.), **{'contrast.negatives': 'device'})
    train = _load_pretrain_data(config).train
    halves = train.table.assign(dataset=np.where(np.arange(len(train)) % 2, 'circor', 'pascal'))
    two = SimpleNamespace(table=halves)
    device, rows = _name_devices(halves), _EpochOrder(config, two)(1)
    free = _EpochOrder(config.model_copy(update=dict(
        contrast=config.contrast.model_copy(update=dict(negatives='any')))), two)(1)
    assert sorted(rows) == sorted(free) and list(rows) != list(free)
    size = config.training.batch_size
    of = [len({*device[rows[i:i+size]]}) for i in range(0, len(rows), size)]
    most = sum(np.unique(device[rows], return_counts=True)[1]//size)
    assert len({*device}) > 1 and most > 1 and of[:most] == [1]*most
    with pytest.raises(PahclError, match='its queue holds keys of everybody'):
        _load_pretrain_data(config_of(root, dict(moco=1.), **{
            'contrast.negatives': 'device', 'contrast.moco': True}))

def test_batches_of_like_hearts(root):
    "A batch holds neighbours in heart rate; all rows of the epoch are there, each epoch others."
    from pahcl.training.epoch_order import _EpochOrder, _find_heart_rates
    config = config_of(root, dict(simclr=1.), **{'contrast.negatives': 'heart_rate'})
    train, random = _load_pretrain_data(config).train, np.random.default_rng(0)
    np.testing.assert_allclose(_find_heart_rates(train), 50, atol=1)   # as they were made
    recordings = train.table[['dataset', 'recording_id']].apply(tuple, axis=1)
    seconds = recordings.map({r: random.uniform(.4, 1.2) for r in sorted(set(recordings))})
    told = SimpleNamespace(table=train.table.assign(duration_s=seconds))
    rows, other = map(_EpochOrder(config, told), (1, 2))
    free = _EpochOrder(config_of(root, dict(simclr=1.)), told)(1)
    assert sorted(rows) == sorted(free) and list(rows) != list(free) and list(rows) != list(other)
    size = config.training.batch_size
    batches = seconds.to_numpy()[rows[:len(rows)//size*size]].reshape(-1, size)
    spans = sorted((b.min(), b.max()) for b in batches)
    assert len(spans) > 2 and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))

def test_teachers_follow_and_are_part_of_no_optimiser(root, rows):
    config = config_of(root, dict(masked_latents=1.))
    model = _build_pretraining_model(config, rows)
    objective = model.objectives['masked_latents']
    learning = {p for part in model.parts().values() for p in part.parameters()}
    assert learning.isdisjoint(objective.teacher.parameters())
    assert not any(name.startswith('objectives.masked_latents.encoder')
                   for name in model.state_dict())
    objective.set_pace(steps=10, rows=100)
    assert objective.momentum < .99     # half of it is new within a tenth of the run
    before = [p.clone() for p in objective.teacher.parameters()]
    with torch.no_grad():
        for p in model.encoder.parameters(): p += 1
    objective.follow(.5)
    for old, new in zip(before, objective.teacher.parameters()):
        torch.testing.assert_close(new-old, torch.full_like(old, 1-objective.momentum))
