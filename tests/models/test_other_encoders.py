"""Every encoder of the factory keeps the same promises: padding changes nothing, cycles do not see
each other, sequences and phases fit
"""
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError
from pahcl.models.classifier import Classifier
from pahcl.models.pooling import _pool_phases
from pahcl.models.encoder_base import Encoder, ENCODERS, load_weights
from pahcl.models.encoders import build_encoder
from pahcl.models.hub import from_pretrained
from pahcl.models.sequence_layers import _reverse_valid
from pahcl.models.encoders import _CNNLSTM, _CNNTransformer, _ResNet34, _SincNeXt
from pahcl.models.logmel_cnn import _LogMelCNN
from pahcl.models.pooling import AttentiveStatisticsPooling
from pahcl.models.sinc_filters import SincConv

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(
    cnn_transformer=dict(cnn_channels=[4, 8], cnn_kernel_sizes=[7, 5], cnn_strides=[4, 2],
                         mamba_d_model=12, mamba_n_layers=2, mamba_expand=2),
    cnn_lstm=dict(cnn_channels=[4, 8], cnn_kernel_sizes=[7, 5], cnn_strides=[4, 2], mamba_d_model=9,
                  mamba_n_layers=2),
    resnet34_1d=dict(cnn_channels=[4, 8], cnn_kernel_sizes=[3, 5], cnn_strides=[1, 2]),
    sincnext_bm=dict(cnn_channels=[5, 8], cnn_kernel_sizes=[101, 5], cnn_strides=[4, 2],
                     mamba_d_model=8, mamba_n_layers=1, mamba_d_state=4),
    cnn_mamba=dict(cnn_channels=[4, 8], cnn_kernel_sizes=[7, 5], cnn_strides=[4, 2],
                   mamba_d_model=8, mamba_n_layers=2, mamba_d_state=4, mamba_bidirectional=True),
    logmel_cnn=dict(in_channels=84, cnn_channels=[4, 8, 8], cnn_kernel_sizes=[3, 3, 5],
                    cnn_strides=[2, 3, 1], state_dropout=0.0))

def small(name, seed=0, channels=None, **overrides):
    torch.manual_seed(seed)
    settings = {**SMALL[name], 'dropout': 0.0, **overrides}
    return build_encoder(name, **settings | ({'in_channels': channels} if channels else {}))

every = pytest.mark.parametrize('name, channels', [
    (n, c) for n in SMALL for c in (1, 84) if (n, c) != ('logmel_cnn', 1)])

def test_the_factory_knows_them():
    others = dict(cnn_transformer=_CNNTransformer, cnn_lstm=_CNNLSTM, resnet34_1d=_ResNet34,
                  sincnext_bm=_SincNeXt, logmel_cnn=_LogMelCNN)
    assert list(ENCODERS) == ['cnn_mamba', 'cnn_mamba_small', 'cnn', *others]
    for name, kind in others.items():
        assert isinstance(build_encoder(name), kind) and issubclass(kind, Encoder)

@every
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 250), st.integers(0, 60), st.integers(0, 60), st.booleans(),
       st.integers(0, 1000))
