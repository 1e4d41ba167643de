"""The page of a prediction: it needs nothing but itself, its sound is the recording's, its size is
bounded
"""
import base64, io
from html.parser import HTMLParser
import numpy as np, pytest, soundfile, torch
from pahcl.data.heart_sounds import simulate_recording
from pahcl.evaluate import pahcl_predict
from pahcl.models.checkpoints import classifier_checkpoint, save_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.encoders import build_encoder

pytestmark = pytest.mark.usefixtures('quiet', 'one_thread')

class Page(HTMLParser):
    "Which elements a page has, with their attributes, and its text."
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ''
        self.feed(text)
    def handle_starttag(self, tag, attributes): self.elements.append((tag, dict(attributes)))
    def handle_data(self, data): self.text += data
    def all(self, tag): return [a for t, a in self.elements if t == tag]

@pytest.fixture(scope='module', params=['pad', 'phase'])
def made(request, tmp_path_factory):
    "three recordings, one of them long and one silent, and what the script writes of them"
    folder = tmp_path_factory.mktemp('report')
    for name, seconds, rate in (('1_<AV>', 5, 4000), ('2_AV', 35, 2000)):
        soundfile.write(folder/f'{name}.wav', simulate_recording(seconds, rate, seed=1)[0], rate)
    soundfile.write(folder/'3_AV.wav', np.zeros(8000), 2000)
    torch.manual_seed(0)
    model = Classifier(build_encoder('cnn', cnn_channels=[4, 8, 8, 8]), 2)
    data = dict(sample_rate=5000, target_length=4000, length_mode=request.param)
    saved = classifier_checkpoint(model, 'circor_outcome', dict(Normal=0, Abnormal=1),
                                  dict(data=data, training=dict(num_epochs=3)), ['a', 'b'])
    if request.param == 'pad':
        p = torch.linspace(0, 1, 20)
        own = dict(label=torch.arange(20)//8 % 2, probabilities=torch.stack([1-p, p], 1),
                   person=torch.arange(20)//2)
        saved['validation'] = dict(recording=own, subject=own)
    save_checkpoint(folder/'best_model.pt', saved)
    code = pahcl_predict([str(folder), '--checkpoint', str(folder), '--report',
                          str(folder/'report.html'), '--report-recordings', '2',
                          '--output', str(folder/'out.csv')])
    assert code == 0
    return folder, Page((folder/'report.html').read_text()), request.param

def test_nothing_from_elsewhere(made):
    page = made[1]
    sources = [v for _, a in page.elements for k, v in a.items() if k == 'src']
    assert sources and all(s.startswith('data:') for s in sources) and 'http' not in page.text
    assert not page.all('link') and 'For research, not for diagnosis' in page.text

def test_sound_is_the_recording(made):
    folder, page, _ = made
    for name, audio, box in zip(('1_<AV>', '2_AV'), page.all('audio'),
                                [a for a in page.all('div') if a.get('class') == 'picture']):
        bytes_ = base64.b64decode(audio['src'].split(',', 1)[1])
        sound, rate = soundfile.read(io.BytesIO(bytes_))
        seconds = soundfile.info(folder/f'{name}.wav').duration
        assert rate == 4000 and len(sound)/rate == pytest.approx(seconds, abs=1/rate)
        assert float(box['data-at'].strip('[]').split(',')[2]) == pytest.approx(seconds, abs=1e-3)
        assert .5 < np.abs(sound).max() < 1

def test_size_and_what_is_said(made):
    folder, page, mode = made
    assert (folder/'report.html').stat().st_size < 2e6
    assert len(page.all('audio')) == len(page.all('img')) == 2
    for text in ('1 more recordings are in the table only', 'on 2 persons', '3 epochs',
                 'data set circor', '1_<AV>', 'no heartbeat found'): assert text in page.text
    known = 'On 10 validation persons' in page.text
    assert known == (mode == 'pad') and known != ('does not say' in page.text)
