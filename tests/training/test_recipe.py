"""The training recipe: what is drawn, mixed, averaged and called Absent, against closed forms and
other implementations; the same for any number of threads, and after a kill
"""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim.swa_utils import AveragedModel
from pahcl.core.basics import generator, PahclError
from pahcl.core.config import load_config
from pahcl.data.inputs import open_cycles
from pahcl.data.sampling import draw_epoch_rows, _number_draws
from pahcl.data.splitting import prepare
from pahcl.evaluation.evaluator import evaluate
from pahcl.models.checkpoints import load_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.encoders import build_encoder
from pahcl.testing.made import _make_processed_folder, _make_recordings
from pahcl.training.batch_changes import _plan_mixup
from pahcl.training.finetuning import finetune
from pahcl.training.finetuning_data import CycleSampler
from pahcl.training.objective import _ClassificationObjective, _cycle_losses
from pahcl.training.weight_average import _kept_share

TINY = {'model.encoder_type': 'cnn', 'model.cnn_channels': [4, 6], 'model.cnn_kernel_sizes': [7, 5],
        'model.cnn_strides': [8, 8], 'training.warmup_epochs': 0, 'training.num_workers': 0}
# all of the recipe, on frames of 1 s windows
WHOLE = {'data.window_s': 1., 'model.cnn_channels': [4, 6], 'training.num_epochs': 3,
         'model.cnn_kernel_sizes': [3, 3], 'model.cnn_strides': [2, 2],
         'training.rows_per_epoch': 24, 'training.batch_size': 8, 'training.warmup_epochs': 0,
         'training.num_workers': 0}


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    "A small task of made recordings; murmurs are heard in one place of two."
    folder = tmp_path_factory.mktemp('recipe')
    recordings = _make_recordings(['circor'], persons=24)
    recordings['murmur_locations'] = recordings['murmur'].map(dict(Present='AV'))
    _make_processed_folder(folder/'processed', recordings, cycles=2, signals=True)
    prepare('all', folder/'no raw', folder/'processed', folder/'downstream')
    return folder


def tune(tasks, name, config=None, **given):
    metrics = finetune(config, output_dir=tasks/'runs', task='circor_murmur', pretrained='none',
                       data_dir=tasks/'downstream', experiment_name=name, **given)
    return metrics, tasks/'runs'/f'circor_murmur_{name}'


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_classes_are_drawn_as_often_as_the_exponent_says(sizes, exponent, seed):
    "Class c with a chance ∝ n_c^(1-e), within four standard deviations; its rows equally often."
    labels = np.repeat(np.arange(len(sizes)), sizes)
    table = pd.DataFrame(dict(label=labels)).sample(frac=1, random_state=seed)
    count, drawn = 4000, draw_epoch_rows(table, seed, 0, exponent=exponent, count=4000)
    chance = np.array(sizes, float)**(1-exponent)
    chance /= chance.sum()
    found = np.bincount(table['label'].to_numpy()[drawn], minlength=len(sizes))
    assert (abs(found-count*chance) < 4.5*np.sqrt(count*chance*(1-chance))+1).all()
    rows = np.bincount(drawn, minlength=len(table))
    each = (count*chance/sizes)[table['label']]
    assert (abs(rows-each) < 6*np.sqrt(each)+3).all()
    assert (drawn == draw_epoch_rows(table, seed, 0, exponent=exponent, count=4000)).all()


def test_a_cap_comes_before_the_balance():
    "One subject of a class with a hundred rows, one with ten: with a cap both are heard."
    table = pd.DataFrame(dict(subject_id=['a']*100+['b']*10+['c']*5, label=[0]*110+[1]*5,
                              recording_id='r'))
    drawn = draw_epoch_rows(table, 0, 0, cycles_per_recording=5, exponent=0., count=6000)
    shares = table['subject_id'].iloc[drawn].value_counts(normalize=True)
    assert shares.to_numpy() == pytest.approx(1/3, abs=.03)


@given(st.lists(st.integers(0, 9), max_size=60))
@settings(deadline=None)
def test_draws_are_numbered(rows):
    draws = _number_draws(np.array(rows, int), 10)
    assert len(set(draws)) == len(rows) and (draws % 10 == rows).all()
    for i, d in enumerate(draws): assert d//10 == rows[:i].count(rows[i])


