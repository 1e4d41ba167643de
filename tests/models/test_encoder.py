"Padding changes nothing, every key has an effect, folders load or say why not"
import copy, json, os, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from huggingface_hub import PyTorchModelHubMixin, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import pahcl.models.encoders as module
import pahcl.models.hub_folders as hub_folders
from pahcl.core.basics import PahclError
from pahcl.core.config_sections import ModelSection
from pahcl.models.pooling import _pool_phases
from pahcl.models.encoder_base import Encoder, ENCODERS, load_weights
from pahcl.models.encoders import build_encoder, _CNNMamba, _resolve_settings
from pahcl.models.hub import from_pretrained
from pahcl.models.convolutions import _ChannelAttention, _ConvLayer
from pahcl.models.heads import ClassifierHead, Projector
from pahcl.models.masked_layers import _Dropout, _DropPath, MaskedGroupNorm

pytestmark = pytest.mark.usefixtures('one_thread')

TINY = dict(cnn_channels=[4, 8], cnn_kernel_sizes=[7, 5], cnn_strides=[4, 2], mamba_d_model=8,
            mamba_n_layers=2, mamba_d_state=4, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=2,
            mamba_bidirectional=False, dropout=0.1, drop_path=0.0, channel_attention=False)
OTHER = dict(encoder_type='cnn', cnn_channels=[4, 16], cnn_kernel_sizes=[7, 9], cnn_strides=[4, 4],
             mamba_d_model=16, mamba_n_layers=1, mamba_d_state=5, mamba_d_conv=3, mamba_expand=3,
             mamba_dt_rank=1, mamba_bidirectional=True, dropout=0.5, drop_path=0.5,
             channel_attention=True)

def tiny(seed=0, **overrides):
    torch.manual_seed(seed)
    return build_encoder('cnn_mamba', **{**TINY, **overrides})

def cycles(B=3, T=400, seed=0):
    return torch.randn(B, 1, T, generator=torch.Generator().manual_seed(seed))

def number(model): return sum(p.numel() for p in model.parameters())

def test_sizes():
    assert {k: number(build_encoder(k)) for k in ('cnn_mamba', 'cnn_mamba_small', 'cnn')} == dict(
        cnn_mamba=1_904_768, cnn_mamba_small=182_304, cnn=151_680)
    e = build_encoder('cnn_mamba')
    assert ((e.out_dim, e.stride, e.frame_rate) == (256, 16, 312.5)
            and e.sequence(cycles(1, 4000)).shape == (1, 250, 256))

def test_names_are_those_of_the_original_checkpoints():
    names = set(build_encoder().state_dict())
    assert {f'cnn.layers.{i}.{k}' for i in range(4)
            for k in ('conv.weight', 'conv.bias', 'norm.weight', 'norm.bias')} < names
    ssm = ('A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight',
           'dt_proj.weight', 'dt_proj.bias', 'out_proj.weight')
    assert {f'mamba.layers.{i}.{k}' for i in range(4)
            for k in ('norm.weight', 'norm.bias', *(f'ssm.{s}' for s in ssm))} < names
    assert {n.split('.')[0] for n in names} == {'cnn', 'mamba'}
    assert set(build_encoder('cnn').state_dict()) == {n for n in names
                                                      if not n.startswith('mamba.layers')}

def test_every_key_of_the_configuration_is_tried():
    "tests/models/test_other_encoders.py tries `norm`, resnet34_1d's own, and `in_channels`"
    assert (OTHER.keys() | {'norm', 'in_channels'} == ModelSection.model_fields.keys()
            and OTHER.keys()-TINY.keys() == {'encoder_type'})

@pytest.mark.parametrize('key', OTHER)
def test_every_key_has_an_effect(key):
    def look(**changes):
        torch.manual_seed(0)
        e = build_encoder(ModelSection(**{**TINY, **changes}))
        return {k: v.shape for k, v in e.state_dict().items()}, e(cycles()), e.config
    (shapes, y, config), (other_shapes, z, other) = look(), look(**{key: OTHER[key]})
    assert y.shape != z.shape or not torch.allclose(y, z)
    assert config[key] != other[key] and other[key] == OTHER[key]
    assert (shapes != other_shapes) == (key not in ('dropout', 'drop_path', 'cnn_strides'))

