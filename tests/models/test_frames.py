"Encoders that hear frames of many channels: sizes, refusals, heads, checkpoints, both levels"
import copy
import pandas as pd, pytest, torch
from pahcl.core.basics import PahclError
from pahcl.core.config_sections import _ContrastSection
from pahcl.models.checkpoints import classifier_checkpoint, load_classifier, save_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.convolutions import MaskedConvolution, ResidualBlock
from pahcl.models.encoder_base import encoder_fingerprint, ENCODERS
from pahcl.models.encoders import build_encoder
from pahcl.models.hub import from_pretrained
from pahcl.models.masked_layers import MaskedGroupNorm
from pahcl.models.pooling import pool_levels
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.studies.saliency import _ExplainedSplit, _explain_cycles, _saliency_report
from pahcl.training.contrastive_model import ContrastiveModel

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(cnn_channels=[4, 8], cnn_kernel_sizes=[3, 3], cnn_strides=[2, 2], state_dropout=0.)

def logmel(**settings):
    torch.manual_seed(0)
    return build_encoder('logmel_cnn', **dict(in_channels=84) | SMALL | settings)

def windows(n=3, T=64, channels=84): return torch.randn(n, channels, T)

@pytest.mark.parametrize('name', [n for n in ENCODERS if n != 'logmel_cnn'])
def test_only_the_first_layer_knows_the_number_of_channels(name):
    one, many = (build_encoder(name, in_channels=n) for n in (1, 84))
    assert (one.in_channels, many.in_channels, many.config['in_channels']) == (1, 84, 84)
    shapes = [{k: v.shape for k, v in e.state_dict().items()} for e in (one, many)]
    others = {k for k in shapes[0].keys() | shapes[1].keys()
              if shapes[0].get(k) != shapes[1].get(k)}
    first = [k for k in others if k in shapes[1] and 84 in shapes[1][k]]
    assert len(first) == 1 and all(k.split('.')[0] in ('cnn', 'stem', 'sinc_conv', 'sinc_norm')
                                   for k in others)
    assert build_encoder(many.config).config == many.config
    for e, channels in ((one, 84), (many, 1)):
        message = rf'\[2, {channels}, 50\]; .* are \[B, {85-channels}, T'
        with pytest.raises(PahclError, match=message): e(windows(2, 50, channels))

def test_log_mel_images_of_a_waveform_are_refused():
    with pytest.raises(PahclError, match='mel_planes 2 of mel_bands 40 are 80 channels, but the '
                                         'input has 1. Set data.frontend: logmel'):
        build_encoder('logmel_cnn', in_channels=1)
    assert logmel(in_channels=20, mel_bands=20, mel_planes=1)(windows(channels=20)).shape == (3, 16)