def test_padding_changes_nothing(name, channels, n, more, still_more, training, seed):
    e = small(name, seed, channels).double().train(training)
    x = torch.randn(2, channels, n+more+still_more, dtype=torch.float64)
    length = torch.full((2,), n)
    with torch.no_grad():
        alone, some, most = e(x[..., :n]), e(x[..., :n+more], length), e(x, length)
        a, b = e.sequence(x[..., :n]), e.sequence(x, length)
        x[..., n:] = float('nan')
        rubbish = e(x, length)
    torch.testing.assert_close(some, alone)
    torch.testing.assert_close(most, alone)
    torch.testing.assert_close(rubbish, most)
    torch.testing.assert_close(b[:, :a.shape[1]], a)
    assert (b[:, a.shape[1]:].abs().sum() == 0 and a.shape[1] == -(-n//e.stride)
            and b.shape[1] == -(-x.shape[-1]//e.stride))

@pytest.mark.parametrize('name', list(ENCODERS))
def test_padding_changes_nothing_in_the_presets(name):
    torch.manual_seed(1)
    e = build_encoder(name, dropout=0.0)
    T, more, n = (4000, 2999, 2600) if e.in_channels == 1 else (256, 200, 165)
    x, length = torch.randn(2, e.in_channels, T), torch.full((2,), n)
    with torch.no_grad():
        y = e(x, length)
        torch.testing.assert_close(y, e(x[..., :more], length), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(y, e(x[..., :n]), atol=1e-4, rtol=1e-4)
    assert (y.shape == (2, e.out_dim) and e.frame_rate == 5000/e.stride
            and y[0].sub(y[1]).abs().max() > 1e-3)

@every
def test_a_cycle_does_not_depend_on_its_neighbours_or_on_what_was_seen(name, channels):
    e, x = small(name, channels=channels).train(), torch.randn(5, channels, 400)
    n = torch.tensor([400, 250, 33, 399, 0])
    before = copy.deepcopy(e.state_dict())
    together, apart = e(x, n), torch.cat([e(x[i:i+1], n[i:i+1]) for i in range(5)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert together.isfinite().all() and together[4].abs().sum() == 0
    assert all(torch.equal(v, before[k]) for k, v in e.state_dict().items())

@every
def test_gradients_ignore_padding_and_reach_every_parameter(name, channels):
    e, n = small(name, channels=channels), torch.tensor([400, 250, 35])
    x = torch.randn(3, channels, 400, requires_grad=True)
    e(x, n).square().sum().backward()
    for g, length in zip(x.grad[:, 0], n):
        assert g[length:].abs().sum() == 0 and (g[:length] != 0).float().mean() > 0.8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in e.parameters())
    silent = [k for k, p in e.named_parameters() if not p.grad.abs().sum()]
    assert not silent, silent

@every
def test_round_trip_phases_and_half_precision(name, channels, tmp_path):
    e, x = small(name, channels=channels).eval(), torch.randn(3, channels, 400)
    n = torch.tensor([400, 250, 33])
    e.save_pretrained(tmp_path/'e')
    again = from_pretrained(tmp_path/'e')
    with torch.no_grad():
        y, sequence = e(x, n), e.sequence(x, n)
        assert (torch.equal(again(x, n), y) and again.config == e.config
                and build_encoder(e.config).config == e.config)
        masks = (torch.arange(400) < n[:, None])[:, None] & (
            torch.arange(400)//100 == torch.arange(4)[:, None])
        features, present = _pool_phases(sequence, masks, e.stride)
        assert features.shape == (3, 4, e.frame_dim) and present.tolist() == [
            [True]*4, [True, True, True, False], [True, False, False, False]]
        with torch.autocast('cpu', torch.bfloat16): half = e(x, n)
    assert torch.nn.functional.cosine_similarity(half.float(), y).min() > 0.98

USED = dict(cnn_transformer={'cnn_channels', 'cnn_kernel_sizes', 'cnn_strides', 'mamba_d_model',
                             'mamba_n_layers', 'mamba_expand', 'dropout', 'channel_attention'},
            cnn_lstm={'cnn_channels', 'cnn_kernel_sizes', 'cnn_strides', 'mamba_d_model',
                      'mamba_n_layers', 'dropout', 'channel_attention'},
            resnet34_1d={'cnn_channels', 'cnn_kernel_sizes', 'cnn_strides', 'dropout', 'norm'},
            sincnext_bm={'cnn_channels', 'cnn_kernel_sizes', 'cnn_strides', 'mamba_d_model',
                         'mamba_n_layers', 'mamba_d_state', 'mamba_d_conv', 'mamba_expand',
                         'mamba_dt_rank', 'mamba_bidirectional', 'dropout', 'drop_path'},
            logmel_cnn={'cnn_channels', 'cnn_kernel_sizes', 'cnn_strides', 'dropout', 'mel_planes',
                        'mel_bands', 'state_dropout', 'norm'})
USED = {name: keys | {'in_channels'} for name, keys in USED.items()}
OTHER = dict(cnn_channels=[4, 16], cnn_kernel_sizes=[9, 7], cnn_strides=[2, 4], mamba_d_model=16,
             mamba_n_layers=3, mamba_d_state=5, mamba_d_conv=3, mamba_expand=3,
             mamba_dt_rank=4, mamba_bidirectional=False, dropout=0.5, drop_path=0.5,
             channel_attention=True, norm='affine', in_channels=83, mel_planes=1, mel_bands=30,
             state_dropout=0.9)

@pytest.mark.parametrize('name,key', [(n, k) for n, keys in USED.items() for k in sorted(keys)])
def test_every_key_has_an_effect(name, key):
    x = torch.randn(2, 84, 400, generator=torch.Generator().manual_seed(0))
    other = OTHER[key]+[5]*(name == 'logmel_cnn') if key.startswith('cnn_') else OTHER[key]
    a, b = small(name), small(name, **{key: other})
    torch.manual_seed(1); y = a(x[:, :a.in_channels])
    torch.manual_seed(1); z = b(x[:, :b.in_channels])
    assert USED[name] == ENCODERS[name].preset.keys() and b.config[key] == other
    assert y.shape != z.shape or not torch.allclose(y, z)

@settings(max_examples=25, deadline=None)
@given(st.sampled_from([63, 101, 251, 400, 401, 801]), st.floats(0, 40), st.floats(0, 10),
       st.integers(0, 1000))
def test_sinc_filters_are_where_they_say(kernel_size, low, band, seed):
    torch.manual_seed(seed)
    sinc = SincConv(20, kernel_size)
    torch.nn.init.normal_(sinc.low, 0, low+0.01), torch.nn.init.normal_(sinc.band, 0, band+0.01)
    first, last = (e.detach().double()[:, None] for e in sinc.edges())
    assert (first > 0).all() and (last > first).all() and (last <= 2500).all()
    hz = torch.fft.rfftfreq(2**14, 1/5000, dtype=torch.float64)
    energy = torch.fft.rfft(sinc.filters().detach().double(), 2**14).abs().square()
    inside = (energy*((hz >= first) & (hz <= last))).sum(1)/energy.sum(1)
    assert inside.min() >= 0.9
    middle = torch.stack([e[(hz-(a+b)/2).abs().argmin()] for e, a, b in zip(energy, first, last)])
    assert ((middle.sqrt()-1).abs() < 0.2).all()

def test_sinc_bands_cover_heart_sounds():
    low, high = build_encoder('sincnext_bm').sinc_conv.edges()
    assert (low.min() < 25 and high.max() > 450
            and (low.sort().values[1:] < high.sort().values[:-1]).all())

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.data())
def test_reverse_turns_the_valid_frames(B, L, data):
    length = torch.tensor(data.draw(st.lists(st.integers(0, L), min_size=B, max_size=B)))
    x = torch.randn(B, L, 2)
    y = _reverse_valid(x, length)
    for a, b, n in zip(x, y, length):
        assert torch.equal(b[:n], a[:n].flip(0)) and torch.equal(b[n:], a[n:])
    assert torch.equal(_reverse_valid(y, length),
                       x) and torch.equal(_reverse_valid(x), _reverse_valid(x, torch.full((B,), L)))

def test_bidirectional_layers_see_the_future_and_others_do_not():
    for both in (True, False):
        e, x = small('cnn_mamba', mamba_bidirectional=both, cnn_channels=[8], cnn_kernel_sizes=[1],
                     cnn_strides=[1], mamba_d_model=8), torch.randn(1, 1, 50, requires_grad=True)
        e.cnn.layers[0].norm = torch.nn.Module()
        e.cnn.layers[0].norm.forward = lambda x, mask=None: x
        e.sequence(x)[0, 20].square().sum().backward()
        assert (x.grad[0, 0, 21:].abs().sum() > 0) == both and (x.grad[0, 0, :21] != 0).all()

def test_attentive_statistics_of_equal_frames():
    torch.manual_seed(0)
    a = AttentiveStatisticsPooling(4)
    x = torch.randn(1, 1, 4).expand(1, 9, 4)
    torch.testing.assert_close(a(x),
                               a.out(torch.cat([x[:, 0], torch.full((1, 4), 1e-5).sqrt()], -1)))

def test_resnet_has_its_34_layers():
    e = build_encoder('resnet34_1d')
    # and a head
    assert (isinstance(e, _ResNet34)
            and sum(isinstance(m, torch.nn.Conv1d) for k, m in e.named_modules()
                    if 'around' not in k) == 33 and e.out_dim == 512)

def test_sizes_of_two_kinds_are_named():
    with pytest.raises(PahclError, match='one number a layer'):
        build_encoder('sincnext_bm', cnn_strides=[4, 2])

@pytest.mark.parametrize('name,old', [('cnn_transformer', 'mamba'), ('cnn_lstm', 'mamba')])
def test_weights_under_their_older_name_still_load(name, old):
    """`_CNNTransformer.mamba` held a Transformer: checkpoints of that time load, alone, within a
    classifier, and on a model that is half old.
    """
    e, now = small(name, 1), name.removeprefix('cnn_')
    before = {k.replace(f'{now}.', f'{old}.', 1): v.clone() for k, v in e.state_dict().items()}
    assert any(k.startswith('mamba.layers.' if now == 'transformer' else 'mamba.onward.')
               for k in before) and before.keys() != e.state_dict().keys()
    x, again, third = torch.randn(2, 1, 400), small(name, 2), small(name, 3)
    load_weights(again, before)
    kept = dict(before)
    third.load_state_dict(before)
    assert torch.equal(again(x), e(x)) and torch.equal(third(x),
                                                       e(x)) and before.keys() == kept.keys()
    model, other = Classifier(e, 2).eval(), Classifier(small(name, 4), 2).eval()
    inside = {k.replace(f'encoder.{now}.', f'encoder.{old}.', 1): v.clone()
              for k, v in model.state_dict().items()}
    load_weights(other, inside)
    assert torch.equal(other(x), model(x))
    other.load_state_dict({k: v*0 for k, v in inside.items()})
    assert other(x).abs().sum() == 0
    with pytest.raises(PahclError, match='1 missing: '):
        load_weights(again, {k: v for k, v in before.items() if not k.startswith(f'{old}.norm.w') })
    with pytest.raises(PahclError, match=f'superfluous: {old}'):
        load_weights(again, {**e.state_dict(), f'{old}.norm.weight': before[f'{old}.norm.weight']})