def test_where_dropout_acts():
    e = tiny(dropout=0.4)
    rates = {n: m.p for n, m in e.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {n: 0.4 for n in ('cnn.layers.0.dropout', 'cnn.layers.1.dropout',
                                      'mamba.layers.0.dropout', 'mamba.layers.1.dropout')}
    x = cycles()
    assert not torch.equal(e(x), e(x)) and torch.equal(e.eval()(x), e(x))

def test_all_the_ways_to_say_the_same():
    torch.manual_seed(0)
    a = build_encoder(ModelSection(encoder_type='cnn_mamba_small', mamba_n_layers=1))
    torch.manual_seed(0)
    b = build_encoder(dict(encoder_type='cnn_mamba_small', mamba_d_state=None), mamba_n_layers=1,
                      dropout=None)
    torch.manual_seed(0); c = build_encoder(a.config)
    torch.manual_seed(0)
    d = build_encoder('cnn_mamba_small', mamba_n_layers=1, cnn_channels=(16, 32, 64, 96))
    for other in (b, c, d):
        assert other.config == a.config and all(torch.equal(v, other.state_dict()[k])
                                                for k, v in a.state_dict().items())
    assert json.loads(json.dumps(a.config)) == a.config
    assert (build_encoder(None).config == build_encoder({}).config == build_encoder().config
            == _resolve_settings('cnn_mamba'))
    assert build_encoder(a.config, encoder_type='cnn').config['encoder_type'] == 'cnn'

def test_presets_are_not_shared():
    e = build_encoder('cnn_mamba_small')
    e.config['cnn_channels'].append(1)
    assert (len(ENCODERS['cnn_mamba_small'].preset['cnn_channels'])
            == len(build_encoder('cnn_mamba_small').config['cnn_channels']) == 4)

def test_keys_that_do_not_apply_are_said(caplog):
    module.get_logger().propagate = True
    with caplog.at_level('INFO', 'pahcl'):
        e = build_encoder('cnn', mamba_n_layers=4, mamba_d_state=8)
    module.get_logger().propagate = False
    assert 'encoder cnn has no use for mamba_d_state, mamba_n_layers' in caplog.text
    assert 'mamba_n_layers' not in e.config

@pytest.mark.parametrize('given,message', [
    (dict(encoder_type='resnet18'),
     "unknown encoder_type 'resnet18'; the valid ones are cnn_mamba, cnn_mamba_small, cnn"),
    (dict(encoder_type='CNN'), 'the valid ones are'), (dict(encoder_type=3), 'encoder_type'),
    (dict(cnn_chanels=[1]), "unknown key 'cnn_chanels'; the nearest valid one is 'cnn_channels'"),
    (dict(cnn_channels=[8, 8]),
     r'cnn_channels \[8, 8\], .*cnn_strides \[2, 2, 2, 2\]: one number a layer'),
    (dict(cnn_channels=[], cnn_kernel_sizes=[], cnn_strides=[]), 'at least one layer'),
    (dict(cnn_strides=[2, 2, 0, 2]),
     r'cnn_strides \[2, 2, 0, 2\]: every number must be at least 1'),
    (dict(cnn_channels=[1, 2, 3, -4]), 'cnn_channels'),
    (dict(cnn_strides=2), 'cnn_strides'), (dict(cnn_channels=[1, 2, 3, 'x']), r'cnn_channels\.3'),
    (dict(mamba_d_model=0), 'mamba_d_model'),
    (dict(mamba_expand=1.5), 'mamba_expand'),
    (dict(dropout=1.0), 'dropout'), (dict(dropout='high'), 'dropout'),
    (dict(mamba_n_layers=-1), 'mamba_n_layers'), (dict(mamba_d_state=True), 'mamba_d_state')])
def test_mistakes_are_named(given, message):
    with pytest.raises(PahclError, match=message): build_encoder(given)
    with pytest.raises(PahclError, match=message): build_encoder({}, **given)

def test_wrong_inputs_are_named():
    e = tiny()
    for x in (cycles()[:, 0], cycles().repeat(1, 2, 1), cycles()[..., :0]):
        with pytest.raises(PahclError, match=r'cycles are \[B, 1, T\]'): e(x)
    with pytest.raises(PahclError, match=r'for 3 cycles it is \[3\]'):
        e(cycles(), torch.tensor([1, 2]))

STACKS = st.lists(st.tuples(st.sampled_from([1, 3, 8]), st.integers(1, 8), st.integers(1, 5)),
                  min_size=1, max_size=3)

@settings(max_examples=25, deadline=None)
@given(STACKS, st.integers(1, 250), st.integers(0, 60), st.integers(0, 60), st.booleans(),
       st.booleans(), st.integers(0, 1000))
def test_padding_changes_nothing(layers, n, more, still_more, training, attention, seed):
    channels, kernels, strides = (list(v) for v in zip(*layers))
    e = tiny(seed, cnn_channels=channels, cnn_kernel_sizes=kernels, cnn_strides=strides,
             dropout=0.0, mamba_n_layers=1, channel_attention=attention).double().train(training)
    for p in e.parameters(): torch.nn.init.normal_(p, 0, 0.5)
    x = torch.randn(2, 1, n+more+still_more, dtype=torch.float64)
    length = torch.full((2,), n)
    with torch.no_grad():
        alone, some, most = e(x[..., :n]), e(x[..., :n+more], length), e(x, length)
        a, b = e.sequence(x[..., :n]), e.sequence(x, length)
        x[..., n:] = float('nan')
        rubbish = e(x, length)
    torch.testing.assert_close(some, alone)
    torch.testing.assert_close(most, alone)
    assert torch.equal(rubbish, most)
    torch.testing.assert_close(b[:, :a.shape[1]], a)
    assert b[:, a.shape[1]:].abs().sum() == 0 and a.shape[1] == -(-n//e.stride)

@pytest.mark.parametrize('name', ['cnn_mamba', 'cnn_mamba_small', 'cnn'])
@pytest.mark.parametrize('training', [True, False])
def test_padding_changes_nothing_in_the_presets(name, training):
    torch.manual_seed(1)
    e, x, n = (build_encoder(name, dropout=0.0).train(training), cycles(2, 4000),
               torch.full((2,), 2600))
    with torch.no_grad(): assert (e(x, n)-e(x[..., :3000], n)).abs().max() < 1e-5

def test_gradients_ignore_padding_and_reach_every_parameter():
    e, x, n = tiny(), cycles(3, 400).requires_grad_(), torch.tensor([400, 250, 33])
    e(x, n).square().sum().backward()
    for g, length in zip(x.grad[:, 0], n):
        assert g[length:].abs().sum() == 0 and (g[:length] != 0).float().mean() > 0.9
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0
               for p in e.parameters())

def test_a_cycle_does_not_depend_on_its_neighbours():
    e, x, n = tiny(dropout=0.0), cycles(5, 400), torch.tensor([400, 250, 33, 399, 8])
    with torch.no_grad():
        together, apart = e(x, n), torch.cat([e(x[i:i+1], n[i:i+1]) for i in range(5)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)

def test_training_mode_moves_nothing_but_by_gradients():
    e = tiny()
    before = copy.deepcopy(e.state_dict())
    for _ in range(3): e.train()(cycles(), torch.tensor([100, 200, 300]))
    assert (all(torch.equal(v, before[k]) for k, v in e.state_dict().items())
            and not list(e.buffers()))

def test_empty_and_silent_cycles():
    e, n = tiny().eval(), torch.tensor([0, 20, 400])
    with torch.no_grad(): y, silent = e(cycles(), n), e(torch.zeros(3, 1, 400), n)
    assert (y.isfinite().all() and silent.isfinite().all() and y[0].abs().sum() == 0
            and y[1].abs().sum() > 0)

@settings(max_examples=50, deadline=None)
@given(STACKS, st.integers(1, 300), st.data())
def test_frame_mask_is_overlap(layers, T, data):
    e = tiny(cnn_channels=[v[0] for v in layers], cnn_kernel_sizes=[v[1] for v in layers],
             cnn_strides=[v[2] for v in layers])
    n = data.draw(st.integers(0, T))
    mask = e.frame_mask(torch.tensor([n]), T)[0]
    frames = range(0, T, e.stride)
    assert mask.tolist() == [any(t < n for t in range(start, min(start+e.stride, T)))
                             for start in frames]
    if T < 60: assert e.sequence(torch.randn(1, 1, T)).shape[1] == len(frames)

@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 6, 8, 24, 32]), st.integers(2, 40), st.integers(0, 1000), st.data())
def test_valid_group_norm_is_group_norm_of_the_valid_part(channels, T, seed, data):
    torch.manual_seed(seed)
    norm, x = (MaskedGroupNorm(channels).double(),
               3+2*torch.randn(2, channels, T, dtype=torch.float64))
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    n = data.draw(st.integers(2, T))
    mask = (torch.arange(T) < n).expand(2, T)
    torch.testing.assert_close(norm(x, mask)[..., :n], torch.nn.functional.group_norm(
        x[..., :n], norm.num_groups, norm.weight, norm.bias, norm.eps))
    assert channels % norm.num_groups == 0