def test_an_image_is_convolved_as_a_cycle_is():
    "Of one band the two-dimensional layers are the one-dimensional ones, masks included."
    torch.manual_seed(0)
    for kind, more in ((MaskedConvolution, (5, 2)), (ResidualBlock, (3, 2))):
        flat, image = kind(4, 8, *more), kind(4, 8, *more, dims=2)
        state = flat.state_dict()
        for k, v in image.state_dict().items():
            if v.dim() == 4: v.zero_()[:, :, v.shape[2]//2] = state[k]
            else: v.copy_(state[k])
        x, length = torch.randn(3, 4, 21), torch.tensor([21, 10, 1])
        for n in (None, length):
            y = x if n is None else x*(torch.arange(21) < n[:, None])[:, None]
            torch.testing.assert_close(image(y[:, :, None], n)[0][:, :, 0], flat(y, n)[0])

def test_a_norm_of_images_is_group_norm_of_what_is_valid():
    norm, x, n = MaskedGroupNorm(16), torch.randn(2, 16, 5, 30), torch.tensor([30, 12])
    y = norm(x, torch.arange(30) < n[:, None])
    for i, m in enumerate(n): torch.testing.assert_close(y[i:i+1, ..., :m], norm(x[i:i+1, ..., :m]))

def test_states_are_dropped_as_a_group_and_in_training_only():
    e, x = logmel(state_dropout=.5), windows(64)
    x[:, :80], x[:, 80:] = x[:1, :80], x[:1, 80:]
    without = x.clone()
    without[:, 80:] = 0
    with torch.no_grad():
        y, heard, deaf = e.train()(x), e.eval()(x), e(without)
    same = lambda a, b: (a-b).abs().amax(1) < 1e-5
    assert (same(y, heard) | same(y, deaf)).all() and not same(heard, deaf).any()
    assert 16 < same(y, deaf).sum() < 48

@pytest.mark.parametrize('pooling, width', [('cycle', 16), ('phases', 32)])
def test_heads_of_mean_and_maximum(pooling, width, tmp_path):
    model = Classifier(logmel(), 3, pooling=pooling).eval()
    x, n = windows(), torch.tensor([64, 40, 9])
    phases = (1+torch.arange(64)//10 % 4)*(torch.arange(64) < n[:, None])
    with torch.no_grad():
        features, logits = model.features(x, n, phases), model(x, n, phases=phases)
        frames = model.encoder.sequence(x, n)
    assert features.shape == (3, width) and logits.shape == (3, 3)
    for i, valid in enumerate((16, 10, 3)):
        own = frames[i, :valid]
        if pooling == 'cycle':
            torch.testing.assert_close(features[i], torch.cat([own.mean(0), own.amax(0)]))
    if pooling == 'phases':   # the third has S1 alone: its other states have its mean
        torch.testing.assert_close(features[2, 8:16], frames[2, :3].mean(0))
    content = classifier_checkpoint(model, 'pascal', dict(a=0, b=1, c=2), {})
    save_checkpoint(tmp_path/'c.pt', content)
    assert torch.equal(load_classifier(tmp_path/'c.pt')[0](x, n, phases=phases), logits)
    model.save_pretrained(tmp_path/'m')
    assert torch.equal(from_pretrained(tmp_path/'m')(x, n, phases=phases), logits)

def test_both_levels_of_contrast():
    model = ContrastiveModel(logmel(), _ContrastSection(cycle_projector=[6, 5],
                                                        substructure_projector=[4, 3]))
    phases = (1+torch.arange(64)//16).repeat(3, 1).to(torch.uint8)
    found = model.project(windows(), phases)
    assert found['cycle'].shape == (3, 5) and found['substructure'].shape == (3, 4, 3)
    levels = pool_levels(model.encoder, windows(), phases)
    assert levels.cycle.shape == (3, 16) and levels.substructure.shape == (3, 4, 8)

def test_checkpoints_without_the_key_heard_waveforms(tmp_path):
    torch.manual_seed(0)
    e = build_encoder('cnn_mamba_small', mamba_n_layers=1).eval()
    model = Classifier(e, 2).eval()
    content = classifier_checkpoint(model, 'pascal', dict(a=0, b=1), {})
    old = copy.deepcopy(content)
    del old['encoder_config']['in_channels']
    save_checkpoint(tmp_path/'old.pt', old)
    x = windows(channels=1)
    again, _ = load_classifier(tmp_path/'old.pt')
    assert torch.equal(again(x), model(x)) and again.encoder.in_channels == 1
    assert encoder_fingerprint(again.encoder) == encoder_fingerprint(e)
    del e.config['in_channels']
    assert encoder_fingerprint(again.encoder) == encoder_fingerprint(e)
    message = 'holds an encoder with in_channels 1, but model.in_channels'
    with pytest.raises(PahclError, match=message):
        load_pretrained_encoder(tmp_path/'old.pt', dict(in_channels=84))

def test_one_that_does_not_say_hears_waveforms_only(monkeypatch):
    from pahcl.core import config_sections
    from pahcl.models import encoder_base
    monkeypatch.setattr(encoder_base, 'ENCODERS', dict(encoder_base.ENCODERS))
    monkeypatch.setattr(config_sections, '_REGISTERED_KEYS',
                        {k: dict(v) for k, v in config_sections._REGISTERED_KEYS.items()})
    @encoder_base.register_encoder('sum_of_sounds', sample_rate=5000)
    class Sum(torch.nn.Module):
        def forward(self, x): return x.sum(1, keepdim=True)
    assert build_encoder('sum_of_sounds', in_channels=1)(windows(channels=1)).shape == (3, 1)
    with pytest.raises(PahclError, match='sum_of_sounds hears waveforms, which have 1 channel'):
        build_encoder('sum_of_sounds', in_channels=84)
    with pytest.raises(PahclError, match=r'cycles are \[B, 1, T\]'):
        build_encoder('sum_of_sounds')(windows())

class Windows:
    "Three windows of frames, as a task's."
    table = pd.DataFrame(dict(subject_id=['a', 'b', 'c'], label=[0, 1, 0]))
    x = torch.randn(3, 84, 64, generator=torch.Generator().manual_seed(0))
    def batch(self, rows):
        n = torch.tensor([64, 40, 9])[rows]
        phases = (1+torch.arange(64)//6 % 4)*(torch.arange(64) < n[:, None])
        return dict(x=self.x[rows]*(phases > 0)[:, None], phases=phases, valid_length=n)

def test_saliency_and_card_of_frames(tmp_path, monkeypatch):
    model = Classifier(logmel(), 2, hidden_dim=0).eval()
    found = _explain_cycles(model, Windows(), [0, 1, 2], [0, 1, 0], 256)
    assert found.shares.shape == (3, 64) and found.missing.max() < .05
    assert not found.shares[found.phases == 0].any()
    explained = _ExplainedSplit(Windows.table, ['normal', 'murmur'], found, True)
    monkeypatch.setattr('pahcl.studies.saliency._explain_split', lambda *a: explained)
    numbers, things = _saliency_report('c.pt', 'pascal', 'data', 'test', tmp_path)
    assert 'no curve' in things[-1] and not list(tmp_path.iterdir())
    assert all(sum(s) == pytest.approx(1) for s in numbers['states'].values())
    assert 'heart sounds in 84 channels with a classifier' in model.generate_model_card().content

def test_a_batch_norm_leaves_the_padding_out():
    e, x, n = logmel(norm='batch'), windows(), torch.tensor([64, 40, 9])
    rubbish = torch.cat([x, torch.full((3, 84, 16), 9.)], 2)
    for mode in (True, False):
        y, z = (copy.deepcopy(e).train(mode)(v, n) for v in (x, rubbish))
        torch.testing.assert_close(y, z)
    norm, x, inside = e.stem.norm.train(), torch.randn(3, 4, 5, 64), torch.arange(64) < n[:, None]
    valid = x.movedim(1, -1)[inside[:, None].expand(-1, 5, -1)]
    y = norm(x, inside).movedim(1, -1)[inside[:, None].expand(-1, 5, -1)]
    torch.testing.assert_close(y, (valid-valid.mean(0))/(valid.var(0, correction=0)+1e-5).sqrt())
