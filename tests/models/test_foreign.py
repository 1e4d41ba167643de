"Checkpoints of the original project load, and nothing in any file is run"
import collections, io, os, pickle, subprocess, sys, types, zipfile
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError
from pahcl.models.pretrained import describe_loading, load_pretrained_encoder
from pahcl.models.encoders import build_encoder
from pahcl.models.foreign_checkpoints import (
    _CarefulUnpickler, _convert_checkpoint, _InertObject, _infer_encoder_config,
    read_foreign_checkpoint, _to_plain_types)

class Omega:
    """Modules and classes with OmegaConf's names and state, there while a file is written and gone
    when it is read.
    """
    def __enter__(self):
        self.modules = {n: types.ModuleType(n)
                        for n in ('omegaconf', 'omegaconf.dictconfig', 'omegaconf.listconfig',
                                  'omegaconf.nodes', 'omegaconf.base')}
        for module, name in [('dictconfig', 'DictConfig'), ('listconfig', 'ListConfig'),
                             ('nodes', 'AnyNode'), ('base', 'ContainerMetadata')]:
            setattr(self.modules[f'omegaconf.{module}'], name,
                    type(name, (), {'__module__': f'omegaconf.{module}'}))
        sys.modules.update(self.modules)
        return self
    def __exit__(self, *_):
        for n in self.modules: del sys.modules[n]
    def make(self, value, parent=None):
        kind = ('dictconfig', 'DictConfig') if isinstance(value, dict) else (
            'listconfig', 'ListConfig') if isinstance(value, list) else ('nodes', 'AnyNode')
        node = getattr(self.modules[f'omegaconf.{kind[0]}'], kind[1])()
        meta = self.modules['omegaconf.base'].ContainerMetadata()
        meta.__dict__.update(object_type=dict, ref_type=int, key=None)
        node.__dict__.update(_metadata=meta, _parent=parent, _flags_cache=None)
        if isinstance(value, dict):
            node._content = {k: self.make(v, node) for k, v in value.items()}
        elif isinstance(value, list): node._content = [self.make(v, node) for v in value]
        else: node._val = value
        return node

CONFIG = dict(model=dict(encoder_type='cnn_mamba', cnn_strides=[2, 2, 2, 2], mamba_d_model=256),
              training=dict(batch_size=64, learning_rate=2e-3), name=None)

def original(moco=False, **overrides):
    "An encoder as the original project has it, and its checkpoint's `model_state_dict`."
    torch.manual_seed(0)
    e = build_encoder('cnn_mamba', mamba_dt_rank=1, **overrides)
    state = collections.OrderedDict((f'encoder.{k}', v) for k, v in e.state_dict().items())
    state |= {'cycle_projector.net.0.weight': torch.zeros(512, 256),
              'substructure_projector.net.0.weight': torch.zeros(256, 256)}
    if moco:
        state |= {k.replace('encoder.', 'encoder_momentum.', 1): v+1 for k, v in state.items()
                  if k.startswith('encoder.')}
        state |= {'cycle_projector_momentum.net.0.weight': torch.zeros(512, 256),
                  'substructure_projector_momentum.net.0.weight': torch.zeros(256, 256),
                  'queue': torch.randn(128, 8192), 'queue_ptr': torch.zeros(1, dtype=torch.long)}
    return e.eval(), state

