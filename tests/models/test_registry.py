"An encoder from outside is one class, and no list of the package is touched"
import os, subprocess, sys, textwrap
import pytest, torch, torch.nn.functional as F
import pahcl.core.config_sections as config
import pahcl.models.encoder_base as encoder_base
from pahcl.core.basics import PahclError
from pahcl.core.config import load_config, _to_yaml
from pahcl.core.config_sections import _known_keys, ModelSection
from pahcl.models.checkpoints import classifier_checkpoint, load_classifier, save_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.encoder_base import Encoder, ENCODERS, register_encoder
from pahcl.models.encoders import build_encoder
from pahcl.models.hub import from_pretrained
from pahcl.models.pretrained import load_pretrained_encoder

@pytest.fixture(autouse=True)
def forget(monkeypatch):
    "What a test registers is gone after it."
    monkeypatch.setattr(encoder_base, 'ENCODERS', dict(encoder_base.ENCODERS))
    monkeypatch.setattr(config, '_REGISTERED_KEYS',
                        {k: dict(v) for k, v in config._REGISTERED_KEYS.items()})

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
                             "logmel_cnn. One of your own is known once its module is imported"):
        build_encoder('tcn_small')
    add_tcn()
    with pytest.raises(PahclError,
                       match='the valid ones are cnn_mamba, .*, logmel_cnn, tcn_small.'):
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
                "from pahcl.core.config import load_config; print(load_config('pretrain', "
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

@pytest.mark.parametrize('name', list(ENCODERS))
def test_gradients_lie_as_their_weights_do(name):
    "else PyTorch warns on several processes, and copies each gradient once more"
    encoder = build_encoder(name).train()
    x, length = torch.randn(2, encoder.in_channels, 1500), torch.tensor([1500, 1000])
    encoder(x, length).square().sum().backward()
    for key, p in encoder.named_parameters(): assert p.grad.stride() == p.stride(), key