def test_conv_layer_is_centred():
    for kernel in (1, 3, 7):
        layer = _ConvLayer(1, 1, kernel, 1)
        torch.nn.init.zeros_(layer.conv.weight), torch.nn.init.zeros_(layer.conv.bias)
        layer.conv.weight.data[0, 0, kernel//2] = 1
        x = cycles(1, 20)
        assert torch.equal(layer.conv(x)[..., :20], x)

@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.01, 0.1, 0.3, 0.75]), st.integers(0, 1000))
def test_dropout_is_unbiased(p, seed):
    torch.manual_seed(seed)
    y = _Dropout(p)(torch.ones(40000))
    assert (abs(float((y == 0).float().mean())-p) < 5*(p*(1-p)/40000)**0.5
            and abs(float(y.max())*(1-p)-1) < 1e-4)
    torch.manual_seed(seed)
    x = torch.ones(40000, requires_grad=True)
    _Dropout(p)(x).sum().backward()
    assert torch.equal(x.grad, y) and _Dropout(p)(x.bfloat16()).dtype == torch.bfloat16

def test_drop_path_drops_whole_cycles_and_is_unbiased():
    torch.manual_seed(0)
    x = torch.randn(20000, 2, 3, requires_grad=True)
    y = _DropPath(0.3)(x)
    kept = (y != 0).flatten(1).all(1)
    assert abs(float(kept.float().mean())-0.7) < 5*(0.3*0.7/20000)**0.5
    torch.testing.assert_close(y[kept], x[kept]/0.7)
    assert not y[~kept].abs().sum()
    y.sum().backward()
    torch.testing.assert_close(x.grad, (kept/0.7)[:, None, None].expand_as(x))
    half = _DropPath(0.3)(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(_DropPath(0.3).eval()(x), x)

def test_drop_path_grows_with_depth_and_a_dropped_layer_is_skipped():
    e, x = tiny(drop_path=0.6, mamba_n_layers=3, dropout=0.0), cycles(64)
    assert [l.drop_path.p for l in e.mamba.layers] == pytest.approx([0.2, 0.4, 0.6])
    layer, y = e.mamba.layers[2], torch.randn(64, 5, 8)
    out, whole = layer(y), layer.eval()(y)
    same = (out == y).flatten(1).all(1)
    assert 20 < same.sum() < 55
    torch.testing.assert_close(out[~same], (y+(whole-y)/0.4)[~same])
    assert not torch.equal(e.train()(x), e(x)) and torch.equal(e.eval()(x), e(x))

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(1, 20), st.integers(0, 100))
def test_channel_attention_is_as_published(C, n, seed):
    """Against the paper's formula, written out: a convolution over the channels' means, whose
    length is an odd number near log2(C) / 2 + 1 / 2.
    """
    torch.manual_seed(seed)
    a, x = _ChannelAttention(C).double(), torch.randn(2, C, 25, dtype=torch.float64)
    w = a.conv.weight.detach().flatten().numpy()
    assert len(w) % 2 and abs(len(w)-(np.log2(C)+1)/2) <= 1
    mean = x[..., :n].mean(-1).numpy()
    gate = np.stack([np.correlate(np.pad(m, len(w)//2), w, 'valid') for m in mean])
    expected = x[..., :n].numpy()/(1+np.exp(-gate))[..., None]
    with torch.no_grad():
        np.testing.assert_allclose(a(x, (torch.arange(25) < n).expand(2, 25))[..., :n].numpy(),
                                   expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(a(x[..., :n]).numpy(), expected, rtol=1e-9, atol=1e-12)

def test_keys_that_are_off_leave_no_trace():
    "Checkpoints written before there were these keys load, and mean what they meant."
    torch.manual_seed(0); e = build_encoder()
    torch.manual_seed(0)
    old = build_encoder({k: v for k, v in e.config.items()
                         if k not in ('drop_path', 'channel_attention')})
    assert (old.config == e.config and list(old.state_dict()) == list(e.state_dict())
            and not any('attention' in k for k in e.state_dict()))
    with_it = build_encoder(channel_attention=True)
    assert set(with_it.state_dict())-set(e.state_dict()) == {f'cnn.layers.{i}.attention.conv.weight'
                                                             for i in range(4)}

@pytest.mark.parametrize('head', [Projector(8, 16, 4), ClassifierHead(8, 16, 3, 0.0),
                                  ClassifierHead(8, 0, 3, 0.0)])
def test_heads_are_float32_under_autocast(head):
    x = torch.randn(5, 8)
    with torch.autocast('cpu', torch.bfloat16): half = head(x)
    assert half.dtype == torch.float32 and torch.equal(half, head(x))
    assert head(x.bfloat16()).dtype == torch.float32
    assert head.double()(x.double()).dtype == torch.float64
    head.float()

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 16), st.integers(1, 200), st.integers(0, 1000))
def test_phase_pool_is_a_weighted_mean(K, stride, T, seed):
    g = torch.Generator().manual_seed(seed)
    L = -(-T//stride)
    sequence = torch.randn(2, L, 3, generator=g, dtype=torch.float64)
    masks = torch.rand(2, K, T, generator=g) < torch.rand(2, K, 1, generator=g)-0.3
    features, present = _pool_phases(sequence, masks, stride)
    for b in range(2):
        for k in range(K):
            valid = masks[b, k].nonzero()[:, 0]
            assert bool(present[b, k]) == bool(len(valid))
            expected = (sequence[b, valid//stride].mean(0) if len(valid)
                        else torch.zeros(3, dtype=torch.float64))
            torch.testing.assert_close(features[b, k], expected)
    if -(-T//L) == stride: assert torch.equal(_pool_phases(sequence, masks)[0], features)

def test_phase_pool_of_all_valid_frames_is_pool_and_errors():
    e, x, n = tiny().eval(), cycles(3, 400), torch.tensor([400, 248, 64])
    s = e.sequence(x, n)
    whole = _pool_phases(s, (torch.arange(400) < n[:, None])[:, None])[0][:, 0]
    torch.testing.assert_close(whole, e.pool(s, e.frame_mask(n, 400)))
    torch.testing.assert_close(whole, e(x, n))
    for T in (100, 2000):
        with pytest.raises(PahclError, match='50 frames of 8 samples do not cover masks'):
            _pool_phases(s, torch.ones(3, 1, T, dtype=torch.bool), 8)

def test_heads():
    x = torch.randn(5, 8)
    assert (ClassifierHead(8, 16, 3, 0.5)(x).shape == (5, 3)
            and number(ClassifierHead(8, 0, 3, 0.5)) == 27)
    linear = ClassifierHead(8, 0, 3, 0.5).eval()
    torch.testing.assert_close(linear(x), x@linear[-1].weight.T+linear[-1].bias)
    projector = Projector(8, 16, 4)
    assert projector(x[None].expand(2, 5, 8)).shape == (2, 5, 4)
    torch.testing.assert_close(projector(x)[2:3], projector(x[2:3]))  # no statistics over the batch

def test_half_precision():
    e, x, n = tiny().eval(), cycles(), torch.tensor([400, 200, 50])
    with torch.no_grad():
        full = e(x, n)
        with torch.autocast('cpu', torch.bfloat16): half = e(x, n)
    assert (half.isfinite().all()
            and torch.nn.functional.cosine_similarity(half.float(), full).min() > 0.995)

@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path/'encoder')
    return tmp_path/'encoder'

@pytest.mark.parametrize('overrides', [dict(TINY), dict(TINY, mamba_d_model=12),
                                       dict(encoder_type='cnn_mamba_small'),
                                       dict(encoder_type='cnn', cnn_channels=[8, 8, 8, 8])])
def test_round_trip(tmp_path, overrides):
    torch.manual_seed(3)
    e, x, n = build_encoder(overrides).eval(), cycles(), torch.tensor([400, 200, 50])
    e.save_pretrained(tmp_path/'a'/'b')
    assert sorted(p.name for p in (tmp_path/'a'/'b').iterdir()) == ['README.md', 'config.json',
                                                                    'model.safetensors']
    again = from_pretrained(str(tmp_path/'a'/'b'))
    assert again.config == e.config and not again.training and type(again) is type(e)
    with torch.no_grad():
        assert (torch.equal(again(x, n), e(x, n))
                and torch.equal(Encoder.from_pretrained(tmp_path/'a'/'b')(x), e(x)))
    e.save_pretrained(tmp_path/'a'/'b')  # again over it

def edit(folder, **changes):
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps({**config, **changes}))

@pytest.mark.parametrize('break_it,message', [
    (lambda f: (f/'config.json').unlink(), 'model configuration not found'),
    (lambda f: (f/'config.json').write_text('{'), 'not valid JSON'),
    (lambda f: (f/'config.json').write_text('[]'), 'holds no mapping of names'),
    (lambda f: (f/'config.json').write_text('{"model_type": "bert"}'), 'has no encoder_type'),
    (lambda f: edit(f, encoder_type='sincnext'),
     r"config.json: encoder: unknown encoder_type 'sincnext'; the valid ones are"),
    (lambda f: edit(f, layers=3), "config.json: encoder: unknown key 'layers'"),
    (lambda f: edit(f, mamba_n_layers=3),
     'model.safetensors does not fit the encoder .*11 missing: mamba.layers.2.norm.bias'),
    (lambda f: edit(f, encoder_type='cnn'), '22 superfluous: mamba.layers.0.norm.bias'),
    (lambda f: edit(f, mamba_d_state=8), 'misshapen: mamba.layers.0.ssm.A_log'),
    (lambda f: (f/'model.safetensors').unlink(), 'model weights not found'),
    (lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:-100]),
     'not a readable safetensors file'),
    (lambda f: (f/'model.safetensors').write_bytes(b'rubbish'), 'not a readable safetensors file'),
    (lambda f: (f/'model.safetensors').write_bytes(b''), 'not a readable safetensors file')])
def test_broken_folders_are_named(folder, break_it, message):
    break_it(folder)
    with pytest.raises(PahclError, match=message): from_pretrained(folder)

def test_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_folders, 'snapshot_download',
                        lambda *a, **k: pytest.fail('the Hub was asked'))
    (tmp_path/'outputs').mkdir()
    for name in (tmp_path/'none', 'none', './none', 'outputs/none', 'a/b/c'):
        with pytest.raises(PahclError, match='model folder not found'): from_pretrained(name)

def test_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub_folders, 'snapshot_download', lambda name, allow_patterns:
                        asked.append((name, allow_patterns)) or str(folder))
    assert from_pretrained('owner/name').config == from_pretrained(folder).config
    assert asked == [('owner/name', ['config.json', '*.safetensors'])]
    def offline(*a, **k): raise OSError('no network')
    monkeypatch.setattr(hub_folders, 'snapshot_download', offline)
    with pytest.raises(PahclError,
                       match='owner/name is no folder here, and the Hub did not give it'):
        from_pretrained('owner/name')

