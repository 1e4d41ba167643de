"""What is added from outside: an encoder or an augmentation is one class, and no list of the
package is touched
"""
from unittest import mock
import os, subprocess, sys, textwrap
import pytest, torch, torch.nn.functional as F
import pahcl.core.config as config
import pahcl.models.encoders as encoder
import pahcl.data.augmentation as views
from pahcl.core.basics import PahclError
from pahcl.models.checkpoints import classifier_checkpoint, load_classifier, load_pretrained_encoder
from pahcl.models.classifier import Classifier
from pahcl.core.config import AugmentationSection, _known_keys, load_config, ModelSection, _to_yaml
from pahcl.models.encoders import build_encoder, Encoder, from_pretrained, register_encoder
from pahcl.models.checkpoints import save_checkpoint
from pahcl.data.augmentation import (
    Augmentation, Augmenter, FrequencyAugmentation, register_augmentation)
from pahcl.data.random_numbers import sample_keys

@pytest.fixture(autouse=True)
def forget(monkeypatch):
    "What a test registers is gone after it."
    monkeypatch.setattr(encoder, 'ENCODERS', dict(encoder.ENCODERS))
    monkeypatch.setattr(config, '_REGISTERED_KEYS',
                        {k: dict(v) for k, v in config._REGISTERED_KEYS.items()})
    with mock.patch.dict(views.AUGMENTATIONS): yield

def add_tcn(name='tcn_small'):
    @register_encoder(name, channels=8, dilations=[1, 4], mix=0.5, norm=None)
    class TCN(Encoder):
        "Dilated convolutions."
        def __init__(self, config):
            super().__init__(config, 8, config['channels'])
            sizes = [1, *[config['channels']]*(len(config['dilations'])-1)]
            self.layers = torch.nn.ModuleList(torch.nn.Conv1d(n, config['channels'], 3, padding=d,
                                                              dilation=d)
                                              for n, d in zip(sizes, config['dilations']))

        def encode_frames(self, x, valid_length):
            for layer in self.layers: x = F.gelu(layer(x))
            return F.avg_pool1d(x, 8, ceil_mode=True).transpose(1, 2)*self.config['mix']
    return TCN

def test_an_encoder_from_outside_is_built_trained_saved_and_loaded(tmp_path):
    kind = add_tcn()
    e = build_encoder('tcn_small', channels=6)
    assert type(e) is kind and e.config == dict(encoder_type='tcn_small', channels=6,
                                                dilations=[1, 4], mix=0.5, norm=None)
    x, n = torch.randn(4, 1, 397), torch.tensor([397, 100, 0, 9])
    assert (e(x, n).shape == (4, 6) and e.sequence(x, n).shape == (4, 50, 6)
            and e.sequence(x, n)[1, 13:].abs().sum() == 0)
    before = {k: v.clone() for k, v in e.state_dict().items()}
    model = Classifier(e, 2)
    F.cross_entropy(model(x, n), torch.tensor([0, 1, 0, 1])).backward()
    torch.optim.SGD(model.parameters(), 1.).step()
    assert all(not torch.equal(before[k], v) for k, v in e.state_dict().items())
    e.save_pretrained(tmp_path/'e')
    assert torch.equal(from_pretrained(tmp_path/'e')(x, n), e.eval()(x, n))
    save_checkpoint(tmp_path/'c.pt',
                    classifier_checkpoint(model, 'pascal', dict(normal=0, murmur=1), {}))
    assert torch.equal(load_classifier(tmp_path/'c.pt')[0](x, n), model.eval()(x, n))
    assert torch.equal(load_pretrained_encoder(tmp_path/'c.pt')[0].eval()(x, n), e(x, n))
    with pytest.raises(PahclError,
                       match='c.pt holds an encoder with channels 6, but model.channels is 9'):
        load_pretrained_encoder(tmp_path/'c.pt', dict(channels=9))

def test_its_keys_are_keys_of_the_configuration(tmp_path):
    given = dict(model=dict(encoder_type='tcn_small', channels=4))
    with pytest.raises(PahclError, match="unknown key 'model.channels'"):
        load_config('finetune', given)
    add_tcn()
    c = load_config('finetune', given, overrides={'model.dilations': [2]})
    assert (c.model.encoder_settings() == dict(channels=4, dilations=[2])
            and 'model.channels' in _known_keys())
    assert build_encoder(c.model).config['channels'] == 4
    (tmp_path/'c.yaml').write_text(_to_yaml(c))
    assert load_config('finetune', tmp_path/'c.yaml') == c
    for wrong, message in [(dict(channels='many'),
                            "model.channels is 'many'; a whole number is expected"),
                           (dict(dilations=3), 'a list is expected'),
                           (dict(chanels=3), "the nearest valid one is 'model.channels'")]:
        with pytest.raises(PahclError, match=message): load_config('finetune', dict(model=wrong))
    with pytest.raises(PahclError,
                       match="unknown key 'chanels'; the nearest valid one is 'channels'"):
        build_encoder('tcn_small', chanels=3)

def test_names_are_read_from_the_registry():
    with pytest.raises(PahclError,
                       match="unknown encoder_type 'tcn_small'; the valid ones are cnn_mamba, .*, "
                             "sincnext_bm. One of your own is known once its module is imported"):
        build_encoder('tcn_small')
    add_tcn()
    with pytest.raises(PahclError,
                       match='the valid ones are cnn_mamba, .*, sincnext_bm, tcn_small.'):
        build_encoder('tcn')
    add_tcn()   # a cell that is run a second time
    with pytest.raises(PahclError,
                       match='two encoders are called cnn_mamba: give that of TCN another name'):
        add_tcn('cnn_mamba')
    assert 'channels' not in ModelSection.model_fields

