"A module of others becomes an encoder: resampled for, never shown padding, frozen or fine-tuned"
import copy
import numpy as np, pytest, scipy.signal, soxr, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
import pahcl.core.config_sections as config
import pahcl.models.encoder_base as encoder_base
from pahcl.core.basics import PahclError
from pahcl.evaluation.evaluator import evaluate
from pahcl.models.checkpoints import load_classifier
from pahcl.models.classifier import Classifier
from pahcl.models.encoder_base import Encoder, register_encoder
from pahcl.models.encoders import build_encoder
from pahcl.models.foreign_encoders import _Resampler
from pahcl.models.hub import from_pretrained
from pahcl.training.finetuning import finetune

pytestmark = pytest.mark.usefixtures('one_thread', 'quiet')

@pytest.fixture(autouse=True, scope='module')
def forget():
    "What this file registers is gone after it."
    encoders, keys = dict(encoder_base.ENCODERS), {k: dict(v) for k, v in
                                                   config._REGISTERED_KEYS.items()}
    register()
    yield
    for kept, table in ((encoders, encoder_base.ENCODERS), (keys, config._REGISTERED_KEYS)):
        table.clear()
        table.update(kept)

class Normed(nn.Module):
    "50 frames a second of 16 kHz, normed over time: zeros behind a sound change all of it."
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv1d(1, channels, 400, stride=320)
        self.norm, self.drop = nn.GroupNorm(1, channels), nn.Dropout(.5)

    def forward(self, x):
        return self.drop(F.gelu(self.norm(self.first(x[:, None])))).transpose(1, 2)

class Vector(nn.Module):
    "One vector a waveform: its loudness and its mean absolute step, weighed."
    def __init__(self, width=3):
        super().__init__()
        self.mix = nn.Linear(2, width)

    def forward(self, x): return self.mix(torch.stack([x.std(1), x.diff().abs().mean(1)], 1))

def register():
    register_encoder('normed', sample_rate=16000, channels=12)(Normed)
    register_encoder('vector', sample_rate=2000)(Vector)

def cycles(B=4, T=4000, seed=0):
    return torch.randn(B, 1, T, generator=torch.Generator().manual_seed(seed))


# ---- resampling ------------------------------------------------------------------------------

@pytest.mark.parametrize('rate', [16000, 44100, 8000, 4000, 2000])
def test_as_soxr_and_scipy_resample(rate):
    "A sweep up to 0.85 of the lower Nyquist frequency, the ends left out; what is above is gone."
    t, top, edge = np.arange(6000)/5000, .85*min(rate, 5000)/2, rate//25
    sweep = np.sin(2*np.pi*(20*t+(top-20)/2.4*t**2)).astype(np.float32)
    ours = _Resampler(5000, rate)(torch.from_numpy(sweep)[None])[0].numpy()
    inner = slice(edge, -edge)
    theirs = soxr.resample(sweep, 5000, rate, 'VHQ')
    assert ours.shape == theirs.shape and np.abs(ours-theirs)[inner].max() < 5e-4
    up, down = rate//np.gcd(rate, 5000), 5000//np.gcd(rate, 5000)
    window = scipy.signal.firwin(2*64*max(up, down)+1, .95/max(up, down), window=('kaiser', 9.))
    theirs = scipy.signal.resample_poly(sweep, up, down, window=window)
    assert np.abs(ours-theirs)[inner].max() < 5e-4
    above = np.sin(2*np.pi*1.15*rate/2*t).astype(np.float32)
    if rate < 4000:
        gone = _Resampler(5000, rate)(torch.from_numpy(above)[None])[0].numpy()
        assert np.abs(gone[inner]).max() < 1e-3

def test_the_resampler_lets_gradients_through():
    x = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Resampler(5, 16), x)
    assert _Resampler(5000, 5000)(x) is x and not _Resampler(5, 16).state_dict()


# ---- the adapter -----------------------------------------------------------------------------

