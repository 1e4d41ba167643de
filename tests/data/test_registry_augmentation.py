"An augmentation from outside is one class, and no list of the package is touched"
from unittest import mock
import pytest, torch
import pahcl.core.config_sections as config
import pahcl.data.augmentation as views
from pahcl.core.basics import PahclError
from pahcl.core.config import load_config, _to_yaml
from pahcl.core.config_sections import AugmentationSection
from pahcl.data.augmentation import (
    Augmentation, Augmenter, FrequencyAugmentation, register_augmentation)
from pahcl.data.random_numbers import sample_keys

@pytest.fixture(autouse=True)
def forget(monkeypatch):
    "What a test registers is gone after it."
    monkeypatch.setattr(config, '_REGISTERED_KEYS',
                        {k: dict(v) for k, v in config._REGISTERED_KEYS.items()})
    with mock.patch.dict(views.AUGMENTATIONS): yield

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