MODULE = """
    from pahcl.encoder import Encoder, register_encoder
    import torch
    @register_encoder('mean_of_blocks', width=5)
    class Blocks(Encoder):
        def __init__(self, config):
            super().__init__(config, 4, config['width'])
            self.layer = torch.nn.Linear(4, config['width'])
        def encode_frames(self, x, valid_length):
            return self.layer(torch.nn.functional.pad(x[:, 0], (0, -x.shape[-1] % 4)).unflatten(1, \
(-1, 4)))
"""

@pytest.mark.parametrize(
    'program', ["from pahcl.encoder import build_encoder; print(build_encoder('mean_of_blocks', "
                "width=3).config)",
                "from pahcl.config import load_config; print(load_config('pretrain', "
                "dict(model=dict(encoder_type='mean_of_blocks', width=3))).model)",
                "from pahcl.encoder import build_encoder; "
                "print(build_encoder(dict(encoder_type='mean_of_blocks', width=3)).config)"])
def test_a_command_finds_modules_that_the_environment_names(tmp_path, program):
    (tmp_path/'my_blocks.py').write_text(textwrap.dedent(MODULE))
    run = lambda **env: subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}') | env)
    found = run(PAHCL_EXTENSIONS='my_blocks')
    assert found.returncode == 0 and 'mean_of_blocks' in found.stdout and 'width' in found.stdout, (
        found.stderr)
    assert 'PahclError' in run().stderr and 'PAHCL_EXTENSIONS names nothing_here: No module' in run(
        PAHCL_EXTENSIONS='nothing_here').stderr

def add_click(name='click'):
    @register_augmentation(name, click_height=3.0)
    class Click(Augmentation):
        "A sample that is louder."
        columns = ('click', 'click_start')
        def apply(self, x, drawn):
            at = (drawn['click_start']*drawn.length).long()[:, None]
            return x.scatter_add(1, at, torch.full_like(x[:, :1], self.setting('click_height')))
    return Click

def cycles(B=40, T=600):
    g = torch.Generator().manual_seed(0)
    n, t = torch.randint(300, T+1, (B,), generator=g), torch.arange(T)
    phases = ((t*4//n[:, None]+1)*(t < n[:, None])).to(torch.uint8)
    return (torch.randn(B, T, generator=g)*(phases > 0))[:, None], phases

def test_an_augmentation_from_outside_changes_views_and_no_random_number_of_others():
    x, phases = cycles()
    keys, look = (sample_keys(torch.arange(40), 1),
                  lambda v: v(x, phases, 5000, 3, sample_keys(torch.arange(40), 1))[0])
    before, plain = (Augmenter(AugmentationSection()).draws(3, keys),
                     look(Augmenter(AugmentationSection())))
    add_click()
    off, on = (Augmenter(AugmentationSection()),
               Augmenter(AugmentationSection(click_probability=0.5)))
    assert torch.equal(look(off), plain)   # registered is not switched on
    after = on.draws(3, keys)
    assert (after.keys()-before.keys() == {'click', 'click_start'}
            and all(torch.equal(after[k], v) for k, v in before.items()))
    changed = (look(on) != plain).any(-1)[:, 0]
    assert torch.equal(changed, after['click']) and 10 < changed.sum() < 30
    assert not torch.equal(
        look(Augmenter(AugmentationSection(click_probability=0.5, click_height=9.))), look(on))
    assert not any(torch.equal(after['click_start'], v) for k, v in after.items()
                   if k != 'click_start')
    some = [on(x[r], phases[r], 5000, 3, keys[r])[0] for r in torch.arange(40).split(7)]
    assert torch.equal(torch.cat(some), look(on))

def test_a_filter_from_outside_shares_the_transform():
    @register_augmentation('hum')
    class Hum(FrequencyAugmentation):
        def gain(self, frequency, drawn):
            return 1-((frequency > 90) & (frequency < 110))*drawn['hum'][:, None].float()
    x, phases = cycles()
    off = {k: 0.0 for k in AugmentationSection.model_fields
           if not k.endswith('_hz') and k != 'noise_snr_db'}
    v = Augmenter(AugmentationSection(**{**off, 'hum_probability': 1.0,
                                         'band_filter_probability': 1.0}))
    assert len(v.steps) == 1 and v.changes_sound
    phases[:] = 1
    y = v(x, phases, 5000, 3, torch.arange(40))[0]
    spectrum, hz = torch.fft.rfft(y).abs().mean((0, 1)), torch.fft.rfftfreq(600, 1/5000)
    assert spectrum[(hz > 90) & (hz < 110)].max() < 1e-3 < spectrum[(hz > 60) & (hz < 90)].min()

def test_its_keys_are_keys_of_the_section(tmp_path):
    given = dict(augmentation=dict(click_probability=0.5))
    with pytest.raises(PahclError, match="unknown key 'augmentation.click_probability'"):
        load_config('pretrain', given)
    add_click()
    c = load_config('pretrain', given)
    assert (c.augmentation.click_probability, c.augmentation.click_height) == (0.5, 3.0)
    (tmp_path/'c.yaml').write_text(_to_yaml(c))
    assert load_config('pretrain', tmp_path/'c.yaml') == c
    assert load_config('pretrain').augmentation.click_probability == 0.0
    for wrong, message in [
            (dict(click_probability=2.0),
             'augmentation.click_probability is 2.0; a number of at most 1 is expected'),
            (dict(click_height='high'), 'a number is expected'),
            (dict(clik_height=3.), "the nearest valid one is 'augmentation.click_height'")]:
        with pytest.raises(PahclError, match=message):
            load_config('pretrain', dict(augmentation=wrong))
    add_click()   # a cell that is run a second time
    with pytest.raises(PahclError,
                       match='two augmentations are called noise: give Click another name'):
        add_click('noise')