@pytest.mark.parametrize('moco', [False, True])
@pytest.mark.parametrize('legacy', [False, True])
def test_checkpoints_of_the_original_project(tmp_path, moco, legacy):
    e, state = original(moco)
    assert (state['encoder.mamba.layers.0.ssm.x_proj.weight'].shape == (33, 512)
            and state['encoder.mamba.layers.0.ssm.dt_proj.weight'].shape == (512, 1))
    path, content = tmp_path/'best_model.pt', dict(
        epoch=99, global_step=torch.tensor(7), model_state_dict=state,
        optimizer_state_dict=dict(state={}, param_groups=[dict(lr=1e-3)]), best_metric=0.5)
    if moco: content['moco_metadata'] = dict(is_moco=True, momentum=0.999, queue_size=8192)
    with Omega() as omega:
        torch.save(content | dict(config=omega.make(CONFIG)), path,
                   _use_new_zipfile_serialization=not legacy)
    with pytest.raises(Exception): torch.load(path, weights_only=True)
    again, saved, found = load_pretrained_encoder(path)
    x = torch.randn(2, 1, 800)
    with torch.no_grad(): assert torch.equal(again.eval()(x), e(x))
    assert saved['config'] == CONFIG and saved['epoch'] == 99 and again.config['mamba_dt_rank'] == 1
    line = describe_loading(path, found)
    n = len(e.state_dict())
    if moco:
        assert (f'MoCo detected: True, momentum 0.999, queue size 8192, {n+4} MoCo parameters '
                f'skipped, 2 parameters of heads skipped, {n} parameters loaded' in line)
    else:
        assert f'MoCo detected: False, 2 parameters of heads skipped, {n} parameters loaded' in line

def test_without_pickled_objects_and_with_the_prefix_of_ddp(tmp_path):
    e, state = original(True, mamba_n_layers=1, cnn_channels=[8, 16], cnn_kernel_sizes=[7, 3],
                        cnn_strides=[4, 4], mamba_d_model=16, mamba_d_state=4)
    torch.save(dict(model_state_dict={f'module.{k}': v for k, v in state.items()},
                    config=dict(model=dict(cnn_strides=[4, 4]))), tmp_path/'a.pt')
    again, saved, found = load_pretrained_encoder(tmp_path/'a.pt')
    x = torch.randn(2, 1, 800)
    with torch.no_grad(): assert torch.equal(again.eval()(x), e(x))
    assert found['moco'] and found['queue_size'] == 8192 and found['momentum'] is None

def test_strides_that_the_file_does_not_say_come_from_the_configuration(tmp_path):
    e, state = original(mamba_n_layers=1, cnn_channels=[8, 16], cnn_kernel_sizes=[7, 3],
                        cnn_strides=[4, 4], mamba_d_model=16)
    torch.save(dict(model_state_dict=state), tmp_path/'a.pt')
    assert load_pretrained_encoder(tmp_path/'a.pt', dict(cnn_strides=[4, 4]))[0].config == e.config
    with pytest.raises(PahclError, match='mamba_n_layers 1, but model.mamba_n_layers is 4'):
        load_pretrained_encoder(tmp_path/'a.pt', dict(mamba_n_layers=4))

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.sampled_from([4, 6]), st.integers(1, 3), st.integers(1, 4),
       st.integers(1, 3), st.booleans(), st.integers(0, 2))
def test_sizes_are_read_off_the_weights(layers, width, state_numbers, conv, rank, both,
                                        mamba_layers):
    config = dict(cnn_channels=[4]*layers, cnn_kernel_sizes=[5]*layers, cnn_strides=[2]*layers,
                  mamba_d_model=width, dropout=0.1)
    if mamba_layers:
        config |= dict(mamba_n_layers=mamba_layers, mamba_d_state=state_numbers, mamba_d_conv=conv,
                       mamba_expand=3, mamba_dt_rank=rank, mamba_bidirectional=both)
    e = build_encoder('cnn_mamba' if mamba_layers else 'cnn', **config)
    found = _infer_encoder_config(e.state_dict(), dict(cnn_strides=[2]*layers))
    again = build_encoder({'mamba_d_model': width, **found, 'dropout': 0.1})
    assert again.config == e.config

@pytest.mark.parametrize('name,begin', [('sincnext_bm', 'sinc_conv.'), ('resnet34_1d', 'stem.')])
def test_other_encoders_are_told_by_their_names(tmp_path, name, begin):
    e = build_encoder(name)
    assert any(k.startswith(begin) for k in e.state_dict())
    torch.save(dict(model_state_dict={f'encoder.{k}': v for k, v in e.state_dict().items()}),
               tmp_path/'a.pt')
    assert load_pretrained_encoder(tmp_path/'a.pt')[0].config == e.config