def test_the_hubs_own_loader_reads_our_folder_and_we_read_its(folder, tmp_path):
    "config.json and model.safetensors mean to `PyTorchModelHubMixin` what they mean to us."
    assert {p.name for p in folder.iterdir()} == {
        constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, constants.REPOCARD_NAME}
    with safe_open(folder/'model.safetensors', 'pt') as f:
        assert set(f.metadata()) == {'check_sums'}   # one entry, so the same bytes each time
    # the Hub's own methods, not those that `_HubModel` puts in their place
    load, save = PyTorchModelHubMixin.from_pretrained.__func__, PyTorchModelHubMixin.save_pretrained
    ours, theirs = from_pretrained(folder), load(_CNNMamba, folder, strict=True,
                                                 local_files_only=True)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(cycles()), ours(cycles())) and theirs.config == ours.config
    save(theirs, tmp_path/'theirs')
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path/'theirs')(cycles()), ours(cycles()))

def test_a_repository_that_was_fetched_once_loads_offline(folder, tmp_path):
    "From the Hub's cache, laid out as huggingface_hub does it, without a network."
    cache = tmp_path/'hub'/'models--owner--name'
    (cache/'refs').mkdir(parents=True), (cache/'snapshots').mkdir()
    (cache/'refs'/'main').write_text('0'*40)
    folder.rename(cache/'snapshots'/('0'*40))
    code = "from pahcl.encoder import from_pretrained; print(from_pretrained('owner/name').out_dim)"
    run = lambda **env: subprocess.run([sys.executable, '-c', code], env=dict(
        os.environ, HF_HUB_OFFLINE='1', PYTHONPATH=os.pathsep.join(sys.path), **env),
                                       capture_output=True, text=True, cwd=tmp_path)
    assert run(HF_HOME=str(tmp_path)).stdout == '8\n'
    (tmp_path/'empty').mkdir()
    assert 'owner/name is no folder here, and the Hub did not give it' in run(
        HF_HOME=str(tmp_path/'empty')).stderr

