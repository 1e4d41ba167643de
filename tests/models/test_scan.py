"""The scan against formulas that know no loop, the fast backend against the reference, the block
against a step-by-step recurrence
"""
import ctypes.util, logging, math, multiprocessing, os, pickle, subprocess, sys, types
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
import pahcl.models.mamba_block as mamba_block
import pahcl.models.selective_scan as scan
import pahcl.models.compiled_scan as compiled
from pahcl.core.basics import PahclError
from pahcl.models.mamba_block import _inverse_softplus, MambaBlock
from pahcl.models.chunked_scan import _CHUNK_STEPS
from pahcl.models.scan_reference import _scan_reference
from pahcl.models.selective_scan import selective_scan

pytestmark = pytest.mark.usefixtures('one_thread')

needs_c = pytest.mark.skipif(not compiled._have_compiled(),
                             reason='pahcl was installed without a C compiler')
FAST = ['torch', pytest.param('c', marks=needs_c)]
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')

def arguments(b=2, d=3, n=4, length=40, dtype=torch.float64, seed=0, scale=0.1):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return dict(u=r(b, d, length), delta=(scale*r(b, d, length).double().exp()).to(dtype),
                A=-r(d, n).exp(), B=r(b, n, length), C=r(b, n, length),
                D=r(d), z=r(b, d, length), delta_bias=r(d))

def outcomes(backend, a, wanted=NAMES, **options):
    "Output, last state and the gradients of the wanted inputs."
    leaves = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in a.items()}
    y, last = selective_scan(**leaves, return_last_state=True, backend=backend, **options)
    # a linear loss: gradients of the scan, no others
    weights = lambda v: torch.arange(v.numel(), dtype=v.dtype).float().cos().view(v.shape)
    ((y*weights(y)).sum()+(last*weights(last)).sum()).backward()
    return dict(y=y.detach(), last=last.detach(),
                **{k: leaves[k].grad for k in wanted if k in leaves})

def assert_same(one, other, relative):
    for k in one:
        size = other[k].abs().max().clamp(min=1e-30)
        assert ((one[k]-other[k]).abs().max()/size) < relative, k

@pytest.mark.parametrize('backend', FAST)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 37), st.integers(1, 5),
       st.one_of(st.integers(1, 2*_CHUNK_STEPS+2), st.integers(1, 600)),
       st.sampled_from([1e-4, 0.01, 0.3, 3.0, 50.0]),
       st.sets(st.sampled_from(['D', 'z', 'delta_bias'])), st.booleans(), st.integers(0, 2**20))
def test_fast_backends_are_the_reference(backend, b, d, n, length, scale, optional, softplus, seed):
    a = {k: v for k, v in arguments(b, d, n, length, seed=seed, scale=scale).items()
         if k in NAMES[:5] or k in optional}
    # steps stay positive
    if 'delta_bias' in a and not softplus: a['delta_bias'] = a['delta_bias'].abs()*scale
    assert_same(outcomes(backend, a, a.keys(), delta_softplus=softplus),
                outcomes('reference', a, a.keys(), delta_softplus=softplus), 1e-9)

@pytest.mark.parametrize('backend', FAST)
@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(NAMES), min_size=1), st.integers(1, 40))
def test_only_some_gradients_are_wanted(backend, wanted, length):
    a = arguments(length=length)
    some, every = (outcomes(backend, a, wanted, delta_softplus=True),
                   outcomes('reference', a, delta_softplus=True))
    assert_same(some, {k: every[k] for k in some}, 1e-9)

@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('length',
                         [1, _CHUNK_STEPS-1, _CHUNK_STEPS, _CHUNK_STEPS+1, 2*_CHUNK_STEPS+3])