class TheirBlock(torch.nn.Module):
    "torchvision's BasicBlock with one dimension, written down here as an independent witness."
    def __init__(self, n, o, stride, norm):
        super().__init__()
        nn = torch.nn
        self.conv1, self.bn1 = nn.Conv1d(n, o, 3, stride, 1, bias=False), norm(o)
        self.conv2, self.bn2 = nn.Conv1d(o, o, 3, 1, 1, bias=False), norm(o)
        self.downsample = nn.Sequential(nn.Conv1d(n, o, 1, stride, bias=False),
                                        norm(o)) if stride > 1 or n != o else None
    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y+(x if self.downsample is None else self.downsample(x))).relu()

class TheirResNet(torch.nn.Module):
    def __init__(self, widths=(16, 24, 32, 40), depths=(3, 4, 6, 3),
                 norm=torch.nn.BatchNorm1d, stem=7):
        super().__init__()
        nn, n = torch.nn, widths[0]
        self.conv1, self.bn1 = nn.Conv1d(1, n, stem, 2, stem//2, bias=False), norm(n)
        for i, (o, d) in enumerate(zip(widths, depths)):
            setattr(self, f'layer{i+1}',
                    nn.Sequential(*(TheirBlock(n if k == 0 else o, o, 2 if i and not k else 1, norm)
                                    for k in range(d))))
            n = o
        self.fc, self.stages = nn.Linear(n, 2), len(widths)
    def forward(self, x):
        x = torch.nn.functional.max_pool1d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for i in range(self.stages): x = getattr(self, f'layer{i+1}')(x)
        return x.mean(-1)

def their_resnet(**options):
    torch.manual_seed(0)
    net = TheirResNet(**options)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5), torch.nn.init.normal_(m.bias)
    for _ in range(3): net(torch.randn(8, 1, 512))  # statistics that are not those of the start
    return net.eval()