def test_a_misfit_changes_nothing(folder):
    e, state = tiny(seed=9), load_file(folder/'model.safetensors')
    before = copy.deepcopy(e.state_dict())
    del state['mamba.norm.bias']
    with pytest.raises(PahclError,
                       match='here does not fit the encoder .1 missing: mamba.norm.bias'):
        load_weights(e, state, 'here')
    assert all(torch.equal(v, before[k]) for k, v in e.state_dict().items())
    save_file(state, folder/'model.safetensors')
    with pytest.raises(PahclError, match='1 missing'): from_pretrained(folder)

def test_it_learns():
    """Two kinds of made cycles, with a murmur and without: told apart after a few steps, whatever
    their length.
    """
    rng, T = np.random.default_rng(0), 400
    def batch(B):
        n, label, t = rng.integers(200, T+1, B), rng.integers(0, 2, B), np.arange(T)
        x = (rng.standard_normal((B, T))*0.3+np.sin(0.05*t)
             +label[:, None]*0.7*np.sin(0.5*t+rng.uniform(0, 6, (B, 1))))
        return (torch.tensor(x*(t < n[:, None]), dtype=torch.float32)[:, None], torch.tensor(n),
                torch.tensor(label))
    e = tiny(0, dropout=0.0, mamba_n_layers=1)
    head = ClassifierHead(e.out_dim, 0, 2, 0.0)
    optimiser = torch.optim.Adam([*e.parameters(), *head.parameters()], 1e-2)
    for _ in range(25):
        x, n, y = batch(32)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(e(x, n)), y).backward()
        optimiser.step()
    x, n, y = batch(100)
    with torch.no_grad(): assert (head(e.eval()(x, n)).argmax(1) == y).float().mean() > 0.95