def test_averaged_weights_are_torchs():
    "Against AveragedModel with the same shares, over steps of AdamW, norms and all."
    torch.manual_seed(0)
    model = Classifier(build_encoder('cnn', cnn_channels=[4, 6], cnn_kernel_sizes=[7, 5],
                                     cnn_strides=[8, 8]), 2, hidden_dim=0)
    training = load_config('finetune', overrides={
        'task': 'pascal', 'training.ema_decay': .8}).training
    batch = dict(x=torch.randn(8, 1, 800), valid_length=torch.full((8,), 800),
                 label=torch.arange(8) % 2)
    objective = _ClassificationObjective(model, training, batch['label'].numpy(), dict(a=0, b=1),
                                         False)
    def mean(averages, news, count):   # of so many steps before
        keep = _kept_share(.8, int(count)+1)
        for average, new in zip(averages, news): average.lerp_(new, 1-keep)
    oracle = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=.01)
    for _ in range(6):
        objective(batch)[0].backward()
        optimiser.step()
        optimiser.zero_grad()
        objective.follow()
        oracle.update_parameters(model)
    ours, theirs = objective.judged.state_dict(), oracle.module.state_dict()
    assert objective.judged is not model and ours.keys() == theirs.keys()
    for key, value in ours.items(): assert torch.allclose(value, theirs[key], atol=1e-6), key
    assert any(not torch.equal(v, ours[k]) for k, v in model.state_dict().items())


@given(st.integers(0, 999), st.sampled_from(['ce', 'focal']), st.booleans(), st.floats(0, .3))
@settings(max_examples=20, deadline=None)
def test_mixed_labels_are_a_mixed_target(seed, loss_type, weighted, smoothing):
    "share·loss + (1-share)·loss of the other label, written out as one soft target."
    g = torch.Generator().manual_seed(seed)
    logits, share = torch.randn(6, 3, generator=g), .5+.5*torch.rand(6, generator=g)
    one, other = torch.randint(3, (2, 6), generator=g)
    weights = torch.tensor([.5, 2., 1.]) if weighted else torch.ones(3)
    how = dict(smoothing=smoothing, loss_type=loss_type)
    ours = (share*_cycle_losses(logits, one, weights, **how)
            +(1-share)*_cycle_losses(logits, other, weights, **how))
    soft = lambda labels: torch.eye(3)[labels]*(1-smoothing)+smoothing/3
    target = (share[:, None]*weights[one][:, None]*soft(one)
              +(1-share)[:, None]*weights[other][:, None]*soft(other))
    p = logits.softmax(-1)
    focus = (1-p)**2 if loss_type == 'focal' else 1
    assert torch.allclose(ours, -(target*focus*p.log()).sum(-1), atol=1e-5)


def test_partners_and_shares_are_of_the_whole_epoch():
    draws = np.random.default_rng(0).permutation(900)
    plan = _plan_mixup(draws, .3, generator(0, 'mixup', 0))
    assert sorted(plan.partners) == list(range(900)) and .5 <= plan.shares.min()
    beta = np.random.default_rng(1).beta(.3, .3, 100_000)   # |2λ-1| does not know which is louder
    assert np.quantile(plan.shares, [.25, .5, .75]) == pytest.approx(
        np.quantile(np.maximum(beta, 1-beta), [.25, .5, .75]), abs=.03)


def test_any_batch_of_an_epoch_holds_the_same_rows(tasks):
    "However the epoch is cut into batches, by whatever process."
    config = load_config('finetune', 'window', 'circor_murmur', WHOLE)
    data = open_cycles(tasks/'downstream'/'circor_murmur', 'train', config.data)
    rows = CycleSampler(config, data, 'cpu')
    draws = rows.rows_of(1)
    whole = rows.batch(draws, 1)
    assert len(draws) == 24 and {'share', 'other_label', 'label', 'x'} <= whole.keys()
    for sizes in ([5]*5, [1]*24, [20, 4]):
        cuts = np.split(draws, np.cumsum(sizes)[:-1])
        parts = [rows.batch(cut, 1) for cut in cuts if len(cut)]
        for key, value in whole.items():
            assert torch.equal(torch.cat([p[key] for p in parts]), value), key
    again = CycleSampler(config, data, 'cpu')
    assert (again.rows_of(1) == draws).all()
    assert torch.equal(again.batch(draws, 1)['x'], whole['x'])
    assert not torch.equal(rows.batch(rows.rows_of(2), 2)['x'], whole['x'])