@pytest.mark.parametrize('name, stride, width', [('normed', 100, 12), ('vector', 4000, 3)])
def test_the_promises_of_an_encoder(name, stride, width):
    e, x, n = build_encoder(name).eval(), cycles(), torch.tensor([4000, 2600, 0, 2600])
    assert isinstance(e, Encoder) and (e.stride, e.out_dim) == (stride, width)
    assert e.frame_rate == 5000/stride
    with torch.no_grad():
        together, frames = e(x, n), e.sequence(x, n)
        rubbish = x.clone()
        rubbish[1, 0, 2600:] = 1e4
        assert torch.equal(e(rubbish, n), together) and not torch.equal(e(rubbish), e(x))
        for i, m in enumerate(n.tolist()):
            alone = e(x[i:i+1, :, :m])[0] if m else torch.zeros(width)
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)
    assert frames.shape == (4, -(-4000//stride), width) and not frames[2].any()
    assert not frames[1, -(-2600//stride):].any()

@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=5), st.integers(900, 1300))
def test_any_length(lengths, T):
    "Also below what the module needs for a frame; rows come back in their order."
    e, x = build_encoder('normed').eval(), cycles(len(lengths), T)
    with torch.no_grad():
        y = e.sequence(x, torch.tensor(lengths))
        for row, n in enumerate(lengths):
            assert y[row].any(1).tolist() == [i < -(-n//100) for i in range(-(-T//100))]
            if n: torch.testing.assert_close(y[row:row+1, :-(-n//100)],
                                             e.sequence(x[row:row+1, :, :n]), atol=1e-5, rtol=0)

def test_frames_stand_where_they_were_heard():
    "A click is loud in the frame in which it falls, whatever the module's own frames are."
    @register_encoder('loud_frames', sample_rate=8000)
    class Loud(nn.Module):
        def forward(self, x):   # 62.5 frames a second
            return F.avg_pool1d(x.abs()[:, None], 128, ceil_mode=True).transpose(1, 2)
    e = build_encoder('loud_frames').eval()
    assert e.stride == 80 and e.frame_rate == 62.5
    for place in (10, 1000, 2055, 3990):
        x = torch.zeros(1, 1, 4000)
        x[0, 0, place] = 1
        assert abs(int(e.sequence(x)[0, :, 0].argmax())-place//80) <= 1

def test_rates_and_scales_are_settings():
    x = cycles(2, 1600)
    slow = build_encoder('normed', cycle_rate=2000)
    assert (slow.stride, slow.frame_rate) == (40, 50) and slow.sequence(x).shape == (2, 40, 12)
    e = build_encoder('vector').eval()
    half = build_encoder('vector', input_scale=.5).eval()
    half.load_state_dict(e.state_dict())
    torch.testing.assert_close(half(x), e(x/2))

@pytest.mark.parametrize('frozen', [False, True])
def test_frozen_or_fine_tuned(frozen):
    x, n = cycles(), torch.tensor([4000, 2600, 3000, 2600])
    model = Classifier(build_encoder('normed', frozen=frozen), 2).train()
    before = copy.deepcopy(model.encoder.state_dict())
    assert model.encoder.training and model.encoder.module.training != frozen
    wave = x.clone().requires_grad_(True)
    F.cross_entropy(model(wave, n), torch.tensor([0, 1, 0, 1])).backward()
    assert wave.grad[0].any() and not wave.grad[1, 0, 2600:].any()   # a saliency map can be drawn
    grads = [p.grad is not None and bool(p.grad.any()) for p in model.encoder.parameters()]
    assert grads == [not frozen]*len(grads)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.).step()
    moved = [not torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items()]
    assert moved == [not frozen]*len(moved) and model.classifier[0].weight.grad.any()

def test_saved_and_loaded_to_the_bit(tmp_path):
    e, x = build_encoder('normed', frozen=True).eval(), cycles()
    e.save_pretrained(tmp_path/'e')
    again = from_pretrained(tmp_path/'e')
    assert torch.equal(again(x), e(x)) and again.config == e.config
    assert set(e.state_dict()) == {f'module.{k}' for k in Normed(12).state_dict()}


# ---- what goes wrong -------------------------------------------------------------------------

class Gives(nn.Module):
    "Gives whatever it was told."
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x): return eval(self.what)

@pytest.mark.parametrize('what, message', [
    ('x.std()', r'for waveforms \[1, 6400\] the module gave \[\]; \[1, C\] or \[1, L, C\]'),
    ('x[:, None, None]', r'the module gave \[1, 1, 1, 6400\]'), ('(x, x)', 'gave a tuple'),
    ('torch.zeros(2, 3)', r'the module gave \[2, 3\]'),
    ('x.new_zeros(len(x), 5, 2)', 'gave 5 frames for 0.8 s and for 4 s')])
def test_a_wrong_answer_is_named(what, message):
    register_encoder('gives', sample_rate=8000, what='x')(Gives)
    with pytest.raises(PahclError, match=f'encoder gives: .*{message}'):
        build_encoder('gives', what=what)

def test_wrong_registrations_are_refused():
    class Clash(nn.Module):
        def __init__(self, frozen): super().__init__()
    for wrong, preset, message in [
            (Vector, {}, 'Vector is no Encoder, so the rate'),
            (Vector, dict(sample_rate=0), '@register_encoder'),
            (print, dict(sample_rate=8000), 'print is neither an Encoder nor a torch.nn.Module'),
            (Clash, dict(sample_rate=8000), 'Clash takes frozen, which the adapter keeps')]:
        with pytest.raises(PahclError, match=message): register_encoder('wrong', **preset)(wrong)
    assert register_encoder('vector', sample_rate=2000)(Vector) is Vector   # a cell run again
    with pytest.raises(PahclError, match='two encoders are called vector'):
        register_encoder('vector', sample_rate=2000)(Gives)

@pytest.mark.parametrize('shape, says', [((2, 9, 4), r'\[2, 9, 4\]'), ((2, 10, 5), r'\[2, 10, 5\]'),
                                         ((2, 4), r'\[2, 4\]')])
def test_an_own_encoder_with_a_wrong_shape(shape, says):
    class Own(Encoder):
        def __init__(self): super().__init__(dict(encoder_type='own'), stride=8, out_dim=4)
        def encode_frames(self, x, valid_length): return torch.zeros(shape)
    message = rf'encoder own: encode_frames gave {says} for cycles \[2, 1, 80\]; .* \[2, 10, 4\]'
    for n in (None, torch.tensor([80, 3])):
        with pytest.raises(PahclError, match=message): Own()(torch.zeros(2, 1, 80), n)


# ---- a run -----------------------------------------------------------------------------------

def test_through_the_commands(pretraining_on, tmp_path):
    "Published weights are a folder; linear evaluation, checkpoint and evaluation take them."
    folder = pretraining_on({})
    torch.manual_seed(3)
    build_encoder('normed').save_pretrained(tmp_path/'published')
    given = dict(task='circor_murmur', data_dir=folder/'downstream', output_dir=tmp_path, epochs=1)
    finetune(pretrained=tmp_path/'published', linear_eval=True, **given)
    best = tmp_path/'circor_murmur_downstream'/'best_model.pt'
    model, saved = load_classifier(best)
    assert saved['encoder_type'] == 'normed'
    published = from_pretrained(tmp_path/'published').state_dict()
    assert all(torch.equal(v, published[k]) for k, v in model.encoder.state_dict().items())
    results = evaluate(best, 'circor_murmur', folder/'downstream', draws=20,
                       output_dir=tmp_path/'e')
    assert results['encoder_type'] == 'normed' and 'f1_macro' in results['levels']['subject']


# ---- transformers' wav2vec2, where it is installed -------------------------------------------

def test_wav2vec2():
    "At random weights and a tiny size, with the group norm over time of its base model."
    transformers = pytest.importorskip('transformers')
    @register_encoder('wav2vec2', sample_rate=16000, width=16)
    class Wav2Vec2(nn.Module):
        def __init__(self, width):
            super().__init__()
            sizes = dict(hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, conv_dim=[8]*7, num_conv_pos_embeddings=16,
                         num_conv_pos_embedding_groups=2)
            self.model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes))
        def forward(self, x): return self.model(x)   # `last_hidden_state` is taken
    e, x, n = build_encoder('wav2vec2').eval(), cycles(2), torch.tensor([4000, 2600])
    assert (e.stride, e.out_dim, e.frame_rate) == (100, 16, 50)
    with torch.no_grad():
        torch.testing.assert_close(e(x, n)[1], e(x[1:, :, :2600])[0], atol=1e-5, rtol=1e-5)
    e.train()(x, n).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in e.parameters())