def test_residual_networks_of_the_original_say_what_they_said(tmp_path):
    net, x = their_resnet(), torch.randn(3, 1, 800)
    state = {f'module.encoder.{k}': v for k, v in net.state_dict().items()}
    state |= {k.replace('encoder.', 'encoder_momentum.'): v for k, v in state.items()} | {
        'module.queue': torch.zeros(128, 512), 'module.cycle_projector.0.weight': torch.zeros(2, 2)}
    torch.save(dict(model_state_dict=state, moco_metadata=dict(momentum=0.99)), tmp_path/'a.pt')
    e, saved, found = load_pretrained_encoder(tmp_path/'a.pt')
    with torch.no_grad():
        torch.testing.assert_close(e.eval()(x), net(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(e(torch.nn.functional.pad(x, (0, 200), value=9.),
                                     torch.full((3,), 800)), net(x), atol=1e-4, rtol=1e-4)
    assert (e.config['norm'] == 'affine' and e.config['cnn_channels'] == [16, 24, 32, 40]
            and not list(e.buffers()))
    n = sum(isinstance(m, torch.nn.BatchNorm1d) for m in net.modules())
    line = describe_loading('a.pt', found)
    assert line == (
        f'a.pt: MoCo detected: True, momentum 0.99, queue size 512, {len(net.state_dict())+1} MoCo '
        'parameters skipped, 1 parameters of heads skipped, '
        f'2 parameters of the encoder skipped (fc.weight, fc.bias), {2*n} statistics of batch '
        f'norms folded in, {len(e.state_dict())} parameters loaded')
    torch.save(dict(model_state_dict={
        f'encoder.{k}': v for k, v in their_resnet(depths=(1, 1, 1, 1)).state_dict().items()}),
               tmp_path/'b.pt')
    with pytest.raises(PahclError, match='b.pt does not fit the encoder'):
        load_pretrained_encoder(tmp_path/'b.pt')
    torch.save(dict(model_state_dict={f'encoder.{k}': v
                                      for k, v in their_resnet(stem=15).state_dict().items()}),
               tmp_path/'c.pt')
    with pytest.raises(PahclError, match=r'1 misshapen: stem.conv.weight \[16, 1, 15\] there, '
                                         r'\[16, 1, 7\] here'):
        load_pretrained_encoder(tmp_path/'c.pt')
    torch.save(dict(model_state_dict={'encoder.layer1.0.conv1.weight': torch.zeros(64, 64, 3)}),
               tmp_path/'d.pt')
    with pytest.raises(PahclError,
                       match='d.pt does not fit the encoder .* missing: blocks.0.first.norm.bias'):
        load_pretrained_encoder(tmp_path/'d.pt')

def their_band(low_hz, band_hz):
    "SincNet's filters in Hz, from its formula."
    low = 50+low_hz.abs()
    return low.flatten(), (low+50+band_hz.abs()).flatten()

def test_sinc_filters_of_the_original_stay_where_they_are(tmp_path):
    torch.manual_seed(0)
    own = build_encoder('sincnext_bm', cnn_channels=[12, 64, 128, 256],
                        cnn_kernel_sizes=[251, 7, 7, 7])
    kept = {k: v+0.5 for k, v in own.state_dict().items() if k.startswith('mamba.layers.0.')}
    low, band = torch.linspace(-20, 400, 12)[:, None], torch.linspace(80, 200, 12)[:, None]
    state = kept | {'sinc_conv.low_hz_': low, 'sinc_conv.band_hz_': band,
                    'sinc_conv.n_': torch.zeros(1, 125), 'sinc_conv.window_': torch.zeros(125),
                    'convnext.0.dwconv.weight': torch.zeros(3)}
    torch.save(dict(model_state_dict={f'encoder.{k}': v for k, v in state.items()}),
               tmp_path/'a.pt')
    e, _, found = load_pretrained_encoder(tmp_path/'a.pt')
    for a, b in zip(e.sinc_conv.edges(), their_band(low, band)):
        torch.testing.assert_close(a.detach(), b, atol=0.01, rtol=1e-4)
    assert (e.config['cnn_kernel_sizes'][0] == 251
            and all(torch.equal(v, e.state_dict()[k]) for k, v in kept.items()))
    n = len(e.state_dict())
    assert (found['loaded'] == len(kept)+2 and found['encoder_skipped']
            == ['convnext.0.dwconv.weight'] and len(found['at_random']) == n-found['loaded'])
    line = describe_loading('a.pt', found)
    assert ('1 parameters of the encoder skipped (convnext.0.dwconv.weight), '
            f'{len(kept)+2} parameters loaded; WARNING: {n-len(kept)-2} parameters of the encoder '
            'are not in the file and start at random' in line)
    state['mamba.layers.0.norm.weight'] = torch.zeros(64)
    torch.save(dict(model_state_dict={f'encoder.{k}': v for k, v in state.items()}),
               tmp_path/'b.pt')
    with pytest.raises(PahclError, match=r'mamba.layers.0.norm.weight \[64\] there, \[256\] here'):
        load_pretrained_encoder(tmp_path/'b.pt')
    del state['sinc_conv.n_'], state['sinc_conv.window_'], state['mamba.layers.0.norm.weight']
    torch.save(dict(model_state_dict={f'encoder.{k}': v for k, v in state.items()},
                    config=dict(model=dict(cnn_kernel_sizes=[801, 3]))), tmp_path/'c.pt')
    assert load_pretrained_encoder(tmp_path/'c.pt')[0].config['cnn_kernel_sizes'] == [801, 7, 7, 7]


class Call:
    "Pickles as a call of any function."
    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)
    def __reduce__(self): return self.call

HIT = []
def hit(*args, **kwargs): HIT.append(args)

def hostile(folder):
    marker = str(folder/'marker')
    return dict(
        system=Call(os.system, f'touch {marker}'), popen=Call(subprocess.Popen, ['touch', marker]),
        evaluate=Call(eval, f"open({marker!r}, 'w')"), own=Call(hit, 1),
        write=Call(open, marker, 'w'), attribute=Call(getattr, collections.OrderedDict, 'fromkeys'),
        code=Call(exec, f"open({marker!r}, 'w')"), module=Call(__import__, 'antigravity'),
        state=Call(collections.OrderedDict, state={'a': Call(os.mkdir, marker)}),
        nested=Call(map, hit, [1, 2]), torch_load=Call(torch.load, marker),
        hub=Call(torch.hub.load, 'a/b', 'c'), items=[Call(os.mkdir, marker)], again=Call(hit))

@pytest.mark.parametrize('which', list(hostile(Path('x'))))
@pytest.mark.parametrize('legacy', [False, True])
def test_hostile_files_run_nothing(tmp_path, which, legacy):
    HIT.clear()
    _, state = original(mamba_n_layers=1)
    path = tmp_path/'evil.pt'
    torch.save(dict(model_state_dict=state, config=hostile(tmp_path)[which]), path,
               _use_new_zipfile_serialization=not legacy)
    before = set(sys.modules)
    encoder, saved, found = load_pretrained_encoder(path)
    assert (not (tmp_path/'marker').exists() and not HIT
            and found['loaded'] == len(encoder.state_dict()))
    assert 'antigravity' not in set(sys.modules)-before

def test_the_test_is_sharp(tmp_path):
    "The same file does run something in the hands of plain pickle."
    HIT.clear()
    pickle.loads(pickle.dumps(hostile(tmp_path)['own']))
    assert HIT == [(1,)]

def test_hostile_weights_and_whole_files(tmp_path):
    HIT.clear()
    path = tmp_path/'evil.pt'
    for content in (Call(hit), [Call(hit)], dict(model_state_dict=Call(hit)),
                    dict(model_state_dict={'encoder.a': Call(hit)}),
                    {'model_state_dict': {}, 'a': Call(hit)}):
        torch.save(content, path)
        with pytest.raises(PahclError): load_pretrained_encoder(path)
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(PahclError): load_pretrained_encoder(path)
    assert not HIT

def test_programs_of_torchscript_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/'a.pt')
    with pytest.raises(PahclError, match='TorchScript'): read_foreign_checkpoint(tmp_path/'a.pt')
    with pytest.raises(PahclError): load_pretrained_encoder(tmp_path/'a.pt')