def test_the_whole_recipe_for_any_workers_and_after_a_kill(tasks, monkeypatch):
    import pahcl.training.finetuning as module
    given = dict(WHOLE, **{'training.save_steps': 1, 'decision.folds': 0})
    whole, folder = tune(tasks, 'whole', 'window', **given)
    ahead, _ = tune(tasks, 'ahead', 'window', **given | {'training.num_workers': 4})
    assert ahead['history'] == whole['history'] and ahead['levels'] == whole['levels']
    assert whole['best_epoch'] == 3 and any('trained on too' in note for note in whole['notes'])
    saved = load_checkpoint(folder/'best_model.pt')
    assert 'validation' not in saved and saved['training_persons']
    persons = {person for split in ('train', 'val') for person in open_cycles(
        tasks/'downstream'/'circor_murmur', split).table['person_id']}
    assert set(saved['training_persons']) == persons
    score, calls = module._score_training_cycles, []
    def killed(*a):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return score(*a)
    monkeypatch.setattr(module, '_score_training_cycles', killed)
    with pytest.raises(KeyboardInterrupt): tune(tasks, 'killed', 'window', **given)
    monkeypatch.setattr(module, '_score_training_cycles', score)
    # what is saved are the averaged weights, not those that learn
    last = load_checkpoint(tasks/'runs'/'circor_murmur_killed'/'last.pt')
    learning = last['training_state']['objective']
    assert last['training_state']['part'] and any(
        not torch.equal(v, learning[f'model.{k}']) for k, v in last['model_state_dict'].items())
    resumed, again = tune(tasks, 'killed', 'window', **given)
    assert resumed['history'] == whole['history']
    ours, theirs = (load_checkpoint(f/'final_model.pt')['model_state_dict']
                    for f in (folder, again))
    for key, value in ours.items(): assert torch.equal(value, theirs[key]), key
    # nothing is chosen on persons who trained
    where = dict(task='circor_murmur', data_dir=tasks/'downstream', draws=5)
    results = evaluate(folder/'best_model.pt', **where)
    assert any('no rule, threshold or temperature is chosen' in n for n in results['notes'])
    with pytest.raises(PahclError, match='validation persons trained the model'):
        evaluate(folder/'best_model.pt', **where, threshold='youden')
    with pytest.raises(PahclError, match='validation persons trained the model'):
        evaluate(folder/'best_model.pt', **where, subject_rule='choose')


def test_the_last_epoch_counts_as_the_best(tasks):
    "Where nothing is learnt the first epoch is as good as any; nothing stops early."
    still = TINY | {'training.num_epochs': 4, 'training.learning_rate': 1e-12,
                    'training.min_lr': 0., 'training.early_stopping_patience': 1}
    best, _ = tune(tasks, 'best', **still)
    last, folder = tune(tasks, 'last', **still | {'training.epoch_choice': 'last'})
    assert (best['best_epoch'], best['epochs']) == (1, 2)
    assert (last['best_epoch'], last['epochs']) == (4, 4)
    assert load_checkpoint(folder/'best_model.pt')['epoch'] == 4


def test_silent_places_of_an_ill_child_are_absent(tasks):
    "In training only; where there is no class Absent nothing changes."
    folder, quick = tasks/'downstream'/'circor_murmur', TINY | {'training.num_epochs': 1}
    table = open_cycles(folder, 'train').table
    silent = ((table['label'] == 0) & (table['location'] != 'AV')).sum()
    name = {'training.use_murmur_locations': 'absent'}
    absent, run = tune(tasks, 'absent', **quick | name)
    dropped, _ = tune(tasks, 'dropped', **quick)
    assert absent['training_cycles']-dropped['training_cycles'] == silent > 0
    assert absent['levels']['cycle']['n'] == dropped['levels']['cycle']['n']
    log = (run/'train.log').read_text()
    assert f'({silent:,} cycles)' in log and 'are trained as Absent' in log
    outcome = dict(output_dir=tasks/'runs', task='circor_outcome', pretrained='none',
                   data_dir=tasks/'downstream')
    plain, called = (finetune(experiment_name=n, **outcome, **quick | k)['history']
                     for n, k in (('plain', {}), ('called', name)))
    assert plain == called


@pytest.mark.parametrize('given, told', [
    ({'training.use_balanced_sampling': True, 'training.balance_exponent': .5}, 'Leave one of'),
    ({'training.mixup': .3, 'training.aggregation': 'attention'}, 'Set mixup: 0'),
    ({'training.include_validation': True}, 'Set training.epoch_choice: last'),
    ({'augmentation.spec_augment_probability': .5}, 'it changes log-mel frames'),
    ({'augmentation.window_shift': .25}, 'data.unit is cycle'),
    ({'augmentation.noise_probability': .5, 'linear_eval': True, 'pretrained': 'packaged'},
     'the encoder is frozen')])
def test_keys_that_cannot_go_together_leave_no_folder(tasks, given, told):
    settings = dict(task='circor_murmur', pretrained='none', data_dir=tasks/'downstream',
                    experiment_name='refused') | given
    with pytest.raises(PahclError, match=told): finetune(output_dir=tasks/'runs', **settings)
    assert not (tasks/'runs'/'circor_murmur_refused').exists()


@pytest.mark.parametrize('task', ['circor_murmur', 'circor_outcome', 'pascal', 'physionet2016'])
def test_the_packaged_recipe_is_for_every_task(task):
    config = load_config('finetune', 'window', task)
    assert config.task.name == task and config.pretrain.checkpoint_path == 'none'
    assert (config.training.balance_exponent, config.training.mixup) == (.5, .3)
    assert config.evaluation.primary_metric   # the task's own
    json.dumps(config.model_dump())