def test_gradients_are_finite_differences(backend, length):
    a = tuple(v.requires_grad_() for v in arguments(1, 2, 2, length).values())
    function = lambda *v: selective_scan(*v, delta_softplus=True, return_last_state=True,
                                         backend=backend)
    assert torch.autograd.gradcheck(function, a, fast_mode=length > 1)

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 80), st.sampled_from([1e-3, 0.1, 5.0]), st.integers(0, 2**20))
def test_reference_is_a_triangular_matrix(length, scale, seed):
    a = arguments(length=length, scale=scale, seed=seed)
    u, delta, A, B, C = (a[k].numpy() for k in NAMES[:5])
    t = delta.cumsum(-1)
    lag = t[..., None]-t[..., None, :]
    fade = np.exp(np.tril(lag)[..., None]*A[:, None, None])
    y = np.einsum('bnt,bdtsn,bns,bds,bds->bdt', C,
                  fade*np.tril(np.ones((length, length)))[..., None], B, delta, u)
    last = np.einsum('bdsn,bns,bds,bds->bdn', fade[:, :, -1], B, delta, u)
    ours, state = _scan_reference(*(a[k] for k in NAMES[:5]))
    np.testing.assert_allclose(ours, y, rtol=1e-9, atol=1e-12*np.abs(y).max())
    np.testing.assert_allclose(state, last, rtol=1e-9, atol=1e-12)

def test_a_sequence_can_be_cut_in_two_at_its_state():
    a = arguments(length=60)
    head, tail = ({k: v[..., part] if v.shape[-1] == 60 else v for k, v in a.items()}
                  for part in (slice(None, 23), slice(23, None)))
    y, last = selective_scan(**a, delta_softplus=True, return_last_state=True)
    _, state = selective_scan(**head, delta_softplus=True, return_last_state=True)
    rest, end = selective_scan(**tail, delta_softplus=True, return_last_state=True)
    time = torch.nn.functional.softplus(tail['delta']+a['delta_bias'][:, None]).cumsum(-1)
    carried = torch.einsum('bnt,bdtn,bdn->bdt', tail['C'], (time[..., None]*a['A'][:, None]).exp(),
                           state)*torch.nn.functional.silu(tail['z'])
    torch.testing.assert_close(y[..., 23:], rest+carried)
    torch.testing.assert_close(last, end+(time[..., -1:]*a['A']).exp()*state)

@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('scale', [1e-4, 0.1, 100.0])
def test_float32_stays_close_to_float64(backend, scale):
    a = arguments(2, 8, 16, 600, scale=scale)
    single = outcomes(backend, {k: v.float() for k, v in a.items()}, delta_softplus=True)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in single.values())
    assert_same({k: v.double() for k, v in single.items()},
                outcomes('torch', a, delta_softplus=True), 1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', [*FAST, 'reference'])
def test_half_precision_is_computed_in_float32(dtype, backend):
    a = arguments(length=300, dtype=dtype)
    half, full = (outcomes(backend, a, delta_softplus=True),
                  outcomes(backend, {k: v.float() for k, v in a.items()}, delta_softplus=True))
    assert torch.equal(half['y'], full['y'].to(dtype)) and half['last'].dtype == torch.float32
    assert torch.equal(half['last'], full['last']) and all(half[k].dtype == dtype for k in NAMES)
    with torch.autocast('cpu', torch.bfloat16):
        under = outcomes(backend, {k: v.float() for k, v in a.items()}, delta_softplus=True)
    assert all(torch.equal(under[k], full[k]) for k in full)

@pytest.mark.parametrize('backend', FAST)
def test_any_memory_layout(backend):
    a = arguments(length=33)
    turned = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 3 else v
              for k, v in a.items()}
    assert_same(outcomes(backend, turned, delta_softplus=True),
                outcomes(backend, a, delta_softplus=True), 1e-12)
    base = {k: v.clone() for k, v in a.items()}
    selective_scan(**a, delta_softplus=True, backend=backend)
    assert all(torch.equal(a[k], base[k]) for k in a)  # inputs are not written to