@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_pickles_are_errors_or_values(data):
    try: _to_plain_types(_CarefulUnpickler(io.BytesIO(b'\x80\x04'+data)).load())
    except Exception as e: assert not isinstance(e, (SystemExit, KeyboardInterrupt))

def test_lists_of_lists_of_lists_do_not_fill_the_memory():
    value = [0]
    for _ in range(200): value = [value, value]
    assert len(_to_plain_types(value)) == 2
    loop = []; loop.append(loop)
    assert _to_plain_types(loop) == [None]

@pytest.mark.parametrize('damage', ['cut', 'rubbish', 'empty', 'zip', 'tensor'])
def test_damaged_files_are_named(tmp_path, damage):
    _, state = original(mamba_n_layers=1)
    path = tmp_path/'a.pt'
    with Omega() as omega: torch.save(dict(model_state_dict=state, config=omega.make(CONFIG)), path)
    if damage == 'cut': path.write_bytes(path.read_bytes()[:-2000])
    elif damage == 'rubbish': path.write_bytes(os.urandom(500))
    elif damage == 'empty': path.write_bytes(b'')
    elif damage == 'zip':
        with zipfile.ZipFile(path, 'w') as archive: archive.writestr('a/b', 'c')
    else: torch.save(torch.zeros(3), path)
    with pytest.raises(PahclError, match='a.pt'): load_pretrained_encoder(path)
    with pytest.raises(PahclError, match='a.pt'): read_foreign_checkpoint(path)

def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PahclError, match='none.pt'): load_pretrained_encoder(tmp_path/'none.pt')

def test_stubs_take_whatever_a_pickle_does_to_them():
    stub = _InertObject(1, a=2)
    stub.append(1), stub.extend([2]), stub.add(3), stub.__setitem__('a', 4)
    assert (stub.items == [1, 2, 3, ('a', 4)] and isinstance(stub(5), _InertObject)
            and _to_plain_types(stub) == '<.>')
    with pytest.raises(PahclError, match='something else than tensors: encoder.a'):
        _convert_checkpoint(dict(model_state_dict={'encoder.a': 3}))