@pytest.mark.parametrize('backend', FAST)
def test_memory_is_that_of_checkpoints(backend):
    a, kept = {k: v.requires_grad_() for k, v in arguments(2, 16, 16, 320).items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                  lambda t: t):
        selective_scan(**a, delta_softplus=True, backend=backend)
    state = 2*16*16
    # checkpoints, and a few tensors as large as u
    assert max(kept) <= 320*state/8 and sum(kept) < (320/_CHUNK_STEPS)*state + 20*2*16*320
    calls = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: calls.append(1) or t,
                                                                   lambda t: t):
        selective_scan(**a, backend=backend)
    assert not calls

@pytest.mark.parametrize('backend', FAST)
def test_second_derivatives_are_refused_not_wrong(backend):
    a = arguments(length=5)
    a['u'].requires_grad_()
    g, = torch.autograd.grad(selective_scan(**a, delta_softplus=True,
                                            backend=backend).square().sum(),
                             a['u'], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

@pytest.mark.parametrize('name', NAMES)
def test_wrong_shapes_are_named(name):
    a = arguments()
    wrong = a[name][..., :-1]
    where = {'u': 'delta', 'A': 'B'}.get(name, name)  # L is taken from u, N from A
    with pytest.raises(PahclError, match=rf'selective_scan: {where} has shape'):
        selective_scan(**{**a, name: wrong})
    with pytest.raises(PahclError, match=f'{name} is torch.int64'):
        selective_scan(**{**a, name: a[name].long()})

def test_wrong_dimensions_and_backends_are_named():
    a = arguments()
    with pytest.raises(PahclError, match=r'u must be \[B, D, L\]'):
        selective_scan(**{**a, 'u': a['u'][0]})
    for name in ('C', 'cuda'):
        with pytest.raises(PahclError, match=f"no backend '{name}'; use one of auto, reference, "
                                             "torch, c, mamba_ssm"):
            selective_scan(**a, backend=name)

def test_without_mamba_ssm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mamba_ssm', None)
    scan.have_mamba_ssm.cache_clear()
    with pytest.raises(PahclError, match='mamba_ssm.*has no kernels here.*pip install'):
        selective_scan(**arguments(), backend='mamba_ssm')
    assert scan._choose_backend(types.SimpleNamespace(is_cuda=True, dtype=torch.float32)) == 'torch'
    scan.have_mamba_ssm.cache_clear()

def test_mamba_ssm_without_kernels_is_not_used(monkeypatch):
    """Its main branch since June 2026: everything imports, selective_scan_cuda is None, and a call
    fails.
    """
    modules = {n: types.ModuleType(n)
               for n in ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.selective_scan_interface')}
    interface = modules['mamba_ssm.ops.selective_scan_interface']
    interface.selective_scan_cuda, interface.selective_scan_fn = None, lambda *a: None.fwd(*a)
    for name, module in modules.items(): monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', None)
    scan.have_mamba_ssm.cache_clear()
    assert not scan.have_mamba_ssm() and scan._choose_backend(
        types.SimpleNamespace(is_cuda=True, dtype=torch.float32)) == 'torch'
    assert (mamba_block.slow_scan_warnings(mamba_block.MambaBlock(8), 'cuda')
            == [mamba_block._NO_KERNELS_WARNING]
            and mamba_block.slow_scan_warnings(torch.nn.Linear(1, 1), 'cuda') == [])
    scan.have_mamba_ssm.cache_clear()

def test_what_mamba_ssm_is_given(monkeypatch):
    "A stand-in with the published signature: names, order and types are what the kernels ask for."
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):
        assert u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype == torch.bfloat16
        assert (A.dtype == D.dtype == delta_bias.dtype == torch.float32 and delta_softplus
                and return_last_state)
        y, last = _scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return y.to(u.dtype), last
    modules = {n: types.ModuleType(n) for n in ('selective_scan_cuda', 'mamba_ssm', 'mamba_ssm.ops',
                                                'mamba_ssm.ops.selective_scan_interface')}
    modules['mamba_ssm.ops.selective_scan_interface'].selective_scan_fn = selective_scan_fn
    for name, module in modules.items(): monkeypatch.setitem(sys.modules, name, module)
    scan.have_mamba_ssm.cache_clear()
    a = {k: v if k in ('A', 'D', 'delta_bias') else v.bfloat16()
         for k, v in arguments(dtype=torch.float32).items()}
    assert torch.equal(selective_scan(**a, delta_softplus=True, backend='mamba_ssm'),
                       selective_scan(**a, delta_softplus=True, backend='reference'))
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert scan._choose_backend(on_gpu) == 'mamba_ssm' and scan._choose_backend(
        types.SimpleNamespace(is_cuda=True, dtype=torch.float64)) == 'torch'
    assert scan._choose_backend(torch.zeros(1)) == ('c' if compiled._have_compiled() else 'torch')
    scan.have_mamba_ssm.cache_clear()

LEVELS = [pytest.param(k, marks=needs_c) for k in range(
    1, 1+(compiled._compiled_library().pahcl_levels() if compiled._have_compiled() else 1))]

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('dtype,relative', [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_every_instruction_set_gives_the_reference(monkeypatch, level, dtype, relative):
    plain = compiled.compiled_scan
    monkeypatch.setattr(scan, 'compiled_scan', lambda *a: plain(*a, level=level))
    for d, length, scale in [(1, 1, 0.1), (16, 16, 1e-4), (33, 15, 3.0), (70, 65, 0.1),
                             (5, 4096, 0.01), (5, 4096, 50.0)]:
        a = arguments(2, d, 3, length, scale=scale, seed=d)
        ours = outcomes('c', {k: v.to(dtype) for k, v in a.items()}, delta_softplus=True)
        assert_same({k: v.double() for k, v in ours.items() if v.abs().max() > 1e-30},
                    outcomes('torch', a, delta_softplus=True), relative)

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('dtype,relative', [(torch.float32, 4e-7), (torch.float64, 5e-16)])
def test_elementary_functions(level, dtype, relative):
    exact = dict(exp=np.exp, softplus=lambda x: np.logaddexp(np.longdouble(0), x),
                 logistic=lambda x: 1/(1+np.exp(-x)))
    edge = 87 if dtype == torch.float32 else 708
    x = torch.cat([torch.linspace(-30, 30, 30001), torch.linspace(-edge, edge, 30001),
                   torch.logspace(-12, 0, 999), -torch.logspace(-12, 0, 999)]).to(dtype)
    for name, function in exact.items():
        truth = function(x.numpy().astype(np.longdouble))
        # PyTorch's threshold: x itself
        near = np.where(x.numpy() > 20, relative+np.exp(-20.),
                        relative) if name == 'softplus' else relative
        near = near*(2 if name != 'exp' and dtype == torch.float64 else 1)
        small = np.finfo(x.numpy().dtype).tiny*4
        assert (np.abs(compiled._apply_elementary(name, x, level).numpy()-truth)
                <= near*truth+small).all(), name

@needs_c
@pytest.mark.parametrize('softplus', [True, False])
def test_extremes_are_finite_and_nan_is_not_hidden(softplus):
    for rate, step in [(-1e4, 1e3), (-1e-6, 1e-8), (-1e4, 1e-8), (0.0, 1.0)]:
        a = {k: v.float() for k, v in arguments(1, 40, 4, 100).items()}
        a['A'], a['delta'], a['delta_bias'] = (torch.full_like(a['A'], rate),
                                               torch.full_like(a['delta'], step), torch.zeros(40))
        one, other = (outcomes('c', a, delta_softplus=softplus),
                      outcomes('torch', a, delta_softplus=softplus))
        assert all(v.isfinite().all() for v in one.values())
        assert_same({k: v for k, v in one.items() if other[k].abs().max() > 1e-30}, other, 1e-4)
    for name in NAMES[:5]:
        a = {k: v.float() for k, v in arguments(1, 4, 4, 30).items()}
        a[name].flatten()[0] = float('nan')
        assert selective_scan(**a, delta_softplus=softplus, backend='c').isnan().any(), name

@needs_c
def test_growing_states_overflow_as_in_the_reference():
    a = {k: v.float() for k, v in arguments(1, 4, 4, 30).items()}
    a['A'], a['delta'] = a['A'].abs(), torch.full_like(a['delta'], 100)
    ours, theirs = (selective_scan(**a, backend=b, return_last_state=True)[1]
                    for b in ('c', 'reference'))
    assert torch.equal(ours.isfinite(), theirs.isfinite()) and not ours.isfinite().all()

@needs_c
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 80), st.integers(1, 5), st.integers(1, 70),
       st.integers(0, 1000))
def test_the_number_of_threads_changes_nothing(b, d, n, length, seed):
    a, before = ({k: v.float() for k, v in arguments(b, d, n, length, seed=seed).items()},
                 torch.get_num_threads())
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(outcomes('c', a, delta_softplus=True))
    finally: torch.set_num_threads(before)
    assert all(torch.equal(results[0][k], r[k]) for r in results[1:] for k in r)

@needs_c
def test_floating_point_mode_is_left_alone():
    """Numbers below the smallest normal one still count, on this thread and on new ones, in PyTorch
    and in NumPy.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        outcomes('c', {k: v.float() for k, v in arguments(2, 64, 4, 40).items()},
                 delta_softplus=True)
        assert (float(np.float32(1e-38)*np.float32(1e-3)) > 0
                and float(torch.tensor(1e-38)*torch.tensor(1e-3)) > 0)
        assert ((torch.full((10**6,), 1e-38)*1e-3) > 0).all()
    finally: torch.set_num_threads(threads)

def in_child(a):
    """The scan with PyTorch's threads set to two; then gradients, with one, as PyTorch's own
    operators need it in a forked process.
    """
    threads, y = torch.get_num_threads(), selective_scan(**a, delta_softplus=True, backend='c')
    torch.set_num_threads(1)
    rest = outcomes('c', a, delta_softplus=True)
    assert torch.equal(y, rest['y'])
    return (pickle.dumps({k: v.numpy() for k, v in rest.items()}),
            compiled._compiled_library().pahcl_forked(), threads)

class Scans(torch.utils.data.Dataset):
    "A data set whose items are scans, as a worker process would compute them."
    def __init__(self, a): self.a = a
    def __len__(self): return 4
    def __getitem__(self, i): return selective_scan(**self.a, delta_softplus=True, backend='c')

@needs_c
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
@pytest.mark.filterwarnings('ignore:.*fork')
def test_in_a_forked_worker():
    "The parent's threads are gone in a child: it must neither hang nor compute anything else."
    a, threads = {k: v.float() for k, v in arguments(2, 64, 4, 40).items()}, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        here = outcomes('c', a, delta_softplus=True)  # the parent has used its threads
        with multiprocessing.get_context('fork').Pool(1) as pool:
            there, forked, count = pool.apply_async(in_child, (a,)).get(timeout=60)
        assert forked == 1 and count == 2 and compiled._compiled_library().pahcl_forked() == 0
        assert all(np.array_equal(here[k].numpy(), v) for k, v in pickle.loads(there).items())
        loader = torch.utils.data.DataLoader(Scans(a), num_workers=1,
                                             multiprocessing_context='fork', batch_size=2,
                                             timeout=60)
        for batch in loader: assert torch.equal(batch[0], here['y'])
    finally: torch.set_num_threads(threads)

@pytest.fixture
def no_library(monkeypatch):
    "As if pahcl had been installed without a compiler; yields what the log says."
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    scan.get_logger().addHandler(handler)
    monkeypatch.setattr(compiled, 'find_spec', lambda name: None)
    compiled._find_library.cache_clear()
    scan.LOGGED.clear()
    yield lines
    scan.get_logger().removeHandler(handler)
    compiled._find_library.cache_clear()

def test_without_the_library_it_falls_back_and_says_so(no_library):
    a = arguments()
    y = selective_scan(**a, delta_softplus=True)
    selective_scan(**a, delta_softplus=True)
    assert torch.equal(y, selective_scan(**a, delta_softplus=True, backend='torch'))
    assert (len(no_library) == 1 and 'falling back to the torch backend' in no_library[0]
            and 'Install a C compiler' in no_library[0])
    with pytest.raises(PahclError, match="backend 'c' was not compiled here; install a C compiler"):
        selective_scan(**a, backend='c')

@needs_c
def test_a_foreign_library_is_not_called(no_library, monkeypatch, tmp_path):
    (tmp_path/'rubbish.so').write_bytes(b'no library')
    for path, why in [(ctypes.util.find_library('m') or 'libm.so.6', 'has no pahcl_size'),
                      (str(tmp_path/'rubbish.so'), 'rubbish.so')]:
        monkeypatch.setattr(compiled, 'find_spec', lambda name: types.SimpleNamespace(origin=path))
        compiled._find_library.cache_clear()
        assert not compiled._have_compiled() and why in compiled._find_library()[1]

@needs_c
def test_tensors_elsewhere_are_refused():
    a = {k: v.to('meta') for k, v in arguments().items()}
    with pytest.raises(PahclError, match="backend 'c' runs on the CPU, and u is on meta"):
        scan._scan_c(**a)

@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('sizes', [(0, 3, 4, 5), (2, 3, 4, 0), (0, 0, 1, 0)])
def test_nothing_gives_nothing(backend, sizes):
    got = outcomes(backend, arguments(*sizes), delta_softplus=True)
    assert (got['y'].shape == (sizes[0], sizes[1], sizes[3])
            and all(not v.abs().sum() for k, v in got.items() if k != 'y'))

@needs_c
def test_no_copy_of_the_blocks_layout():
    "What leaves the scan has the layout of what came in, and so have the gradients."
    base = torch.randn(2, 40, 24)
    u, delta, z = (v.transpose(1, 2).requires_grad_() for v in base.chunk(3, -1))
    y = selective_scan(u, delta, -torch.ones(8, 4), torch.randn(2, 4, 40), torch.randn(2, 4, 40),
                       z=z, delta_softplus=True, backend='c')
    assert y.transpose(1, 2).is_contiguous()
    assert all(g.transpose(1, 2).is_contiguous()
               for g in torch.autograd.grad(y.sum(), (u, delta, z)))

def test_build_without_a_compiler(tmp_path):
    "setup.py ends well, says what is missing, and leaves no half of a library."
    root = Path(scan.__file__).resolve().parent.parent
    if not (root/'setup.py').exists(): pytest.skip('installed without its sources')
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'build_ext', '--build-lib',
                           tmp_path/'lib', '--build-temp', tmp_path/'temp'], cwd=root,
                          env={**os.environ, 'CC': '/no/compiler'}, capture_output=True, text=True)
    assert (done.returncode == 0 and 'the selective scan will run in PyTorch' in done.stdout
            and not list(tmp_path.rglob('*_selective_scan*.so')))

# the sizes that mamba_ssm/modules/mamba_simple.py gives its layers
@pytest.mark.parametrize('d_model,options,inner,rank,state,conv', [
    (256, {}, 512, 16, 16, 4), (96, {}, 192, 6, 16, 4),
    (100, dict(d_state=8, d_conv=2, expand=3), 300, 7, 8, 2), (16, dict(dt_rank=5), 32, 5, 16, 4)])
def test_parameters_are_those_of_mamba_ssm(d_model, options, inner, rank, state, conv):
    block = MambaBlock(d_model, **options)
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == {
        'A_log': (inner, state), 'D': (inner,), 'in_proj.weight': (2*inner, d_model),
        'conv1d.weight': (inner, 1, conv), 'conv1d.bias': (inner,),
        'x_proj.weight': (rank+2*state, inner), 'dt_proj.weight': (inner, rank),
        'dt_proj.bias': (inner,), 'out_proj.weight': (d_model, inner)}
    assert torch.allclose(block.A_log.exp(), torch.arange(1., state+1).expand(inner, state),
                          rtol=1e-5) and torch.equal(block.D, torch.ones(inner))
    assert block.A_log._no_weight_decay and block.D._no_weight_decay

def test_start_step_sizes_are_log_uniform():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(MambaBlock(4096,
                                                    d_state=1).dt_proj.bias.detach().double()).log()
    share = ((steps-math.log(0.001))/math.log(100)).sort().values
    # Kolmogorov-Smirnov, p = 0.01
    assert (share-torch.linspace(0, 1, len(share),
                                 dtype=torch.float64)).abs().max() < 1.63/len(share)**0.5
    y = torch.tensor([1e-4, 0.5, 20.0, 700.0], dtype=torch.float64)
    assert torch.allclose(torch.nn.functional.softplus(_inverse_softplus(y)), y, rtol=1e-10)

def slow_block(p, x):
    """The whole block in numpy, one sample and one step at a time, from the paper and not from our
    code.
    """
    silu, softplus = lambda v: v/(1+np.exp(-v)), lambda v: np.log1p(np.exp(v))
    p = {k: v.detach().double().numpy() for k, v in p.items()}
    inner, states = p['A_log'].shape
    rank, width, out = p['dt_proj.weight'].shape[1], p['conv1d.weight'].shape[2], []
    for sequence in x.double().numpy():
        window, h, ys = np.zeros((width, inner)), np.zeros((inner, states)), []
        for token in sequence:
            xz = p['in_proj.weight']@token
            window = np.vstack([window[1:], xz[:inner]])
            v = silu((window.T*p['conv1d.weight'][:, 0]).sum(1)+p['conv1d.bias'])
            projected = p['x_proj.weight']@v
            step = softplus(p['dt_proj.weight']@projected[:rank]+p['dt_proj.bias'])
            B, C = projected[rank:rank+states], projected[rank+states:]
            for d in range(inner): h[d] = np.exp(-np.exp(p['A_log'][d])*step[d])*h[d]+step[d]*B*v[d]
            ys.append(p['out_proj.weight']@((h@C+p['D']*v)*silu(xz[inner:])))
        out.append(ys)
    return np.array(out)

@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40),
       st.sampled_from([dict(), dict(d_state=3, d_conv=2, expand=3), dict(d_conv=1, dt_rank=2)]),
       st.sampled_from(['auto', 'reference']), st.integers(0, 1000))
def test_block_is_the_slow_recurrence(length, options, backend, seed):
    torch.manual_seed(seed)
    block = MambaBlock(6, **options, backend=backend)
    with torch.no_grad():
        block.D.normal_(), block.A_log.add_(0.3*torch.randn_like(block.A_log))
        x = torch.randn(2, length, 6)
        np.testing.assert_allclose(block(x).numpy(), slow_block(block.state_dict(), x), rtol=1e-4,
                                   atol=1e-5)

def test_block_in_float64_and_its_gradients():
    torch.manual_seed(0)
    block, x = MambaBlock(4, d_state=2).double(), torch.randn(1, 19, 4, dtype=torch.float64,
                                                              requires_grad=True)
    assert torch.autograd.gradcheck(block, x) and block(x).dtype == torch.float64
    block(x).sin().sum().backward()
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in block.parameters())

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 59), st.integers(0, 1000))
def test_the_future_does_not_change_the_past(t, seed):
    torch.manual_seed(seed)
    block, x = MambaBlock(8, d_state=4).double(), torch.randn(1, 60, 8, dtype=torch.float64,
                                                              requires_grad=True)
    block(x)[0, :t].sum().backward()
    assert x.grad[0, t:].abs().max() == 0 and (x.grad[0, :t].abs().sum(-1) > 0).all()

def test_half_precision_block():
    torch.manual_seed(0)
    block, x = MambaBlock(32), torch.randn(2, 50, 32)
    with torch.no_grad():
        full = block(x)
        with torch.autocast('cpu', torch.bfloat16): half = block(x)
    assert half.dtype == torch.bfloat16 and torch.nn.functional.cosine_similarity(
        half.float().flatten(), full.flatten(), 0) > 0.999
